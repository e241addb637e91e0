//! Rows of f32 as limbs.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::{BLOCK, Blocks, Limbs, STRIP};

/// Values at a time.
const LANES: usize = 64;
/// What the largest value becomes. Its highest limb is 127, however the product is rounded.
const fn largest(limbs: Limbs) -> i32 {
    match limbs {
        Limbs::Three => 0x7f_00_00,
        Limbs::Two => 0x7f_00,
    }
}
/// What turns the digits of an integer into signed bytes, when added and then removed by `xor`.
pub(super) const fn bias(limbs: Limbs) -> i32 {
    match limbs {
        Limbs::Three => 0x80_80_80,
        Limbs::Two => 0x80_80,
    }
}

/// The rows of a matrix `[rows, k]` as limbs.
///
/// Rows lie in strips of [`STRIP`]; a strip has its steps one after the other, each of these
/// `[limbs, height, step]` bytes.
pub(crate) struct Rows {
    pub(super) n_rows: usize,
    /// Rows that a strip has room for.
    pub(super) height: usize,
    pub(super) limbs: Limbs,
    pub(super) blocks: Blocks,
    pub(super) bytes: Vec<i8>,
    /// `[strips, blocks, STRIP]`: what an integer of the row and block is multiplied by.
    pub(super) scales: Vec<f32>,
    /// `[strips, blocks, STRIP]`: the sums of the values, as the integers stand for them.
    sums: Vec<f32>,
}

/// A matrix whose rows begin `stride` values apart.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) stride: usize,
    /// What columns are multiplied by, and with which weights their values are then summed up: with
    /// none, by one and with one.
    pub(crate) columns: Option<[&'a [f32]; 2]>,
}

impl Rows {
    /// Splits the columns of `blocks` of `n_rows` rows; needs AVX-512 with VBMI.
    pub(crate) fn split(source: Source<'_>, n_rows: usize, blocks: Blocks, limbs: Limbs) -> Self {
        let n_strips = n_rows.div_ceil(STRIP);
        // A tile has room for all limbs of a few rows.
        let height = if n_rows * limbs.n() <= STRIP {
            n_rows
        } else {
            STRIP
        };
        let strip_bytes = height * limbs.n() * blocks.padded();
        let mut bytes = vec![0; n_strips * strip_bytes];
        let n_scales = blocks.n() * STRIP;
        let mut scales = vec![0.0; n_strips * n_scales];
        let mut sums = vec![0.0; n_strips * n_scales];
        assert!(source.x.len() >= (n_rows - 1) * source.stride + blocks.k());
        assert!(
            source
                .columns
                .is_none_or(|[a, b]| a.len().min(b.len()) >= blocks.k())
        );
        bytes
            .par_chunks_mut(strip_bytes)
            .zip(scales.par_chunks_mut(n_scales))
            .zip(sums.par_chunks_mut(n_scales))
            .enumerate()
            .for_each(|(strip, ((bytes, scales), sums))| {
                let rows = STRIP.min(n_rows - strip * STRIP);
                for row in 0..rows {
                    let x = &source.x[(strip * STRIP + row) * source.stride..];
                    for block in 0..blocks.n() {
                        let range = blocks.range(block);
                        let mut values = [0.0; BLOCK];
                        let values = &mut values[..range.len().next_multiple_of(LANES)];
                        let mut weighted = 0.0;
                        match source.columns {
                            None => values[..range.len()].copy_from_slice(&x[range.clone()]),
                            Some(columns) => {
                                let columns = columns.map(|of| &of[range.clone()]);
                                // SAFETY: the caller's promise.
                                weighted = unsafe { scaled(&x[range.clone()], columns, values) };
                            }
                        }
                        let to = Target {
                            bytes: &mut *bytes,
                            row,
                            height,
                            first_step: range.start / blocks.step(),
                            n_steps: range.len().div_ceil(blocks.step()),
                            step: blocks.step(),
                        };
                        // SAFETY: the caller's promise, [`super::Unit::get`].
                        let (scale, sum) = unsafe { split_block(values, limbs, to) };
                        scales[block * STRIP + row] = scale;
                        let sum = source.columns.map_or(sum, |_| weighted);
                        sums[block * STRIP + row] = sum;
                    }
                }
            });
        Self {
            n_rows,
            height,
            limbs,
            blocks,
            bytes,
            scales,
            sums,
        }
    }

    /// The columns of `blocks`.
    pub(crate) fn values(&self, blocks: Range<usize>) -> Range<usize> {
        self.blocks.range(blocks.start).start..self.blocks.range(blocks.end - 1).end
    }

    /// Runs of blocks whose limbs, in all rows, fill a part of the cache that a processor has to
    /// itself.
    pub(crate) fn slabs(&self) -> impl Iterator<Item = Range<usize>> {
        const CACHE: usize = 1 << 20;
        let block_bytes = self.height * self.n_strips() * self.limbs.n() * self.blocks.block;
        self.blocks
            .runs(0..self.blocks.n(), (CACHE / block_bytes).max(1))
    }

    /// Parts of a slab whose panel fits the smallest cache.
    pub(crate) fn panels(&self, slab: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let inputs = if self.height < STRIP { 256 } else { 1024 };
        self.blocks.runs(slab, (inputs / self.blocks.block).max(1))
    }

    pub(super) fn n_strips(&self) -> usize {
        self.n_rows.div_ceil(STRIP)
    }

    /// The sum of the values of block `block` of row `row`.
    #[inline(always)]
    pub(crate) fn sum(&self, row: usize, block: usize) -> f32 {
        self.sums[(row / STRIP * self.blocks.n() + block) * STRIP + row % STRIP]
    }

    /// Rows in a strip.
    pub(super) fn rows_of(&self, strip: usize) -> usize {
        STRIP.min(self.n_rows - strip * STRIP)
    }

    /// Where the limbs of `strip` in `step` begin.
    pub(super) fn at(&self, strip: usize, step: usize) -> usize {
        (strip * self.blocks.padded() + step * self.blocks.step()) * self.limbs.n() * self.height
    }
}

/// Where the limbs of a block go.
struct Target<'a> {
    bytes: &'a mut [i8],
    row: usize,
    height: usize,
    first_step: usize,
    n_steps: usize,
    step: usize,
}

/// What an integer is multiplied by if values up to `largest_value` are split, and its inverse.
///
/// Values below the smallest normal number are rounded to it or to zero.
pub(super) fn scale(largest_value: f32, limbs: Limbs) -> (f32, f32) {
    if largest_value == 0.0 {
        (0.0, 0.0)
    } else if largest_value.is_finite() {
        let scale = (largest_value / largest(limbs) as f32).max(f32::MIN_POSITIVE);
        (scale, 1.0 / scale)
    } else {
        // Every result that the block goes into is NaN.
        (f32::NAN, 0.0)
    }
}

/// Writes `x * factors` to `values`, and sums them up with `weights`.
#[target_feature(enable = "avx512f")]
fn scaled(x: &[f32], [factors, weights]: [&[f32]; 2], values: &mut [f32]) -> f32 {
    let mut sums = [0.0; 16];
    let lanes = values
        .chunks_mut(16)
        .zip(x.chunks(16))
        .zip(factors.chunks(16));
    for (((values, x), factors), weights) in lanes.zip(weights.chunks(16)) {
        for (((value, x), factor), (weight, sum)) in values
            .iter_mut()
            .zip(x)
            .zip(factors)
            .zip(weights.iter().zip(&mut sums))
        {
            *value = x * factor;
            *sum += *value * weight;
        }
    }
    sums.iter().sum()
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn split_block(values: &[f32], limbs: Limbs, to: Target<'_>) -> (f32, f32) {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut most = _mm512_setzero_si512();
    for values in values.chunks_exact(16) {
        // SAFETY: 16 values.
        let bits = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
    }
    let (scale, inverse) = scale(f32::from_bits(_mm512_reduce_max_epu32(most)), limbs);
    let inverse = _mm512_set1_ps(inverse);
    let bias = _mm512_set1_epi32(bias(limbs));
    let mut sum = _mm512_setzero_si512();

    let lanes = _mm512_set_epi8(
        15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6,
        5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11,
        10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0,
    );
    // Byte `limb` of each dword of the first operand, then of the second; then of the next limb.
    let second_half = _mm512_set_epi64(
        0x4040_4040_4040_4040u64 as i64,
        0x4040_4040_4040_4040u64 as i64,
        0,
        0,
        0x4040_4040_4040_4040u64 as i64,
        0x4040_4040_4040_4040u64 as i64,
        0,
        0,
    );
    // Bytes are shifted within words: their values are below 64, nothing crosses.
    let low = _mm512_or_si512(_mm512_slli_epi16::<2>(lanes), second_half);
    let next = _mm512_set_epi64(
        0x0101_0101_0101_0101,
        0x0101_0101_0101_0101,
        0x0101_0101_0101_0101,
        0x0101_0101_0101_0101,
        0,
        0,
        0,
        0,
    );
    let low = _mm512_or_si512(low, next);
    let high = _mm512_or_si512(
        _mm512_or_si512(_mm512_slli_epi16::<2>(lanes), second_half),
        _mm512_set1_epi8(2),
    );

    for (at, values) in values.chunks_exact(LANES).enumerate() {
        let mut digits = [_mm512_setzero_si512(); 4];
        for (digits, values) in digits.iter_mut().zip(values.chunks_exact(16)) {
            // SAFETY: 16 values.
            let x = unsafe { _mm512_loadu_ps(values.as_ptr()) };
            let v = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
            sum = _mm512_add_epi32(sum, v);
            *digits = _mm512_xor_si512(_mm512_add_epi32(v, bias), bias);
        }
        let a = _mm512_permutex2var_epi8(digits[0], low, digits[1]);
        let b = _mm512_permutex2var_epi8(digits[2], low, digits[3]);
        let zero = _mm512_shuffle_i64x2::<0b01_00_01_00>(a, b);
        let one = _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b);
        let c = _mm512_permutex2var_epi8(digits[0], high, digits[1]);
        let d = _mm512_permutex2var_epi8(digits[2], high, digits[3]);
        let two = _mm512_shuffle_i64x2::<0b01_00_01_00>(c, d);
        for (limb, bytes) in [zero, one, two].into_iter().take(limbs.n()).enumerate() {
            let mut values = [0i8; LANES];
            // SAFETY: 64 bytes.
            unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), bytes) };
            let first = at * (LANES / to.step);
            let steps = values.chunks_exact(to.step).take(to.n_steps - first);
            for (k, values) in steps.enumerate() {
                let step = to.first_step + first + k;
                let at = ((step * limbs.n() + limb) * to.height + to.row) * to.step;
                to.bytes[at..][..to.step].copy_from_slice(values);
            }
        }
    }
    (scale, scale * _mm512_reduce_add_epi32(sum) as f32)
}
