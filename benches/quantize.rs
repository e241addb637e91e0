//! Quantizing, packing and unpacking one weight, compared with the ceilings of the machine: a copy of as
//! many bytes as the dense weight has, and a plain f32 product of its size.
//!
//! `cargo bench --bench quantize -- --noplot`; the variable `WIDTH` sets another width than 4096.

use std::hint::black_box;

use benches::{copy, correlated_gram, weight, width};
use burn::tensor::{Device, Distribution, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quant_core::{
    Candidate, DoubleQuant, GroupRange, NormalFloat, Optq, Order, Quantizer, Rtn, allocate,
};

fn ceilings(criterion: &mut Criterion) {
    let (device, width) = (Device::flex(), width());
    let mut group = criterion.benchmark_group(format!("ceilings {width}x{width}"));
    let source = vec![1.0f32; width * width];
    let mut target = vec![0.0f32; source.len()];
    group.throughput(Throughput::Bytes((4 * width * width) as u64));
    group.bench_function("copy, all cores", |b| b.iter(|| copy(&source, &mut target)));
    let w = weight(width, &device);
    // An element is one multiplication and addition.
    group.throughput(Throughput::Elements((width * width * width) as u64));
    group.bench_function("f32 product", |b| {
        b.iter(|| black_box(w.clone().matmul(w.clone())))
    });
    group.finish();
}

fn quantize(criterion: &mut Criterion) {
    let (device, width) = (Device::flex(), width());
    let weight = weight(width, &device);
    let mut group = criterion.benchmark_group(format!("quantize {width}x{width}"));
    group.throughput(Throughput::Bytes((4 * width * width) as u64));
    let methods: [(&str, Box<dyn Quantizer>); 8] = [
        (
            "rtn 2 bits g128",
            Box::new(Rtn::new().with_bits(2).with_group_size(128)),
        ),
        (
            "rtn 3 bits g128",
            Box::new(Rtn::new().with_bits(3).with_group_size(128)),
        ),
        ("rtn 4 bits g128", Box::new(Rtn::new().with_group_size(128))),
        (
            "rtn 8 bits g128",
            Box::new(Rtn::new().with_bits(8).with_group_size(128)),
        ),
        ("rtn 4 bits per channel", Box::new(Rtn::new())),
        (
            "clip search 4 bits g128",
            Box::new(
                Rtn::new()
                    .with_group_size(128)
                    .with_range(GroupRange::Clipped),
            ),
        ),
        ("nf4 b64", Box::new(NormalFloat::new())),
        (
            "nf4 b64 double",
            Box::new(NormalFloat::new().with_double_quant(DoubleQuant::dynamic())),
        ),
    ];
    for (name, method) in &methods {
        group.bench_function(format!("{name}: quantize"), |b| {
            b.iter(|| black_box(method.quantize(weight.clone(), None)))
        });
        let packed = method
            .quantize(weight.clone(), None)
            .expect("a finite weight")
            .weight;
        group.bench_function(format!("{name}: dequantize"), |b| {
            b.iter(|| black_box(packed.dequantize()))
        });
    }
    group.finish();
}

fn pack(criterion: &mut Criterion) {
    let width = width();
    let mut group = criterion.benchmark_group(format!("codes {width}x{width}"));
    for bits in [2, 3, 4, 8] {
        let layout = kernels::Layout::new(width, width, bits, 128, kernels::Levels::Unsigned);
        let codes: Vec<u8> = (0..width * width)
            .map(|k| (k * 31 % (1 << bits)) as u8)
            .collect();
        let words = kernels::pack(&codes, &layout);
        group.throughput(Throughput::Bytes(codes.len() as u64));
        group.bench_function(format!("pack {bits} bits"), |b| {
            b.iter(|| black_box(kernels::pack(&codes, &layout)))
        });
        group.bench_function(format!("unpack {bits} bits"), |b| {
            b.iter(|| black_box(kernels::unpack(&words, &layout)))
        });
    }
    group.finish();
}

fn optq(criterion: &mut Criterion) {
    let (device, width) = (Device::flex(), width());
    let weight = weight(width, &device);
    let mix = Tensor::<2>::random([width, width], Distribution::Normal(0.0, 0.02), &device);
    let gram = correlated_gram(mix, &device);
    let mut group = criterion.benchmark_group(format!("optq {width}x{width} 4 bits g128"));
    group.sample_size(10);
    group.throughput(Throughput::Bytes((4 * width * width) as u64));
    let optq = Optq::new().with_group_size(128);
    let orders = [
        ("natural", Order::Natural),
        ("descending, static groups", Order::Descending),
        ("descending by group", Order::DescendingByGroup),
    ];
    for (name, order) in orders {
        let optq = optq.with_order(order);
        group.bench_function(name, |b| {
            b.iter(|| black_box(optq.quantize(weight.clone(), Some(&gram))))
        });
    }
    group.finish();
}

/// Allocates bits to 300 layers of four shapes, each in ten formats. Each bit divides the error by 4, and
/// the sensitivities of the layers span three orders of magnitude.
fn allocation(criterion: &mut Criterion) {
    let shapes = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024)];
    let layers: Vec<Vec<Candidate>> = (0..300u64)
        .map(|layer| {
            let (d_in, d_out) = shapes[layer as usize % 4];
            let sensitivity = 10f64.powf((layer * 7919 % 1000) as f64 / 333.0);
            let of_bits = |bits: u64| {
                let group_sizes = [32, 64, 128]
                    .into_iter()
                    .take(if bits == 8 { 1 } else { 3 });
                group_sizes.map(move |group| Candidate {
                    n_bytes: d_in * d_out * bits / 8 + d_in / group * d_out * 4,
                    error: sensitivity * 0.25f64.powi(bits as i32) * (group as f64).powf(0.3),
                })
            };
            [2, 3, 4, 8].into_iter().flat_map(of_bits).collect()
        })
        .collect();
    let three_bits: u64 = layers.iter().map(|layer| layer[4].n_bytes).sum();
    criterion.bench_function("allocate 300 layers x 10 formats", |b| {
        b.iter(|| black_box(allocate(&layers, three_bits)))
    });
    let found = allocate(&layers, three_bits).expect("three bits fit");
    assert!(found.is_optimal());
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = ceilings, quantize, pack, optq, allocation
}
criterion_main!(benches);
