//! How sums are divided into blocks and steps, and values into limbs.

use std::ops::Range;

/// The largest number of values in a block: with codes of 8 bits, the integer sums stay below 2²³ and
/// are exact in `f32`.
pub(crate) const BLOCK: usize = 256;
/// The number of rows stored side by side, as many as an AMX tile has.
pub(crate) const STRIP: usize = 16;
/// The largest number of rows for which VNNI is faster than mostly empty AMX tiles.
pub(crate) const FEW: usize = 10;
/// The largest number of rows whose sums are taken before those of the next rows.
pub(crate) const ROWS: usize = 2 * STRIP;

/// The number of signed bytes into which a value is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limbs {
    /// 16 bits.
    Two,
    /// 24 bits, the precision of `f32`.
    Three,
}

impl Limbs {
    pub(super) const fn n(self) -> usize {
        match self {
            Limbs::Two => 2,
            Limbs::Three => 3,
        }
    }
}

/// The division of a sum over `k` values into blocks, and of a block into steps.
///
/// The values of a block share a scale; a step is what an instruction or a tile takes at a time. All
/// numbers are stored because inner loops ask for them.
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
    /// Blocks that end where groups of `group_size` values end; `None` if a group is not a whole
    /// number of steps.
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

    /// Blocks of [`BLOCK`] values.
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

    /// The number of blocks.
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

    /// The number of values.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// The number of values in a block.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    /// The number of values in a step.
    pub(super) fn step(&self) -> usize {
        self.step
    }

    /// The number of steps.
    pub(super) fn n_steps(&self) -> usize {
        self.n_steps
    }

    /// The steps of block `at`.
    pub(super) fn steps(&self, at: usize) -> Range<usize> {
        at * self.steps_per_block..self.n_steps.min((at + 1) * self.steps_per_block)
    }

    /// The number of values, including the padding of the last step.
    pub(super) fn padded(&self) -> usize {
        self.n_steps * self.step
    }

    /// Divides `blocks` into runs of at least `n`, each of which begins at a multiple of 64 values.
    pub(super) fn runs(
        &self,
        blocks: Range<usize>,
        n: usize,
    ) -> impl Iterator<Item = Range<usize>> {
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
