//! Operands of several dtypes: a panic that says so, or the values of the conversion that is documented.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Int, Tensor};
use kernels::{
    Layout, Levels, Mask, Precision, add_low_rank, attention, dequantize, linear_cross_entropy,
    matmul, pack, quant_matmul, rms_norm, rotate_half, silu_mul,
};

fn ones<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<D> {
    Tensor::ones(shape, (&Device::flex(), dtype))
}

/// Asserts that the operation refuses its operands, and what it says of them.
#[track_caller]
fn refused<const D: usize>(what: &str, run: impl FnOnce() -> Tensor<D>) {
    let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("mixed dtypes were accepted");
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains(what), "{message}");
}

const LAYOUT: fn() -> Layout = || Layout::new(4, 2, 4, 2, Levels::Unsigned);

fn words(dtype: DType) -> Tensor<3, Int> {
    let words = pack(&[1, 2, 3, 4, 5, 6, 7, 8], &LAYOUT());
    let words = burn::tensor::TensorData::new(words, LAYOUT().words_shape());
    Tensor::from_data(words.convert_dtype(dtype), (&Device::flex(), dtype))
}

#[test]
fn the_gate_and_up_have_one_dtype() {
    let gate = ones([2, 3], DType::BF16);
    let mixed = "mixed dtypes: up is F32, but gate is BF16";
    refused(mixed, || silu_mul(gate, ones([2, 3], DType::F32)));
}

#[test]
fn the_weight_of_a_norm_is_of_x_or_f32() {
    let mixed = "mixed dtypes: the weight is F16, but x is BF16";
    let run = |x, weight| rms_norm(ones([2, 4], x), ones([4], weight), 0.0);
    refused(mixed, || run(DType::BF16, DType::F16));
    refused("the weight is BF16, but x is F32", || {
        run(DType::F32, DType::BF16)
    });
    for x in [DType::BF16, DType::F16, DType::F32] {
        let y = run(x, DType::F32);
        assert_eq!(y.dtype(), x);
        assert_eq!(y.cast(DType::F32).sum().into_scalar::<f32>(), 8.0);
    }
}

#[test]
fn the_tables_of_a_rotation_are_of_x_or_f32() {
    let run =
        |x, cos, sin| rotate_half(ones([1, 2, 1, 4], x), ones([2, 4], cos), ones([2, 4], sin));
    let (f16, bf16, f32) = (DType::F16, DType::BF16, DType::F32);
    refused("the table of cosines is F16, but x is BF16", || {
        run(bf16, f16, f16)
    });
    refused(
        "the table of sines is BF16, but that of cosines is F32",
        || run(bf16, f32, bf16),
    );
    let y = run(bf16, f32, f32);
    assert_eq!(y.dtype(), bf16);
    let y: Vec<f32> = y.cast(f32).into_data().try_into_vec().unwrap();
    assert_eq!(y, [0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 2.0, 2.0]);
}

#[test]
fn queries_keys_and_values_have_one_dtype() {
    for mask in [Mask::causal(), Mask::full()] {
        let run = |q, k, v| {
            let [q, k, v] = [q, k, v].map(|dtype| ones([1, 2, 1, 4], dtype));
            attention(q, k, v, mask.clone(), 1.0)
        };
        let (bf16, f32) = (DType::BF16, DType::F32);
        refused("mixed dtypes: k is BF16, but q is F32", || {
            run(f32, bf16, f32)
        });
        refused("mixed dtypes: v is F32, but q is BF16", || {
            run(bf16, bf16, f32)
        });
    }
}

#[test]
fn a_grid_has_one_dtype_and_words_are_u32() {
    let grid = |dtype| ones([2, 2], dtype);
    let x = || ones([3, 4], DType::F32);
    let run = |words, scales, zeros| {
        quant_matmul(
            x(),
            words,
            grid(scales),
            Some(grid(zeros)),
            LAYOUT(),
            Precision::Full,
        )
    };
    let mixed = "mixed dtypes: zeros is BF16, but scales is F32";
    refused(mixed, || run(words(DType::U32), DType::F32, DType::BF16));
    refused("the dtype of the words", || {
        run(words(DType::I64), DType::F32, DType::F32)
    });
    refused(mixed, || {
        let (scales, zeros) = (grid(DType::F32), Some(grid(DType::BF16)));
        dequantize(words(DType::U32), scales, zeros, LAYOUT())
    });
}

/// A grid may be of another dtype than `x`, whose dtype is that of the result.
#[test]
fn a_grid_is_independent_of_x() {
    // The levels less the zero of 1 are 0 to 7, in rows of two columns.
    for (of_x, of_grid) in [(DType::BF16, DType::F32), (DType::F32, DType::F16)] {
        let grid = || ones([2, 2], of_grid);
        let x = ones([2, 4], of_x);
        let y = quant_matmul(
            x,
            words(DType::U32),
            grid(),
            Some(grid()),
            LAYOUT(),
            Precision::Full,
        );
        assert_eq!(y.dtype(), of_x);
        let y: Vec<f32> = y.cast(DType::F32).into_data().try_into_vec().unwrap();
        assert_eq!(y, [12.0, 16.0, 12.0, 16.0]);
    }
}

#[test]
fn low_rank_sums_have_one_dtype() {
    let run = |weight, a, b| add_low_rank(ones([3, 4], weight), ones([3, 2], a), ones([2, 4], b));
    let (bf16, f32) = (DType::BF16, DType::F32);
    let mixed = "mixed dtypes: the left factor is F32, but the weight is BF16";
    refused(mixed, || run(bf16, f32, f32));
    let mixed = "mixed dtypes: the right factor is BF16, but the weight is F32";
    refused(mixed, || run(f32, f32, bf16));
}

/// A weight at rest is converted: no value is read in the dtype of another.
#[test]
fn weights_at_rest_may_have_another_dtype() {
    let all = [DType::F32, DType::F16, DType::BF16];
    for (of_x, of_weight) in all.into_iter().flat_map(|x| all.map(|weight| (x, weight))) {
        for rows in [1, 5] {
            let (x, weight) = (ones([rows, 3], of_x) * 2.0, ones([3, 7], of_weight) * 0.5);
            let y = matmul(x.clone(), weight.clone());
            assert_eq!(y.dtype(), of_x);
            let y: Vec<f32> = y.cast(DType::F32).into_data().try_into_vec().unwrap();
            assert_eq!(y, vec![3.0; 7 * rows]);
            let targets = Tensor::<1, Int>::zeros([rows], &Device::flex());
            let nll = linear_cross_entropy(x, weight, targets);
            assert_eq!(nll.dtype(), DType::F32);
            for nll in nll.into_data().try_into_vec::<f32>().unwrap() {
                assert!((nll - 7f32.ln()).abs() < 1e-6, "{nll}");
            }
        }
    }
}
