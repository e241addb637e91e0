//! Rounding with feedback of the errors into later weights: the inner loop of OPTQ.

use std::ops::Range;

use rayon::prelude::*;

use super::grid::{Grid, Nearest, read};
use crate::isa::{Isa, by_instruction_set};
use crate::layout::{Layout, TILE};
use crate::shared::Shared;

/// The working state of [`round_with_feedback`], with the rows of a matrix in the caller's order.
pub struct Feedback<'a> {
    /// The weights with the feedback of rounded rows, `[d_in, d_out]`, row by row.
    ///
    /// A rounded row is replaced by its error divided by the diagonal of the factor.
    pub weight: &'a mut [f32],
    /// The codes, `[d_in, d_out]`; row `p` of the weights is row `inputs[p]`.
    pub codes: &'a mut [u8],
    /// The sums over rows of `error² / diagonal²`, `[d_out]`; those of `rows` are added.
    pub losses: &'a mut [f64],
    /// The weights of the codes of the rows from `from` on, `[rows.end - from, d_out]`, if needed.
    pub rounded: Option<&'a mut [f32]>,
}

/// The influence of rows on each other in [`round_with_feedback`].
#[derive(Clone, Copy)]
pub struct Influence<'a> {
    /// The factor of the errors, `[d_in, d_in]`, row by row, lower triangular.
    ///
    /// Row `p` subtracts `factor[p, k] error` from each row `k < p`, where `error` is that of row `p`
    /// divided by `factor[p, p]`.
    pub factor: &'a [f32],
    /// The factor of the weights, `[d_in, d_in]`, row by row, strictly lower triangular.
    ///
    /// Row `p` adds `drift[p, k] w[p]` to each row `k < p`, where `w[p]` is the weight before rounding.
    pub drift: Option<&'a [f32]>,
    /// The input of each row, `[d_in]`.
    pub inputs: &'a [usize],
}

/// Rounds `rows`, from the last to the first, and feeds the error of each back into the rows before it.
///
/// The feedback goes to the rows from `from` on. With the inverse Cholesky factor of a Hessian, this is
/// the inner loop of OPTQ (Frantar et al. 2023, arXiv:2210.17323).
///
/// # Shapes
/// - `scales`, `zeros`: [`Layout::grid_shape`]; the group of row `p` is that of `inputs[p]`
///
/// # Panics
/// If a length is not the layout's, an input is not below `d_in`, `from <= rows.start` and
/// `rows.end <= d_in` do not hold, or there are zeros and the levels are a table.
///
/// # Examples
/// ```
/// use kernels::{Feedback, Influence, Layout, Levels, round_with_feedback};
///
/// let layout = Layout::new(2, 1, 4, 2, Levels::Unsigned);
/// let (mut weight, mut codes, mut losses) = ([1.0, 2.25], [0; 2], [0.0]);
/// let mut state = Feedback {
///     weight: &mut weight,
///     codes: &mut codes,
///     losses: &mut losses,
///     rounded: None,
/// };
/// // The error of row 1, 0.25, is subtracted from row 0 twice.
/// let influence = Influence { factor: &[1.0, 0.0, 2.0, 1.0], drift: None, inputs: &[0, 1] };
/// round_with_feedback(&mut state, influence, &[0.5], None, &layout, 0..2, 0);
/// assert_eq!(codes, [1, 4]);
/// ```
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
    assert_eq!(state.weight.len(), d_in * d_out, "the number of weights");
    assert_eq!(state.codes.len(), d_in * d_out, "the number of codes");
    assert_eq!(state.losses.len(), d_out, "the number of losses");
    assert_eq!(
        influence.factor.len(),
        d_in * d_in,
        "the size of the factor"
    );
    assert_eq!(influence.inputs.len(), d_in, "the number of inputs");
    assert!(
        influence.inputs.iter().all(|&input| input < d_in),
        "an input is not below {d_in}"
    );
    assert!(
        from <= rows.start && rows.end <= d_in,
        "rows {rows:?} after {from} are not among {d_in} rows"
    );
    if let Some(drift) = influence.drift {
        assert_eq!(drift.len(), d_in * d_in, "the size of the drift");
    }
    if let Some(rounded) = &state.rounded {
        let n_rows = rows.end - from;
        assert!(
            rounded.len() >= n_rows * d_out,
            "{} values have no room for {n_rows} rounded rows of {d_out}",
            rounded.len()
        );
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
    /// Rounds the rows in the columns of one tile.
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
    // SAFETY: the caller has checked the sizes and the rows; no other task uses these columns.
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
            // The lowest weight of a symmetric group lies halfway between its two lowest codes. The
            // choice must not depend on the last bit of the feedback: it is that of exact arithmetic.
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
        // SAFETY: `input` is a row of the codes, and `p - from` one of the rounded weights; no other
        // task uses these columns.
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
        // SAFETY: `p` is a row of the weights; no other task uses these columns.
        unsafe { task.weight.slice(at(p), width) }.copy_from_slice(&row[..width]);
    }
    for (loss, sum) in losses.iter_mut().zip(sums) {
        *loss += f64::from(sum);
    }
}
