//! Products in fixed point on the processor's integer units, as accurate as `f32` arithmetic.
//!
//! The values of a row that are summed together, at most [`BLOCK`](blocks::BLOCK), are rounded to
//! integers of 24 bits relative to the largest of them. An integer is split into three signed bytes,
//! the *limbs*: `v = l₂ 2¹⁶ + l₁ 2⁸ + l₀`. Products of bytes are summed in `i32`, without rounding and
//! so in any order. Once per block, the sums of the limbs are combined in `f32` and multiplied by the
//! scales of rows and columns.
//!
//! The other operand is a panel of [`TILE`](crate::layout::TILE) columns that is unpacked into the
//! cache: the codes of a packed weight, or the limbs of arbitrary values. The product of the lowest
//! limbs of both operands is omitted, because it is below the rounding error of the others.
//!
//! [`Unit`] is the integer unit of the processor: Intel's tiles (AMX) or the dot product of bytes of
//! AVX-512 (VNNI). Processors with neither compute in floating point.

use std::ops::Range;

mod amx;
mod blocks;
pub(crate) mod dense;
mod finish;
mod lines;
mod panel;
mod split;
pub(crate) mod tiles;
mod unit;
mod vectors;
mod vnni;

pub(crate) use blocks::{Blocks, Limbs};
pub(crate) use finish::Finish;
pub(crate) use panel::Panel;
pub(crate) use split::{Rows, Source};
pub(crate) use unit::{Operand, Unit};
pub(crate) use vnni::streams;

/// Multiplies a slab, some strips of rows and some of their blocks, by the panel of the same blocks.
pub(crate) fn multiply(
    unit: Unit,
    rows: &Rows,
    slab: (Range<usize>, Range<usize>),
    panel: &Panel,
    finish: &mut impl Finish,
) {
    // SAFETY: a `Unit` is only made where the processor has it.
    unsafe {
        match unit {
            Unit::Amx => amx::multiply(rows, slab, panel, finish),
            Unit::Vnni => vnni::multiply(rows, slab, panel, finish),
        }
    }
}

/// Multiplies one row by the codes of a tile as they are read from memory.
///
/// # Panics
/// Unless [`streams`].
pub(crate) fn stream(rows: &Rows, bits: usize, words: &[u32], finish: &mut impl Finish) {
    // SAFETY: `Rows` are only made where the processor has a unit.
    unsafe { vnni::stream(rows, bits, words, finish) }
}

#[cfg(test)]
mod tests {
    use std::arch::x86_64::__m512;

    use super::blocks::{FEW, STRIP};
    use super::*;
    use crate::layout::{Layout, Levels, TILE};
    use crate::pack::pack;

    /// Stores all sums, `[rows, blocks, TILE]`.
    struct All {
        n_blocks: usize,
        sums: Vec<f32>,
        done: usize,
    }

    impl Finish for All {
        type Columns = usize;

        /// # Safety
        /// None is needed.
        unsafe fn columns(&self, block: usize, _: usize) -> usize {
            block
        }

        fn center(_: usize) -> __m512 {
            // SAFETY: the processor has AVX-512.
            unsafe { std::arch::x86_64::_mm512_setzero_ps() }
        }

        /// # Safety
        /// The processor has AVX-512.
        unsafe fn take(
            &mut self,
            row: usize,
            part: usize,
            block: usize,
            sums: &[__m512],
            values: &[f32],
        ) {
            assert_eq!(sums.len(), values.len());
            for (row, sums) in (row..).zip(sums) {
                let at = (row * self.n_blocks + block) * TILE + part * 16;
                // SAFETY: 16 sums; the processor has AVX-512.
                unsafe {
                    std::arch::x86_64::_mm512_storeu_ps(self.sums[at..at + 16].as_mut_ptr(), *sums)
                }
            }
        }

        fn rows_done(&mut self, rows: Range<usize>) {
            assert_eq!(rows.start, self.done);
            self.done = rows.end;
        }
    }

    /// Integers of 23 bits are split without error, and products of bytes are exact.
    #[test]
    fn both_units_sum_up_integers_exactly() {
        let cases = [
            (2, 64, 3),
            (3, 32, 17),
            (4, 128, 40),
            (8, 256, 33),
            (4, 48, 5),
        ];
        let Some(best) = Unit::best() else {
            eprintln!("skipped: the processor has no unit for bytes");
            return;
        };
        // Reused, as a task reuses its panel.
        let mut panel = Panel::default();
        let each = cases
            .into_iter()
            .flat_map(|case| [Unit::Vnni, Unit::Amx].map(|unit| (unit, case)));
        for (unit, (bits, group, rows)) in each {
            if unit == Unit::Amx && (best == Unit::Vnni || rows <= FEW) {
                continue;
            }
            let k = 600;
            let layout = Layout::new(k, TILE, bits, group, Levels::Unsigned);
            let codes: Vec<u8> = (0..k * TILE)
                .map(|i| (i * 7 % 251) as u8 & layout.mask() as u8)
                .collect();
            let words = pack(&codes, &layout);
            // The largest value of each block is the largest integer, so that the scale is 1.
            let largest = 0x7f_00_00;
            let value = |row: usize, i: usize| match i % 16 {
                0 => largest,
                _ => (row * 7919 + i * 104_729) as i32 % largest - largest / 2,
            };
            let x: Vec<f32> = (0..rows * k)
                .map(|at| value(at / k, at % k) as f32)
                .collect();
            let blocks = Blocks::of_groups(k, group).unwrap();
            let rows_split = Rows::split(Source { x: &x, stride: k }, rows, blocks, Limbs::Three);
            let mut all = All {
                n_blocks: blocks.n(),
                sums: vec![0.0; rows * blocks.n() * TILE],
                done: 0,
            };
            // 3 is subtracted from signed codes; codes of 8 bits have no room for it.
            let less = match (unit, bits) {
                (Unit::Amx, 2..8) => 3,
                _ => 0,
            };
            panel.codes(unit, &layout, &words, 0..k, &blocks, |_, whole| {
                whole.fill(less as u8);
            });
            let slab = (0..rows.div_ceil(STRIP), 0..blocks.n());
            multiply(unit, &rows_split, slab, &panel, &mut all);
            assert_eq!(all.done, rows);
            for (at, found) in all.sums.iter().enumerate() {
                let (row, block, o) = (at / TILE / blocks.n(), at / TILE % blocks.n(), at % TILE);
                let exact: i64 = blocks
                    .range(block)
                    .map(|i| i64::from(value(row, i)) * (i64::from(codes[i * TILE + o]) - less))
                    .sum();
                // Combined in f32: two roundings of half a unit in the last place.
                let off = (f64::from(*found) - exact as f64).abs();
                assert!(
                    off <= 1.2e-7 * exact.abs().max(1 << 23) as f64,
                    "{found} for {exact}"
                );
            }
        }
    }
}
