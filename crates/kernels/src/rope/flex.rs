//! The CPU: one pass over memory.

use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use rayon::prelude::*;

use super::{RopeOps, composed};
use crate::host::{all_native, floats, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::memory::zeroed;

/// The number of positions in a task.
const POSITIONS: usize = 16;

impl RopeOps for Flex {
    fn rotate_half(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if !all_native([&x, &cos, &sin]) {
            return composed::rotate_half::<Self>(x, cos, sin);
        }
        let dtype = x.dtype();
        let [x, cos, sin] = [x, cos, sin].map(widened);
        let [_, seq, heads, dim] = x.shape().dims();
        let mut y = zeroed(floats(&x).len());
        let position = (heads * dim).max(1);
        y.par_chunks_mut(POSITIONS * position)
            .zip(floats(&x).par_chunks(POSITIONS * position))
            .enumerate()
            .for_each(|(task, (y, x))| {
                let positions = y.chunks_exact_mut(position).zip(x.chunks_exact(position));
                for (k, (y, x)) in positions.enumerate() {
                    let row = (task * POSITIONS + k) % seq * dim;
                    rotate(
                        x,
                        &floats(&cos)[row..][..dim],
                        &floats(&sin)[row..][..dim],
                        y,
                    );
                }
            });
        rounded(tensor(y, x.shape()), dtype)
    }
}

by_instruction_set! {
    /// Rotates all heads of a position.
    fn rotate(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) = rotate_body
}

#[inline(always)]
fn rotate_body<I: Isa>(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    let half = cos.len() / 2;
    let ((cos1, cos2), (sin1, sin2)) = (cos.split_at(half), sin.split_at(half));
    for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
        let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
        let (x1, x2, y1, y2) = (&x1[..half], &x2[..half], &mut y1[..half], &mut y2[..half]);
        let (cos1, cos2, sin1, sin2) = (&cos1[..half], &cos2[..half], &sin1[..half], &sin2[..half]);
        for i in 0..half {
            y1[i] = x1[i] * cos1[i] - x2[i] * sin1[i];
            y2[i] = x2[i] * cos2[i] + x1[i] * sin2[i];
        }
    }
}
