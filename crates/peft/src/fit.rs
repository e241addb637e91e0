use burn::config::Config;
use burn::module::{ModuleVisitor, Param, ParamId};
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Serialize};

use crate::checkpointing::{backward_by_block, lowest_trained};
use crate::{Batch, CausalLm, Error, Result, last_output, nll_of_output};

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// As it is.
    Constant,
    /// In a line, to reach zero after the last step.
    Linear,
    /// In half a cosine, to reach zero after the last step.
    Cosine,
}

/// How [`fit`] trains.
#[derive(Config, Debug)]
pub struct FitConfig {
    /// The learning rate of AdamW, reached at the end of the warm-up.
    #[config(default = 1e-3)]
    pub learning_rate: f64,
    /// Passes over the batches; not used if `steps` is given.
    #[config(default = 1)]
    pub epochs: usize,
    /// Optimizer steps. The batches are gone through again as often as it takes.
    #[config(default = "None")]
    pub steps: Option<usize>,
    /// Batches whose gradients make one step, each token weighing the same.
    #[config(default = 1)]
    pub accumulation: usize,
    /// Steps in which the learning rate rises in a line.
    #[config(default = 0)]
    pub warmup_steps: usize,
    /// What the learning rate does after the warm-up.
    #[config(default = "Schedule::Cosine")]
    pub schedule: Schedule,
    /// Decoupled weight decay of AdamW.
    #[config(default = 0.0)]
    pub weight_decay: f64,
    /// The decay of AdamW's mean of gradients.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// The decay of AdamW's mean of squared gradients.
    #[config(default = 0.999)]
    pub beta_2: f64,
    /// What AdamW adds to the denominator.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Gradients are scaled down to this norm, taken over all parameters together.
    #[config(default = "Some(1.0)")]
    pub max_grad_norm: Option<f64>,
    /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): `B` of LoRA and of tiles, DoRA's norms and
    /// LoRA's biases learn at the rate times this.
    #[config(default = 1.0)]
    pub lora_plus_ratio: f64,
    /// The seed of the order of the batches, and of dropout.
    #[config(default = 0)]
    pub seed: u64,
    /// Gradient checkpointing: keeps of each block its input alone, and runs the block again for its
    /// gradients. The same result in less memory, for one more forward pass.
    #[config(default = false)]
    pub checkpoint_blocks: bool,
}

impl FitConfig {
    /// Checks the settings, as [`fit`] does before it begins.
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
        // In f32, in which the optimizer computes.
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
    /// Counted from 1.
    pub index: usize,
    /// Steps in all.
    pub n_steps: usize,
    /// The mean loss over the step's tokens before it, in nats, without penalties of adapters.
    pub loss: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// Tokens predicted.
    pub n_targets: usize,
}

/// Trains the parameters that are not frozen, by AdamW on the next-token loss.
///
/// A step's gradient is that of the mean loss over the tokens of its batches, however they are
/// split. The order of the batches is drawn anew for each pass.
///
/// # Errors
/// [`Error::Setting`], [`Error::NoBatches`], [`Error::Token`] or [`Error::NothingToTrain`] before the
/// first step; [`Error::NonFinite`] if the loss, a gradient or a result is NaN or infinite. On an error the model is as
/// it was before.
pub fn fit<M: CausalLm>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    on_step: impl FnMut(&Step),
) -> Result<()> {
    let loss = |model: &M, x, at: usize| nll_of_output(model, x, &batches[at]);
    fit_with(model, batches, config, loss, on_step)
}

/// [`fit`] on another loss. `loss(model, x, at)` is the loss of each token after the first of
/// `batches[at]`, `[batch, seq - 1]`, of which those count that are to be predicted, where `x`, `[batch, seq, hidden]`, is the output of the model's last block: see
/// [`nll_of_output`].
///
/// # Errors
/// As [`fit`].
pub fn fit_with<M: CausalLm>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    loss_of: impl Fn(&M, Tensor<3>, usize) -> Tensor<2>,
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
    // AdamW looks at one parameter at a time: two of them are one with two learning rates.
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
        let mut loss = 0.0;
        for &at in chosen {
            let batch = &batches[at];
            tuned.set_dropout(Some(masks.next_u64()));
            let mut mean = |x: Tensor<3>| {
                let nll = batch.of_targets(loss_of(&tuned, x, at)).sum() / n_targets as f32;
                loss += f64::from(nll.clone().inner().into_scalar::<f32>());
                if loss.is_finite() {
                    Ok(nll)
                } else {
                    Err(Error::NonFinite {
                        what: "the loss".into(),
                        step: index + 1,
                    })
                }
            };
            let gradients = match lowest {
                Some(lowest) => backward_by_block(&tuned, batch, lowest, mean)?,
                None => {
                    let loss = mean(last_output(&tuned, batch))?;
                    GradientsParams::from_grads(loss.backward(), &tuned)
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
            loss,
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
    tuned.set_dropout(None);
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
fn norm<M: CausalLm>(model: &M, gradients: &GradientsParams, step: usize) -> Result<f64> {
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
            good.clone().with_steps(Some(0)),
            good.clone().with_accumulation(0),
            good.clone().with_weight_decay(-1.0),
            good.clone().with_beta_2(1.0),
            good.clone().with_epsilon(0.0),
            good.clone().with_max_grad_norm(Some(0.0)),
        ] {
            assert!(matches!(bad.check(), Err(Error::Setting { .. })), "{bad}");
        }
    }
}
