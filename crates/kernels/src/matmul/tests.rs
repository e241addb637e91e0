use burn::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::matmul;
use crate::testing::{Random, assert_same_on_any_threads, bits, leaf, values};

const HALVES: [DType; 2] = [DType::BF16, DType::F16];

/// A weight whose values are those of a dtype, in `F32`; stored by columns if `transposed`.
fn weight(random: &mut Random, dims: [usize; 2], dtype: DType, transposed: bool) -> Tensor<2> {
    let [d_in, d_out] = dims;
    let dims = if transposed { [d_out, d_in] } else { dims };
    random.tensor::<2>(dims).cast(dtype).cast(DType::F32)
}

fn turned(weight: Tensor<2>, transposed: bool) -> Tensor<2> {
    if transposed {
        weight.transpose()
    } else {
        weight
    }
}

proptest! {
    #![proptest_config(crate::testing::cases_of(48))]
    /// At rest in 16 bits, a weight gives the bits that it gives in `F32`, forward and backward.
    #[test]
    fn the_dtype_at_rest_changes_no_bit(
        rows in 1..70usize,
        d_in in 1..200usize,
        d_out in 1..200usize,
        transposed: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        for dtype in HALVES {
            let wide = weight(&mut random, [d_in, d_out], dtype, transposed);
            let x = random.tensor([rows, d_in]);
            let run = |weight: Tensor<2>| {
                let x = leaf(&x);
                let y = matmul(x.clone(), turned(weight, transposed).autodiff());
                let gradients = y.clone().square().sum().backward();
                [values(&y.inner()), values(&x.grad(&gradients).unwrap())].map(|t| bits(&t))
            };
            prop_assert_eq!(run(wide.clone().cast(dtype)), run(wide));
        }
    }
}

/// Weights of several panels, of rows and columns that are no multiples of what a task takes.
#[test]
fn panels_change_no_bit() {
    let mut random = Random::new(3);
    for [rows, d_in, d_out] in [
        [1, 700, 3001],
        [2, 513, 4500],
        [2, 9000, 600],
        [5, 2500, 901],
        [300, 1800, 1300],
    ] {
        for transposed in [false, true] {
            let wide = weight(&mut random, [d_in, d_out], DType::BF16, transposed);
            let x = random.tensor([rows, d_in]);
            let run =
                |weight: Tensor<2>| bits(&values(&matmul(x.clone(), turned(weight, transposed))));
            assert!(
                run(wide.clone().cast(DType::BF16)) == run(wide),
                "{rows} {d_in} {d_out}"
            );
        }
    }
}

/// Values against sums in `f64`, in every pair of dtypes.
#[test]
fn products_are_the_sums() {
    let all = [DType::F32, DType::BF16, DType::F16];
    let (d_in, d_out) = (150, 70);
    for (of_x, of_weight) in all.into_iter().flat_map(|x| all.map(|weight| (x, weight))) {
        for rows in [1, 3, 40] {
            let mut random = Random::new(11);
            let x = random.tensor::<2>([rows, d_in]).cast(of_x);
            let weight = random.tensor::<2>([d_in, d_out]).cast(of_weight);
            let y = matmul(x.clone(), weight.clone());
            assert_eq!(y.dtype(), of_x);
            let wide = |t: Tensor<2>| t.cast(DType::F64);
            let magnitude = wide(x.clone()).abs().matmul(wide(weight.clone()).abs());
            let error = (wide(y) - wide(x).matmul(wide(weight))).abs() / magnitude;
            let bound = match of_x {
                DType::F32 => 1e-6,
                DType::F16 => 2f64.powi(-11),
                _ => 2f64.powi(-8),
            };
            let error = error.max().into_scalar::<f64>();
            assert!(error < bound, "{error:e} of {of_x:?} and {of_weight:?}");
        }
    }
}

/// An `F32` weight that trains has `F32` gradients, and an `x` of 16 bits those of its own dtype.
#[test]
fn gradients_are_of_the_dtypes_of_their_tensors() {
    let mut random = Random::new(5);
    let (x, weight) = (random.tensor::<2>([7, 20]), random.tensor::<2>([20, 9]));
    let run = |of_x: DType| {
        let (x, weight) = (leaf(&x.clone().cast(of_x)), leaf(&weight));
        let y = matmul(x.clone(), weight.clone());
        let gradients = y.cast(DType::F32).square().sum().backward();
        (
            x.grad(&gradients).unwrap(),
            weight.grad(&gradients).unwrap(),
        )
    };
    let (dx, dweight) = run(DType::F32);
    for of_x in HALVES {
        let (found_dx, found_dweight) = run(of_x);
        assert_eq!(
            (found_dx.dtype(), found_dweight.dtype()),
            (of_x, DType::F32)
        );
        let near = |found: Tensor<2>, expected: &Tensor<2>| {
            let error = (found.cast(DType::F32) - expected.clone()).abs().max();
            error.into_scalar::<f32>() / expected.clone().abs().max().into_scalar::<f32>()
        };
        assert!(near(found_dx, &dx) < 1e-2);
        assert!(near(found_dweight, &dweight) < 1e-2);
    }
}

#[test]
fn rows_and_columns_may_be_missing() {
    let mut random = Random::new(5);
    for [rows, d_in, d_out] in [[0, 3, 4], [2, 0, 4], [1, 0, 4], [1, 3, 0], [2, 3, 0]] {
        for dtype in [DType::F32, DType::BF16] {
            let (x, weight) = (random.tensor([rows, d_in]), random.tensor([d_in, d_out]));
            let y = matmul::<2>(x, weight.cast(dtype));
            assert_eq!(values(&y), vec![0.0; rows * d_out]);
        }
    }
}

/// A part of a weight, with rows that are apart and columns that are.
#[test]
fn weights_may_be_strided() {
    let mut random = Random::new(8);
    let all = random.tensor::<2>([40, 30]).cast(DType::BF16);
    let part = all.clone().slice([3..20, 5..25]);
    let apart = all.slice(burn::tensor::s![0..34;2, 0..30;3]);
    for weight in [part.clone(), part.transpose(), apart] {
        let x = random.tensor::<2>([3, weight.dims()[0]]);
        let expected = x.clone().matmul(weight.clone().cast(DType::F32));
        let error = (matmul(x, weight) - expected)
            .abs()
            .max()
            .into_scalar::<f32>();
        assert!(error < 1e-5, "{error}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut random = Random::new(2);
    let weight = random.tensor::<2>([600, 2000]).cast(DType::BF16);
    let (one, many) = (random.tensor::<2>([1, 600]), random.tensor::<2>([37, 600]));
    assert_same_on_any_threads(|| {
        let turned = weight.clone().transpose();
        let back = matmul(one.clone(), weight.clone());
        vec![
            values(&back),
            values(&matmul(back.clone(), turned.clone())),
            values(&matmul(many.clone(), weight.clone())),
            values(&matmul(matmul(many.clone(), weight.clone()), turned)),
        ]
    });
}
