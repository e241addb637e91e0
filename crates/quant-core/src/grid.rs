use std::fmt;

use serde::{Deserialize, Serialize};

/// The levels that the codes of a weight stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// `w = s (q - z)`, with a zero-point for each scale.
    Affine,
    /// `w = s (q - 2^(bits - 1))`, without zero-points.
    Symmetric,
    /// `w = s table[q]`: quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314),
    /// all with the offset of 4 bits, as in LoftQ and LQ-LoRA. 2, 3 or 4 bits.
    NormalFloat,
    /// [`Grid::NormalFloat`] with an offset for each width, closer to a normal distribution at 3 bits.
    NormalFloatByBits,
    /// `w = s table[q]`: floats of 1 sign, 2 exponent and 1 mantissa bits, in the order of
    /// bitsandbytes' codes. 4 bits.
    Float4,
}

impl Grid {
    /// Whether codes index a table, whose scales are the largest magnitudes of their groups.
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
