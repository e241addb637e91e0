use std::fmt;

use kernels::{Layout, Levels};
use serde::{Deserialize, Serialize};

use crate::{DoubleQuant, Error, Grid, Result, codebook};

/// The bits, group size, grid and kind of scales of a packed weight.
///
/// # Examples
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
    /// width; [`Error::EmptyGroup`] for a group size of 0.
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

    /// This format with double-quantized scales.
    ///
    /// # Errors
    /// [`Error::DoubleQuant`] if the grid is no codebook (other scales may be negative), the block
    /// is empty, or the codes have other than 2 to 8 bits.
    pub fn with_double_quant(self, double_quant: DoubleQuant) -> Result<Self> {
        let has_codes = (2..=8).contains(&double_quant.levels.bits());
        if !self.grid.is_codebook() || double_quant.block_size == 0 || !has_codes {
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

    /// This format with scales that are floats.
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

    /// The number of inputs that share a scale; all of them if `None`.
    pub fn group_size(&self) -> Option<usize> {
        self.group_size
    }

    /// The levels that codes stand for.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The format of the scales, if they are quantized.
    pub fn double_quant(&self) -> Option<DoubleQuant> {
        self.double_quant
    }

    /// The memory layout of a weight `[d_in, d_out]` in this format.
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

    /// Checks that there are zeros if and only if the grid is affine.
    pub(crate) fn check_zeros(&self, found: bool) -> Result<()> {
        let grid = self.grid;
        if found == (grid == Grid::Affine) {
            Ok(())
        } else {
            Err(Error::Zeros { grid, found })
        }
    }

    /// The bytes of a weight `[d_in, d_out]`, without padding.
    ///
    /// Counts the words, and scales and zeros in `f32`; double-quantized scales take a byte each, an
    /// `f32` for each block and one for the offset.
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
            Some(double_quant) => write!(f, ", {double_quant}"),
            None => Ok(()),
        }
    }
}
