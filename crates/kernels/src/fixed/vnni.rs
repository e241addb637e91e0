//! AVX-512's dot product of unsigned codes and signed limbs.

use std::arch::x86_64::*;
use std::ops::Range;

use super::panel::{PART, PARTS};
use super::{Finish, Limbs, Panel, Rows, STRIP};

/// See [`super::multiply`]. The panel has codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn multiply(rows: &Rows, blocks: Range<usize>, panel: &Panel, finish: &mut impl Finish) {
    match rows.limbs {
        Limbs::Two => multiply_limbs::<2>(rows, blocks, panel, finish),
        Limbs::Three => multiply_limbs::<3>(rows, blocks, panel, finish),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn multiply_limbs<const L: usize>(
    rows: &Rows,
    blocks: Range<usize>,
    panel: &Panel,
    finish: &mut impl Finish,
) {
    assert_eq!(panel.planes, 1, "a panel of codes");
    let first_step = rows.blocks.steps(blocks.start).start;
    for strip in 0..rows.n_strips() {
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
                1 => few::<L, 1, 4>(rows, panel, at, finish),
                2 | 3 => few::<L, 2, 2>(rows, panel, at, finish),
                _ => few::<L, 4, 2>(rows, panel, at, finish),
            };
            let first = strip * STRIP + row;
            finish.rows_done(first..first + taken);
            row += taken;
        }
    }
}

/// What is multiplied at a time.
struct Place {
    strip: usize,
    row: usize,
    blocks: Range<usize>,
    /// The step with which the panel begins.
    first_step: usize,
}

/// `R` rows with all columns, `C` parts at a time; returns `R`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn few<const L: usize, const R: usize, const C: usize>(
    rows: &Rows,
    panel: &Panel,
    at: Place,
    finish: &mut impl Finish,
) -> usize {
    let step = rows.blocks.step();
    let height = rows.height;
    for block in at.blocks {
        let scales = &rows.scales[(at.strip * rows.blocks.n() + block) * STRIP..][..STRIP];
        for first in (0..PARTS).step_by(C) {
            let mut sums = [[[_mm512_setzero_si512(); C]; L]; R];
            for s in rows.blocks.steps(block) {
                let a = &rows.bytes[rows.at(at.strip, s)..][..L * height * step];
                let b = &panel.bytes[(s - at.first_step) * panel.step_bytes()..];
                let b = &b[..panel.step_bytes()];
                for quad in 0..step / 4 {
                    let mut codes = [_mm512_setzero_si512(); C];
                    for (c, codes) in codes.iter_mut().enumerate() {
                        // SAFETY: `b` is a step of the panel, `[PARTS, step / 4, 64]`.
                        *codes = unsafe {
                            let at = ((first + c) * (step / 4) + quad) * 64;
                            _mm512_loadu_si512(b.as_ptr().add(at).cast())
                        };
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        for (l, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: `a` is a step of the strip, `[L, height, step]`.
                            let x = unsafe {
                                let at = (l * height + at.row + r) * step + quad * 4;
                                a.as_ptr().add(at).cast::<i32>().read_unaligned()
                            };
                            for (sum, codes) in sums.iter_mut().zip(codes) {
                                *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(x));
                            }
                        }
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for c in 0..C {
                    let row = at.row + r;
                    let mut limbs = [_mm512_setzero_si512(); L];
                    for (limb, sums) in limbs.iter_mut().zip(sums) {
                        *limb = sums[c];
                    }
                    let value = join(limbs, scales[row]);
                    // SAFETY: these instructions are there.
                    unsafe { finish.take(at.strip * STRIP + row, block, first + c, value) };
                }
            }
        }
    }
    const { assert!(PARTS.is_multiple_of(C) && PART == 16) };
    R
}

/// The value whose limbs' sums these are, lowest first.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn join<const L: usize>(limbs: [__m512i; L], scale: f32) -> __m512 {
    let mut value = _mm512_cvtepi32_ps(limbs[L - 1]);
    for limb in limbs[..L - 1].iter().rev() {
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(*limb));
    }
    _mm512_mul_ps(value, _mm512_set1_ps(scale))
}
