//! The backward pass of every backend: it keeps no logits.

use burn::backend::{
    Autodiff, TensorMetadata,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, NodeGuard, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::Shape;

use super::LossOps;
use super::head::{Bias, Head};
use crate::dtype::{cast, widened};

#[derive(Debug)]
struct LinearCrossEntropy;

#[derive(Clone, Debug)]
struct State<B: LossOps> {
    /// The gradient of each row's loss for `x`, if `x` is tracked.
    dx: Option<FloatTensor<B>>,
    /// The inputs of the gradients for the head, if a part of it is tracked.
    head: Option<HeadState<B>>,
}

/// The inputs of the gradients for the head.
#[derive(Clone, Debug)]
struct HeadState<B: LossOps> {
    x: FloatTensor<B>,
    head: Head<B>,
    targets: IntTensor<B>,
    lse: FloatTensor<B>,
}

/// The parents are `x`, the weight of the head and, if it has one, its bias.
impl<B: LossOps, const N: usize> Backward<B, N> for LinearCrossEntropy {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dnll = grads.consume::<B>(&ops.node);
        let id = |parent: usize| -> Option<NodeId> { Some(ops.parents.get(parent)?.as_ref()?.id) };
        if let Some(state) = ops.state.head {
            let HeadState {
                x,
                head,
                targets,
                lse,
            } = state;
            let (dweight, dbias) =
                B::linear_cross_entropy_dhead(x, head, targets, lse, dnll.clone());
            if let Some(id) = id(1) {
                grads.register::<B>(id, dweight);
            }
            if let (Some(id), Bias::Each(dbias)) = (id(2), dbias) {
                grads.register::<B>(id, dbias);
            }
        }
        if let (Some(id), Some(dx)) = (id(0), ops.state.dx) {
            let dnll = B::float_reshape(dnll, Shape::new([dx.shape()[0], 1]));
            let dtype = dx.dtype();
            let dx = B::float_mul(widened::<B>(dx), dnll);
            grads.register::<B>(id, cast::<B>(dx, dtype));
        }
    }
}

impl<B: LossOps, C: CheckpointStrategy> LossOps for Autodiff<B, C> {
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let (x_node, x_tracked) = (x.node(), x.is_tracked());
        let (weight_node, weight_tracked) = (head.weight.node(), head.weight.is_tracked());
        let (x, weight) = (x.into_primitive(), head.weight.into_primitive());
        let softcap = head.softcap;
        let with = |bias| Head {
            weight,
            bias,
            softcap,
        };
        match head.bias {
            Bias::Each(bias) => {
                let (bias_node, bias_tracked) = (bias.node(), bias.is_tracked());
                let head = with(Bias::Each(bias.into_primitive()));
                let parents = [x_node, weight_node, bias_node];
                let tracked = [x_tracked, weight_tracked || bias_tracked];
                record::<B, C, 3>(parents, tracked, x, head, targets)
            }
            Bias::Absent => {
                let parents = [x_node, weight_node];
                let tracked = [x_tracked, weight_tracked];
                record::<B, C, 2>(parents, tracked, x, with(Bias::Absent), targets)
            }
        }
    }
}

fn record<B: LossOps, C: CheckpointStrategy, const N: usize>(
    parents: [NodeGuard; N],
    [x_tracked, head_tracked]: [bool; 2],
    x: FloatTensor<B>,
    head: Head<B>,
    targets: IntTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    match Backward::<B, N>::prepare::<C>(LinearCrossEntropy, parents)
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
