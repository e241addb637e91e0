//! The methods that the examples tune with.

use clap::ValueEnum;
use peft::presets;
use peft::{Bayesian, FitConfig, Lora, Method, Peqa, Targets, Tile, Vera};
use quant_core::{DoubleQuant, NormalFloat, Quantizer, Rtn};
use serde::Serialize;

use crate::arguments::GroupSize;
use crate::format::FormatName;
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

    /// Whether it merges into the codes of a packed weight.
    pub fn merges_into_codes(self) -> bool {
        self.trains_zeros() || self == Self::Peqa
    }

    /// Whether its merge changes zero-points, into fractions.
    pub fn trains_zeros(self) -> bool {
        matches!(
            self,
            Self::PeqaZeros | Self::QaLora | Self::QaHira | Self::QaBLora
        )
    }

    /// Returns the quantizer of the method's base, whose weights are saved in `format`.
    ///
    /// # Errors
    /// If a grid of normal floats is asked to be symmetric.
    pub fn quantizer(
        self,
        bits: usize,
        GroupSize(group_size): GroupSize,
        symmetric: bool,
        format: FormatName,
    ) -> Result<Box<dyn Quantizer>> {
        let is_double = matches!(self, Self::QLora | Self::QBara);
        if is_double || format == FormatName::Bitsandbytes {
            if symmetric {
                return Err("normal floats have no zero-points; leave out --symmetric".into());
            }
            let nf = NormalFloat::new().with_bits(bits);
            let double = is_double.then(DoubleQuant::dynamic);
            return Ok(Box::new(
                nf.with_block_size(group_size).with_double_quant(double),
            ));
        }
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
        let rtn = rtn.with_symmetric(symmetric);
        let rtn = rtn.with_f16_scales(format.f16_scales());
        Ok(Box::new(
            rtn.with_fractional_zeros(format.fractional_zeros()),
        ))
    }

    /// Returns the method for these layers; of those that train scales, with scales in `f16` if asked.
    pub fn method(
        self,
        rank: usize,
        alpha: f32,
        targets: &Targets,
        seed: u64,
        f16_scales: bool,
    ) -> Box<dyn Method> {
        let lora = || {
            let lora = Lora::new(rank).with_alpha(alpha).with_seed(seed);
            lora.with_targets(targets.clone())
        };
        let tile = |tile: Tile| {
            let tile = tile.with_seed(seed).with_targets(targets.clone());
            Box::new(tile)
        };
        match self {
            Self::Peqa | Self::PeqaZeros => {
                let peqa = Peqa::new().with_zeros(self == Self::PeqaZeros);
                let peqa = peqa.with_f16_scales(f16_scales);
                Box::new(peqa.with_targets(targets.clone()))
            }
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

/// The settings of a paper, with their sources in the documentation of `peft::presets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PresetName {
    /// QLoRA (arXiv:2305.14314): NF4 with double quantization, rank 64, 2e-4
    #[value(name = "qlora")]
    #[serde(rename = "qlora")]
    QLora,
    /// QA-LoRA (arXiv:2309.14717): OPTQ, 4 bits by groups of 32, rank 64, 2e-5
    #[value(name = "qa-lora")]
    #[serde(rename = "qa-lora")]
    QaLora,
    /// Q-BaRA (published as Q-BLoRA): as QLoRA, over pairs of inputs and outputs
    QBara,
    /// QA-HiRA: as QA-LoRA, a number for each group of weights, 2e-4
    QaHira,
    /// PEQA (arXiv:2305.14152): 4 bits per channel, trained scales
    Peqa,
}

/// A quantizer, a method and the training of a preset.
pub struct Settings {
    /// The quantizer of a dense base.
    pub quantizer: Box<dyn Quantizer>,
    /// The method.
    pub method: Box<dyn Method>,
    /// The training, for one epoch.
    pub fit: FitConfig,
}

impl PresetName {
    /// The method of the preset.
    pub fn method(self) -> MethodName {
        match self {
            Self::QLora => MethodName::QLora,
            Self::QaLora => MethodName::QaLora,
            Self::QBara => MethodName::QBara,
            Self::QaHira => MethodName::QaHira,
            Self::Peqa => MethodName::Peqa,
        }
    }

    /// Returns the settings for these layers, with scales in `f16` if asked.
    pub fn settings(self, targets: &Targets, seed: u64, f16_scales: bool) -> Settings {
        let targets = targets.clone();
        match self {
            Self::QLora => {
                let preset = presets::qlora();
                let method = preset.method.with_targets(targets).with_seed(seed);
                Settings::new(Box::new(preset.quantizer), Box::new(method), preset.fit)
            }
            Self::Peqa => {
                let preset = presets::peqa();
                let quantizer = preset.quantizer.with_f16_scales(f16_scales);
                let method = preset.method.with_targets(targets);
                let method = method.with_f16_scales(f16_scales);
                Settings::new(Box::new(quantizer), Box::new(method), preset.fit)
            }
            Self::QBara => {
                let preset = presets::q_bara();
                let method = preset.method.with_targets(targets).with_seed(seed);
                Settings::new(Box::new(preset.quantizer), Box::new(method), preset.fit)
            }
            Self::QaLora | Self::QaHira => {
                let preset = match self {
                    Self::QaLora => presets::qa_lora(),
                    _ => presets::qa_hira(),
                };
                let quantizer = preset.quantizer.with_f16_scales(f16_scales);
                let method = preset.method.with_targets(targets).with_seed(seed);
                Settings::new(Box::new(quantizer), Box::new(method), preset.fit)
            }
        }
    }
}

impl Settings {
    fn new(quantizer: Box<dyn Quantizer>, method: Box<dyn Method>, fit: FitConfig) -> Self {
        Self {
            quantizer,
            method,
            fit,
        }
    }
}
