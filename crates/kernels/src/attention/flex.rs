//! The CPU: blocks of queries and keys whose scores stay in the cache.
//!
//! A task owns a block of queries of one head or, in the backward pass, all heads that share keys. It
//! takes its blocks in a fixed order, so that the bits of the result do not depend on the number of
//! threads. The queries of a block are the lanes of vectors, so that maxima and sums over keys need no
//! reduction across lanes.

use std::ops::Range;

use burn::backend::{DType, Flex, TensorMetadata, flex::FlexTensor, tensor::FloatTensor};
use rayon::prelude::*;

use super::mask::{Bound, KeyRanges};
use super::{AttentionOps, Scores, composed};
use crate::dense::multiply_add;
use crate::host::{all_native, contiguous, floats, integers, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math;
use crate::matrix::Matrix;
use crate::memory::zeroed;
use crate::shared::Shared;
use crate::softcap::{Softcap, cap_each};

mod block;

use block::{Block, KEYS, Lanes, QUERIES, gradient, softmax};

impl AttentionOps for Flex {
    fn masked_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: KeyRanges<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&q, &k, &v]) {
            return composed::forward::<Self>(q, k, v, mask, scores);
        }
        let dtype = q.dtype();
        let (q, k, v) = (whole_heads(q), whole_heads(k), whole_heads(v));
        let call = Call::new(&q, &k, &v, mask, scores);
        let (y, lse) = match call.seq_q {
            1 => call.one_query(),
            _ => call.forward(),
        };
        let of_lse = [call.batch, call.heads, call.seq_q];
        (rounded(tensor(y, q.shape()), dtype), tensor(lse, of_lse))
    }

    fn masked_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: KeyRanges<Self>,
        y: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&q, &k, &v, &y, &lse, &dy]) {
            return composed::backward::<Self>(q, k, v, mask, y, lse, dy, scores);
        }
        let dtype = q.dtype();
        let (q, k, v) = (whole_heads(q), whole_heads(k), whole_heads(v));
        let (y, dy, lse) = (whole_heads(y), whole_heads(dy), contiguous(lse));
        let call = Call::new(&q, &k, &v, mask, scores);
        let [dq, dk, dv] = call.backward(&Heads::of(&y), &Heads::of(&dy), floats(&lse));
        let gradient = |d, of: &FlexTensor| rounded(tensor(d, of.shape()), dtype);
        (gradient(dq, &q), gradient(dk, &k), gradient(dv, &v))
    }
}

/// A tensor in `F32` with the dimensions of a head contiguous, copied only if it is not.
fn whole_heads(t: FlexTensor) -> FlexTensor {
    if t.dtype() != DType::F32 {
        return widened(t);
    }
    let layout = t.layout();
    let strides = layout.strides();
    if strides[3] == 1 && strides.iter().all(|&stride| stride >= 0) {
        t
    } else {
        t.to_contiguous()
    }
}

/// A strided `[batch, seq, heads, dim]` with contiguous dimensions of a head.
struct Heads<'a> {
    values: &'a [f32],
    batch_stride: usize,
    seq_stride: usize,
    head_stride: usize,
    dim: usize,
}

impl<'a> Heads<'a> {
    fn of(t: &'a FlexTensor) -> Self {
        let layout = t.layout();
        let stride = |axis: usize| layout.strides()[axis] as usize;
        Self {
            values: &t.storage::<f32>()[layout.start_offset()..],
            batch_stride: stride(0),
            seq_stride: stride(1),
            head_stride: stride(2),
            dim: layout.shape()[3],
        }
    }

    /// The values from the first of a head at a position on.
    #[inline(always)]
    fn from(&self, batch: usize, position: usize, head: usize) -> &'a [f32] {
        let at = batch * self.batch_stride + position * self.seq_stride + head * self.head_stride;
        &self.values[at..]
    }

    /// A head at a position, `[dim]`.
    #[inline(always)]
    fn row(&self, batch: usize, position: usize, head: usize) -> &'a [f32] {
        &self.from(batch, position, head)[..self.dim]
    }

    /// Writes a head at `n` positions, times `factor`, transposed: `[dim, n]`.
    fn transpose(
        &self,
        batch: usize,
        position: usize,
        n: usize,
        head: usize,
        factor: f32,
        transposed: &mut [Lanes],
    ) {
        for i in 0..n {
            let row = self.row(batch, position + i, head);
            for (lanes, value) in transposed.iter_mut().zip(row) {
                lanes[i] = value * factor;
            }
        }
    }

    /// A head at `n` positions, `[n, dim]`.
    ///
    /// # Panics
    /// If it does not lie within the tensor.
    fn rows(&self, batch: usize, position: usize, n: usize, head: usize) -> Matrix {
        let values = self.from(batch, position, head);
        assert!(n > 0 && (n - 1) * self.seq_stride + self.dim <= values.len());
        Matrix::new(values.as_ptr(), self.seq_stride, 1)
    }
}

/// The arguments of a call.
struct Call<'a> {
    q: Heads<'a>,
    k: Heads<'a>,
    v: Heads<'a>,
    causal: bool,
    /// The first key that each query of each sequence attends to; `None` for the first of all.
    starts: Option<Vec<usize>>,
    /// The key after the last one; `None` for [`Call::end_of_all`].
    ends: Option<Vec<usize>>,
    scale: f32,
    softcap: Option<Softcap>,
    batch: usize,
    seq_q: usize,
    seq_k: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl<'a> Call<'a> {
    fn new(
        q: &'a FlexTensor,
        k: &'a FlexTensor,
        v: &'a FlexTensor,
        mask: KeyRanges<Flex>,
        scores: Scores,
    ) -> Self {
        let [batch, seq_q, heads, dim] = q.shape().dims();
        let [_, seq_k, kv_heads, _] = k.shape().dims();
        let mut call = Self {
            q: Heads::of(q),
            k: Heads::of(k),
            v: Heads::of(v),
            causal: mask.causal,
            starts: None,
            ends: None,
            scale: scores.scale as f32,
            softcap: scores.softcap,
            batch,
            seq_q,
            seq_k,
            heads,
            kv_heads,
            dim,
        };
        // No range of keys is empty.
        if let Bound::Each(ends) = mask.ends {
            let ends = integers(ends).into_iter().enumerate();
            let ends = ends.map(|(at, end)| end.clamp(1, call.end_of_all(at % seq_q)));
            call.ends = Some(ends.collect());
        }
        if let Bound::Each(starts) = mask.starts {
            let starts = integers(starts).into_iter().enumerate();
            let last = |at| call.keys(at / seq_q, at % seq_q).end - 1;
            call.starts = Some(starts.map(|(at, start)| start.min(last(at))).collect());
        }
        call
    }

    /// The head of the keys that a head of queries reads.
    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    /// The key after the last one that query `at` of every sequence may attend to.
    fn end_of_all(&self, at: usize) -> usize {
        if self.causal {
            self.seq_k - self.seq_q + at + 1
        } else {
            self.seq_k
        }
    }

    /// The keys that query `at` of a sequence attends to.
    fn keys(&self, batch: usize, at: usize) -> Range<usize> {
        let of = |bounds: &Vec<usize>| bounds[batch * self.seq_q + at];
        let end = self.ends.as_ref().map(of);
        self.starts.as_ref().map_or(0, of)..end.unwrap_or_else(|| self.end_of_all(at))
    }

    /// The blocks of keys for the block of queries from `queries` on.
    fn blocks(&self, batch: usize, queries: usize) -> impl Iterator<Item = Block> {
        let n_queries = QUERIES.min(self.seq_q - queries);
        let last = n_queries - 1;
        let of_queries = |bounds: &Vec<usize>| -> [usize; QUERIES] {
            let bounds = &bounds[batch * self.seq_q + queries..][..n_queries];
            std::array::from_fn(|i| bounds[i.min(last)])
        };
        let (starts, ends) = (
            self.starts.as_ref().map(of_queries),
            self.ends.as_ref().map(of_queries),
        );
        let first = starts.and_then(|starts| starts.into_iter().min());
        let end = ends.and_then(|ends| ends.into_iter().max());
        let (first, end) = (
            first.unwrap_or(0),
            end.unwrap_or_else(|| self.end_of_all(queries + last)),
        );
        let visible = self.end_of_all(queries);
        (first..end).step_by(KEYS).map(move |keys| {
            let n_keys = KEYS.min(end - keys);
            Block {
                n_queries,
                keys,
                n_keys,
                visible,
                // Keys after the last start, and before the first end, are visible to all of the queries.
                starts: starts.filter(|starts| starts.iter().any(|&start| start > keys)),
                ends: ends.filter(|ends| ends.iter().any(|&end| end < keys + n_keys)),
                is_first: keys == first,
            }
        })
    }

    /// Writes the products of the keys of a block, `[keys, dim]`, with `queries`, `[dim, queries]`.
    fn products(&self, block: &Block, keys: Matrix, queries: &[Lanes], out: &mut [Lanes]) {
        assert!(queries.len() == self.dim && block.n_keys <= out.len());
        // SAFETY: `Heads::rows` has checked `keys`, and the lengths are checked above.
        unsafe {
            multiply_add(
                [block.n_keys, self.dim, block.n_queries],
                keys,
                matrix(queries),
                out.as_mut_ptr().cast(),
                QUERIES,
                false,
            );
        }
    }

    /// Writes the scores of the keys of a block, `[keys, dim]`, not masked; `queries` are scaled.
    fn scores(&self, block: &Block, keys: Matrix, queries: &[Lanes], out: &mut [Lanes]) {
        self.products(block, keys, queries, out);
        if let Some(cap) = self.softcap {
            cap_each(out[..block.n_keys].as_flattened_mut(), cap);
        }
    }

    /// The output and the log-sum-exps.
    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let (dim, width) = (self.dim, self.heads * self.dim);
        let mut y = zeroed(self.batch * self.seq_q * width);
        let mut lse = zeroed(self.batch * self.heads * self.seq_q);
        let shared = Shared::new(&mut y);
        let n_blocks = self.seq_q.div_ceil(QUERIES);
        // The log-sum-exps of each head of each sequence, in tasks of a block of queries.
        let tasks: Vec<(usize, &mut [f32])> = lse
            .chunks_mut(self.seq_q.max(1))
            .flat_map(|head| head.chunks_mut(QUERIES))
            .enumerate()
            .collect();
        tasks.into_par_iter().for_each_init(
            || {
                let lanes = |n| vec![[0.0; QUERIES]; n];
                (lanes(dim), lanes(KEYS), vec![0.0; QUERIES * dim])
            },
            |(q, scores, mixed), (task, lse)| {
                let (head, queries) = (task / n_blocks, task % n_blocks * QUERIES);
                let (batch, head) = (head / self.heads, head % self.heads);
                let kv_head = self.kv_head(head);
                self.q
                    .transpose(batch, queries, lse.len(), head, self.scale, q);
                // Not infinite: all keys of the first blocks may be masked for a query.
                let mut most = [f32::MIN; QUERIES];
                let mut sum = [0.0; QUERIES];
                for block in self.blocks(batch, queries) {
                    let k = self.k.rows(batch, block.keys, block.n_keys, kv_head);
                    let v = self.v.rows(batch, block.keys, block.n_keys, kv_head);
                    self.scores(&block, k, q, scores);
                    let mut shrink = [1.0; QUERIES];
                    softmax(block, scores, &mut most, &mut sum, &mut shrink);
                    if !block.is_first {
                        for (mixed, shrink) in mixed.chunks_exact_mut(dim.max(1)).zip(shrink) {
                            math::scale(mixed, shrink);
                        }
                    }
                    // SAFETY: `rows` has checked the values, and `mixed` is `[QUERIES, dim]`.
                    unsafe {
                        multiply_add(
                            [block.n_queries, block.n_keys, dim],
                            matrix(scores).transpose(),
                            v,
                            mixed.as_mut_ptr(),
                            dim,
                            !block.is_first,
                        );
                    }
                }
                for (i, lse) in lse.iter_mut().enumerate() {
                    *lse = most[i] + sum[i].ln();
                    let at = (batch * self.seq_q + queries + i) * width + head * dim;
                    // SAFETY: `y` is `[batch, seq_q, heads, dim]`; no other task uses this head of
                    // this query.
                    let y = unsafe { shared.slice(at, dim) };
                    for (y, mixed) in y.iter_mut().zip(&mixed[i * dim..]) {
                        *y = mixed / sum[i];
                    }
                }
            },
        );
        (y, lse)
    }

    /// [`Call::forward`] for a single query, as in decoding.
    ///
    /// Keys and values are read once, in the order of memory.
    fn one_query(&self) -> (Vec<f32>, Vec<f32>) {
        /// Elements of keys and values in a task; with fewer, waking a thread costs more than it saves.
        const ALONE: usize = 1 << 16;
        let (dim, group) = (self.dim, self.heads / self.kv_heads);
        let mut y = zeroed(self.batch * self.heads * dim);
        let mut lse = zeroed(self.batch * self.heads);
        let work = 2 * self.batch * self.seq_k * self.kv_heads * dim;
        let n_tasks = (work / ALONE).clamp(1, rayon::current_num_threads());
        // The number of heads of keys in a task, all of one sequence.
        let n_heads = (self.batch * self.kv_heads).div_ceil(n_tasks);
        let n_heads = n_heads.clamp(1, self.kv_heads);
        let tasks: Vec<_> = y
            .chunks_mut(self.heads * dim)
            .zip(lse.chunks_mut(self.heads))
            .enumerate()
            .flat_map(|(batch, (y, lse))| {
                let y = y.chunks_mut(n_heads * group * dim);
                let tasks = y.zip(lse.chunks_mut(n_heads * group)).enumerate();
                tasks.map(move |(task, (y, lse))| (batch, task * n_heads, y, lse))
            })
            .collect();
        let run = |(batch, kv_head, y, lse): (usize, usize, &mut [f32], &mut [f32])| {
            let mut scores = vec![0.0; lse.len() * self.seq_k];
            attend(self, batch, kv_head, &mut scores, y, lse);
        };
        match n_tasks {
            1 => tasks.into_iter().for_each(run),
            _ => tasks.into_par_iter().for_each(run),
        }
        (y, lse)
    }

    /// The gradients for `q`, `k` and `v`.
    fn backward(&self, y: &Heads<'a>, dy: &Heads<'a>, lse: &[f32]) -> [Vec<f32>; 3] {
        let dim = self.dim;
        let (q_width, k_width) = (self.heads * dim, self.kv_heads * dim);
        let mut dq = zeroed(self.batch * self.seq_q * q_width);
        let mut dk = zeroed(self.batch * self.seq_k * k_width);
        let mut dv = zeroed(dk.len());
        let [shared_dq, shared_dk, shared_dv] = [&mut dq, &mut dk, &mut dv].map(|t| Shared::new(t));
        let group = self.heads / self.kv_heads;
        (0..self.batch * self.kv_heads)
            .into_par_iter()
            .for_each_init(
                || {
                    let lanes = |n| vec![[0.0; QUERIES]; n];
                    [lanes(dim), lanes(dim), lanes(KEYS), lanes(KEYS)]
                },
                |[columns_q, columns_dy, p, ds], task| {
                    let (batch, kv_head) = (task / self.kv_heads, task % self.kv_heads);
                    let heads = kv_head * group..(kv_head + 1) * group;
                    let blocks = heads.flat_map(|head| {
                        let starts = (0..self.seq_q).step_by(QUERIES);
                        starts.map(move |queries| (head, queries))
                    });
                    for (head, queries) in blocks {
                        let n_queries = QUERIES.min(self.seq_q - queries);
                        let of_lse = (batch * self.heads + head) * self.seq_q + queries;
                        let (mut lse_lanes, mut delta) = ([0.0; QUERIES], [0.0; QUERIES]);
                        lse_lanes[..n_queries].copy_from_slice(&lse[of_lse..][..n_queries]);
                        for (i, delta) in delta[..n_queries].iter_mut().enumerate() {
                            let row = |t: &Heads<'a>| t.row(batch, queries + i, head);
                            *delta = math::dot(row(y), row(dy));
                        }
                        let q = self.q.rows(batch, queries, n_queries, head);
                        self.q
                            .transpose(batch, queries, n_queries, head, self.scale, columns_q);
                        dy.transpose(batch, queries, n_queries, head, 1.0, columns_dy);
                        let dy = dy.rows(batch, queries, n_queries, head);
                        for block in self.blocks(batch, queries) {
                            let Block {
                                keys,
                                n_keys,
                                is_first,
                                ..
                            } = block;
                            let k = self.k.rows(batch, keys, n_keys, kv_head);
                            let v = self.v.rows(batch, keys, n_keys, kv_head);
                            self.scores(&block, k, columns_q, p);
                            self.products(&block, v, columns_dy, ds);
                            let (scale, cap) = (self.scale, self.softcap);
                            gradient(block, scale, cap, &lse_lanes, &delta, p, ds);
                            let at_q = (batch * self.seq_q + queries) * q_width + head * dim;
                            let at_k = (batch * self.seq_k + keys) * k_width + kv_head * dim;
                            // SAFETY: `rows` has checked the matrices; the gradients have the
                            // shapes of `q` and `k`, and no other task uses these heads of this
                            // sequence.
                            unsafe {
                                let (p, ds) = (matrix(p), matrix(ds));
                                let of_keys = [n_keys, n_queries, dim];
                                let dv = shared_dv.offset(at_k);
                                multiply_add(of_keys, p, dy, dv, k_width, true);
                                let dk = shared_dk.offset(at_k);
                                multiply_add(of_keys, ds, q, dk, k_width, true);
                                let of_queries = [n_queries, n_keys, dim];
                                let dq = shared_dq.offset(at_q);
                                multiply_add(of_queries, ds.transpose(), k, dq, q_width, !is_first);
                            }
                        }
                    }
                },
            );
        [dq, dk, dv]
    }
}

/// A matrix of `[_, QUERIES]`.
fn matrix(lanes: &[Lanes]) -> Matrix {
    Matrix::new(lanes.as_ptr().cast(), QUERIES, 1)
}

by_instruction_set! {
    /// Writes the output of a single query for some heads, as many as `lse` has.
    ///
    /// These read the heads of keys from `kv_head` on; `scores` is `[heads, seq_k]`, and `y` is zero.
    fn attend(
        call: &Call,
        batch: usize,
        kv_head: usize,
        scores: &mut [f32],
        y: &mut [f32],
        lse: &mut [f32],
    ) = attend_body
}

#[inline(always)]
fn attend_body<I: Isa>(
    call: &Call,
    batch: usize,
    kv_head: usize,
    scores: &mut [f32],
    y: &mut [f32],
    lse: &mut [f32],
) {
    let (keys, group) = (call.keys(batch, 0), call.heads / call.kv_heads);
    let (start, n_keys) = (keys.start, keys.len());
    let scores = &mut scores[..lse.len() * n_keys];
    for j in 0..n_keys {
        for head in 0..lse.len() {
            let q = call.q.row(batch, 0, kv_head * group + head);
            let k = call.k.row(batch, start + j, kv_head + head / group);
            dot(q, k, &mut scores[head * n_keys + j]);
        }
    }
    for (scores, lse) in scores.chunks_exact_mut(n_keys).zip(lse) {
        let most = match call.softcap {
            Some(cap) => {
                math::scale(scores, call.scale);
                cap_each(scores, cap);
                math::scale_max(scores, 1.0)
            }
            None => math::scale_max(scores, call.scale),
        };
        let sum = math::exp_sum(scores, most);
        math::scale(scores, 1.0 / sum);
        *lse = most + sum.ln();
    }
    for j in 0..n_keys {
        for (head, y) in y.chunks_exact_mut(call.dim).enumerate() {
            let v = call.v.row(batch, start + j, kv_head + head / group);
            math::add_scaled(y, scores[head * n_keys + j], v);
        }
    }
}

by_instruction_set! {
    /// [`math::dot`] as a separate function: inlined into other loops, it is not vectorized.
    fn dot(a: &[f32], b: &[f32], product: &mut f32) = dot_body
}

#[inline(always)]
fn dot_body<I: Isa>(a: &[f32], b: &[f32], product: &mut f32) {
    *product = math::dot(a, b);
}
