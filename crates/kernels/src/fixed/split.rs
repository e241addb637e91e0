//! Rows of `f32` as limbs.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::blocks::{BLOCK, Blocks, FEW, Limbs, STRIP};
use super::lines::Lines;
use super::vectors::bytes;

/// The number of values that are split at a time.
const LANES: usize = 64;
/// The integer of the largest value: its highest limb is 127, however the product is rounded.
const fn largest(limbs: Limbs) -> i32 {
    match limbs {
        Limbs::Three => 0x7f_00_00,
        Limbs::Two => 0x7f_00,
    }
}
/// The bias that turns the bytes of an integer into signed digits: added, then removed by `xor`.
pub(super) const fn bias(limbs: Limbs) -> i32 {
    match limbs {
        Limbs::Three => 0x80_80_80,
        Limbs::Two => 0x80_80,
    }
}

/// The rows of a matrix `[rows, k]` as limbs.
///
/// Rows are stored in strips of [`STRIP`], and a strip as a sequence of steps of
/// `[limbs, height, step]` bytes.
pub(crate) struct Rows {
    pub(super) n_rows: usize,
    /// The number of rows in a strip, including padding.
    pub(super) height: usize,
    pub(super) limbs: Limbs,
    pub(super) blocks: Blocks,
    pub(super) bytes: Lines<i8>,
    /// The scales of the integers of each row and block, `[strips, blocks, STRIP]`.
    pub(super) scales: Vec<f32>,
    /// The sums of the rounded values, `[strips, blocks, STRIP]`.
    sums: Vec<f32>,
    /// The sums of each limb, `[strips, blocks, 3, STRIP]`.
    limb_sums: Vec<f32>,
}

/// The rows of a strip in a block.
pub(super) struct RowsPart<'a> {
    /// The scales of the integers of each row.
    pub(super) scales: &'a [f32; STRIP],
    /// The sums of the rounded values.
    pub(super) sums: &'a [f32; STRIP],
    /// The sums of each limb.
    pub(super) limb_sums: &'a [[f32; STRIP]; 3],
}

/// A matrix with rows `stride` values apart.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) stride: usize,
}

impl Rows {
    /// Splits `n_rows` rows of `blocks.k()` values, on all threads.
    ///
    /// The caller has a [`Unit`](super::unit::Unit), and so the processor AVX-512 with VBMI.
    ///
    /// # Panics
    /// If `source` is too short.
    pub(crate) fn split(source: Source<'_>, n_rows: usize, blocks: Blocks, limbs: Limbs) -> Self {
        let mut rows = Self::room(n_rows, blocks, limbs);
        rows.refill_strips(source, |strips, fill| strips.into_par_iter().for_each(fill));
        rows
    }

    /// Zeros for the limbs of `n_rows` rows.
    pub(super) fn room(n_rows: usize, blocks: Blocks, limbs: Limbs) -> Self {
        let height = if n_rows <= FEW { n_rows } else { STRIP };
        let n_strips = n_rows.div_ceil(STRIP);
        Self {
            n_rows,
            height,
            limbs,
            blocks,
            bytes: Lines::zeroed(n_strips * height * limbs.n() * blocks.padded()),
            scales: vec![0.0; n_strips * blocks.n() * STRIP],
            sums: vec![0.0; n_strips * blocks.n() * STRIP],
            limb_sums: vec![0.0; n_strips * blocks.n() * 3 * STRIP],
        }
    }

    /// Whether the buffers hold as many rows of `blocks`.
    pub(super) fn has_room(&self, blocks: Blocks, limbs: Limbs) -> bool {
        let n_strips = self.n_strips();
        self.limbs == limbs
            && n_strips * self.height * limbs.n() * blocks.padded() <= self.bytes.len()
            && n_strips * blocks.n() * STRIP <= self.scales.len()
    }

    /// Replaces the rows by those of `source`, on this thread.
    pub(super) fn refill(&mut self, source: Source<'_>, blocks: Blocks) {
        assert!(self.has_room(blocks, self.limbs));
        self.blocks = blocks;
        self.refill_strips(source, |strips, fill| strips.into_iter().for_each(fill));
    }

    fn refill_strips(
        &mut self,
        source: Source<'_>,
        each: impl FnOnce(Vec<Strip<'_>>, &(dyn Fn(Strip<'_>) + Sync)),
    ) {
        let (n_rows, blocks) = (self.n_rows, self.blocks);
        assert!(source.x.len() >= (n_rows - 1) * source.stride + blocks.k());
        let strip_bytes = self.height * self.limbs.n() * blocks.padded();
        let n_scales = blocks.n() * STRIP;
        let strips = self.bytes.chunks_mut(strip_bytes);
        let strips = strips.zip(self.scales.chunks_mut(n_scales));
        let strips = strips.zip(self.sums.chunks_mut(n_scales));
        let strips = strips
            .zip(self.limb_sums.chunks_mut(3 * n_scales))
            .enumerate();
        let strips = strips.take(n_rows.div_ceil(STRIP));
        let strips = strips.map(|(strip, (((bytes, scales), sums), limb_sums))| Strip {
            rows: strip * STRIP..n_rows.min((strip + 1) * STRIP),
            height: self.height,
            limbs: self.limbs,
            blocks,
            bytes,
            scales,
            sums,
            limb_sums,
        });
        // SAFETY: the caller has a unit, and so the processor has these instructions.
        each(strips.collect(), &|strip| unsafe { strip.split(source) });
    }

    /// The values of a row in `blocks`.
    pub(crate) fn values(&self, blocks: Range<usize>) -> Range<usize> {
        self.blocks.range(blocks.start).start..self.blocks.range(blocks.end - 1).end
    }

    /// Slabs: strips and runs of blocks whose limbs fit into a core's own cache.
    pub(crate) fn slabs(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        const CACHE: usize = 5 << 18;
        /// With fewer rows per panel, making the panels takes a noticeable part of the time.
        const STRIPS: usize = 32;
        let n_strips = self.n_strips();
        let height = n_strips.div_ceil(n_strips.div_ceil(STRIPS));
        let block_bytes = self.height * height * self.limbs.n() * self.blocks.block();
        let strips = (0..n_strips).step_by(height);
        strips.flat_map(move |first| {
            let strips = first..n_strips.min(first + height);
            let n_blocks = (CACHE / block_bytes).max(1);
            let runs = self.blocks.runs(0..self.blocks.n(), n_blocks);
            runs.map(move |blocks| (strips.clone(), blocks))
        })
    }

    /// The runs of blocks of a slab that share a panel; the panel of few rows fits into the L1 cache.
    pub(crate) fn panels(&self, slab: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let inputs = if self.height < STRIP { 256 } else { 1024 };
        self.blocks
            .runs(slab, (inputs / self.blocks.block()).max(1))
    }

    pub(crate) fn blocks(&self) -> Blocks {
        self.blocks
    }

    pub(super) fn n_strips(&self) -> usize {
        self.n_rows.div_ceil(STRIP)
    }

    /// The rows of `strip` in block `block`.
    #[inline(always)]
    pub(super) fn part(&self, strip: usize, block: usize) -> RowsPart<'_> {
        let at = strip * self.blocks.n() + block;
        let limb_sums = self.limb_sums.as_chunks().0;
        RowsPart {
            scales: &self.scales.as_chunks().0[at],
            sums: &self.sums.as_chunks().0[at],
            limb_sums: limb_sums[3 * at..3 * (at + 1)].try_into().unwrap(),
        }
    }

    /// The number of rows in a strip.
    pub(super) fn rows_of(&self, strip: usize) -> usize {
        STRIP.min(self.n_rows - strip * STRIP)
    }

    /// The index of the first limb of `strip` in step `step`.
    pub(super) fn at(&self, strip: usize, step: usize) -> usize {
        (strip * self.blocks.padded() + step * self.blocks.step()) * self.limbs.n() * self.height
    }
}

/// The buffers of a strip.
struct Strip<'a> {
    rows: Range<usize>,
    height: usize,
    limbs: Limbs,
    blocks: Blocks,
    bytes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    limb_sums: &'a mut [f32],
}

impl Strip<'_> {
    /// # Safety
    /// The processor has these instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")]
    fn split(mut self, source: Source<'_>) {
        for (at, row) in self.rows.clone().enumerate() {
            let x = &source.x[row * source.stride..][..self.blocks.k()];
            for block in 0..self.blocks.n() {
                let mut values = &x[self.blocks.range(block)];
                let mut padded = [0.0; BLOCK];
                if !values.len().is_multiple_of(LANES) {
                    padded[..values.len()].copy_from_slice(values);
                    values = &padded[..values.len().next_multiple_of(LANES)];
                }
                let (scale, sum) = self.split_block(at, block, values);
                self.scales[block * STRIP + at] = scale;
                self.sums[block * STRIP + at] = sum;
            }
        }
    }

    /// Splits the values of a block of a row, and returns their scale and their sum.
    ///
    /// # Safety
    /// The processor has these instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")]
    fn split_block(&mut self, row: usize, block: usize, values: &[f32]) -> (f32, f32) {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut most = _mm512_setzero_si512();
        for values in values.chunks_exact(16) {
            // SAFETY: 16 values.
            let bits = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
            most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
        }
        let most = f32::from_bits(_mm512_reduce_max_epu32(most));
        let (scale, inverse) = scale(most, self.limbs);
        let inverse = _mm512_set1_ps(inverse);
        let bias = _mm512_set1_epi32(bias(self.limbs));
        let mut sum = _mm512_setzero_si512();
        let mut limb_sums = [_mm512_setzero_si512(); 3];
        let ones = _mm512_set1_epi8(1);

        // Of two vectors: the lowest byte of each 32-bit integer of both, then the second byte.
        let low = bytes(|at| (at % 16 * 4 + at / 16 % 2 * 64 + at / 32) as u8);
        let high = bytes(|at| (at % 16 * 4 + at / 16 % 2 * 64 + 2) as u8);
        let (n_limbs, step) = (self.limbs.n(), self.blocks.step());
        let steps = self.blocks.steps(block);
        for (at, values) in values.chunks_exact(LANES).enumerate() {
            let mut digits = [_mm512_setzero_si512(); 4];
            for (digits, values) in digits.iter_mut().zip(values.chunks_exact(16)) {
                // SAFETY: 16 values.
                let x = unsafe { _mm512_loadu_ps(values.as_ptr()) };
                let v = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
                sum = _mm512_add_epi32(sum, v);
                *digits = _mm512_xor_si512(_mm512_add_epi32(v, bias), bias);
            }
            let [a, b, c, d] = digits;
            let (ab, cd) = (
                _mm512_permutex2var_epi8(a, low, b),
                _mm512_permutex2var_epi8(c, low, d),
            );
            let zero = _mm512_shuffle_i64x2::<0b01_00_01_00>(ab, cd);
            let one = _mm512_shuffle_i64x2::<0b11_10_11_10>(ab, cd);
            let (ab, cd) = (
                _mm512_permutex2var_epi8(a, high, b),
                _mm512_permutex2var_epi8(c, high, d),
            );
            let two = _mm512_shuffle_i64x2::<0b01_00_01_00>(ab, cd);
            let first = steps.start + at * (LANES / step);
            for (limb, digits) in [zero, one, two].into_iter().take(n_limbs).enumerate() {
                limb_sums[limb] = _mm512_dpbusd_epi32(limb_sums[limb], ones, digits);
                let place =
                    |step_at: usize| ((step_at * n_limbs + limb) * self.height + row) * step;
                if step == LANES {
                    let to = &mut self.bytes[place(first)..][..LANES];
                    // SAFETY: 64 bytes.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), digits) };
                    continue;
                }
                let mut parts = [0i8; LANES];
                // SAFETY: 64 bytes.
                unsafe { _mm512_storeu_si512(parts.as_mut_ptr().cast(), digits) };
                for (at, part) in (first..steps.end).zip(parts.chunks_exact(step)) {
                    let at = place(at);
                    self.bytes[at..][..step].copy_from_slice(part);
                }
            }
        }
        for (limb, sums) in limb_sums.into_iter().enumerate() {
            self.limb_sums[(block * 3 + limb) * STRIP + row] = _mm512_reduce_add_epi32(sums) as f32;
        }
        (scale, scale * _mm512_reduce_add_epi32(sum) as f32)
    }
}

/// The scale of integers for values of magnitude up to `largest_value`, and its inverse.
///
/// Where the largest is below 1e-31, the scale is the smallest normal number.
pub(super) fn scale(largest_value: f32, limbs: Limbs) -> (f32, f32) {
    if largest_value == 0.0 {
        (0.0, 0.0)
    } else if largest_value.is_finite() {
        let scale = (largest_value / largest(limbs) as f32).max(f32::MIN_POSITIVE);
        (scale, 1.0 / scale)
    } else {
        // Every result with a term of the block is NaN.
        (f32::NAN, 0.0)
    }
}
