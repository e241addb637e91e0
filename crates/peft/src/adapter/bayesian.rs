//! Bayesian-LoRA: LoRA that learns its rank and the bits of its factors.
//!
//! Meo et al. 2024, arXiv:2406.13046, whose code is not public. This is our reading of the abstract,
//! "priors on quantization levels and rank", by the means of Bayesian Bits (van Baalen et al. 2020,
//! arXiv:2005.07093):
//!
//! * `ΔW = σ Â E B̂`, where the diagonal `E` has a gate for each rank.
//! * A factor is rounded in a chain of grids, each step of which divides the step before it:
//!   `x̂ = z₂ (x₂ + z₄ (ε₄ + z₈ (ε₈ + z₁₆ ε₁₆)))`, with `x₂` on a grid of 2 bits over `± max |x|`, `ε_b` the
//!   residual rounded to the grid of `b` bits, `s_b = s_{b/2} / (2^{b/2} + 1)`, and a gate `z_b` for each. The
//!   gradient of rounding is the identity (straight-through).
//! * Gates are hard-concrete (Louizos et al. 2018, arXiv:1712.01312): while [`fit`](crate::fit()) trains
//!   they are drawn, stretched beyond 0 and 1 and clipped; otherwise a gate is open if the probability
//!   that it is shut is below 0.34. The parameters are tenths of the logits, so that one learning rate
//!   serves gates and factors.
//! * The loss has a [`penalty`](BayesianAdapter::penalty): the expected part of the ranks and of the
//!   bits that are open, times a weight.

use burn::module::{Module, Param, ParamId};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Tensor, TensorData};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::checks::{check_positive, check_shape};
use super::hf::HfLayer;
use super::lora::{Lora, LoraAdapter, LoraSettings};
use super::tensors::{Source, floats, layer_rng, stored, trained};
use super::{Adapter, AdapterOps, Method, Settings};
use crate::{Error, Exactness, Linear, Result, Targets, Weight};
use tensor_files::LazyTensor;

const METHOD: &str = "Bayesian-LoRA";

/// Bits that each gate of a chain adds to those before it.
const BITS: [f32; 4] = [2.0, 2.0, 4.0, 8.0];
/// The temperature of the gates, and the interval that they are stretched to.
const TEMPERATURE: f32 = 2.0 / 3.0;
const STRETCHED: [f32; 2] = [-0.1, 1.1];
/// The probability of being shut from which on a gate is.
const SHUT: f32 = 0.34;
/// The logit of a parameter of 1.
const LOGITS: f32 = 10.0;
/// The initial logits: open, with a probability of 0.97.
const START: f32 = 2.0;

/// Trains a matrix of low rank beside each layer's weight, its rank, and the bits of its factors.
///
/// The result of the training is LoRA ([`BayesianAdapter::to_lora`]), and merges as it does.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Adapter, Bayesian, Linear, Method, Weight};
///
/// let weight = Weight::frozen(Tensor::ones([8, 6], &Device::flex()));
/// let linear = Linear::new(weight, None);
/// let Adapter::Bayesian(adapter) = Bayesian::new(4).init("proj", &linear)? else {
///     unreachable!("of this method");
/// };
/// assert_eq!((adapter.rank(), adapter.bits()), (4, [16, 16]));
/// assert!(Bayesian::new(4).with_penalty(-1.0).init("proj", &linear).is_err());
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Bayesian {
    lora: Lora,
    penalty: f32,
}

impl Bayesian {
    /// Bayesian-LoRA of at most this rank on every linear layer, with `σ = 1` and a penalty of 0.01.
    pub fn new(rank: usize) -> Self {
        Self {
            lora: Lora::new(rank),
            penalty: 0.01,
        }
    }

    /// Sets `α`: the product is multiplied by `σ = α / r`, with the rank before training.
    pub fn with_alpha(mut self, alpha: f32) -> Self {
        self.lora = self.lora.with_alpha(alpha);
        self
    }

    /// Sets the weight of the penalty, in nats.
    pub fn with_penalty(mut self, penalty: f32) -> Self {
        self.penalty = penalty;
        self
    }

    /// Sets the layers to adapt.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.lora = self.lora.with_targets(targets);
        self
    }

    /// Sets the seed from which `A` is drawn, together with the path of the layer.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.lora = self.lora.with_seed(seed);
        self
    }
}

impl Method for Bayesian {
    fn targets(&self) -> &Targets {
        self.lora.targets()
    }

    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter> {
        let lora = self.lora.adapter(path, linear)?;
        let device = lora.a().device();
        let gates = |n: usize| trained(vec![START / LOGITS; n], [n], &device);
        let settings = BayesianSettings {
            alpha: lora.alpha(),
            penalty: self.penalty,
        };
        let adapter = BayesianAdapter {
            rank_gates: gates(lora.rank()),
            a_gates: gates(BITS.len()),
            b_gates: gates(BITS.len()),
            a: Param::from_tensor(lora.a()),
            b: Param::from_tensor(lora.b()),
            settings,
            noise: None,
        };
        adapter.check_settings()?;
        Ok(Adapter::Bayesian(adapter))
    }
}

/// Two factors, and the gates of their ranks and bits.
#[derive(Module, Debug)]
pub struct BayesianAdapter {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
    rank_gates: Param<Tensor<1>>,
    a_gates: Param<Tensor<1>>,
    b_gates: Param<Tensor<1>>,
    #[module(skip)]
    settings: BayesianSettings,
    /// The seed from which gates are drawn; without one they are open or shut.
    #[module(skip)]
    noise: Option<u64>,
}

/// The settings of a [`BayesianAdapter`] in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BayesianSettings {
    alpha: f32,
    penalty: f32,
}

impl BayesianAdapter {
    fn check_settings(&self) -> Result<()> {
        check_positive("alpha", self.settings.alpha)?;
        let penalty = self.settings.penalty;
        if penalty.is_finite() && penalty >= 0.0 {
            return Ok(());
        }
        Err(Error::Setting {
            setting: "penalty",
            value: penalty.to_string(),
            expected: "0 or more",
        })
    }

    /// The number of ranks whose gate is open.
    pub fn rank(&self) -> usize {
        open(&self.rank_gates)
            .into_iter()
            .filter(|&open| open)
            .count()
    }

    /// The bits of `A` and `B`: 0, 2, 4, 8 or 16.
    pub fn bits(&self) -> [usize; 2] {
        [&self.a_gates, &self.b_gates].map(|gates| {
            let open = open(gates).into_iter().zip(BITS);
            let bits = open.take_while(|(open, _)| *open).map(|(_, bits)| bits);
            bits.sum::<f32>() as usize
        })
    }

    /// The adapter as LoRA: factors are rounded, and zero where the gate of a rank is shut.
    pub fn to_lora(&self) -> LoraAdapter {
        let settings = LoraSettings {
            alpha: self.settings.alpha,
            rank_stabilized: false,
            dora: false,
            bias: false,
            dropout: 0.0,
        };
        let mut noise = self.noise.map(|seed| layer_rng(seed, ""));
        let ranks = gates(&self.rank_gates, &mut noise);
        let a = rounded(self.a.val(), gates(&self.a_gates, &mut noise));
        let b = rounded(self.b.val(), gates(&self.b_gates, &mut noise));
        let a = a * ranks.unsqueeze_dim(0);
        // Not leaves of the graph: the parameters are those of this adapter.
        let [a, b] = [a, b].map(|factor| Param::initialized(ParamId::new(), factor));
        LoraAdapter::new(a, b, None, None, settings).expect("checked when this was made")
    }

    /// The term of the loss for this layer, `[1]`: the weight times the sum of the expected parts of the
    /// ranks and of the bits that are open, each in 0 ..= 1.
    pub fn penalty(&self) -> Tensor<1> {
        let ranks = probability(&self.rank_gates).mean();
        let bits = [&self.a_gates, &self.b_gates].map(|gates| {
            let open = probability(gates);
            let mut all = None::<Tensor<1>>;
            let mut sum = None::<Tensor<1>>;
            for (at, bits) in BITS.into_iter().enumerate() {
                let gate = open.clone().narrow(0, at, 1);
                let so_far = match all.take() {
                    Some(all) => all * gate,
                    None => gate,
                };
                let expected = so_far.clone() * bits;
                sum = Some(match sum.take() {
                    Some(sum) => sum + expected,
                    None => expected,
                });
                all = Some(so_far);
            }
            sum.expect("a chain of gates") / BITS.iter().sum::<f32>()
        });
        let [of_a, of_b] = bits;
        (ranks + (of_a + of_b) / 2.0) * self.settings.penalty
    }

    pub(super) fn read(
        settings: BayesianSettings,
        path: &str,
        source: &mut Source,
    ) -> Result<Self> {
        let [a, b] = source.factors(path)?;
        let mut gates = |tensor: &str, expected: usize| {
            let name = format!("{path}.{tensor}");
            let gates = source.param::<1>(&name)?;
            if gates.val().dims() == [expected] {
                return Ok(gates);
            }
            let problem = format!("has no {expected} gates");
            Err(Error::from(source.file.refuse(&name, problem)))
        };
        let adapter = Self {
            rank_gates: gates("rank_gates", a.val().dims()[1])?,
            a_gates: gates("a_gates", BITS.len())?,
            b_gates: gates("b_gates", BITS.len())?,
            a,
            b,
            settings,
            noise: None,
        };
        adapter.check_settings()?;
        Ok(adapter)
    }
}

impl AdapterOps for BayesianAdapter {
    fn name(&self) -> &'static str {
        METHOD
    }

    fn penalty(&self) -> Option<Tensor<1>> {
        Some(self.penalty())
    }

    fn fast_params(&self) -> Vec<ParamId> {
        vec![self.b.id]
    }

    fn seed_dropout(&mut self, path: &str, seed: Option<u64>) {
        self.noise = seed.map(|seed| layer_rng(seed, path).next_u64());
    }

    fn forward(&self, weight: &Weight, x: Tensor<2>) -> Tensor<2> {
        self.to_lora().forward(weight, x)
    }

    fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        let ([d_in, d_out], rank) = (linear.weight().dims(), self.a.val().dims()[1]);
        // Before the values are looked at: there may be none.
        check_shape(path, [d_in, rank], self.a.val().dims())?;
        check_shape(path, [rank, d_out], self.b.val().dims())?;
        check_shape(path, [rank], self.rank_gates.val().dims())?;
        for gates in [&self.a_gates, &self.b_gates] {
            check_shape(path, [BITS.len()], gates.val().dims())?;
        }
        self.to_lora().check(path, linear)
    }

    fn check_values(&self, path: &str, weight: &Weight) -> Result<()> {
        self.to_lora().check_values(path, weight)
    }

    fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness) {
        self.to_lora().to_dense(weight)
    }

    fn settings(&self) -> Settings {
        Settings::Bayesian(self.settings.clone())
    }

    fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        vec![
            ("a", stored(&self.a)),
            ("b", stored(&self.b)),
            ("rank_gates", stored(&self.rank_gates)),
            ("a_gates", stored(&self.a_gates)),
            ("b_gates", stored(&self.b_gates)),
        ]
    }

    fn to_hf(&self) -> Result<HfLayer<'_>, String> {
        Err(
            "PEFT has no Bayesian-LoRA; use `Adapters::save`, or save what `to_lora` gives"
                .to_string(),
        )
    }
}

/// The probability that a gate is not shut.
fn probability(gates: &Param<Tensor<1>>) -> Tensor<1> {
    let [low, high] = STRETCHED;
    sigmoid(gates.val() * LOGITS - TEMPERATURE * (-low / high).ln())
}

/// The gates that are open where none is drawn.
fn open(gates: &Param<Tensor<1>>) -> Vec<bool> {
    let open = floats(probability(gates).detach());
    open.into_iter().map(|open| 1.0 - open < SHUT).collect()
}

/// The values of gates: drawn from the noise, or 0 and 1 with the gradients of their probabilities.
fn gates(gates: &Param<Tensor<1>>, noise: &mut Option<impl Rng>) -> Tensor<1> {
    let n = gates.val().dims()[0];
    let device = gates.val().device();
    let values = |values: Vec<f32>| {
        let values = TensorData::new(values, [n]);
        Tensor::<1>::from_data(values, &device)
    };
    match noise {
        Some(noise) => {
            let logit = |u: f32| (u / (1.0 - u)).ln();
            let drawn = (0..n).map(|_| logit(noise.random_range(1e-6..1.0 - 1e-6)));
            let drawn = values(drawn.collect());
            let [low, high] = STRETCHED;
            let gate = sigmoid((gates.val() * LOGITS + drawn) / TEMPERATURE);
            (gate * (high - low) + low).clamp(0.0, 1.0)
        }
        None => {
            let open = open(gates)
                .into_iter()
                .map(|open| f32::from(u8::from(open)));
            let probability = probability(gates);
            values(open.collect()) + (probability.clone() - probability.detach())
        }
    }
}

/// A factor rounded in the chain of grids.
fn rounded(factor: Tensor<2>, gates: Tensor<1>) -> Tensor<2> {
    let round = |values: Tensor<2>| {
        let moved = values.clone().detach().round() - values.clone().detach();
        values + moved
    };
    let range = factor.clone().detach().abs().max();
    let range = range.clamp_min(f32::MIN_POSITIVE * 1e12).unsqueeze::<2>();
    // Just inside the range, so that no code is beyond its last step; gradients pass through.
    let inside = (range.clone() * (1.0 - 1e-6)).expand(factor.dims());
    let plain = factor.clone().detach();
    let clipped = plain.clone().max_pair(inside.clone().neg());
    let factor = factor + (clipped.min_pair(inside) - plain);
    let mut step = range * (2.0 / 3.0);
    let mut parts = vec![round(factor.clone() / step.clone()) * step.clone()];
    let mut so_far = parts[0].clone();
    for steps in [5.0, 17.0, 257.0] {
        step = step / steps;
        let rest = factor.clone() - so_far.clone();
        let part = round(rest / step.clone()) * step.clone();
        so_far = so_far + part.clone();
        parts.push(part);
    }
    let gate = |at: usize| gates.clone().narrow(0, at, 1).unsqueeze::<2>();
    let mut sum = parts.pop().expect("four parts") * gate(3);
    for at in (0..3).rev() {
        sum = (parts.pop().expect("four parts") + sum) * gate(at);
    }
    sum
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn factor() -> Tensor<2> {
        let values: Vec<f32> = (0..60)
            .map(|at| ((at * 37 % 101) as f32 - 50.0) / 40.0)
            .collect();
        Tensor::<1>::from_floats(&values[..], &Device::flex()).reshape([12, 5])
    }

    fn at_bits(open: [f32; 4]) -> Vec<f32> {
        floats(rounded(
            factor(),
            Tensor::from_floats(open, &Device::flex()),
        ))
    }

    /// Each open gate brings the values to the next grid, to half a step.
    #[test]
    fn the_chain_is_one_grid_within_the_other() {
        let exact = floats(factor());
        let range = exact
            .iter()
            .fold(0.0f32, |most, value| most.max(value.abs()));
        let mut step = 2.0 / 3.0 * range;
        for (at, steps) in [1.0, 5.0, 17.0, 257.0].into_iter().enumerate() {
            step /= steps;
            let open: [f32; 4] = std::array::from_fn(|gate| f32::from(u8::from(gate <= at)));
            let found = at_bits(open);
            let n_levels = 2f32.powi([2, 4, 8, 16][at]);
            for (found, exact) in found.iter().zip(&exact) {
                let code = found / step;
                assert!(
                    (code - code.round()).abs() < 2e-3 * n_levels / 16.0,
                    "{code}"
                );
                assert!(code.abs() <= n_levels / 2.0);
                assert!(
                    (found - exact).abs() <= step * 0.5001 + 3e-6 * range,
                    "{found} {exact}"
                );
            }
            // A shut gate shuts those after it.
            let mut shut = [1.0; 4];
            if at < 3 {
                shut[at + 1] = 0.0;
                assert_eq!(at_bits(shut), found);
            }
        }
        assert!(
            at_bits([0.0, 1.0, 1.0, 1.0])
                .iter()
                .all(|&value| value == 0.0)
        );
    }

    fn linear() -> Linear {
        Linear::new(Weight::frozen(factor()), None)
    }

    fn adapter(method: &Bayesian) -> BayesianAdapter {
        match method.init("proj", &linear()) {
            Ok(Adapter::Bayesian(adapter)) => adapter,
            other => panic!("{other:?}"),
        }
    }

    fn logits(values: &[f32]) -> Param<Tensor<1>> {
        Param::from_tensor(Tensor::from_floats(values, &Device::flex()))
    }

    #[test]
    fn shut_gates_prune() {
        let mut adapter = adapter(&Bayesian::new(3));
        assert_eq!((adapter.rank(), adapter.bits()), (3, [16, 16]));
        adapter.b = Param::from_tensor(Tensor::ones([3, 5], &Device::flex()));
        adapter.rank_gates = logits(&[1.0, -1.0, 1.0]);
        adapter.a_gates = logits(&[1.0, 1.0, -1.0, 1.0]);
        adapter.b_gates = logits(&[1.0, 1.0, 1.0, -1.0]);
        assert_eq!((adapter.rank(), adapter.bits()), (2, [4, 8]));
        let lora = adapter.to_lora();
        let a = floats(lora.a());
        assert!(a.chunks(3).all(|row| row[1] == 0.0));
        assert!(a.chunks(3).any(|row| row[0] != 0.0));
        let x = factor().transpose();
        let weight = linear().weight().to_dense();
        let y = adapter.forward(&Weight::frozen(weight.clone()), x.clone());
        let expected = x.clone().matmul(weight) + x.matmul(lora.a()).matmul(lora.b());
        let error = (y - expected).abs().max().into_scalar::<f32>();
        assert!(error < 1e-5, "{error}");
        // The penalty falls with what is open.
        let open = floats(self::adapter(&Bayesian::new(3)).penalty())[0];
        let shut = floats(adapter.penalty())[0];
        assert!(shut < open && open < 0.02, "{shut} {open}");
    }

    /// The formulas at logits of 0 and 1.5, by hand.
    #[test]
    fn gates_are_hard_concrete() {
        // P(z > 0) = sigmoid(φ - 2/3 ln(0.1 / 1.1)): 0.831822 at 0, 0.956835 at 1.5.
        let gates = logits(&[0.0, 0.15]);
        let found = floats(probability(&gates));
        assert!((found[0] - 0.831822).abs() < 1e-5, "{found:?}");
        assert!((found[1] - 0.956835).abs() < 1e-5, "{found:?}");
        // Open while P(z = 0) < 0.34: φ > ln(0.66 / 0.34) - 1.598597 = -0.935303.
        assert_eq!(open(&logits(&[-0.0934, -0.0936])), [true, false]);

        let mut adapter = adapter(&Bayesian::new(2).with_penalty(2.0));
        adapter.rank_gates = gates;
        adapter.a_gates = logits(&[0.0, 0.0, 100.0, 0.0]);
        adapter.b_gates = logits(&[100.0, 100.0, 100.0, 100.0]);
        let p = 0.831822f32;
        let of_a = (2.0 * p + 2.0 * p * p + 4.0 * p * p + 8.0 * p * p * p) / 16.0;
        let expected = 2.0 * ((p + 0.956835) / 2.0 + (of_a + 1.0) / 2.0);
        let found = floats(adapter.penalty())[0];
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");

        // Drawn, shares of them are at 0 and at 1 exactly: P(z = 0) as above, P(z = 1) at 0 the same
        // by symmetry.
        let n = 200_000;
        let gates = Param::from_tensor(Tensor::<1>::zeros([n], &Device::flex()));
        let mut noise = Some(layer_rng(0, ""));
        let drawn = floats(super::gates(&gates, &mut noise));
        for end in [0.0, 1.0] {
            let share = drawn.iter().filter(|&&gate| gate == end).count() as f32 / n as f32;
            assert!((share - (1.0 - p)).abs() < 0.005, "{share} at {end}");
        }
    }

    /// Gradients of what the factors become reach each of their elements, the largest too.
    #[test]
    fn gradients_pass_through_rounding() {
        let factor = factor().autodiff().require_grad();
        let gates = Tensor::<1>::ones([4], &Device::flex()).autodiff();
        let gradients = rounded(factor.clone(), gates).sum().backward();
        let found = floats(factor.grad(&gradients).unwrap());
        assert!(
            found.iter().all(|&gradient| (gradient - 1.0).abs() < 1e-6),
            "{found:?}"
        );
    }

    #[test]
    fn a_seed_draws_the_gates() {
        let mut adapter = adapter(&Bayesian::new(3));
        adapter.b = Param::from_tensor(Tensor::ones([3, 5], &Device::flex()));
        let product = |adapter: &BayesianAdapter| {
            let lora = adapter.to_lora();
            floats(lora.a().matmul(lora.b()))
        };
        let calm = product(&adapter);
        let drawn: Vec<_> = (0..8)
            .map(|seed| {
                adapter.seed_dropout("proj", Some(seed));
                let first = product(&adapter);
                assert_eq!(first, product(&adapter), "the same until the next seed");
                first
            })
            .collect();
        assert!(drawn.iter().any(|one| *one != calm));
        adapter.seed_dropout("proj", None);
        assert_eq!(product(&adapter), calm);
    }

    #[test]
    fn settings_are_checked() {
        for method in [
            Bayesian::new(0),
            Bayesian::new(6),
            Bayesian::new(2).with_alpha(0.0),
            Bayesian::new(2).with_penalty(-1.0),
            Bayesian::new(2).with_penalty(f32::NAN),
        ] {
            assert!(method.init("proj", &linear()).is_err(), "{method:?}");
        }
    }
}
