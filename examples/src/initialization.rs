//! The initializations of adapters that the examples know, with their bases.

use clap::ValueEnum;
use loftq::{
    Apiq, ApiqBlock, BlockAp, Initialization, LayerMethod, Loftq, LqLora, Pissa, Qera, Rilq,
    presets,
};
use models::{Config, Model, Window};
use peft::{Batch, CausalLm, FitConfig, Lora, PerLayer, Stages};
use quant_core::{NormalFloat, Optq, Order, Quantizer, Rtn, allocate};

use crate::arguments::GroupSize;
use crate::format::FormatName;
use crate::outcome::Result;

/// An initialization of a model in memory, or of one block after the other.
pub trait InitMethod: Initialization<Model> + Initialization<Window> {}

impl<T: Initialization<Model> + Initialization<Window>> InitMethod for T {}

/// A base, an initialization and the training after it.
pub struct InitSettings {
    /// The quantizer of the base.
    pub quantizer: Box<dyn Quantizer>,
    /// The initialization.
    pub method: Box<dyn InitMethod>,
    /// The training, for one epoch.
    pub fit: FitConfig,
}

/// The settings of a paper, with their sources in the documentation of `loftq::presets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InitPresetName {
    /// LoftQ (arXiv:2310.08659): NF4 in blocks of 64, rank 64, 5 rounds, 3e-4
    Loftq,
    /// ApiQ by block (arXiv:2402.05147): 2 bits in groups of 64, rank 64, 3e-4
    Apiq,
}

impl InitPresetName {
    /// The method of the preset.
    pub fn name(self) -> InitName {
        match self {
            Self::Loftq => InitName::Loftq,
            Self::Apiq => InitName::ApiqBlock,
        }
    }

    /// The settings of the preset.
    pub fn settings(self) -> InitSettings {
        match self {
            Self::Loftq => {
                let preset = presets::loftq();
                InitSettings {
                    quantizer: Box::new(preset.quantizer),
                    method: Box::new(preset.method),
                    fit: preset.fit,
                }
            }
            Self::Apiq => {
                let preset = presets::apiq();
                InitSettings {
                    quantizer: Box::new(preset.quantizer),
                    method: Box::new(preset.method),
                    fit: preset.fit,
                }
            }
        }
    }
}

/// The width of the embedded models in widths of this one, at most 1.
///
/// Default rates are those of the embedded models times a power of it, which is chosen so that the rate
/// at width 4096 is about the published one.
pub fn narrower(config: &Config) -> f64 {
    (128.0 / config.hidden_size() as f64).min(1.0)
}

/// An initialization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InitName {
    /// QLoRA: adapters that start at zero
    Qlora,
    /// LoftQ: alternates quantization and a decomposition of the residual
    Loftq,
    /// PiSSA: the largest singular values of the weight; quantizes the residual
    Pissa,
    /// LQ-LoRA: LoftQ weighted by the Fisher information
    LqLora,
    /// QERA: the least error of each layer's output, in closed form
    Qera,
    /// CLoQ: QERA after OPTQ; affine and symmetric grids only
    Cloq,
    /// ApiQ: learns ranges and adapters layer by layer; affine and symmetric grids only
    Apiq,
    /// ApiQ, block by block
    ApiqBlock,
    /// RILQ: tunes all adapters together to the last hidden state of the dense model
    Rilq,
}

impl InitName {
    /// The name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no method is hidden");
        value.get_name().into()
    }

    /// Its published name.
    pub fn title(self) -> &'static str {
        match self {
            Self::Qlora => "QLoRA",
            Self::Loftq => "LoftQ",
            Self::Pissa => "PiSSA",
            Self::LqLora => "LQ-LoRA",
            Self::Qera => "QERA",
            Self::Cloq => "CLoQ",
            Self::Apiq => "ApiQ-lw",
            Self::ApiqBlock => "ApiQ-bw",
            Self::Rilq => "RILQ",
        }
    }

    /// Returns the initialization of these adapters for a model.
    pub fn method(self, lora: Lora, config: &Config) -> Box<dyn InitMethod> {
        // Ranges learn twice as fast as published: there are few calibration windows. The published rate
        // of the factors is 5e-4.
        let (of_ranges, narrower) = (1e-2, narrower(config));
        let of_factors = 5e-3 * narrower.powf(2.0 / 3.0);
        match self {
            Self::Qlora => Box::new(lora),
            Self::Loftq => Box::new(Loftq::new(lora)),
            Self::Pissa => Box::new(Pissa::new(lora)),
            Self::LqLora => Box::new(lq_lora(lora)),
            Self::Qera | Self::Cloq => Box::new(Qera::new(lora)),
            Self::Apiq => Box::new(Apiq::new(lora).with_learning_rates(of_ranges, of_factors)),
            Self::ApiqBlock => {
                Box::new(ApiqBlock::new(lora).with_learning_rates(of_ranges, of_factors))
            }
            Self::Rilq => {
                // The published rate is 1e-4.
                let fit = FitConfig::new()
                    .with_learning_rate(3e-3 * narrower)
                    .with_steps(Some(40))
                    .with_seed(lora.seed());
                Box::new(Rilq::new(lora).with_fit(fit))
            }
        }
    }

    /// Returns the quantizer of its base, whose weights are saved in `format`.
    pub fn quantizer(
        self,
        grid: GridName,
        bits: usize,
        GroupSize(group_size): GroupSize,
        format: FormatName,
    ) -> Box<dyn Quantizer> {
        let symmetric = grid == GridName::Symmetric;
        let f16 = format.f16_scales();
        match (grid, self) {
            (GridName::Nf, _) => {
                let nf = NormalFloat::new().with_bits(bits);
                Box::new(nf.with_block_size(group_size))
            }
            (_, Self::Cloq) => {
                let optq = Optq::new().with_bits(bits).with_group_size(group_size);
                let optq = optq.with_order(Order::Natural);
                Box::new(optq.with_symmetric(symmetric).with_f16_scales(f16))
            }
            _ => {
                let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
                Box::new(rtn.with_symmetric(symmetric).with_f16_scales(f16))
            }
        }
    }

    /// Whether the method has this grid.
    pub fn fits(self, grid: GridName) -> bool {
        let uniform = matches!(self, Self::Cloq | Self::Apiq | Self::ApiqBlock);
        grid != GridName::Nf || !uniform
    }

    /// Whether the method looks at one block at a time.
    pub fn is_by_block(self) -> bool {
        !matches!(self, Self::LqLora | Self::Rilq)
    }

    /// Whether the method needs calibration data.
    pub fn is_calibrated(self) -> bool {
        !matches!(self, Self::Qlora | Self::Loftq | Self::Pissa)
    }
}

/// Block-AP at the rates for a model and a width: of scales and zero-points, and of weights.
///
/// A step moves a parameter by about its rate. Weights, and with them scales, are smaller in wider models, and
/// weights are summed over more inputs: at width 4096 the rates are the published ones, which are for more steps.
pub fn block_ap(bits: usize, config: &Config) -> BlockAp {
    let wider = (4096.0 / config.hidden_size() as f64).max(1.0);
    let of_weights = if bits == 2 { 2e-5 } else { 1e-5 };
    BlockAp::new().with_learning_rates(1e-4 * wider.sqrt(), of_weights * wider)
}

/// Chooses a quantizer for each layer by the errors of a method within a budget of bytes.
///
/// # Errors
/// As [`loftq::sensitivities`] and [`quant_core::allocate`].
pub fn allocated<M: CausalLm + Stages, L: LayerMethod>(
    model: &M,
    method: &L,
    quantizers: &[impl Fn() -> Box<dyn Quantizer>],
    calibration: &[Batch],
    budget: u64,
) -> Result<PerLayer> {
    let candidates: Vec<Box<dyn Quantizer>> = quantizers.iter().map(|make| make()).collect();
    let candidates: Vec<&dyn Quantizer> = candidates.iter().map(Box::as_ref).collect();
    let layers = loftq::sensitivities(model, method, &candidates, calibration)?;
    let costs: Vec<_> = layers.iter().map(|(_, costs)| costs.clone()).collect();
    let choice = allocate(&costs, budget)?.choice;
    let chosen = layers.into_iter().zip(choice);
    let chosen = chosen.map(|((path, _), choice)| (path, quantizers[choice]()));
    Ok(PerLayer(chosen.collect()))
}

/// LQ-LoRA, weighted by the Fisher information.
pub fn lq_lora(lora: Lora) -> LqLora {
    LqLora::new(lora).with_fisher(true)
}

/// The grid of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GridName {
    /// Uniform, with zero-points
    Affine,
    /// Uniform, without zero-points
    Symmetric,
    /// Normal floats (NF4, NF3, NF2)
    Nf,
}
