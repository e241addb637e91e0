//! Root mean square normalization: an extension of burn's backends.

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
use burn::tensor::{DType, Shape, Tensor};

use crate::dtype::{assert_same_or_f32, cast, widened};

#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
#[cfg(all(test, feature = "flex"))]
mod tests;

/// Operations on `x` and `dy`, `[rows, d]`, composed from burn's primitive operations unless overridden.
///
/// The weight is `[d]`, and `r = 1 / sqrt(mean(x²) + eps)` for each row.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait NormOps: Backend {
    /// `x r weight`, `[rows, d]`.
    #[fusion(dtype = x, shape = x)]
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        composed::rms_norm::<Self>(x, weight, eps)
    }

    /// The gradient for `x`, `r (weight dy - x r² mean(x weight dy))`: `[rows, d]`.
    #[fusion(dtype = x, shape = x)]
    fn rms_norm_dx(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        composed::dx::<Self>(x, weight, dy, eps)
    }

    /// The gradient for the weight, the sum of `dy x r` over the rows: `[d]`, in the dtype of
    /// the weight.
    #[fusion(default)]
    fn rms_norm_dweight(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
        dtype: DType,
    ) -> FloatTensor<Self> {
        composed::dweight::<Self>(x, dy, eps, dtype)
    }
}

#[cfg(feature = "ndarray")]
impl NormOps for burn::backend::NdArray {}

/// Root mean square normalization, differentiable in `x` and `weight`.
///
/// It is `x / sqrt(mean(x²) + eps) * weight` with the mean over the last dimension (Zhang and Sennrich
/// 2019, arXiv:1910.07467).
///
/// # Shapes
/// - `x`: `[.., d]`
/// - `weight`: `[d]`, in `F32` or in the dtype of `x`
/// - result: `[.., d]`, in the dtype of `x`
///
/// # Panics
/// If the length or the dtype of `weight` is another.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::rms_norm;
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_data([[1.0, -7.0]], &device);
/// let weight = Tensor::<1>::from_data([5.0, 10.0], &device);
/// let y = rms_norm(x, weight, 0.0);
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [1.0, -14.0]);
/// ```
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let dims = x.dims();
    let d = dims[D - 1];
    assert_eq!(weight.dims(), [d], "the length of the weight");
    assert_same_or_f32("the weight", weight.dtype(), x.dtype());
    let rows = dims[..D - 1].iter().product::<usize>();
    let x = x.reshape([rows, d]).into_dispatch();
    let y = Dispatch::rms_norm(x, weight.into_dispatch(), eps);
    Tensor::<2>::from_dispatch(y).reshape(dims)
}

mod composed {
    use super::*;

    pub(super) fn rms_norm<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        eps: f64,
    ) -> FloatTensor<B> {
        let dtype = x.dtype();
        let (x, weight) = (widened::<B>(x), widened::<B>(weight));
        let r = reciprocal_root::<B>(&x, eps);
        let weight = cast::<B>(weight, x.dtype());
        cast::<B>(B::float_mul(B::float_mul(x, r), row::<B>(weight)), dtype)
    }

    pub(super) fn dx<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        dy: FloatTensor<B>,
        eps: f64,
    ) -> FloatTensor<B> {
        let dtype = x.dtype();
        let [x, weight, dy] = [x, weight, dy].map(widened::<B>);
        let r = reciprocal_root::<B>(&x, eps);
        let weight = cast::<B>(weight, x.dtype());
        let dy = B::float_mul(dy, row::<B>(weight));
        let mean = B::float_mean_dim(B::float_mul(x.clone(), dy.clone()), 1);
        let along = B::float_mul(mean, B::float_mul(r.clone(), r.clone()));
        let dx = B::float_mul(B::float_sub(dy, B::float_mul(x, along)), r);
        cast::<B>(dx, dtype)
    }

    pub(super) fn dweight<B: Backend>(
        x: FloatTensor<B>,
        dy: FloatTensor<B>,
        eps: f64,
        dtype: DType,
    ) -> FloatTensor<B> {
        let d = x.shape()[1];
        let (x, dy) = (widened::<B>(x), widened::<B>(dy));
        let r = reciprocal_root::<B>(&x, eps);
        let sum = B::float_sum_dim(B::float_mul(B::float_mul(x, r), dy), 0);
        cast::<B>(B::float_reshape(sum, Shape::new([d])), dtype)
    }

    /// `r`, `[rows, 1]`.
    fn reciprocal_root<B: Backend>(x: &FloatTensor<B>, eps: f64) -> FloatTensor<B> {
        let square = B::float_mul(x.clone(), x.clone());
        let mean = B::float_add_scalar(B::float_mean_dim(square, 1), eps.into());
        B::float_recip(B::float_sqrt(mean))
    }

    fn row<B: Backend>(weight: FloatTensor<B>) -> FloatTensor<B> {
        let d = weight.shape()[0];
        B::float_reshape(weight, Shape::new([1, d]))
    }
}

#[derive(Debug)]
struct RmsNorm;

/// The parents are `x` and the weight.
impl<B: NormOps> Backward<B, 2> for RmsNorm {
    type State = (FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, weight, eps) = ops.state;
        let [x_parent, weight_parent] = ops.parents;
        if let Some(parent) = weight_parent {
            let dweight = B::rms_norm_dweight(x.clone(), dy.clone(), eps, weight.dtype());
            grads.register::<B>(parent.id, dweight);
        }
        if let Some(parent) = x_parent {
            grads.register::<B>(parent.id, B::rms_norm_dx(x, weight, dy, eps));
        }
    }
}

impl<B: NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let parents = [x.node(), weight.node()];
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match RmsNorm.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = (x.clone(), weight.clone(), eps);
                prep.finish(state, B::rms_norm(x, weight, eps))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, eps)),
        }
    }
}
