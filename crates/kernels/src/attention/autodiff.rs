//! The backward pass of every backend: it keeps no probabilities.

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::FloatTensor,
};

use super::starts::Starts;
use super::{AttentionOps, Scores};

#[derive(Debug)]
struct CausalAttention;

#[derive(Clone, Debug)]
struct State<B: AttentionOps> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    starts: Starts<B>,
    y: FloatTensor<B>,
    lse: FloatTensor<B>,
    scores: Scores,
}

/// The parents are queries, keys and values.
impl<B: AttentionOps> Backward<B, 3> for CausalAttention {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let State {
            q,
            k,
            v,
            starts,
            y,
            lse,
            scores,
        } = ops.state;
        let (dq, dk, dv) = B::causal_attention_backward(q, k, v, starts, y, lse, dy, scores);
        for (parent, gradient) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        starts: Starts<Self>,
        scores: Scores,
    ) -> FloatTensor<Self> {
        // The same integer tensor, as one of the inner backend.
        let starts = match starts {
            Starts::First => Starts::First,
            Starts::Each(starts) => Starts::Each(starts),
        };
        let parents = [q.node(), k.node(), v.node()];
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        match CausalAttention
            .prepare::<C>(parents)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (y, lse) = B::causal_attention_forward(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    starts.clone(),
                    scores,
                );
                let state = State {
                    q,
                    k,
                    v,
                    starts,
                    y: y.clone(),
                    lse,
                    scores,
                };
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::causal_attention(q, k, v, starts, scores)),
        }
    }
}
