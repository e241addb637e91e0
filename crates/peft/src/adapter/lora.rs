//! LoRA: the weight plus a product of two thin matrices; over a packed weight it is QLoRA.
//!
//! Hu et al. 2021, arXiv:2106.09685, and Dettmers et al. 2023, arXiv:2305.14314:
//! `y = x W + σ (x A) B` with `W` frozen. `σ = α / r`, or `α / √r` in rsLoRA (Kalajdzievski 2023,
//! arXiv:2312.03732). `A` begins uniform in `±1 / √d_in`, as in PEFT (Kaiming with `a = √5`),
//! and `B` at zero.
//!
//! DoRA (Liu et al. 2024, arXiv:2402.09353) trains the norms of the outputs' weights apart from
//! their directions: `y = (m / ‖W + σ A B‖) (x W + σ (x A) B)`, with a norm and an `m` for each output.
//! As in PEFT, the norm is a constant in the backward pass. It is computed as
//! `‖w + σ A b‖² = ‖w‖² + 2 σ (wᵀ A) b + σ² bᵀ (AᵀA) b`, from a product of the weight with `r` rows and
//! without a dense update. Where weight and update cancel to less than a thousandth of their size, no
//! digits of this sum are left, and the norm is bounded below by that thousandth.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::checks::{
    check_count, check_dtype, check_positive, check_product, check_rank, check_shape,
};
use super::dropout::Dropout;
use super::hf::{HfLayer, hf_factor, hf_number, hf_vector};
use super::tensors::{Source, bounded, low_rank_sum, stored, uniform};
use super::{Adapter, AdapterOps, Method, Settings};
use crate::{Error, Exactness, Linear, Result, Targets, Weight};
use tensor_files::LazyTensor;

#[cfg(test)]
mod tests;

/// The names of a layer's tensors in PEFT's files.
pub(crate) const HF_A: &str = "lora_A.weight";
pub(crate) const HF_B: &str = "lora_B.weight";
pub(crate) const HF_BIAS: &str = "base_layer.bias";
pub(crate) const HF_MAGNITUDE: &str = "lora_magnitude_vector";

/// Trains a matrix of low rank beside each layer's weight, dense or packed.
///
/// It merges into a dense weight within a bound that the certificate states. The sum with a packed
/// weight is not on its grid: that merge is refused unless [`OffGrid`](crate::OffGrid) asks for it, and
/// the adapters stay beside the base.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Error, Linear, Lora, Method, Weight};
///
/// let weight = Weight::frozen(Tensor::ones([8, 6], &Device::flex()));
/// let linear = Linear::new(weight, None);
/// let adapter = Lora::new(2).with_alpha(4.0).init("proj", &linear)?;
/// assert_eq!(burn::module::Module::num_params(&adapter), 8 * 2 + 2 * 6);
/// let error = Lora::new(7).init("proj", &linear).unwrap_err();
/// assert!(matches!(error, Error::Rank { rank: 7, .. }));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    rank: usize,
    alpha: Option<f32>,
    rank_stabilized: bool,
    dora: bool,
    bias: bool,
    dropout: f32,
    targets: Targets,
    seed: u64,
}

impl Lora {
    /// LoRA of this rank `r` on every linear layer, with `σ = 1`.
    pub fn new(rank: usize) -> Self {
        Self {
            rank,
            alpha: None,
            rank_stabilized: false,
            dora: false,
            bias: false,
            dropout: 0.0,
            targets: Targets::All,
            seed: 0,
        }
    }

    /// Sets `α`: the product is multiplied by `σ = α / r`.
    pub fn with_alpha(mut self, alpha: f32) -> Self {
        self.alpha = Some(alpha);
        self
    }

    /// Sets rsLoRA: `σ = α / √r`.
    pub fn with_rank_stabilized(mut self, rank_stabilized: bool) -> Self {
        self.rank_stabilized = rank_stabilized;
        self
    }

    /// Sets DoRA: a trained norm for each output.
    pub fn with_dora(mut self, dora: bool) -> Self {
        self.dora = dora;
        self
    }

    /// Sets whether the biases of the adapted layers train too: PEFT's `lora_only`.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias = bias;
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

    /// Sets the seed from which `A` is drawn, together with the path of the layer.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The rank `r`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The seed of `A`.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The setting `α`.
    fn alpha(&self) -> f32 {
        self.alpha.unwrap_or(if self.rank_stabilized {
            (self.rank as f32).sqrt()
        } else {
            self.rank as f32
        })
    }

    /// Checks the settings for the layer at `path` with a weight `[d_in, d_out]`, which may not be in memory.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Rank`].
    ///
    /// # Examples
    /// ```
    /// use peft::Lora;
    ///
    /// assert!(Lora::new(16).check("proj", [64, 48]).is_ok());
    /// assert!(Lora::new(64).check("proj", [64, 48]).is_err());
    /// ```
    pub fn check(&self, path: &str, dims: [usize; 2]) -> Result<()> {
        check_count("rank", self.rank)?;
        check_rank(path, self.rank, dims)?;
        check_positive("alpha", self.alpha())?;
        Dropout::new(self.dropout).check()
    }

    /// An adapter of the layer at `path` that adds `a · b`, `[d_in, r]` and `[r, d_out]`.
    ///
    /// At each rank both factors have the same norm and are divided by `√σ`, so that `σ A B = a b` for
    /// every `α`. A rank whose product is zero is initialized as by [`Method::init`]. DoRA's norms are
    /// initialized to those of the sum with the layer's weight.
    ///
    /// # Errors
    /// As [`Method::init`]; [`Error::Shape`] if the factors do not fit.
    pub fn init_at(
        &self,
        path: &str,
        linear: &Linear,
        a: Tensor<2>,
        b: Tensor<2>,
    ) -> Result<LoraAdapter> {
        let [d_in, d_out] = linear.weight().dims();
        check_shape(path, [d_in, self.rank], a.dims())?;
        check_shape(path, [self.rank, d_out], b.dims())?;
        let mut adapter = self.adapter(path, linear)?;
        let of_a = a.clone().square().sum_dim(0).sqrt();
        let of_b = b.clone().square().sum_dim(1).sqrt().transpose();
        // A rank that adds nothing begins with `A` at random and `B` at zero, so that it can train.
        let adds = (of_a.clone() * of_b.clone()).greater_elem(0.0).float();
        let log = |norm: Tensor<2>| norm.clamp_min(f32::MIN_POSITIVE).log();
        let balance = ((log(of_b) - log(of_a)) * 0.5).exp();
        let root = adapter.scale().sqrt();
        let fresh = adapter.a() * (adds.ones_like() - adds.clone()) * root;
        let a = a * balance.clone() * adds.clone() + fresh;
        let b = b / balance.transpose() * adds.transpose();
        if let Some(magnitude) = &mut adapter.magnitude {
            let sum = linear.weight().to_dense() + a.clone().matmul(b.clone());
            let squares = sum.square().sum_dim(0).squeeze_dim(0);
            magnitude.m = Param::from_tensor(squares.sqrt().detach());
        }
        adapter.a = Param::from_tensor((a / root).detach());
        adapter.b = Param::from_tensor((b / root).detach());
        Ok(adapter)
    }

    pub(super) fn adapter(&self, path: &str, linear: &Linear) -> Result<LoraAdapter> {
        let weight = linear.weight();
        let (rank, dims @ [d_in, d_out]) = (self.rank, weight.dims());
        self.check(path, dims)?;
        check_dtype(path, weight)?;
        let settings = LoraSettings {
            alpha: self.alpha(),
            rank_stabilized: self.rank_stabilized,
            dora: self.dora,
            bias: self.bias && linear.bias().is_some(),
            dropout: self.dropout,
        };
        let device = weight.device();
        let bound = 1.0 / (d_in as f32).sqrt();
        let a = uniform(self.seed, path, [d_in, rank], bound, &device);
        let b = Tensor::zeros([rank, d_out], (&device, DType::F32));
        let [a, b] = [a, b].map(Param::from_tensor);
        let magnitude = self
            .dora
            .then(|| Param::from_tensor(column_squares(weight).sqrt().detach()));
        let bias = linear.bias().filter(|_| self.bias);
        let bias = bias.map(|bias| Param::from_tensor(bias.detach().cast(DType::F32)));
        LoraAdapter::new(a, b, magnitude, bias, settings)
    }
}

impl From<usize> for Lora {
    /// LoRA of this rank on every linear layer.
    fn from(rank: usize) -> Self {
        Self::new(rank)
    }
}

impl Method for Lora {
    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter> {
        self.adapter(path, linear).map(Adapter::Lora)
    }
}

/// The factors that are trained beside one layer's weight.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
    magnitude: Option<Magnitude>,
    /// `[d_out]`.
    bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    settings: LoraSettings,
    #[module(skip)]
    dropout: Dropout,
}

/// The trained norms of DoRA.
#[derive(Module, Debug)]
struct Magnitude {
    /// `[d_out]`.
    m: Param<Tensor<1>>,
    /// The squared norms of the columns of a frozen weight, `[d_out]`, once it is known.
    squares: Option<Tensor<1>>,
}

/// The settings of a [`LoraAdapter`] in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoraSettings {
    pub(crate) alpha: f32,
    pub(crate) rank_stabilized: bool,
    pub(crate) dora: bool,
    pub(crate) bias: bool,
    pub(crate) dropout: f32,
}

impl LoraAdapter {
    /// An adapter of these factors, `[d_in, r]` and `[r, d_out]`, whose product is multiplied by `scale`.
    ///
    /// # Errors
    /// [`Error::Setting`] if the rank is 0 or `scale` is not a positive number.
    ///
    /// # Panics
    /// If the factors differ in rank.
    pub fn from_factors(a: Tensor<2>, b: Tensor<2>, scale: f32) -> Result<Self> {
        let rank = a.dims()[1];
        assert_eq!(rank, b.dims()[0], "the rank of the factors");
        check_count("rank", rank)?;
        check_positive("scale", scale)?;
        let settings = LoraSettings {
            alpha: scale * rank as f32,
            rank_stabilized: false,
            dora: false,
            bias: false,
            dropout: 0.0,
        };
        let [a, b] = [a, b].map(Param::from_tensor);
        Self::new(a, b, None, None, settings)
    }

    /// The ranks of the factors must be the same and above 0.
    pub(crate) fn new(
        a: Param<Tensor<2>>,
        b: Param<Tensor<2>>,
        magnitude: Option<Param<Tensor<1>>>,
        bias: Option<Param<Tensor<1>>>,
        settings: LoraSettings,
    ) -> Result<Self> {
        check_positive("alpha", settings.alpha)?;
        let dropout = Dropout::new(settings.dropout);
        dropout.check()?;
        Ok(Self {
            a,
            b,
            magnitude: magnitude.map(|m| Magnitude { m, squares: None }),
            bias,
            settings,
            dropout,
        })
    }

    /// The factor `A`, `[d_in, r]`.
    pub fn a(&self) -> Tensor<2> {
        self.a.val()
    }

    /// The factor `B`, `[r, d_out]`.
    pub fn b(&self) -> Tensor<2> {
        self.b.val()
    }

    /// The norms that DoRA trains, `[d_out]`.
    pub fn magnitude(&self) -> Option<Tensor<1>> {
        self.magnitude.as_ref().map(|magnitude| magnitude.m.val())
    }

    /// The setting `α`.
    pub fn alpha(&self) -> f32 {
        self.settings.alpha
    }

    /// The rank `r`.
    pub fn rank(&self) -> usize {
        self.a().dims()[1]
    }

    /// The factor `σ` of the product: `α / r`, or `α / √r` in rsLoRA.
    pub fn scale(&self) -> f32 {
        let rank = self.rank() as f32;
        let divisor = if self.settings.rank_stabilized {
            rank.sqrt()
        } else {
            rank
        };
        self.settings.alpha / divisor
    }

    /// The factors of the outputs in DoRA, `[d_out]`.
    fn factors(&self, weight: &Weight) -> Option<Tensor<1>> {
        let magnitude = self.magnitude.as_ref()?;
        let squares = magnitude.squares.clone();
        let squares = squares.unwrap_or_else(|| column_squares(weight));
        let (a, b) = (self.a().detach(), self.b().detach());
        let scale = self.scale();
        let cross = weight.matmul(a.clone().transpose()) * b.clone();
        let square = a.clone().transpose().matmul(a).matmul(b.clone()) * b;
        let sum = |terms: Tensor<2>| terms.sum_dim(0).squeeze_dim::<1>(0);
        let parts = squares + sum(square) * (scale * scale);
        let norm = parts.clone() + sum(cross) * (2.0 * scale);
        let norm = norm.max_pair(parts * 1e-6);
        // An output whose weights are all zero has no direction.
        let norm = norm.clamp_min(f32::MIN_POSITIVE).sqrt().detach();
        Some(magnitude.m.val() / norm)
    }

    pub(super) fn read(settings: LoraSettings, path: &str, source: &mut Source) -> Result<Self> {
        let [a, b] = source.factors(path)?;
        let mut vector = |asked: bool, tensor: &str| {
            let read = asked.then(|| source.param(&format!("{path}.{tensor}")));
            read.transpose()
        };
        let magnitude = vector(settings.dora, "magnitude")?;
        let bias = vector(settings.bias, "bias")?;
        Self::new(a, b, magnitude, bias, settings)
    }
}

impl AdapterOps for LoraAdapter {
    fn name(&self) -> &'static str {
        match (&self.magnitude, self.settings.rank_stabilized) {
            (Some(_), _) => "DoRA",
            (None, true) => "rsLoRA",
            (None, false) => "LoRA",
        }
    }

    fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        let weight = linear.weight();
        check_dtype(path, weight)?;
        if let Some(bias) = self.bias() {
            let Some(base) = linear.bias() else {
                return Err(Error::NoBias { path: path.into() });
            };
            check_shape(path, base.dims(), bias.dims())?;
        }
        let (rank, [d_in, d_out]) = (self.rank(), weight.dims());
        check_shape(path, [d_in, rank], self.a().dims())?;
        check_shape(path, [rank, d_out], self.b().dims())?;
        match self.magnitude() {
            Some(magnitude) => check_shape(path, [d_out], magnitude.dims()),
            None => Ok(()),
        }
    }

    fn check_values(&self, path: &str, _: &Weight) -> Result<()> {
        check_product(self.name(), path, [self.a(), self.b()], self.scale())
    }

    fn bind(&mut self, weight: &Weight) {
        if let Some(magnitude) = &mut self.magnitude {
            magnitude.squares = (!weight.trains()).then(|| column_squares(weight));
        }
    }

    fn seed_dropout(&mut self, path: &str, seed: Option<u64>) {
        self.dropout.seed(path, seed);
    }

    fn forward(&self, weight: &Weight, x: Tensor<2>) -> Tensor<2> {
        // Of all factors, `x A` has the fewest numbers to scale, unless rows are many.
        let low = kernels::matmul(self.dropout.apply(x.clone()), self.a()) * self.scale();
        let y = weight.matmul(x) + kernels::matmul(low, self.b());
        match self.factors(weight) {
            Some(factors) => {
                let factors = factors.cast(y.dtype());
                y * factors.unsqueeze()
            }
            None => y,
        }
    }

    fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness) {
        let a = self.a().detach() * self.scale();
        let [merged, magnitudes] = low_rank_sum(weight, a, self.b().detach());
        // Each product is rounded as often as it is a term of the sum over the ranks, and for the
        // scale and the addition; with DoRA once more.
        let roundings = self.rank() + 2;
        match self.factors(weight) {
            Some(factors) => {
                let factors = factors.detach().unsqueeze::<2>();
                let magnitudes = magnitudes * factors.clone().abs();
                bounded(merged * factors, magnitudes, roundings + 1)
            }
            None => bounded(merged, magnitudes, roundings),
        }
    }

    fn settings(&self) -> Settings {
        Settings::Lora(self.settings.clone())
    }

    fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        let mut tensors = vec![("a", stored(&self.a)), ("b", stored(&self.b))];
        if let Some(magnitude) = &self.magnitude {
            tensors.push(("magnitude", stored(&magnitude.m)));
        }
        if let Some(bias) = &self.bias {
            tensors.push(("bias", stored(bias)));
        }
        tensors
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    /// `B`, DoRA's norms, and the bias.
    fn fast_params(&self) -> Vec<ParamId> {
        let magnitude = self.magnitude.as_ref().map(|magnitude| magnitude.m.id);
        let bias = self.bias.as_ref().map(|bias| bias.id);
        [self.b.id]
            .into_iter()
            .chain(magnitude)
            .chain(bias)
            .collect()
    }

    fn to_hf(&self) -> Result<HfLayer<'_>, String> {
        let LoraSettings {
            alpha,
            rank_stabilized,
            dora,
            dropout,
            ..
        } = self.settings;
        let switches = [
            ("use_dora", dora),
            ("use_qalora", false),
            ("use_rslora", rank_stabilized),
        ];
        let mut layer = hf_layer(
            self.rank(),
            alpha,
            dropout,
            16,
            switches,
            [self.a(), self.b()],
        );
        if let Some(magnitude) = self.magnitude() {
            layer.tensors.push((HF_MAGNITUDE, hf_vector(magnitude)));
        }
        if let Some(bias) = self.bias() {
            layer.tensors.push((HF_BIAS, hf_vector(bias)));
            layer.any.push(("bias", json!("lora_only")));
        }
        Ok(layer)
    }
}

/// Two factors as PEFT's files hold them.
pub(super) fn hf_layer<'a>(
    rank: usize,
    alpha: f32,
    dropout: f32,
    group_size: usize,
    switches: [(&'static str, bool); 3],
    [a, b]: [Tensor<2>; 2],
) -> HfLayer<'a> {
    let switches = switches.map(|(key, on)| (key, json!(on)));
    let numbers = [
        ("lora_dropout", hf_number(dropout)),
        ("qalora_group_size", json!(group_size)),
    ];
    HfLayer {
        peft_type: "LORA",
        rank,
        alpha,
        settings: switches.into_iter().chain(numbers).collect(),
        any: Vec::new(),
        tensors: vec![(HF_A, hf_factor(a)), (HF_B, hf_factor(b))],
        shared: Vec::new(),
    }
}

/// The sum of LoRAs of the layer at `path`, each times its weight, as one LoRA whose rank is the sum
/// of theirs and whose `σ` is 1.
///
/// # Errors
/// [`Error::NotCombined`] for an adapter that is not LoRA or has DoRA's norms or a bias,
/// [`Error::Shape`] if the layers have other dimensions.
pub(crate) fn combined(path: &str, parts: &[(&Adapter, f32)]) -> Result<LoraAdapter> {
    let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
    let mut expected = None;
    for &(adapter, weight) in parts {
        let lora = match adapter {
            Adapter::Lora(lora) if lora.magnitude.is_none() && lora.bias.is_none() => lora,
            other => {
                return Err(Error::NotCombined {
                    path: path.into(),
                    method: other.method(),
                });
            }
        };
        let dims = [lora.a().dims()[0], lora.b().dims()[1]];
        check_shape(path, *expected.get_or_insert(dims), dims)?;
        all_a.push((lora.a() * (lora.scale() * weight)).detach());
        all_b.push(lora.b().detach());
    }
    LoraAdapter::from_factors(Tensor::cat(all_a, 1), Tensor::cat(all_b, 0), 1.0)
}

/// The squared norms of the columns of a weight, `[d_out]`.
fn column_squares(weight: &Weight) -> Tensor<1> {
    weight.to_dense().square().sum_dim(0).squeeze_dim(0)
}
