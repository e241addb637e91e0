//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::Flex;
use burn::tensor::DType;
use proptest::prelude::*;

use super::{Softcap, SoftcapOps, composed, softcap};
use crate::testing::*;

proptest! {
    #![proptest_config(cases_of(48))]

    #[test]
    fn values_and_gradients_are_those_of_f64(
        n in prop::sample::select(vec![1usize, 31, 70, 40_000]),
        cap in prop::sample::select(vec![0.5, 30.0, 1e4]),
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        // From values in the linear range to values at the cap.
        let x = random.tensor::<1>([n]) * (20.0 * cap);
        let x = x.clone() * random.tensor([n]).powi_scalar(4);
        let dy = random.tensor::<1>([n]);
        let [exact_x, exact_dy] = [&x, &dy].map(|t| doubles(&values(t)));
        let y: Vec<f64> = exact_x.iter().map(|x| cap * (x / cap).tanh()).collect();
        let slopes = exact_x.iter().map(|x| (x / cap).cosh().powi(-2));
        let dx: Vec<f64> = slopes.zip(&exact_dy).map(|(slope, dy)| slope * dy).collect();

        let leaf = leaf(&x);
        let found = softcap(leaf.clone(), cap);
        let gradients = (found.clone() * dy.clone().autodiff()).sum().backward();
        let native = [values(&found.inner()), values(&leaf.grad(&gradients).unwrap())];
        let cap = Softcap::new(cap);
        let of_composed = composed::softcap::<Flex>(primitive(&x), cap);
        let dx_of_composed =
            composed::softcap_backward::<Flex>(of_composed.clone(), primitive(&dy), cap);
        for found in [native, [of_composed, dx_of_composed].map(primitive_values)] {
            for (found, expected) in found[0].iter().zip(&y) {
                let error = (f64::from(*found) - expected).abs();
                prop_assert!(error <= 4e-7 * expected.abs(), "{found} for {expected}");
            }
            // The error of a slope is relative to the largest, 1.
            for ((found, expected), dy) in found[1].iter().zip(&dx).zip(&exact_dy) {
                let error = (f64::from(*found) - expected).abs();
                prop_assert!(error <= 1e-6 * dy.abs(), "{found} for {expected} of {dy}");
            }
        }
    }
}

/// Values of 16 bits are capped in `f32` and rounded once.
#[test]
fn values_of_16_bits_are_rounded_once() {
    let mut random = Random::new(3);
    for dtype in [DType::BF16, DType::F16] {
        let x = (random.tensor::<1>([300]) * 60.0).cast(dtype);
        let expected = softcap(x.clone().cast(DType::F32), 30.0).cast(dtype);
        for found in [
            Flex::softcap(primitive(&x), Softcap::new(30.0)),
            composed::softcap::<Flex>(primitive(&x), Softcap::new(30.0)),
        ] {
            assert_eq!(found.dtype(), dtype);
            assert_within(found, &primitive(&wide(&expected)), 2f64.powi(-9));
        }
    }
}

#[test]
fn other_dtypes_take_the_composed_operations() {
    let x = Random::new(4).tensor::<1>([50]) * 10.0;
    let expected: Vec<f64> = doubles(&values(&x))
        .iter()
        .map(|x| 3.0 * (x / 3.0).tanh())
        .collect();
    assert_close(&wide_values(softcap(wide(&x), 3.0)), &expected, 1e-15);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let x = Random::new(5).tensor::<1>([100_000]) * 3.0;
    assert_same_on_any_threads(|| vec![values(&softcap(x.clone(), 1.0))]);
}

#[test]
fn caps_are_positive_and_finite() {
    for cap in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-60] {
        let made = std::panic::catch_unwind(|| Softcap::new(cap));
        assert!(made.is_err(), "a cap of {cap}");
    }
}
