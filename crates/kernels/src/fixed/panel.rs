//! Panels: [`TILE`] columns of the second operand as bytes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{BLOCK, Blocks, Limbs};
use super::lines::Lines;
use super::split::{self, Rows, Source};
use super::unit::Unit;
use super::vectors::{PART, PARTS, bytes, transpose};
use crate::layout::{Layout, TILE};

/// The number subtracted from codes of 8 bits to make them signed bytes.
pub(super) const SIGNED: u8 = 128;

/// Some blocks of [`TILE`] columns.
///
/// They are stored as a sequence of steps of `[planes, PARTS, step / 4, PART, 4]` bytes: four values of
/// a column form a 32-bit integer, a *quad*.
#[derive(Default)]
pub(crate) struct Panel {
    pub(super) bytes: Lines<u8>,
    /// The number of planes: 1 for codes, one per limb otherwise, the lowest first.
    pub(super) planes: usize,
    /// Whether the whole numbers of [`center`](super::finish::Finish::center) are subtracted from the
    /// codes. Signed codes of 8 bits have no room for them: [`SIGNED`] is subtracted instead.
    pub(super) centered: bool,
    pub(super) step: usize,
    /// The scales of the limbs of each block and column, `[blocks, TILE]`.
    scales: Vec<f32>,
    /// The values that are split into limbs.
    values: Vec<f32>,
    /// The limbs of columns that were given as rows.
    rows: Option<Rows>,
}

impl Panel {
    /// The number of bytes in a step.
    pub(super) fn step_bytes(&self) -> usize {
        self.planes * self.step * TILE
    }

    /// The scales of 16 columns in a block, which is counted from the first of the panel; `None` for
    /// codes.
    ///
    /// # Safety
    /// The processor has these instructions.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn scales(&self, block: usize, part: usize) -> Option<__m512> {
        if self.planes == 1 {
            return None;
        }
        let scales = &self.scales[block * TILE + part * PART..][..PART];
        // SAFETY: a scale for each column.
        Some(unsafe { _mm512_loadu_ps(scales.as_ptr()) })
    }

    fn resize(&mut self, planes: usize, step: usize, k: usize) {
        self.planes = planes;
        self.step = step;
        let n = k.next_multiple_of(step) * TILE * planes;
        // The buffer does not shrink, because the next panel may be larger.
        if self.bytes.len() < n {
            self.bytes = Lines::zeroed(n);
        }
    }

    /// Fills the panel with the codes of `inputs` from the words of a tile.
    ///
    /// VNNI takes unsigned codes. AMX takes signed codes: `whole` writes the whole numbers, of magnitude
    /// at most 64, that are subtracted in a block, which is counted from the first of `inputs`.
    ///
    /// # Panics
    /// If `inputs` does not begin at a multiple of 64.
    pub(crate) fn codes(
        &mut self,
        unit: Unit,
        layout: &Layout,
        words: &[u32],
        inputs: Range<usize>,
        blocks: &Blocks,
        whole: impl Fn(usize, &mut [u8; TILE]),
    ) {
        assert!(inputs.start.is_multiple_of(64));
        self.resize(1, blocks.step(), inputs.len());
        // SAFETY: the caller has a unit, and so the processor has these instructions.
        unsafe {
            match layout.bits() {
                2 => codes::<2>(self, words, inputs.clone()),
                3 => codes::<3>(self, words, inputs.clone()),
                4 => codes::<4>(self, words, inputs.clone()),
                _ => codes::<8>(self, words, inputs.clone()),
            }
            self.centered = unit == Unit::Amx && layout.bits() < 8;
            if unit == Unit::Amx {
                let n_steps = inputs.len().div_ceil(blocks.step());
                let bytes = &mut self.bytes[..n_steps * blocks.step() * TILE];
                let block_bytes = blocks.block() * TILE;
                for (block, bytes) in bytes.chunks_mut(block_bytes).enumerate() {
                    let mut less = [SIGNED; TILE];
                    if self.centered {
                        whole(block, &mut less);
                    }
                    subtract(bytes, blocks.step(), &less);
                }
            }
        }
    }

    /// Fills the panel with the limbs of `k` values per column, which `fill` writes as `[k, TILE]`.
    pub(crate) fn split(&mut self, limbs: Limbs, k: usize, fill: impl FnOnce(&mut [f32])) {
        self.resize(limbs.n(), 64, k);
        let mut values = std::mem::take(&mut self.values);
        values.resize(k * TILE, 0.0);
        fill(&mut values);
        self.scales.resize(k.div_ceil(BLOCK) * TILE, 0.0);
        for (block, values) in values.chunks(BLOCK * TILE).enumerate() {
            // SAFETY: the caller has a unit, and so the processor has these instructions.
            unsafe { split_block(self, limbs, block, values) };
        }
        self.values = values;
    }

    /// Fills the panel with the limbs of `k` values per column, which `fill` writes as `[TILE, k]`.
    ///
    /// `fill` is given the values and the stride of their rows.
    pub(crate) fn transposed(
        &mut self,
        limbs: Limbs,
        k: usize,
        fill: impl FnOnce(&mut [f32], usize),
    ) {
        self.resize(limbs.n(), 64, k);
        let blocks = Blocks::of(k);
        let stride = blocks.padded();
        self.values.resize(TILE * stride, 0.0);
        fill(&mut self.values, stride);
        let rows = match &mut self.rows {
            Some(rows) if rows.has_room(blocks, limbs) => rows,
            rows => rows.insert(Rows::room(TILE, blocks, limbs)),
        };
        let source = Source {
            x: &self.values,
            stride,
        };
        rows.refill(source, blocks);
        self.scales.resize(blocks.n() * TILE, 0.0);
        for block in 0..blocks.n() {
            let scales = self.scales[block * TILE..].as_chunks_mut().0;
            for (part, scales) in scales[..PARTS].iter_mut().enumerate() {
                let of = rows.part(part, block).scales;
                *scales = of.map(|scale| scale * highest(limbs));
            }
        }
        const SIZE: usize = 64 * PART;
        let (tiles, _) = self.bytes.as_chunks_mut::<SIZE>();
        let tiles = tiles.chunks_exact_mut(PARTS * limbs.n());
        for (step, tiles) in tiles.take(blocks.n_steps()).enumerate() {
            for (at, tile) in tiles.iter_mut().enumerate() {
                let (plane, part) = (at / PARTS, at % PARTS);
                let from = rows.at(part, step) + plane * SIZE;
                let from = rows.bytes[from..][..SIZE].as_chunks().0;
                // SAFETY: the caller has a unit, and so the processor has these instructions.
                unsafe { transpose(from, tile) };
            }
        }
    }
}

/// The unit of a product of the highest limbs.
fn highest(limbs: Limbs) -> f32 {
    match limbs {
        Limbs::Two => 65536.0,
        Limbs::Three => 4_294_967_296.0,
    }
}

/// Extracts codes of `BITS` bits from words.
pub(super) struct Codes<const BITS: usize> {
    /// For each quad within one word, the bits at which its codes begin, in both columns of 64 bits.
    shifts: [__m512i; 6],
    mask: __m512i,
}

impl<const BITS: usize> Codes<BITS> {
    /// The number of codes in a run, which begins and ends at a boundary of words.
    pub(super) const RUN: usize = if BITS == 3 { 32 } else { 32 / BITS };
    /// The number of words in a run.
    pub(super) const WORDS: usize = if BITS == 3 { 3 } else { 1 };

    /// # Safety
    /// The processor has these instructions.
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        let shifts = std::array::from_fn(|k| {
            let first = if BITS == 3 { 4 * k } else { 4 * k * BITS % 32 };
            bytes(|at| (at % 8 / 4 * 32 + first + at % 4 * BITS) as u8)
        });
        Self {
            shifts,
            mask: _mm512_set1_epi8(((1u32 << BITS) - 1) as i8),
        }
    }

    /// Quad `quad` of a run in 16 columns; `words` points to the first row of words of the run.
    ///
    /// # Safety
    /// The words of the run, in rows of [`TILE`], can be read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi,avx512vbmi2")]
    pub(super) unsafe fn quad(&self, words: *const u32, quad: usize) -> __m512i {
        // SAFETY: the caller's promise.
        let row = |row: usize| unsafe { _mm512_loadu_si512(words.add(row * TILE).cast()) };
        let (shift, word) = match (BITS, quad) {
            (8, _) => return row(0),
            (3, 0 | 1) => (3 * quad, row(0)),
            // A word has ten codes and two bits of the next.
            (3, 2) => (0, _mm512_shrdi_epi32::<24>(row(0), row(1))),
            (3, 3 | 4) => (3 * quad - 8, row(1)),
            (3, 5) => (0, _mm512_shrdi_epi32::<28>(row(1), row(2))),
            (3, _) => (3 * quad - 16, row(2)),
            _ => (quad, row(0)),
        };
        _mm512_and_si512(
            _mm512_multishift_epi64_epi8(self.shifts[shift], word),
            self.mask,
        )
    }
}

/// Fills the panel with the codes of `inputs` as they are.
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")]
fn codes<const BITS: usize>(panel: &mut Panel, words: &[u32], inputs: Range<usize>) {
    let codes = Codes::<BITS>::new();
    let (run, run_words) = (Codes::<BITS>::RUN, Codes::<BITS>::WORDS);
    // A power of two.
    let quads_per_step = panel.step / 4;
    let n_quads = inputs.len().div_ceil(panel.step) * quads_per_step;
    let words = words.get(inputs.start * BITS / 32 * TILE..).unwrap_or(&[]);
    let ahead = inputs.len() * BITS / 32 * TILE;
    let out = panel.bytes.as_mut_ptr();
    for at in 0..(n_quads * 4).div_ceil(run) {
        // The codes after the last word of a column are 0.
        let mut last = [0; 3 * TILE];
        let words = match words.get(at * run_words * TILE..) {
            Some(words) if words.len() >= run_words * TILE => &words[..run_words * TILE],
            words => {
                let words = words.unwrap_or(&[]);
                last[..words.len()].copy_from_slice(words);
                &last[..run_words * TILE]
            }
        };
        for quad in (0..run / 4).take_while(|quad| at * (run / 4) + quad < n_quads) {
            let place = at * (run / 4) + quad;
            let in_step = place & (quads_per_step - 1);
            for part in 0..PARTS {
                let to = (place - in_step) * TILE * 4 + (part * quads_per_step + in_step) * 64;
                // SAFETY: the words of the run can be read, and the panel has `n_quads` quads of
                // whole tiles.
                unsafe {
                    let quad = codes.quad(words.as_ptr().add(part * PART), quad);
                    _mm512_storeu_si512(out.add(to).cast(), quad);
                }
            }
        }
        // The words of the next panel are still in memory.
        for line in words.chunks_exact(PART) {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(ahead).cast());
        }
    }
}

/// Subtracts the number of each column from its codes; `bytes` are whole steps of `step` values.
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw")]
fn subtract(bytes: &mut [u8], step: usize, less: &[u8; TILE]) {
    let mut each = [_mm512_setzero_si512(); PARTS];
    for (each, less) in each.iter_mut().zip(less.as_chunks::<PART>().0) {
        let less = less.map(|less| u32::from_ne_bytes([less; 4]));
        // SAFETY: 16 integers of 32 bits.
        *each = unsafe { _mm512_loadu_si512(less.as_ptr().cast()) };
    }
    for bytes in bytes.chunks_exact_mut(step * TILE) {
        for (bytes, less) in bytes.chunks_exact_mut(step * PART).zip(each) {
            for quad in bytes.chunks_exact_mut(64) {
                // SAFETY: 64 bytes.
                unsafe {
                    let codes = _mm512_loadu_si512(quad.as_ptr().cast());
                    let codes = _mm512_sub_epi8(codes, less);
                    _mm512_storeu_si512(quad.as_mut_ptr().cast(), codes);
                }
            }
        }
    }
}

/// Splits the values of a block, `[k, TILE]`, into limbs.
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn split_block(panel: &mut Panel, limbs: Limbs, block: usize, values: &[f32]) {
    let k = values.len() / TILE;
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let bias = _mm512_set1_epi32(split::bias(limbs));
    let lane = |at: usize| (at / 4 * 4) as u8;
    // Of two vectors, in each lane: byte 0 of both, then byte 1 of both; and byte 2, then byte 3.
    let low = bytes(|at| lane(at) + [0, 64, 1, 65][at % 4]);
    let high = bytes(|at| lane(at) + [2, 66, 3, 67][at % 4]);
    for part in 0..PARTS {
        let row = |i: usize| -> __m512 {
            match values.get(i * TILE + part * PART..) {
                // SAFETY: values are whole rows of a tile.
                Some(values) if i < k => unsafe { _mm512_loadu_ps(values.as_ptr()) },
                _ => _mm512_setzero_ps(),
            }
        };
        let mut most = _mm512_setzero_si512();
        for i in 0..k {
            most = _mm512_max_epu32(
                most,
                _mm512_and_si512(_mm512_castps_si512(row(i)), magnitude),
            );
        }
        let mut lanes = [0.0f32; PART];
        // SAFETY: 16 lanes.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), _mm512_castsi512_ps(most)) };
        let mut inverses = [0.0; PART];
        for (lane, inverse) in inverses.iter_mut().enumerate() {
            let (scale, of_scale) = split::scale(lanes[lane], limbs);
            panel.scales[block * TILE + part * PART + lane] = scale * highest(limbs);
            *inverse = of_scale;
        }
        // SAFETY: 16 lanes.
        let inverses = unsafe { _mm512_loadu_ps(inverses.as_ptr()) };
        let digits = |i: usize| {
            let v = _mm512_cvtps_epi32(_mm512_mul_ps(row(i), inverses));
            _mm512_xor_si512(_mm512_add_epi32(v, bias), bias)
        };
        for quad in 0..k.div_ceil(64) * 16 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|at| digits(quad * 4 + at));
            let join = |of| {
                let (ab, cd) = (
                    _mm512_permutex2var_epi8(a, of, b),
                    _mm512_permutex2var_epi8(c, of, d),
                );
                let first = _mm512_slli_epi32::<16>(cd);
                let second = _mm512_srli_epi32::<16>(ab);
                [
                    _mm512_mask_blend_epi16(0xaaaa_aaaa, ab, first),
                    _mm512_mask_blend_epi16(0xaaaa_aaaa, second, cd),
                ]
            };
            let ([zero, one], [two, _]) = (join(low), join(high));
            let step = block * (BLOCK / 64) + quad / 16;
            let n = limbs.n();
            for (plane, bytes) in [zero, one, two].into_iter().take(n).enumerate() {
                let at = ((step * n + plane) * PARTS + part) * 1024 + quad % 16 * 64;
                // SAFETY: the panel has these steps.
                unsafe {
                    _mm512_storeu_si512(panel.bytes.as_mut_ptr().add(at).cast(), bytes);
                }
            }
        }
    }
}
