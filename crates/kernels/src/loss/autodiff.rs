//! The backward pass of every backend: it keeps no logits.

use burn::backend::{
    Autodiff, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::Shape;

use super::LossOps;
use crate::dtype::{cast, widened};

#[derive(Debug)]
struct LinearCrossEntropy;

#[derive(Clone, Debug)]
struct State<F, I> {
    /// The gradient of each row's loss for `x`, if `x` is tracked.
    dx: Option<F>,
    /// The inputs of the gradient for the head, if it is tracked.
    head: Option<HeadState<F, I>>,
}

/// The inputs of the gradient for the head.
#[derive(Clone, Debug)]
struct HeadState<F, I> {
    x: F,
    head: F,
    targets: I,
    lse: F,
}

/// The parents are `x` and the head.
impl<B: LossOps> Backward<B, 2> for LinearCrossEntropy {
    type State = State<FloatTensor<B>, IntTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dnll = grads.consume::<B>(&ops.node);
        let [x_parent, head_parent] = ops.parents;
        if let (Some(parent), Some(state)) = (head_parent, ops.state.head) {
            let HeadState {
                x,
                head,
                targets,
                lse,
            } = state;
            let dhead = B::linear_cross_entropy_dhead(x, head, targets, lse, dnll.clone());
            grads.register::<B>(parent.id, dhead);
        }
        if let (Some(parent), Some(dx)) = (x_parent, ops.state.dx) {
            let dnll = B::float_reshape(dnll, Shape::new([dx.shape()[0], 1]));
            let dtype = dx.dtype();
            let dx = B::float_mul(widened::<B>(dx), dnll);
            grads.register::<B>(parent.id, cast::<B>(dx, dtype));
        }
    }
}

impl<B: LossOps, C: CheckpointStrategy> LossOps for Autodiff<B, C> {
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let parents = [x.node(), head.node()];
        let (x_tracked, head_tracked) = (x.is_tracked(), head.is_tracked());
        let (x, head) = (x.into_primitive(), head.into_primitive());
        match LinearCrossEntropy
            .prepare::<C>(parents)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let given = (x.clone(), head.clone(), targets.clone());
                let (nll, lse, dx) = if x_tracked {
                    let (nll, lse, dx) = B::linear_cross_entropy_with_dx(x, head, targets);
                    (nll, lse, Some(dx))
                } else {
                    let (nll, lse) = B::linear_cross_entropy_forward(x, head, targets);
                    (nll, lse, None)
                };
                let (x, head, targets) = given;
                let head = head_tracked.then_some(HeadState {
                    x,
                    head,
                    targets,
                    lse,
                });
                prep.finish(State { dx, head }, nll)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::linear_cross_entropy(x, head, targets)),
        }
    }
}
