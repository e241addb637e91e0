//! The loss of a language model from its hidden states: an extension of burn's backends.

use burn::backend::{
    Backend, Dispatch, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Int, Tensor};
#[cfg(feature = "fusion")]
use burn::{backend::fusion::custom::TensorSpec, tensor::Shape};

mod autodiff;
mod composed;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
mod head;
#[cfg(all(test, feature = "flex"))]
mod tests;

pub use head::OutputHead;
use head::{Bias, Head};

#[cfg(feature = "fusion")]
use crate::dtype::widened_dtype;

/// The loss and its gradients, composed from burn's primitive operations unless overridden.
///
/// The hidden states `x` are `[rows, hidden]`, the weight of the head is `[hidden, vocab]` and the targets
/// are `[rows]`. The probabilities of a row are `p = exp(logits - lse)`, and the gradient of its loss for
/// what is capped is `d = (p - onehot(target)) (1 - (logits / cap)²)`, without the last factor if there is
/// no cap. The head may be of another dtype than `x`; losses are `F32` where `x` is of 16 bits.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait LossOps: Backend {
    /// See [`linear_cross_entropy`].
    #[fusion(default)]
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        #[extension_type] head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::linear_cross_entropy_forward(x, head, targets).0
    }

    /// The loss and the log-sum-exp of the logits of each row, `[rows]` each.
    #[fusion(meta = |x, _head, _targets| (of_rows(x), of_rows(x)))]
    fn linear_cross_entropy_forward(
        x: FloatTensor<Self>,
        #[extension_type] head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (nll, lse, _) = composed::forward::<Self>(x, head, targets, false);
        (nll, lse)
    }

    /// [`LossOps::linear_cross_entropy_forward`], and the gradient of each row's loss for its `x`.
    ///
    /// The gradient, `d · weightᵀ`: `[rows, hidden]`, in the dtype of `x`, comes from the same logits.
    #[fusion(meta = |x, _head, _targets| (of_rows(x), of_rows(x), x.clone()))]
    fn linear_cross_entropy_with_dx(
        x: FloatTensor<Self>,
        #[extension_type] head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (nll, lse, dx) = composed::forward::<Self>(x, head, targets, true);
        (nll, lse, dx.expect("the gradient is requested"))
    }

    /// The gradients for the weight of the head, `xᵀ · (d dnll)`, and for its bias, the sum of `d dnll`
    /// over the rows, if it has one; each in its dtype.
    #[fusion(meta = |_x, head, _targets, _lse, _dnll| (head.weight.clone(), head.bias.clone()))]
    fn linear_cross_entropy_dhead(
        x: FloatTensor<Self>,
        #[extension_type] head: Head<Self>,
        targets: IntTensor<Self>,
        lse: FloatTensor<Self>,
        dnll: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, Bias<Self>) {
        composed::dhead::<Self>(x, head, targets, lse, dnll)
    }
}

#[cfg(feature = "ndarray")]
impl LossOps for burn::backend::NdArray {}

/// The cross-entropy of each target under `softmax(logits)`, differentiable in `x` and the head.
///
/// The logits are `x · head`; an [`OutputHead`] may have a bias and a soft cap, too.
///
/// It is the negative log-likelihood in nats. At most 16 MiB of logits are in memory at a time, or one
/// row; on a device of CubeCL, or 1024 rows, so that the head is read less often. The gradient of `x`, if
/// it is needed, is computed together with the loss, and backward multiplies it by the gradient of the
/// loss; that of the head computes the logits again. The weight may be a transposed embedding, which is
/// not copied on the CPU, and of another dtype than `x`: see [`matmul`](crate::matmul).
///
/// # Shapes
/// - `x`: `[rows, hidden]`
/// - `head`: `[hidden, vocab]`, with a bias of `[vocab]`
/// - `targets`: `[rows]`, each in `0 .. vocab`
/// - result: `[rows]`, in `F32` where `x` is of 16 bits
///
/// # Panics
/// If the shapes are not these, or there are no rows; on the CPU also if a target is not below `vocab`.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use kernels::linear_cross_entropy;
///
/// let device = Device::flex();
/// let x = Tensor::<2>::ones([1, 3], &device);
/// // Equal logits of four tokens: each has the probability 1/4.
/// let head = Tensor::<2>::ones([3, 4], &device);
/// let targets = Tensor::<1, Int>::from_data([2], &device);
/// let nll = linear_cross_entropy(x, head, targets).into_scalar::<f32>();
/// assert!((nll - 4f32.ln()).abs() < 1e-6);
/// ```
pub fn linear_cross_entropy(
    x: Tensor<2>,
    head: impl Into<OutputHead>,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    let head = head.into();
    let ([rows, hidden], [inputs, vocab]) = (x.dims(), head.weight.dims());
    assert_eq!(hidden, inputs, "the inputs of the head");
    assert_eq!(targets.dims(), [rows], "the number of targets");
    assert!(rows > 0, "there are no rows");
    let bias = match head.bias {
        Some(bias) => {
            assert_eq!(bias.dims(), [vocab], "the shape of the bias of the head");
            Bias::Each(bias.into_dispatch())
        }
        None => Bias::Absent,
    };
    let head = Head {
        weight: head.weight.into_dispatch(),
        bias,
        softcap: head.softcap,
    };
    let (x, targets) = (x.into_dispatch(), targets.into_dispatch());
    Tensor::from_dispatch(Dispatch::linear_cross_entropy(x, head, targets))
}

/// What there is one of for each row of `x`, in `F32` where `x` is of 16 bits.
#[cfg(feature = "fusion")]
fn of_rows(x: &TensorSpec) -> TensorSpec {
    TensorSpec::new(Shape::new([x.shape[0]]), widened_dtype(x.dtype))
}
