//! CUDA, ROCm and wgpu: a unit for each pair of vectors, of one half and of the other.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{RopeOps, composed};
use crate::cube::{
    UNITS, address_type, buffer, contiguous, cubes_for, elem, empty, is_supported, position,
    width_of_rows,
};

impl RopeOps for CubeBackend {
    fn rotate_half(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match fits(&x, &cos) {
            true => rotate(x, cos, sin, false),
            false => composed::rotate_half::<Self>(x, cos, sin),
        }
    }

    fn rotate_half_dx(
        dy: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match fits(&dy, &cos) {
            true => rotate(dy, cos, sin, true),
            false => composed::rotate_half::<Self>(dy, cos, composed::transposed::<Self>(sin)),
        }
    }
}

fn fits(x: &CubeTensor, cos: &CubeTensor) -> bool {
    is_supported(x.dtype) && is_supported(cos.dtype) && x.meta.shape().num_elements() > 0
}

fn rotate(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, is_transposed: bool) -> CubeTensor {
    let (x, cos, sin) = (contiguous(x), contiguous(cos), contiguous(sin));
    let [batch, seq, heads, dim] = x.meta.shape().dims();
    let y = empty(&x, [batch, seq, heads, dim], x.dtype);
    let width = width_of_rows(dim / 2);
    let half = dim / 2 / width;
    let pairs = batch * seq * heads * half;
    // SAFETY: the kernel checks its position against the number of pairs, and the sizes are those of the
    // tensors.
    unsafe {
        rotate_kernel::launch_unchecked(
            &x.client,
            cubes_for(pairs),
            CubeDim::new_1d(UNITS as u32),
            address_type(&[&x]),
            width,
            buffer(&x),
            buffer(&cos),
            buffer(&sin),
            buffer(&y),
            pairs,
            half,
            heads,
            seq,
            is_transposed,
            [elem(x.dtype), elem(cos.dtype)],
        );
    }
    y
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn rotate_kernel<X: Float, T: Float, C: Size>(
    x: &[Vector<X, C>],
    cos: &[Vector<T, C>],
    sin: &[Vector<T, C>],
    y: &mut [Vector<X, C>],
    pairs: usize,
    half: usize,
    heads: usize,
    seq: usize,
    #[comptime] is_transposed: bool,
    #[define(X, T)] _dtypes: [ElemType; 2],
) {
    let at = position();
    if at >= pairs {
        terminate!();
    }
    let head = at / half;
    let lane = at % half;
    let table = head / heads % seq * (2 * half) + lane;
    let first = head * (2 * half) + lane;
    let a = Vector::<f32, C>::cast_from(x[first]);
    let b = Vector::<f32, C>::cast_from(x[first + half]);
    let cos_a = Vector::<f32, C>::cast_from(cos[table]);
    let cos_b = Vector::<f32, C>::cast_from(cos[table + half]);
    let sin_a = Vector::<f32, C>::cast_from(sin[table]);
    let sin_b = Vector::<f32, C>::cast_from(sin[table + half]);
    if is_transposed {
        y[first] = Vector::cast_from(a * cos_a + b * sin_b);
        y[first + half] = Vector::cast_from(b * cos_b - a * sin_a);
    } else {
        y[first] = Vector::cast_from(a * cos_a - b * sin_a);
        y[first + half] = Vector::cast_from(b * cos_b + a * sin_b);
    }
}
