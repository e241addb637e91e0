//! The CPU: one pass over memory.

use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use rayon::prelude::*;

use super::{GateOps, composed};
use crate::host::{all_native, floats, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math::sigmoid;
use crate::memory::zeroed;

/// The number of elements in a task.
const TASK: usize = 1 << 14;

impl GateOps for Flex {
    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        if !all_native([&gate, &up]) {
            return composed::silu_mul::<Self>(gate, up);
        }
        let dtype = gate.dtype();
        let (gate, up) = (widened(gate), widened(up));
        let mut y = zeroed(floats(&gate).len());
        y.par_chunks_mut(TASK)
            .zip(floats(&gate).par_chunks(TASK))
            .zip(floats(&up).par_chunks(TASK))
            .for_each(|((y, gate), up)| forward(gate, up, y));
        rounded(tensor(y, gate.shape()), dtype)
    }

    fn silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&gate, &up, &dy]) {
            return composed::silu_mul_backward::<Self>(gate, up, dy);
        }
        let dtype = gate.dtype();
        let [gate, up, dy] = [gate, up, dy].map(widened);
        let n = floats(&gate).len();
        let (mut dgate, mut dup) = (zeroed(n), zeroed(n));
        dgate
            .par_chunks_mut(TASK)
            .zip(dup.par_chunks_mut(TASK))
            .zip(floats(&gate).par_chunks(TASK))
            .zip(floats(&up).par_chunks(TASK))
            .zip(floats(&dy).par_chunks(TASK))
            .for_each(|((((dgate, dup), gate), up), dy)| backward(gate, up, dy, dgate, dup));
        let [dgate, dup] = [dgate, dup].map(|d| rounded(tensor(d, gate.shape()), dtype));
        (dgate, dup)
    }
}

by_instruction_set! {
    /// Writes `silu(gate) * up`.
    fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) = forward_body
}

#[inline(always)]
fn forward_body<I: Isa>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
        *y = gate * sigmoid(gate) * up;
    }
}

by_instruction_set! {
    /// Writes the gradients of `gate` and `up`.
    fn backward(
        gate: &[f32],
        up: &[f32],
        dy: &[f32],
        dgate: &mut [f32],
        dup: &mut [f32],
    ) = backward_body
}

#[inline(always)]
fn backward_body<I: Isa>(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let inputs = gate.iter().zip(up).zip(dy);
    for (((&gate, &up), &dy), (dgate, dup)) in inputs.zip(dgate.iter_mut().zip(dup)) {
        let s = sigmoid(gate);
        let dys = dy * s;
        *dgate = dys * up * (1.0 + gate * (1.0 - s));
        *dup = dys * gate;
    }
}
