//! The backward pass of every backend: it keeps the packed weight and unpacks it again.

use burn::backend::{
    Autodiff, AutodiffBackend,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, NodeGuard, Ops, OpsKind},
    },
    tensor::FloatTensor,
};

use super::packed::{Packed, Zeros};
use super::{QuantOps, composed};

#[derive(Debug)]
struct QuantMatmul;

/// The parents are `x`, the scales and, if there are any, the zeros.
impl<B: QuantOps, const N: usize> Backward<B, N> for QuantMatmul {
    /// `x`, if a gradient of the grid is needed, and the weight.
    type State = (Option<FloatTensor<B>>, Packed<B>);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, w) = ops.state;
        let id = |parent: usize| -> Option<NodeId> { Some(ops.parents.get(parent)?.as_ref()?.id) };

        if let Some(x) = x {
            let (dscales, dzeros) = B::quant_matmul_dgrid(dy.clone(), x, w.clone());
            if let Some(id) = id(1) {
                grads.register::<B>(id, dscales);
            }
            if let Some(id) = id(2) {
                grads.register::<B>(id, dzeros);
            }
        }
        if let Some(id) = id(0) {
            grads.register::<B>(id, B::quant_matmul_dx(dy, w));
        }
    }
}

impl<B: QuantOps, C: CheckpointStrategy> QuantOps for Autodiff<B, C> {
    /// Composed only where a gradient of the scales or the zeros is needed.
    fn quant_unpack(w: Packed<Self>) -> FloatTensor<Self> {
        let zeros_tracked = matches!(&w.zeros, Zeros::Each(zeros) if zeros.is_tracked());
        if w.scales.is_tracked() || zeros_tracked {
            return composed::unpack(w);
        }
        let zeros = match w.zeros {
            Zeros::Each(zeros) => Zeros::Each(zeros.into_primitive()),
            Zeros::Absent => Zeros::Absent,
        };
        Self::from_inner(B::quant_unpack(Packed {
            words: w.words,
            scales: w.scales.into_primitive(),
            zeros,
            layout: w.layout,
            precision: w.precision,
        }))
    }

    fn quant_matmul(x: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        let (x_node, scales_node) = (x.node(), w.scales.node());
        let scales_tracked = w.scales.is_tracked();
        let (words, scales) = (w.words, w.scales.into_primitive());
        let (layout, precision) = (w.layout, w.precision);
        let packed = |zeros| Packed {
            words,
            scales,
            zeros,
            layout,
            precision,
        };
        let x = x.into_primitive();
        match w.zeros {
            Zeros::Each(zeros) => {
                let (zeros_node, tracked) = (zeros.node(), zeros.is_tracked());
                let w = packed(Zeros::Each(zeros.into_primitive()));
                record::<B, C, 3>(
                    [x_node, scales_node, zeros_node],
                    scales_tracked || tracked,
                    x,
                    w,
                )
            }
            Zeros::Absent => {
                let w = packed(Zeros::Absent);
                record::<B, C, 2>([x_node, scales_node], scales_tracked, x, w)
            }
        }
    }
}

fn record<B: QuantOps, C: CheckpointStrategy, const N: usize>(
    parents: [NodeGuard; N],
    grid_tracked: bool,
    x: FloatTensor<B>,
    w: Packed<B>,
) -> FloatTensor<Autodiff<B, C>> {
    match Backward::<B, N>::prepare::<C>(QuantMatmul, parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let state = (grid_tracked.then(|| x.clone()), w.clone());
            prep.finish(state, B::quant_matmul(x, w))
        }
        OpsKind::UnTracked(prep) => prep.finish(B::quant_matmul(x, w)),
    }
}
