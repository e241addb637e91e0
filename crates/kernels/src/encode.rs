//! From weights to codes, in host memory. (Products with codes are in `quant_matmul`.)

use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

use crate::isa::{Isa, by_instruction_set};
use crate::layout::{Layout, TILE};
use crate::memory::zeroed;
use crate::pack::{TASK_TILES, Writer};

mod clip;
mod feedback;
mod grid;

pub use clip::{ClipLoss, clip_search};
pub use feedback::{Feedback, Influence, round_with_feedback};
use grid::{Grid, read};
pub use grid::{ZeroPoint, grid_of_range};

/// The number of columns in a task of [`group_ranges`].
const RANGE_COLUMNS: usize = 512;

/// Calls `f` with the values of a tensor, row by row in `f32`.
///
/// On the CPU, the values of a contiguous `f32` tensor are not copied.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
///
/// let tensor = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0]], &Device::flex());
/// let largest = kernels::with_values(tensor, |values| values.iter().copied().fold(0.0, f32::max));
/// assert_eq!(largest, 4.0);
/// ```
pub fn with_values<const D: usize, R>(tensor: Tensor<D>, f: impl FnOnce(&[f32]) -> R) -> R {
    #[cfg(feature = "flex")]
    if let Ok(tensor) = tensor.clone().try_into_primitive::<burn::backend::Flex>()
        && tensor.dtype() == DType::F32
    {
        let tensor = tensor.to_contiguous();
        return f(tensor.as_slice().expect("contiguous and f32"));
    }
    let values = tensor.into_data().convert_dtype(DType::F32);
    f(values.as_slice().expect("converted to f32"))
}

/// The smallest and the largest weight of each group and output.
///
/// Both are NaN where a weight is not finite.
///
/// # Shapes
/// - `weight`: `[d_in, d_out]`, row by row
/// - results: [`Layout::grid_shape`]
///
/// # Panics
/// If the length of `weight` is not `d_in * d_out`.
///
/// # Examples
/// ```
/// use kernels::{Layout, Levels, group_ranges};
///
/// let layout = Layout::new(4, 1, 4, 2, Levels::Unsigned);
/// let (low, high) = group_ranges(&[1.0, -2.0, 0.5, 3.0], &layout);
/// assert_eq!((low, high), (vec![-2.0, 0.5], vec![1.0, 3.0]));
/// ```
pub fn group_ranges(weight: &[f32], layout: &Layout) -> (Vec<f32>, Vec<f32>) {
    let (d_in, d_out) = (layout.d_in(), layout.d_out());
    assert_eq!(weight.len(), d_in * d_out, "the number of weights");
    let n = layout.n_groups() * d_out;
    let (mut low, mut high) = (vec![0.0; n], vec![0.0; n]);
    let groups = low
        .par_chunks_exact_mut(d_out)
        .zip(high.par_chunks_exact_mut(d_out))
        .zip(weight.par_chunks(layout.group_size().saturating_mul(d_out)));
    groups.for_each(|((low, high), rows)| {
        let columns = low
            .par_chunks_mut(RANGE_COLUMNS)
            .zip(high.par_chunks_mut(RANGE_COLUMNS));
        columns
            .enumerate()
            .for_each(|(k, (low, high))| ranges(rows, d_out, k * RANGE_COLUMNS, low, high));
    });
    (low, high)
}

by_instruction_set! {
    /// Writes the ranges of the columns from `first` on, over rows of `d_out` weights.
    fn ranges(
        rows: &[f32],
        d_out: usize,
        first: usize,
        low: &mut [f32],
        high: &mut [f32],
    ) = ranges_body
}

#[inline(always)]
fn ranges_body<I: Isa>(
    rows: &[f32],
    d_out: usize,
    first: usize,
    low: &mut [f32],
    high: &mut [f32],
) {
    let mut not_finite = [0.0f32; RANGE_COLUMNS];
    low.fill(f32::INFINITY);
    high.fill(f32::NEG_INFINITY);
    let not_finite = &mut not_finite[..low.len()];
    for row in rows.chunks_exact(d_out) {
        let lanes = row[first..][..low.len()].iter();
        let lanes = lanes.zip(low.iter_mut()).zip(high.iter_mut());
        for (((&w, low), high), not_finite) in lanes.zip(not_finite.iter_mut()) {
            *low = low.min(w);
            *high = high.max(w);
            // 0 for finite weights, and NaN for others.
            *not_finite += w * 0.0;
        }
    }
    for ((low, high), not_finite) in low.iter_mut().zip(high).zip(not_finite) {
        *low += *not_finite;
        *high += *not_finite;
    }
}

/// Packs the codes whose weights are nearest to `weight` on the grid of each group.
///
/// With uniform levels, the code is `round(weight / scale + f) + floor(zero)`, with the fraction `f` of the
/// zero, clamped to the bits, with halves rounded to even. With a table, it is the code of the entry nearest to `weight / scale`, the lower one
/// of two at the same distance.
///
/// # Shapes
/// - `weight`: `[d_in, d_out]`, row by row
/// - `scales`, `zeros`: [`Layout::grid_shape`]
/// - result: [`Layout::words_shape`]
///
/// # Panics
/// If a length is not the layout's, or there are zeros and the levels are a table.
///
/// # Examples
/// ```
/// use kernels::{Layout, Levels, encode, unpack};
///
/// let layout = Layout::new(4, 1, 2, 4, Levels::Unsigned);
/// let words = encode(&[-0.5, 0.0, 0.4, 9.0], &[0.5], Some(&[1.0]), &layout);
/// assert_eq!(unpack(&words, &layout), [0, 1, 2, 3]);
/// ```
pub fn encode(weight: &[f32], scales: &[f32], zeros: Option<&[f32]>, layout: &Layout) -> Vec<u32> {
    let [d_in, d_out] = [layout.d_in(), layout.d_out()];
    assert_eq!(weight.len(), d_in * d_out, "the number of weights");
    let grid = Grid::new(scales, zeros, layout);
    let [n_tiles, word_rows, _] = layout.words_shape();
    let mut words = zeroed(n_tiles * word_rows * TILE);
    let tasks = words
        .par_chunks_mut(TASK_TILES * word_rows * TILE)
        .enumerate();
    tasks.for_each(|(task, words)| encode_tiles(weight, &grid, task * TASK_TILES, words));
    words
}

by_instruction_set! {
    /// Writes the words of the tiles from `first` on.
    fn encode_tiles(
        weight: &[f32],
        grid: &Grid,
        first: usize,
        words: &mut [u32],
    ) = encode_tiles_body
}

#[inline(always)]
fn encode_tiles_body<I: Isa>(weight: &[f32], grid: &Grid, first: usize, words: &mut [u32]) {
    let layout = grid.layout;
    let mut writers = Writer::each(words, &layout);
    let group = layout.group_size().saturating_mul(layout.d_out());
    for (g, rows) in weight.chunks(group).enumerate() {
        let lanes = (first..first + writers.len()).map(|tile| {
            let columns = layout.columns(tile);
            (grid.lanes(g, &columns), columns)
        });
        let lanes: Vec<_> = lanes.collect();
        for row in rows.chunks_exact(layout.d_out()) {
            for (writer, (lanes, columns)) in writers.iter_mut().zip(&lanes) {
                let mut codes = lanes.nearest::<I>(&grid.levels, &read(row, columns));
                // The columns that pad a tile are zero, whichever code is nearest to 0.
                if columns.len() < TILE {
                    codes[columns.len()..].fill(0);
                }
                writer.push(&codes);
            }
        }
    }
}
