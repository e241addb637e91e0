//! LoftQ and its successors on one Gaussian weight, compared with the ceilings of the machine: a read of
//! the weight, and a plain f32 product of its size.
//!
//! `cargo bench --bench loftq -- --noplot`; the variable `WIDTH` sets another width than 4096. Prints the
//! relative error and the peak memory of each method before its times.

#![expect(clippy::print_stdout, reason = "a program reports its results")]

use std::hint::black_box;

use benches::{correlated_gram, width};
use burn::tensor::{Device, Distribution, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use examples::memory;
use loftq::{Layer, LayerMethod, Loftq, LqLora, Pissa, Qera};
use quant_core::{NormalFloat, Optq, Order, Quantizer};

fn initializations(criterion: &mut Criterion) {
    let (device, width) = (Device::flex(), width());
    let normal = Distribution::Normal(0.0, 0.02);
    let weight = benches::weight(width, &device);
    let n_bytes = 4 * width * width;
    let power = quant_core::sum_of_squares(weight.clone());

    let mut group = criterion.benchmark_group(format!("ceilings {width}x{width}"));
    group.sample_size(10);
    group.throughput(Throughput::Bytes(n_bytes as u64));
    group.bench_function("sum of squares", |b| {
        b.iter(|| black_box(quant_core::sum_of_squares(weight.clone())))
    });
    group.throughput(Throughput::Elements((width * width * width) as u64));
    group.bench_function("f32 product", |b| {
        b.iter(|| black_box(weight.clone().matmul(weight.clone())))
    });
    group.throughput(Throughput::Elements((width * width * 24) as u64));
    let thin = Tensor::<2>::random([width, 24], normal, &device);
    group.bench_function("f32 product with 24 columns", |b| {
        b.iter(|| black_box(weight.clone().matmul(thin.clone())))
    });
    let thin = thin.transpose();
    group.bench_function("f32 product of 24 rows", |b| {
        b.iter(|| black_box(thin.clone().matmul(weight.clone())))
    });
    group.finish();

    let gram = correlated_gram(weight.clone(), &device);

    let nf = |bits| Box::new(NormalFloat::new().with_bits(bits)) as Box<dyn Quantizer>;
    let optq = || {
        let optq = Optq::new().with_bits(2).with_group_size(64);
        Box::new(optq.with_order(Order::Natural)) as Box<dyn Quantizer>
    };
    type Case = (&'static str, Box<dyn LayerMethod>, Box<dyn Quantizer>);
    let cases: [Case; 9] = [
        (
            "loftq nf4 rank 16, 1 round",
            Box::new(Loftq::new(16).with_rounds(1)),
            nf(4),
        ),
        (
            "loftq nf4 rank 16, 5 rounds",
            Box::new(Loftq::new(16)),
            nf(4),
        ),
        (
            "loftq nf4 rank 64, 1 round",
            Box::new(Loftq::new(64).with_rounds(1)),
            nf(4),
        ),
        (
            "loftq nf4 rank 64, 5 rounds",
            Box::new(Loftq::new(64)),
            nf(4),
        ),
        (
            "loftq nf2 rank 16, 5 rounds",
            Box::new(Loftq::new(16)),
            nf(2),
        ),
        (
            "loftq nf2 rank 64, 5 rounds",
            Box::new(Loftq::new(64)),
            nf(2),
        ),
        ("pissa nf4 rank 16", Box::new(Pissa::new(16)), nf(4)),
        (
            "lq-lora nf4 rank 16, 10 rounds",
            Box::new(LqLora::new(16).with_max_rounds(10)),
            nf(4),
        ),
        ("cloq 2 bits g64 rank 16", Box::new(Qera::new(16)), optq()),
    ];
    let mut group = criterion.benchmark_group(format!("initialize {width}x{width}"));
    group.sample_size(10);
    group.throughput(Throughput::Bytes(n_bytes as u64));
    for (name, method, quantizer) in &cases {
        let layer = Layer {
            path: "proj",
            weight: weight.clone(),
            gram: Some(&gram),
            fisher: None,
        };
        let start = || method.start(&layer, &**quantizer).expect("a finite weight");
        memory::reset_peak();
        let before = memory::resident_bytes();
        let found = start();
        let peak = memory::peak_bytes();
        let [a, b_factor] = found.factors.expect("a low rank");
        let sum = found.weight.to_dense() + a.matmul(b_factor);
        let error = quant_core::sum_of_squares(weight.clone() - sum);
        let relative = (error / power).sqrt();
        print!(
            "{name}: relative error {relative:.5}, round {}",
            found.round
        );
        if let (Some(before), Some(peak)) = (before, peak) {
            let weights = peak.saturating_sub(before) as f64 / n_bytes as f64;
            print!(", peak memory of {weights:.1} further weights");
        }
        println!();
        group.bench_function(*name, |b| b.iter(|| black_box(start())));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default();
    targets = initializations
}
criterion_main!(benches);
