//! The CPU: one pass over memory.

use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use rayon::prelude::*;

use super::{Softcap, SoftcapOps, composed};
use crate::host::{all_native, floats, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math::tanh;

/// The number of elements in a task.
const TASK: usize = 1 << 14;

impl SoftcapOps for Flex {
    fn softcap(x: FloatTensor<Self>, cap: Softcap) -> FloatTensor<Self> {
        if !all_native([&x]) {
            return composed::softcap::<Self>(x, cap);
        }
        let (dtype, x) = (x.dtype(), widened(x));
        let mut y = floats(&x).to_vec();
        y.par_chunks_mut(TASK).for_each(|y| cap_each(y, cap));
        rounded(tensor(y, x.shape()), dtype)
    }

    fn softcap_backward(
        y: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        cap: Softcap,
    ) -> FloatTensor<Self> {
        if !all_native([&y, &dy]) {
            return composed::softcap_backward::<Self>(y, dy, cap);
        }
        let (dtype, y, dy) = (y.dtype(), widened(y), widened(dy));
        let mut dx = floats(&dy).to_vec();
        dx.par_chunks_mut(TASK)
            .zip(floats(&y).par_chunks(TASK))
            .for_each(|(dx, y)| backward(y, cap, dx));
        rounded(tensor(dx, y.shape()), dtype)
    }
}

impl Softcap {
    /// The derivative of the cap where its result is `capped`.
    #[inline(always)]
    pub(crate) fn slope_at(self, capped: f32) -> f32 {
        let share = capped * (1.0 / self.0 as f32);
        1.0 - share * share
    }
}

by_instruction_set! {
    /// Caps each value.
    pub(crate) fn cap_each(values: &mut [f32], cap: Softcap) = cap_each_body
}

#[inline(always)]
fn cap_each_body<I: Isa>(values: &mut [f32], Softcap(cap): Softcap) {
    let cap = cap as f32;
    let inverse = 1.0 / cap;
    for value in values {
        *value = cap * tanh(*value * inverse);
    }
}

by_instruction_set! {
    /// Multiplies gradients of the result `y` by the slopes there.
    fn backward(y: &[f32], cap: Softcap, gradients: &mut [f32]) = backward_body
}

#[inline(always)]
fn backward_body<I: Isa>(y: &[f32], cap: Softcap, gradients: &mut [f32]) {
    for (gradient, &y) in gradients.iter_mut().zip(y) {
        *gradient *= cap.slope_at(y);
    }
}
