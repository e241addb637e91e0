//! Tensors of the CPU backend as slices.

use burn::backend::{
    DType, Flex,
    flex::{FlexTensor, Layout},
    ops::IntTensorOps,
};
use burn::tensor::{Bytes, IntDType, Shape};

/// Row by row, copied only if it is not so already.
pub(crate) fn contiguous(t: FlexTensor) -> FlexTensor {
    match t.layout().contiguous_offsets() {
        Some(_) => t,
        None => t.to_contiguous(),
    }
}

/// The values of a tensor that is known to be contiguous and `F32`.
pub(crate) fn floats(t: &FlexTensor) -> &[f32] {
    t.as_slice().expect("a contiguous f32 tensor")
}

/// The values of a tensor of integers.
///
/// # Panics
/// If one is negative.
pub(crate) fn integers(t: FlexTensor) -> Vec<usize> {
    let t = contiguous(Flex::int_cast(t, IntDType::I64));
    let values = t.as_slice::<i64>().expect("cast to i64").iter();
    let index = |&value: &i64| usize::try_from(value).expect("an index is not negative");
    values.map(index).collect()
}

pub(crate) fn all_f32<const N: usize>(tensors: [&FlexTensor; N]) -> bool {
    tensors.iter().all(|t| t.dtype() == DType::F32)
}

/// The tensor of these values, without a copy.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    let layout = Layout::contiguous(shape.into());
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}
