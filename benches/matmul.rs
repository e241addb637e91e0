//! The product with a packed weight, forward and backward, compared with the ceilings of the machine: a
//! read and a copy of as many bytes as the codes have, and a plain f32 product of its shape.
//!
//! `cargo bench --bench matmul -- --noplot`; the variable `WIDTHS` sets the outputs of the weights, each
//! with 4096 inputs, `4096,32768` by default. Each product is computed in each arithmetic that the processor
//! has.

use std::hint::black_box;
use std::time::Duration;

use benches::copy;
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::{
    Arithmetic, Layout, Levels, Precision, matmul as dense_matmul, quant_matmul, set_arithmetic,
};

const D_IN: usize = 4096;
const GROUP: usize = 128;

fn widths() -> Vec<usize> {
    let widths = std::env::var("WIDTHS").unwrap_or("4096,32768".into());
    let parse = |width: &str| width.parse().expect("WIDTHS are numbers");
    widths.split(',').map(parse).collect()
}

struct Weight {
    words: Tensor<3, Int>,
    scales: Tensor<2>,
    zeros: Option<Tensor<2>>,
    layout: Layout,
}

impl Weight {
    /// A weight of random codes.
    fn random(d_out: usize, bits: usize, levels: Levels, group: usize, device: &Device) -> Self {
        let layout = Layout::new(D_IN, d_out, bits, group, levels);
        let [tiles, rows, columns] = layout.words_shape();
        let mut state = 1u64;
        let words = (0..tiles * rows * columns)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u32
            })
            .collect::<Vec<u32>>();
        let words = TensorData::new(words, layout.words_shape());
        let zeros = matches!(levels, Levels::Unsigned);
        Self {
            words: Tensor::from_data(words, (device, DType::U32)),
            scales: Tensor::full(layout.grid_shape(), 0.01, device),
            zeros: zeros.then(|| Tensor::full(layout.grid_shape(), 7.5, device)),
            layout,
        }
    }

    fn product(&self, x: Tensor<2>, scales: Tensor<2>, precision: Precision) -> Tensor<2> {
        quant_matmul(
            x,
            self.words.clone(),
            scales,
            self.zeros.clone(),
            self.layout,
            precision,
        )
    }
}

fn matmul(criterion: &mut Criterion) {
    let device = Device::flex();
    device.seed(0);
    let table = Levels::Table(std::array::from_fn(|i| i as f32 / 8.0 - 1.0));
    for d_out in widths() {
        ceilings(criterion, d_out, &device);
        at_rest(criterion, d_out, &device);
        for (name, bits, levels, group) in [
            ("4 bits", 4, Levels::Unsigned, GROUP),
            ("4 bits, groups of 32", 4, Levels::Unsigned, 32),
            ("4 bits per channel", 4, Levels::Unsigned, D_IN),
            ("2 bits", 2, Levels::Unsigned, GROUP),
            ("3 bits", 3, Levels::Unsigned, GROUP),
            ("8 bits", 8, Levels::Unsigned, GROUP),
            ("NF4", 4, table, 64),
        ] {
            let w = Weight::random(d_out, bits, levels, group, &device);
            for rows in [1, 2, 4, 8, 64, 512] {
                one(criterion, name, rows, &w, &device);
            }
        }
    }
}

fn one(criterion: &mut Criterion, name: &str, rows: usize, w: &Weight, device: &Device) {
    let d_out = w.layout.d_out();
    let x = Tensor::<2>::random([rows, D_IN], Distribution::Normal(0.0, 1.0), device);
    let mut group = criterion.benchmark_group(format!("{rows}x{D_IN}x{d_out}"));
    group.throughput(match rows {
        1 => Throughput::Bytes((D_IN * d_out * w.layout.bits() / 8) as u64),
        // An element is one multiplication and addition.
        _ => Throughput::Elements((rows * D_IN * d_out) as u64),
    });
    for precision in [Precision::Full, Precision::Fast] {
        let id = match precision {
            Precision::Full => BenchmarkId::new("forward", name),
            Precision::Fast => BenchmarkId::new("forward, fast", name),
        };
        group.bench_function(id, |b| {
            b.iter(|| black_box(w.product(x.clone(), w.scales.clone(), precision)))
        });
    }
    let each = [Arithmetic::Float, Arithmetic::Vnni, Arithmetic::Amx];
    for arithmetic in each.into_iter().filter(|of| of.is_supported()) {
        set_arithmetic(arithmetic).expect("it is supported");
        for precision in [Precision::Full, Precision::Fast] {
            let id = BenchmarkId::new(format!("forward, {precision:?}, {arithmetic:?}"), name);
            group.bench_function(id, |b| {
                b.iter(|| black_box(w.product(x.clone(), w.scales.clone(), precision)))
            });
        }
        if rows < 64 {
            continue;
        }
        group.bench_function(BenchmarkId::new(format!("dx, {arithmetic:?}"), name), |b| {
            b.iter_batched(
                || {
                    let x = x.clone().autodiff().require_grad();
                    (
                        w.product(x.clone(), w.scales.clone(), Precision::Full)
                            .sum(),
                        x,
                    )
                },
                |(y, x)| x.grad(&y.backward()),
                BatchSize::PerIteration,
            )
        });
        let id = BenchmarkId::new(format!("dscales, {arithmetic:?}"), name);
        group.bench_function(id, |b| {
            b.iter_batched(
                || {
                    let scales = w.scales.clone().autodiff().require_grad();
                    (
                        w.product(x.clone(), scales.clone(), Precision::Full).sum(),
                        scales,
                    )
                },
                |(y, scales)| scales.grad(&y.backward()),
                BatchSize::PerIteration,
            )
        });
    }
    set_arithmetic(Arithmetic::Fastest).expect("every processor has it");
}

/// Dense weights in memory in several types, as layers have them and as a tied head is, by columns.
fn at_rest(criterion: &mut Criterion, d_out: usize, device: &Device) {
    let mut group = criterion.benchmark_group(format!("dense {D_IN}x{d_out}"));
    let normal = |dims: [usize; 2], dtype| {
        Tensor::<2>::random(dims, Distribution::Normal(0.0, 0.02), device).cast(dtype)
    };
    let weights = [DType::F32, DType::BF16, DType::F16].map(|dtype| {
        let by_columns = normal([d_out, D_IN], dtype).transpose();
        [
            ("by rows", normal([D_IN, d_out], dtype)),
            ("by columns", by_columns),
        ]
    });
    for rows in [1, 8, 64, 512] {
        let x = Tensor::<2>::random([rows, D_IN], Distribution::Normal(0.0, 1.0), device);
        group.throughput(Throughput::Elements((rows * D_IN * d_out) as u64));
        for (order, weight) in weights.iter().flatten() {
            let dtype = weight.dtype();
            let id = BenchmarkId::new(format!("{dtype:?} {order}, rows"), rows);
            group.bench_function(id, |b| {
                b.iter(|| black_box(dense_matmul(x.clone(), weight.clone())))
            });
        }
    }
    group.finish();
}

fn ceilings(criterion: &mut Criterion, d_out: usize, device: &Device) {
    let n = D_IN * d_out / 8;
    let source = vec![1u32; n];
    let mut target = vec![0u32; n];
    let mut group = criterion.benchmark_group(format!("ceilings {D_IN}x{d_out}"));
    group.throughput(Throughput::Bytes(4 * n as u64));
    group.bench_function("copy of 4 bits, all cores", |b| {
        b.iter(|| copy(&source, &mut target))
    });
    let sum = |words: &[u32]| {
        let mut sums = [0u32; 64];
        for words in words.chunks_exact(64) {
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(*word);
            }
        }
        sums
    };
    group.bench_function("read of 4 bits, two threads", |b| {
        b.iter(|| {
            std::thread::scope(|scope| {
                let half = scope.spawn(|| sum(black_box(&source[..n / 2])));
                black_box(sum(black_box(&source[n / 2..])));
                black_box(half.join().expect("a sum"));
            });
        })
    });
    drop((source, target));
    let w = Tensor::<2>::random([D_IN, d_out], Distribution::Normal(0.0, 0.02), device);
    for rows in [1, 8, 64, 512] {
        let x = Tensor::<2>::random([rows, D_IN], Distribution::Normal(0.0, 1.0), device);
        group.throughput(Throughput::Elements((rows * D_IN * d_out) as u64));
        group.bench_function(BenchmarkId::new("f32 product, rows", rows), |b| {
            b.iter(|| black_box(x.clone().matmul(w.clone())))
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = matmul
}
criterion_main!(benches);
