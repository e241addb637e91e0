use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::Gradients;
use peft::Lora;

use super::learned::Learned;
use crate::Result;
use crate::error::refused_setting;

/// The settings of both forms.
#[derive(Clone, Debug)]
pub(super) struct Learning {
    pub(super) lora: Lora,
    pub(super) rounds: usize,
    pub(super) of_ranges: f64,
    pub(super) of_factors: f64,
    pub(super) weight_decay: f32,
}

impl Learning {
    pub(super) fn new(lora: Lora, rounds: usize) -> Self {
        Self {
            lora,
            rounds,
            of_ranges: 5e-3,
            of_factors: 5e-4,
            weight_decay: 0.1,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        for (setting, rate) in [
            ("of_ranges", self.of_ranges),
            ("of_factors", self.of_factors),
        ] {
            if !(rate.is_finite() && rate > 0.0) {
                return Err(refused_setting(setting, rate, "a positive number"));
            }
        }
        let decay = f64::from(self.weight_decay);
        if decay.is_finite() && decay >= 0.0 {
            Ok(())
        } else {
            Err(refused_setting("weight_decay", decay, "0 or more"))
        }
    }

    /// An optimizer of any number of layers: it keeps moments by parameter.
    pub(super) fn optimizer(&self) -> ModuleOptimizer {
        AdamWConfig::new()
            .with_weight_decay(self.weight_decay)
            .init()
    }

    pub(super) fn step(
        &self,
        learned: &mut Learned,
        optimizer: &mut ModuleOptimizer,
        gradients: &mut Gradients,
    ) {
        let of_ranges = GradientsParams::from_module(gradients, &learned.ranges);
        learned.ranges = optimizer.step(self.of_ranges, learned.ranges.clone(), of_ranges);
        if let Some(found) = learned.factors.take() {
            let of_factors = GradientsParams::from_module(gradients, &found);
            learned.factors = Some(optimizer.step(self.of_factors, found, of_factors));
        }
    }
}

macro_rules! settings {
    ($rounds:literal) => {
        #[doc = $rounds]
        pub fn with_rounds(mut self, rounds: usize) -> Self {
            self.0.rounds = rounds;
            self
        }

        /// The learning rates of the ranges and of the factors; 0.005 and 0.0005 as published.
        pub fn with_learning_rates(mut self, of_ranges: f64, of_factors: f64) -> Self {
            (self.0.of_ranges, self.0.of_factors) = (of_ranges, of_factors);
            self
        }

        /// The weight decay of AdamW; 0.1 as published.
        pub fn with_weight_decay(mut self, weight_decay: f32) -> Self {
            self.0.weight_decay = weight_decay;
            self
        }
    };
}

pub(super) use settings;
