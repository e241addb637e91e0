//! Attention: an extension of burn's backends.

use burn::backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::{Int, Tensor};
#[cfg(feature = "fusion")]
use burn::{backend::fusion::custom::TensorSpec, tensor::Shape};

use crate::dtype::assert_same;
#[cfg(feature = "fusion")]
use crate::dtype::widened_dtype;

mod autodiff;
mod composed;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "flex")]
mod flex;
mod mask;
mod scores;
#[cfg(all(test, feature = "flex"))]
mod tests;

pub use mask::Mask;
use mask::{Bound, KeyRanges};
pub use scores::Scores;

/// Attention and its gradients, composed from burn's primitive operations unless overridden.
///
/// Queries are `[batch, seq_q, heads, dim]`, keys and values `[batch, seq_k, kv_heads, dim]`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait AttentionOps: Backend {
    /// See [`attention`].
    #[fusion(default)]
    fn masked_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] mask: KeyRanges<Self>,
        scores: Scores,
    ) -> FloatTensor<Self> {
        Self::masked_attention_forward(q, k, v, mask, scores).0
    }

    /// The output, and the log-sum-exp of the scores of each query, `[batch, heads, seq_q]`, in `F32` where
    /// `q` is of 16 bits.
    #[fusion(meta = |q, _k, _v, _mask, _scores| (q.clone(), of_queries(q)))]
    fn masked_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] mask: KeyRanges<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::forward::<Self>(q, k, v, mask, scores)
    }

    /// The gradients for `q`, `k` and `v`, from the inputs and results of the forward pass.
    ///
    /// With the scores `s`, the probabilities `p = exp(s - lse)` and `dp = dy vᵀ`:
    /// `ds = p (dp - Σ dy y) scale`, times `1 - (s / cap)²` if scores are capped, `dq = ds k`, `dk = dsᵀ q`,
    /// `dv = pᵀ dy`.
    #[allow(
        clippy::too_many_arguments,
        reason = "inputs and results of the forward pass; not `expect`, because the macro copies this to functions that the lint accepts"
    )]
    #[fusion(meta = |q, k, v, _mask, _y, _lse, _dy, _scores| (q.clone(), k.clone(), v.clone()))]
    fn masked_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] mask: KeyRanges<Self>,
        y: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::backward::<Self>(q, k, v, mask, y, lse, dy, scores)
    }
}

#[cfg(feature = "ndarray")]
impl AttentionOps for burn::backend::NdArray {}

/// Attention, `softmax(scale · q kᵀ) v`, differentiable in `q`, `k` and `v`.
///
/// [`Mask`] says which keys each query attends to. `scores` is the scale, or [`Scores`] with a soft cap,
/// which is applied before the mask. Head `h` reads the keys and values of head `h / (heads / kv_heads)`
/// (grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245).
///
/// On the CPU, and on CUDA in 16 bits for heads of 16, 32, .. 256 dimensions (from compute capability 8.0
/// on), no matrix of scores is stored, and backward computes the probabilities again (Dao 2023,
/// arXiv:2307.08691).
///
/// # Shapes
/// - `q`: `[batch, seq_q, heads, dim]`
/// - `k`, `v`: `[batch, seq_k, kv_heads, dim]`
/// - the bounds of the mask: `[batch, seq_q]`
/// - result: `[batch, seq_q, heads, dim]`
///
/// # Panics
/// If the shapes are not these, `kv_heads` does not divide `heads`, there are no keys or, under a causal
/// mask, fewer keys than queries, `heads` or `dim` is 0, the dtypes of `q`, `k` and `v` differ, or the scale
/// is not positive; on the CPU also if a bound of the mask is negative.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::{Mask, attention};
///
/// let device = Device::flex();
/// // Two positions of one head of dimension 1. All scores are 0.
/// let (q, k) = (Tensor::zeros([1, 2, 1, 1], &device), Tensor::zeros([1, 2, 1, 1], &device));
/// let v = Tensor::<4>::from_data([[[[1.0]], [[3.0]]]], &device);
/// let y = attention(q, k, v, Mask::causal(), 1.0);
/// // The first position attends to itself, the second to both.
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [1.0, 2.0]);
/// ```
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    mask: Mask,
    scores: impl Into<Scores>,
) -> Tensor<4> {
    let scores = scores.into();
    let ([batch, seq_q, heads, dim], [_, seq_k, kv_heads, _]) = (q.dims(), k.dims());
    let of_keys = [batch, seq_k, kv_heads, dim];
    assert_eq!(k.dims(), of_keys, "the shape of the keys");
    assert_eq!(v.dims(), of_keys, "the shape of the values");
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} heads are not a multiple of {kv_heads} heads of keys"
    );
    let fewest = if mask.causal { seq_q } else { seq_q.min(1) };
    assert!(fewest <= seq_k, "{seq_q} queries, but {seq_k} keys");
    assert!(heads * dim > 0, "{heads} heads of dimension {dim}");
    let scale = scores.scale;
    assert!(scale > 0.0, "a scale of {scale} is not positive");
    assert_same("k", k.dtype(), "q", q.dtype());
    assert_same("v", v.dtype(), "q", q.dtype());
    let bound = |name: &str, bounds: Option<Tensor<2, Int>>| match bounds {
        Some(bounds) => {
            assert_eq!(bounds.dims(), [batch, seq_q], "the shape of the {name}");
            Bound::Each(bounds.into_dispatch())
        }
        None => Bound::Absent,
    };
    let mask = KeyRanges {
        causal: mask.causal,
        starts: bound("starts", mask.starts),
        ends: bound("ends", mask.ends),
    };
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(Dispatch::masked_attention(q, k, v, mask, scores))
}

/// What there is one of for each query of each head, in `F32` where `q` is of 16 bits.
#[cfg(feature = "fusion")]
fn of_queries(q: &TensorSpec) -> TensorSpec {
    let [batch, seq_q, heads, _] = q.shape.dims();
    TensorSpec::new(Shape::new([batch, heads, seq_q]), widened_dtype(q.dtype))
}
