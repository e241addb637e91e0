//! Bits where the loss feels them: a quantizer for each layer, under a budget of bytes.
//!
//! Replacing the weight `W` of a layer by `Ŵ` changes its output at token `t` by `e_t = x_t (Ŵ - W)`, and the
//! loss of a target by about half the second-order term of the Fisher information of the outputs. With
//! the outputs of a layer taken as independent of each other this is
//!
//! `½ Σ_j b_j mean_t e_tj²`,
//!
//! where `b_j` is the mean over tokens of the squared gradient of the loss by output `j`. The second
//! factor comes from the Gram of the layer's inputs. The first comes from the gradients of the weight: one
//! of input `i` is `Σ_t x_ti g_tj`, and if the `g_t` of different tokens are uncorrelated, the Fisher
//! information of the weight summed over its inputs is `b_j mean_t ‖x_t‖²`.
//!
//! LQ-LoRA (Guo et al. 2023, arXiv:2311.12023, §3.2) weights the errors of weights by their Fisher
//! information; those of outputs count here, because OPTQ makes errors of weights that cancel in the
//! output.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use peft::{
    Batch, Blocks, CausalLm, Fisher, FisherRoots, LayerReport, Recipe, Stages, Streams,
    check_recipe, token_nll,
};
use quant_core::{AllocationError, Candidate, Gram, Needs, Quantizer};
use serde::Serialize;

use crate::{Result, quantize};

/// A model quantized under a budget of bytes by [`quantize_within`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Allocation {
    /// The layers of the model as it is now, in the order in which they were quantized.
    pub layers: Vec<LayerReport>,
    /// The loss of the dense model on the calibration, in nats per target.
    pub dense: f64,
    /// The assignment of the least predicted loss.
    pub allocated: Assignment,
    /// The best assignment of one quantizer to all layers within the budget; none if no quantizer fits.
    pub uniform: Option<Assignment>,
}

/// An index into the quantizers for each layer, with what it costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Assignment {
    /// The index of the quantizer of each layer.
    pub choice: Vec<usize>,
    /// The size of all layers, in bytes.
    pub n_bytes: u64,
    /// The loss that is predicted for the calibration, in nats per target.
    pub predicted: f64,
    /// The loss on the calibration, in nats per target.
    pub measured: f64,
}

impl Allocation {
    /// Whether the model has the uniform assignment, because no other was measured to be better.
    pub fn is_uniform(&self) -> bool {
        let uniform = self.uniform.as_ref();
        uniform.is_some_and(|uniform| !self.allocated.is_below(uniform))
    }

    /// The assignment that the model has.
    pub fn best(&self) -> &Assignment {
        match &self.uniform {
            Some(uniform) if self.is_uniform() => uniform,
            _ => &self.allocated,
        }
    }
}

impl Assignment {
    fn is_below(&self, other: &Self) -> bool {
        // A loss that is NaN is below no other.
        self.measured < other.measured || other.measured.is_nan() && !self.measured.is_nan()
    }
}

/// A step that [`quantize_within`] has done.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum AllocationStep<'a> {
    /// The gradients of one sequence of the calibration are known.
    Gradient,
    /// The loss of one layer with each quantizer is predicted.
    Predicted {
        /// The path of the layer.
        path: &'a str,
    },
    /// A layer is quantized: first those of the allocation, then, if it is another, those of the
    /// uniform assignment.
    Quantized(&'a LayerReport),
}

/// Quantizes the projections of a model to at most `budget` bytes, such that the loss rises least.
///
/// [`sensitivities`] predicts the rise for each layer with each of `quantizers`, and
/// [`quant_core::allocate`] chooses one for each layer. The model is then quantized in this way and with
/// the best single quantizer for all layers that fits the budget, each as by [`quantize`]; the one with
/// the lower loss on the calibration is kept. So the result is never worse there than the uniform
/// format.
///
/// Sizes are those of [`Format::n_bytes`](quant_core::Format::n_bytes), with scales and zeros. In memory
/// are at once the dense model, and its gradients or its packed weights.
///
/// # Errors
/// Before any work, [`AllocationError::BudgetTooSmall`] and those of [`quantize`] for each quantizer;
/// [`peft::Error::NoCalibration`] without any; [`peft::Error::NonFiniteGradient`]. Then the model is
/// unchanged.
///
/// # Examples
/// ```no_run
/// use models::{AllocationStep, quantize_within};
/// use quant_core::{Optq, Quantizer};
///
/// # fn run(mut lm: models::Pretrained, batches: Vec<peft::Batch>) -> models::Result<()> {
/// let widths = [2, 3, 4, 8].map(|bits| Optq::new().with_bits(bits).with_group_size(128));
/// let quantizers: Vec<&dyn Quantizer> = widths.iter().map(|optq| optq as _).collect();
/// let plan = models::plan("Llama-2-7b-hf", &widths[1])?;
/// let done = quantize_within(&mut lm.model, &quantizers, &batches, plan.n_bytes(), |step| {
///     if let AllocationStep::Quantized(layer) = step {
///         println!("{}: {}", layer.path, layer.error);
///     }
/// })?;
/// println!("predicted {}, measured {}", done.best().predicted, done.best().measured);
/// // A bit for each weight is less than two.
/// let error = quantize_within(&mut lm.model, &quantizers, &batches, plan.n_bytes() / 3, |_| {});
/// assert!(error.is_err());
/// # Ok(())
/// # }
/// ```
pub fn quantize_within<M: CausalLm + Stages>(
    model: &mut M,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
    budget: u64,
    mut on_step: impl FnMut(AllocationStep),
) -> Result<Allocation> {
    check(model, quantizers, calibration)?;
    check_budget(model, quantizers, budget)?;
    let dense = mean_loss(model, calibration);
    let layers = sensitivities(model, quantizers, calibration, &mut on_step)?;
    let (paths, candidates): (Vec<String>, Vec<_>) = layers.into_iter().unzip();
    let found = quant_core::allocate(&candidates, budget)?;

    let mut measure = |choice: Vec<usize>, n_bytes, error| -> Result<_> {
        let named = paths.iter().cloned().zip(choice.iter().copied());
        let recipe = Choice {
            quantizers,
            of: named.collect(),
        };
        let mut packed = model.clone();
        let layers = quantize(&mut packed, &recipe, calibration, |layer| {
            on_step(AllocationStep::Quantized(layer));
        })?;
        let assignment = Assignment {
            choice,
            n_bytes,
            predicted: dense + error,
            measured: mean_loss(&packed, calibration),
        };
        Ok((packed, layers, assignment))
    };
    let (packed, layers, allocated) = measure(found.choice, found.n_bytes, found.error)?;
    let mut allocation = Allocation {
        layers,
        dense,
        allocated,
        uniform: None,
    };
    let mut best = packed;
    if let Some(same) = found.uniform {
        let choice = vec![same.candidate; paths.len()];
        if choice == allocation.allocated.choice {
            allocation.uniform = Some(allocation.allocated.clone());
        } else {
            let (packed, layers, uniform) = measure(choice, same.n_bytes, same.error)?;
            allocation.uniform = Some(uniform);
            if allocation.is_uniform() {
                (best, allocation.layers) = (packed, layers);
            }
        }
    }
    *model = best;
    Ok(allocation)
}

/// The cost of each layer with each of several quantizers, for [`quant_core::allocate`]: bytes, and by
/// how much the loss of a target is predicted to rise, in nats, with every other layer dense.
///
/// The prediction is the second-order term of the loss in the error of the layer's output,
/// `½ Σ_j b_j mean_t e_tj²`: the squared error of each output, weighted by the mean square of the loss's
/// gradient there. A format is never predicted to be better than a larger one. The model is not changed.
///
/// `on_step` is called with [`AllocationStep::Gradient`] for each sequence and
/// [`AllocationStep::Predicted`] for each layer.
///
/// # Errors
/// As [`quantize`] for each quantizer; [`peft::Error::NoCalibration`] without any;
/// [`peft::Error::NonFiniteGradient`].
pub fn sensitivities<M: CausalLm + Stages>(
    model: &M,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
    mut on_step: impl FnMut(AllocationStep),
) -> Result<Vec<(String, Vec<Candidate>)>> {
    let needs = check(model, quantizers, calibration)?;
    let fisher = Fisher::sum(model, calibration, || on_step(AllocationStep::Gradient))?;
    let mut all = Vec::new();
    let mut streams = Streams::start(model, calibration, needs);
    while let Some(stage) = streams.next_stage(model) {
        let gram = stage.gram.expect("there is calibration");
        for (path, linear) in &model.linears()[stage.layers] {
            let weight = linear.weight().to_dense();
            let named = |source| peft::Error::Quant {
                path: path.clone(),
                source,
            };
            gram.check(weight.dims()[0]).map_err(named)?;
            let roots = fisher.of(path);
            let candidate = |quantizer: &&dyn Quantizer| {
                let quantized = quantizer.quantize(weight.clone(), Some(&gram));
                let packed = quantized.map_err(named)?.weight;
                let error = packed.dequantize() - weight.clone();
                let n_bytes = packed.n_bytes() as u64;
                let error = roots.map_or(0.0, |roots| rise(error, roots, &gram));
                Ok(Candidate { n_bytes, error })
            };
            let candidates = quantizers.iter().map(candidate).collect::<Result<_>>()?;
            all.push((path.clone(), monotone(candidates)));
            on_step(AllocationStep::Predicted { path });
        }
    }
    Ok(all)
}

/// `½ Σ_j b_j mean_t e_tj²` for an error of a weight, `[d_in, d_out]`.
fn rise(error: Tensor<2>, roots: &FisherRoots, gram: &Gram) -> f64 {
    let (d_in, trace) = (error.dims()[0], gram.trace());
    if trace == 0.0 {
        return 0.0;
    }
    let roots = roots.of_outputs_absolute().cast(error.dtype());
    let weighted = gram.energy(error * roots.unsqueeze_dim::<2>(0));
    // The number of tokens of the two means cancels. Rounding can leave a little less than nothing.
    (0.5 * d_in as f64 / trace * weighted).max(0.0)
}

/// Raises the error of each candidate to that of the larger ones.
fn monotone(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    let given = candidates.clone();
    for one in &mut candidates {
        let larger = given.iter().filter(|other| other.n_bytes > one.n_bytes);
        one.error = larger.fold(one.error, |most, other| most.max(other.error));
    }
    candidates
}

/// Checks a model, a calibration and every quantizer; returns their needs.
fn check<M: Blocks + Stages>(
    model: &M,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
) -> Result<Needs> {
    if calibration.is_empty() {
        return Err(peft::Error::NoCalibration.into());
    }
    for (path, linear) in model.linears() {
        linear.check_plain(&path)?;
    }
    let mut needs = Needs::Gram;
    for quantizer in quantizers {
        needs = needs.max(check_recipe(model, quantizer, calibration)?);
    }
    for batch in calibration {
        batch.check(model)?;
    }
    Ok(needs)
}

/// Checks that there are formats, and that the smallest fit the budget.
fn check_budget<M: Stages>(model: &M, quantizers: &[&dyn Quantizer], budget: u64) -> Result<()> {
    if quantizers.is_empty() {
        return Err(AllocationError::NoCandidates { layer: 0 }.into());
    }
    let mut needed = 0;
    for (path, linear) in model.linears() {
        let dims = linear.weight().dims();
        let sizes = quantizers
            .iter()
            .map(|quantizer| quantizer.format()?.n_bytes(dims));
        let sizes: quant_core::Result<Vec<u64>> = sizes.collect();
        let sizes = sizes.map_err(|source| peft::Error::Quant { path, source })?;
        needed += sizes.into_iter().min().unwrap_or(0);
    }
    if needed > budget {
        return Err(AllocationError::BudgetTooSmall { needed, budget }.into());
    }
    Ok(())
}

/// The mean loss over all targets, in nats.
fn mean_loss<M: CausalLm>(model: &M, batches: &[Batch]) -> f64 {
    let (mut sum, mut n_targets) = (0.0, 0);
    for batch in batches {
        kernels::with_values(token_nll(model, batch), |nll| {
            sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        });
        n_targets += batch.n_targets();
    }
    sum / n_targets as f64
}

/// A quantizer for each layer, by its index.
struct Choice<'a> {
    quantizers: &'a [&'a dyn Quantizer],
    of: BTreeMap<String, usize>,
}

impl Recipe for Choice<'_> {
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer> {
        self.of.get(path).map(|&at| self.quantizers[at])
    }

    fn paths(&self) -> Vec<&str> {
        self.of.keys().map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests;
