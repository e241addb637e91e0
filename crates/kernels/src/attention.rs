//! Causal attention: an extension of burn's backends.

use burn::backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::{Int, Tensor};

mod autodiff;
mod composed;
#[cfg(feature = "flex")]
mod flex;
mod starts;
#[cfg(all(test, feature = "flex"))]
mod tests;

use starts::Starts;

/// Operations on queries `[batch, seq_q, heads, dim]` with keys and values
/// `[batch, seq_k, kv_heads, dim]`, composed from burn's primitive operations unless a backend
/// overrides them.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl")
)]
pub(crate) trait AttentionOps: Backend {
    /// See [`causal_attention`].
    #[fusion(default)]
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] starts: Starts<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        Self::causal_attention_forward(q, k, v, starts, scale).0
    }

    /// The output, and the logarithm of the sum of the exponentials of the scaled scores of each
    /// query, `[batch, heads, seq_q]`.
    #[fusion(default)]
    fn causal_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] starts: Starts<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::forward::<Self>(q, k, v, starts, scale)
    }

    /// The gradients for `q`, `k` and `v`, from what the forward pass was given and gave.
    ///
    /// With the probabilities `p = exp(scale q kᵀ - lse)` and `dp = dy vᵀ`:
    /// `ds = p (dp - Σ dy y) scale`, `dq = ds k`, `dk = dsᵀ q`, `dv = pᵀ dy`.
    #[allow(
        clippy::too_many_arguments,
        reason = "what the forward pass was given and gave; the macro copies this to where it is no lint"
    )]
    #[fusion(default)]
    fn causal_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] starts: Starts<Self>,
        y: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::backward::<Self>(q, k, v, starts, y, lse, dy, scale)
    }
}

#[cfg(feature = "ndarray")]
impl AttentionOps for burn::backend::NdArray {}

#[cfg(feature = "cubecl")]
impl AttentionOps for burn_cubecl::CubeBackend {}

/// `softmax(scale · q kᵀ) v` where a query sees the keys up to its own position, differentiable in
/// all three.
///
/// The queries are the last `seq_q` positions of `seq_k`: query `i` sees the keys
/// `starts[i] ..= seq_k - seq_q + i`, from the first of all on without `starts`. Several texts one
/// after the other, and fillings before or after a text, are told apart so. Head `h` reads the keys and values of head `h / (heads / kv_heads)`
/// (grouped queries: Ainslie et al. 2023, arXiv:2305.13245). On the CPU no matrix of scores is held;
/// backward computes the probabilities again (Dao 2023, arXiv:2307.08691).
///
/// # Shapes
/// - `q`: `[batch, seq_q, heads, dim]`
/// - `k`, `v`: `[batch, seq_k, kv_heads, dim]`
/// - `starts`: `[batch, seq_q]`, none negative; one after the query's own position is taken for that
/// - result: `[batch, seq_q, heads, dim]`
///
/// # Panics
/// If the shapes do not fit, there are no heads or no values in one, `kv_heads` does not divide
/// `heads`, there are fewer keys than queries, or the scale is not above zero.
pub fn causal_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    starts: Option<Tensor<2, Int>>,
    scale: f64,
) -> Tensor<4> {
    let ([batch, seq_q, heads, dim], [_, seq_k, kv_heads, _]) = (q.dims(), k.dims());
    let of_keys = [batch, seq_k, kv_heads, dim];
    assert_eq!(k.dims(), of_keys, "the shape of the keys");
    assert_eq!(v.dims(), of_keys, "the shape of the values");
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} heads do not share {kv_heads} heads of keys"
    );
    assert!(seq_q <= seq_k, "{seq_q} queries have {seq_k} keys");
    assert!(heads * dim > 0, "{heads} heads of {dim}");
    assert!(scale > 0.0, "a scale of {scale}");
    let starts = match starts {
        Some(starts) => {
            assert_eq!(starts.dims(), [batch, seq_q], "the shape of the starts");
            Starts::Each(starts.into_dispatch())
        }
        None => Starts::First,
    };
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(Dispatch::causal_attention(q, k, v, starts, scale))
}
