use std::fmt;

use quant_core::StoredGrid;

/// The format of the packed layers of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// The format of this workspace, which holds every packed layer exactly.
    QuantCore,
    /// GPTQ: uniform grids with integer zero-points and scales in `f16` (Frantar et al. 2023,
    /// arXiv:2210.17323).
    Gptq(GptqVersion),
    /// bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314).
    Bitsandbytes,
    /// GGUF, the format of llama.cpp: uniform grids in blocks of 32 inputs, scales and minimums in `f16`.
    Gguf,
}

/// The representation of the zero-points of a GPTQ checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GptqVersion {
    /// Zero-points are stored minus one, as by AutoGPTQ (`"checkpoint_format": "gptq"`), which cannot
    /// represent 0. Written for symmetric layers alone: GPTQModel loads others only if it wrote them.
    V1,
    /// Zero-points are stored unchanged (`"checkpoint_format": "gptq_v2"`).
    V2,
}

impl CheckpointFormat {
    /// The scales and zeros that a checkpoint of this format holds, for
    /// [`peft::MergeConfig::with_stored_grid`].
    ///
    /// That groups share a scale, as those of a bitsandbytes block that straddles rows do, is no part of it:
    /// see [`check_format`](crate::check_format()).
    pub fn stored_grid(self) -> StoredGrid {
        let least = match self {
            CheckpointFormat::QuantCore | CheckpointFormat::Bitsandbytes => {
                return StoredGrid::new();
            }
            CheckpointFormat::Gguf => {
                let f16 = StoredGrid::new().with_f16_scales(true);
                return f16.with_f16_minimums(true);
            }
            CheckpointFormat::Gptq(GptqVersion::V1) => 1,
            CheckpointFormat::Gptq(GptqVersion::V2) => 0,
        };
        let f16 = StoredGrid::new().with_f16_scales(true);
        f16.with_whole_zeros_from(least)
    }
}

impl fmt::Display for CheckpointFormat {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            CheckpointFormat::QuantCore => "quant-core",
            CheckpointFormat::Gptq(GptqVersion::V1) => "GPTQ v1",
            CheckpointFormat::Gptq(GptqVersion::V2) => "GPTQ v2",
            CheckpointFormat::Bitsandbytes => "bitsandbytes",
            CheckpointFormat::Gguf => "GGUF",
        })
    }
}
