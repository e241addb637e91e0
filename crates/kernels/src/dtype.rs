//! Dtypes of operands: which may be mixed, and in which the operations compute.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

/// Checks that an operand has the dtype of another one.
///
/// # Panics
/// If it has another. No backend checks all operations: a device may read the values of one dtype as
/// those of the other.
#[track_caller]
pub(crate) fn assert_same(what: &str, found: DType, of: &str, expected: DType) {
    assert!(
        found == expected,
        "mixed dtypes: {what} is {found:?}, but {of} is {expected:?}; cast one of them"
    );
}

/// Checks that an operand has the dtype of `x`, or is `F32`.
///
/// # Panics
/// If it has another.
#[track_caller]
pub(crate) fn assert_same_or_f32(what: &str, found: DType, x: DType) {
    if found != DType::F32 {
        assert_same(what, found, "x", x);
    }
}

/// The tensor in another dtype.
pub(crate) fn cast<B: Backend>(t: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if t.dtype() == dtype {
        t
    } else {
        B::float_cast(t, dtype.into())
    }
}

/// The tensor in a dtype whose sums are accurate: `F32`, or its own if that is not of 16 bits.
pub(crate) fn widened<B: Backend>(t: FloatTensor<B>) -> FloatTensor<B> {
    let dtype = widened_dtype(t.dtype());
    cast::<B>(t, dtype)
}

/// The dtype of [`widened`].
pub(crate) fn widened_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        _ => dtype,
    }
}
