//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::Flex;
use burn::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::{NormOps, composed, rms_norm};
use crate::testing::*;

/// Of the magnitude of the means, so that it is not negligible.
const EPS: f64 = 0.1;

/// `Σ dy rms_norm(x)` and the normalized rows, in `f64`.
fn reference(x: &[f64], weight: &[f64], dy: &[f64]) -> (f64, Vec<f64>) {
    let d = weight.len();
    let y: Vec<f64> = x
        .chunks(d)
        .flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / d as f64;
            let r = 1.0 / (mean + EPS).sqrt();
            row.iter().zip(weight).map(move |(x, w)| x * r * w)
        })
        .collect();
    (y.iter().zip(dy).map(|(y, dy)| y * dy).sum(), y)
}

proptest! {
    #![proptest_config(cases_of(64))]

    #[test]
    fn values_and_gradients_are_those_of_f64(rows in 1..6usize, d in 1..40usize, seed: u64) {
        let mut random = Random::new(seed);
        let (x_t, w_t, dy_t) = (random.tensor([rows, d]), random.tensor([d]), random.tensor([rows, d]));
        let (x, w, dy) = (values(&x_t), values(&w_t), values(&dy_t));
        let (x_p, w_p, dy_p) = (primitive(&x_t), primitive(&w_t), primitive(&dy_t));
        let y = reference(&doubles(&x), &doubles(&w), &doubles(&dy)).1;
        let dx = slopes(&x, |x| reference(x, &doubles(&w), &doubles(&dy)).0);
        let dw = slopes(&w, |w| reference(&doubles(&x), w, &doubles(&dy)).0);
        let native = [
            Flex::rms_norm(x_p.clone(), w_p.clone(), EPS),
            Flex::rms_norm_dx(x_p.clone(), w_p.clone(), dy_p.clone(), EPS),
            Flex::rms_norm_dweight(x_p.clone(), dy_p.clone(), EPS, DType::F32),
        ];
        let reference = [
            composed::rms_norm::<Flex>(x_p.clone(), w_p.clone(), EPS),
            composed::dx::<Flex>(x_p.clone(), w_p, dy_p.clone(), EPS),
            composed::dweight::<Flex>(x_p, dy_p, EPS, DType::F32),
        ];
        for [found_y, found_dx, found_dw] in [native, reference] {
            assert_close(&primitive_values(found_y), &y, 1e-6);
            assert_close(&primitive_values(found_dx), &dx, 1e-5);
            assert_close(&primitive_values(found_dw), &dw, 1e-5);
        }
    }

    /// Through `Tensor`, with more rows than a task has, and with a view as input.
    #[test]
    fn backward_gives_the_gradients_of_each_parent(rows in 1..100usize, d in 1..90usize, seed: u64) {
        let mut random = Random::new(seed);
        let (x, w, dy) = (random.tensor([d, rows]), random.tensor([d]), random.tensor([rows, d]));
        let (tx, tw) = (leaf(&x), leaf(&w));
        let y = rms_norm(tx.clone().transpose().unsqueeze::<3>(), tw.clone(), EPS);
        let grads = (y * dy.clone().autodiff().unsqueeze()).sum().backward();
        let x = primitive(&x.transpose());
        let dx = composed::dx::<Flex>(x.clone(), primitive(&w), primitive(&dy), EPS);
        let found = values(&tx.grad(&grads).unwrap().transpose());
        assert_close(&found, &doubles(&primitive_values(dx)), 1e-5);
        let dw = composed::dweight::<Flex>(x, primitive(&dy), EPS, DType::F32);
        let found = values(&tw.grad(&grads).unwrap());
        assert_close(&found, &doubles(&primitive_values(dw)), 1e-5);
    }
}

#[test]
fn a_frozen_weight_gets_no_gradient() {
    let mut random = Random::new(1);
    let (x, w) = (leaf(&random.tensor([3, 8])), random.tensor([8]).autodiff());
    let grads = rms_norm(x.clone(), w.clone(), EPS).sum().backward();
    assert!(x.grad(&grads).is_some());
    assert!(w.grad(&grads).is_none());
}

#[test]
fn other_dtypes_take_the_composed_operations() {
    let mut random = Random::new(4);
    let (x, w) = (random.tensor([4, 9]), random.tensor([9]));
    let (tx, tw) = (leaf(&wide(&x)), leaf(&wide(&w)));
    let y = rms_norm(tx.clone(), tw.clone(), EPS);
    let grads = y.clone().sum().backward();
    let (x, w, dy) = (values(&x), values(&w), vec![1.0; 36]);
    let expected = reference(&doubles(&x), &doubles(&w), &dy).1;
    assert_close(&wide_values(y.inner()), &expected, 1e-14);
    let dx = slopes(&x, |x| reference(x, &doubles(&w), &dy).0);
    assert_close(&wide_values(tx.grad(&grads).unwrap()), &dx, 1e-7);
    let dw = slopes(&w, |w| reference(&doubles(&x), w, &dy).0);
    assert_close(&wide_values(tw.grad(&grads).unwrap()), &dw, 1e-7);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut random = Random::new(2);
    let (x, w) = (
        primitive(&random.tensor([333, 77])),
        primitive(&random.tensor([77])),
    );
    let dy = primitive(&random.tensor([333, 77]));
    assert_same_on_any_threads(|| {
        let y = Flex::rms_norm(x.clone(), w.clone(), EPS);
        let dx = Flex::rms_norm_dx(x.clone(), w.clone(), dy.clone(), EPS);
        let dw = Flex::rms_norm_dweight(x.clone(), dy.clone(), EPS, DType::F32);
        [y, dx, dw].map(primitive_values).to_vec()
    });
}

/// In 16 bits, squares and their sums are those of `f32`: in `f16`, the squares here are infinite.
#[test]
fn squares_do_not_overflow_in_16_bits() {
    let mut random = Random::new(4);
    for dtype in [DType::F16, DType::BF16] {
        let x = (random.tensor::<2>([3, 700]) * 600.0).cast(dtype);
        let weight = random.tensor::<1>([700]);
        let dy = random.tensor::<2>([3, 700]).cast(dtype);
        let in_f64 = |t: &Tensor<2>| primitive(&wide(t));
        let weight_f64 = primitive(&wide(&weight));
        let expected = [
            composed::rms_norm::<Flex>(in_f64(&x), weight_f64.clone(), EPS),
            composed::dx::<Flex>(in_f64(&x), weight_f64, in_f64(&dy), EPS),
            composed::dweight::<Flex>(in_f64(&x), in_f64(&dy), EPS, DType::F64),
        ];
        let (x, weight, dy) = (primitive(&x), primitive(&weight), primitive(&dy));
        let native = [
            Flex::rms_norm(x.clone(), weight.clone(), EPS),
            Flex::rms_norm_dx(x.clone(), weight.clone(), dy.clone(), EPS),
            Flex::rms_norm_dweight(x.clone(), dy.clone(), EPS, DType::F32),
        ];
        let others = [
            composed::rms_norm::<Flex>(x.clone(), weight.clone(), EPS),
            composed::dx::<Flex>(x.clone(), weight, dy.clone(), EPS),
            composed::dweight::<Flex>(x, dy, EPS, DType::F32),
        ];
        // One rounding.
        let bounds = match dtype {
            DType::F16 => [2f64.powi(-11), 2f64.powi(-11), 1e-5],
            _ => [2f64.powi(-8), 2f64.powi(-8), 1e-5],
        };
        for found in [native, others] {
            let dtypes = found.each_ref().map(|t| t.dtype());
            assert_eq!(dtypes, [dtype, dtype, DType::F32]);
            for ((found, expected), bound) in found.into_iter().zip(&expected).zip(bounds) {
                assert_within(found, expected, bound);
            }
        }
    }
}
