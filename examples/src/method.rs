//! The methods that the examples tune with.

use clap::ValueEnum;
use peft::{Bayesian, Lora, Method, Peqa, Targets, Tile, Vera};
use quant_core::{DoubleQuant, NormalFloat, Quantizer, Rtn};
use serde::Serialize;

use crate::arguments::GroupSize;
use crate::outcome::Result;

/// A method of fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// PEQA: the scales of the quantized weights
    Peqa,
    /// PEQA: the scales and the zero-points
    PeqaZeros,
    /// LoRA: a matrix of low rank added to each weight
    Lora,
    /// rsLoRA: LoRA scaled by alpha over the square root of the rank
    #[value(name = "rslora")]
    #[serde(rename = "rslora")]
    RsLora,
    /// DoRA: LoRA, and the norm of each output's weights
    Dora,
    /// Bayesian-LoRA: LoRA that learns its rank and the bits of its factors
    Bayesian,
    /// VeRA: two vectors of each layer, between random factors; its rank is best 256 or more
    Vera,
    /// QLoRA: LoRA over normal floats with double quantization
    #[value(name = "qlora")]
    #[serde(rename = "qlora")]
    QLora,
    /// QA-LoRA: a matrix of low rank over pooled inputs; merges into the zero-points
    #[value(name = "qa-lora")]
    #[serde(rename = "qa-lora")]
    QaLora,
    /// Q-BaRA: twice the rank over pooled inputs and repeated outputs, over normal floats
    QBara,
    /// QA-HiRA: a number for each group of weights; merges into the zero-points
    QaHira,
    /// QA-BLoRA: QA-LoRA with repeated outputs; merges into the zero-points
    #[value(name = "qa-blora")]
    #[serde(rename = "qa-blora")]
    QaBLora,
}

impl MethodName {
    /// The name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no method is hidden");
        value.get_name().into()
    }

    /// Whether the number of trainable parameters depends on the rank.
    pub fn has_rank(self) -> bool {
        !matches!(self, Self::Peqa | Self::PeqaZeros | Self::QaHira)
    }

    /// Returns the quantizer of the method's base.
    ///
    /// # Errors
    /// If a method over normal floats is asked for a symmetric grid.
    pub fn quantizer(
        self,
        bits: usize,
        GroupSize(group_size): GroupSize,
        symmetric: bool,
    ) -> Result<Box<dyn Quantizer>> {
        match self {
            Self::QLora | Self::QBara if symmetric => {
                let name = self.name();
                Err(format!("{name} quantizes to normal floats; leave out --symmetric").into())
            }
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

    /// Returns the method for these layers.
    pub fn method(self, rank: usize, alpha: f32, targets: &Targets, seed: u64) -> Box<dyn Method> {
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
            Self::Vera => {
                let vera = Vera::new(rank).with_seed(seed);
                Box::new(vera.with_targets(targets.clone()))
            }
            Self::QaLora => tile(Tile::qa_lora(rank).with_alpha(alpha)),
            Self::QBara => tile(Tile::q_bara(rank).with_alpha(alpha)),
            Self::QaHira => tile(Tile::qa_hira()),
            Self::QaBLora => tile(Tile::qa_blora(rank).with_alpha(alpha)),
        }
    }
}
