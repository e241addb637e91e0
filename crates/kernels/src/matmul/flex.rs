//! The CPU: sums in `f32`, from panels of the weight that are widened into the last cache.
//!
//! A column of the result depends on its column of the weight alone, and is summed in the same order in
//! a panel and in the whole weight.

use burn::backend::{
    DType, Flex, TensorMetadata, flex::FlexTensor, ops::FloatTensorOps, tensor::FloatTensor,
};
use gemm::Parallelism;
use rayon::prelude::*;

use super::MatmulOps;
use crate::at_rest::{AtRest, at_rest};
use crate::dtype::cast;
use crate::host::{all_native, floats, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math::dot;
use crate::matrix::Matrix;
use crate::memory::zeroed;

/// The number of columns of a task for a single row.
const COLUMNS: usize = 512;
/// Weights that a single row multiplies without threads: waking one costs more than it saves.
const ALONE: usize = 1 << 16;
/// Products that are computed without threads, as by burn.
const SMALL: usize = 192 * 192 * 192;

impl MatmulOps for Flex {
    fn dense_matmul(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        if all_native([&x, &weight]) {
            return product(x, weight);
        }
        let weight = cast::<Self>(weight, x.dtype());
        Self::float_matmul(x, weight)
    }

    fn dense_matmul_dx(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::dense_matmul(dy, weight.transpose(0, 1))
    }
}

fn product(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
    let dtype = x.dtype();
    let [rows, d_out] = [x.shape()[0], weight.shape()[1]];
    if rows == 1 {
        let (x, weight) = (widened(x), at_rest(weight));
        let y = one_row(floats(&x), &AtRest::of(&weight));
        return rounded(tensor(y, [1, d_out]), dtype);
    }
    let x = match dtype {
        DType::F32 => x,
        _ => widened(x),
    };
    let y = match weight.dtype() {
        DType::F32 => Flex::float_matmul(x, weight),
        _ => {
            let (x, weight) = (widened(x), at_rest(weight));
            tensor(
                by_panels(floats(&x), rows, &AtRest::of(&weight)),
                [rows, d_out],
            )
        }
    };
    rounded(y, dtype)
}

/// `x · weight`, `[rows, d_out]`.
fn by_panels(x: &[f32], rows: usize, weight: &AtRest) -> Vec<f32> {
    let [d_in, d_out] = weight.dims();
    assert_eq!(x.len(), rows * d_in);
    let mut y = zeroed(rows * d_out);
    if y.is_empty() || d_in == 0 {
        return y;
    }
    let parallelism = match rows * d_in * d_out {
        ..SMALL => Parallelism::None,
        _ => Parallelism::Rayon(0),
    };
    let x = Matrix::new(x.as_ptr(), d_in, 1);
    let mut buffer = Vec::new();
    for columns in weight.panels() {
        let panel = weight.panel(columns.clone(), &mut buffer);
        // SAFETY: `x` is `[rows, d_in]`, the panel `[d_in, columns]`, and `y` `[rows, d_out]`, whose
        // columns these are.
        unsafe {
            gemm::gemm(
                rows,
                columns.len(),
                d_in,
                y.as_mut_ptr().add(columns.start),
                1,
                d_out as isize,
                false,
                x.data,
                x.column_stride,
                x.row_stride,
                panel.data,
                panel.column_stride,
                panel.row_stride,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
    y
}

/// `x · weight` for one row, which is bound by the memory bandwidth of the weight.
fn one_row(x: &[f32], weight: &AtRest) -> Vec<f32> {
    let [d_in, d_out] = weight.dims();
    assert_eq!(x.len(), d_in);
    let mut y = zeroed(d_out);
    let n_alone = match d_in * d_out {
        ..ALONE => usize::MAX,
        _ => 1,
    };
    let tasks = y.par_chunks_mut(COLUMNS).enumerate();
    tasks.with_min_len(n_alone).for_each_init(
        || {
            vec![
                0.0;
                if weight.is_by_columns() {
                    d_in
                } else {
                    4 * COLUMNS
                }
            ]
        },
        |buffer, (task, y)| match weight.is_by_columns() {
            true => {
                for (column, y) in (task * COLUMNS..).zip(y) {
                    dot_product(x, weight.line(column, 0, buffer), y);
                }
            }
            false => add_rows(x, weight, task * COLUMNS, buffer, y),
        },
    );
    y
}

/// Adds the rows of some columns of the weight, times `x`.
fn add_rows(x: &[f32], weight: &AtRest, first: usize, buffer: &mut [f32], y: &mut [f32]) {
    let n = y.len();
    let (x, rest) = x.as_chunks::<4>();
    for (row, x) in (0..).step_by(4).zip(x) {
        let mut rows = [&[][..]; 4];
        let buffers = buffer.chunks_exact_mut(n);
        for (k, (values, buffer)) in rows.iter_mut().zip(buffers).enumerate() {
            *values = weight.line(row + k, first, buffer);
        }
        add_four(*x, rows, y);
    }
    for (row, &x) in (4 * x.len()..).zip(rest) {
        add_one(x, weight.line(row, first, &mut buffer[..n]), y);
    }
}

by_instruction_set! {
    /// Writes the product of `x` and a column of the weight.
    fn dot_product(x: &[f32], column: &[f32], y: &mut f32) = dot_product_body
}

#[inline(always)]
fn dot_product_body<I: Isa>(x: &[f32], column: &[f32], y: &mut f32) {
    *y = dot(x, column);
}

by_instruction_set! {
    /// Adds a row of the weight times its input.
    fn add_one(x: f32, row: &[f32], y: &mut [f32]) = add_one_body
}

#[inline(always)]
fn add_one_body<I: Isa>(x: f32, row: &[f32], y: &mut [f32]) {
    for (y, w) in y.iter_mut().zip(row) {
        *y += x * w;
    }
}

by_instruction_set! {
    /// Adds four rows of the weight times their inputs, one after the other.
    fn add_four(x: [f32; 4], rows: [&[f32]; 4], y: &mut [f32]) = add_four_body
}

#[inline(always)]
fn add_four_body<I: Isa>(x: [f32; 4], rows: [&[f32]; 4], y: &mut [f32]) {
    let n = y.len();
    let [a, b, c, d] = rows.map(|row| &row[..n]);
    for j in 0..n {
        y[j] = y[j] + x[0] * a[j] + x[1] * b[j] + x[2] * c[j] + x[3] * d[j];
    }
}
