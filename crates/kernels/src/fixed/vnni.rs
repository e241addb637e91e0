//! AVX-512's dot product of unsigned codes with signed limbs.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{Limbs, STRIP};
use super::finish::Finish;
use super::panel::{Codes, Panel};
use super::split::{Rows, RowsPart};
use super::vectors::{PART, PARTS};
use crate::layout::TILE;

/// Multiplies a slab by a panel of codes, see [`super::multiply`].
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn multiply(
    rows: &Rows,
    slab: (Range<usize>, Range<usize>),
    panel: &Panel,
    finish: &mut impl Finish,
) {
    match rows.limbs {
        Limbs::Two => multiply_limbs::<2>(rows, slab, panel, finish),
        Limbs::Three => multiply_limbs::<3>(rows, slab, panel, finish),
    }
}

/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_limbs<const L: usize>(
    rows: &Rows,
    (strips, blocks): (Range<usize>, Range<usize>),
    panel: &Panel,
    finish: &mut impl Finish,
) {
    assert_eq!(panel.planes, 1, "a panel of codes");
    let first_step = rows.blocks.steps(blocks.start).start;
    for strip in strips {
        let n = rows.rows_of(strip);
        let mut row = 0;
        while row < n {
            let at = Place {
                strip,
                row,
                blocks: blocks.clone(),
                first_step,
            };
            let taken = match n - row {
                1 => few::<_, L, 1, 4>(rows, panel, at, finish),
                2 | 3 => few::<_, L, 2, 4>(rows, panel, at, finish),
                _ => few::<_, L, 4, 2>(rows, panel, at, finish),
            };
            let first = strip * STRIP + row;
            finish.rows_done(first..first + taken);
            row += taken;
        }
    }
}

/// Whether [`stream`] takes these rows and words of `bits`-bit codes.
pub(crate) fn streams(rows: &Rows, bits: usize, word_rows: usize) -> bool {
    let (run, run_words) = if bits == 3 { (32, 3) } else { (32 / bits, 1) };
    rows.n_rows == 1
        && rows.blocks.step().is_multiple_of(run)
        && word_rows.is_multiple_of(run_words)
}

/// Multiplies one row by the codes of a tile as they are read from memory, without a panel.
///
/// # Panics
/// Unless [`streams`].
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")]
pub(super) fn stream(rows: &Rows, bits: usize, words: &[u32], finish: &mut impl Finish) {
    match (rows.limbs, bits) {
        (Limbs::Three, 2) => stream_codes::<_, 3, 2>(rows, words, finish),
        (Limbs::Three, 3) => stream_codes::<_, 3, 3>(rows, words, finish),
        (Limbs::Three, 4) => stream_codes::<_, 3, 4>(rows, words, finish),
        (Limbs::Three, _) => stream_codes::<_, 3, 8>(rows, words, finish),
        (Limbs::Two, 2) => stream_codes::<_, 2, 2>(rows, words, finish),
        (Limbs::Two, 3) => stream_codes::<_, 2, 3>(rows, words, finish),
        (Limbs::Two, 4) => stream_codes::<_, 2, 4>(rows, words, finish),
        (Limbs::Two, _) => stream_codes::<_, 2, 8>(rows, words, finish),
    }
}

/// Multiplies `L` limbs of one row by codes of `BITS` bits.
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")]
fn stream_codes<F: Finish, const L: usize, const BITS: usize>(
    rows: &Rows,
    words: &[u32],
    finish: &mut F,
) {
    let codes = Codes::<BITS>::new();
    let step = rows.blocks.step();
    let (run, run_words) = (Codes::<BITS>::RUN, Codes::<BITS>::WORDS);
    assert!(streams(rows, BITS, words.len() / TILE));
    let n_runs = words.len() / (TILE * run_words);
    for block in 0..rows.blocks.n() {
        finish.prefetch(block + 2);
        let mut sums = [[_mm512_setzero_si512(); PARTS]; L];
        for s in rows.blocks.steps(block) {
            let x = &rows.bytes[rows.at(0, s)..][..L * step];
            let first = s * step / run;
            for at in first..n_runs.min(first + step / run) {
                let words = &words[at * run_words * TILE..][..run_words * TILE];
                for quad in 0..run / 4 {
                    let mut limbs = [_mm512_setzero_si512(); L];
                    for (l, limb) in limbs.iter_mut().enumerate() {
                        // SAFETY: a step of the row is `[L, step]` bytes.
                        let x = unsafe {
                            let at = l * step + (at - first) * run + quad * 4;
                            x.as_ptr().add(at).cast::<i32>().read_unaligned()
                        };
                        *limb = _mm512_set1_epi32(x);
                    }
                    for part in 0..PARTS {
                        // SAFETY: the words of the run are whole rows of a tile.
                        let codes = unsafe { codes.quad(words.as_ptr().add(part * PART), quad) };
                        for (limb, sums) in limbs.iter().zip(&mut sums) {
                            sums[part] = _mm512_dpbusd_epi32(sums[part], codes, *limb);
                        }
                    }
                }
                for line in words.chunks_exact(PART) {
                    const AHEAD: usize = 32 * TILE;
                    _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD).cast());
                }
            }
        }
        let of = rows.part(0, block);
        for part in 0..PARTS {
            let limbs: [__m512i; L] = std::array::from_fn(|l| sums[l][part]);
            // SAFETY: the processor has AVX-512.
            unsafe {
                let columns = finish.columns(block, part);
                let sums = join(limbs, F::center(columns), &of, 0);
                finish.take(0, part, columns, &[sums], &of.sums[..1]);
            }
        }
    }
    finish.rows_done(0..1);
}

/// The rows and blocks that [`few`] multiplies.
struct Place {
    strip: usize,
    row: usize,
    blocks: Range<usize>,
    /// The first step of the panel.
    first_step: usize,
}

/// Multiplies `R` rows by all columns, `C` parts at a time, and returns `R`.
///
/// # Safety
/// The processor has these instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn few<F: Finish, const L: usize, const R: usize, const C: usize>(
    rows: &Rows,
    panel: &Panel,
    at: Place,
    finish: &mut F,
) -> usize {
    let step = rows.blocks.step();
    let height = rows.height;
    for block in at.blocks {
        let of = rows.part(at.strip, block);
        for first in (0..PARTS).step_by(C) {
            let steps = rows.blocks.steps(block);
            let slab = Slab {
                a: &rows.bytes[rows.at(at.strip, steps.start)..],
                height,
                row: at.row,
                b: &panel.bytes[(steps.start - at.first_step) * panel.step_bytes()..],
                first,
                n_steps: steps.len(),
            };
            let sums: [[[__m512i; C]; L]; R] = match step {
                16 => slab.sums::<L, R, C, 16>(),
                32 => slab.sums::<L, R, C, 32>(),
                _ => slab.sums::<L, R, C, 64>(),
            };
            for (c, part) in (first..first + C).enumerate() {
                // SAFETY: the processor has AVX-512.
                unsafe {
                    let columns = finish.columns(block, part);
                    let joined: [__m512; R] = std::array::from_fn(|r| {
                        let limbs: [__m512i; L] = std::array::from_fn(|l| sums[r][l][c]);
                        join(limbs, F::center(columns), &of, at.row + r)
                    });
                    let row = at.strip * STRIP + at.row;
                    let values = &of.sums[at.row..at.row + R];
                    finish.take(row, part, columns, &joined, values);
                }
            }
        }
    }
    const { assert!(PARTS.is_multiple_of(C) && PART == 16) };
    R
}

/// The steps of a block of rows and of a panel.
struct Slab<'a> {
    /// `[n_steps, L, height, STEP]`.
    a: &'a [i8],
    height: usize,
    /// The first of the rows.
    row: usize,
    /// `[n_steps, PARTS, STEP / 4, 64]`.
    b: &'a [u8],
    /// The first of the parts.
    first: usize,
    n_steps: usize,
}

impl Slab<'_> {
    /// The sums of the limbs of `R` rows times `C` parts of the columns, in steps of `STEP` values.
    ///
    /// It is not inlined, so that the sums stay in registers.
    ///
    /// # Safety
    /// The processor has these instructions.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[expect(
        clippy::needless_range_loop,
        reason = "loops over three indices of the sums"
    )]
    fn sums<const L: usize, const R: usize, const C: usize, const STEP: usize>(
        &self,
    ) -> [[[__m512i; C]; L]; R] {
        let (a_step, b_step) = (L * self.height * STEP, STEP * TILE);
        assert!(self.n_steps * a_step <= self.a.len() && self.n_steps * b_step <= self.b.len());
        assert!(self.row + R <= self.height && self.first + C <= PARTS);
        let mut sums = [[[_mm512_setzero_si512(); C]; L]; R];
        for s in 0..self.n_steps {
            for quad in 0..STEP / 4 {
                // SAFETY: the step, the limb and the row lie within `a`, the parts within `b`, as was
                // checked.
                unsafe {
                    let a = self.a.as_ptr().add(s * a_step + self.row * STEP + quad * 4);
                    let b = self.b.as_ptr().add(s * b_step + quad * 64);
                    let codes: [__m512i; C] = std::array::from_fn(|c| {
                        let at = (self.first + c) * (STEP / 4) * 64;
                        _mm512_loadu_si512(b.add(at).cast())
                    });
                    for l in 0..L {
                        let a = a.add(l * self.height * STEP);
                        for r in 0..R {
                            let x = a.add(r * STEP).cast::<i32>().read_unaligned();
                            let x = _mm512_set1_epi32(x);
                            for c in 0..C {
                                let sum = &mut sums[r][l][c];
                                *sum = _mm512_dpbusd_epi32(*sum, codes[c], x);
                            }
                        }
                    }
                }
            }
        }
        sums
    }
}

/// Combines the sums of limbs, the lowest first, after subtracting `center` from each code.
///
/// The subtraction is exact: its whole numbers are below 2²⁴.
///
/// # Safety
/// The processor has these instructions.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn join<const L: usize>(
    limbs: [__m512i; L],
    center: __m512,
    of: &RowsPart<'_>,
    row: usize,
) -> __m512 {
    let limbs = std::array::from_fn(|l| {
        let sum = _mm512_set1_ps(of.limb_sums[l][row]);
        _mm512_fnmadd_ps(center, sum, _mm512_cvtepi32_ps(limbs[l]))
    });
    join_whole::<L>(limbs, of.scales[row])
}

/// Combines the sums of limbs, the lowest first.
///
/// # Safety
/// The processor has these instructions.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn join_whole<const L: usize>(limbs: [__m512; L], scale: f32) -> __m512 {
    let mut value = limbs[L - 1];
    for limb in limbs[..L - 1].iter().rev() {
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0), *limb);
    }
    _mm512_mul_ps(value, _mm512_set1_ps(scale))
}
