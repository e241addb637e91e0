//! VeRA: LoRA whose factors are random, frozen and shared by all layers; each layer trains two vectors.
//!
//! Kopiczko et al. 2024, arXiv:2310.11454: `y = x W + (((x A) ∘ d) B) ∘ b` with `A`, `[d_in, r]`, and
//! `B`, `[r, d_out]`. The pair has the largest `d_in` and the largest `d_out` of the adapted layers, and
//! a layer takes the first rows of `A` and the first columns of `B`. As in PEFT, both are
//! uniform by Kaiming's rule, in `±√(6 / fan_in)` with the fan-in `d_in` of `A` and `r` of `B`; `d` is
//! initialized to 0.1 and `b` to zero.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::checks::{check_count, check_dtype, check_positive, check_product, check_shape};
use super::dropout::Dropout;
use super::hf::{
    HfConfig, HfError, HfFormat, HfKey, HfLayer, HfReader, hf_number, hf_vector, read_config,
};
use super::tensors::{
    Shared, Source, bounded, floats, low_rank_sum, stored, tensor, trained, uniform,
};
use super::{Adapter, AdapterOps, Method, Settings};
use crate::{Exactness, Linear, Result, Targets, Weight, learning_rate};
use tensor_files::{LazyTensor, TensorFile};

const METHOD: &str = "VeRA";

/// Trains two vectors of each layer, `r + d_out` parameters, dense or packed.
///
/// It merges as [`Lora`](crate::Lora) does: into a dense weight within a bound, and into a packed one
/// only where [`OffGrid`](crate::OffGrid) asks for it.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Linear, Method, Vera, Weight};
///
/// let weight = Weight::frozen(Tensor::ones([8, 6], &Device::flex()));
/// let linear = Linear::new(weight, None);
/// let adapter = Vera::new(16).init("proj", &linear)?;
/// assert_eq!(burn::module::Module::num_params(&adapter), 16 + 6);
/// assert!(Vera::new(0).init("proj", &linear).is_err());
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Vera {
    rank: usize,
    d_initial: f32,
    dropout: f32,
    targets: Targets,
    seed: u64,
}

impl Vera {
    /// VeRA of this rank `r` on every linear layer. PEFT's default is 256.
    pub fn new(rank: usize) -> Self {
        Self {
            rank,
            d_initial: 0.1,
            dropout: 0.0,
            targets: Targets::All,
            seed: 0,
        }
    }

    /// Sets the initial value of `d`, 0.1 by default.
    pub fn with_d_initial(mut self, value: f32) -> Self {
        self.d_initial = value;
        self
    }

    /// Sets the probability with which inputs of `A` are dropped while [`fit`](crate::fit()) trains.
    pub fn with_dropout(mut self, probability: f32) -> Self {
        self.dropout = probability;
        self
    }

    /// Sets the layers to adapt.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.targets = targets.into();
        self
    }

    /// Sets the seed that `A` and `B` are drawn from.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The shared factors of layers of at most these dimensions.
    fn factors(&self, [d_in, d_out]: [usize; 2], device: &Device) -> [Shared; 2] {
        let draw = |name, dims, fan_in: usize| {
            let bound = (6.0 / fan_in as f32).sqrt();
            Shared::new(uniform(self.seed, name, dims, bound, device))
        };
        let rank = self.rank;
        [
            draw("vera_A", [d_in, rank], d_in),
            draw("vera_B", [rank, d_out], rank),
        ]
    }
}

impl Method for Vera {
    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter> {
        let mut adapters = self.init_all(&[(path.into(), linear)])?;
        Ok(adapters.remove(0))
    }

    fn init_all(&self, layers: &[(String, &Linear)]) -> Result<Vec<Adapter>> {
        check_count("rank", self.rank)?;
        check_positive("d_initial", self.d_initial)?;
        for (path, linear) in layers {
            check_dtype(path, linear.weight())?;
        }
        let Some((_, first)) = layers.first() else {
            return Ok(Vec::new());
        };
        let most = layers.iter().fold([0, 0], |most: [usize; 2], (_, linear)| {
            let dims = linear.weight().dims();
            [most[0].max(dims[0]), most[1].max(dims[1])]
        });
        let [a, b] = self.factors(most, &first.weight().device());
        let adapter = |(_, linear): &(String, &Linear)| {
            let device = linear.weight().device();
            let d_out = linear.weight().dims()[1];
            let d = trained(vec![self.d_initial; self.rank], [self.rank], &device);
            let b_vector = trained(vec![0.0; d_out], [d_out], &device);
            VeraAdapter::new([a.clone(), b.clone()], d, b_vector, self.dropout).map(Adapter::Vera)
        };
        layers.iter().map(adapter).collect()
    }

    fn learning_rate(&self, _: usize) -> f64 {
        learning_rate::of_vectors()
    }
}

/// The trained vectors of one layer, and the frozen factors that all layers share.
#[derive(Module, Debug)]
pub struct VeraAdapter {
    /// `[r]`.
    lambda_d: Param<Tensor<1>>,
    /// `[d_out]`.
    lambda_b: Param<Tensor<1>>,
    /// `[d_in or more, r]`.
    shared_a: Shared,
    /// `[r, d_out or more]`.
    shared_b: Shared,
    #[module(skip)]
    dropout: Dropout,
}

/// The settings of a [`VeraAdapter`] in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VeraSettings {
    dropout: f32,
    /// The digests of the shared factors.
    a: String,
    b: String,
}

impl VeraAdapter {
    fn new(
        [shared_a, shared_b]: [Shared; 2],
        lambda_d: Param<Tensor<1>>,
        lambda_b: Param<Tensor<1>>,
        dropout: f32,
    ) -> Result<Self> {
        check_count("rank", lambda_d.val().dims()[0])?;
        let dropout = Dropout::new(dropout);
        dropout.check()?;
        Ok(Self {
            lambda_d,
            lambda_b,
            shared_a,
            shared_b,
            dropout,
        })
    }

    /// The trained factors of the ranks, `[r]`: PEFT's `vera_lambda_d`.
    pub fn d(&self) -> Tensor<1> {
        self.lambda_d.val()
    }

    /// The trained factors of the outputs, `[d_out]`: PEFT's `vera_lambda_b`.
    pub fn b(&self) -> Tensor<1> {
        self.lambda_b.val()
    }

    /// The frozen factors `[d_in, r]` and `[r, d_out]` of a layer with so many inputs.
    fn factors(&self, d_in: usize) -> [Tensor<2>; 2] {
        let (rank, d_out) = (self.d().dims()[0], self.b().dims()[0]);
        let a = self.shared_a.tensor.clone().slice([0..d_in, 0..rank]);
        [a, self.shared_b.tensor.clone().slice([0..rank, 0..d_out])]
    }

    pub(super) fn read(settings: VeraSettings, path: &str, source: &mut Source) -> Result<Self> {
        let factors = [source.shared(&settings.a)?, source.shared(&settings.b)?];
        let d = source.param(&format!("{path}.d"))?;
        let b = source.param(&format!("{path}.b"))?;
        Self::new(factors, d, b, settings.dropout)
    }
}

impl AdapterOps for VeraAdapter {
    fn name(&self) -> &'static str {
        METHOD
    }

    fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        check_dtype(path, linear.weight())?;
        let [d_in, d_out] = linear.weight().dims();
        check_shape(path, [d_out], self.b().dims())?;
        let ([rows, rank], [b_rank, columns]) =
            (self.shared_a.tensor.dims(), self.shared_b.tensor.dims());
        check_shape(path, [rank], self.d().dims())?;
        check_shape(path, [rank, columns], [b_rank, columns])?;
        // Larger ones have room for other layers.
        check_shape(path, [rows.max(d_in), columns.max(d_out)], [rows, columns])
    }

    fn check_values(&self, path: &str, weight: &Weight) -> Result<()> {
        let [a, b] = self.factors(weight.dims()[0]);
        let factors = [a * self.d().unsqueeze(), b * self.b().unsqueeze()];
        check_product(self.name(), path, factors, 1.0)
    }

    fn forward(&self, weight: &Weight, x: Tensor<2>) -> Tensor<2> {
        let [a, b] = self.factors(x.dims()[1]);
        let [of_ranks, of_outputs] = [self.d(), self.b()].map(|v| v.cast(x.dtype()).unsqueeze());
        let low = kernels::matmul(self.dropout.apply(x.clone()), a) * of_ranks;
        weight.matmul(x) + kernels::matmul(low, b) * of_outputs
    }

    fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness) {
        let [a, b] = self.factors(weight.dims()[0]);
        let (a, b) = (
            a * self.d().detach().unsqueeze(),
            b * self.b().detach().unsqueeze(),
        );
        let [merged, magnitudes] = low_rank_sum(weight, a, b);
        // As LoRA, with a vector more.
        bounded(merged, magnitudes, self.d().dims()[0] + 3)
    }

    fn seed_dropout(&mut self, path: &str, seed: Option<u64>) {
        self.dropout.seed(path, seed);
    }

    fn settings(&self) -> Settings {
        Settings::Vera(VeraSettings {
            dropout: self.dropout.probability(),
            a: self.shared_a.digest().into(),
            b: self.shared_b.digest().into(),
        })
    }

    fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        vec![("d", stored(&self.lambda_d)), ("b", stored(&self.lambda_b))]
    }

    fn shared(&self) -> Vec<&Shared> {
        vec![&self.shared_a, &self.shared_b]
    }

    fn to_hf(&self) -> Result<HfLayer<'_>, String> {
        Ok(HfLayer {
            peft_type: HF_FORMAT.peft_type,
            rank: self.d().dims()[0],
            alpha: 1.0,
            settings: vec![("vera_dropout", hf_number(self.dropout.probability()))],
            any: Vec::new(),
            tensors: vec![
                (LAMBDA_B, hf_vector(self.b())),
                (LAMBDA_D, hf_vector(self.d())),
            ],
            shared: vec![("vera_A", &self.shared_a), ("vera_B", &self.shared_b)],
        })
    }
}

const LAMBDA_B: &str = "vera_lambda_b";
const LAMBDA_D: &str = "vera_lambda_d";

/// VeRA in PEFT's files.
pub(crate) const HF_FORMAT: HfFormat = HfFormat {
    peft_type: "VERA",
    alpha_key: None,
    keys: &[
        HfKey::read("bias"),
        HfKey::read("save_projection"),
        HfKey::read("vera_dropout"),
        HfKey::ignored("d_initial", "what the vectors began with"),
        HfKey::ignored("init_weights", "what the vectors began with"),
        HfKey::ignored("projection_prng_key", "the factors are in the file"),
    ],
    tensors: &[LAMBDA_B, LAMBDA_D],
    aliases: &[],
    shared: &["vera_A", "vera_B"],
    config: || {
        json!({
            "d_initial": 0.1,
            "init_weights": true,
            "projection_prng_key": 0,
            "save_projection": true,
        })
    },
    reader,
};

#[derive(Deserialize)]
#[serde(default)]
struct VeraConfig {
    r: usize,
    bias: String,
    save_projection: bool,
    vera_dropout: f32,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            r: 256,
            bias: "none".into(),
            save_projection: true,
            vera_dropout: 0.0,
        }
    }
}

fn reader(config: &HfConfig, file: &mut TensorFile, device: &Device) -> Result<HfReader, HfError> {
    let config: VeraConfig = read_config(config)?;
    if config.bias != "none" {
        return Err(HfError::Config(format!(
            "bias is {:?}; VeRA can be read without trained biases",
            config.bias
        )));
    }
    if !config.save_projection {
        return Err(HfError::Config("save_projection is false: the random factors are not in the file, and only PyTorch can draw them again; save the adapter with `save_projection=True`".into()));
    }
    let r = config.r;
    let mut factor = |name: &str, rank_at: usize| -> Result<_, HfError> {
        let name = format!("base_model.{name}");
        let (values, dims) = file.floats::<2>(&name)?;
        if dims[rank_at] == r && r > 0 {
            // In the memory layout of factors that are drawn or read from our files, so that
            // products have the same bits.
            let factor = tensor(values, dims, device).transpose();
            let dims = factor.dims();
            return Ok(Shared::new(tensor(floats(factor), dims, device)));
        }
        let problem = format!("is {dims:?}, where the configuration says rank {r}");
        Err(file.refuse(&name, problem).into())
    };
    let factors = [factor("vera_A", 0)?, factor("vera_B", 1)?];
    Ok(Box::new(move |source| {
        let d = source.vector(LAMBDA_D)?;
        let b = source.vector(LAMBDA_B)?;
        let adapter = VeraAdapter::new(factors.clone(), d, b, config.vera_dropout)?;
        Ok(Adapter::Vera(adapter))
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use proptest::prelude::*;
    use rand::RngExt;

    use super::*;
    use crate::adapter::tensors::layer_rng;
    use crate::adapter::testing::Matrix;

    proptest! {
        /// Outputs and merged weights against sums in f64, with and without room for other layers.
        #[test]
        fn outputs_are_those_of_the_sum(
            dims in (1..30usize, 1..30usize, 1..20usize),
            room in (0..3usize, 0..3usize),
            seed in any::<u64>(),
        ) {
            let (d_in, d_out, rank) = dims;
            let mut rng = layer_rng(seed, "");
            let mut random = |dims: [usize; 2]| {
                let values = (0..dims[0] * dims[1]).map(|_| rng.random_range(-1.0..1.0));
                tensor(values.collect(), dims, &Device::flex())
            };
            let factors = [random([d_in + room.0, rank]), random([rank, d_out + room.1])];
            let [d, b] = [rank, d_out].map(|n| Param::from_tensor(random([1, n]).squeeze_dim(0)));
            let adapter = VeraAdapter::new(factors.map(Shared::new), d, b, 0.0).unwrap();
            let (weight, x) = (random([d_in, d_out]), random([3, d_in]));
            let base = Weight::frozen(weight.clone());
            adapter.check("up", &Linear::new(base.clone(), None)).unwrap();

            let [a, b] = adapter.factors(d_in).map(Matrix::of);
            let [d, lambda_b] = [adapter.d(), adapter.b()].map(|v| Matrix::of(v.unsqueeze()));
            let a = Matrix::new(a.dims, |i, k| a.at(i, k) * d.at(0, k));
            let b = Matrix::new(b.dims, |k, j| b.at(k, j) * lambda_b.at(0, j));
            let w = Matrix::of(weight);
            let sum = w.plus(1.0, &a.times(&b));
            let magnitudes = w.abs().plus(1.0, &a.abs().times(&b.abs()));
            let (merged, exactness) = adapter.to_dense(&base);
            let Exactness::Bounded { max_weight_error, .. } = exactness else {
                panic!("{exactness:?}");
            };
            let found = Matrix::of(merged);
            prop_assert!(sum.is_near(&found, rank + 3, &magnitudes));
            let errors = sum.values.iter().zip(&found.values).map(|(sum, found)| (sum - found).abs());
            prop_assert!(errors.fold(0.0, f64::max) <= max_weight_error);
            let rows = Matrix::of(x.clone());
            let found = Matrix::of(adapter.forward(&base, x));
            let y_magnitudes = rows.abs().times(&magnitudes);
            prop_assert!(rows.times(&sum).is_near(&found, d_in + rank + 3, &y_magnitudes));
        }
    }

    #[test]
    fn layers_share_one_pair_that_follows_the_seed() {
        let linear = |dims: [usize; 2]| {
            Linear::new(Weight::frozen(Tensor::zeros(dims, &Device::flex())), None)
        };
        let (wide, tall) = (linear([4, 9]), linear([7, 3]));
        let attached = |seed| {
            let layers = [("wide".to_string(), &wide), ("tall".to_string(), &tall)];
            Vera::new(5).with_seed(seed).init_all(&layers).unwrap()
        };
        let digests = |seed| -> Vec<Vec<String>> {
            let adapters = attached(seed).into_iter();
            let each = adapters.map(|adapter| {
                let shared = adapter.ops().shared().into_iter();
                shared.map(|shared| shared.digest().to_string()).collect()
            });
            each.collect()
        };
        let first = digests(1);
        assert_eq!(first[0], first[1]);
        assert_eq!(digests(1), first);
        assert_ne!(digests(2), first);
        let adapters = attached(1);
        let dims: Vec<[usize; 2]> = (adapters[0].ops().shared().into_iter())
            .map(|shared| shared.tensor.dims())
            .collect();
        assert_eq!(dims, [[7, 5], [5, 9]]);
        for (adapter, linear) in adapters.iter().zip([&wide, &tall]) {
            adapter.check("up", linear).unwrap();
        }
        for adapter in &adapters {
            let Adapter::Vera(vera) = adapter else {
                panic!("{adapter:?}");
            };
            assert_eq!(floats(vera.d()), [0.1; 5]);
            assert!(floats(vera.b()).iter().all(|&b| b == 0.0));
        }
        // There is no room for a layer that is larger.
        let error = adapters[0].check("up", &linear([8, 9])).unwrap_err();
        assert!(matches!(error, crate::Error::Shape { .. }), "{error}");

        let vera = Vera::new(5).with_d_initial(0.25).init("up", &wide).unwrap();
        let Adapter::Vera(vera) = vera else {
            panic!("{vera:?}");
        };
        assert_eq!(floats(vera.d()), [0.25; 5]);
    }

    #[test]
    fn factors_are_uniform_by_kaimings_rule() {
        let factors = Vera::new(10).factors([40, 30], &Device::flex());
        for (factor, fan_in) in factors.into_iter().zip([40f32, 10.0]) {
            let bound = (6.0 / fan_in).sqrt();
            let most = factor.tensor.abs().max().into_scalar::<f32>();
            assert!(0.9 * bound < most && most <= bound, "{most} {bound}");
        }
    }
}
