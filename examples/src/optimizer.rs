//! The optimizers that the programs train with.

use clap::ValueEnum;
use peft::{FitConfig, Optimizer};
use serde::{Deserialize, Serialize};

/// An optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerName {
    /// AdamW: 8 bytes of state for each trained parameter
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW whose state is codes of 8 bits: 2 bytes, for tensors of at least 4096 elements
    #[value(name = "adamw-8bit")]
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// Lion: 4 bytes; by default at a fifth of AdamW's learning rate
    Lion,
}

impl OptimizerName {
    /// The settings with this optimizer, in which Lion decays its mean of gradients as published.
    pub fn of(self, fit: FitConfig) -> FitConfig {
        match self {
            Self::AdamW => fit.with_optimizer(Optimizer::AdamW),
            Self::AdamW8bit => fit.with_optimizer(Optimizer::AdamW8bit),
            Self::Lion => fit.with_optimizer(Optimizer::Lion).with_beta_2(0.99),
        }
    }

    /// What the default learning rates, which are AdamW's, are multiplied by.
    ///
    /// A step of Lion changes each element by the learning rate, one of AdamW by less: the paper takes a rate
    /// 3 to 10 times lower (Chen et al. 2023, arXiv:2302.06675).
    pub fn rate_factor(self) -> f64 {
        match self {
            Self::AdamW | Self::AdamW8bit => 1.0,
            Self::Lion => 0.2,
        }
    }
}
