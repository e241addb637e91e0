//! Rounding whose errors are fed back into the weights still to come: the inner loop of OPTQ.

use std::ops::Range;

use rayon::prelude::*;

use super::grid::{Grid, Nearest, read};
use crate::isa::{Isa, by_instruction_set};
use crate::layout::{Layout, TILE};
use crate::shared::Shared;

/// The working state of [`round_with_feedback`], all rows of a matrix in an order of its caller's.
pub struct Feedback<'a> {
    /// `[d_in, d_out]`, row by row: the weights, changed by the errors of the rows after them. A
    /// rounded row is replaced by its error divided by the factor's diagonal.
    pub weight: &'a mut [f32],
    /// The codes, `[d_in, d_out]`, each row at the place that `inputs` has for it.
    pub codes: &'a mut [u8],
    /// `Σ error² / diagonal²` of each output.
    pub losses: &'a mut [f64],
    /// The weights that the codes of the rows from `from` on stand for, row by row; if anybody asks
    /// for them.
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
        let n_rows = rows.end - from;
        assert!(rounded.len() >= n_rows * d_out, "the rounded weights");
    }
    let task = Task {
        influence,
        grid: &Grid::new(scales, zeros, layout),
        rows,
        from,
        weight: Shared::new(state.weight),
        codes: Shared::new(state.codes),
        rounded: state.rounded.as_mut().map(|rounded| Shared::new(rounded)),
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
    let at = |row: usize| row * d_out + columns.start;
    block.clear();
    // SAFETY: the caller has checked the sizes and the rows; this task alone has these columns.
    block.extend((from..task.rows.end).map(|p| unsafe {
        let row = task.weight.slice(at(p), width);
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
        // SAFETY: `input` is a row of the codes, and `p - from` one of the rounded weights.
        unsafe {
            let out = task.codes.slice(at(input), width);
            for (out, code) in out.iter_mut().zip(codes) {
                *out = code as u8;
            }
            if let Some(out) = &task.rounded {
                out.slice(at(p - from), width)
                    .copy_from_slice(&rounded[..width]);
            }
        }
    }
    for (p, row) in (from..).zip(block.iter()) {
        // SAFETY: as above.
        unsafe { task.weight.slice(at(p), width) }.copy_from_slice(&row[..width]);
    }
    for (loss, sum) in losses.iter_mut().zip(sums) {
        *loss += f64::from(sum);
    }
}
