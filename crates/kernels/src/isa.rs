//! Loops that are compiled for several instruction sets, one of which is chosen at run time.
//!
//! All versions round in the same order, so their results have the same bits.

use crate::layout::{TABLE, TILE};

/// An instruction set, with the operations for which compilers emit slow code.
pub(crate) trait Isa {
    /// The entries of a table at `indices`, each below [`TABLE`].
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn lookup(table: &[f32; TABLE], indices: &[u32; TILE]) -> [f32; TILE];
}

/// Defines `$name` as `$body` compiled for AVX-512, for AVX2 and for the base of the target.
///
/// `$body` is `#[inline(always)]` and generic over an [`Isa`].
macro_rules! by_instruction_set {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                /// # Safety
                /// The processor has AVX-512.
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512($($arg: $ty),*) {
                    $body::<$crate::isa::Avx512>($($arg),*)
                }
                /// # Safety
                /// The processor has AVX2.
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) {
                    $body::<$crate::isa::Avx2>($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has these instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has these instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body::<$crate::isa::Portable>($($arg),*)
        }
    };
}
pub(crate) use by_instruction_set;

/// Every processor.
pub(crate) struct Portable;

impl Isa for Portable {
    /// # Safety
    /// None is needed.
    #[inline(always)]
    unsafe fn lookup(table: &[f32; TABLE], indices: &[u32; TILE]) -> [f32; TILE] {
        indices.map(|i| table[i as usize % TABLE])
    }
}

/// AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512 {
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn lookup(table: &[f32; TABLE], indices: &[u32; TILE]) -> [f32; TILE] {
        use std::arch::x86_64::*;

        /// # Safety
        /// The processor has AVX-512.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn lookup(table: &[f32; TABLE], indices: &[u32; TILE]) -> [f32; TILE] {
            let mut out = [0.0; TILE];
            for (out, indices) in out.chunks_exact_mut(16).zip(indices.chunks_exact(16)) {
                // SAFETY: the table and each chunk have 16 elements.
                unsafe {
                    let table = _mm512_loadu_ps(table.as_ptr());
                    let indices = _mm512_loadu_si512(indices.as_ptr().cast());
                    _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(indices, table));
                }
            }
            out
        }
        // SAFETY: the caller's promise.
        unsafe { lookup(table, indices) }
    }
}

/// AVX2.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Isa for Avx2 {
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn lookup(table: &[f32; TABLE], indices: &[u32; TILE]) -> [f32; TILE] {
        use std::arch::x86_64::*;

        /// # Safety
        /// The processor has AVX2.
        #[inline]
        #[target_feature(enable = "avx2")]
        fn lookup(table: &[f32; TABLE], indices: &[u32; TILE]) -> [f32; TILE] {
            let mut out = [0.0; TILE];
            for (out, indices) in out.chunks_exact_mut(8).zip(indices.chunks_exact(8)) {
                // SAFETY: the table has 16 elements and each chunk 8. The permutation uses the low
                // three bits of an index; the fourth, shifted to the sign, selects the half.
                unsafe {
                    let low = _mm256_loadu_ps(table.as_ptr());
                    let high = _mm256_loadu_ps(table.as_ptr().add(8));
                    let indices = _mm256_loadu_si256(indices.as_ptr().cast());
                    let low = _mm256_permutevar8x32_ps(low, indices);
                    let high = _mm256_permutevar8x32_ps(high, indices);
                    let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(low, high, half));
                }
            }
            out
        }
        // SAFETY: the caller's promise.
        unsafe { lookup(table, indices) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_looks_up_the_same() {
        let table = std::array::from_fn(|i| i as f32 * 1.5 - 7.0);
        let indices = std::array::from_fn(|j| (j as u32 * 7 + 3) % 16);
        // SAFETY: none is needed.
        let expected = unsafe { Portable::lookup(&table, &indices) };
        assert_eq!(expected[1], table[10]);
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2 or AVX-512, as was just detected.
                assert_eq!(unsafe { Avx2::lookup(&table, &indices) }, expected);
            }
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the processor has AVX2 or AVX-512, as was just detected.
                assert_eq!(unsafe { Avx512::lookup(&table, &indices) }, expected);
            }
        }
    }
}
