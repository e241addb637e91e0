//! From weights to codes, on the host: ranges of groups, the nearest codes of a grid, the search for
//! a clipped range, and rounding with error feedback. (Products with codes are in `quant_matmul`.)

use std::ops::Range;

use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

use crate::isa::{Isa, by_instruction_set};
use crate::layout::{TABLE, TASK_TILES, Writer};
use crate::memory::zeroed;
use crate::{Layout, Levels, TILE};

/// Columns in a task of [`group_ranges`].
const RANGE_COLUMNS: usize = 512;

/// Calls `f` with the values of a tensor, row by row in `f32`; on the CPU without a copy of them.
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

/// The scale and the whole zero that map `low` to code 0 and `high` to `max_code`; `low <= 0 <= high`,
/// not both zero.
///
/// Frantar et al. 2023, arXiv:2210.17323: their code's `Quantizer`.
#[inline(always)]
pub fn grid_of_range(low: f32, high: f32, max_code: f32) -> (f32, f32) {
    let scale = (high - low) / max_code;
    let zero = (-low / scale).round_ties_even();
    (scale, zero.max(0.0).min(max_code))
}

/// The smallest and the largest weight of each group and output, [`Layout::grid_shape`] each; both
/// are NaN where a weight is not finite.
///
/// # Shapes
/// - `weight`: `[d_in, d_out]`, row by row
///
/// # Panics
/// If `weight` has another length.
pub fn group_ranges(weight: &[f32], layout: &Layout) -> (Vec<f32>, Vec<f32>) {
    let (d_in, d_out) = (layout.d_in(), layout.d_out());
    assert_eq!(weight.len(), d_in * d_out, "one weight for each code");
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
    /// The ranges of the columns from `first` on, over rows of `d_out`.
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
            // Zero, but NaN for NaN and infinities.
            *not_finite += w * 0.0;
        }
    }
    for ((low, high), not_finite) in low.iter_mut().zip(high).zip(not_finite) {
        *low += *not_finite;
        *high += *not_finite;
    }
}

/// The words of the codes whose weights are nearest to `weight` on a grid.
///
/// On uniform levels the code is `round(weight / scale) + zero` within the bits, halves rounded to
/// even; on a table the nearest entry to `weight / scale`, the lower one of two.
///
/// # Shapes
/// - `weight`: `[d_in, d_out]`, row by row
/// - `scales`, `zeros`: [`Layout::grid_shape`]; zeros are whole, and none on a table
/// - result: [`Layout::words_shape`]
///
/// # Panics
/// If a length is not the layout's.
pub fn encode(weight: &[f32], scales: &[f32], zeros: Option<&[f32]>, layout: &Layout) -> Vec<u32> {
    let [d_in, d_out] = [layout.d_in(), layout.d_out()];
    assert_eq!(weight.len(), d_in * d_out, "one weight for each code");
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
    /// The words of the tiles from `first` on.
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
                // The columns that pad a tile hold zeros, whatever level is nearest to nothing.
                if columns.len() < TILE {
                    codes[columns.len()..].fill(0);
                }
                writer.push(&codes);
            }
        }
    }
}

/// Scales and zeros with what it takes to find the nearest code.
struct Grid<'a> {
    scales: &'a [f32],
    zeros: Option<&'a [f32]>,
    layout: Layout,
    levels: Nearest,
}

/// How the nearest code is found.
enum Nearest {
    /// By rounding, within `0 ..= max_code`; `center` is that of the levels.
    Uniform { center: f32, max_code: f32 },
    /// By the number of `midpoints` between levels that lie below; `order` has the codes from the
    /// lowest level to the highest, as floats.
    Table {
        table: [f32; TABLE],
        midpoints: [f32; TABLE - 1],
        order: [f32; TABLE],
    },
}

impl<'a> Grid<'a> {
    fn new(scales: &'a [f32], zeros: Option<&'a [f32]>, layout: &Layout) -> Self {
        let n = layout.n_groups() * layout.d_out();
        assert_eq!(scales.len(), n, "the scales of the layout");
        assert!(zeros.is_none_or(|zeros| zeros.len() == n), "the zeros");
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

    #[inline(always)]
    fn lanes(&self, group: usize, columns: &Range<usize>) -> Lanes {
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

/// The grids of one group in the columns of a tile.
struct Lanes {
    scales: [f32; TILE],
    zeros: [f32; TILE],
}

impl Lanes {
    #[inline(always)]
    fn nearest<I: Isa>(&self, levels: &Nearest, weights: &[f32; TILE]) -> [u32; TILE] {
        let mut codes = [0; TILE];
        match levels {
            Nearest::Uniform { center, max_code } => {
                for j in 0..TILE {
                    let zero = self.zeros[j] + center;
                    let code = (weights[j] / self.scales[j]).round_ties_even() + zero;
                    codes[j] = small(code.max(0.0).min(*max_code));
                }
            }
            Nearest::Table {
                midpoints, order, ..
            } => {
                for j in 0..TILE {
                    // As bitsandbytes has it: a product with the reciprocal.
                    let value = weights[j] * (1.0 / self.scales[j].max(1e-38));
                    let below = midpoints.iter().map(|&m| u32::from(value > m));
                    codes[j] = below.sum();
                }
                // SAFETY: `I` is that of the function that this is compiled into.
                codes = unsafe { I::lookup(order, &codes) }.map(small);
            }
        }
        codes
    }

    /// The weights of codes.
    #[inline(always)]
    fn weights<I: Isa>(&self, levels: &Nearest, codes: &[u32; TILE]) -> [f32; TILE] {
        let levels = match levels {
            Nearest::Uniform { center, .. } => codes.map(|code| code as i32 as f32 - center),
            // SAFETY: as above.
            Nearest::Table { table, .. } => unsafe { I::lookup(table, codes) },
        };
        std::array::from_fn(|j| (levels[j] - self.zeros[j]) * self.scales[j])
    }
}

/// The integer of a float in `0 ..= 255`.
#[inline(always)]
fn small(value: f32) -> u32 {
    // SAFETY: the callers give numbers from 0 to 255.
    unsafe { value.to_int_unchecked::<i32>() as u32 }
}

/// The columns of a tile in a row, padded with zeros.
#[inline(always)]
fn read(row: &[f32], columns: &Range<usize>) -> [f32; TILE] {
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

/// What an error in a weight costs.
#[derive(Clone, Copy, Debug)]
pub enum Cost<'a> {
    /// `|error|^2.4`, of the reference code of OPTQ (methods differ: its option is named `mse`).
    Power,
    /// `error²` times the weight of the input, `[d_in]`.
    Inputs(&'a [f32]),
}

/// Steps of the search for a clipped range, of which the range keeps `1 - step / CLIP_GRID`.
const CLIP_STEPS: usize = 80;
const CLIP_GRID: usize = 100;

/// Scales and zeros of the ranges that cost least among 100 % down to 21 % of `low` and `high`.
///
/// The grid, the exponent and the strict comparison are those of the reference code of OPTQ
/// (Frantar et al. 2023). The zeros of a centered layout stay zero.
///
/// # Shapes
/// - `weight`: `[d_in, d_out]`, row by row
/// - `low <= 0 <= high`, not both zero, and the results: [`Layout::grid_shape`]
///
/// # Panics
/// If a length is not the layout's, or its levels are a table.
pub fn clip_search(
    weight: &[f32],
    low: &[f32],
    high: &[f32],
    cost: Cost,
    layout: &Layout,
) -> (Vec<f32>, Vec<f32>) {
    let (d_in, d_out) = (layout.d_in(), layout.d_out());
    assert_eq!(weight.len(), d_in * d_out, "one weight for each code");
    let grid = Grid::new(low, Some(high), layout);
    if let Cost::Inputs(weights) = cost {
        assert_eq!(weights.len(), d_in, "one weight for each input");
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
            search_tile(rows, &grid, g, tile, cost, &mut best);
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
    /// The best grid of one group in one tile; `ranges` has the lows as scales, the highs as zeros.
    fn search_tile(
        rows: &[f32],
        ranges: &Grid,
        group: usize,
        tile: usize,
        cost: Cost,
        best: &mut Lanes,
    ) = search_tile_body
}

#[inline(always)]
fn search_tile_body<I: Isa>(
    rows: &[f32],
    ranges: &Grid,
    group: usize,
    tile: usize,
    cost: Cost,
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
            let (scale, zero) = grid_of_range(keep * low[j], keep * high[j], max_code);
            lanes.scales[j] = scale;
            lanes.zeros[j] = if center == 0.0 { zero } else { 0.0 };
        }
        let mut sums = [0.0f32; TILE];
        for (i, weights) in values.iter().enumerate() {
            let codes = lanes.nearest::<I>(&ranges.levels, weights);
            let rounded = lanes.weights::<I>(&ranges.levels, &codes);
            match cost {
                Cost::Power => {
                    for j in 0..TILE {
                        sums[j] += power((rounded[j] - weights[j]).abs());
                    }
                }
                Cost::Inputs(of_input) => {
                    let of_input = of_input[group * layout.group_size() + i];
                    for j in 0..TILE {
                        let error = rounded[j] - weights[j];
                        sums[j] += of_input * (error * error);
                    }
                }
            }
        }
        for j in 0..TILE {
            // The full range stands where every cost is more than a float holds.
            if step == 0 || sums[j] < least[j] {
                least[j] = sums[j];
                best.scales[j] = lanes.scales[j];
                best.zeros[j] = lanes.zeros[j];
            }
        }
    }
}

/// `x^2.4` for `x >= 0`, to a few units in the last place: `x² (x^(1/5))²` with Newton's method.
#[inline(always)]
fn power(x: f32) -> f32 {
    // A fifth of the exponent, within some percent of the root.
    // SAFETY: a fifth of the bits of a float that is not negative fits.
    let fifth = unsafe { (x.to_bits() as i32 as f32 * 0.2).to_int_unchecked::<i32>() };
    let mut root = f32::from_bits((fifth + 0x32CC_CCCD) as u32);
    for _ in 0..3 {
        let square = root * root;
        root = 0.8 * root + 0.2 * (x / (square * square));
    }
    (x * root) * (x * root)
}

/// The working state of [`round_with_feedback`], all rows of a matrix in an order of its caller's.
pub struct Feedback<'a> {
    /// `[d_in, d_out]`, row by row: the weights, changed by the errors of the rows after them. A
    /// rounded row is replaced by its error divided by the factor's diagonal.
    pub weight: &'a mut [f32],
    /// The codes, `[d_in, d_out]`, each row at the place that `inputs` has for it.
    pub codes: &'a mut [u8],
    /// `Σ error² / diagonal²` of each output.
    pub losses: &'a mut [f64],
    /// The weights that the codes of the last call stand for, in the rows that were rounded; if
    /// anybody asks for them.
    pub rounded: Option<&'a mut [f32]>,
}

/// How rows influence each other in [`round_with_feedback`].
#[derive(Clone, Copy)]
pub struct Influence<'a> {
    /// `[d_in, d_in]`, row by row, lower triangular: row `p` takes `factor[p, k] error` from each row
    /// `k < p`, where `error` is that of row `p` divided by `factor[p, p]`.
    pub factor: &'a [f32],
    /// `[d_in, d_in]`, strictly lower triangular: row `p` adds `drift[p, k] w[p]` to each `k < p`.
    pub drift: Option<&'a [f32]>,
    /// The input of each row.
    pub inputs: &'a [usize],
}

/// Rounds the rows `rows` from the last to the first onto their grids, each one's error fed back to
/// those of the rows `from .. rows.end` that are still to come.
///
/// With the inverse Cholesky factor of a Hessian this is the inner loop of OPTQ (Frantar et al. 2023).
///
/// # Shapes
/// - `scales`, `zeros`: [`Layout::grid_shape`]; the group of a row is that of its place in the codes
///
/// # Panics
/// If a size is not the layout's, `rows` or `from` do not lie within it in this order, or a table has
/// zeros.
pub fn round_with_feedback(
    state: &mut Feedback,
    influence: Influence,
    scales: &[f32],
    zeros: Option<&[f32]>,
    layout: &Layout,
    rows: Range<usize>,
    from: usize,
) {
    let [d_in, d_out] = [layout.d_in(), layout.d_out()];
    assert_eq!(state.weight.len(), d_in * d_out, "the working weights");
    assert_eq!(state.codes.len(), d_in * d_out, "one code for each weight");
    assert_eq!(state.losses.len(), d_out, "one loss for each output");
    assert_eq!(influence.factor.len(), d_in * d_in, "the factor");
    assert_eq!(influence.inputs.len(), d_in, "the input of each row");
    assert!(influence.inputs.iter().all(|&input| input < d_in));
    assert!(from <= rows.start && rows.end <= d_in);
    let square = |drift: &[f32]| drift.len() == d_in * d_in;
    assert!(influence.drift.is_none_or(square), "the drift");
    if let Some(rounded) = &state.rounded {
        assert_eq!(rounded.len(), d_in * d_out, "the rounded weights");
    }
    let task = Task {
        influence,
        grid: &Grid::new(scales, zeros, layout),
        rows,
        from,
        weight: Shared(state.weight.as_mut_ptr()),
        codes: Shared(state.codes.as_mut_ptr()),
        rounded: state.rounded.as_mut().map(|r| Shared(r.as_mut_ptr())),
    };
    let tiles = state.losses.par_chunks_mut(TILE).enumerate();
    tiles.for_each_init(Vec::new, |block, (tile, losses)| {
        round_tile(&task, tile, block, losses)
    });
}

struct Task<'a> {
    influence: Influence<'a>,
    grid: &'a Grid<'a>,
    rows: Range<usize>,
    from: usize,
    weight: Shared<f32>,
    codes: Shared<u8>,
    rounded: Option<Shared<f32>>,
}

/// A matrix whose columns are changed by several tasks.
struct Shared<T>(*mut T);

// SAFETY: each task touches the columns of its own tile alone.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The columns of a task in one row of a matrix.
    ///
    /// # Safety
    /// The row and the columns lie within the matrix, and no one else uses them.
    #[expect(clippy::mut_from_ref, reason = "the columns are the caller's own")]
    #[inline(always)]
    unsafe fn row(&self, row: usize, d_out: usize, columns: &Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe {
            let start = self.0.add(row * d_out + columns.start);
            std::slice::from_raw_parts_mut(start, columns.len())
        }
    }
}

by_instruction_set! {
    /// One tile of [`round_with_feedback`].
    fn round_tile(
        task: &Task,
        tile: usize,
        block: &mut Vec<[f32; TILE]>,
        losses: &mut [f64],
    ) = round_tile_body
}

#[inline(always)]
fn round_tile_body<I: Isa>(
    task: &Task,
    tile: usize,
    block: &mut Vec<[f32; TILE]>,
    losses: &mut [f64],
) {
    let Task {
        influence,
        grid,
        from,
        ..
    } = *task;
    let layout = grid.layout;
    let [d_in, d_out] = [layout.d_in(), layout.d_out()];
    let columns = layout.columns(tile);
    let width = columns.len();
    block.clear();
    // SAFETY: the caller has checked the sizes and the rows; this task alone has these columns.
    block.extend((from..task.rows.end).map(|p| unsafe {
        let row = task.weight.row(p, d_out, &columns);
        read(row, &(0..width))
    }));

    let mut sums = [0.0f32; TILE];
    for p in task.rows.clone().rev() {
        let input = influence.inputs[p];
        let lanes = grid.lanes(input / layout.group_size(), &columns);
        let (before, row) = block.split_at_mut(p - from);
        let weights = row[0];
        let mut codes = lanes.nearest::<I>(&grid.levels, &weights);
        if let Nearest::Uniform { center, max_code } = grid.levels
            && center > 0.0
            && influence
                .factor
                .get((p + 1) * d_in + p)
                .is_some_and(|&f| f != 0.0)
        {
            // The lowest weight of a symmetric group lies halfway between its two lowest codes. Which
            // of them it gets must not hang on the last bit of the errors that it has taken: it gets
            // the one of exact arithmetic.
            let lowest = -0.5 * max_code * (1.0 - 4.0 * f32::EPSILON);
            for j in 0..TILE {
                if weights[j] <= lowest * lanes.scales[j] {
                    codes[j] = 0;
                }
            }
        }
        let rounded = lanes.weights::<I>(&grid.levels, &codes);
        let factor = &influence.factor[p * d_in..][..p + 1];
        let mut error = [0.0; TILE];
        for j in 0..TILE {
            error[j] = (weights[j] - rounded[j]) / factor[p];
            sums[j] += error[j] * error[j];
        }
        for (&factor, earlier) in factor[from..].iter().zip(before.iter_mut()) {
            for j in 0..TILE {
                earlier[j] -= factor * error[j];
            }
        }
        if let Some(drift) = influence.drift {
            let drift = &drift[p * d_in..][from..p];
            for (&drift, earlier) in drift.iter().zip(before) {
                for j in 0..TILE {
                    earlier[j] += drift * weights[j];
                }
            }
        }
        row[0] = error;
        // SAFETY: `input` is a row of the codes, and `p` one of the rounded weights.
        unsafe {
            let out = task.codes.row(input, d_out, &columns);
            for (out, code) in out.iter_mut().zip(codes) {
                *out = code as u8;
            }
            if let Some(out) = &task.rounded {
                out.row(p, d_out, &columns)
                    .copy_from_slice(&rounded[..width]);
            }
        }
    }
    for (p, row) in (from..).zip(block.iter()) {
        // SAFETY: as above.
        unsafe { task.weight.row(p, d_out, &columns) }.copy_from_slice(&row[..width]);
    }
    for (loss, sum) in losses.iter_mut().zip(sums) {
        *loss += f64::from(sum);
    }
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
