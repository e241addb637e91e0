use serde::{Deserialize, Serialize};

use crate::{Checkpoints, Error, Evaluation, ParameterGroup, Result};

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It stays the same.
    Constant,
    /// It falls linearly, to [`FitConfig::with_final_ratio`] of it after the last step.
    Linear,
    /// It falls along half a cosine, to [`FitConfig::with_final_ratio`] of it after the last step.
    Cosine,
}

/// The rule by which a step changes the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optimizer {
    /// AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): 8 bytes of state for each parameter.
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW whose moments are codes of 8 bits in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861):
    /// a quarter of the state of tensors of at least 4096 elements; smaller ones have it in `f32`.
    #[serde(rename = "adamw_8bit")]
    AdamW8bit,
    /// Lion (Chen et al. 2023, arXiv:2302.06675): 4 bytes of state for each parameter.
    ///
    /// Each element moves by the learning rate, which the paper takes 3 to 10 times lower than AdamW's,
    /// with a decay as many times higher and [`FitConfig::with_beta_2`] of 0.99.
    #[serde(rename = "lion")]
    Lion,
}

/// The settings of [`fit`](crate::fit()): the optimizer, its schedule, and what makes a step.
///
/// They are checked when training begins, or by [`FitConfig::check`]. As text, such as JSON, they are without
/// the [`Checkpoints`] and the [`Evaluation`], and a setting that is not there has its default.
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
#[serde(default, deny_unknown_fields)]
pub struct FitConfig {
    pub(crate) optimizer: Optimizer,
    pub(crate) learning_rate: f64,
    pub(crate) epochs: usize,
    pub(crate) steps: Option<usize>,
    pub(crate) accumulation: usize,
    pub(crate) warmup_steps: usize,
    pub(crate) warmup_ratio: f64,
    pub(crate) schedule: Schedule,
    pub(crate) final_ratio: f64,
    pub(crate) weight_decay: f64,
    pub(crate) beta_1: f64,
    pub(crate) beta_2: f64,
    pub(crate) epsilon: f64,
    pub(crate) max_grad_norm: Option<f64>,
    pub(crate) lora_plus_ratio: f64,
    pub(crate) groups: Vec<ParameterGroup>,
    pub(crate) neftune_alpha: f64,
    pub(crate) seed: u64,
    pub(crate) checkpoint_blocks: bool,
    pub(crate) skip_non_finite: usize,
    #[serde(skip)]
    pub(crate) checkpoints: Option<Checkpoints>,
    #[serde(skip)]
    pub(crate) evaluation: Option<Evaluation>,
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
            optimizer: Optimizer::AdamW,
            learning_rate: 1e-3,
            epochs: 1,
            steps: None,
            accumulation: 1,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            schedule: Schedule::Cosine,
            final_ratio: 0.0,
            weight_decay: 0.0,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            max_grad_norm: Some(1.0),
            lora_plus_ratio: 1.0,
            groups: Vec::new(),
            neftune_alpha: 0.0,
            seed: 0,
            checkpoint_blocks: false,
            skip_non_finite: 0,
            checkpoints: None,
            evaluation: None,
        }
    }

    /// Sets the optimizer; [`Optimizer::AdamW`] by default.
    pub fn with_optimizer(mut self, optimizer: Optimizer) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// Sets the learning rate at the end of the warm-up; 1e-3 by default.
    pub fn with_learning_rate(mut self, learning_rate: f64) -> Self {
        self.learning_rate = learning_rate;
        self
    }

    /// Sets the number of epochs; 1 by default. Ignored if steps are set.
    pub fn with_epochs(mut self, epochs: usize) -> Self {
        self.epochs = epochs;
        self
    }

    /// Sets the number of optimizer steps, for which batches are repeated; by default, the epochs
    /// determine it.
    pub fn with_steps(mut self, steps: impl Into<Option<usize>>) -> Self {
        self.steps = steps.into();
        self
    }

    /// Sets the number of batches whose gradients make one step; 1 by default.
    ///
    /// Each target has the same weight.
    pub fn with_accumulation(mut self, accumulation: usize) -> Self {
        self.accumulation = accumulation;
        self
    }

    /// Sets the number of steps of linear warm-up; 0 by default.
    pub fn with_warmup_steps(mut self, warmup_steps: usize) -> Self {
        self.warmup_steps = warmup_steps;
        self
    }

    /// Sets the warm-up as a share of the steps, rounded up; 0 by default. Ignored if steps of warm-up are
    /// set.
    pub fn with_warmup_ratio(mut self, warmup_ratio: f64) -> Self {
        self.warmup_ratio = warmup_ratio;
        self
    }

    /// Sets the schedule after the warm-up; [`Schedule::Cosine`] by default.
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets the share of the learning rate at which a falling schedule ends; 0 by default.
    pub fn with_final_ratio(mut self, final_ratio: f64) -> Self {
        self.final_ratio = final_ratio;
        self
    }

    /// Sets the decoupled weight decay; 0 by default.
    ///
    /// It draws all trained parameters towards zero: factors and tiles towards adding nothing, PEQA's towards
    /// the scales of the base. DoRA's norms and LoRA's biases are drawn away from the base, unless they have
    /// a [`ParameterGroup`] without decay.
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets the decay of the mean of gradients, of Lion that in the direction of a step; 0.9 by default.
    pub fn with_beta_1(mut self, beta_1: f64) -> Self {
        self.beta_1 = beta_1;
        self
    }

    /// Sets the decay of AdamW's mean of squared gradients, and of Lion's mean of gradients; 0.999 by
    /// default.
    pub fn with_beta_2(mut self, beta_2: f64) -> Self {
        self.beta_2 = beta_2;
        self
    }

    /// Sets the term that AdamW adds to the denominator; 1e-8 by default.
    pub fn with_epsilon(mut self, epsilon: f64) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets the norm of all gradients together above which they are clipped; 1 by default, `None` for
    /// no clipping.
    pub fn with_max_grad_norm(mut self, max_grad_norm: impl Into<Option<f64>>) -> Self {
        self.max_grad_norm = max_grad_norm.into();
        self
    }

    /// Sets the ratio of learning rates of LoRA+ (Hayou et al. 2024, arXiv:2402.12354); 1 by default.
    ///
    /// It is that of `B` of LoRA and of tiles, DoRA's norms and LoRA's biases to the other parameters.
    pub fn with_lora_plus_ratio(mut self, lora_plus_ratio: f64) -> Self {
        self.lora_plus_ratio = lora_plus_ratio;
        self
    }

    /// Adds a group of parameters with settings of their own; none by default.
    ///
    /// Its factor of the learning rate is multiplied with that of LoRA+.
    pub fn with_group(mut self, group: ParameterGroup) -> Self {
        self.groups.push(group);
        self
    }

    /// Sets the noise on the embedded tokens of the training (NEFTune, Jain et al. 2023, arXiv:2310.05914);
    /// 0 by default.
    ///
    /// It is uniform up to `neftune_alpha / sqrt(seq * hidden)` in each element. There is none in an
    /// evaluation.
    pub fn with_neftune_alpha(mut self, neftune_alpha: f64) -> Self {
        self.neftune_alpha = neftune_alpha;
        self
    }

    /// Sets the seed of the order of the batches, of dropout and of noise; 0 by default.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets whether gradients are checkpointed by block; false by default.
    ///
    /// Only the input of each block is kept, and the block runs again for its gradients. The results are
    /// the same, in less memory, for one more forward pass.
    pub fn with_checkpoint_blocks(mut self, checkpoint_blocks: bool) -> Self {
        self.checkpoint_blocks = checkpoint_blocks;
        self
    }

    /// Sets how many steps with a loss or a gradient that is not finite are skipped; 0 by default: the
    /// first one is an error.
    ///
    /// Each of them halves the learning rate of all steps after it.
    pub fn with_skip_non_finite(mut self, skip_non_finite: usize) -> Self {
        self.skip_non_finite = skip_non_finite;
        self
    }

    /// Sets where the state of the training is saved; `None` by default.
    pub fn with_checkpoints(mut self, checkpoints: impl Into<Option<Checkpoints>>) -> Self {
        self.checkpoints = checkpoints.into();
        self
    }

    /// Sets the evaluation on held-out batches on the way; `None` by default.
    pub fn with_evaluation(mut self, evaluation: impl Into<Option<Evaluation>>) -> Self {
        self.evaluation = evaluation.into();
        self
    }

    /// The learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// The evaluation on held-out batches.
    pub fn evaluation(&self) -> Option<&Evaluation> {
        self.evaluation.as_ref()
    }

    /// Checks the settings, as [`fit`](crate::fit()) does before the first step.
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
        let of_groups = self.groups.iter().filter_map(|group| group.weight_decay);
        let of_groups = of_groups.map(|decay| ("weight_decay", decay));
        let own = [
            ("weight_decay", self.weight_decay),
            ("neftune_alpha", self.neftune_alpha),
        ];
        for (setting, value) in own.into_iter().chain(of_groups) {
            if !((value as f32).is_finite() && value >= 0.0) {
                return refuse(setting, value.to_string(), "0 or more");
            }
        }
        for group in &self.groups {
            group.regex()?;
            if !positive(group.rate_factor) {
                return refuse("rate_factor", group.rate_factor.to_string(), number);
            }
        }
        for (setting, value) in [("beta_1", self.beta_1), ("beta_2", self.beta_2)] {
            if !fraction(value) {
                return refuse(setting, value.to_string(), "in 0 .. 1");
            }
        }
        let shares = [
            ("warmup_ratio", self.warmup_ratio),
            ("final_ratio", self.final_ratio),
        ];
        for (setting, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return refuse(setting, value.to_string(), "from 0 to 1");
            }
        }
        if !positive(self.lora_plus_ratio) {
            return refuse("lora_plus_ratio", self.lora_plus_ratio.to_string(), number);
        }
        if !positive(self.epsilon) {
            return refuse("epsilon", self.epsilon.to_string(), number);
        }
        if let Some(norm) = self.max_grad_norm.filter(|&norm| !positive(norm)) {
            return refuse("max_grad_norm", norm.to_string(), number);
        }
        if let Some(checkpoints) = &self.checkpoints {
            checkpoints.check()?;
        }
        self.evaluation.as_ref().map_or(Ok(()), Evaluation::check)
    }

    /// The steps of a training on so many batches.
    ///
    /// # Errors
    /// [`Error::Setting`] if the warm-up is longer.
    pub(crate) fn n_steps(&self, n_batches: usize) -> Result<usize> {
        let of_epochs = || {
            let per_epoch = n_batches.div_ceil(self.accumulation);
            self.epochs.saturating_mul(per_epoch)
        };
        let n_steps = self.steps.unwrap_or_else(of_epochs);
        if self.warmup_steps > n_steps {
            return Err(Error::Setting {
                setting: "warmup_steps",
                value: self.warmup_steps.to_string(),
                expected: "no more than the steps",
            });
        }
        Ok(n_steps)
    }

    /// The learning rate of step `index` of `n_steps`, counted from 0.
    pub(crate) fn learning_rate_at(&self, index: usize, n_steps: usize) -> f64 {
        let warmup_steps = match self.warmup_steps {
            0 => (self.warmup_ratio * n_steps as f64).ceil() as usize,
            steps => steps,
        };
        if index < warmup_steps {
            return self.learning_rate * (index + 1) as f64 / warmup_steps as f64;
        }
        let after = (n_steps - warmup_steps.min(n_steps)).max(1);
        let progress = (index - warmup_steps) as f64 / after as f64;
        let falling = match self.schedule {
            Schedule::Constant => return self.learning_rate,
            Schedule::Linear => 1.0 - progress,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.learning_rate * (self.final_ratio + (1.0 - self.final_ratio) * falling)
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
        let config = config.with_warmup_steps(0).with_warmup_ratio(0.3);
        // 0.3 · 6, rounded up, is two steps.
        assert_eq!(config.learning_rate_at(1, 6), 1.0);
        let config = config.with_schedule(Schedule::Linear).with_final_ratio(0.2);
        let falling = [2, 3, 4, 5].map(|index| config.learning_rate_at(index, 6));
        for (found, expected) in falling.into_iter().zip([1.0, 0.8, 0.6, 0.4]) {
            assert!((found - expected).abs() < 1e-12, "{falling:?}");
        }
    }

    #[test]
    fn settings_that_a_file_does_not_have_are_the_defaults() {
        let config = FitConfig::new().with_steps(7).with_seed(3);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<FitConfig>(&text).unwrap(), config);
        let few = r#"{"steps": 7, "seed": 3}"#;
        assert_eq!(serde_json::from_str::<FitConfig>(few).unwrap(), config);
        assert!(serde_json::from_str::<FitConfig>(r#"{"step": 7}"#).is_err());
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
            good.clone().with_warmup_ratio(1.5),
            good.clone().with_final_ratio(-0.1),
            good.clone().with_neftune_alpha(f64::INFINITY),
            good.clone().with_group(ParameterGroup::new("[")),
            good.clone()
                .with_group(ParameterGroup::new("a").with_rate_factor(0.0)),
            good.clone()
                .with_group(ParameterGroup::new("a").with_weight_decay(-1.0)),
            good.clone()
                .with_checkpoints(Checkpoints::new("checkpoints").with_every(0)),
            good.clone().with_evaluation(Evaluation::new([])),
        ] {
            assert!(matches!(bad.check(), Err(Error::Setting { .. })), "{bad:?}");
        }
    }
}
