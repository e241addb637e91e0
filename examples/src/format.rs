//! The formats of saved models.

use clap::ValueEnum;
use models::{CheckpointFormat, GptqVersion};
use serde::{Deserialize, Serialize};

/// A format of the packed layers of a saved model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FormatName {
    /// Format of this workspace, which holds every model exactly
    QuantCore,
    /// GPTQ v1, for symmetric quantizers
    Gptq,
    /// GPTQ v2
    GptqV2,
    /// bitsandbytes, for NF4 and FP4
    Bitsandbytes,
    /// GGUF, for llama.cpp
    Gguf,
}

impl FormatName {
    /// The format.
    pub fn format(self) -> CheckpointFormat {
        match self {
            Self::QuantCore => CheckpointFormat::QuantCore,
            Self::Gptq => CheckpointFormat::Gptq(GptqVersion::V1),
            Self::GptqV2 => CheckpointFormat::Gptq(GptqVersion::V2),
            Self::Bitsandbytes => CheckpointFormat::Bitsandbytes,
            Self::Gguf => CheckpointFormat::Gguf,
        }
    }

    /// Whether quantizers must round scales to `f16` for it.
    pub fn f16_scales(self) -> bool {
        self.format().stored_grid().f16_scales()
    }

    /// Whether quantizers must make zero-points of minimums in `f16` for it.
    pub fn fractional_zeros(self) -> bool {
        self.format().stored_grid().f16_minimums()
    }
}
