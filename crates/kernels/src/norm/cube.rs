//! CUDA, ROCm and wgpu: a cube for each row, which is read twice, and sums in `f32`.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{NormOps, composed};
use crate::cube::{
    UNITS, address_type, buffer, contiguous, cube_for_each, elem, empty, is_supported, row_of_cube,
    sum_of_lanes, sum_of_units, units_for, width_of_rows,
};

/// The rows and columns of `x`, if the kernels support the dtypes.
fn rows(x: &CubeTensor, weight: &CubeTensor) -> Option<[usize; 2]> {
    let [rows, d] = x.meta.shape().dims();
    let fits = is_supported(x.dtype) && is_supported(weight.dtype) && rows * d > 0;
    fits.then_some([rows, d])
}

impl NormOps for CubeBackend {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let Some([rows, d]) = rows(&x, &weight) else {
            return composed::rms_norm::<Self>(x, weight, eps);
        };
        let (x, weight) = (contiguous(x), contiguous(weight));
        let y = empty(&x, [rows, d], x.dtype);
        let width = width_of_rows(d);
        // SAFETY: the kernel checks rows and columns against the sizes, which are those of the tensors.
        unsafe {
            rms_norm_kernel::launch_unchecked(
                &x.client,
                cube_for_each(rows),
                units_for(d / width),
                address_type(&[&x]),
                width,
                buffer(&x),
                buffer(&weight),
                buffer(&y),
                rows,
                d / width,
                d as f32,
                eps as f32,
                [elem(x.dtype), elem(weight.dtype)],
            );
        }
        y
    }

    fn rms_norm_dx(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let Some([rows, d]) = rows(&x, &weight).filter(|_| dy.dtype == x.dtype) else {
            return composed::dx::<Self>(x, weight, dy, eps);
        };
        let (x, weight, dy) = (contiguous(x), contiguous(weight), contiguous(dy));
        let dx = empty(&x, [rows, d], x.dtype);
        let width = width_of_rows(d);
        // SAFETY: as for the result.
        unsafe {
            rms_norm_dx_kernel::launch_unchecked(
                &x.client,
                cube_for_each(rows),
                units_for(d / width),
                address_type(&[&x]),
                width,
                buffer(&x),
                buffer(&weight),
                buffer(&dy),
                buffer(&dx),
                rows,
                d / width,
                d as f32,
                eps as f32,
                [elem(x.dtype), elem(weight.dtype)],
            );
        }
        dx
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn rms_norm_kernel<X: Float, W: Float, C: Size>(
    x: &[Vector<X, C>],
    weight: &[Vector<W, C>],
    y: &mut [Vector<X, C>],
    rows: usize,
    columns: usize,
    d: f32,
    eps: f32,
    #[define(X, W)] _dtypes: [ElemType; 2],
) {
    let row = row_of_cube();
    if row >= rows {
        terminate!();
    }
    let first = row * columns;
    let mut squares = Vector::<f32, C>::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < columns {
        let x = Vector::<f32, C>::cast_from(x[first + at]);
        squares = fma(x, x, squares);
        at += CUBE_DIM_X as usize;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let squares = sum_of_units(&mut shared, sum_of_lanes::<C>(squares));
    let r = Vector::<f32, C>::new(1.0 / (squares / d + eps).sqrt());
    let mut at = UNIT_POS as usize;
    while at < columns {
        let x = Vector::<f32, C>::cast_from(x[first + at]);
        let weight = Vector::<f32, C>::cast_from(weight[at]);
        y[first + at] = Vector::cast_from(x * r * weight);
        at += CUBE_DIM_X as usize;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn rms_norm_dx_kernel<X: Float, W: Float, C: Size>(
    x: &[Vector<X, C>],
    weight: &[Vector<W, C>],
    dy: &[Vector<X, C>],
    dx: &mut [Vector<X, C>],
    rows: usize,
    columns: usize,
    d: f32,
    eps: f32,
    #[define(X, W)] _dtypes: [ElemType; 2],
) {
    let row = row_of_cube();
    if row >= rows {
        terminate!();
    }
    let first = row * columns;
    let mut squares = Vector::<f32, C>::new(0.0);
    let mut products = Vector::<f32, C>::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < columns {
        let x = Vector::<f32, C>::cast_from(x[first + at]);
        let dy = Vector::<f32, C>::cast_from(dy[first + at]);
        squares = fma(x, x, squares);
        products = fma(x, dy * Vector::<f32, C>::cast_from(weight[at]), products);
        at += CUBE_DIM_X as usize;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let squares = sum_of_units(&mut shared, sum_of_lanes::<C>(squares));
    let products = sum_of_units(&mut shared, sum_of_lanes::<C>(products));
    let r = 1.0 / (squares / d + eps).sqrt();
    let along = Vector::<f32, C>::new(products / d * r * r);
    let r = Vector::<f32, C>::new(r);
    let mut at = UNIT_POS as usize;
    while at < columns {
        let x = Vector::<f32, C>::cast_from(x[first + at]);
        let dy = Vector::<f32, C>::cast_from(dy[first + at]);
        let dy = dy * Vector::<f32, C>::cast_from(weight[at]);
        dx[first + at] = Vector::cast_from((dy - x * along) * r);
        at += CUBE_DIM_X as usize;
    }
}
