//! The grids of groups: the code nearest to a weight, and the weight of a code.

use std::ops::Range;

use crate::isa::Isa;
use crate::layout::{Layout, Levels, TABLE, TILE};

/// The scale and the zero that map `low` to code 0 and `high` to `max_code`.
///
/// The zero is a whole number in `0 ..= max_code`. `low <= 0 <= high`, and not both are 0. The formula is
/// that of `Quantizer` in the reference code of OPTQ (Frantar et al. 2023, arXiv:2210.17323).
///
/// # Examples
/// ```
/// assert_eq!(kernels::grid_of_range(-1.0, 2.0, 15.0), (0.2, 5.0));
/// ```
#[inline(always)]
pub fn grid_of_range(low: f32, high: f32, max_code: f32) -> (f32, f32) {
    let scale = (high - low) / max_code;
    let zero = (-low / scale).round_ties_even();
    (scale, zero.max(0.0).min(max_code))
}

/// The zero-points of grids that are made of ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroPoint {
    /// Whole numbers of codes, [`grid_of_range`].
    #[default]
    Whole,
    /// Fractions of codes: both ends of a range are levels.
    Fractional,
}

impl ZeroPoint {
    /// The scale and the zero of a range from `low` to `high`, which includes 0 if zeros are whole.
    ///
    /// A range of one value has it as the level of code 0.
    ///
    /// # Examples
    /// ```
    /// use kernels::ZeroPoint;
    ///
    /// assert_eq!(ZeroPoint::Fractional.grid(-0.25, 7.25, 15.0), (0.5, 0.5));
    /// assert_eq!(ZeroPoint::Fractional.grid(-3.0, -3.0, 15.0), (3.0, 1.0));
    /// ```
    #[inline(always)]
    pub fn grid(self, low: f32, high: f32, max_code: f32) -> (f32, f32) {
        match self {
            Self::Whole => grid_of_range(low, high, max_code),
            Self::Fractional => {
                let scale = (high - low) / max_code;
                if scale > 0.0 {
                    // Without a zero of -0.
                    (scale, -low / scale + 0.0)
                } else if low == 0.0 {
                    (1.0, 0.0)
                } else {
                    (low.abs(), -low.signum())
                }
            }
        }
    }
}

/// The scales and zeros of a weight, and the search for the nearest code.
pub(super) struct Grid<'a> {
    scales: &'a [f32],
    zeros: Option<&'a [f32]>,
    pub(super) layout: Layout,
    pub(super) levels: Nearest,
}

/// The search for the nearest code.
pub(super) enum Nearest {
    /// Rounding, clamped to `0 ..= max_code`; `center` is that of the levels.
    Uniform { center: f32, max_code: f32 },
    /// The number of `midpoints` between sorted levels that lie below a value.
    ///
    /// `order` has the codes from the lowest level to the highest, as floats.
    Table {
        table: [f32; TABLE],
        midpoints: [f32; TABLE - 1],
        order: [f32; TABLE],
    },
}

impl<'a> Grid<'a> {
    pub(super) fn new(scales: &'a [f32], zeros: Option<&'a [f32]>, layout: &Layout) -> Self {
        let n = layout.n_groups() * layout.d_out();
        assert_eq!(scales.len(), n, "the number of scales");
        if let Some(zeros) = zeros {
            assert_eq!(zeros.len(), n, "the number of zeros");
        }
        let levels = match layout.levels() {
            Levels::Table(table) => {
                assert!(zeros.is_none(), "a table has no zeros");
                let mut order: Vec<usize> = (0..1 << layout.bits()).collect();
                order.sort_by(|&a, &b| table[a].total_cmp(&table[b]));
                let mut midpoints = [f32::INFINITY; TABLE - 1];
                for (midpoint, pair) in midpoints.iter_mut().zip(order.windows(2)) {
                    *midpoint = (table[pair[0]] + table[pair[1]]) / 2.0;
                }
                let order = std::array::from_fn(|k| order.get(k).map_or(0.0, |&k| k as f32));
                Nearest::Table {
                    table,
                    midpoints,
                    order,
                }
            }
            Levels::Unsigned | Levels::Centered => Nearest::Uniform {
                center: layout.center(),
                max_code: layout.mask() as f32,
            },
        };
        Self {
            scales,
            zeros,
            layout: *layout,
            levels,
        }
    }

    /// The grids of a group in the columns of a tile.
    #[inline(always)]
    pub(super) fn lanes(&self, group: usize, columns: &Range<usize>) -> Lanes {
        let row = group * self.layout.d_out()..(group + 1) * self.layout.d_out();
        let scales = read(&self.scales[row.clone()], columns);
        Lanes {
            scales,
            zeros: self
                .zeros
                .map_or([0.0; TILE], |zeros| read(&zeros[row], columns)),
        }
    }
}

/// The grids of a group in the columns of a tile.
pub(super) struct Lanes {
    pub(super) scales: [f32; TILE],
    pub(super) zeros: [f32; TILE],
}

impl Lanes {
    /// The codes nearest to weights.
    #[inline(always)]
    pub(super) fn nearest<I: Isa>(&self, levels: &Nearest, weights: &[f32; TILE]) -> [u32; TILE] {
        let mut codes = [0; TILE];
        match levels {
            Nearest::Uniform { center, max_code } => {
                for j in 0..TILE {
                    let zero = self.zeros[j] + center;
                    // A whole zero is added after the rounding, which decides ties as OPTQ's code does.
                    let whole = zero.floor();
                    let level = weights[j] / self.scales[j] + (zero - whole);
                    let code = level.round_ties_even() + whole;
                    codes[j] = small(code.max(0.0).min(*max_code));
                }
            }
            Nearest::Table {
                midpoints, order, ..
            } => {
                for j in 0..TILE {
                    // As in bitsandbytes, a product with the reciprocal.
                    let value = weights[j] * (1.0 / self.scales[j].max(1e-38));
                    let below = midpoints.iter().map(|&m| u32::from(value > m));
                    codes[j] = below.sum();
                }
                // SAFETY: `I` is the instruction set that this function is compiled for.
                codes = unsafe { I::lookup(order, &codes) }.map(small);
            }
        }
        codes
    }

    /// The weights of codes.
    #[inline(always)]
    pub(super) fn weights<I: Isa>(&self, levels: &Nearest, codes: &[u32; TILE]) -> [f32; TILE] {
        let levels = match levels {
            Nearest::Uniform { center, .. } => codes.map(|code| code as i32 as f32 - center),
            // SAFETY: `I` is the instruction set that this function is compiled for.
            Nearest::Table { table, .. } => unsafe { I::lookup(table, codes) },
        };
        std::array::from_fn(|j| (levels[j] - self.zeros[j]) * self.scales[j])
    }
}

/// The integer of a float in `0 ..= 255`.
#[inline(always)]
fn small(value: f32) -> u32 {
    // SAFETY: the callers pass numbers from 0 to 255.
    unsafe { value.to_int_unchecked::<i32>() as u32 }
}

/// The values of a row in the columns of a tile, padded with zeros.
#[inline(always)]
pub(super) fn read(row: &[f32], columns: &Range<usize>) -> [f32; TILE] {
    let row = &row[columns.clone()];
    match <&[f32; TILE]>::try_from(row) {
        Ok(row) => *row,
        Err(_) => {
            let mut padded = [0.0; TILE];
            padded[..row.len()].copy_from_slice(row);
            padded
        }
    }
}
