//! Attention, causal and not, and the loss, forward and backward, without and with the soft caps of Gemma 2.
//!
//! `cargo bench --bench attention -- --noplot`. The sizes are those of a layer and of the head of
//! SmolLM2-135M: nine heads of 64 over three of keys, hidden states of 576, 49,152 tokens.

use std::hint::black_box;

use burn::tensor::{Device, Distribution, Int, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use kernels::{Mask, OutputHead, Scores, attention, linear_cross_entropy};

const DIM: usize = 64;
const HIDDEN: usize = 576;
const VOCAB: usize = 49_152;

fn normal<const D: usize>(dims: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(dims, Distribution::Normal(0.0, 1.0), device)
}

fn bench_attention(criterion: &mut Criterion) {
    let device = Device::flex();
    device.seed(0);
    let scale = Scores::new(1.0 / (DIM as f64).sqrt());
    for (seq_q, seq_k) in [(1, 1024), (1024, 1024)] {
        let mut group = criterion.benchmark_group(format!("attention {seq_q} to {seq_k}"));
        let q = normal([1, seq_q, 9, DIM], &device);
        let [k, v] = [(); 2].map(|()| normal([1, seq_k, 3, DIM], &device));
        let capped = scale.with_softcap(50.0);
        for (name, mask, scores) in [
            ("causal", Mask::causal(), scale),
            ("causal and capped", Mask::causal(), capped),
            ("full", Mask::full(), scale),
            ("full and capped", Mask::full(), capped),
        ] {
            group.bench_function(format!("forward, {name}"), |b| {
                b.iter(|| {
                    let (q, k, v) = (q.clone(), k.clone(), v.clone());
                    black_box(attention(q, k, v, mask.clone(), scores))
                })
            });
            if seq_q == 1 {
                continue;
            }
            group.bench_function(format!("forward and backward, {name}"), |b| {
                b.iter(|| {
                    let [q, k, v] = [&q, &k, &v].map(|t| t.clone().autodiff().require_grad());
                    let y = attention(q.clone(), k, v, mask.clone(), scores);
                    black_box(q.grad(&y.sum().backward()))
                })
            });
        }
    }
}

fn bench_loss(criterion: &mut Criterion) {
    let device = Device::flex();
    device.seed(0);
    let rows = 512;
    let x = normal([rows, HIDDEN], &device);
    let weight = normal([VOCAB, HIDDEN], &device) * 0.02;
    let bias = normal([VOCAB], &device);
    let targets = Tensor::<1, Int>::arange(0..rows as i64, &device) * 37;
    let mut group = criterion.benchmark_group(format!("loss of {rows} rows"));
    let plain = OutputHead::new(weight.transpose());
    let capped = plain.clone().with_bias(bias).with_softcap(30.0);
    for (name, head) in [("plain", plain), ("bias and cap", capped)] {
        group.bench_function(format!("forward, {name}"), |b| {
            b.iter(|| {
                black_box(linear_cross_entropy(
                    x.clone(),
                    head.clone(),
                    targets.clone(),
                ))
            })
        });
        group.bench_function(format!("forward and backward, {name}"), |b| {
            b.iter(|| {
                let x = x.clone().autodiff().require_grad();
                let nll = linear_cross_entropy(x.clone(), head.clone(), targets.clone());
                black_box(x.grad(&nll.sum().backward()))
            })
        });
    }
}

criterion_group!(benches, bench_attention, bench_loss);
criterion_main!(benches);
