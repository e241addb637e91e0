//! The quantizers that `quantize` knows, and what trains what they pack.

use std::path::Path;

use clap::ValueEnum;
use examples::arguments::GroupSize;
use examples::initialization::block_ap;
use examples::outcome::Result;
use examples::stream;
use examples::texts::evaluation_batch;
use loftq::{BlockAp, Initializer};
use models::{Config, Model, Plan, StreamStep, Streaming};
use peft::{Batch, InitializedLayer, LayerReport};
use quant_core::{DoubleQuant, GroupRange, NormalFloat, Optq, Order, Quantizer, Rtn};

use crate::Args;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// Round to nearest, over the range of each group
    Rtn,
    /// Round to nearest, over the range of least squared error
    Clip,
    /// Normal floats (NF4, NF3, NF2)
    Nf,
    /// FP4 of bitsandbytes
    Fp4,
    /// OPTQ (GPTQ) with static act-order: inputs in descending order, groups as they are
    Optq,
    /// OPTQ, inputs in their natural order
    OptqNatural,
    /// OPTQ, whole groups in descending order
    OptqGroups,
    /// OPTQ in natural order, over ranges of least squared error
    OptqClip,
    /// GPTAQ: OPTQ in natural order that corrects for the drift of the inputs
    Gptaq,
    /// Block-AP of EfficientQAT: trains the weights, scales and zero-points of each block through the rounding,
    /// from round to nearest
    BlockAp,
}

impl Name {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Name::Rtn => "RTN",
            Name::Clip => "RTN, clip search",
            Name::Nf => "NF",
            Name::Fp4 => "FP4",
            Name::Optq => "OPTQ, act-order static",
            Name::OptqNatural => "OPTQ, natural order",
            Name::OptqGroups => "OPTQ, act-order by group",
            Name::OptqClip => "OPTQ, natural order, clip search",
            Name::Gptaq => "GPTAQ, natural order",
            Name::BlockAp => "Block-AP",
        }
    }

    pub(crate) fn needs_calibration(self) -> bool {
        !matches!(self, Name::Rtn | Name::Clip | Name::Nf | Name::Fp4)
    }

    pub(crate) fn quantizer(
        self,
        bits: usize,
        GroupSize(group_size): GroupSize,
        args: &Args,
    ) -> Box<dyn Quantizer> {
        let (symmetric, double) = (args.symmetric, args.double_quant.then(DoubleQuant::dynamic));
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
        // GPTQ checkpoints hold scales in f16.
        let f16 = args.format.f16_scales();
        let fractions = args.fractional_zeros || args.format.fractional_zeros();
        let rtn = rtn.with_symmetric(symmetric).with_f16_scales(f16);
        let rtn = rtn.with_fractional_zeros(fractions);
        let nf = NormalFloat::new().with_bits(bits);
        let optq = Optq::new().with_bits(bits).with_group_size(group_size);
        let optq = optq.with_symmetric(symmetric).with_f16_scales(f16);
        let optq = optq.with_fractional_zeros(fractions);
        let natural = optq.with_order(Order::Natural);
        match self {
            Name::Rtn | Name::BlockAp => Box::new(rtn),
            Name::Clip => Box::new(rtn.with_range(GroupRange::Clipped)),
            Name::Nf => Box::new(nf.with_block_size(group_size).with_double_quant(double)),
            Name::Fp4 => {
                let fp4 = NormalFloat::float4().with_bits(bits);
                Box::new(fp4.with_block_size(group_size).with_double_quant(double))
            }
            Name::Optq => Box::new(optq.with_order(Order::Descending)),
            Name::OptqNatural => Box::new(natural),
            Name::OptqGroups => Box::new(optq.with_order(Order::DescendingByGroup)),
            Name::OptqClip => Box::new(natural.with_range(GroupRange::Clipped)),
            Name::Gptaq => Box::new(natural.with_drift(0.25)),
        }
    }

    /// The way to quantize a model of this configuration.
    pub(crate) fn method(
        self,
        bits: usize,
        group_size: GroupSize,
        args: &Args,
        config: &Config,
    ) -> Method {
        let training = (self == Name::BlockAp).then(|| {
            let block_ap = block_ap(bits, config);
            let block_ap = match args.lr[..] {
                [of_grids, of_weights] => block_ap.with_learning_rates(of_grids, of_weights),
                _ => block_ap,
            };
            let block_ap = match args.rounds {
                Some(rounds) => block_ap.with_rounds(rounds),
                None => block_ap,
            };
            block_ap.with_f16_scales(args.format.f16_scales())
        });
        Method {
            quantizer: self.quantizer(bits, group_size, args),
            training,
        }
    }
}

/// A quantizer, and what trains the blocks that it packs.
pub(crate) struct Method {
    pub(crate) quantizer: Box<dyn Quantizer>,
    training: Option<BlockAp>,
}

impl Method {
    /// The windows of a batch of the calibration: each is a step of a training.
    pub(crate) fn batch(&self, seq_len: usize) -> usize {
        match self.training {
            Some(_) => 2,
            None => evaluation_batch(seq_len),
        }
    }

    /// Quantizes a model in memory. `on_layer` is called with the path and a line about each layer.
    pub(crate) fn quantize(
        &self,
        model: &mut Model,
        calibration: &[Batch],
        mut on_layer: impl FnMut(&str, String),
    ) -> Result<()> {
        match &self.training {
            Some(training) => {
                let on_layer = |layer: &InitializedLayer| {
                    on_layer(&layer.report.path, stream::initialized(layer));
                };
                loftq::init(model, training, &self.quantizer, calibration, on_layer)?;
            }
            None => {
                let on_layer =
                    |layer: &LayerReport| on_layer(&layer.path, stream::quantized(layer));
                models::quantize(model, &self.quantizer, calibration, on_layer)?;
            }
        }
        Ok(())
    }

    /// Quantizes from files to files.
    pub(crate) fn quantize_to(
        &self,
        source: &Path,
        out: &Path,
        calibration: &[Batch],
        settings: &Streaming,
        on_step: &mut dyn FnMut(StreamStep),
    ) -> models::Result<()> {
        match &self.training {
            Some(training) => {
                let method = Initializer::new(training, &self.quantizer);
                models::initialize_to(source, out, &method, calibration, settings, on_step)?;
            }
            None => {
                models::quantize_to(source, out, &self.quantizer, calibration, settings, on_step)?;
            }
        }
        Ok(())
    }

    /// The memory that quantizing from files to files takes; not known of a training.
    pub(crate) fn memory(&self, plan: &Plan, n_tokens: usize, batch_tokens: usize) -> Option<u64> {
        let needs = self.quantizer.needs();
        let is_known = self.training.is_none();
        is_known.then(|| plan.memory(needs, None, n_tokens, batch_tokens))
    }
}
