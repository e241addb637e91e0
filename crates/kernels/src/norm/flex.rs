//! The CPU: one task for some rows, which are in the cache when they are read again.

use burn::backend::{DType, Flex, TensorMetadata, tensor::FloatTensor};
use rayon::prelude::*;

use super::{NormOps, composed};
use crate::host::{all_native, floats, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math::dot;
use crate::memory::zeroed;

/// The number of rows in a task: a constant, because the order of sums over rows depends on it.
const ROWS: usize = 32;

impl NormOps for Flex {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        if !all_native([&x, &weight]) {
            return composed::rms_norm::<Self>(x, weight, eps);
        }
        let dtype = x.dtype();
        let (x, weight) = (widened(x), widened(weight));
        let mut y = zeroed(floats(&x).len());
        let task = task_of(&x);
        y.par_chunks_mut(task)
            .zip(floats(&x).par_chunks(task))
            .for_each(|(y, x)| forward(x, floats(&weight), eps as f32, y));
        rounded(tensor(y, x.shape()), dtype)
    }

    fn rms_norm_dx(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        if !all_native([&x, &weight, &dy]) {
            return composed::dx::<Self>(x, weight, dy, eps);
        }
        let dtype = x.dtype();
        let [x, weight, dy] = [x, weight, dy].map(widened);
        let mut dx = zeroed(floats(&x).len());
        let task = task_of(&x);
        dx.par_chunks_mut(task)
            .zip(floats(&x).par_chunks(task))
            .zip(floats(&dy).par_chunks(task))
            .for_each(|((dx, x), dy)| gradient(x, floats(&weight), dy, eps as f32, dx));
        rounded(tensor(dx, x.shape()), dtype)
    }

    fn rms_norm_dweight(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
        dtype: DType,
    ) -> FloatTensor<Self> {
        if !all_native([&x, &dy]) {
            return composed::dweight::<Self>(x, dy, eps, dtype);
        }
        let (x, dy) = (widened(x), widened(dy));
        let (d, task) = (x.shape()[1], task_of(&x));
        let parts: Vec<Vec<f32>> = floats(&x)
            .par_chunks(task)
            .zip(floats(&dy).par_chunks(task))
            .map(|(x, dy)| {
                let mut part = vec![0.0; d];
                weight_gradient(x, dy, eps as f32, &mut part);
                part
            })
            .collect();
        let mut dweight = vec![0.0; d];
        for part in parts {
            for (sum, part) in dweight.iter_mut().zip(part) {
                *sum += part;
            }
        }
        rounded(tensor(dweight, [d]), dtype)
    }
}

/// The number of elements in a task.
fn task_of(x: &FloatTensor<Flex>) -> usize {
    ROWS * x.shape()[1].max(1)
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
fn reciprocal_root(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

by_instruction_set! {
    /// Normalizes whole rows of the length of the weight.
    fn forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) = forward_body
}

#[inline(always)]
fn forward_body<I: Isa>(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let d = weight.len();
    for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
        let r = reciprocal_root(x, eps);
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * r * weight;
        }
    }
}

by_instruction_set! {
    /// Writes the gradient of `x`.
    fn gradient(x: &[f32], weight: &[f32], dy: &[f32], eps: f32, dx: &mut [f32]) = gradient_body
}

#[inline(always)]
fn gradient_body<I: Isa>(x: &[f32], weight: &[f32], dy: &[f32], eps: f32, dx: &mut [f32]) {
    let d = weight.len();
    let rows = x.chunks_exact(d).zip(dy.chunks_exact(d));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(d)) {
        let r = reciprocal_root(x, eps);
        for ((dx, dy), weight) in dx.iter_mut().zip(dy).zip(weight) {
            *dx = dy * weight;
        }
        let along = r * r * (dot(x, dx) / d as f32);
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*dx - x * along) * r;
        }
    }
}

by_instruction_set! {
    /// Adds the gradient of the weight to `dweight`.
    fn weight_gradient(x: &[f32], dy: &[f32], eps: f32, dweight: &mut [f32]) = weight_gradient_body
}

#[inline(always)]
fn weight_gradient_body<I: Isa>(x: &[f32], dy: &[f32], eps: f32, dweight: &mut [f32]) {
    let d = dweight.len();
    for (x, dy) in x.chunks_exact(d).zip(dy.chunks_exact(d)) {
        let r = reciprocal_root(x, eps);
        for ((dweight, x), dy) in dweight.iter_mut().zip(x).zip(dy) {
            *dweight += dy * (x * r);
        }
    }
}
