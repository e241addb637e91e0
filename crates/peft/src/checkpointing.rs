//! Gradient checkpointing by block (Chen et al. 2016, arXiv:1604.06174): the forward pass keeps only the
//! input of each block, and the backward pass runs one block after the other again.

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

use crate::blocks::run_blocks;
use crate::{Batch, Blocks, Spans};

/// The lowest part with a trainable parameter: 0 is the embedding, `1 ..= n_blocks` are the blocks, and
/// the parts above them are `n_blocks + 1`. No gradient has to pass through a part below it.
pub(crate) fn lowest_trained<M: Blocks>(model: &M, batch: &Batch) -> usize {
    // One token shows what is tracked.
    let token = batch.tokens().slice([0..1, 0..1]);
    let positions = model.positions(&Spans::whole(1, &token.device()));
    let mut x = model.embed(token, &positions);
    for index in 0..model.n_blocks() {
        if x.is_tracked() {
            return index;
        }
        x = model.block(index, x, &positions);
    }
    model.n_blocks() + usize::from(!x.is_tracked())
}

/// The gradients of a loss of the output of the last block; `lowest` is [`lowest_trained`], and `noise` adds
/// the same constant to embedded tokens each time.
pub(crate) fn backward_by_block<M: Blocks>(
    model: &M,
    batch: &Batch,
    lowest: usize,
    noise: impl Fn(Tensor<3>) -> Tensor<3>,
    loss: impl FnOnce(Tensor<3>) -> Tensor<1>,
) -> GradientsParams {
    let positions = model.positions(batch.spans());
    let mut inputs = Vec::new();
    // On the autodiff backend, though nothing is tracked: without it, burn computes some functions in
    // other ways, and the blocks must give the same bits again.
    let frozen = model.clone().no_grad();
    let x = noise(frozen.embed(batch.tokens(), &positions));
    let x = run_blocks(&frozen, x, &positions, |index, x| {
        if index + 1 >= lowest {
            inputs.push(x.clone());
        }
    });
    // The input of `part` needs a gradient if a part below trains.
    let input = |part: usize, x: Tensor<3>| x.inner().autodiff().set_require_grad(lowest < part);

    let mut total = GradientsAccumulator::new();
    let x = input(model.n_blocks() + 1, x);
    let mut gradients = loss(x.clone()).backward();
    let mut dx = x.grad_remove(&mut gradients);
    total.accumulate(model, GradientsParams::from_grads(gradients, model));
    for index in (0..model.n_blocks()).rev() {
        let (Some(dy), Some(x)) = (dx.take(), inputs.pop()) else {
            break;
        };
        let x = input(index + 1, x);
        let y = model.block(index, x.clone(), &positions);
        let mut gradients = (y * dy.autodiff()).sum().backward();
        dx = x.grad_remove(&mut gradients);
        total.accumulate(model, GradientsParams::from_grads(gradients, model));
    }
    if let Some(dy) = dx {
        // The noise is a constant, which has no part in these.
        let x = model.embed(batch.tokens(), &positions);
        let gradients = (x * dy.autodiff()).sum().backward();
        total.accumulate(model, GradientsParams::from_grads(gradients, model));
    }
    total.grads()
}
