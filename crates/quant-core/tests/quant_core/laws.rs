//! Laws of every quantizer.

use burn::tensor::Device;
use proptest::prelude::*;
use quant_core::{Error, Parts, QuantTensor, StoredGrid};

use crate::cases::{Method, any_cases, scales, tensor, values};

proptest! {
    #[test]
    fn parts_are_the_tensor(case in any_cases()) {
        let packed = case.quantize();
        let parts = packed.to_parts();
        let again =
            QuantTensor::from_parts(parts.clone(), packed.format(), case.dims, &Device::flex()).unwrap();
        prop_assert_eq!(again.to_parts(), parts);
        prop_assert_eq!(again.codes(), packed.codes());
        // Files have no padding.
        let columns = Parts::from_columns(&packed.columns(), &packed.layout(), vec![], None).unwrap();
        prop_assert_eq!(columns.words, packed.to_parts().words);
        prop_assert_eq!(values(again.dequantize()), values(packed.dequantize()));
    }

    /// The dense weight is that of the codes, scales and zeros, bit for bit; the product with the
    /// packed weight is that with the dense one.
    #[test]
    fn a_weight_is_its_codes_scales_and_zeros(case in any_cases(), rows in 1..4usize) {
        let packed = case.quantize();
        let [d_in, d_out] = case.dims;
        let (codes, scales, layout) = (packed.codes(), scales(&packed), packed.layout());
        let zeros = packed.zeros().map(values);
        let mut row_of = (0..d_in).collect::<Vec<_>>();
        for (row, input) in packed.input_order().unwrap_or_default().into_iter().enumerate() {
            row_of[input as usize] = row;
        }
        for (at, found) in values(packed.dequantize()).into_iter().enumerate() {
            let grid = row_of[at / d_out] / layout.group_size() * d_out + at % d_out;
            let zero = zeros.as_ref().map_or(0.0, |zeros| zeros[grid]);
            let expected = (layout.level(codes[at]) - zero) * scales[grid];
            prop_assert_eq!(found.to_bits(), expected.to_bits());
        }
        let x: Vec<f32> = (0..rows * d_in).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let x = tensor(x, [rows, d_in]);
        let dense = packed.dequantize();
        let magnitude = values(x.clone().abs().matmul(dense.clone().abs()));
        let expected = values(x.clone().matmul(dense));
        let found = values(packed.matmul(x));
        for ((found, expected), magnitude) in found.iter().zip(&expected).zip(&magnitude) {
            prop_assert!((found - expected).abs() <= 1e-5 * magnitude);
        }
        let n_bytes = packed.format().n_bytes(case.dims).unwrap() as usize;
        let order = if packed.input_order().is_some() { 8 * d_in } else { 0 };
        prop_assert_eq!(packed.n_bytes(), n_bytes + order);
    }

    /// On the same codes, the nearest scales and zeros that a format holds; nothing changes twice, and
    /// nothing where the format holds them.
    #[test]
    fn a_grid_is_rounded_to_what_a_format_holds(
        case in any_cases(),
        f16 in any::<bool>(),
        least in prop::option::of(0..2u8),
        [factor, shift] in [0.5..2.0f32, -1.0..1.0f32],
    ) {
        let packed = case.quantize();
        let stored = StoredGrid::new().with_f16_scales(f16).with_whole_zeros_from(least);
        prop_assert!(StoredGrid::new().holds(&packed));
        let double = packed.double_scales().is_some();
        let moved = match double {
            true => packed.clone(),
            false => {
                let zeros = packed.zeros().map(|zeros| zeros + shift);
                packed.clone().with_grid(packed.scales() * factor, zeros).unwrap()
            }
        };
        // Some weights of the cases reach 1e4, whose scales are far below the largest f16.
        let rounded = moved.clone().rounded_to(stored).unwrap();
        prop_assert!(stored.holds(&rounded));
        prop_assert_eq!(rounded.clone().rounded_to(stored).unwrap().to_parts(), rounded.to_parts());
        prop_assert_eq!(rounded.codes(), moved.codes());
        prop_assert_eq!(rounded.format(), moved.format());
        if stored.holds(&moved) {
            prop_assert_eq!(rounded.to_parts(), moved.to_parts());
        }
        for (found, scale) in scales(&rounded).into_iter().zip(scales(&moved)) {
            let step = if f16 && !double { (scale * 2f32.powi(-11)).max(2f32.powi(-25)) } else { 0.0 };
            prop_assert!((found - scale).abs() <= step, "{} {}", found, scale);
        }
        let zeros = |of: &QuantTensor| of.zeros().map(values).unwrap_or_default();
        let highest = ((1 << packed.format().bits()) - 1) as f32;
        for (found, zero) in zeros(&rounded).into_iter().zip(zeros(&moved)) {
            match least.map(f32::from) {
                None => prop_assert_eq!(found, zero),
                Some(least) => {
                    prop_assert!(found.fract() == 0.0 && (least..=highest).contains(&found));
                    prop_assert!((found - zero.clamp(least, highest)).abs() <= 0.5);
                }
            }
        }
    }

    /// On the same codes, with minimums `-s z` in `f16`: each is the nearest, and nothing changes twice.
    #[test]
    fn minimums_are_rounded_to_f16(case in any_cases(), factor in 0.5..2.0f32, shift in -1.0..1.0f32) {
        let packed = case.quantize();
        prop_assume!(packed.double_scales().is_none());
        let zeros = packed.zeros().map(|zeros| zeros + shift);
        let moved = packed.clone().with_grid(packed.scales() * factor, zeros).unwrap();
        let stored = StoredGrid::new().with_f16_scales(true).with_f16_minimums(true);
        let rounded = moved.clone().rounded_to(stored).unwrap();
        prop_assert!(stored.holds(&rounded));
        prop_assert_eq!(rounded.clone().rounded_to(stored).unwrap().to_parts(), rounded.to_parts());
        prop_assert_eq!(rounded.codes(), moved.codes());
        let minimums = |of: &QuantTensor| {
            let zeros = of.zeros().map(values).unwrap_or_default().into_iter();
            let minimums = zeros.zip(scales(of)).map(|(zero, scale)| -zero * scale);
            minimums.collect::<Vec<_>>()
        };
        for (found, exact) in minimums(&rounded).into_iter().zip(minimums(&moved)) {
            let step = (exact.abs() * 2f32.powi(-11)).max(2f32.powi(-25));
            prop_assert!((found - exact).abs() <= step * 1.001, "{found} {exact}");
        }
    }

    #[test]
    fn non_finite_weights_are_refused(
        case in any_cases(),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let mut case = case;
        let at = at.index(case.weight.len());
        case.weight[at] = bad;
        let d_out = case.dims[1];
        let weight = tensor(case.weight.clone(), case.dims);
        let error = case.method.get().quantize(weight, Some(&case.gram)).unwrap_err();
        let found = matches!(error, Error::NonFinite { row, column, count: 1, .. }
            if [row, column] == [at / d_out, at % d_out]);
        prop_assert!(found, "{error}");
    }

    /// Zero is a level of every grid, of groups of one sign and with outliers too; for OPTQ, whose
    /// weights do not stay zero, see `optq.rs`. A scale of a group of one weight is that weight, which some of
    /// the quantizers round to `f16`.
    #[test]
    fn zero_is_a_level(case in any_cases(), outlier in 1e3..6e4f32) {
        for hard in case.hard(outlier) {
            let packed = hard.quantize();
            for (found, w) in values(packed.dequantize()).iter().zip(&hard.weight) {
                prop_assert!(found.is_finite());
                let rounds_each = !matches!(case.method, Method::Optq(_));
                prop_assert!(!rounds_each || *w != 0.0 || *found == 0.0, "zero became {found}");
            }
        }
    }
}
