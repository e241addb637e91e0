//! The laws of every quantizer and format, over random weights.

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use proptest::prelude::*;
use quant_core::{Error, Grid, Parts, QuantTensor, Quantizer, Rtn};

/// A weight with the quantizer of one of the formats.
#[derive(Clone, Debug)]
struct Case {
    dims: [usize; 2],
    weight: Vec<f32>,
    rtn: Rtn,
}

fn cases() -> impl Strategy<Value = Case> {
    (1..80usize, 1..80usize)
        .prop_flat_map(|(d_in, d_out)| {
            let value = prop_oneof![
                8 => -1.0..1.0f32,
                1 => Just(0.0f32),
                1 => -1e4..1e4f32,
            ];
            let weight = prop::collection::vec(value, d_in * d_out);
            let bits = prop::sample::select(vec![2, 3, 4, 8]);
            (
                Just([d_in, d_out]),
                weight,
                bits,
                prop::option::of(1..=d_in),
                any::<bool>(),
            )
        })
        .prop_map(|(dims, weight, bits, group_size, symmetric)| Case {
            dims,
            weight,
            rtn: Rtn::new()
                .with_bits(bits)
                .with_group_size(group_size)
                .with_symmetric(symmetric),
        })
}

impl Case {
    fn tensor(&self) -> Tensor<2> {
        tensor(self.weight.clone(), self.dims)
    }

    fn quantize(&self) -> QuantTensor {
        self.rtn.quantize(self.tensor()).unwrap()
    }

    fn group_size(&self) -> usize {
        self.rtn
            .format()
            .unwrap()
            .group_size()
            .unwrap_or(self.dims[0])
    }
}

fn tensor(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

fn values(t: Tensor<2>) -> Vec<f32> {
    t.into_data().try_into_vec().unwrap()
}

proptest! {
    #[test]
    fn parts_are_the_tensor(case in cases()) {
        let packed = case.quantize();
        let parts = packed.to_parts();
        let again =
            QuantTensor::from_parts(parts.clone(), packed.format(), case.dims, &Device::flex()).unwrap();
        prop_assert_eq!(again.to_parts(), parts);
        prop_assert_eq!(again.codes(), packed.codes());
        prop_assert_eq!(values(again.dequantize()), values(packed.dequantize()));
    }

    /// Each value goes to the nearest level: half a step away, or beyond the end of the grid.
    #[test]
    fn rounding_is_to_the_nearest_level(case in cases()) {
        let packed = case.quantize();
        let parts = packed.to_parts();
        let bits = packed.format().bits();
        let max_code = f64::from((1u32 << bits) - 1);
        let [_, d_out] = case.dims;
        for (at, (&w, &found)) in case.weight.iter().zip(&values(packed.dequantize())).enumerate() {
            let grid = at / d_out / case.group_size() * d_out + at % d_out;
            let scale = f64::from(parts.scales[grid]);
            let zero = parts.zeros.as_ref().map_or(f64::from(1 << (bits - 1)), |z| f64::from(z[grid]));
            prop_assert!(scale > 0.0 && zero.fract() == 0.0 && (0.0..=max_code).contains(&zero));
            let nearest = f64::from(w).clamp(-zero * scale, (max_code - zero) * scale);
            let error = (nearest - f64::from(found)).abs();
            prop_assert!(error <= scale * 0.5001, "{w} became {found} on steps of {scale}");
        }
    }

    /// A group that takes both ends of its affine grid keeps its codes. (A symmetric grid's lowest
    /// level lies beyond the range that it was made from.)
    #[test]
    fn quantizing_again_changes_no_code(case in cases()) {
        let rtn = case.rtn.with_symmetric(false);
        let packed = rtn.quantize(case.tensor()).unwrap();
        let again = rtn.quantize(packed.dequantize()).unwrap();
        let (first, second) = (packed.to_parts(), again.to_parts());
        let zeros = first.zeros.unwrap();
        let [d_in, d_out] = case.dims;
        let max_code = ((1u16 << packed.format().bits()) - 1) as u8;
        let (codes, again) = (packed.codes(), again.codes());
        for (at, (&scale, &zero)) in first.scales.iter().zip(&zeros).enumerate() {
            let (g, o) = (at / d_out, at % d_out);
            let rows = g * case.group_size()..d_in.min((g + 1) * case.group_size());
            let column = |codes: &[u8]| rows.clone().map(|i| codes[i * d_out + o]).collect::<Vec<_>>();
            let group = column(&codes);
            let taken = |code| group.contains(&code) || zero == f32::from(code);
            if taken(0) && taken(max_code) {
                prop_assert_eq!(column(&again), group);
                prop_assert!((scale - second.scales[at]).abs() <= 1e-6 * scale);
            }
        }
    }

    #[test]
    fn a_power_of_two_scales_the_scales_alone(case in cases(), k in -6..6i32) {
        let factor = 2f32.powi(k);
        let first = case.quantize();
        let second = case.rtn.quantize(case.tensor() * factor).unwrap();
        let zero_group = |g: usize, o: usize| {
            let rows = g * case.group_size()..case.dims[0].min((g + 1) * case.group_size());
            rows.into_iter().all(|i| case.weight[i * case.dims[1] + o] == 0.0)
        };
        prop_assert_eq!(first.codes(), second.codes());
        let (first, second) = (first.to_parts(), second.to_parts());
        prop_assert_eq!(first.zeros, second.zeros);
        for (at, (a, b)) in first.scales.iter().zip(&second.scales).enumerate() {
            let factor = if zero_group(at / case.dims[1], at % case.dims[1]) { 1.0 } else { factor };
            prop_assert_eq!(a * factor, *b);
        }
    }

    /// Other values in one group of one column change nothing elsewhere.
    #[test]
    fn groups_and_columns_are_independent(case in cases(), at in any::<prop::sample::Index>()) {
        let at = at.index(case.weight.len());
        let [_, d_out] = case.dims;
        let same_group = |other: usize| {
            other % d_out == at % d_out
                && other / d_out / case.group_size() == at / d_out / case.group_size()
        };
        let mut other = case.clone();
        other.weight[at] = 1e3 - other.weight[at];
        let (first, second) = (values(case.quantize().dequantize()), values(other.quantize().dequantize()));
        for (at, (first, second)) in first.iter().zip(&second).enumerate() {
            prop_assert!(first == second || same_group(at));
        }
    }

    #[test]
    fn matmul_is_the_product_with_the_dense_weight(case in cases(), rows in 1..5usize) {
        let packed = case.quantize();
        let [d_in, _] = case.dims;
        let x: Vec<f32> = (0..rows * d_in).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let x = tensor(x, [rows, d_in]);
        let dense = packed.dequantize();
        let magnitude = values(x.clone().abs().matmul(dense.clone().abs()));
        let expected = values(x.clone().matmul(dense));
        let x: Tensor<3> = x.reshape([1, rows, d_in]);
        let found = values(packed.matmul(x).reshape([rows, case.dims[1]]));
        for ((found, expected), magnitude) in found.iter().zip(&expected).zip(&magnitude) {
            prop_assert!((found - expected).abs() <= 1e-5 * magnitude);
        }
    }

    #[test]
    fn non_finite_weights_are_refused(
        case in cases(),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let mut case = case;
        let at = at.index(case.weight.len());
        case.weight[at] = bad;
        let d_out = case.dims[1];
        let error = case.rtn.quantize(case.tensor()).unwrap_err();
        let found = matches!(error, Error::NonFinite { row, column, count: 1, .. }
            if [row, column] == [at / d_out, at % d_out]);
        prop_assert!(found, "{error}");
    }
}

/// Relative errors of methods.md §1.5 on Gaussian weights, within 1 %, and falling with the bits.
#[test]
fn gaussian_weights_have_the_known_errors() {
    let device = Device::flex();
    device.seed(11);
    let weight = Tensor::<2>::random([4096, 512], Distribution::Normal(0.0, 1.0), &device);
    let rows = [
        (Some(32), false, [0.4063, 0.1731, 0.0808, 0.00475]),
        (Some(64), false, [0.4571, 0.1952, 0.0911, 0.00536]),
        (Some(128), false, [0.5032, 0.2155, 0.1006, 0.00592]),
        (None, false, [0.6826, 0.2995, 0.1398, 0.00822]),
        (Some(64), true, [0.5109, 0.2203, 0.1028, 0.00605]),
        (Some(128), true, [0.5496, 0.2373, 0.1108, 0.00652]),
        (None, true, [0.7096, 0.3145, 0.1468, 0.00864]),
    ];
    for (group_size, symmetric, errors) in rows {
        for (bits, expected) in [2, 3, 4, 8].into_iter().zip(errors) {
            let rtn = Rtn::new()
                .with_bits(bits)
                .with_group_size(group_size)
                .with_symmetric(symmetric);
            let found = rtn
                .quantize(weight.clone())
                .unwrap()
                .distortion(weight.clone())
                .relative;
            let off = (found / expected - 1.0).abs();
            assert!(
                off < 0.01,
                "{}: {found}, not {expected}",
                rtn.format().unwrap()
            );
        }
    }
}

#[test]
fn groups_without_a_range_are_kept() {
    for symmetric in [false, true] {
        for value in [0.0, 1e-45, -3e-45, 1e-38, 3.0, -0.25, 1e30] {
            let rtn = Rtn::new()
                .with_bits(3)
                .with_group_size(2)
                .with_symmetric(symmetric);
            let packed = rtn.quantize(tensor(vec![value; 4], [4, 1])).unwrap();
            let scale = packed.to_parts().scales[0];
            let error = (values(packed.dequantize())[0] - value).abs();
            // The symmetric grid clips its largest positive value by half a step.
            assert!(
                scale > 0.0 && error <= scale * 0.5001,
                "{value}: {error} with {scale}"
            );
        }
    }
}

#[test]
fn a_span_beyond_f32_is_refused() {
    let weight = tensor(vec![-3e38, 3e38], [2, 1]);
    let error = Rtn::new().quantize(weight).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Span {
                group: 0,
                column: 0,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn formats_that_do_not_exist_are_refused() {
    let weight = || tensor(vec![1.0; 8], [8, 1]);
    for bits in [0, 1, 5, 6, 7, 9, 16, usize::MAX] {
        assert_eq!(
            Rtn::new().with_bits(bits).quantize(weight()).unwrap_err(),
            Error::Bits { bits }
        );
    }
    let error = Rtn::new()
        .with_group_size(0)
        .quantize(weight())
        .unwrap_err();
    assert_eq!(error, Error::EmptyGroup);
    let error = Rtn::new()
        .with_group_size(9)
        .quantize(weight())
        .unwrap_err();
    assert_eq!(
        error,
        Error::GroupSize {
            group_size: 9,
            d_in: 8
        }
    );
    let json = r#"{"bits":5,"group_size":null,"grid":"affine"}"#;
    assert!(serde_json::from_str::<quant_core::Format>(json).is_err());
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let packed = Rtn::new()
        .with_bits(3)
        .quantize(tensor(vec![1.0; 12], [6, 2]))
        .unwrap();
    let (format, parts) = (packed.format(), packed.to_parts());
    let make = |parts: Parts, dims| QuantTensor::from_parts(parts, format, dims, &Device::flex());
    assert!(make(parts.clone(), [6, 2]).is_ok());
    let length = |what, expected, found| Error::Length {
        what,
        expected,
        found,
    };
    let error = make(parts.clone(), [12, 2]).unwrap_err();
    assert_eq!(error, length("words", 4, 2));
    let error = make(
        Parts {
            scales: vec![1.0],
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert_eq!(error, length("scales", 2, 1));
    let error = make(
        Parts {
            zeros: None,
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert_eq!(
        error,
        Error::Zeros {
            grid: Grid::Affine,
            found: false
        }
    );
    let error = make(
        Parts {
            scales: vec![1.0, f32::NAN],
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert!(matches!(
        error,
        Error::NonFinite {
            what: "the scales",
            column: 1,
            ..
        }
    ));
    let error = make(parts, [usize::MAX, 2]).unwrap_err();
    assert!(matches!(error, Error::Size { .. }));
}
