use burn::module::{ModuleVisitor, Param, ParamId};
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Serialize};

use crate::checkpointing::{backward_by_block, lowest_trained};
use crate::{Batch, Blocks, CausalLm, Error, Result, last_output, nll_of_output, set_dropout};

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It stays the same.
    Constant,
    /// It falls linearly, to zero after the last step.
    Linear,
    /// It falls along half a cosine, to zero after the last step.
    Cosine,
}

/// The settings of [`fit`]: AdamW, its schedule, and what makes a step.
///
/// They are checked when training begins, or by [`FitConfig::check`].
///
/// # Examples
/// ```
/// use peft::{FitConfig, Schedule};
///
/// let config = FitConfig::new()
///     .with_learning_rate(2e-4)
///     .with_steps(100)
///     .with_schedule(Schedule::Linear);
/// assert!(config.check().is_ok());
/// let error = config.with_learning_rate(-1.0).check().unwrap_err();
/// assert_eq!(error.to_string(), "learning_rate is -1; it must be a positive number");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FitConfig {
    learning_rate: f64,
    epochs: usize,
    steps: Option<usize>,
    accumulation: usize,
    warmup_steps: usize,
    schedule: Schedule,
    weight_decay: f64,
    beta_1: f64,
    beta_2: f64,
    epsilon: f64,
    max_grad_norm: Option<f64>,
    lora_plus_ratio: f64,
    seed: u64,
    checkpoint_blocks: bool,
}

impl Default for FitConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl FitConfig {
    /// The defaults: one epoch at a learning rate of 1e-3 with a cosine schedule, no weight decay.
    pub fn new() -> Self {
        Self {
            learning_rate: 1e-3,
            epochs: 1,
            steps: None,
            accumulation: 1,
            warmup_steps: 0,
            schedule: Schedule::Cosine,
            weight_decay: 0.0,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            max_grad_norm: Some(1.0),
            lora_plus_ratio: 1.0,
            seed: 0,
            checkpoint_blocks: false,
        }
    }

    /// The learning rate of AdamW, reached at the end of the warm-up; 1e-3 by default.
    pub fn with_learning_rate(mut self, learning_rate: f64) -> Self {
        self.learning_rate = learning_rate;
        self
    }

    /// Passes over the batches, 1 by default; not used if the steps are given.
    pub fn with_epochs(mut self, epochs: usize) -> Self {
        self.epochs = epochs;
        self
    }

    /// Optimizer steps. The batches are repeated as often as it takes; by default, there are those of
    /// the epochs.
    pub fn with_steps(mut self, steps: impl Into<Option<usize>>) -> Self {
        self.steps = steps.into();
        self
    }

    /// Batches whose gradients make one step, each target weighing the same; 1 by default.
    pub fn with_accumulation(mut self, accumulation: usize) -> Self {
        self.accumulation = accumulation;
        self
    }

    /// Steps of linear warm-up of the learning rate; 0 by default.
    pub fn with_warmup_steps(mut self, warmup_steps: usize) -> Self {
        self.warmup_steps = warmup_steps;
        self
    }

    /// The learning rate after the warm-up; [`Schedule::Cosine`] by default.
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// The decoupled weight decay of AdamW; 0 by default.
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// The decay of AdamW's mean of gradients; 0.9 by default.
    pub fn with_beta_1(mut self, beta_1: f64) -> Self {
        self.beta_1 = beta_1;
        self
    }

    /// The decay of AdamW's mean of squared gradients; 0.999 by default.
    pub fn with_beta_2(mut self, beta_2: f64) -> Self {
        self.beta_2 = beta_2;
        self
    }

    /// The term that AdamW adds to the denominator; 1e-8 by default.
    pub fn with_epsilon(mut self, epsilon: f64) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// The norm that gradients are clipped to, taken over all parameters together; 1 by default,
    /// `None` for no clipping.
    pub fn with_max_grad_norm(mut self, max_grad_norm: impl Into<Option<f64>>) -> Self {
        self.max_grad_norm = max_grad_norm.into();
        self
    }

    /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the ratio of the learning rate of `B` of LoRA and of
    /// tiles, DoRA's norms and LoRA's biases to that of the other parameters; 1 by default.
    pub fn with_lora_plus_ratio(mut self, lora_plus_ratio: f64) -> Self {
        self.lora_plus_ratio = lora_plus_ratio;
        self
    }

    /// The seed of the order of the batches, and of dropout; 0 by default.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Gradient checkpointing by block: only the input of each block is kept, and the block runs again
    /// for its gradients. The results are the same, in less memory, for one more forward pass.
    pub fn with_checkpoint_blocks(mut self, checkpoint_blocks: bool) -> Self {
        self.checkpoint_blocks = checkpoint_blocks;
        self
    }

    /// The learning rate of AdamW.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Checks the settings, as [`fit`] does before the first step.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first that is out of its range.
    pub fn check(&self) -> Result<()> {
        let refuse = |setting, value: String, expected| {
            Err(Error::Setting {
                setting,
                value,
                expected,
            })
        };
        // In f32: the dtype that the optimizer computes in.
        let positive = |value: f64| (value as f32).is_finite() && value as f32 > 0.0;
        let fraction = |value: f64| (0.0..1.0).contains(&(value as f32));
        let (number, count) = ("a positive number", "at least 1");
        if !positive(self.learning_rate) {
            return refuse("learning_rate", self.learning_rate.to_string(), number);
        }
        if self.steps.unwrap_or(self.epochs) == 0 {
            let setting = if self.steps.is_some() {
                "steps"
            } else {
                "epochs"
            };
            return refuse(setting, "0".into(), count);
        }
        if self.accumulation == 0 {
            return refuse("accumulation", "0".into(), count);
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return refuse("weight_decay", self.weight_decay.to_string(), "0 or more");
        }
        for (setting, value) in [("beta_1", self.beta_1), ("beta_2", self.beta_2)] {
            if !fraction(value) {
                return refuse(setting, value.to_string(), "in 0 .. 1");
            }
        }
        if !positive(self.lora_plus_ratio) {
            return refuse("lora_plus_ratio", self.lora_plus_ratio.to_string(), number);
        }
        if !positive(self.epsilon) {
            return refuse("epsilon", self.epsilon.to_string(), number);
        }
        match self.max_grad_norm {
            Some(norm) if !positive(norm) => refuse("max_grad_norm", norm.to_string(), number),
            _ => Ok(()),
        }
    }

    /// The learning rate of step `index` of `n_steps`, counted from 0.
    fn learning_rate_at(&self, index: usize, n_steps: usize) -> f64 {
        if index < self.warmup_steps {
            return self.learning_rate * (index + 1) as f64 / self.warmup_steps as f64;
        }
        let after = (n_steps - self.warmup_steps.min(n_steps)).max(1);
        let progress = (index - self.warmup_steps) as f64 / after as f64;
        let factor = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - progress,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.learning_rate * factor
    }
}

/// One optimizer step of [`fit`].
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The index of the step, counted from 1.
    pub index: usize,
    /// The number of steps of the training.
    pub n_steps: usize,
    /// The mean loss over the step's targets, before the step and without penalties of adapters; in nats
    /// for the next-token loss.
    pub loss: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The number of targets.
    pub n_targets: usize,
}

/// Trains the parameters that are not frozen, by AdamW on the next-token loss.
///
/// A step's gradient is that of the mean loss over the targets of its batches, however they are
/// split. The batches are shuffled anew for each epoch.
///
/// # Errors
/// [`Error::Setting`], [`Error::NoBatches`], [`Error::Token`], [`Error::TooLong`] or
/// [`Error::NothingToTrain`] before the first step; [`Error::NonFinite`] if the loss, a gradient or a
/// result is NaN or infinite. On an error the model is unchanged.
pub fn fit<M: CausalLm>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    on_step: impl FnMut(&Step),
) -> Result<()> {
    let loss = |model: &M, x, at: usize| {
        let batch = &batches[at];
        batch.of_targets(nll_of_output(model, x, batch)).sum()
    };
    fit_with(model, batches, config, loss, on_step)
}

/// Trains as [`fit`] does, on another loss.
///
/// `loss(model, x, at)` is the loss of `batches[at]`, a scalar: the sum over the batch's targets, where
/// `x`, `[batch, seq, hidden]`, is the output of the model's last block. The loss of a step is the sum of
/// those of its batches, divided by their number of targets ([`Batch::n_targets`]).
///
/// # Errors
/// As [`fit`].
pub fn fit_with<M: Blocks>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    loss: impl Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    mut on_step: impl FnMut(&Step),
) -> Result<()> {
    config.check()?;
    if batches.is_empty() {
        return Err(Error::NoBatches);
    }
    batches.iter().try_for_each(|batch| batch.check(model))?;
    let mut tuned = model.clone().train();
    let mut trainable = Trainable::default();
    tuned.visit(&mut trainable);
    if trainable.n == 0 {
        return Err(Error::NothingToTrain);
    }
    let per_epoch = batches.len().div_ceil(config.accumulation);
    let n_steps = config
        .steps
        .unwrap_or(config.epochs.saturating_mul(per_epoch));
    if config.warmup_steps > n_steps {
        return Err(Error::Setting {
            setting: "warmup_steps",
            value: config.warmup_steps.to_string(),
            expected: "no more than the steps",
        });
    }

    let adamw = AdamWConfig::new()
        .with_weight_decay(config.weight_decay as f32)
        .with_beta_1(config.beta_1 as f32)
        .with_beta_2(config.beta_2 as f32)
        .with_epsilon(config.epsilon as f32);
    // AdamW updates each parameter by itself: two of them are one with two learning rates.
    let (mut optimizer, mut fast_optimizer) = (adamw.init(), adamw.init());
    let fast: Vec<ParamId> = match config.lora_plus_ratio {
        1.0 => Vec::new(),
        _ => (tuned.linears().iter())
            .filter_map(|(_, linear)| linear.adapter.as_ref())
            .flat_map(|adapter| adapter.ops().fast_params())
            .collect(),
    };
    let lowest = config
        .checkpoint_blocks
        .then(|| lowest_trained(&tuned, &batches[0]));
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let mut masks = rng.clone();
    masks.set_stream(1);
    let mut order: Vec<usize> = (0..batches.len()).collect();
    for index in 0..n_steps {
        if index % per_epoch == 0 {
            order.shuffle(&mut rng);
        }
        let first = index % per_epoch * config.accumulation;
        let chosen = &order[first..order.len().min(first + config.accumulation)];
        let n_targets: usize = chosen.iter().map(|&at| batches[at].n_targets()).sum();

        let mut accumulated = GradientsAccumulator::new();
        let mut mean_loss = 0.0;
        for &at in chosen {
            let batch = &batches[at];
            set_dropout(&mut tuned, masks.next_u64());
            let mut part = |x: Tensor<3>| {
                let part = loss(&tuned, x, at) / n_targets as f32;
                mean_loss += f64::from(part.clone().inner().into_scalar::<f32>());
                if mean_loss.is_finite() {
                    Ok(part)
                } else {
                    Err(Error::NonFinite {
                        what: "the loss".into(),
                        step: index + 1,
                    })
                }
            };
            let gradients = match lowest {
                Some(lowest) => backward_by_block(&tuned, batch, lowest, part)?,
                None => {
                    let part = part(last_output(&tuned, batch))?;
                    GradientsParams::from_grads(part.backward(), &tuned)
                }
            };
            accumulated.accumulate(&tuned, gradients);
        }
        let of_adapters = tuned.linears().into_iter().filter_map(|(_, linear)| {
            let adapter = linear.adapter.as_ref();
            adapter.and_then(|adapter| adapter.ops().penalty())
        });
        if let Some(penalty) = of_adapters.reduce(|sum, penalty| sum + penalty) {
            let gradients = GradientsParams::from_grads(penalty.backward(), &tuned);
            accumulated.accumulate(&tuned, gradients);
        }
        let mut gradients = accumulated.grads();
        let grad_norm = norm(&tuned, &gradients, index + 1)?;
        if let Some(max) = config.max_grad_norm.filter(|&max| grad_norm > max) {
            let factor = max / grad_norm;
            tuned.visit(&mut Scale {
                gradients: &mut gradients,
                factor,
            });
        }
        let learning_rate = config.learning_rate_at(index, n_steps);
        if !fast.is_empty() {
            let mut split = Split {
                fast: &fast,
                gradients: &mut gradients,
                taken: GradientsParams::new(),
            };
            tuned.visit(&mut split);
            let fast_rate = learning_rate * config.lora_plus_ratio;
            tuned = fast_optimizer.step(fast_rate, tuned, split.taken);
        }
        tuned = optimizer.step(learning_rate, tuned, gradients);
        on_step(&Step {
            index: index + 1,
            n_steps,
            loss: mean_loss,
            grad_norm,
            learning_rate,
            n_targets,
        });
    }
    let mut finite = Finite::default();
    tuned.visit(&mut finite);
    if let Some(path) = finite.non_finite {
        return Err(Error::NonFinite {
            what: format!("`{path}`"),
            step: n_steps,
        });
    }
    set_dropout(&mut tuned, None);
    *model = tuned.valid();
    Ok(())
}

/// Counts the parameters that are not frozen.
#[derive(Default)]
struct Trainable {
    n: usize,
}

impl ModuleVisitor for Trainable {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.n += usize::from(param.is_require_grad());
    }
}

/// The norm of all gradients together.
fn norm<M: Blocks>(model: &M, gradients: &GradientsParams, step: usize) -> Result<f64> {
    let mut norms = Norms {
        gradients,
        path: Vec::new(),
        squares: 0.0,
        non_finite: None,
    };
    model.visit(&mut norms);
    match norms.non_finite {
        Some(path) => Err(Error::NonFinite {
            what: format!("the gradient of `{path}`"),
            step,
        }),
        None => Ok(norms.squares.sqrt()),
    }
}

struct Norms<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    squares: f64,
    non_finite: Option<String>,
}

impl ModuleVisitor for Norms<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let squares = f64::from(gradient.square().sum().into_scalar::<f32>());
            if !squares.is_finite() && self.non_finite.is_none() {
                self.non_finite = Some(self.path.join("."));
            }
            self.squares += squares;
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// Finds a trained parameter that is not finite.
#[derive(Default)]
struct Finite {
    path: Vec<String>,
    non_finite: Option<String>,
}

impl ModuleVisitor for Finite {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() && self.non_finite.is_none() {
            let values = param.val().inner();
            if values.is_finite().all().into_scalar::<bool>() {
                return;
            }
            self.non_finite = Some(self.path.join("."));
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// Multiplies all gradients.
struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.gradients.register(param.id, gradient * self.factor);
        }
    }
}

/// Takes the gradients of some parameters.
struct Split<'a> {
    fast: &'a [ParamId],
    gradients: &'a mut GradientsParams,
    taken: GradientsParams,
}

impl ModuleVisitor for Split<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.fast.contains(&param.id)
            && let Some(gradient) = self.gradients.remove::<D>(param.id)
        {
            self.taken.register(param.id, gradient);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_follows_its_schedule() {
        let config = FitConfig::new()
            .with_learning_rate(1.0)
            .with_warmup_steps(2);
        let rates = |schedule| {
            let config = config.clone().with_schedule(schedule);
            (0..6)
                .map(|index| config.learning_rate_at(index, 6))
                .collect::<Vec<_>>()
        };
        assert_eq!(rates(Schedule::Constant), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Linear), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        let cosine = rates(Schedule::Cosine);
        let expected = [0.5, 1.0, 1.0, 0.853553390593, 0.5, 0.146446609407];
        for (found, expected) in cosine.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-9, "{cosine:?}");
        }
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let good = FitConfig::new();
        assert!(good.check().is_ok());
        for bad in [
            good.clone().with_learning_rate(0.0),
            good.clone().with_learning_rate(f64::NAN),
            good.clone().with_epochs(0),
            good.clone().with_steps(0),
            good.clone().with_accumulation(0),
            good.clone().with_weight_decay(-1.0),
            good.clone().with_beta_2(1.0),
            good.clone().with_epsilon(0.0),
            good.clone().with_max_grad_norm(0.0),
        ] {
            assert!(matches!(bad.check(), Err(Error::Setting { .. })), "{bad:?}");
        }
    }
}
