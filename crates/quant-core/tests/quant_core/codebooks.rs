//! Rounding to the nearest level of a codebook.

use proptest::prelude::*;
use quant_core::{Quantizer, ScaleLevels};

use crate::cases::{Method, codebook_cases, scales, tensor};

proptest! {
    /// The codes of a codebook are those of the nearest levels.
    #[test]
    fn codebooks_round_to_the_nearest_level(case in codebook_cases()) {
        let Method::NormalFloat(method) = case.method else { unreachable!() };
        let packed = case.quantize();
        // With bitsandbytes' double quantization the codes are those of the exact scales.
        let dynamic = packed.format().double_quant().is_some_and(|d| d.levels == ScaleLevels::Dynamic);
        let used = if dynamic {
            let weight = tensor(case.weight.clone(), case.dims);
            scales(&method.with_double_quant(None).quantize(weight, None).unwrap().weight)
        } else {
            scales(&packed)
        };
        let (layout, [_, d_out]) = (packed.layout(), case.dims);
        let levels: Vec<f64> = (0..1u8 << layout.bits()).map(|code| f64::from(layout.level(code))).collect();
        for (at, (&w, &code)) in case.weight.iter().zip(&packed.codes()).enumerate() {
            let scale = f64::from(used[at / d_out / layout.group_size() * d_out + at % d_out]);
            let error = |level: f64| (level * scale - f64::from(w)).abs();
            let least = levels.iter().map(|&level| error(level)).fold(f64::INFINITY, f64::min);
            let found = error(levels[usize::from(code)]);
            prop_assert!(found <= least + 1e-6 * scale.abs(), "{w} on {scale}");
        }
    }
}
