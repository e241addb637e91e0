//! The operations in burn's primitives: for every backend, and the reference for the native ones.
//!
//! The products have one batch dimension and operands that are contiguous, or contiguous and then
//! transposed: heads are moved before positions by a copy, made once for all products of a tensor.

use std::ops::Range;

use burn::backend::{
    Backend, TensorMetadata, get_device_settings,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{BoolDType, Shape};

use super::Scores;
use super::mask::{Bound, KeyRanges};
use crate::dtype::{cast, widened};
use crate::softcap::times_slope;

/// The sizes of a call.
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) seq_q: usize,
    pub(super) seq_k: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
}

impl Sizes {
    pub(super) fn of<B: Backend>(q: &FloatTensor<B>, k: &FloatTensor<B>) -> Self {
        let [batch, seq_q, heads, dim] = q.shape().dims();
        let [_, seq_k, kv_heads, _] = k.shape().dims();
        Self {
            batch,
            seq_q,
            seq_k,
            heads,
            kv_heads,
            dim,
        }
    }

    /// Makes the query heads that share a key head rows of one product.
    ///
    /// From `[batch, seq_q, heads, dim]` to `[batch * kv_heads, heads / kv_heads * seq_q, dim]`.
    pub(super) fn stack<B: Backend>(&self, t: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_swap_dims(t, 1, 2), self.stacked(self.dim))
    }

    /// The inverse of [`Sizes::stack`].
    pub(super) fn unstack<B: Backend>(&self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch, self.heads, self.seq_q, self.dim]);
        B::float_swap_dims(B::float_reshape(t, shape), 1, 2)
    }

    fn stacked(&self, width: usize) -> Shape {
        let rows = self.heads / self.kv_heads * self.seq_q;
        Shape::new([self.batch * self.kv_heads, rows, width])
    }

    /// Makes the keys, or the values, of each head the factor of one product.
    ///
    /// From `[batch, seq_k, kv_heads, dim]` to `[batch * kv_heads, seq_k, dim]`.
    pub(super) fn by_head<B: Backend>(&self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch * self.kv_heads, self.seq_k, self.dim]);
        B::float_reshape(B::float_swap_dims(t, 1, 2), shape)
    }

    /// The inverse of [`Sizes::by_head`].
    pub(super) fn by_position<B: Backend>(&self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch, self.kv_heads, self.seq_k, self.dim]);
        B::float_swap_dims(B::float_reshape(t, shape), 1, 2)
    }

    fn of_scores(&self) -> Shape {
        Shape::new([self.batch, self.heads, self.seq_q, self.seq_k])
    }

    /// The scores, [`Sizes::of_scores`], of the results of [`Sizes::stack`] and [`Sizes::by_head`], in
    /// `F32` where `q` is of 16 bits.
    fn scores<B: Backend>(
        &self,
        q: FloatTensor<B>,
        k: FloatTensor<B>,
        scores: Scores,
    ) -> FloatTensor<B> {
        let Scores { scale, softcap } = scores;
        let scores = widened::<B>(B::float_matmul(q, B::float_transpose(k)));
        let scores = B::float_mul_scalar(scores, scale.into());
        let scores = B::float_reshape(scores, self.of_scores());
        match softcap {
            Some(cap) => cap.apply::<B>(scores),
            None => scores,
        }
    }

    /// The scores with `-inf` where a key is masked.
    fn masked<B: Backend>(&self, scores: FloatTensor<B>, mask: KeyRanges<B>) -> FloatTensor<B> {
        let is_bounded = !matches!((&mask.starts, &mask.ends), (Bound::Absent, Bound::Absent));
        if !is_bounded && (!mask.causal || self.seq_q == 1) {
            return scores;
        }
        let device = scores.device();
        let settings = get_device_settings::<B>(&device);
        let positions = |range: Range<usize>, shape| {
            let range = range.start as i64..range.end as i64;
            let positions = B::int_arange(range, &device, settings.int_dtype);
            B::int_reshape(positions, Shape::new(shape))
        };
        let of_queries = |bounds| {
            let bounds = B::int_cast(bounds, settings.int_dtype);
            B::int_reshape(bounds, Shape::new([self.batch, 1, self.seq_q, 1]))
        };
        let below = |a: IntTensor<B>, b: IntTensor<B>| {
            let is_below = B::int_lower(a, b, settings.bool_dtype);
            B::bool_expand(is_below, self.of_scores())
        };
        let hide = |scores, hidden| B::float_mask_fill(scores, hidden, f32::NEG_INFINITY.into());
        let keys = positions(0..self.seq_k, [1, 1, 1, self.seq_k]);
        // The last key of each query; none if it is that of all keys.
        let mut last = (mask.causal && self.seq_q != 1)
            .then(|| positions(self.seq_k - self.seq_q..self.seq_k, [1, 1, self.seq_q, 1]));
        if let Bound::Each(ends) = mask.ends {
            let ends = B::int_sub_scalar(of_queries(ends), 1.into());
            let ends = B::int_clamp(ends, 0.into(), (self.seq_k as i64 - 1).into());
            last = Some(match last {
                Some(last) => lesser::<B>(ends, last, settings.bool_dtype),
                None => ends,
            });
        }
        let scores = match &last {
            Some(last) => hide(scores, below(last.clone(), keys.clone())),
            None => scores,
        };
        let Bound::Each(starts) = mask.starts else {
            return scores;
        };
        let last = last.unwrap_or_else(|| positions(self.seq_k - 1..self.seq_k, [1, 1, 1, 1]));
        // A query always attends to its last key, so that no row is empty.
        let hidden = B::bool_and(below(keys.clone(), of_queries(starts)), below(keys, last));
        hide(scores, hidden)
    }
}

/// The lesser of two numbers: `[batch, 1, seq_q, 1]`, and one for all sequences.
fn lesser<B: Backend>(a: IntTensor<B>, b: IntTensor<B>, bool_dtype: BoolDType) -> IntTensor<B> {
    let b = B::int_expand(b, a.shape());
    let is_less = B::int_lower(b.clone(), a.clone(), bool_dtype);
    B::int_mask_where(a, is_less, b)
}

/// The output and the log-sum-exps.
pub(super) fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    mask: KeyRanges<B>,
    scores: Scores,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (sizes, dtype) = (Sizes::of::<B>(&q, &k), q.dtype());
    let (q, k) = (sizes.stack::<B>(q), sizes.by_head::<B>(k));
    let scores = sizes.masked::<B>(sizes.scores::<B>(q, k, scores), mask);
    let most = B::float_max_dim(scores.clone(), 3);
    let p = B::float_exp(B::float_sub(scores, most.clone()));
    let sum = B::float_sum_dim(p.clone(), 3);
    let lse = B::float_add(B::float_log(sum.clone()), most);
    let p = B::float_reshape(B::float_div(p, sum), sizes.stacked(sizes.seq_k));
    let y = B::float_matmul(cast::<B>(p, dtype), sizes.by_head::<B>(v));
    let of_lse = Shape::new([sizes.batch, sizes.heads, sizes.seq_q]);
    (sizes.unstack::<B>(y), B::float_reshape(lse, of_lse))
}

/// The gradients for `q`, `k` and `v`.
#[expect(
    clippy::too_many_arguments,
    reason = "inputs and results of the forward pass"
)]
pub(super) fn backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    mask: KeyRanges<B>,
    y: FloatTensor<B>,
    lse: FloatTensor<B>,
    dy: FloatTensor<B>,
    scores: Scores,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (sizes, dtype) = (Sizes::of::<B>(&q, &k), q.dtype());
    let (q, y, dy) = (
        sizes.stack::<B>(q),
        sizes.stack::<B>(y),
        sizes.stack::<B>(dy),
    );
    let (k, v) = (sizes.by_head::<B>(k), sizes.by_head::<B>(v));
    let Scores { scale, softcap } = scores;
    let scores = sizes.scores::<B>(q.clone(), k.clone(), scores);
    let slope = softcap.map(|cap| cap.slope::<B>(scores.clone()));
    let scores = sizes.masked::<B>(scores, mask);
    let of_lse = Shape::new([sizes.batch, sizes.heads, sizes.seq_q, 1]);
    let p = B::float_exp(B::float_sub(scores, B::float_reshape(lse, of_lse)));
    let stacked = |t| B::float_reshape(t, sizes.stacked(sizes.seq_k));
    let p = stacked(p);

    let delta = B::float_mul(widened::<B>(dy.clone()), widened::<B>(y));
    let delta = B::float_sum_dim(delta, 2);
    let dp = widened::<B>(B::float_matmul(dy.clone(), B::float_transpose(v)));
    let ds = B::float_mul(p.clone(), B::float_sub(dp, delta));
    let ds = B::float_mul_scalar(ds, scale.into());
    let ds = times_slope::<B>(ds, slope.map(stacked));
    let (p, ds) = (cast::<B>(p, dtype), cast::<B>(ds, dtype));
    let dk = B::float_matmul(B::float_transpose(ds.clone()), q);
    let dv = B::float_matmul(B::float_transpose(p), dy);
    (
        sizes.unstack::<B>(B::float_matmul(ds, k)),
        sizes.by_position::<B>(dk),
        sizes.by_position::<B>(dv),
    )
}
