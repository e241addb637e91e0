//! CUDA, ROCm and wgpu.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{GateOps, composed};
use crate::cube::{
    UNITS, address_type, buffer, contiguous, cubes_for, elem, empty, is_supported, position,
    width_of_rows,
};

fn fits(gate: &CubeTensor) -> bool {
    is_supported(gate.dtype) && gate.meta.shape().num_elements() > 0
}

impl GateOps for CubeBackend {
    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        if !fits(&gate) {
            return composed::silu_mul::<Self>(gate, up);
        }
        let (gate, up) = (contiguous(gate), contiguous(up));
        let n = gate.meta.shape().num_elements();
        let y = empty(&gate, [n], gate.dtype);
        let width = width_of_rows(n);
        // SAFETY: the kernel checks its position against the number of vectors, that of each tensor.
        unsafe {
            silu_mul_kernel::launch_unchecked(
                &gate.client,
                cubes_for(n / width),
                CubeDim::new_1d(UNITS as u32),
                address_type(&[&gate]),
                width,
                buffer(&gate),
                buffer(&up),
                buffer(&y),
                n / width,
                elem(gate.dtype),
            );
        }
        y
    }

    fn silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !fits(&gate) || dy.dtype != gate.dtype {
            return composed::silu_mul_backward::<Self>(gate, up, dy);
        }
        let (gate, up, dy) = (contiguous(gate), contiguous(up), contiguous(dy));
        let n = gate.meta.shape().num_elements();
        let (dgate, dup) = (empty(&gate, [n], gate.dtype), empty(&gate, [n], gate.dtype));
        let width = width_of_rows(n);
        // SAFETY: as for the result.
        unsafe {
            silu_mul_backward_kernel::launch_unchecked(
                &gate.client,
                cubes_for(n / width),
                CubeDim::new_1d(UNITS as u32),
                address_type(&[&gate]),
                width,
                buffer(&gate),
                buffer(&up),
                buffer(&dy),
                buffer(&dgate),
                buffer(&dup),
                n / width,
                elem(gate.dtype),
            );
        }
        (dgate, dup)
    }
}

/// `1 / (1 + exp(-x))`.
#[cube]
fn sigmoid<C: Size>(x: Vector<f32, C>) -> Vector<f32, C> {
    let one = Vector::<f32, C>::new(1.0);
    one / (one + (-x).exp())
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn silu_mul_kernel<X: Float, C: Size>(
    gate: &[Vector<X, C>],
    up: &[Vector<X, C>],
    y: &mut [Vector<X, C>],
    vectors: usize,
    #[define(X)] _dtype: ElemType,
) {
    let at = position();
    if at >= vectors {
        terminate!();
    }
    let gate = Vector::<f32, C>::cast_from(gate[at]);
    let up = Vector::<f32, C>::cast_from(up[at]);
    y[at] = Vector::cast_from(gate * sigmoid::<C>(gate) * up);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn silu_mul_backward_kernel<X: Float, C: Size>(
    gate: &[Vector<X, C>],
    up: &[Vector<X, C>],
    dy: &[Vector<X, C>],
    dgate: &mut [Vector<X, C>],
    dup: &mut [Vector<X, C>],
    vectors: usize,
    #[define(X)] _dtype: ElemType,
) {
    let at = position();
    if at >= vectors {
        terminate!();
    }
    let one = Vector::<f32, C>::new(1.0);
    let gate = Vector::<f32, C>::cast_from(gate[at]);
    let up = Vector::<f32, C>::cast_from(up[at]);
    let s = sigmoid::<C>(gate);
    let dys = Vector::<f32, C>::cast_from(dy[at]) * s;
    dgate[at] = Vector::cast_from(dys * up * (one + gate * (one - s)));
    dup[at] = Vector::cast_from(dys * gate);
}
