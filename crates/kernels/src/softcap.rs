//! Soft caps of scores and of logits: an extension of burn's backends.

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

use crate::dtype::{cast, widened};

#[cfg(feature = "flex")]
mod flex;
#[cfg(all(test, feature = "flex"))]
mod tests;

#[cfg(feature = "flex")]
pub(crate) use flex::cap_each;

/// The bound of `cap · tanh(x / cap)`, positive and finite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Softcap(f64);

impl Softcap {
    /// # Panics
    /// If the cap is not positive and finite.
    #[track_caller]
    pub(crate) fn new(cap: f64) -> Self {
        let in_f32 = cap as f32;
        assert!(
            in_f32 > 0.0 && in_f32.is_normal(),
            "a soft cap of {cap} is not positive and finite"
        );
        Self(cap)
    }

    #[cfg(feature = "cubecl")]
    pub(crate) fn value(self) -> f64 {
        self.0
    }

    /// `cap · tanh(x / cap)` of values in `F32` or wider.
    pub(crate) fn apply<B: Backend>(self, x: FloatTensor<B>) -> FloatTensor<B> {
        let share = B::float_div_scalar(x, self.0.into());
        B::float_mul_scalar(B::float_tanh(share), self.0.into())
    }

    /// The derivative of [`Softcap::apply`] where its result is `capped`: `1 - (capped / cap)²`.
    pub(crate) fn slope<B: Backend>(self, capped: FloatTensor<B>) -> FloatTensor<B> {
        let share = B::float_div_scalar(capped, self.0.into());
        let square = B::float_mul(share.clone(), share);
        B::float_add_scalar(B::float_neg(square), 1.into())
    }
}

/// A gradient of capped values times the slopes of the cap, if there are any.
pub(crate) fn times_slope<B: Backend>(
    gradient: FloatTensor<B>,
    slope: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    match slope {
        Some(slope) => B::float_mul(gradient, slope),
        None => gradient,
    }
}

/// The cap and its gradient, composed from burn's primitive operations unless overridden.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait SoftcapOps: Backend {
    /// See [`softcap`].
    #[fusion(default)]
    fn softcap(x: FloatTensor<Self>, cap: Softcap) -> FloatTensor<Self> {
        composed::softcap::<Self>(x, cap)
    }

    /// The gradient of [`SoftcapOps::softcap`] from its result: `dy (1 - (y / cap)²)`.
    #[fusion(default)]
    fn softcap_backward(
        y: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        cap: Softcap,
    ) -> FloatTensor<Self> {
        composed::softcap_backward::<Self>(y, dy, cap)
    }
}

#[cfg(feature = "ndarray")]
impl SoftcapOps for burn::backend::NdArray {}

#[cfg(feature = "cubecl")]
impl SoftcapOps for burn_cubecl::CubeBackend {}

/// Bounds values smoothly, `cap · tanh(x / cap)`, differentiable in `x`.
///
/// Gemma 2 caps its scores and logits (Gemma Team 2024, arXiv:2408.00118, section 2). The cap of scores
/// is a part of [`attention`](crate::attention()), and that of logits in a loss one of
/// [`linear_cross_entropy`](crate::linear_cross_entropy); this is the cap of logits that are a result.
/// Only the result is kept for backward.
///
/// # Panics
/// If `cap` is not positive and finite.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::softcap;
///
/// let logits = Tensor::<1>::from_data([-1e6, 0.0, 30.0], &Device::flex());
/// let y = softcap(logits, 30.0).into_data().try_to_vec::<f32>().unwrap();
/// assert_eq!(y[..2], [-30.0, 0.0]);
/// assert!((y[2] - 30.0 * 1f32.tanh()).abs() < 1e-5);
/// ```
pub fn softcap<const D: usize>(x: Tensor<D>, cap: f64) -> Tensor<D> {
    let (cap, dims) = (Softcap::new(cap), x.dims());
    let flat = x.reshape([dims.iter().product::<usize>()]);
    let y = Dispatch::softcap(flat.into_dispatch(), cap);
    Tensor::<1>::from_dispatch(y).reshape(dims)
}

mod composed {
    use super::*;

    pub(super) fn softcap<B: Backend>(x: FloatTensor<B>, cap: Softcap) -> FloatTensor<B> {
        let dtype = x.dtype();
        cast::<B>(cap.apply::<B>(widened::<B>(x)), dtype)
    }

    pub(super) fn softcap_backward<B: Backend>(
        y: FloatTensor<B>,
        dy: FloatTensor<B>,
        cap: Softcap,
    ) -> FloatTensor<B> {
        let dtype = y.dtype();
        let slope = cap.slope::<B>(widened::<B>(y));
        cast::<B>(B::float_mul(widened::<B>(dy), slope), dtype)
    }
}

#[derive(Debug)]
struct ApplySoftcap;

impl<B: SoftcapOps> Backward<B, 1> for ApplySoftcap {
    /// The result and the cap.
    type State = (FloatTensor<B>, Softcap);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (y, cap) = ops.state;
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::softcap_backward(y, dy, cap));
        }
    }
}

impl<B: SoftcapOps, C: CheckpointStrategy> SoftcapOps for Autodiff<B, C> {
    fn softcap(x: FloatTensor<Self>, cap: Softcap) -> FloatTensor<Self> {
        let parents = [x.node()];
        let y = B::softcap(x.into_primitive(), cap);
        match ApplySoftcap
            .prepare::<C>(parents)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((y.clone(), cap), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
