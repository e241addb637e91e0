use std::fmt;

use kernels::{Layout, Levels};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, codebook};

/// The numbers that codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// `w = s (q - z)`, with a zero for each scale.
    Affine,
    /// `w = s (q - 2^(bits - 1))`, without zeros.
    Symmetric,
    /// `w = s table[q]`, the quantiles of a normal distribution (Dettmers et al. 2023,
    /// arXiv:2305.14314) with the offset of 4 bits for every width, as LoftQ and LQ-LoRA have it. 2,
    /// 3 or 4 bits.
    NormalFloat,
    /// The same with an offset for each width: nearer to a normal distribution at 3 bits.
    NormalFloatByBits,
    /// `w = s table[q]`, floats of 1 sign, 2 exponent and 1 mantissa bits, in bitsandbytes' order of
    /// codes. 4 bits.
    Float4,
}

impl Grid {
    /// Whether codes are entries of a table, whose scales are the largest magnitudes of their groups.
    pub fn is_codebook(&self) -> bool {
        !matches!(self, Grid::Affine | Grid::Symmetric)
    }
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Grid::Affine => "affine",
            Grid::Symmetric => "symmetric",
            Grid::NormalFloat => "normal float",
            Grid::NormalFloatByBits => "normal float by bits",
            Grid::Float4 => "float",
        })
    }
}

/// What the codes of double-quantized scales stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleLevels {
    /// bitsandbytes' signed dynamic map of 8 bits, around the mean of the scales (Dettmers et al.
    /// 2023, arXiv:2305.14314, §3).
    Dynamic,
    /// `0 ..= 2^bits - 1` equal steps above the least scale, as LQ-LoRA has them (Guo et al. 2024,
    /// arXiv:2311.12023). A code takes a byte in memory.
    Unsigned {
        /// 2 to 8.
        bits: usize,
    },
}

/// Scales that are codes themselves: `s = level(code) · absmax + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DoubleQuant {
    /// What a code stands for.
    pub levels: ScaleLevels,
    /// Scales that share an `absmax`, taken output by output.
    pub block_size: usize,
}

impl DoubleQuant {
    /// That of bitsandbytes and QLoRA: the dynamic map in blocks of 256.
    pub const fn dynamic() -> Self {
        Self {
            levels: ScaleLevels::Dynamic,
            block_size: 256,
        }
    }
}

/// Bits, group size, grid and scales of a packed weight.
///
/// ```
/// use quant_core::{Format, Grid};
///
/// let format = Format::new(4, Some(128), Grid::Affine)?;
/// assert_eq!(format.to_string(), "4-bit affine, group 128");
/// assert!(Format::new(5, None, Grid::Affine).is_err());
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Fields")]
pub struct Format {
    bits: usize,
    group_size: Option<usize>,
    grid: Grid,
    #[serde(skip_serializing_if = "Option::is_none")]
    double_quant: Option<DoubleQuant>,
}

#[derive(Deserialize)]
struct Fields {
    bits: usize,
    group_size: Option<usize>,
    grid: Grid,
    #[serde(default)]
    double_quant: Option<DoubleQuant>,
}

impl TryFrom<Fields> for Format {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        let format = Self::new(fields.bits, fields.group_size, fields.grid)?;
        match fields.double_quant {
            Some(double_quant) => format.with_double_quant(double_quant),
            None => Ok(format),
        }
    }
}

impl Format {
    /// Codes of `bits` bits in groups of `group_size` inputs; with `None`, one group per channel
    /// (the `-1` of GPTQ's files).
    ///
    /// # Errors
    /// [`Error::Bits`] unless `bits` is 2, 3, 4 or 8; [`Error::GridBits`] if the grid has no such
    /// width; [`Error::EmptyGroup`] for a group of nothing.
    pub fn new(bits: usize, group_size: Option<usize>, grid: Grid) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(Error::Bits { bits });
        }
        let widest = if grid.is_codebook() { 4 } else { 8 };
        if bits > widest || (grid == Grid::Float4 && bits != 4) {
            return Err(Error::GridBits { bits, grid });
        }
        if group_size == Some(0) {
            return Err(Error::EmptyGroup);
        }
        Ok(Self {
            bits,
            group_size,
            grid,
            double_quant: None,
        })
    }

    /// The same with double-quantized scales.
    ///
    /// # Errors
    /// [`Error::DoubleQuant`] unless the grid is a codebook, whose scales are never negative, the
    /// block holds a scale, and the codes have 2 to 8 bits.
    pub fn with_double_quant(self, double_quant: DoubleQuant) -> Result<Self> {
        let bits = match double_quant.levels {
            ScaleLevels::Dynamic => 8,
            ScaleLevels::Unsigned { bits } => bits,
        };
        if !self.grid.is_codebook() || double_quant.block_size == 0 || !(2..=8).contains(&bits) {
            return Err(Error::DoubleQuant {
                format: self,
                double_quant,
            });
        }
        Ok(Self {
            double_quant: Some(double_quant),
            ..self
        })
    }

    /// The same with scales that are floats.
    pub fn without_double_quant(self) -> Self {
        Self {
            double_quant: None,
            ..self
        }
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Inputs that share a scale; all of them if `None`.
    pub fn group_size(&self) -> Option<usize> {
        self.group_size
    }

    /// The numbers that codes stand for.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// How the scales are quantized, if they are.
    pub fn double_quant(&self) -> Option<DoubleQuant> {
        self.double_quant
    }

    /// How a weight `[d_in, d_out]` lies in memory in this format.
    ///
    /// # Errors
    /// [`Error::GroupSize`] if a group is larger than `d_in`; [`Error::Size`] for an empty weight
    /// or one whose size overflows.
    pub fn layout(&self, [d_in, d_out]: [usize; 2]) -> Result<Layout> {
        let codes = d_in
            .checked_mul(d_out)
            .and_then(|n| n.checked_mul(self.bits));
        if d_in == 0 || d_out == 0 || codes.is_none() {
            return Err(Error::Size { d_in, d_out });
        }
        let group_size = self.group_size.unwrap_or(d_in);
        if group_size > d_in {
            return Err(Error::GroupSize { group_size, d_in });
        }
        let levels = match self.grid {
            Grid::Affine => Levels::Unsigned,
            Grid::Symmetric => Levels::Centered,
            Grid::NormalFloat => Levels::Table(codebook::normal_float(self.bits, false)),
            Grid::NormalFloatByBits => Levels::Table(codebook::normal_float(self.bits, true)),
            Grid::Float4 => Levels::Table(codebook::FLOAT4),
        };
        Ok(Layout::new(d_in, d_out, self.bits, group_size, levels))
    }

    /// Bytes of a weight `[d_in, d_out]`: the words, and the scales and zeros in `f32` or, where
    /// scales are double-quantized, a byte for each and an `f32` for each block; without padding.
    ///
    /// # Errors
    /// As [`Format::layout`].
    pub fn n_bytes(&self, dims: [usize; 2]) -> Result<u64> {
        let layout = self.layout(dims)?;
        let (d_out, n_groups) = (layout.d_out() as u64, layout.n_groups() as u64);
        let words = 4 * layout.word_rows() as u64 * d_out;
        let n_scales = n_groups * d_out;
        let scales = match self.double_quant {
            Some(double) => n_scales + 4 * n_scales.div_ceil(double.block_size as u64) + 4,
            None => 4 * n_scales,
        };
        let zeros = 4 * n_scales * u64::from(self.grid == Grid::Affine);
        Ok(words + scales + zeros)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}-bit {}", self.bits, self.grid)?;
        match self.group_size {
            Some(group_size) => write!(f, ", group {group_size}")?,
            None => write!(f, ", per channel")?,
        }
        match self.double_quant {
            Some(DoubleQuant {
                levels: ScaleLevels::Dynamic,
                block_size,
            }) => write!(f, ", 8-bit dynamic scales in blocks of {block_size}"),
            Some(DoubleQuant {
                levels: ScaleLevels::Unsigned { bits },
                block_size,
            }) => write!(f, ", {bits}-bit scales in blocks of {block_size}"),
            None => Ok(()),
        }
    }
}
