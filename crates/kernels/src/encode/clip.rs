//! The search for the clipped range whose grid has the least loss.

use rayon::prelude::*;

use super::grid::{Grid, Lanes, Nearest, ZeroPoint, read};
use crate::isa::{Isa, by_instruction_set};
use crate::layout::{Layout, TILE};

/// The loss that [`clip_search`] minimizes.
#[derive(Clone, Copy, Debug)]
pub enum ClipLoss<'a> {
    /// `|error|^2.4`, as in the reference code of OPTQ, whose option for it is named `mse`.
    Power,
    /// `error²` times a factor for each input, `[d_in]`.
    Inputs(&'a [f32]),
}

/// The number of steps of the search; in each, `1 - step / CLIP_GRID` of the range is kept.
const CLIP_STEPS: usize = 80;
const CLIP_GRID: usize = 100;

/// The scales and zeros of the clipped ranges with the least loss, from 100 % down to 21 % of the range.
///
/// A range is clipped toward 0, or toward its end nearest to 0 if it does not include 0.
///
/// The grid, the exponent and the strict comparison are those of the reference code of OPTQ (Frantar et
/// al. 2023, arXiv:2210.17323). The zeros of a centered layout are 0.
///
/// # Shapes
/// - `weight`: `[d_in, d_out]`, row by row
/// - `low`, `high`: [`Layout::grid_shape`], with `low <= 0 <= high` and not both 0 if zeros are whole
/// - results: [`Layout::grid_shape`]
///
/// # Panics
/// If a length is not the layout's, or its levels are a table.
///
/// # Examples
/// ```
/// use kernels::{ClipLoss, Layout, Levels, ZeroPoint, clip_search};
///
/// // At 2 bits, clipping the one large weight loses less than coarse steps for all others.
/// let mut weight = vec![0.1; 64];
/// weight[0] = 0.4;
/// let layout = Layout::new(64, 1, 2, 64, Levels::Unsigned);
/// let (low, high) = (&[0.0], &[0.4]);
/// let (scales, _) =
///     clip_search(&weight, low, high, ClipLoss::Power, ZeroPoint::Whole, &layout);
/// assert!(scales[0] < 0.4 / 3.0);
/// ```
pub fn clip_search(
    weight: &[f32],
    low: &[f32],
    high: &[f32],
    loss: ClipLoss,
    zero_point: ZeroPoint,
    layout: &Layout,
) -> (Vec<f32>, Vec<f32>) {
    let (d_in, d_out) = (layout.d_in(), layout.d_out());
    assert_eq!(weight.len(), d_in * d_out, "the number of weights");
    let grid = Grid::new(low, Some(high), layout);
    if let ClipLoss::Inputs(weights) = loss {
        assert_eq!(weights.len(), d_in, "the number of factors of inputs");
    }
    let group = layout.group_size().saturating_mul(d_out);
    let tasks = (0..layout.n_groups() * layout.n_tiles()).into_par_iter();
    let found: Vec<Lanes> = tasks
        .map(|task| {
            let (g, tile) = (task / layout.n_tiles(), task % layout.n_tiles());
            let rows = &weight[g * group..weight.len().min((g + 1).saturating_mul(group))];
            let mut best = Lanes {
                scales: [0.0; TILE],
                zeros: [0.0; TILE],
            };
            search_tile(rows, &grid, g, tile, (loss, zero_point), &mut best);
            best
        })
        .collect();

    let n = layout.n_groups() * d_out;
    let (mut scales, mut zeros) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for (task, lanes) in found.iter().enumerate() {
        let width = layout.columns(task % layout.n_tiles()).len();
        scales.extend_from_slice(&lanes.scales[..width]);
        zeros.extend_from_slice(&lanes.zeros[..width]);
    }
    (scales, zeros)
}

by_instruction_set! {
    /// Writes the best grid of a group in a tile; `ranges` has the lows as scales, the highs as zeros.
    fn search_tile(
        rows: &[f32],
        ranges: &Grid,
        group: usize,
        tile: usize,
        settings: (ClipLoss, ZeroPoint),
        best: &mut Lanes,
    ) = search_tile_body
}

#[inline(always)]
fn search_tile_body<I: Isa>(
    rows: &[f32],
    ranges: &Grid,
    group: usize,
    tile: usize,
    (loss, zero_point): (ClipLoss, ZeroPoint),
    best: &mut Lanes,
) {
    let layout = ranges.layout;
    let Nearest::Uniform { center, max_code } = ranges.levels else {
        panic!("a table has no range to search");
    };
    let columns = layout.columns(tile);
    let values: Vec<[f32; TILE]> = rows
        .chunks_exact(layout.d_out())
        .map(|row| read(row, &columns))
        .collect();
    let Lanes {
        scales: low,
        zeros: high,
    } = ranges.lanes(group, &columns);
    let mut least = [f32::INFINITY; TILE];
    for step in 0..CLIP_STEPS {
        let keep = (1.0 - step as f64 / CLIP_GRID as f64) as f32;
        let mut lanes = Lanes {
            scales: [0.0; TILE],
            zeros: [0.0; TILE],
        };
        for j in 0..TILE {
            let inner = 0f32.max(low[j]).min(high[j]);
            let [low, high] = [low[j], high[j]].map(|end| inner + keep * (end - inner));
            let (scale, zero) = zero_point.grid(low, high, max_code);
            lanes.scales[j] = scale;
            lanes.zeros[j] = if center == 0.0 { zero } else { 0.0 };
        }
        let mut sums = [0.0f32; TILE];
        for (i, weights) in values.iter().enumerate() {
            let codes = lanes.nearest::<I>(&ranges.levels, weights);
            let rounded = lanes.weights::<I>(&ranges.levels, &codes);
            match loss {
                ClipLoss::Power => {
                    for j in 0..TILE {
                        sums[j] += power((rounded[j] - weights[j]).abs());
                    }
                }
                ClipLoss::Inputs(of_input) => {
                    let of_input = of_input[group * layout.group_size() + i];
                    for j in 0..TILE {
                        let error = rounded[j] - weights[j];
                        sums[j] += of_input * (error * error);
                    }
                }
            }
        }
        for j in 0..TILE {
            // The full range is kept where every loss overflows.
            if step == 0 || sums[j] < least[j] {
                least[j] = sums[j];
                best.scales[j] = lanes.scales[j];
                best.zeros[j] = lanes.zeros[j];
            }
        }
    }
}

/// `x^2.4` for `x >= 0`, within a few ulp: `x² (x^(1/5))²`, with the root by Newton's method.
#[inline(always)]
fn power(x: f32) -> f32 {
    // A fifth of the exponent gives the root within a few percent.
    // SAFETY: a fifth of the bits of a float that is not negative is in the range of `i32`.
    let fifth = unsafe { (x.to_bits() as i32 as f32 * 0.2).to_int_unchecked::<i32>() };
    let mut root = f32::from_bits((fifth + 0x32CC_CCCD) as u32);
    for _ in 0..3 {
        let square = root * root;
        root = 0.8 * root + 0.2 * (x / (square * square));
    }
    (x * root) * (x * root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_is_that_of_the_standard_library() {
        for x in [1e-12, 3e-7, 1e-3, 0.02, 0.7, 1.0, 3.1, 1e4] {
            let expected = f64::from(x).powf(2.4);
            let found = f64::from(power(x));
            assert!((found / expected - 1.0).abs() < 1e-6, "{x}: {found}");
        }
        assert_eq!(power(0.0), 0.0);
    }
}
