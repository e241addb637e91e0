//! The gate of a gated MLP (SwiGLU): an extension of burn's backends.

use burn::backend::{
    Autodiff, Backend, Dispatch, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::Tensor;

use crate::dtype::{assert_same, cast, widened};

#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
#[cfg(all(test, feature = "flex"))]
mod tests;

/// Operations on vectors of one length, composed from burn's primitive operations unless overridden.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait GateOps: Backend {
    /// `silu(gate) * up`.
    #[fusion(dtype = gate, shape = gate)]
    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::silu_mul::<Self>(gate, up)
    }

    /// The gradients of [`GateOps::silu_mul`] for `gate` and `up`.
    ///
    /// With `s = sigmoid(gate)`: `dgate = dy up s (1 + gate (1 - s))`, `dup = dy gate s`.
    #[fusion(meta = |gate, up, _dy| (gate.clone(), up.clone()))]
    fn silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::silu_mul_backward::<Self>(gate, up, dy)
    }
}

#[cfg(feature = "ndarray")]
impl GateOps for burn::backend::NdArray {}

/// The product `silu(gate) * up`, differentiable in both.
///
/// Only the two inputs are kept for backward. SiLU is of Elfwing et al. 2018, arXiv:1702.03118; SwiGLU
/// of Shazeer 2020, arXiv:2002.05202.
///
/// # Panics
/// If the shapes or the dtypes differ.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::silu_mul;
///
/// let device = Device::flex();
/// let gate = Tensor::<1>::from_data([0.0, 100.0], &device);
/// let up = Tensor::<1>::from_data([3.0, 0.5], &device);
/// let y = silu_mul(gate, up);
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [0.0, 50.0]);
/// ```
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    let dims = gate.dims();
    assert_eq!(dims, up.dims(), "the shapes of gate and up");
    assert_same("up", up.dtype(), "gate", gate.dtype());
    let flat = |t: Tensor<D>| t.reshape([dims.iter().product::<usize>()]).into_dispatch();
    let y = Dispatch::silu_mul(flat(gate), flat(up));
    Tensor::<1>::from_dispatch(y).reshape(dims)
}

mod composed {
    use super::*;

    pub(super) fn silu_mul<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
        let dtype = gate.dtype();
        let (gate, up) = (widened::<B>(gate), widened::<B>(up));
        let silu = B::float_mul(gate.clone(), B::sigmoid(gate));
        cast::<B>(B::float_mul(silu, up), dtype)
    }

    pub(super) fn silu_mul_backward<B: Backend>(
        gate: FloatTensor<B>,
        up: FloatTensor<B>,
        dy: FloatTensor<B>,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let dtype = gate.dtype();
        let [gate, up, dy] = [gate, up, dy].map(widened::<B>);
        let s = B::sigmoid(gate.clone());
        let dys = B::float_mul(dy, s.clone());
        let slope = B::float_mul(gate.clone(), B::float_add_scalar(B::float_neg(s), 1.into()));
        let slope = B::float_add_scalar(slope, 1.into());
        let dgate = B::float_mul(B::float_mul(dys.clone(), up), slope);
        let dup = B::float_mul(dys, gate);
        (cast::<B>(dgate, dtype), cast::<B>(dup, dtype))
    }
}

#[derive(Debug)]
struct SiluMul;

/// The parents are `gate` and `up`.
impl<B: GateOps> Backward<B, 2> for SiluMul {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (gate, up) = ops.state;
        let (dgate, dup) = B::silu_mul_backward(gate, up, dy);
        for (parent, gradient) in ops.parents.into_iter().zip([dgate, dup]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: GateOps, C: CheckpointStrategy> GateOps for Autodiff<B, C> {
    fn silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let parents = [gate.node(), up.node()];
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        match SiluMul.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((gate.clone(), up.clone()), B::silu_mul(gate, up))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::silu_mul(gate, up)),
        }
    }
}
