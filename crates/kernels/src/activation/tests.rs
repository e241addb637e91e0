//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::Flex;
use proptest::prelude::*;

use super::{GateOps, composed, silu_mul};
use crate::testing::*;

/// `silu(gate)`, its derivative, and the magnitude of the terms of the derivative.
fn reference(gate: f32) -> [f64; 3] {
    let gate = f64::from(gate);
    let s = 1.0 / (1.0 + (-gate).exp());
    let slope = s * (1.0 + gate * (1.0 - s));
    [gate * s, slope, s * (1.0 + gate.abs())]
}

proptest! {
    #[test]
    fn values_and_gradients_are_the_formula(n in 1..70usize, seed: u64) {
        let mut random = Random::new(seed);
        // Also more elements than a task has.
        let shape = [n, 257];
        let len = n * 257;
        let gate = random.floats(len, -60.0, 60.0);
        let (up, dy) = (random.floats(len, -2.0, 2.0), random.floats(len, -2.0, 2.0));
        let (gate_t, up_t, dy_t) = (tensor(&gate, shape), tensor(&up, shape), tensor(&dy, shape));
        let (g, u, d) = (primitive(&gate_t), primitive(&up_t), primitive(&dy_t));
        let near = |found: f32, expected: f64, magnitude: f64| {
            (f64::from(found) - expected).abs() <= 1e-6 * magnitude.abs() + 1e-37
        };

        let native = Flex::silu_mul(g.clone(), u.clone());
        let reference_y = composed::silu_mul::<Flex>(g.clone(), u.clone());
        for y in [native, reference_y].map(primitive_values) {
            for i in 0..len {
                let expected = reference(gate[i])[0] * f64::from(up[i]);
                prop_assert!(near(y[i], expected, expected), "{} for {expected}", y[i]);
            }
        }
        let native = Flex::silu_mul_backward(g.clone(), u.clone(), d.clone());
        let reference_d = composed::silu_mul_backward::<Flex>(g, u, d);
        for (dgate, dup) in [native, reference_d] {
            let (dgate, dup) = (primitive_values(dgate), primitive_values(dup));
            for i in 0..len {
                let [silu, slope, magnitude] = reference(gate[i]);
                let (up, dy) = (f64::from(up[i]), f64::from(dy[i]));
                prop_assert!(near(dgate[i], slope * up * dy, magnitude * up * dy));
                prop_assert!(near(dup[i], silu * dy, silu * dy));
            }
        }
    }

    /// Through `Tensor`, with a view as input, and with one or both parents tracked.
    #[test]
    fn backward_gives_the_gradients_of_each_parent(n in 1..40usize, m in 1..40usize, seed: u64) {
        let mut random = Random::new(seed);
        let (gate, up, dy) = (random.tensor([m, n]), random.tensor([n, m]), random.tensor([n, m]));
        let of = |gate: bool, up: bool| [gate, up];
        for tracked in [of(true, true), of(true, false), of(false, true)] {
            let lift = |t: &burn::tensor::Tensor<2>, tracked| if tracked { leaf(t) } else { t.clone() };
            let (tg, tu) = (lift(&gate, tracked[0]), lift(&up, tracked[1]));
            let y = silu_mul(tg.clone().transpose(), tu.clone());
            let grads = (y * dy.clone().autodiff()).sum().backward();
            let (dgate, dup) = Flex::silu_mul_backward(
                primitive(&gate.clone().transpose()),
                primitive(&up),
                primitive(&dy),
            );
            if tracked[0] {
                let found = tg.grad(&grads).unwrap().transpose();
                prop_assert_eq!(bits(&values(&found)), bits(&primitive_values(dgate)));
            }
            if tracked[1] {
                let found = tu.grad(&grads).unwrap();
                prop_assert_eq!(bits(&values(&found)), bits(&primitive_values(dup)));
            }
        }
    }
}

#[test]
fn gradients_agree_with_differences() {
    let mut random = Random::new(3);
    let (gate, up, dy) = (
        random.floats(30, -3.0, 3.0),
        random.floats(30, -1.0, 1.0),
        random.floats(30, -1.0, 1.0),
    );
    let loss = |gate: &[f64], up: &[f64]| -> f64 {
        let silu = gate.iter().map(|g| g / (1.0 + (-g).exp()));
        let y = silu.zip(up).map(|(silu, up)| silu * up);
        y.zip(&dy).map(|(y, &dy)| y * f64::from(dy)).sum()
    };
    let shape = [30];
    let (dgate, dup) = Flex::silu_mul_backward(
        primitive(&tensor(&gate, shape)),
        primitive(&tensor(&up, shape)),
        primitive(&tensor(&dy, shape)),
    );
    let expected = slopes(&gate, |gate| loss(gate, &doubles(&up)));
    assert_close(&primitive_values(dgate), &expected, 1e-6);
    let expected = slopes(&up, |up| loss(&doubles(&gate), up));
    assert_close(&primitive_values(dup), &expected, 1e-6);
}

#[test]
fn saturated_gates_are_exact() {
    let gate = tensor(&[-1e30, -200.0, -0.0, 0.0, 200.0, 1e30], [6]);
    let y = silu_mul(gate.clone(), gate.ones_like());
    assert_eq!(values(&y), [0.0, 0.0, 0.0, 0.0, 200.0, 1e30]);
}

#[test]
fn other_dtypes_take_the_composed_operations() {
    let mut random = Random::new(4);
    let (gate, up) = (random.tensor([3, 50]) * 4.0, random.tensor([3, 50]));
    let (tg, tu) = (leaf(&wide(&gate)), leaf(&wide(&up)));
    let y = silu_mul(tg.clone(), tu.clone());
    let grads = y.clone().sum().backward();
    let (gate, up) = (values(&gate), doubles(&values(&up)));
    let of = |f: &dyn Fn([f64; 3], f64) -> f64| -> Vec<f64> {
        let pairs = gate.iter().zip(&up);
        pairs.map(|(&gate, &up)| f(reference(gate), up)).collect()
    };
    assert_close(
        &wide_values(y.inner()),
        &of(&|[silu, ..], up| silu * up),
        1e-14,
    );
    let dgate = wide_values(tg.grad(&grads).unwrap());
    assert_close(&dgate, &of(&|[_, slope, _], up| slope * up), 1e-14);
    let dup = wide_values(tu.grad(&grads).unwrap());
    assert_close(&dup, &of(&|[silu, ..], _| silu), 1e-14);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut random = Random::new(5);
    let [gate, up, dy] = [(); 3].map(|()| primitive(&random.tensor([100_003])));
    assert_same_on_any_threads(|| {
        let y = Flex::silu_mul(gate.clone(), up.clone());
        let (dgate, dup) = Flex::silu_mul_backward(gate.clone(), up.clone(), dy.clone());
        [y, dgate, dup].map(primitive_values).to_vec()
    });
}
