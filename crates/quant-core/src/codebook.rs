//! The levels of codebook grids.
//!
//! The constants are those of the published code of bitsandbytes and LoftQ, which differ from their
//! formulas by rounding.

use kernels::TABLE;

/// bitsandbytes' NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
const NF4: [f32; TABLE] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// `-1`, the negative quantiles, `0`, the positive ones, `1`, with the offset 0.9677083 of 4 bits.
const NF3: [f32; 8] = [
    -1.0,
    -0.478_629_17,
    -0.217_141_82,
    0.0,
    0.160_930_17,
    0.337_915_2,
    0.562_616_97,
    1.0,
];
const NF2: [f32; 4] = [-1.0, 0.0, 0.337_915_2, 1.0];

/// With the offset `1 - (1 / 2^(bits + 1) + 1 / (2^(bits + 1) - 2)) / 2` of 3 and of 2 bits.
const NF3_BY_BITS: [f32; 8] = [
    -1.0,
    -0.535_022_7,
    -0.246_931_43,
    0.0,
    0.183_337_48,
    0.381_993_95,
    0.622_985_7,
    1.0,
];
const NF2_BY_BITS: [f32; 4] = [-1.0, 0.0, 0.435_818_17, 1.0];

/// bitsandbytes' FP4 in its order of codes: twelfths, the sign in the highest bit.
pub(crate) const FLOAT4: [f32; TABLE] = {
    let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut table = [0.0; TABLE];
    let mut k = 0;
    while k < 8 {
        table[k] = twelfths[k] / 12.0;
        // Positive zero: the weights of a group of zeros are positive zeros.
        table[k + 8] = 0.0 - table[k];
        k += 1;
    }
    table
};

/// The levels of a normal float of 2, 3 or 4 bits, in ascending order, in the first `2^bits` entries.
pub(crate) fn normal_float(bits: usize, by_bits: bool) -> [f32; TABLE] {
    let levels: &[f32] = match (bits, by_bits) {
        (2, false) => &NF2,
        (2, true) => &NF2_BY_BITS,
        (3, false) => &NF3,
        (3, true) => &NF3_BY_BITS,
        _ => &NF4,
    };
    let mut table = [0.0; TABLE];
    table[..levels.len()].copy_from_slice(levels);
    table
}

/// bitsandbytes' signed dynamic map of 8 bits: 0 and 1, and with both signs the centres of `2^e`
/// equal parts of 0.1 to 1, times `10^(e - 6)`, for `e` from 0 to 6.
pub(crate) fn dynamic_map() -> [f32; 256] {
    let centres = (0..7).flat_map(|e| decade(e, 1 << e));
    let mut levels = vec![0.0, 1.0];
    levels.extend(centres.flat_map(|level| [level, -level]));
    sorted(levels)
}

/// bitsandbytes' unsigned dynamic map of 8 bits, of twice as many parts, with 10⁻⁷ in the place of 0.
///
/// What is divided by the root of a value that became 0 would be boundless (Li et al. 2023,
/// arXiv:2309.01507, §4.1).
pub(crate) fn unsigned_dynamic_map() -> [f32; 256] {
    let centres = (0..7).flat_map(|e| decade(e, 2 << e));
    sorted([1e-7, 1.0].into_iter().chain(centres).collect())
}

/// The centres of `n_parts` equal parts of 0.1 to 1, times `10^(e - 6)`.
fn decade(e: i32, n_parts: i32) -> impl Iterator<Item = f32> {
    let magnitude = 10f64.powi(e - 6) as f32;
    // As torch.linspace: from the nearer end, with fused multiply-add.
    let step = (1.0f32 - 0.1) / n_parts as f32;
    let boundary = move |k: i32| {
        if k < (n_parts + 1) / 2 {
            step.mul_add(k as f32, 0.1)
        } else {
            step.mul_add((k - n_parts) as f32, 1.0)
        }
    };
    (0..n_parts).map(move |k| magnitude * ((boundary(k) + boundary(k + 1)) / 2.0))
}

fn sorted(mut levels: Vec<f32>) -> [f32; 256] {
    levels.sort_by(f32::total_cmp);
    levels.try_into().expect("two and twice 127 levels")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_positive_levels_of_nf3_are_levels_of_nf4() {
        for (k, index) in [(4, 9), (5, 11), (6, 13), (7, 15)] {
            assert!((NF3[k] - NF4[index]).abs() < 1e-7);
        }
        assert!(NF4.is_sorted());
    }

    #[test]
    fn the_dynamic_map_is_bitsandbytes() {
        let map = dynamic_map();
        assert_eq!(map[127], 0.0);
        assert_eq!(map[255], 1.0);
        assert_eq!(map[0], -0.992_968_74);
        assert_eq!(map.iter().filter(|&&level| level < 0.0).count(), 127);
        let map = unsigned_dynamic_map();
        assert_eq!((map[0], map[255]), (1e-7, 1.0));
        assert!((map[1] / 3.25e-7 - 1.0).abs() < 1e-6 && (map[254] - 0.996_484_4).abs() < 1e-6);
    }
}
