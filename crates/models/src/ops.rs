//! The operations between the projections of a block.

use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Bool, Tensor};

/// `silu(gate) * up`.
pub(crate) fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension; `weight` is `[d]`.
pub(crate) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean_square = x.clone().square().mean_dim(D - 1);
    x / (mean_square + eps).sqrt() * weight.unsqueeze()
}

/// Turns `x`, `[batch, seq, heads, dim]`, by the angles of `cos` and `sin`, `[seq, dim]`: dimension
/// `i` with `i + dim / 2`.
pub(crate) fn rotate_half(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let [_, seq, _, dim] = x.dims();
    let half = dim / 2;
    let (first, second) = (
        x.clone().narrow(3, 0, half),
        x.clone().narrow(3, half, half),
    );
    let turned = Tensor::cat(vec![second.neg(), first], 3);
    let table = |t: Tensor<2>| t.reshape([1, seq, 1, dim]);
    x * table(cos) + turned * table(sin)
}

/// Causal attention with grouped queries: the last query sees all keys, each one before it one fewer.
///
/// # Shapes
/// - `q`: `[batch, seq_q, heads, dim]`
/// - `k`, `v`: `[batch, seq_k, kv_heads, dim]`
/// - result: that of `q`
pub(crate) fn causal_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, scale: f64) -> Tensor<4> {
    let ([batch, seq_q, heads, dim], [_, seq_k, kv_heads, _]) = (q.dims(), k.dims());
    let device = q.device();
    // The query heads that share a key head are rows of one product.
    let rows = heads / kv_heads * seq_q;
    let q = q.swap_dims(1, 2).reshape([batch, kv_heads, rows, dim]);
    let (k, v) = (k.swap_dims(1, 2), v.swap_dims(1, 2));
    let future = Tensor::<2, Bool>::tril_mask([seq_q, seq_k], (seq_k - seq_q) as i64, &device);
    let scores = (q.matmul(k.transpose()) * scale)
        .reshape([batch, heads, seq_q, seq_k])
        .mask_fill(future.unsqueeze(), f32::NEG_INFINITY);
    let weights = softmax(scores, 3).reshape([batch, kv_heads, rows, seq_k]);
    let mixed = weights.matmul(v).reshape([batch, heads, seq_q, dim]);
    mixed.swap_dims(1, 2)
}
