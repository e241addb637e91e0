//! The settings of the papers; those of other methods are in [`peft::presets`].
//!
//! ```
//! use loftq::presets;
//! use quant_core::Quantizer;
//!
//! let preset = presets::loftq();
//! assert_eq!(preset.quantizer.format()?.bits(), 4);
//! assert_eq!(preset.fit.learning_rate(), 3e-4);
//! # Ok::<(), quant_core::Error>(())
//! ```

use peft::presets::Preset;
use peft::{FitConfig, Lora, Schedule};
use quant_core::{NormalFloat, Rtn};

use crate::{ApiqBlock, Loftq};

/// LoftQ on LLaMA-2 (Li et al. 2023, arXiv:2310.08659, and its published code).
///
/// | setting | value | source |
/// |---|---|---|
/// | base | NF4, blocks of 64, scales as they are | code |
/// | `r`, `α` | 64, 16; the model starts at `Q + σ A B` all the same, which PEFT's does not | code |
/// | rounds | 5 | the example of its README |
/// | learning rate | 3e-4, cosine; 1e-4 at 13 B | paper, its code |
/// | weight decay | 0.1 | scripts |
///
/// WikiText-2 takes 2 epochs in batches of 32, GSM8K 6 in batches of 16; its warm-up of 3 % of the steps is
/// the user's to set.
pub fn loftq() -> Preset<NormalFloat, Loftq> {
    Preset {
        quantizer: NormalFloat::new().with_block_size(64),
        method: Loftq::new(Lora::new(64).with_alpha(16.0)).with_rounds(5),
        fit: decayed(3e-4),
    }
}

/// ApiQ-bw on LLaMA-2 (Liao et al. 2024, arXiv:2402.05147, and its published code).
///
/// | setting | value | source |
/// |---|---|---|
/// | base | 2 bits, asymmetric, groups of 64 | paper |
/// | `r`, `α` | 64, 16 | code |
/// | calibration | 20 passes over 128 windows of 2048 tokens of WikiText-2, one at a time | code |
/// | learning rates | 5e-3 of the ranges, 5e-4 of the factors, decay 0.1 | code |
/// | tuning | 3e-4, decay 0.1, batches of 64, 3 epochs (WikiText-2) | scripts |
/// | schedule of the tuning | cosine | ours |
pub fn apiq() -> Preset<Rtn, ApiqBlock> {
    Preset {
        quantizer: Rtn::new().with_bits(2).with_group_size(64),
        method: ApiqBlock::new(Lora::new(64).with_alpha(16.0)),
        fit: decayed(3e-4),
    }
}

fn decayed(learning_rate: f64) -> FitConfig {
    FitConfig::new()
        .with_learning_rate(learning_rate)
        .with_schedule(Schedule::Cosine)
        .with_weight_decay(0.1)
}
