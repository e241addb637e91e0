//! The loss of a language model from hidden states: an extension of burn's backends.

use burn::backend::{
    Backend, Dispatch, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Int, Tensor};

mod autodiff;
mod composed;
#[cfg(feature = "flex")]
mod flex;
#[cfg(all(test, feature = "flex"))]
mod tests;

/// Operations on hidden states `x` `[rows, hidden]`, a head `[hidden, vocab]` and targets `[rows]`,
/// composed from burn's primitive operations unless a backend overrides them. The probabilities of a
/// row are `p = exp(x · head - lse)`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl")
)]
pub(crate) trait LossOps: Backend {
    /// See [`linear_cross_entropy`].
    #[fusion(default)]
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::linear_cross_entropy_forward(x, head, targets).0
    }

    /// The losses, and the logarithm of the sum of the exponentials of each row's logits, `[rows]`
    /// each.
    #[fusion(default)]
    fn linear_cross_entropy_forward(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (nll, lse, _) = composed::forward::<Self>(x, head, targets, false);
        (nll, lse)
    }

    /// [`LossOps::linear_cross_entropy_forward`], and the gradient of each row's loss for its `x`
    /// from the same logits: `(p - onehot(target)) · headᵀ`, `[rows, hidden]`.
    #[fusion(default)]
    fn linear_cross_entropy_with_dx(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (nll, lse, dx) = composed::forward::<Self>(x, head, targets, true);
        (nll, lse, dx.expect("the gradient that was asked for"))
    }

    /// The gradient for the head, `xᵀ · ((p - onehot(target)) dnll)`, `[hidden, vocab]`.
    #[fusion(default)]
    fn linear_cross_entropy_dhead(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        lse: FloatTensor<Self>,
        dnll: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::dhead::<Self>(x, head, targets, lse, dnll)
    }
}

#[cfg(feature = "ndarray")]
impl LossOps for burn::backend::NdArray {}

#[cfg(feature = "cubecl")]
impl LossOps for burn_cubecl::CubeBackend {}

/// The negative log-likelihood of each target under `softmax(x · head)`, in nats, differentiable in
/// `x` and `head`.
///
/// Never more than 16 MiB of logits are held (or one row): where `x` is tracked, its gradient is
/// computed beside the loss, and backward multiplies it by that of the loss. The head may be a
/// transposed embedding, which is read where it lies.
///
/// # Shapes
/// - `x`: `[rows, hidden]`
/// - `head`: `[hidden, vocab]`
/// - `targets`: `[rows]`, each in `0 .. vocab`
/// - result: `[rows]`
///
/// # Panics
/// If the shapes do not fit or there is no row; on the CPU also if a target is not in the vocabulary.
pub fn linear_cross_entropy(x: Tensor<2>, head: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let ([rows, hidden], [inputs, _]) = (x.dims(), head.dims());
    assert_eq!(hidden, inputs, "inputs of the head");
    assert_eq!(targets.dims(), [rows], "one target for each row");
    assert!(rows > 0, "no rows");
    Tensor::from_dispatch(Dispatch::linear_cross_entropy(
        x.into_dispatch(),
        head.into_dispatch(),
        targets.into_dispatch(),
    ))
}
