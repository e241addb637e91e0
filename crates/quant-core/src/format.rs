use std::fmt;

use kernels::{Layout, Levels};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The numbers that codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// `w = s (q - z)`, with a zero for each scale.
    Affine,
    /// `w = s (q - 2^(bits - 1))`, without zeros.
    Symmetric,
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Grid::Affine => "affine",
            Grid::Symmetric => "symmetric",
        })
    }
}

/// Bits, group size and grid of a packed weight.
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
}

#[derive(Deserialize)]
struct Fields {
    bits: usize,
    group_size: Option<usize>,
    grid: Grid,
}

impl TryFrom<Fields> for Format {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        Self::new(fields.bits, fields.group_size, fields.grid)
    }
}

impl Format {
    /// Codes of `bits` bits in groups of `group_size` inputs; with `None`, one group per channel
    /// (the `-1` of GPTQ's files).
    ///
    /// # Errors
    /// [`Error::Bits`] unless `bits` is 2, 3, 4 or 8; [`Error::EmptyGroup`] for a group of nothing.
    pub fn new(bits: usize, group_size: Option<usize>, grid: Grid) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(Error::Bits { bits });
        }
        if group_size == Some(0) {
            return Err(Error::EmptyGroup);
        }
        Ok(Self {
            bits,
            group_size,
            grid,
        })
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
        };
        Ok(Layout::new(d_in, d_out, self.bits, group_size, levels))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}-bit {}", self.bits, self.grid)?;
        match self.group_size {
            Some(group_size) => write!(f, ", group {group_size}"),
            None => write!(f, ", per channel"),
        }
    }
}
