//! The methods that the examples tune with.

use clap::ValueEnum;
use peft::{Bayesian, Lora, Method, Peqa, Targets, Tile};
use quant_core::{DoubleQuant, NormalFloat, Quantizer, Rtn};
use serde::Serialize;

use crate::tuning::Result;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// The scales of the quantized weights (PEQA)
    Peqa,
    /// The scales and the zeros
    PeqaZeros,
    /// A matrix of low rank beside each weight (LoRA)
    Lora,
    /// LoRA whose scale falls with the root of the rank (rsLoRA)
    #[value(name = "rslora")]
    #[serde(rename = "rslora")]
    RsLora,
    /// LoRA with trained norms (DoRA)
    Dora,
    /// LoRA that learns its rank and the bits of its factors (Bayesian-LoRA)
    Bayesian,
    /// LoRA over normal floats with double quantization (QLoRA)
    #[value(name = "qlora")]
    #[serde(rename = "qlora")]
    QLora,
    /// A product of low rank over pooled groups (QA-LoRA)
    #[value(name = "qa-lora")]
    #[serde(rename = "qa-lora")]
    QaLora,
    /// Pooled inputs, repeated outputs and twice the rank, over normal floats (Q-BaRA)
    QBara,
    /// A number for each group and output (QA-HiRA)
    QaHira,
    /// Pooled groups, repeated outputs and low rank (QA-BLoRA)
    #[value(name = "qa-blora")]
    #[serde(rename = "qa-blora")]
    QaBLora,
}

impl MethodName {
    /// As on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no method is hidden");
        value.get_name().into()
    }

    /// Whether the rank says how much is trained.
    pub fn has_rank(self) -> bool {
        !matches!(self, Self::Peqa | Self::PeqaZeros | Self::QaHira)
    }

    /// What the method's base is quantized with.
    ///
    /// # Errors
    /// If normal floats are asked to be symmetric, which they are not.
    pub fn quantizer(
        self,
        bits: usize,
        group_size: Option<usize>,
        symmetric: bool,
    ) -> Result<Box<dyn Quantizer>> {
        match self {
            Self::QLora | Self::QBara if symmetric => Err(format!(
                "{} is over normal floats, which take no --symmetric",
                self.name()
            )
            .into()),
            Self::QLora | Self::QBara => {
                let nf = NormalFloat::new()
                    .with_bits(bits)
                    .with_block_size(group_size);
                Ok(Box::new(nf.with_double_quant(DoubleQuant::dynamic())))
            }
            _ => {
                let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
                Ok(Box::new(rtn.with_symmetric(symmetric)))
            }
        }
    }

    /// The method on these layers, with `α` the rank if there is none given.
    pub fn method(
        self,
        rank: usize,
        alpha: Option<f32>,
        targets: &Targets,
        seed: u64,
    ) -> Box<dyn Method> {
        let alpha = alpha.unwrap_or(rank as f32);
        let lora = || {
            let lora = Lora::new(rank).with_alpha(alpha).with_seed(seed);
            lora.with_targets(targets.clone())
        };
        let tile = |tile: Tile| {
            let tile = tile.with_seed(seed).with_targets(targets.clone());
            Box::new(tile)
        };
        match self {
            Self::Peqa => Box::new(Peqa::new().with_targets(targets.clone())),
            Self::PeqaZeros => Box::new(Peqa::new().with_zeros(true).with_targets(targets.clone())),
            Self::Lora | Self::QLora => Box::new(lora()),
            Self::RsLora => Box::new(lora().with_rank_stabilized(true)),
            Self::Dora => Box::new(lora().with_dora(true)),
            Self::Bayesian => {
                let bayesian = Bayesian::new(rank).with_alpha(alpha).with_seed(seed);
                Box::new(bayesian.with_targets(targets.clone()))
            }
            Self::QaLora => tile(Tile::qa_lora(rank).with_alpha(alpha)),
            Self::QBara => tile(Tile::q_bara(rank).with_alpha(alpha)),
            Self::QaHira => tile(Tile::qa_hira()),
            Self::QaBLora => tile(Tile::qa_blora(rank).with_alpha(alpha)),
        }
    }

    /// A learning rate for a model of a million parameters.
    pub fn learning_rate(self) -> f64 {
        match self {
            Self::Peqa | Self::PeqaZeros | Self::QaHira => 2e-3,
            _ => 5e-3,
        }
    }
}
