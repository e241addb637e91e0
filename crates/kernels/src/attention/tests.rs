//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::Flex;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use super::starts::Starts;
use super::{AttentionOps, Scores, causal_attention, composed};
use crate::testing::*;

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    seq_q: usize,
    seq_k: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    /// Tokens in a segment of the first sequence, one more in each later one; 0 for a single segment.
    segment: usize,
}

impl Sizes {
    /// The first key that a query attends to.
    fn start(&self, batch: usize, query: usize) -> usize {
        let own = self.seq_k - self.seq_q + query;
        match self.segment {
            0 => 0,
            segment => own - own % (segment + batch),
        }
    }

    fn starts(&self) -> Option<Tensor<2, Int>> {
        let of = |batch| (0..self.seq_q).map(move |query| self.start(batch, query) as i64);
        let starts: Vec<i64> = (0..self.batch).flat_map(of).collect();
        let starts = TensorData::new(starts, [self.batch, self.seq_q]);
        (self.segment > 0).then(|| Tensor::from_data(starts, &Device::flex()))
    }

    fn of_queries(&self) -> [usize; 4] {
        [self.batch, self.seq_q, self.kv_heads * self.group, self.dim]
    }

    fn of_keys(&self) -> [usize; 4] {
        [self.batch, self.seq_k, self.kv_heads, self.dim]
    }

    fn primitive_starts(&self) -> Starts<Flex> {
        match self.starts() {
            Some(starts) => Starts::Each(starts.try_into_primitive::<Flex>().unwrap()),
            None => Starts::First,
        }
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
            let first = self.start(b, i);
            let n = self.seq_k - self.seq_q + i + 1;
            let exp: Vec<f64> = (first..n)
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
                y[row + d] = (first..n)
                    .map(|j| exp[j - first] / sum * v[key(j) + d])
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
    (1..4usize, seq_q, more_keys, heads, dim, segment).prop_map(
        |(batch, seq_q, more_keys, (kv_heads, group), dim, segment)| Sizes {
            batch,
            seq_q,
            seq_k: seq_q + more_keys,
            kv_heads,
            group,
            dim,
            segment,
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
    let starts = sizes.primitive_starts();
    let (y, lse) =
        Flex::causal_attention_forward(q.clone(), k.clone(), v.clone(), starts.clone(), scores);
    let (y_, lse_) = (y.clone(), lse.clone());
    let (dq, dk, dv) = Flex::causal_attention_backward(q, k, v, starts, y_, lse_, dy, scores);
    [y, lse, dq, dk, dv].map(primitive_values).to_vec()
}

fn by_composition(sizes: &Sizes, t: &[Tensor<4>; 4], scores: impl Into<Scores>) -> Vec<Vec<f32>> {
    let scores = scores.into();
    let [q, k, v, dy] = t.each_ref().map(primitive);
    let starts = sizes.primitive_starts();
    let (y, lse) =
        composed::forward::<Flex>(q.clone(), k.clone(), v.clone(), starts.clone(), scores);
    let (y_, lse_) = (y.clone(), lse.clone());
    let (dq, dk, dv) = composed::backward::<Flex>(q, k, v, starts, y_, lse_, dy, scores);
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
        let y = causal_attention(q.clone(), k.clone(), v.clone(), sizes.starts(), scores);
        let grads = (y * dy.autodiff()).sum().backward();
        for (leaf, expected) in [q, k, v].iter().zip(&expected[2..]) {
            prop_assert_eq!(bits(&values(&leaf.grad(&grads).unwrap())), bits(expected));
        }
    }
}

/// Later positions change no bit of a query's output, and its own does.
#[test]
fn later_positions_are_masked() {
    let sizes = Sizes {
        batch: 2,
        seq_q: 140,
        seq_k: 150,
        kv_heads: 2,
        group: 2,
        dim: 12,
        segment: 0,
    };
    let [q, k, v, _] = tensors(&sizes, 8);
    let at = 100;
    let own = sizes.seq_k - sizes.seq_q + at;
    let change = |t: &Tensor<4>, from: usize| {
        let n = sizes.seq_k - from;
        Tensor::cat(
            vec![
                t.clone().narrow(1, 0, from),
                t.clone().narrow(1, from, n) * 3.0,
            ],
            1,
        )
    };
    let query = |k, v| {
        let y = causal_attention(q.clone(), k, v, sizes.starts(), sizes.scale());
        bits(&values(&y.narrow(1, at, 1)))
    };
    let y = query(k.clone(), v.clone());
    assert_eq!(query(change(&k, own + 1), change(&v, own + 1)), y);
    assert_ne!(query(k.clone(), change(&v, own)), y);
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
        segment: 0,
    };
    let [q, k, v, _] = tensors(&sizes, 9);
    for cap in [None, Some(0.25)] {
        let run = |q| causal_attention(q, k.clone(), v.clone(), sizes.starts(), sizes.scores(cap));
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
        segment: 0,
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
        segment: 0,
    };
    let t = tensors(&sizes, 12);
    let uncapped = native(&sizes, &t, sizes.scale());
    let high = native(&sizes, &t, sizes.scores(Some(1e6)));
    for (found, expected) in high.iter().zip(&uncapped) {
        assert_close(found, &doubles(expected), 1e-5);
    }
    // The mean of the values up to the query.
    let low = native(&sizes, &t, sizes.scores(Some(1e-9)));
    let v = values(&t[2]);
    for (i, y) in low[0].chunks_exact(8).enumerate() {
        let n = i / 2 + 1;
        let means = (0..8).map(|d| (0..n).map(|j| f64::from(v[j * 8 + d])).sum::<f64>() / n as f64);
        assert_close(y, &means.collect::<Vec<_>>(), 1e-6);
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
        segment: 0,
    };
    let t = tensors(&sizes, 7);
    for cap in [None, Some(0.25)] {
        let [q, k, v, dy] = t.each_ref().map(|t| doubles(&values(t)));
        let leaves = [&t[0], &t[1], &t[2]].map(|t| leaf(&wide(t)));
        let [tq, tk, tv] = leaves.clone();
        let y = causal_attention(tq, tk, tv, sizes.starts(), sizes.scores(cap));
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
        };
        let t = tensors(&sizes, 11);
        for cap in [None, Some(0.25)] {
            assert_same_on_any_threads(|| native(&sizes, &t, sizes.scores(cap)));
        }
    }
}

/// In 16 bits, scores and probabilities are those of `f32`: a sum of 700 equal terms in `bf16` stops at
/// 256 of them.
#[test]
fn probabilities_are_wide_in_16_bits() {
    let mut random = Random::new(4);
    let capped = Scores::new(0.5).with_softcap(0.5);
    let all = [Scores::new(0.5), capped].map(|of| [(DType::BF16, of), (DType::F16, of)]);
    for (dtype, scores) in all.into_iter().flatten() {
        let mut half = |shape: [usize; 4]| random.tensor::<4>(shape).cast(dtype);
        let (q, k) = (half([1, 3, 2, 8]), half([1, 700, 1, 8]));
        let (v, dy) = (half([1, 700, 1, 8]) + 1.0, half([1, 3, 2, 8]));
        let in_f64 = |t: &Tensor<4>| primitive(&wide(t));
        let first = || Starts::First;
        let (y, lse) =
            composed::forward::<Flex>(in_f64(&q), in_f64(&k), in_f64(&v), first(), scores);
        let expected = composed::backward::<Flex>(
            in_f64(&q),
            in_f64(&k),
            in_f64(&v),
            first(),
            y.clone(),
            lse.clone(),
            in_f64(&dy),
            scores,
        );
        let [q, k, v, dy] = [&q, &k, &v, &dy].map(primitive);
        let native =
            Flex::causal_attention_forward(q.clone(), k.clone(), v.clone(), first(), scores);
        let others = composed::forward::<Flex>(q.clone(), k.clone(), v.clone(), first(), scores);
        let of_native = Flex::causal_attention_backward(
            q.clone(),
            k.clone(),
            v.clone(),
            first(),
            native.0.clone(),
            native.1.clone(),
            dy.clone(),
            scores,
        );
        let of_others = composed::backward::<Flex>(
            q,
            k,
            v,
            first(),
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
