//! The other operations of a training step: values and gradients, compared with those of the composed
//! operations on the CPU in `F64`.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use kernels::{
    AdamwStep, Mask, OutputHead, Scores, adamw, attention, linear_cross_entropy, matmul, rms_norm,
    rotate_half, silu_mul, softcap,
};

use super::on::{Kind, On, Uniform, values};

/// From leaves to a result; constants are made on the device of the leaves.
pub(super) type Operation = fn(&[Tensor<4>]) -> Tensor<4>;

/// The name of an operation, the shapes of its leaves, and the operation.
pub(super) type Case<'a> = (&'a str, &'a [[usize; 4]], Operation);

/// Queries, keys and values: seven queries after two cached keys.
const TWO_CACHED: [[usize; 4]; 3] = [[2, 7, 4, 8], [2, 9, 2, 8], [2, 9, 2, 8]];

/// Queries, keys and values of more than a tile, with heads as the matrix units take them.
const WIDE: [[usize; 4]; 3] = [[2, 70, 4, 16], [2, 75, 2, 16], [2, 75, 2, 16]];

/// Seven queries of four keys.
const FEW_KEYS: [[usize; 4]; 3] = [[2, 7, 4, 8], [2, 4, 2, 8], [2, 4, 2, 8]];

fn attend(t: &[Tensor<4>], mask: Mask, scores: impl Into<Scores>) -> Tensor<4> {
    attention(t[0].clone(), t[1].clone(), t[2].clone(), mask, scores)
}

/// The same bounds for both sequences.
fn bounds(t: &[Tensor<4>], bounds: &[i64]) -> Tensor<2, Int> {
    let data = TensorData::new(bounds.repeat(2), [2, bounds.len()]);
    Tensor::from_data(data, &t[0].device().inner())
}

pub(super) fn conform(on: &On) {
    let all: [Case; 26] = [
        ("silu_mul", &[[2, 3, 5, 7], [2, 3, 5, 7]], |t| {
            silu_mul(t[0].clone(), t[1].clone())
        }),
        (
            "silu_mul of several cubes",
            &[[2, 3, 41, 36], [2, 3, 41, 36]],
            |t| silu_mul(t[0].clone(), t[1].clone()),
        ),
        ("rms_norm", &[[2, 3, 5, 36], [1, 1, 1, 36]], |t| {
            rms_norm(t[0].clone(), t[1].clone().reshape([36]), 1e-5)
        }),
        (
            "rms_norm of few values",
            &[[2, 3, 5, 7], [1, 1, 1, 7]],
            |t| rms_norm(t[0].clone(), t[1].clone().reshape([7]), 1e-5),
        ),
        (
            "rms_norm of more values than units read at a time",
            &[[1, 1, 3, 1100], [1, 1, 1, 1100]],
            |t| rms_norm(t[0].clone(), t[1].clone().reshape([1100]), 1e-5),
        ),
        ("rotate_half", &[[2, 6, 3, 8]], |t| {
            let (device, dtype) = (t[0].device().inner(), t[0].dtype());
            let table = |of: fn(f32) -> f32| {
                let values: Vec<f32> = (0..48).map(|at| of(at as f32 * 0.37)).collect();
                let data = TensorData::new(values, [6, 8]).convert_dtype(dtype);
                Tensor::<2>::from_data(data, (&device, dtype))
            };
            rotate_half(t[0].clone(), table(f32::cos), table(f32::sin))
        }),
        ("rotate_half of several cubes", &[[2, 40, 5, 6]], |t| {
            let (device, dtype) = (t[0].device().inner(), t[0].dtype());
            let table = |of: fn(f32) -> f32| {
                let values: Vec<f32> = (0..240).map(|at| of(at as f32 * 0.37)).collect();
                let data = TensorData::new(values, [40, 6]).convert_dtype(dtype);
                Tensor::<2>::from_data(data, (&device, dtype))
            };
            rotate_half(t[0].clone(), table(f32::cos), table(f32::sin))
        }),
        ("causal attention of more than a tile", &WIDE, |t| {
            attend(t, Mask::causal(), 0.25)
        }),
        // Segments of 20 tokens.
        (
            "causal attention over segments of more than a tile",
            &WIDE,
            |t| {
                let starts: Vec<i64> = (0..70).map(|query| (query + 5) / 20 * 20).collect();
                attend(t, Mask::causal().with_starts(bounds(t, &starts)), 0.25)
            },
        ),
        // Some ends are before their starts, and some bounds after the last key.
        (
            "attention of more than a tile to ranges of keys",
            &WIDE,
            |t| {
                let starts: Vec<i64> = (0..70).map(|query| query * 37 % 90).collect();
                let ends: Vec<i64> = (0..70).map(|query| query * 53 % 97).collect();
                let mask = Mask::full()
                    .with_starts(bounds(t, &starts))
                    .with_ends(bounds(t, &ends));
                attend(t, mask, 0.25)
            },
        ),
        (
            "causal attention of more than a tile with a soft cap",
            &WIDE,
            |t| attend(t, Mask::causal(), Scores::new(0.25).with_softcap(0.5)),
        ),
        // Two heads share the keys of one, after two cached keys.
        ("causal attention", &TWO_CACHED, |t| {
            attend(t, Mask::causal(), 0.35)
        }),
        // Packed segments of three tokens. The last start is after its query, which attends to its own
        // position.
        ("causal attention over segments", &TWO_CACHED, |t| {
            let mask = Mask::causal().with_starts(bounds(t, &[0, 3, 3, 3, 6, 6, 9]));
            attend(t, mask, 0.35)
        }),
        ("attention to all keys", &TWO_CACHED, |t| {
            attend(t, Mask::full(), 0.35)
        }),
        ("attention of more queries than keys", &FEW_KEYS, |t| {
            attend(t, Mask::full(), 0.35)
        }),
        // Some bounds are after the last key, and one end is before its start.
        ("attention to ranges of keys", &FEW_KEYS, |t| {
            let mask = Mask::full()
                .with_starts(bounds(t, &[0, 0, 2, 2, 4, 3, 9]))
                .with_ends(bounds(t, &[2, 1, 4, 3, 9, 0, 5]));
            attend(t, mask, 0.35)
        }),
        ("matmul", &[[2, 3, 5, 36], [1, 1, 36, 33]], |t| {
            matmul(t[0].clone(), t[1].clone().reshape([36, 33]))
        }),
        ("matmul of one row", &[[1, 1, 1, 70], [1, 1, 70, 33]], |t| {
            matmul(t[0].clone(), t[1].clone().reshape([70, 33]))
        }),
        // What trains is `F32` at rest; the reference stays in its own dtype.
        (
            "matmul with a trained weight",
            &[[2, 3, 5, 36], [1, 1, 36, 33]],
            |t| {
                let weight = t[1].clone().reshape([36, 33]);
                let weight = match weight.dtype() {
                    DType::F64 => weight,
                    _ => weight.cast(DType::F32),
                };
                matmul(t[0].clone(), weight)
            },
        ),
        // The gradient of a weight is of its dtype, whatever that of `x`.
        (
            "matmul with a weight at rest in another dtype",
            &[[2, 3, 5, 36], [1, 1, 36, 33]],
            |t| {
                let weight = t[1].clone().reshape([36, 33]);
                let weight = match weight.dtype() {
                    DType::BF16 => weight.cast(DType::F16),
                    _ => weight,
                };
                matmul(t[0].clone(), weight)
            },
        ),
        // Without a gradient of its own: what is compared is the parameter after two steps.
        ("adamw", &[[1, 2, 3, 1000]], |t| {
            let [_, a, b, c] = t[0].dims();
            // What trains is `F32`; the reference stays in its own dtype.
            let leaf = match t[0].dtype() {
                DType::F64 => t[0].clone(),
                _ => t[0].clone().cast(DType::F32),
            };
            let flat = leaf.clone().inner().reshape([a * b * c]);
            let mut value = flat.clone();
            let mut moments = [flat.zeros_like(), flat.zeros_like()];
            for time in 1..=2 {
                let step = AdamwStep {
                    learning_rate: 0.5,
                    kept: 0.5,
                    beta_1: 0.9,
                    beta_2: 0.99,
                    epsilon: 1e-3,
                    time,
                };
                let gradient = value.clone() * 0.5 + 0.25;
                (value, moments) = adamw(value, gradient, moments, step);
            }
            let value = Tensor::from_inner(value.reshape([1, a, b, c]));
            value + leaf * 0.0
        }),
        (
            "linear_cross_entropy",
            &[[1, 1, 6, 20], [1, 1, 20, 70]],
            |t| {
                let targets = Tensor::<1, Int>::arange(0..6, &t[0].device().inner()) * 11;
                let (x, head) = (
                    t[0].clone().reshape([6, 20]),
                    t[1].clone().reshape([20, 70]),
                );
                linear_cross_entropy(x, head, targets).reshape([1, 1, 1, 6])
            },
        ),
        ("causal attention with a soft cap", &TWO_CACHED, |t| {
            attend(t, Mask::causal(), Scores::new(0.35).with_softcap(0.5))
        }),
        ("attention of ranges with a soft cap", &FEW_KEYS, |t| {
            let mask = Mask::full().with_ends(bounds(t, &[4, 3, 2, 1, 4, 4, 2]));
            attend(t, mask, Scores::new(0.35).with_softcap(0.5))
        }),
        // Up to 50 times the cap, where quotients of exponentials overflow.
        ("softcap", &[[2, 3, 5, 7]], |t| {
            softcap(t[0].clone() * 100.0, 2.0)
        }),
        (
            "linear_cross_entropy with a bias and a soft cap",
            &[[1, 1, 6, 20], [1, 1, 20, 70], [1, 1, 1, 70]],
            |t| {
                let targets = Tensor::<1, Int>::arange(0..6, &t[0].device().inner()) * 11;
                let head = OutputHead::new(t[1].clone().reshape([20, 70]))
                    .with_bias(t[2].clone().reshape([70]))
                    .with_softcap(2.0);
                let x = t[0].clone().reshape([6, 20]);
                linear_cross_entropy(x, head, targets).reshape([1, 1, 1, 6])
            },
        ),
    ];
    check(on, &all);
    if on.dtype == DType::F16 && on.kind != Kind::CubeWithTf32 {
        on.case("the gradient of a weight", || {
            a_gradient_is_rounded_once(on)
        });
    }
}

/// The gradient of a weight in fewer bits than `x` is summed in those of `x`: in `F16`, the values of `x` are the
/// same, and their difference is lost.
fn a_gradient_is_rounded_once(on: &On) {
    let column = |values: [f32; 2]| {
        let data = TensorData::new(values.to_vec(), [2, 1]);
        Tensor::<2>::from_data(data, (&on.device, DType::F32)).autodiff()
    };
    let weight = on.tensor(&[0.5], [1, 1]).autodiff().require_grad();
    let y = matmul(column([1.0 + 1.0 / 4096.0, 1.0]), weight.clone());
    let gradients = (y * column([4096.0, -4096.0])).sum().backward();
    let found = values(weight.grad(&gradients).expect("a gradient"));
    assert_eq!(found, [1.0]);
}

/// Asserts that the results and gradients of the operations are those on the CPU in `F64`.
pub(super) fn check(on: &On, cases: &[Case]) {
    for (at, &(name, shapes, operation)) in cases.iter().enumerate() {
        on.case(name, || check_case(on, at as u64 + 1, shapes, operation));
    }
}

fn check_case(on: &On, seed: u64, shapes: &[[usize; 4]], operation: Operation) {
    let mut uniform = Uniform::new(seed);
    let inputs: Vec<Vec<f32>> = shapes
        .iter()
        .map(|shape| on.rounded(uniform.vec(shape.iter().product(), -1.0, 1.0)))
        .collect();
    let run = |device: &Device, dtype| results(device, dtype, &inputs, shapes, operation);
    let expected = run(&Device::flex(), DType::F64);
    let found = run(&on.device, on.dtype);
    for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        let largest = expected
            .iter()
            .fold(0.0f64, |most, value| most.max(value.abs()));
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs();
            assert!(
                error <= 2.0 * on.product_bound() * largest,
                "part {part}: {found} for {expected} at {at}, the largest {largest}",
            );
        }
    }
}

/// The result and the gradient of each input.
fn results(
    device: &Device,
    dtype: DType,
    inputs: &[Vec<f32>],
    shapes: &[[usize; 4]],
    operation: Operation,
) -> Vec<Vec<f64>> {
    let tensor = |values: &[f32], shape: [usize; 4]| {
        let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
        Tensor::<4>::from_data(data, (device, dtype)).autodiff()
    };
    let leaves: Vec<_> = inputs
        .iter()
        .zip(shapes)
        .map(|(values, shape)| tensor(values, *shape).require_grad())
        .collect();
    let y = operation(&leaves);
    let n = y.dims().iter().product::<usize>();
    let dy: Vec<f32> = (0..n).map(|at| (at % 5) as f32 - 1.5).collect();
    // Losses are wider than what they are of.
    let dy = tensor(&dy, y.dims()).cast(y.dtype());
    let grads = (y.clone() * dy).sum().backward();
    let values = |t: Tensor<4>| t.into_data().convert::<f64>().try_into_vec().unwrap();
    let gradients = leaves.iter().map(|leaf| values(leaf.grad(&grads).unwrap()));
    std::iter::once(values(y.inner()))
        .chain(gradients)
        .collect()
}
