//! Comparison with `f64` and with the composed operations, and through autodiff.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::backend::Flex;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use super::mask::{Bound, KeyRanges};
use super::{AttentionOps, Mask, Scores, attention, composed};
use crate::testing::*;

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    seq_q: usize,
    seq_k: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    causal: bool,
    /// Tokens in a segment of the first sequence, one more in each later one; 0 without starts.
    segment: usize,
    /// Whether there are ends: those of segments, or unordered ones without segments.
    ends: bool,
}

/// Without other bounds.
const CAUSAL: Sizes = Sizes {
    batch: 1,
    seq_q: 1,
    seq_k: 1,
    kv_heads: 1,
    group: 1,
    dim: 1,
    causal: true,
    segment: 0,
    ends: false,
};

impl Sizes {
    /// The position of a query among the keys; some are after all keys if attention is not causal.
    fn own(&self, query: usize) -> usize {
        match self.causal {
            true => self.seq_k - self.seq_q + query,
            false => query % (self.seq_k + 3),
        }
    }

    /// The start and the end of a query, of which some are after the last key, or 0.
    fn bounds(&self, batch: usize, query: usize) -> [usize; 2] {
        let own = self.own(query);
        match self.segment {
            0 => [0, 7 * own % (self.seq_k + 3)],
            segment => {
                let len = segment + batch;
                [own - own % len, own - own % len + len]
            }
        }
    }

    /// The keys that a query attends to.
    fn keys(&self, batch: usize, query: usize) -> Range<usize> {
        let [start, end] = self.bounds(batch, query);
        let most = match self.causal {
            true => self.own(query) + 1,
            false => self.seq_k,
        };
        let end = if self.ends { end.clamp(1, most) } else { most };
        start.min(end - 1)..end
    }

    fn mask(&self) -> Mask {
        let bounds = |side: usize| {
            let of =
                |batch| (0..self.seq_q).map(move |query| self.bounds(batch, query)[side] as i64);
            let bounds: Vec<i64> = (0..self.batch).flat_map(of).collect();
            let bounds = TensorData::new(bounds, [self.batch, self.seq_q]);
            Tensor::<2, Int>::from_data(bounds, &Device::flex())
        };
        let mask = if self.causal {
            Mask::causal()
        } else {
            Mask::full()
        };
        mask.with_starts((self.segment > 0).then(|| bounds(0)))
            .with_ends(self.ends.then(|| bounds(1)))
    }

    fn key_ranges(&self) -> KeyRanges<Flex> {
        let bound = |bounds: Option<Tensor<2, Int>>| match bounds {
            Some(bounds) => Bound::Each(bounds.try_into_primitive::<Flex>().unwrap()),
            None => Bound::Absent,
        };
        let mask = self.mask();
        KeyRanges {
            causal: mask.causal,
            starts: bound(mask.starts),
            ends: bound(mask.ends),
        }
    }

    fn of_queries(&self) -> [usize; 4] {
        [self.batch, self.seq_q, self.kv_heads * self.group, self.dim]
    }

    fn of_keys(&self) -> [usize; 4] {
        [self.batch, self.seq_k, self.kv_heads, self.dim]
    }

    fn scale(&self) -> f64 {
        1.5 / (self.dim as f64).sqrt()
    }

    fn scores(&self, cap: Option<f64>) -> Scores {
        Scores::new(self.scale()).with_softcap(cap)
    }

    /// The output and the log-sum-exps in `f64`.
    fn reference(
        &self,
        q: &[f64],
        k: &[f64],
        v: &[f64],
        cap: Option<f64>,
        scale: f64,
    ) -> (Vec<f64>, Vec<f64>) {
        let (heads, dim) = (self.kv_heads * self.group, self.dim);
        let mut y = vec![0.0; q.len()];
        let mut lse = Vec::new();
        for at in 0..self.batch * heads * self.seq_q {
            let (b, h, i) = (
                at / self.seq_q / heads,
                at / self.seq_q % heads,
                at % self.seq_q,
            );
            let row = ((b * self.seq_q + i) * heads + h) * dim;
            let key = |j: usize| ((b * self.seq_k + j) * self.kv_heads + h / self.group) * dim;
            let keys = self.keys(b, i);
            let exp: Vec<f64> = (keys.clone())
                .map(|j| (0..dim).map(|d| q[row + d] * k[key(j) + d]).sum::<f64>())
                .map(|product| match cap {
                    Some(cap) => cap * (product * scale / cap).tanh(),
                    None => product * scale,
                })
                .map(f64::exp)
                .collect();
            let sum: f64 = exp.iter().sum();
            lse.push(sum.ln());
            for d in 0..dim {
                y[row + d] = (keys.clone().zip(&exp))
                    .map(|(j, exp)| exp / sum * v[key(j) + d])
                    .sum();
            }
        }
        (y, lse)
    }
}

fn sizes(
    seq_q: impl Strategy<Value = usize>,
    more_keys: impl Strategy<Value = usize>,
    dim: impl Strategy<Value = usize>,
) -> impl Strategy<Value = Sizes> {
    let segment = prop::sample::select(vec![0, 1, 2, 50, 131]);
    let heads = (1..4usize, 1..4usize);
    let mask = (any::<bool>(), segment, any::<bool>());
    (1..4usize, seq_q, more_keys, heads, dim, mask).prop_map(
        |(batch, seq_q, more_keys, (kv_heads, group), dim, (causal, segment, ends))| Sizes {
            batch,
            seq_q,
            // Two keys at least: many queries of a single one have gradients of 0 by cancellation alone.
            seq_k: if causal { seq_q } else { 2 } + more_keys,
            kv_heads,
            group,
            dim,
            causal,
            segment: if causal { segment } else { 2 * segment },
            ends,
        },
    )
}

/// Below and above the sizes of a block.
fn large() -> impl Strategy<Value = Sizes> {
    let seq_q = prop::sample::select(vec![1, 2, 5, 64, 65, 130, 200]);
    sizes(
        seq_q,
        prop::sample::select(vec![0, 3, 128, 190]),
        2..73usize,
    )
}

/// The sizes without and with causality, each without and with a cap.
fn each_way(sizes: Sizes) -> [(Sizes, Option<f64>); 4] {
    let full = Sizes {
        causal: false,
        ..sizes
    };
    [
        (sizes, None),
        (sizes, Some(0.25)),
        (full, None),
        (full, Some(0.25)),
    ]
}

/// From a cap that most scores reach to none.
fn caps() -> impl Strategy<Value = Option<f64>> {
    prop::sample::select(vec![Some(0.25), Some(2.0), Some(50.0), None])
}

fn small() -> impl Strategy<Value = Sizes> {
    sizes(1..5usize, 0..4usize, 1..4usize)
}

/// Queries, keys, values and the gradient of the output.
fn tensors(sizes: &Sizes, seed: u64) -> [Tensor<4>; 4] {
    let mut random = Random::new(seed);
    let (of_queries, of_keys) = (sizes.of_queries(), sizes.of_keys());
    [of_queries, of_keys, of_keys, of_queries].map(|shape| random.tensor(shape))
}

/// The same values as views: heads before positions, a part of a longer sequence, and strided
/// dimensions of a head.
fn as_views([q, k, v, dy]: [Tensor<4>; 4]) -> [Tensor<4>; 4] {
    let materialized = |t: Tensor<4>| t + 0.0;
    let q = materialized(q.swap_dims(1, 2)).swap_dims(1, 2);
    let seq = k.dims()[1];
    let k = Tensor::cat(vec![k.clone(), k.clone(), k], 1).narrow(1, seq, seq);
    let v = materialized(v.swap_dims(1, 3)).swap_dims(1, 3);
    [q, k, v, dy]
}

/// Output, log-sum-exps and gradients.
fn native(sizes: &Sizes, t: &[Tensor<4>; 4], scores: impl Into<Scores>) -> Vec<Vec<f32>> {
    let scores = scores.into();
    let [q, k, v, dy] = t.each_ref().map(primitive);
    let mask = sizes.key_ranges();
    let (y, lse) =
        Flex::masked_attention_forward(q.clone(), k.clone(), v.clone(), mask.clone(), scores);
    let (y_, lse_) = (y.clone(), lse.clone());
    let (dq, dk, dv) = Flex::masked_attention_backward(q, k, v, mask, y_, lse_, dy, scores);
    [y, lse, dq, dk, dv].map(primitive_values).to_vec()
}

fn by_composition(sizes: &Sizes, t: &[Tensor<4>; 4], scores: impl Into<Scores>) -> Vec<Vec<f32>> {
    let scores = scores.into();
    let [q, k, v, dy] = t.each_ref().map(primitive);
    let mask = sizes.key_ranges();
    let (y, lse) = composed::forward::<Flex>(q.clone(), k.clone(), v.clone(), mask.clone(), scores);
    let (y_, lse_) = (y.clone(), lse.clone());
    let (dq, dk, dv) = composed::backward::<Flex>(q, k, v, mask, y_, lse_, dy, scores);
    [y, lse, dq, dk, dv].map(primitive_values).to_vec()
}

proptest! {
    #![proptest_config(cases_of(24))]

    #[test]
    fn small_calls_agree_with_f64_and_its_differences(
        sizes in small(),
        cap in caps(),
        seed: u64,
    ) {
        let t = tensors(&sizes, seed);
        let [q, k, v, dy] = t.each_ref().map(values);
        let [dq, dk, dv, ddy] = [&q, &k, &v, &dy].map(|t| doubles(t));
        let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let y = sizes.reference(q, k, v, cap, sizes.scale()).0;
            y.iter().zip(&ddy).map(|(y, dy)| y * dy).sum()
        };
        let (y, lse) = sizes.reference(&dq, &dk, &dv, cap, sizes.scale());
        let expected = [
            y,
            lse,
            slopes(&q, |q| loss(q, &dk, &dv)),
            slopes(&k, |k| loss(&dq, k, &dv)),
            slopes(&v, |v| loss(&dq, &dk, v)),
        ];
        let scores = sizes.scores(cap);
        for found in [native(&sizes, &t, scores), by_composition(&sizes, &t, scores)] {
            for (found, expected) in found.iter().zip(&expected) {
                assert_close(found, expected, 1e-5);
            }
        }
    }

    #[test]
    fn large_calls_agree_with_f64_and_the_composition(
        sizes in large(),
        cap in caps(),
        views: bool,
        seed: u64,
    ) {
        let mut t = tensors(&sizes, seed);
        let [q, k, v] = [&t[0], &t[1], &t[2]].map(|t| doubles(&values(t)));
        let (y, lse) = sizes.reference(&q, &k, &v, cap, sizes.scale());
        let composed = by_composition(&sizes, &t, sizes.scores(cap));
        if views {
            t = as_views(t);
        }
        let found = native(&sizes, &t, sizes.scores(cap));
        assert_close(&found[0], &y, 2e-6);
        assert_close(&found[1], &lse, 2e-6);
        for (found, composed) in found.iter().zip(&composed) {
            assert_close(found, &doubles(composed), 1e-5);
        }
    }

    #[test]
    fn backward_gives_the_gradients_of_each_parent(
        sizes in small(),
        cap in caps(),
        seed: u64,
    ) {
        let t = tensors(&sizes, seed);
        let scores = sizes.scores(cap);
        let expected = native(&sizes, &t, scores);
        let [q, k, v, dy] = t;
        let (q, k, v) = (leaf(&q), leaf(&k), leaf(&v));
        let y = attention(q.clone(), k.clone(), v.clone(), sizes.mask(), scores);
        let grads = (y * dy.autodiff()).sum().backward();
        for (leaf, expected) in [q, k, v].iter().zip(&expected[2..]) {
            prop_assert_eq!(bits(&values(&leaf.grad(&grads).unwrap())), bits(expected));
        }
    }
}

/// Keys outside of a query's range change no bit of its output, and the first and the last in it do.
#[test]
fn other_keys_are_masked() {
    let decoder = Sizes {
        batch: 2,
        seq_q: 140,
        seq_k: 150,
        kv_heads: 2,
        group: 2,
        dim: 12,
        ..CAUSAL
    };
    let segments = Sizes {
        causal: false,
        segment: 37,
        ends: true,
        ..decoder
    };
    for sizes in [decoder, segments] {
        let [q, k, v, _] = tensors(&sizes, 8);
        let (at, all) = (100, 0..sizes.seq_k);
        let keys = sizes.keys(0, at);
        let change = |t: &Tensor<4>, keys: Range<usize>| {
            let changed = t.clone().slice_dim(1, keys.clone()) * 3.0;
            t.clone().slice_assign([0..2, keys, 0..2, 0..12], changed)
        };
        let query = |k, v| {
            let y = attention(q.clone(), k, v, sizes.mask(), sizes.scale());
            bits(&values(&y.narrow(0, 0, 1).narrow(1, at, 1)))
        };
        let y = query(k.clone(), v.clone());
        for others in [all.start..keys.start, keys.end..all.end] {
            if !others.is_empty() {
                assert_eq!(query(change(&k, others.clone()), change(&v, others)), y);
            }
        }
        for own in [keys.start, keys.end - 1] {
            assert_ne!(query(k.clone(), change(&v, own..own + 1)), y);
        }
    }
}

#[test]
fn queries_have_keys() {
    let run = |seq_q, seq_k, mask| {
        let of_keys = Tensor::<4>::ones([1, seq_k, 1, 2], &Device::flex());
        let q = Tensor::<4>::ones([1, seq_q, 1, 2], &Device::flex());
        attention(q, of_keys.clone(), of_keys, mask, 1.0).dims()
    };
    assert_eq!(run(3, 1, Mask::full()), [1, 3, 1, 2]);
    let bound = Tensor::<2, Int>::ones([1, 2], &Device::flex());
    for (seq_k, mask, message) in [
        (2, Mask::causal(), "3 queries, but 2 keys"),
        (0, Mask::full(), "3 queries, but 0 keys"),
        (
            3,
            Mask::full().with_starts(bound.clone()),
            "the shape of the starts",
        ),
        (3, Mask::full().with_ends(bound), "the shape of the ends"),
    ] {
        let refused = catch_unwind(AssertUnwindSafe(|| run(3, seq_k, mask))).unwrap_err();
        let found = refused.downcast_ref::<String>().unwrap();
        assert!(found.contains(message), "{found}");
    }
}

/// A single query after cached keys gives the output of the last query of the whole sequence.
#[test]
fn decoding_agrees_with_a_whole_sequence() {
    let sizes = Sizes {
        batch: 2,
        seq_q: 300,
        seq_k: 300,
        kv_heads: 2,
        group: 3,
        dim: 40,
        ..CAUSAL
    };
    let [q, k, v, _] = tensors(&sizes, 9);
    for (sizes, cap) in each_way(sizes) {
        let run = |q| attention(q, k.clone(), v.clone(), sizes.mask(), sizes.scores(cap));
        let expected = doubles(&values(&run(q.clone()).narrow(1, 299, 1)));
        let one = run(q.clone().narrow(1, 299, 1));
        assert_close(&values(&one), &expected, 2e-6);
    }
}

/// Whole numbers, whose scores are exact: up to 1600, beyond the range of `exp` in `f32`.
#[test]
fn large_scores_do_not_overflow() {
    let sizes = Sizes {
        batch: 1,
        seq_q: 140,
        seq_k: 140,
        kv_heads: 1,
        group: 1,
        dim: 8,
        ..CAUSAL
    };
    let [q, k, v, dy] = tensors(&sizes, 10);
    let t = [(q * 20.0).round(), (k * 20.0).round(), v, dy];
    let [q, k, v] = [&t[0], &t[1], &t[2]].map(|t| doubles(&values(t)));
    let scale = 0.5;
    for cap in [None, Some(50.0)] {
        let scores = Scores::new(scale).with_softcap(cap);
        let (y, lse) = sizes.reference(&q, &k, &v, cap, scale);
        let largest = lse.iter().copied().fold(0.0, f64::max);
        match cap {
            Some(cap) => assert!(largest > 0.99 * cap && largest < cap + 140f64.ln()),
            None => assert!(largest > 100.0),
        }
        let found = native(&sizes, &t, scores);
        assert_close(&found[0], &y, if cap.is_some() { 1e-5 } else { 1e-6 });
        assert_close(&found[1], &lse, 1e-6);
        for (found, composed) in found.iter().zip(&by_composition(&sizes, &t, scores)) {
            assert_close(found, &doubles(composed), 1e-5);
        }
    }
}

/// A cap far above the scores changes nothing but roundings; one of almost 0 makes all scores 0.
#[test]
fn caps_are_approached() {
    let sizes = Sizes {
        batch: 1,
        seq_q: 70,
        seq_k: 70,
        kv_heads: 1,
        group: 2,
        dim: 8,
        ..CAUSAL
    };
    let t = tensors(&sizes, 12);
    let v = values(&t[2]);
    for causal in [true, false] {
        let sizes = Sizes { causal, ..sizes };
        let uncapped = native(&sizes, &t, sizes.scale());
        let high = native(&sizes, &t, sizes.scores(Some(1e6)));
        for (found, expected) in high.iter().zip(&uncapped) {
            assert_close(found, &doubles(expected), 1e-5);
        }
        // The mean of the values of the query's keys.
        let low = native(&sizes, &t, sizes.scores(Some(1e-9)));
        for (i, y) in low[0].chunks_exact(8).enumerate() {
            let n = sizes.keys(0, i / 2).len();
            let sum = |d| (0..n).map(|j| f64::from(v[j * 8 + d])).sum::<f64>();
            let means: Vec<f64> = (0..8).map(|d| sum(d) / n as f64).collect();
            assert_close(y, &means, 1e-6);
        }
    }
}

#[test]
fn other_dtypes_take_the_composed_operations() {
    let sizes = Sizes {
        batch: 2,
        seq_q: 4,
        seq_k: 6,
        kv_heads: 2,
        group: 2,
        dim: 3,
        ..CAUSAL
    };
    let t = tensors(&sizes, 7);
    for (sizes, cap) in each_way(sizes) {
        let [q, k, v, dy] = t.each_ref().map(|t| doubles(&values(t)));
        let leaves = [&t[0], &t[1], &t[2]].map(|t| leaf(&wide(t)));
        let [tq, tk, tv] = leaves.clone();
        let y = attention(tq, tk, tv, sizes.mask(), sizes.scores(cap));
        let grads = (y.clone() * wide(&t[3]).autodiff()).sum().backward();
        let expected = sizes.reference(&q, &k, &v, cap, sizes.scale()).0;
        assert_close(&wide_values(y.inner()), &expected, 1e-14);
        let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let y = sizes.reference(q, k, v, cap, sizes.scale()).0;
            y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        };
        let expected = [
            slopes(&values(&t[0]), |q| loss(q, &k, &v)),
            slopes(&values(&t[1]), |k| loss(&q, k, &v)),
            slopes(&values(&t[2]), |v| loss(&q, &k, v)),
        ];
        for (leaf, expected) in leaves.iter().zip(&expected) {
            assert_close(&wide_values(leaf.grad(&grads).unwrap()), expected, 1e-7);
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for (seq_q, seq_k) in [(150, 170), (1, 70), (1, 1100)] {
        let sizes = Sizes {
            batch: 2,
            seq_q,
            seq_k,
            kv_heads: 3,
            group: 2,
            dim: 20,
            segment: 40,
            ends: true,
            ..CAUSAL
        };
        let t = tensors(&sizes, 11);
        for (sizes, cap) in each_way(sizes) {
            assert_same_on_any_threads(|| native(&sizes, &t, sizes.scores(cap)));
        }
    }
}

/// In 16 bits, scores and probabilities are those of `f32`: a sum of 700 equal terms in `bf16` stops at
/// 256 of them.
#[test]
fn probabilities_are_wide_in_16_bits() {
    let mut random = Random::new(4);
    let scores = [Scores::new(0.5), Scores::new(0.5).with_softcap(0.5)];
    let masks = [true, false].map(|causal| Sizes {
        seq_q: 3,
        seq_k: 700,
        kv_heads: 1,
        group: 2,
        dim: 8,
        causal,
        ..CAUSAL
    });
    let all = masks
        .into_iter()
        .flat_map(|sizes| scores.map(|scores| (sizes, scores)));
    let all = all.flat_map(|case| [DType::BF16, DType::F16].map(|dtype| (case, dtype)));
    for ((sizes, scores), dtype) in all {
        let mut half = |shape: [usize; 4]| random.tensor::<4>(shape).cast(dtype);
        let (q, k) = (half(sizes.of_queries()), half(sizes.of_keys()));
        let (v, dy) = (half(sizes.of_keys()) + 1.0, half(sizes.of_queries()));
        let mask = || sizes.key_ranges();
        let [wide_q, wide_k, wide_v, wide_dy] = [&q, &k, &v, &dy].map(|t| primitive(&wide(t)));
        let (y, lse) = composed::forward::<Flex>(
            wide_q.clone(),
            wide_k.clone(),
            wide_v.clone(),
            mask(),
            scores,
        );
        let expected = composed::backward::<Flex>(
            wide_q,
            wide_k,
            wide_v,
            mask(),
            y.clone(),
            lse.clone(),
            wide_dy,
            scores,
        );
        let [q, k, v, dy] = [&q, &k, &v, &dy].map(primitive);
        let native =
            Flex::masked_attention_forward(q.clone(), k.clone(), v.clone(), mask(), scores);
        let others = composed::forward::<Flex>(q.clone(), k.clone(), v.clone(), mask(), scores);
        let of_native = Flex::masked_attention_backward(
            q.clone(),
            k.clone(),
            v.clone(),
            mask(),
            native.0.clone(),
            native.1.clone(),
            dy.clone(),
            scores,
        );
        let of_others = composed::backward::<Flex>(
            q,
            k,
            v,
            mask(),
            others.0.clone(),
            others.1.clone(),
            dy,
            scores,
        );
        let unit = match dtype {
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        // The native code rounds results alone; the composed one, products too.
        for (found, gradients, roundings, of_lse) in [
            (native, of_native, 1.0, 1e-6),
            (others, of_others, 3.0, unit / 4.0),
        ] {
            assert_eq!((found.0.dtype(), found.1.dtype()), (dtype, DType::F32));
            assert_within(found.0, &y, roundings * unit);
            assert_within(found.1, &lse, of_lse);
            let found = [gradients.0, gradients.1, gradients.2];
            let expected = [&expected.0, &expected.1, &expected.2];
            for (found, expected) in found.into_iter().zip(expected) {
                assert_eq!(found.dtype(), dtype);
                assert_within(found, expected, 4.0 * roundings * unit);
            }
        }
    }
}
