//! A block of scores: softmax over its keys, and the gradient of that.

use crate::isa::{Isa, by_instruction_set};
use crate::math;
use crate::softcap::Softcap;

/// The number of queries in a block.
pub(super) const QUERIES: usize = 64;
/// The number of keys in a block.
pub(super) const KEYS: usize = 128;

/// A number for each query of a block; those past the end of the sequence are ignored.
pub(super) type Lanes = [f32; QUERIES];

/// A block of queries, and a block of keys from `keys` on.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) n_queries: usize,
    pub(super) keys: usize,
    pub(super) n_keys: usize,
    /// The number of keys up to the position of the first query of the block, that included; of all keys
    /// if attention is not causal.
    pub(super) visible: usize,
    /// The first key that each query attends to, if it is after the first of the block for some.
    pub(super) starts: Option<[usize; QUERIES]>,
    /// The key after the last one that each query attends to, if it is in the block for some.
    pub(super) ends: Option<[usize; QUERIES]>,
    /// Whether no query of the block attends to an earlier key.
    pub(super) is_first: bool,
}

impl Block {
    /// The number of queries, from the first on, that come before key `j` of the block.
    #[inline(always)]
    fn masked(&self, j: usize) -> usize {
        (self.keys + j + 1)
            .saturating_sub(self.visible)
            .min(QUERIES)
    }

    /// Whether a query of the block does not attend to some of its keys.
    #[inline(always)]
    fn hides(&self) -> bool {
        let is_diagonal = self.keys + self.n_keys > self.visible;
        is_diagonal || self.starts.is_some() || self.ends.is_some()
    }

    /// Calls `hide` with each query that does not attend to key `j` of the block.
    #[inline(always)]
    fn hide(&self, j: usize, mut hide: impl FnMut(usize)) {
        let key = self.keys + j;
        (0..self.masked(j)).for_each(&mut hide);
        if let Some(starts) = &self.starts {
            (0..QUERIES)
                .filter(|&i| starts[i] > key)
                .for_each(&mut hide);
        }
        if let Some(ends) = &self.ends {
            (0..QUERIES).filter(|&i| ends[i] <= key).for_each(&mut hide);
        }
    }
}

by_instruction_set! {
    /// Turns the scores of a block into exponentials relative to the largest score so far.
    ///
    /// `shrink` is the factor of the exponentials of earlier blocks.
    pub(super) fn softmax(
        block: Block,
        scores: &mut [Lanes],
        most: &mut Lanes,
        sum: &mut Lanes,
        shrink: &mut Lanes,
    ) = softmax_body
}

#[inline(always)]
fn softmax_body<I: Isa>(
    block: Block,
    scores: &mut [Lanes],
    most: &mut Lanes,
    sum: &mut Lanes,
    shrink: &mut Lanes,
) {
    let before = *most;
    let mut largest = before;
    let hides = block.hides();
    for (j, scores) in scores[..block.n_keys].iter_mut().enumerate() {
        if hides {
            block.hide(j, |i| scores[i] = f32::NEG_INFINITY);
        }
        for i in 0..QUERIES {
            largest[i] = math::larger(scores[i], largest[i]);
        }
    }
    let mut added = [0.0; QUERIES];
    for scores in &mut scores[..block.n_keys] {
        for i in 0..QUERIES {
            scores[i] = math::exp(scores[i] - largest[i]);
            added[i] += scores[i];
        }
    }
    for i in 0..QUERIES {
        shrink[i] = math::exp(before[i] - largest[i]);
        sum[i] = sum[i] * shrink[i] + added[i];
    }
    *most = largest;
}

by_instruction_set! {
    /// Turns scores into probabilities, and `dp` into the gradient of the products of queries and keys.
    pub(super) fn gradient(
        block: Block,
        scale: f32,
        softcap: Option<Softcap>,
        lse: &Lanes,
        delta: &Lanes,
        scores: &mut [Lanes],
        dp: &mut [Lanes],
    ) = gradient_body
}

#[inline(always)]
fn gradient_body<I: Isa>(
    block: Block,
    scale: f32,
    softcap: Option<Softcap>,
    lse: &Lanes,
    delta: &Lanes,
    scores: &mut [Lanes],
    dp: &mut [Lanes],
) {
    match softcap {
        Some(cap) => {
            let slope = |score| cap.slope_at(score) * scale;
            gradient_by(block, slope, lse, delta, scores, dp);
        }
        None => gradient_by(block, |_| scale, lse, delta, scores, dp),
    }
}

/// [`gradient`], where `slope` is the derivative of a score for its product.
#[inline(always)]
fn gradient_by(
    block: Block,
    slope: impl Fn(f32) -> f32,
    lse: &Lanes,
    delta: &Lanes,
    scores: &mut [Lanes],
    dp: &mut [Lanes],
) {
    let hides = block.hides();
    let rows = scores[..block.n_keys].iter_mut().zip(dp);
    for (j, (p, dp)) in rows.enumerate() {
        for i in 0..QUERIES {
            let slope = slope(p[i]);
            p[i] = math::exp(p[i] - lse[i]);
            dp[i] = p[i] * (dp[i] - delta[i]) * slope;
        }
        if hides {
            block.hide(j, |i| (p[i], dp[i]) = (0.0, 0.0));
        }
    }
}
