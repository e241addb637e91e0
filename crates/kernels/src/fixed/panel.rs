//! Panels: [`TILE`] columns of the other operand as bytes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{BLOCK, Blocks, Limbs};
use super::lines::Lines;
use super::split::{self, Rows, Source};
use super::unit::Unit;
use super::vectors::{PART, PARTS, bytes, transpose};
use crate::layout::{Layout, TILE};

/// What is taken from codes of 8 bits to make them signed bytes.
pub(super) const SIGNED: u8 = 128;

/// Some blocks of [`TILE`] columns.
///
/// Steps lie one after the other, each `[planes, PARTS, step / 4, PART, 4]` bytes: four values of a
/// column make a dword.
#[derive(Default)]
pub(crate) struct Panel {
    pub(super) bytes: Lines<u8>,
    /// One plane of codes, or those of limbs, the lowest first.
    pub(super) planes: usize,
    /// Whether codes are less the whole numbers that [`super::Finish::center`] tells. Signed codes of
    /// 8 bits have no room for that: they are less [`SIGNED`].
    pub(super) centered: bool,
    pub(super) step: usize,
    /// What the integers of a block and column are multiplied by: `[blocks, TILE]`, of limbs only.
    scales: Vec<f32>,
    /// What limbs are made from,
    values: Vec<f32>,
    /// and columns as rows.
    rows: Option<Rows>,
}

impl Panel {
    /// Bytes of a step.
    pub(super) fn step_bytes(&self) -> usize {
        self.planes * self.step * TILE
    }

    /// What the sums of a block, counted from the panel's first, are multiplied by in 16 columns.
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
        // Kept when it shrinks: the next panel may be larger.
        if self.bytes.len() < n {
            self.bytes = Lines::zeroed(n);
        }
    }

    /// The codes of `inputs`, which begin where a word does; `words` are those of a tile.
    ///
    /// As `unit` takes them: as they are, or signed, less the whole numbers of at most 64 that
    /// `whole` tells for each block, counted from the first of `inputs`.
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
        // SAFETY: the caller has a unit, and so the processor these instructions.
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

    /// The limbs of the `k` values of each column that `fill` writes, `[k, TILE]`.
    pub(crate) fn split(&mut self, limbs: Limbs, k: usize, fill: impl FnOnce(&mut [f32])) {
        self.resize(limbs.n(), 64, k);
        let mut values = std::mem::take(&mut self.values);
        values.resize(k * TILE, 0.0);
        fill(&mut values);
        self.scales.resize(k.div_ceil(BLOCK) * TILE, 0.0);
        for (block, values) in values.chunks(BLOCK * TILE).enumerate() {
            // SAFETY: as above.
            unsafe { split_block(self, limbs, block, values) };
        }
        self.values = values;
    }

    /// The same of columns that `fill` writes as rows of a stride that it is given, `[TILE, k]`.
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
                // SAFETY: as above.
                unsafe { transpose(from, tile) };
            }
        }
    }
}

/// What a product of the highest limbs is in units of.
fn highest(limbs: Limbs) -> f32 {
    match limbs {
        Limbs::Two => 65536.0,
        Limbs::Three => 4_294_967_296.0,
    }
}

/// Takes codes of `BITS` bits out of words.
pub(super) struct Codes<const BITS: usize> {
    /// For each quad that lies in one word: at which bit its codes begin, in both columns of a qword.
    shifts: [__m512i; 6],
    mask: __m512i,
}

impl<const BITS: usize> Codes<BITS> {
    /// Codes that begin and end with a word,
    pub(super) const RUN: usize = if BITS == 3 { 32 } else { 32 / BITS };
    /// and the words that they are in.
    pub(super) const WORDS: usize = if BITS == 3 { 3 } else { 1 };

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

    /// Quad `quad` of a run, in 16 columns; `words` are those of the first row of the run.
    ///
    /// # Safety
    /// The words of the run are there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi,avx512vbmi2")]
    pub(super) unsafe fn quad(&self, words: *const u32, quad: usize) -> __m512i {
        // SAFETY: the caller's promise.
        let row = |row: usize| unsafe { _mm512_loadu_si512(words.add(row * TILE).cast()) };
        let (shift, word) = match (BITS, quad) {
            (8, _) => return row(0),
            (3, 0 | 1) => (3 * quad, row(0)),
            // Eleven codes and a third are in a word.
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
        // What lies behind the words of a column are zero codes.
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
                // SAFETY: the words of the run are there, and the panel has `n_quads` quads of
                // whole tiles.
                unsafe {
                    let quad = codes.quad(words.as_ptr().add(part * PART), quad);
                    _mm512_storeu_si512(out.add(to).cast(), quad);
                }
            }
        }
        // The next panel's words come from afar.
        for line in words.chunks_exact(PART) {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(ahead).cast());
        }
    }
}

/// Takes a number from all codes of a column, in `bytes` of steps of `step`.
#[target_feature(enable = "avx512f,avx512bw")]
fn subtract(bytes: &mut [u8], step: usize, less: &[u8; TILE]) {
    let mut each = [_mm512_setzero_si512(); PARTS];
    for (each, less) in each.iter_mut().zip(less.as_chunks::<PART>().0) {
        let less = less.map(|less| u32::from_ne_bytes([less; 4]));
        // SAFETY: 16 dwords.
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn split_block(panel: &mut Panel, limbs: Limbs, block: usize, values: &[f32]) {
    let k = values.len() / TILE;
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let bias = _mm512_set1_epi32(split::bias(limbs));
    let lane = |at: usize| (at / 4 * 4) as u8;
    // Of two vectors: byte 0 of both, then byte 1 of both, in each lane; and byte 2.
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
