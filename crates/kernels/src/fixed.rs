//! Products in fixed point on the processor's integer units, as accurate as f32 arithmetic.
//!
//! The values of a row that meet in one sum, [`BLOCK`] at most, become integers of 24 bits relative
//! to the largest of them. Three signed bytes, the *limbs*, hold one: `v = l₂ 2¹⁶ + l₁ 2⁸ + l₀`.
//! Products of bytes are summed in `i32` without rounding, in any order; the sums of the limbs, the
//! scales of the rows and those of the columns meet in f32 once per block.
//!
//! The other operand comes as a panel of [`TILE`](crate::TILE) columns unpacked into the cache: the
//! codes of a packed weight as they are or, of any numbers, limbs. Of the products of limbs with
//! limbs, those below the others' rounding are left out.
//!
//! [`Unit`] is what the processor has: Intel's tiles (AMX) or AVX-512's dot product of bytes (VNNI).
//! Where it has neither, floats are multiplied as floats.

use std::arch::x86_64::__m512;
use std::ops::Range;

mod amx;
pub(crate) mod dense;
mod lines;
mod panel;
mod split;
pub(crate) mod tiles;
mod vnni;

pub(crate) use panel::Panel;
pub(crate) use split::{Rows, Source};

/// The most values in a sum of integers: with codes of 8 bits it is below 2²³, exact in f32.
pub(crate) const BLOCK: usize = 256;
/// Rows that lie side by side: those of a tile of AMX.
pub(crate) const STRIP: usize = 16;

/// Rows up to which tiles, of which many rows would be empty, are slower.
pub(crate) const FEW: usize = 10;
/// The most rows whose sums are taken before the next rows'.
pub(crate) const ROWS: usize = 2 * STRIP;

/// How many bytes a value is split into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limbs {
    /// 16 bits.
    Two,
    /// 24 bits, as many as an f32 has.
    Three,
}

impl Limbs {
    const fn n(self) -> usize {
        match self {
            Limbs::Two => 2,
            Limbs::Three => 3,
        }
    }
}

/// How a sum over `k` values is cut: into blocks that have a scale, and these into steps that the
/// units take at a time. (All numbers are kept: these are asked for in inner loops.)
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks {
    k: usize,
    block: usize,
    step: usize,
    steps_per_block: usize,
    n_steps: usize,
    n: usize,
}

impl Blocks {
    /// Blocks that end where groups of `group_size` values end. None if a group has no whole steps.
    pub(crate) fn of_groups(k: usize, group_size: usize) -> Option<Self> {
        if group_size >= k {
            return Some(Self::of(k));
        }
        let step = [64, 32, 16]
            .into_iter()
            .find(|step| group_size.is_multiple_of(*step))?;
        let n_steps = group_size / step;
        let n_steps = (1..=BLOCK / step)
            .rev()
            .find(|n| n_steps.is_multiple_of(*n))?;
        Some(Self::new(k, n_steps, step))
    }

    /// The longest blocks.
    pub(crate) fn of(k: usize) -> Self {
        Self::new(k, BLOCK / 64, 64)
    }

    fn new(k: usize, steps_per_block: usize, step: usize) -> Self {
        let block = steps_per_block * step;
        Self {
            k,
            block,
            step,
            steps_per_block,
            n_steps: k.div_ceil(step),
            n: k.div_ceil(block),
        }
    }

    /// How many.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// The block of value `i`.
    pub(crate) fn at(&self, i: usize) -> usize {
        i / self.block
    }

    /// The values of block `at`.
    pub(crate) fn range(&self, at: usize) -> Range<usize> {
        at * self.block..self.k.min((at + 1) * self.block)
    }

    pub(crate) fn k(&self) -> usize {
        self.k
    }

    fn step(&self) -> usize {
        self.step
    }

    /// The steps of block `at`.
    fn steps(&self, at: usize) -> Range<usize> {
        at * self.steps_per_block..self.n_steps.min((at + 1) * self.steps_per_block)
    }

    /// Values with the padding of the last step.
    fn padded(&self) -> usize {
        self.n_steps * self.step
    }

    /// As many consecutive blocks as `n`, or a few more so that the next begins with a word.
    fn runs(&self, blocks: Range<usize>, n: usize) -> impl Iterator<Item = Range<usize>> {
        let unit = 64 / gcd(self.block, 64);
        let n = n.next_multiple_of(unit);
        let end = blocks.end;
        blocks
            .step_by(n)
            .map(move |first| first..end.min(first + n))
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What multiplies bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
    Vnni,
    /// AMX, beside the former (Sapphire Rapids and later), under Linux.
    Amx,
}

impl Unit {
    /// That of this processor for so many rows, at least one.
    pub(crate) fn get(n_rows: usize) -> Option<Self> {
        match Self::best()? {
            _ if n_rows == 0 => None,
            Unit::Amx if n_rows > FEW => Some(Unit::Amx),
            _ => Some(Unit::Vnni),
        }
    }

    fn best() -> Option<Self> {
        use std::sync::OnceLock;
        static UNIT: OnceLock<Option<Unit>> = OnceLock::new();
        *UNIT.get_or_init(|| {
            let vnni = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2");
            if !vnni {
                None
            } else if amx::permitted() {
                Some(Unit::Amx)
            } else {
                Some(Unit::Vnni)
            }
        })
    }
}

/// What is done with the sums of a block.
///
/// Its functions ask for a processor with AVX-512.
pub(crate) trait Finish {
    /// What it knows of 16 columns in a block.
    type Columns: Copy;

    /// That of columns `16 * part ..` of the panel in block `block`.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn columns(&self, block: usize, part: usize) -> Self::Columns;

    /// The whole numbers, of at most 255, that are taken from unsigned codes before their sums are
    /// rounded: where a grid's zero is far from its lowest code, all but the weights themselves
    /// would cancel.
    fn center(columns: Self::Columns) -> __m512;

    /// Fetches what is needed to take the sums of block `block`, if there is such a block.
    fn prefetch(&self, _block: usize) {}

    /// Fetches what the sums of these rows will be added to.
    fn prefetch_rows(&self, _rows: Range<usize>) {}

    /// Takes the sums of some rows from `row` on in columns `16 * part ..`, beside the sums of their
    /// values in the block.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn take(
        &mut self,
        row: usize,
        part: usize,
        columns: Self::Columns,
        sums: &[__m512],
        values: &[f32],
    );

    /// Hears that all of these rows' sums were taken: at most [`ROWS`] that follow each other.
    fn rows_done(&mut self, rows: Range<usize>);
}

/// Multiplies the blocks of some strips of rows with the panel that holds these blocks of the other
/// operand.
pub(crate) fn multiply(
    unit: Unit,
    rows: &Rows,
    slab: (Range<usize>, Range<usize>),
    panel: &Panel,
    finish: &mut impl Finish,
) {
    // SAFETY: the processor has the unit.
    unsafe {
        match unit {
            Unit::Amx => amx::multiply(rows, slab, panel, finish),
            Unit::Vnni => vnni::multiply(rows, slab, panel, finish),
        }
    }
}

/// Whether [`stream`] takes these rows and words of `bits`-bit codes.
pub(crate) fn streams(rows: &Rows, bits: usize, word_rows: usize) -> bool {
    let (run, run_words) = if bits == 3 { (32, 3) } else { (32 / bits, 1) };
    rows.n_rows == 1 && rows.blocks.step.is_multiple_of(run) && word_rows.is_multiple_of(run_words)
}

/// Multiplies one row with the codes of a tile as they come from memory.
pub(crate) fn stream(rows: &Rows, bits: usize, words: &[u32], finish: &mut impl Finish) {
    // SAFETY: there are rows, and so a unit.
    unsafe { vnni::stream(rows, bits, words, finish) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, Levels, TILE, pack};

    /// The sums as they come, `[rows, blocks, TILE]`.
    struct All {
        n_blocks: usize,
        sums: Vec<f32>,
        done: usize,
    }

    impl Finish for All {
        type Columns = usize;

        unsafe fn columns(&self, block: usize, _: usize) -> usize {
            block
        }

        fn center(_: usize) -> __m512 {
            // SAFETY: there is a unit.
            unsafe { std::arch::x86_64::_mm512_setzero_ps() }
        }

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
                // SAFETY: 16 sums; the caller has AVX-512.
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

    /// Integers of 23 bits are split without an error, and products of bytes are exact.
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
            eprintln!("skipped: no unit for bytes");
            return;
        };
        // Used again for each.
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
            // The largest of each block is what the largest becomes.
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
            // Signed codes are less 3, unless 8 bits have no room for it.
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
                // Joined in f32: two roundings of half a unit in the last place.
                let off = (f64::from(*found) - exact as f64).abs();
                assert!(
                    off <= 1.2e-7 * exact.abs().max(1 << 23) as f64,
                    "{found} for {exact}"
                );
            }
        }
    }
}
