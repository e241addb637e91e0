//! Products in fixed point on the processor's integer units, as accurate as f32 arithmetic.
//!
//! The values of a row that meet in one sum, [`BLOCK`] at most, become integers of 24 bits relative
//! to the largest of them. Three signed bytes, the *limbs*, hold one: `v = l₂ 2¹⁶ + l₁ 2⁸ + l₀`.
//! Products of bytes are summed in `i32` without rounding, in any order; the sums of the limbs, the
//! scales of the rows and those of the columns meet in f32 once per block.
//!
//! The other operand comes as a panel of [`TILE`](crate::TILE) columns unpacked into the cache: the codes of a
//! packed weight as they are, or limbs of their own, whose products below 2⁻²⁴ are left out.
//!
//! [`Unit`] is what the processor has: Intel's tiles (AMX) or AVX-512's dot product of bytes (VNNI).
//! Where it has neither, floats are multiplied as floats.

use std::ops::Range;

mod amx;
mod panel;
mod split;
mod vnni;

pub(crate) use panel::Panel;
pub(crate) use split::{Rows, Source};

/// The most values in a sum of integers: with codes of 8 bits it is below 2²³, exact in f32.
pub(crate) const BLOCK: usize = 256;
/// Rows that lie side by side: those of a tile of AMX.
pub(crate) const STRIP: usize = 16;

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
/// units take at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks {
    k: usize,
    block: usize,
    step: usize,
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
        Some(Self {
            k,
            block: n_steps * step,
            step,
        })
    }

    /// The longest blocks.
    pub(crate) fn of(k: usize) -> Self {
        Self {
            k,
            block: BLOCK,
            step: 64,
        }
    }

    /// How many.
    pub(crate) fn n(&self) -> usize {
        self.k.div_ceil(self.block)
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
        let range = self.range(at);
        range.start / self.step..range.end.div_ceil(self.step)
    }

    /// Values with the padding of the last step.
    fn padded(&self) -> usize {
        self.k.next_multiple_of(self.step)
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
    /// That of this processor.
    pub(crate) fn get() -> Option<Self> {
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
pub(crate) trait Finish {
    /// Takes the sums of row `row` in columns `16 * part ..` of the panel, in block `block`.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn take(
        &mut self,
        row: usize,
        block: usize,
        part: usize,
        sums: std::arch::x86_64::__m512,
    );

    /// Hears that all of these rows' sums were taken: at most [`ROWS`] that follow each other.
    fn rows_done(&mut self, rows: Range<usize>);
}

/// Multiplies the rows' blocks `blocks` with the panel that holds these blocks of the other operand.
pub(crate) fn multiply(
    unit: Unit,
    rows: &Rows,
    blocks: Range<usize>,
    panel: &Panel,
    finish: &mut impl Finish,
) {
    match unit {
        // SAFETY: the processor has the unit.
        Unit::Amx if rows.n_rows > vnni::FEW => unsafe {
            amx::multiply(rows, blocks, panel, finish)
        },
        _ => unsafe { vnni::multiply(rows, blocks, panel, finish) },
    }
}
