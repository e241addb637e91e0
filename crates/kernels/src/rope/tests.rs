//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::Flex;
use burn::tensor::Tensor;
use proptest::prelude::*;

use super::{RopeOps, composed, rotate_half};
use crate::testing::*;

type Case = (Tensor<4>, Tensor<2>, Tensor<2>, Tensor<4>);

/// `x`, tables with different halves, and the gradient of the result.
fn cases() -> impl Strategy<Value = Case> {
    (1..4usize, 1..40usize, 1..5usize, 1..37usize, any::<u64>()).prop_map(
        |(batch, seq, heads, half, seed)| {
            let mut random = Random::new(seed);
            let shape = [batch, seq, heads, 2 * half];
            let mut table = || random.tensor([seq, 2 * half]);
            let (cos, sin) = (table(), table());
            (random.tensor(shape), cos, sin, random.tensor(shape))
        },
    )
}

fn reference(x: &[f64], cos: &[f32], sin: &[f32], [_, seq, heads, dim]: [usize; 4]) -> Vec<f64> {
    let half = dim / 2;
    let value = |at: usize| {
        let (i, row) = (at % dim, at / dim / heads % seq * dim);
        let turned = if i < half {
            -x[at + half]
        } else {
            x[at - half]
        };
        x[at] * f64::from(cos[row + i]) + turned * f64::from(sin[row + i])
    };
    (0..x.len()).map(value).collect()
}

proptest! {
    #![proptest_config(cases_of(64))]

    #[test]
    fn values_are_the_formula((x, cos, sin, _) in cases()) {
        let expected = reference(&doubles(&values(&x)), &values(&cos), &values(&sin), x.dims());
        let [x, cos, sin] = [primitive(&x), primitive(&cos), primitive(&sin)];
        let composed = composed::rotate_half::<Flex>(x.clone(), cos.clone(), sin.clone());
        for y in [Flex::rotate_half(x, cos, sin), composed] {
            assert_close(&primitive_values(y), &expected, 1e-6);
        }
    }

    /// `Σ dy R x = Σ x Rᵀ dy` for each `x`: column by column of `R`.
    #[test]
    fn backward_is_the_transpose((x, cos, sin, dy) in cases()) {
        let dims = x.dims();
        let leaf = leaf(&x.swap_dims(1, 2));
        let y = rotate_half(leaf.clone().swap_dims(1, 2), cos.clone(), sin.clone());
        let grads = (y * dy.clone().autodiff()).sum().backward();
        let found = values(&leaf.grad(&grads).unwrap().swap_dims(1, 2));
        let (cos, sin, dy) = (values(&cos), values(&sin), doubles(&values(&dy)));
        let mut unit = vec![0.0; found.len()];
        for at in (0..found.len()).step_by(found.len().div_ceil(20)) {
            unit[at] = 1.0;
            let column = reference(&unit, &cos, &sin, dims);
            let expected: f64 = column.iter().zip(&dy).map(|(c, dy)| c * dy).sum();
            unit[at] = 0.0;
            assert_close(&[found[at]], &[expected], 1e-6);
        }
    }
}

#[test]
fn a_rotation_keeps_the_norm_and_its_transpose_inverts_it() {
    let x = Random::new(4).tensor([2, 9, 3, 16]);
    let angles: Vec<f32> = (0..9 * 16)
        .map(|at| (at / 16) as f32 / (1 + at % 8) as f32)
        .collect();
    let angles = tensor(&angles, [9, 16]);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let leaf = leaf(&x);
    let y = rotate_half(leaf.clone(), cos, sin);
    let grads = y.clone().powi_scalar(2).sum().backward();
    // The gradient of |R x|² is 2 Rᵀ R x = 2 x.
    let expected: Vec<f64> = doubles(&values(&x)).iter().map(|x| 2.0 * x).collect();
    assert_close(&values(&leaf.grad(&grads).unwrap()), &expected, 1e-6);
}

#[test]
fn other_dtypes_take_the_composed_operation() {
    let mut random = Random::new(5);
    let x = random.tensor([2, 5, 3, 6]);
    let (cos, sin) = (random.tensor([5, 6]), random.tensor([5, 6]));
    let y = rotate_half(wide(&x), wide(&cos), wide(&sin));
    let expected = reference(
        &doubles(&values(&x)),
        &values(&cos),
        &values(&sin),
        x.dims(),
    );
    assert_close(&wide_values(y), &expected, 1e-15);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut random = Random::new(6);
    let x = primitive(&random.tensor([3, 55, 3, 10]));
    let (cos, sin) = (
        primitive(&random.tensor([55, 10])),
        primitive(&random.tensor([55, 10])),
    );
    assert_same_on_any_threads(|| {
        let y = Flex::rotate_half(x.clone(), cos.clone(), sin.clone());
        vec![primitive_values(y)]
    });
}
