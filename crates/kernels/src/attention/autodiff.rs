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

use super::mask::{Bound, KeyRanges};
use super::{AttentionOps, Scores};

#[derive(Debug)]
struct Attention;

#[derive(Clone, Debug)]
struct State<B: AttentionOps> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    mask: KeyRanges<B>,
    y: FloatTensor<B>,
    lse: FloatTensor<B>,
    scores: Scores,
}

/// The parents are queries, keys and values.
impl<B: AttentionOps> Backward<B, 3> for Attention {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let State {
            q,
            k,
            v,
            mask,
            y,
            lse,
            scores,
        } = ops.state;
        let (dq, dk, dv) = B::masked_attention_backward(q, k, v, mask, y, lse, dy, scores);
        for (parent, gradient) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn masked_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: KeyRanges<Self>,
        scores: Scores,
    ) -> FloatTensor<Self> {
        let mask = mask.inner();
        let parents = [q.node(), k.node(), v.node()];
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        match Attention.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (y, lse) = B::masked_attention_forward(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    mask.clone(),
                    scores,
                );
                let state = State {
                    q,
                    k,
                    v,
                    mask,
                    y: y.clone(),
                    lse,
                    scores,
                };
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::masked_attention(q, k, v, mask, scores)),
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> KeyRanges<Autodiff<B, C>> {
    /// The same bounds, which are integers, as those of the inner backend.
    fn inner(self) -> KeyRanges<B> {
        let inner = |bound| match bound {
            Bound::Absent => Bound::Absent,
            Bound::Each(bounds) => Bound::Each(bounds),
        };
        KeyRanges {
            causal: self.causal,
            starts: inner(self.starts),
            ends: inner(self.ends),
        }
    }
}
