use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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

/// The settings of [`fit`](crate::fit()): AdamW, its schedule, and what makes a step.
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
    pub(crate) learning_rate: f64,
    pub(crate) epochs: usize,
    pub(crate) steps: Option<usize>,
    pub(crate) accumulation: usize,
    pub(crate) warmup_steps: usize,
    pub(crate) schedule: Schedule,
    pub(crate) weight_decay: f64,
    pub(crate) beta_1: f64,
    pub(crate) beta_2: f64,
    pub(crate) epsilon: f64,
    pub(crate) max_grad_norm: Option<f64>,
    pub(crate) lora_plus_ratio: f64,
    pub(crate) seed: u64,
    pub(crate) checkpoint_blocks: bool,
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

    /// Sets the learning rate of AdamW at the end of the warm-up; 1e-3 by default.
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

    /// Sets the schedule after the warm-up; [`Schedule::Cosine`] by default.
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets the decoupled weight decay of AdamW; 0 by default.
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets the decay of AdamW's mean of gradients; 0.9 by default.
    pub fn with_beta_1(mut self, beta_1: f64) -> Self {
        self.beta_1 = beta_1;
        self
    }

    /// Sets the decay of AdamW's mean of squared gradients; 0.999 by default.
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

    /// Sets the seed of the order of the batches, and of dropout; 0 by default.
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

    /// The learning rate of AdamW.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
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
    pub(crate) fn learning_rate_at(&self, index: usize, n_steps: usize) -> f64 {
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
