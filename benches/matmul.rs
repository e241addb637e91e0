//! The product with a packed weight, forward and backward, beside the machine's ceilings: a copy of
//! as many bytes as the packed weight has, and a plain f32 product of the same size.

use std::hint::black_box;

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quant_core::{Quantizer, Rtn};

const WIDTH: usize = 2048;

fn matmul(criterion: &mut Criterion) {
    let device = Device::flex();
    let weight = Tensor::<2>::random([WIDTH, WIDTH], Distribution::Normal(0.0, 0.02), &device);
    for rows in [1, 64, 512] {
        let x = Tensor::<2>::random([rows, WIDTH], Distribution::Normal(0.0, 1.0), &device);
        let mut group = criterion.benchmark_group(format!("matmul {rows}x{WIDTH}x{WIDTH}"));
        // An element is one multiplication and addition.
        group.throughput(Throughput::Elements((rows * WIDTH * WIDTH) as u64));
        group.bench_function("f32", |b| {
            b.iter(|| black_box(x.clone().matmul(weight.clone())))
        });
        for bits in [2, 3, 4, 8] {
            let rtn = Rtn::new().with_bits(bits).with_group_size(128);
            let packed = rtn
                .quantize(weight.clone(), None)
                .expect("a finite weight")
                .weight;
            group.bench_function(BenchmarkId::new("forward", bits), |b| {
                b.iter(|| black_box(packed.matmul(x.clone())))
            });
            group.bench_function(BenchmarkId::new("dx", bits), |b| {
                b.iter_batched(
                    || {
                        let x = x.clone().autodiff().require_grad();
                        (packed.matmul(x.clone()).sum(), x)
                    },
                    |(y, x)| x.grad(&y.backward()),
                    criterion::BatchSize::LargeInput,
                )
            });
            group.bench_function(BenchmarkId::new("dscales", bits), |b| {
                b.iter_batched(
                    || {
                        let scales = packed.scales().autodiff().require_grad();
                        (
                            packed.matmul_scaled(x.clone(), scales.clone()).sum(),
                            scales,
                        )
                    },
                    |(y, scales)| scales.grad(&y.backward()),
                    criterion::BatchSize::LargeInput,
                )
            });
        }
        group.finish();
    }
}

fn copy(criterion: &mut Criterion) {
    for bits in [2, 3, 4, 8] {
        let source = vec![1u8; WIDTH * WIDTH * bits / 8];
        let mut target = vec![0u8; source.len()];
        let mut group = criterion.benchmark_group("copy of the codes");
        group.throughput(Throughput::Bytes(source.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(bits), |b| {
            b.iter(|| black_box(&mut target).copy_from_slice(black_box(&source)))
        });
        group.finish();
    }
}

fn quantize(criterion: &mut Criterion) {
    let device = Device::flex();
    let weight = Tensor::<2>::random([WIDTH, WIDTH], Distribution::Normal(0.0, 0.02), &device);
    let mut group = criterion.benchmark_group(format!("{WIDTH}x{WIDTH}"));
    group.throughput(Throughput::Bytes((WIDTH * WIDTH * 4) as u64));
    for bits in [2, 3, 4, 8] {
        let rtn = Rtn::new().with_bits(bits).with_group_size(128);
        group.bench_function(BenchmarkId::new("quantize", bits), |b| {
            b.iter(|| black_box(rtn.quantize(weight.clone(), None)))
        });
        let packed = rtn
            .quantize(weight.clone(), None)
            .expect("a finite weight")
            .weight;
        group.bench_function(BenchmarkId::new("dequantize", bits), |b| {
            b.iter(|| black_box(packed.dequantize()))
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = copy, quantize, matmul
}
criterion_main!(benches);
