//! The code that the benches share: models, data, and the ceilings of the machine. The benches are in the
//! parent folder of this one: `cargo bench --package benches`.

#![forbid(unsafe_code)]

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use models::{LlamaConfig, Model, OptConfig};
use peft::Linears;
use quant_core::Gram;

/// Returns a LLaMA of 109.5 million random parameters, frozen as those of a loaded model are.
pub fn llama(device: &Device) -> Model {
    let config = LlamaConfig::default()
        .with_hidden_size(768)
        .with_intermediate_size(2048)
        .with_num_hidden_layers(12)
        .with_num_attention_heads(12)
        .with_num_key_value_heads(12)
        .with_head_dim(64)
        .with_max_position_embeddings(2048)
        .with_tie_word_embeddings(true);
    Model::init(&config, 0, device).no_grad()
}

/// Returns an OPT of the shape of `opt-125m` with random, frozen parameters.
pub fn opt(device: &Device) -> Model {
    Model::init(OptConfig::default(), 0, device).no_grad()
}

/// The bytes of the packed projections.
pub fn packed_bytes(model: &Model) -> usize {
    let linears = model.linears().into_iter();
    linears.map(|(_, linear)| linear.weight().n_bytes()).sum()
}

/// The CPU time of this process over all cores, in seconds, on Linux. Unlike wall-clock time it does not
/// include the time of other processes.
pub fn cpu_seconds() -> Option<f64> {
    // Linux: the 14th and 15th field in ticks of 10 ms; the 2nd, a name, may have spaces.
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / 100.0)
}

/// The throughput that the machine reaches at best, measured in the same run as the benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes per second of a copy by all cores, read and written.
    pub copied: f64,
    /// Floating-point operations per second of an f32 product of 1024 x 1024 x 1024.
    pub product: f64,
}

impl Ceilings {
    /// Measures the ceilings, in about a second.
    pub fn measure(device: &Device) -> Self {
        const BYTES: usize = 128 << 20;
        let (source, mut target) = (vec![1u8; BYTES], vec![0u8; BYTES]);
        let seconds = shortest(8, || copy(&source, &mut target));
        let x = Tensor::<2>::random([1024, 1024], Distribution::Normal(0.0, 1.0), device);
        let product = shortest(8, || {
            black_box(x.clone().matmul(x.clone()).into_data());
        });
        Self {
            copied: (2 * BYTES) as f64 / seconds,
            product: (2u64 << 30) as f64 / product,
        }
    }
}

/// Copies with a thread for each core.
pub fn copy<T: Copy + Send + Sync>(source: &[T], target: &mut [T]) {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = source.len().div_ceil(n_threads);
    std::thread::scope(|scope| {
        for (from, to) in source.chunks(part).zip(target.chunks_mut(part)) {
            scope.spawn(|| black_box(to).copy_from_slice(black_box(from)));
        }
    });
}

/// The width of a square weight, 4096 unless the variable `WIDTH` sets another.
///
/// # Panics
/// If `WIDTH` is not a number.
pub fn width() -> usize {
    std::env::var("WIDTH").map_or(4096, |width| width.parse().expect("WIDTH is a number"))
}

/// Returns a random square weight, the same in all runs.
pub fn weight(width: usize, device: &Device) -> Tensor<2> {
    device.seed(0);
    Tensor::random([width, width], Distribution::Normal(0.0, 0.02), device)
}

/// Returns the Gram of twice `width` random inputs that are correlated by `mix`.
pub fn correlated_gram(mix: Tensor<2>, device: &Device) -> Gram {
    let [width, _] = mix.dims();
    let x = Tensor::<2>::random([2 * width, width], Distribution::Normal(0.0, 1.0), device);
    let mut gram = Gram::new(width, device);
    gram.update(x.clone() + x.matmul(mix));
    gram
}

/// The seconds of the fastest of `n` runs.
fn shortest(n: usize, mut run: impl FnMut()) -> f64 {
    let seconds = (0..n).map(|_| {
        let clock = Instant::now();
        run();
        clock.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ceilings: memory {:.1} GB/s (copy, read and written), f32 product {:.0} GFLOP/s (1024^3)",
            self.copied / 1e9,
            self.product / 1e9
        )
    }
}
