//! The code that the benches share: models, data, and the ceilings of the machine. The benches are in the
//! parent folder of this one: `cargo bench --package benches`.

#![forbid(unsafe_code)]

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::ValueEnum;
use models::{LlamaConfig, Model, OptConfig};
use peft::Linears;
use quant_core::Gram;

/// The models of the benches.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shape {
    /// A LLaMA of 109.5 million parameters.
    #[value(name = "110m")]
    Small,
    /// A LLaMA of the shape of Llama-3.2-1B.
    #[value(name = "1b")]
    Large,
    /// An OPT of the shape of `opt-125m`.
    Opt,
}

impl Shape {
    /// Returns a model of random parameters, frozen as those of a loaded model are.
    pub fn init(self, device: &Device) -> Model {
        match self {
            Self::Small => llama(device),
            Self::Large => {
                let config = LlamaConfig::default()
                    .with_vocab_size(128_256)
                    .with_hidden_size(2048)
                    .with_intermediate_size(8192)
                    .with_num_hidden_layers(16)
                    .with_num_attention_heads(32)
                    .with_num_key_value_heads(8)
                    .with_head_dim(64)
                    .with_max_position_embeddings(8192)
                    .with_tie_word_embeddings(true);
                Model::init(&config, 0, device).no_grad()
            }
            Self::Opt => opt(device),
        }
    }
}

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

/// Stores the embedding, and with it a tied head, in a dtype, as that of a model from a file of it is.
pub fn with_embedding_in(model: Model, dtype: DType) -> Model {
    model.map(&mut EmbeddingIn {
        dtype,
        path: Vec::new(),
    })
}

struct EmbeddingIn {
    dtype: DType,
    path: Vec<String>,
}

impl ModuleMapper for EmbeddingIn {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.path.iter().any(|name| name == "embed_tokens") {
            true => param.map(|tensor| tensor.cast(self.dtype)),
            false => param,
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
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

/// The throughput that a device reaches at best, measured in the same run as the benchmark.
#[derive(Clone, Debug)]
pub struct Ceilings {
    /// Bytes per second of a copy, read and written.
    pub copied: f64,
    /// Floating-point operations per second of a product of square matrices, in each dtype.
    pub products: Vec<(DType, f64)>,
    /// The rows and columns of those matrices.
    pub width: usize,
}

impl Ceilings {
    /// Measures the ceilings, in about a second: of the processor by a copy with all cores and in `f32`,
    /// of another device in each dtype that it supports.
    pub fn measure(device: &Device) -> Self {
        let on_host = *device == Device::flex();
        let (width, dtypes): (usize, &[DType]) = if on_host {
            (1024, &[DType::F32])
        } else {
            (4096, &[DType::F32, DType::F16, DType::BF16])
        };
        let copied = if on_host {
            const BYTES: usize = 128 << 20;
            let (source, mut target) = (vec![1u8; BYTES], vec![0u8; BYTES]);
            (2 * BYTES) as f64 / shortest(8, || copy(&source, &mut target))
        } else {
            const VALUES: usize = 256 << 20;
            let source = Tensor::<1>::ones([VALUES], device);
            // Alone: several copies would be fused into one kernel that reads once.
            8.0 * VALUES as f64 / seconds_each(device, 1, || source.clone() * 2.0)
        };
        let supported = dtypes.iter().filter(|dtype| device.supports_dtype(**dtype));
        let products = supported.map(|&dtype| {
            let options = (device, dtype);
            let x = Tensor::<2>::random([width; 2], Distribution::Normal(0.0, 1.0), options);
            let each = seconds_each(device, 10, || kernels::matmul(x.clone(), x.clone()));
            (dtype, 2.0 * (width as f64).powi(3) / each)
        });
        Self {
            copied,
            products: products.collect(),
            width,
        }
    }
}

/// The seconds of one run of an operation, of the fastest of three series of `n` that the device is given
/// together.
pub fn seconds_each<T>(device: &Device, n: usize, mut run: impl FnMut() -> T) -> f64 {
    let mut series = || {
        // Kept: a fused operation whose result is dropped is not computed.
        let results: Vec<T> = (0..n).map(|_| run()).collect();
        device.sync().expect("the device computes");
        drop(black_box(results));
    };
    // Kernels are compiled when they are first used.
    series();
    shortest(3, series) / n as f64
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
        let width = self.width;
        write!(
            f,
            "ceilings: memory {:.1} GB/s (copy, read and written)",
            self.copied / 1e9
        )?;
        for (dtype, product) in &self.products {
            let name = format!("{dtype:?}").to_lowercase();
            write!(
                f,
                ", {name} product {:.0} GFLOP/s ({width}^3)",
                product / 1e9
            )?;
        }
        Ok(())
    }
}
