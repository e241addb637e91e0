//! Vectors of AVX-512.

use std::arch::x86_64::*;

use crate::layout::TILE;

/// The number of columns in a vector of 32-bit integers.
pub(super) const PART: usize = 16;
/// The number of such parts in a tile of columns.
pub(super) const PARTS: usize = TILE / PART;

/// The vector with byte `of(at)` at each position `at`.
///
/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f")]
pub(super) fn bytes(of: impl Fn(usize) -> u8) -> __m512i {
    let bytes: [u8; 64] = std::array::from_fn(of);
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Transposes a matrix of 16 by 16 32-bit integers.
///
/// # Safety
/// The processor has these instructions.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(from: &[[i8; 64]], to: &mut [u8; 64 * PART]) {
    assert_eq!(from.len(), PART);
    // SAFETY: 64 bytes each.
    let row = |i: usize| unsafe { _mm512_loadu_si512(from[i].as_ptr().cast()) };
    // Each 128-bit lane holds 4 columns: first of pairs of rows, then of fours.
    let mut pairs = [_mm512_setzero_si512(); PART];
    for i in (0..PART).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(row(i), row(i + 1));
        pairs[i + 1] = _mm512_unpackhi_epi32(row(i), row(i + 1));
    }
    // `fours[4 * f + c]`: rows `4 * f ..` in columns `c`, `c + 4`, `c + 8` and `c + 12`.
    let mut fours = [_mm512_setzero_si512(); PART];
    for f in 0..4 {
        for half in 0..2 {
            let (a, b) = (pairs[4 * f + half], pairs[4 * f + 2 + half]);
            fours[4 * f + 2 * half] = _mm512_unpacklo_epi64(a, b);
            fours[4 * f + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    for c in 0..4 {
        let (a, b) = (fours[c], fours[4 + c]);
        let (d, e) = (fours[8 + c], fours[12 + c]);
        let (low, high) = (
            _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b),
            _mm512_shuffle_i32x4::<0b01_00_01_00>(d, e),
        );
        let columns = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(low, high),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(low, high),
        ];
        let (low, high) = (
            _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b),
            _mm512_shuffle_i32x4::<0b11_10_11_10>(d, e),
        );
        let more = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(low, high),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(low, high),
        ];
        for (lane, column) in columns.into_iter().chain(more).enumerate() {
            let to = &mut to[(4 * lane + c) * 64..][..64];
            // SAFETY: 64 bytes.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), column) };
        }
    }
}
