//! The inner loops of the CPU's products in floating point.

use std::ops::Range;

use super::host::Host;
use crate::isa::{Isa, by_instruction_set};
use crate::layout::{Layout, Levels, TILE};

/// Sums over the inputs of a group in the columns of a tile.
#[derive(Clone)]
pub(super) struct GroupSums {
    /// `Σ p (level - zero)`
    pub(super) of_levels: [f32; TILE],
    /// `Σ p`
    pub(super) of_products: [f32; TILE],
}

impl Default for GroupSums {
    fn default() -> Self {
        Self {
            of_levels: [0.0; TILE],
            of_products: [0.0; TILE],
        }
    }
}

by_instruction_set! {
    /// Unpacks `inputs` of a tile into the rows of `panel`, which are `stride` floats apart.
    pub(super) fn unpack_panel(
        w: &Host,
        tile: usize,
        inputs: Range<usize>,
        panel: &mut [f32],
        stride: usize,
    ) = unpack_panel_body
}

by_instruction_set! {
    /// Adds the rows of `p`, one per input, to the sums of their groups.
    pub(super) fn add_to_groups(
        w: &Host,
        tile: usize,
        inputs: Range<usize>,
        p: &[f32],
        sums: &mut [GroupSums],
    ) = add_to_groups_body
}

by_instruction_set! {
    /// Adds the products of rows of `x` with a tile, `[rows, TILE]`, to `y`.
    pub(super) fn multiply_rows(w: &Host, tile: usize, x: &[f32], y: &mut [[f32; TILE]]) =
        multiply_rows_body
}

#[inline(always)]
fn multiply_rows_body<I: Isa>(w: &Host, tile: usize, x: &[f32], y: &mut [[f32; TILE]]) {
    let d_in = w.layout.d_in();
    let (mut x, mut y) = (x, y);
    while !y.is_empty() {
        let n = match y.len() {
            1 => rows_of::<I, 1>(w, tile, x, y),
            2 | 3 => rows_of::<I, 2>(w, tile, x, y),
            _ => rows_of::<I, 4>(w, tile, x, y),
        };
        x = &x[n * d_in..];
        y = &mut y[n..];
    }
}

/// Multiplies the first `R` rows, and returns `R`.
#[inline(always)]
fn rows_of<I: Isa, const R: usize>(
    w: &Host,
    tile: usize,
    x: &[f32],
    y: &mut [[f32; TILE]],
) -> usize {
    let (words, d_in) = (w.tile(tile), w.layout.d_in());
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r * d_in..][..d_in]);
    for (g, inputs) in by_group(&(0..d_in), w.layout.group_size()) {
        let (scales, zeros) = w.grid(tile, g);
        let mut sums = [[0.0; TILE]; R];
        for i in inputs {
            let levels = levels::<I>(&w.layout, words, i);
            for (x, sums) in x.iter().zip(&mut sums) {
                for j in 0..TILE {
                    sums[j] += x[i] * (levels[j] - zeros[j]);
                }
            }
        }
        for (y, sums) in y.iter_mut().zip(&sums) {
            for j in 0..TILE {
                y[j] += scales[j] * sums[j];
            }
        }
    }
    R
}

#[inline(always)]
fn unpack_panel_body<I: Isa>(
    w: &Host,
    tile: usize,
    inputs: Range<usize>,
    panel: &mut [f32],
    stride: usize,
) {
    let words = w.tile(tile);
    for (g, members) in by_group(&inputs, w.layout.group_size()) {
        let (scales, zeros) = w.grid(tile, g);
        for i in members {
            let levels = levels::<I>(&w.layout, words, i);
            let row = lanes_mut(panel, (i - inputs.start) * stride);
            for j in 0..TILE {
                row[j] = (levels[j] - zeros[j]) * scales[j];
            }
        }
    }
}

#[inline(always)]
fn add_to_groups_body<I: Isa>(
    w: &Host,
    tile: usize,
    inputs: Range<usize>,
    p: &[f32],
    sums: &mut [GroupSums],
) {
    let words = w.tile(tile);
    for (g, members) in by_group(&inputs, w.layout.group_size()) {
        let (_, zeros) = w.grid(tile, g);
        let sums = &mut sums[g];
        for i in members {
            let levels = levels::<I>(&w.layout, words, i);
            let p: &[f32; TILE] = p[(i - inputs.start) * TILE..][..TILE].try_into().unwrap();
            for j in 0..TILE {
                sums.of_levels[j] += p[j] * (levels[j] - zeros[j]);
                sums.of_products[j] += p[j];
            }
        }
    }
}

#[inline(always)]
fn lanes_mut(panel: &mut [f32], at: usize) -> &mut [f32; TILE] {
    (&mut panel[at..][..TILE]).try_into().unwrap()
}

/// The levels of input `i` in the columns of a tile with the words `[word_rows, TILE]`.
#[inline(always)]
fn levels<I: Isa>(layout: &Layout, words: &[u32], i: usize) -> [f32; TILE] {
    let codes = layout.codes(words, i);
    match layout.levels() {
        // SAFETY: `I` is the instruction set that this function is compiled for.
        Levels::Table(table) => unsafe { I::lookup(&table, &codes) },
        Levels::Unsigned | Levels::Centered => {
            let center = layout.center();
            codes.map(|code| code as i32 as f32 - center)
        }
    }
}

/// The groups that overlap `inputs`, each with its part of `inputs`.
#[inline(always)]
fn by_group(
    inputs: &Range<usize>,
    group_size: usize,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let Range { start, end } = *inputs;
    (start / group_size..end.div_ceil(group_size)).map(move |g| {
        let first = start.max(g * group_size);
        (
            g,
            first..end.min(g.saturating_add(1).saturating_mul(group_size)),
        )
    })
}
