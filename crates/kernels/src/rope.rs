//! Rotary position embeddings: an extension of burn's backends.

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
use burn::tensor::{Shape, Slice, Tensor};

use crate::dtype::{assert_same, assert_same_or_f32, cast, widened};

#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
#[cfg(all(test, feature = "flex"))]
mod tests;

/// Rotation of `[batch, seq, heads, dim]`, composed from burn's primitive operations unless overridden.
///
/// The tables of cosines and sines are `[seq, dim]`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait RopeOps: Backend {
    /// See [`rotate_half`].
    #[fusion(dtype = x, shape = x)]
    fn rotate_half(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::rotate_half::<Self>(x, cos, sin)
    }

    /// The gradient of [`RopeOps::rotate_half`] for `x`, the transpose of the rotation.
    #[fusion(dtype = dy, shape = dy)]
    fn rotate_half_dx(
        dy: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::rotate_half(dy, cos, composed::transposed::<Self>(sin))
    }
}

#[cfg(feature = "ndarray")]
impl RopeOps for burn::backend::NdArray {}

/// Applies rotary position embeddings, differentiable in `x`.
///
/// Dimension `i` is rotated with `i + dim / 2`, as in Hugging Face's models:
/// `x * cos + concat(-x[dim / 2 ..], x[.. dim / 2]) * sin` (Su et al. 2021, arXiv:2104.09864).
///
/// # Shapes
/// - `x`: `[batch, seq, heads, dim]`
/// - `cos`, `sin`: `[seq, dim]`, in `F32` or in the dtype of `x`; they get no gradient
/// - result: `[batch, seq, heads, dim]`, in the dtype of `x`
///
/// # Panics
/// If the shape of a table is not `[seq, dim]`, its dtype is another, or `dim` is odd.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::rotate_half;
///
/// let device = Device::flex();
/// let x = Tensor::<4>::from_data([[[[1.0, 2.0]]]], &device);
/// // A quarter turn.
/// let (cos, sin) = (Tensor::zeros([1, 2], &device), Tensor::ones([1, 2], &device));
/// let y = rotate_half(x, cos, sin);
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [-2.0, 1.0]);
/// ```
pub fn rotate_half(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let [_, seq, _, dim] = x.dims();
    assert!(
        dim.is_multiple_of(2),
        "{dim} dimensions of a head are not even"
    );
    assert_eq!(cos.dims(), [seq, dim], "the shape of the cosines");
    assert_eq!(sin.dims(), [seq, dim], "the shape of the sines");
    assert_same_or_f32("the table of cosines", cos.dtype(), x.dtype());
    assert_same(
        "the table of sines",
        sin.dtype(),
        "that of cosines",
        cos.dtype(),
    );
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotate_half(x.into_dispatch(), cos, sin))
}

mod composed {
    use super::*;

    pub(super) fn rotate_half<B: Backend>(
        x: FloatTensor<B>,
        cos: FloatTensor<B>,
        sin: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let dtype = x.dtype();
        let x = widened::<B>(x);
        let [cos, sin] = [cos, sin].map(|t| cast::<B>(t, x.dtype()));
        let [seq, dim] = cos.shape().dims();
        let table = |t: FloatTensor<B>| B::float_reshape(t, Shape::new([1, seq, 1, dim]));
        let (first, second) = halves::<B>(x.clone());
        let turned = B::float_cat(vec![B::float_neg(second), first], 3);
        let along = B::float_mul(x, table(cos));
        let y = B::float_add(along, B::float_mul(turned, table(sin)));
        cast::<B>(y, dtype)
    }

    /// The sines with which [`rotate_half`] is the transpose of the rotation by `sin`.
    pub(super) fn transposed<B: Backend>(sin: FloatTensor<B>) -> FloatTensor<B> {
        let (first, second) = halves::<B>(sin);
        B::float_neg(B::float_cat(vec![second, first], 1))
    }

    /// The halves of the last dimension.
    fn halves<B: Backend>(t: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
        let shape = t.shape();
        let last = shape.num_dims() - 1;
        let half = shape[last] / 2;
        let mut slices = vec![Slice::full(); last];
        slices.push(Slice::from(0..half));
        let first = B::float_slice(t.clone(), &slices);
        slices[last] = Slice::from(half..2 * half);
        (first, B::float_slice(t, &slices))
    }
}

#[derive(Debug)]
struct RotateHalf;

impl<B: RopeOps> Backward<B, 1> for RotateHalf {
    /// The tables of cosines and sines.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (cos, sin) = ops.state;
        if let [Some(parent)] = ops.parents {
            grads.register::<B>(parent.id, B::rotate_half_dx(dy, cos, sin));
        }
    }
}

impl<B: RopeOps, C: CheckpointStrategy> RopeOps for Autodiff<B, C> {
    fn rotate_half(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let node = x.node();
        let x = x.into_primitive();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        match RotateHalf.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((cos.clone(), sin.clone()), B::rotate_half(x, cos, sin))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotate_half(x, cos, sin)),
        }
    }
}
