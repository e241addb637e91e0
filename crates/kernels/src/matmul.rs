//! The product with a dense weight at rest: an extension of burn's backends.

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
use burn::tensor::{DType, Tensor};
#[cfg(feature = "fusion")]
use burn::{backend::fusion::custom::TensorSpec, tensor::Shape};

use crate::dtype::{cast, widened};
#[cfg(feature = "cubecl")]
pub(crate) use cube::{device_product, product};

#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "flex")]
mod flex;
#[cfg(all(test, feature = "flex"))]
mod tests;

/// Products of `x`, `[rows, d_in]`, with a weight of any dtype, `[d_in, d_out]`, composed from burn's
/// primitive operations unless overridden.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait MatmulOps: Backend {
    /// `x · weight`, `[rows, d_out]`, in the dtype of `x`.
    #[fusion(dtype = x, shape = Shape::new([x[0], weight[1]]))]
    fn dense_matmul(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let weight = cast::<Self>(weight, x.dtype());
        Self::float_matmul(x, weight)
    }

    /// The gradient for `x`, `dy · weightᵀ`: `[rows, d_in]`, in the dtype of `dy`.
    #[fusion(dtype = dy, shape = Shape::new([dy[0], weight[0]]))]
    fn dense_matmul_dx(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let weight = cast::<Self>(weight, dy.dtype());
        Self::float_matmul(dy, Self::float_transpose(weight))
    }

    /// The gradient for the weight, `xᵀ · dy`: `[d_in, d_out]`, in the dtype of the weight.
    #[fusion(meta = |x, dy, dtype| TensorSpec::new(Shape::new([x.shape[1], dy.shape[1]]), *dtype))]
    fn dense_matmul_dweight(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dtype: DType,
    ) -> FloatTensor<Self> {
        let (x, dy) = (widened::<Self>(x), widened::<Self>(dy));
        cast::<Self>(Self::float_matmul(Self::float_transpose(x), dy), dtype)
    }
}

#[cfg(feature = "ndarray")]
impl MatmulOps for burn::backend::NdArray {}

/// Multiplies by a dense weight at rest: `x · weight`, differentiable in both.
///
/// The weight may be of another dtype than `x`, such as `BF16` from a file, or an `F32` that is trained.
/// It is converted where it is used: on the CPU panel by panel to `f32`, in which sums are computed
/// whatever the dtypes, and otherwise as a whole to the dtype of `x`. On the CPU the result is the same
/// bits for values that are at rest in `F32`, `F16` or `BF16`.
///
/// # Shapes
/// - `x`: `[.., d_in]`
/// - `weight`: `[d_in, d_out]`
/// - result: `[.., d_out]`, in the dtype of `x`; the gradients are in the dtypes of their tensors
///
/// # Panics
/// If the last dimension of `x` is not `d_in`.
///
/// # Examples
/// ```
/// use burn::tensor::{DType, Device, Tensor};
/// use kernels::matmul;
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::from_data([[1.5, 2.0], [0.25, -4.0]], (&device, DType::BF16));
/// let x = Tensor::<2>::from_data([[1.0, 2.0]], &device);
/// let y = matmul(x, weight);
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [2.0, -6.0]);
/// ```
pub fn matmul<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    let mut dims = x.dims();
    let [d_in, d_out] = weight.dims();
    assert_eq!(dims[D - 1], d_in, "the inputs of x and of the weight");
    let rows = dims[..D - 1].iter().product::<usize>();
    dims[D - 1] = d_out;
    let x = x.reshape([rows, d_in]).into_dispatch();
    let y = Dispatch::dense_matmul(x, weight.into_dispatch());
    Tensor::<2>::from_dispatch(y).reshape(dims)
}

#[derive(Debug)]
struct DenseMatmul;

#[derive(Clone, Debug)]
struct State<F> {
    /// `x` and the dtype of the weight, if a gradient of the weight is needed.
    x: Option<(F, DType)>,
    /// The weight, if a gradient of `x` is needed.
    weight: Option<F>,
}

/// The parents are `x` and the weight.
impl<B: MatmulOps> Backward<B, 2> for DenseMatmul {
    type State = State<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x_parent, weight_parent] = ops.parents;
        if let (Some(parent), Some((x, dtype))) = (weight_parent, ops.state.x) {
            let dweight = B::dense_matmul_dweight(x, dy.clone(), dtype);
            grads.register::<B>(parent.id, dweight);
        }
        if let (Some(parent), Some(weight)) = (x_parent, ops.state.weight) {
            grads.register::<B>(parent.id, B::dense_matmul_dx(dy, weight));
        }
    }
}

impl<B: MatmulOps, C: CheckpointStrategy> MatmulOps for Autodiff<B, C> {
    fn dense_matmul(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let parents = [x.node(), weight.node()];
        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match DenseMatmul.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = State {
                    x: weight_tracked.then(|| (x.clone(), weight.dtype())),
                    weight: x_tracked.then(|| weight.clone()),
                };
                prep.finish(state, B::dense_matmul(x, weight))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::dense_matmul(x, weight)),
        }
    }
}
