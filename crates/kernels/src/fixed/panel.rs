//! Panels: [`TILE`] columns of the other operand as bytes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{BLOCK, Blocks, Limbs, split};
use crate::{Layout, TILE};

/// Columns of a vector of dwords.
pub(super) const PART: usize = 16;
/// Parts of a tile of columns.
pub(super) const PARTS: usize = TILE / PART;

/// Some blocks of [`TILE`] columns.
///
/// Steps lie one after the other, each `[planes, PARTS, step / 4, PART, 4]` bytes: four values of a
/// column make a dword.
#[derive(Default)]
pub(crate) struct Panel {
    pub(super) bytes: Vec<u8>,
    /// One plane of unsigned codes, or two of signed limbs, the lower first.
    pub(super) planes: usize,
    pub(super) step: usize,
    /// What the integers of a block and column are multiplied by: `[blocks, TILE]`, of limbs only.
    pub(super) scales: Vec<f32>,
    /// What limbs are made from.
    values: Vec<f32>,
}

impl Panel {
    /// Bytes of a step.
    pub(super) fn step_bytes(&self) -> usize {
        self.planes * self.step * TILE
    }

    fn resize(&mut self, planes: usize, step: usize, k: usize) {
        self.planes = planes;
        self.step = step;
        let n = k.next_multiple_of(step) * TILE * planes;
        // Kept when it shrinks: the next panel may be larger.
        if self.bytes.len() < n {
            self.bytes.resize(n, 0);
        }
    }

    /// The codes of `inputs`, which begin where a word does; `words` are those of a tile.
    pub(crate) fn codes(
        &mut self,
        layout: &Layout,
        words: &[u32],
        inputs: Range<usize>,
        blocks: &Blocks,
    ) {
        assert!(inputs.start.is_multiple_of(64));
        self.resize(1, blocks.step, inputs.len());
        // SAFETY: the caller has a unit, and so the processor these instructions.
        unsafe { codes(self, layout, words, inputs) }
    }

    /// The codes of `k` outputs in `n` inputs, as columns: `fill` writes `[TILE, TILE]` of them, one
    /// row for each input, and is told from which output on.
    pub(crate) fn transposed(&mut self, k: usize, fill: impl Fn(usize, &mut [[u8; TILE]; TILE])) {
        self.resize(1, 64, k);
        let mut codes = [[0; TILE]; TILE];
        for (step, bytes) in self.bytes.chunks_exact_mut(TILE * TILE).enumerate() {
            if step * TILE >= k {
                break;
            }
            fill(step * TILE, &mut codes);
            for (part, bytes) in bytes.chunks_exact_mut(PART * TILE).enumerate() {
                for (quad, bytes) in bytes.chunks_exact_mut(PART * 4).enumerate() {
                    for (i, bytes) in bytes.chunks_exact_mut(4).enumerate() {
                        bytes.copy_from_slice(&codes[part * PART + i][quad * 4..][..4]);
                    }
                }
            }
        }
    }

    /// The two limbs of the `k` values of each column that `fill` writes, `[k, TILE]`.
    pub(crate) fn split(&mut self, k: usize, fill: impl FnOnce(&mut [f32])) {
        self.resize(2, 64, k);
        let mut values = std::mem::take(&mut self.values);
        values.resize(k * TILE, 0.0);
        fill(&mut values);
        self.scales.resize(k.div_ceil(BLOCK) * TILE, 0.0);
        for (block, values) in values.chunks(BLOCK * TILE).enumerate() {
            // SAFETY: as above.
            unsafe { split_block(self, block, values) };
        }
        self.values = values;
    }
}

/// The bytes of a vector as the place of each.
#[target_feature(enable = "avx512f")]
fn bytes(of: impl Fn(usize) -> u8) -> __m512i {
    let bytes: [u8; 64] = std::array::from_fn(of);
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")]
fn codes(panel: &mut Panel, layout: &Layout, words: &[u32], inputs: Range<usize>) {
    let bits = layout.bits();
    // A power of two.
    let quads_per_step = panel.step / 4;
    // Quad `j` of a run of words: the bit at which each of its four codes begins, for the two
    // columns of a qword.
    let shifts = |first: usize| bytes(|at| (at % 8 / 4 * 32 + first + at % 4 * bits) as u8);
    let mask = _mm512_set1_epi8(layout.mask() as u8 as i8);
    let n_quads = inputs.len().div_ceil(panel.step) * quads_per_step;
    let row = |row: usize, part: usize| -> __m512i {
        // The words lie in the order in which they are read, and more of them than caches hold.
        const AHEAD: usize = 16 * TILE;
        let ahead = words
            .as_ptr()
            .wrapping_add(row * TILE + part * PART + AHEAD);
        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        match words.get(row * TILE + part * PART..) {
            // SAFETY: words are whole rows of a tile.
            Some(words) if words.len() >= PART => unsafe {
                _mm512_loadu_si512(words.as_ptr().cast())
            },
            _ => _mm512_setzero_si512(),
        }
    };
    let out = panel.bytes.as_mut_ptr();
    let store = |quad: usize, part: usize, value: __m512i| {
        if quad < n_quads {
            let in_step = quad & (quads_per_step - 1);
            let at = (quad - in_step) * TILE * 4 + (part * quads_per_step + in_step) * 64;
            // SAFETY: the panel has `n_quads` quads of whole tiles.
            unsafe { _mm512_storeu_si512(out.add(at).cast(), value) };
        }
    };
    let first_row = inputs.start * bits / 32;
    match bits {
        3 => {
            let at = [0, 4, 8, 12, 16, 20].map(&shifts);
            // 32 codes in three words.
            for run in 0..n_quads.div_ceil(8) {
                for part in 0..PARTS {
                    let [a, b, c] = [0, 1, 2].map(|k| row(first_row + run * 3 + k, part));
                    let straddling = [
                        _mm512_shrdi_epi32::<24>(a, b),
                        _mm512_shrdi_epi32::<28>(b, c),
                    ];
                    let codes = |shifts, word| {
                        _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, word), mask)
                    };
                    let quads = [
                        codes(at[0], a),
                        codes(at[3], a),
                        codes(at[0], straddling[0]),
                        codes(at[1], b),
                        codes(at[4], b),
                        codes(at[0], straddling[1]),
                        codes(at[2], c),
                        codes(at[5], c),
                    ];
                    for (k, quad) in quads.into_iter().enumerate() {
                        store(run * 8 + k, part, quad);
                    }
                }
            }
        }
        _ => {
            let per_word = 8 / bits;
            let at: [__m512i; 4] = std::array::from_fn(|k| shifts((k % per_word) * 4 * bits));
            for word in 0..n_quads.div_ceil(per_word) {
                for part in 0..PARTS {
                    let value = row(first_row + word, part);
                    for (k, &shifts) in at.iter().enumerate().take(per_word) {
                        let codes =
                            _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, value), mask);
                        store(word * per_word + k, part, codes);
                    }
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn split_block(panel: &mut Panel, block: usize, values: &[f32]) {
    const LIMBS: Limbs = Limbs::Two;
    // The product of the lower limbs is left out: the sums are in units of this.
    let dropped = 256.0;
    let k = values.len() / TILE;
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let bias = _mm512_set1_epi32(split::bias(LIMBS));
    let lane = |at: usize| (at / 4 * 4) as u8;
    // Of two vectors: byte 0 of both, then byte 1 of both, in each lane.
    let low = bytes(|at| lane(at) + [0, 64, 1, 65][at % 4]);
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
            let (scale, of_scale) = split::scale(lanes[lane], LIMBS);
            panel.scales[block * TILE + part * PART + lane] = scale * dropped;
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
            let (ab, cd) = (
                _mm512_permutex2var_epi8(a, low, b),
                _mm512_permutex2var_epi8(c, low, d),
            );
            let zero = _mm512_mask_blend_epi16(0xaaaa_aaaa, ab, _mm512_slli_epi32::<16>(cd));
            let one = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(ab), cd);
            let step = block * (BLOCK / 64) + quad / 16;
            for (plane, bytes) in [zero, one].into_iter().enumerate() {
                let at = ((step * 2 + plane) * PARTS + part) * 1024 + quad % 16 * 64;
                // SAFETY: the panel has these steps.
                unsafe {
                    _mm512_storeu_si512(panel.bytes.as_mut_ptr().add(at).cast(), bytes);
                }
            }
        }
    }
}
