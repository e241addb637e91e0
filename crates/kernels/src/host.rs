//! Tensors of the CPU backend as slices.

use burn::backend::{
    DType, Flex, TensorMetadata,
    flex::{FlexTensor, Layout},
    ops::IntTensorOps,
};
use burn::tensor::{Bytes, IntDType, Shape};

use crate::at_rest;

/// The tensor in row-major order, copied only if it is in another one.
pub(crate) fn contiguous(t: FlexTensor) -> FlexTensor {
    match t.layout().contiguous_offsets() {
        Some(_) => t,
        None => t.to_contiguous(),
    }
}

/// The values of a contiguous `F32` tensor.
///
/// # Panics
/// If the tensor is not contiguous or not `F32`.
pub(crate) fn floats(t: &FlexTensor) -> &[f32] {
    t.as_slice().expect("the tensor is contiguous and f32")
}

/// The values of an integer tensor.
///
/// # Panics
/// If a value is negative.
pub(crate) fn integers(t: FlexTensor) -> Vec<usize> {
    let t = contiguous(Flex::int_cast(t, IntDType::I64));
    let values = t.as_slice::<i64>().expect("cast to i64").iter();
    let index = |&value: &i64| usize::try_from(value).expect("indices are not negative");
    values.map(index).collect()
}

/// Whether all tensors are `F32`.
pub(crate) fn all_f32<const N: usize>(tensors: [&FlexTensor; N]) -> bool {
    tensors.iter().all(|t| t.dtype() == DType::F32)
}

/// Whether all tensors are of dtypes whose values are those of `f32`, in which native code computes.
pub(crate) fn all_native<const N: usize>(tensors: [&FlexTensor; N]) -> bool {
    let is_native = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    tensors.iter().all(|t| is_native(t.dtype()))
}

/// The tensor in `F32` and in row-major order, copied only if it is not.
pub(crate) fn widened(t: FlexTensor) -> FlexTensor {
    let t = contiguous(t);
    if t.dtype() == DType::F32 {
        return t;
    }
    let shape = t.shape();
    tensor(at_rest::Floats::of(&t).to_f32(shape.num_elements()), shape)
}

/// An `F32` tensor, rounded to a dtype.
pub(crate) fn rounded(t: FlexTensor, dtype: DType) -> FlexTensor {
    if dtype == DType::F32 {
        return t;
    }
    let t = contiguous(t);
    let bytes = at_rest::round(floats(&t), dtype);
    FlexTensor::new(bytes, Layout::contiguous(t.shape()), dtype)
}

/// A tensor that takes over the values.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    let layout = Layout::contiguous(shape.into());
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}
