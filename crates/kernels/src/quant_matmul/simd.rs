//! The inner loops of the CPU, compiled for the instruction sets that matter and chosen at run time.
//!
//! All versions do the same roundings in the same order: their results are the same bits.

use std::ops::Range;

use super::flex::Host;
use crate::TILE;

/// Sums over the inputs of one group in the columns of a tile.
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

/// Defines `$name` as `$body` compiled for AVX-512, for AVX2 and for the target's base.
macro_rules! by_instruction_set {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512($($arg: $ty),*) {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has these instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has these instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

by_instruction_set! {
    /// Unpacks `inputs` of one tile into rows of `stride` floats of `panel`.
    fn unpack_panel(
        w: &Host,
        tile: usize,
        inputs: Range<usize>,
        panel: &mut [f32],
        stride: usize,
    ) = unpack_panel_body
}

by_instruction_set! {
    /// Adds the rows of `p`, one for each of `inputs`, to the sums of their groups.
    fn add_to_groups(
        w: &Host,
        tile: usize,
        inputs: Range<usize>,
        p: &[f32],
        sums: &mut [GroupSums],
    ) = add_to_groups_body
}

#[inline(always)]
fn unpack_panel_body(
    w: &Host,
    tile: usize,
    inputs: Range<usize>,
    panel: &mut [f32],
    stride: usize,
) {
    let (words, center) = (w.tile(tile), w.layout.center());
    for (g, members) in by_group(&inputs, w.layout.group_size()) {
        let (scales, zeros) = w.grid(tile, g);
        for i in members {
            let codes = w.layout.codes(words, i);
            let row = lanes_mut(panel, (i - inputs.start) * stride);
            for j in 0..TILE {
                row[j] = (codes[j] as i32 as f32 - center - zeros[j]) * scales[j];
            }
        }
    }
}

#[inline(always)]
fn add_to_groups_body(
    w: &Host,
    tile: usize,
    inputs: Range<usize>,
    p: &[f32],
    sums: &mut [GroupSums],
) {
    let (words, center) = (w.tile(tile), w.layout.center());
    for (g, members) in by_group(&inputs, w.layout.group_size()) {
        let (_, zeros) = w.grid(tile, g);
        let sums = &mut sums[g];
        for i in members {
            let codes = w.layout.codes(words, i);
            let p: &[f32; TILE] = p[(i - inputs.start) * TILE..][..TILE].try_into().unwrap();
            for j in 0..TILE {
                sums.of_levels[j] += p[j] * (codes[j] as i32 as f32 - center - zeros[j]);
                sums.of_products[j] += p[j];
            }
        }
    }
}

#[inline(always)]
fn lanes_mut(panel: &mut [f32], at: usize) -> &mut [f32; TILE] {
    (&mut panel[at..][..TILE]).try_into().unwrap()
}

/// The groups that `inputs` meets, each with those of `inputs` that it holds.
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
