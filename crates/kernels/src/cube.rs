//! What the kernels of the devices of CubeCL share.

use burn::backend::DType;
use burn::tensor::Shape;
use burn_cubecl::{
    kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor,
};
use cubecl::prelude::*;

/// The number of units in a cube, which every device supports.
pub(crate) const UNITS: usize = 256;
/// The largest extent of a grid of cubes that every device supports.
pub(crate) const MAX_CUBES: usize = u16::MAX as usize;

pub(crate) fn elem(dtype: DType) -> ElemType {
    burn::backend::cubecl::dtype_to_elem_type(dtype)
}

/// Whether the kernels read and write floats of this dtype.
pub(crate) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// A contiguous tensor of a shape and a dtype on the device of another.
pub(crate) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

/// The tensor as an argument of a kernel that reads or writes it in its order.
pub(crate) fn buffer(tensor: &CubeTensor) -> BufferArg {
    tensor.clone().into_buffer_arg()
}

/// The type of positions in the largest of some tensors.
pub(crate) fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    let types = tensors.iter().map(|tensor| tensor.required_address_type());
    types.max().unwrap_or_default()
}

/// The number of values that a unit reads at a time from rows of `n`.
pub(crate) fn width_of_rows(n: usize) -> usize {
    if n.is_multiple_of(4) { 4 } else { 1 }
}

/// As many cubes as there are rows, within the extent of a grid; there may be a few more.
pub(crate) fn cube_for_each(rows: usize) -> CubeCount {
    let down = rows.div_ceil(MAX_CUBES).max(1);
    CubeCount::Static(rows.div_ceil(down) as u32, down as u32, 1)
}

/// Cubes with a unit for each of some vectors; there may be more.
pub(crate) fn cubes_for(vectors: usize) -> CubeCount {
    cube_for_each(vectors.div_ceil(UNITS))
}

/// The position of a unit of [`cubes_for`].
#[cube]
pub(crate) fn position() -> usize {
    row_of_cube() * UNITS + UNIT_POS as usize
}

/// The row of a cube of [`cube_for_each`].
#[cube]
pub(crate) fn row_of_cube() -> usize {
    (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize
}

/// The units for a row of some vectors: a power of two.
pub(crate) fn units_for(vectors: usize) -> CubeDim {
    CubeDim::new_1d(vectors.next_power_of_two().min(UNITS) as u32)
}

/// The sum of the lanes of a vector, in their order.
#[cube]
pub(crate) fn sum_of_lanes<C: Size>(vector: Vector<f32, C>) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for lane in 0..C::value() {
        sum += vector.extract(lane);
    }
    sum
}

/// The sum over the units of a cube, whose number is a power of two, in an order that depends on it alone.
///
/// `shared` has a value for each unit, and may be used again.
#[cube]
pub(crate) fn sum_of_units(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    shared[UNIT_POS as usize] = value;
    sync_cube();
    let mut half = CUBE_DIM_X / 2;
    while half > 0 {
        if UNIT_POS < half {
            let other = shared[(UNIT_POS + half) as usize];
            shared[UNIT_POS as usize] += other;
        }
        sync_cube();
        half /= 2;
    }
    let sum = shared[0];
    sync_cube();
    sum
}

/// [`sum_of_units`] for the largest value.
#[cube]
pub(crate) fn max_of_units(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    shared[UNIT_POS as usize] = value;
    sync_cube();
    let mut half = CUBE_DIM_X / 2;
    while half > 0 {
        if UNIT_POS < half {
            let other = shared[(UNIT_POS + half) as usize];
            shared[UNIT_POS as usize] = max(shared[UNIT_POS as usize], other);
        }
        sync_cube();
        half /= 2;
    }
    let most = shared[0];
    sync_cube();
    most
}

/// The tensor in the order of its shape.
pub(crate) fn contiguous(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// The sum of partial results, `[n_splits * rows, columns]` in `F32`, rounded once.
pub(crate) fn sum_of_splits(
    splits: CubeTensor,
    [rows, columns]: [usize; 2],
    dtype: DType,
) -> CubeTensor {
    let y = empty(&splits, [rows, columns], dtype);
    let n = rows * columns;
    let n_splits = splits.meta.shape()[0] / rows;
    // SAFETY: the kernel checks its position against the length of `y`, and `splits` is `n_splits` times as
    // long.
    unsafe {
        sum_splits_kernel::launch_unchecked(
            &y.client,
            cubes_for(n),
            CubeDim::new_1d(UNITS as u32),
            address_type(&[&splits]),
            buffer(&splits),
            buffer(&y),
            n,
            n_splits,
            elem(dtype),
        );
    }
    y
}

/// Writes the sum of `n_splits` partial results.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_splits_kernel<O: Float>(
    splits: &[f32],
    y: &mut [O],
    n: usize,
    n_splits: usize,
    #[define(O)] _dtype: ElemType,
) {
    let at = position();
    if at >= n {
        terminate!();
    }
    let mut total = splits[at];
    for k in 1..n_splits {
        total += splits[k * n + at];
    }
    y[at] = O::cast_from(total);
}
