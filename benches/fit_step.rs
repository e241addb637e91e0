//! A step of `peft::fit` on a model with packed projections: by default a LLaMA of 109.5 million parameters
//! and 4 sequences of 256 random tokens, compared with the ceilings of the device.
//!
//! `cargo bench --bench fit_step -- --modes peqa-g128,dx-g128 --steps 3 --checkpoint-blocks --fast --dtype bf16`
//!
//! The modes `dx-*` train only the first norm of the model: their cost is that of the forward pass and of
//! the gradients of all activations.

#![expect(clippy::print_stdout, reason = "a program reports its results")]

use std::time::Instant;

use benches::{Ceilings, Shape, cpu_seconds, packed_bytes, with_embedding_in};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Distribution, Tensor};
use clap::Parser;
use examples::device::DeviceArg;
use examples::dtype::DtypeArg;
use examples::memory;
use models::Model;
use peft::{Batch, FitConfig, Lora, Method, Peqa};
use quant_core::{DoubleQuant, NormalFloat, Precision, Quantizer, Rtn};

/// Measure a training step of several methods
#[derive(Parser)]
struct Args {
    /// Modes to measure [default: all]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    modes: Vec<String>,
    /// Steps to measure, after one for warming up; with 0 no time is measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    steps: usize,
    /// Recompute the activations of each block in the backward pass (gradient checkpointing)
    #[arg(long)]
    checkpoint_blocks: bool,
    /// Compute products with packed weights in 16 bits
    #[arg(long)]
    fast: bool,
    /// Model to measure
    #[arg(long, value_enum, default_value_t = Shape::Small)]
    model: Shape,
    /// Sequences in a step
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 256)]
    seq_len: usize,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    dtype: DtypeArg,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

struct Mode {
    name: &'static str,
    quantizer: Box<dyn Quantizer>,
    /// Only the first norm is trained if there is none.
    method: Option<Box<dyn Method>>,
}

fn modes() -> Vec<Mode> {
    fn mode(
        name: &'static str,
        quantizer: impl Quantizer + 'static,
        method: Option<Box<dyn Method>>,
    ) -> Mode {
        let quantizer = Box::new(quantizer);
        Mode {
            name,
            quantizer,
            method,
        }
    }
    let peqa = || -> Option<Box<dyn Method>> { Some(Box::new(Peqa::new())) };
    let lora = || -> Option<Box<dyn Method>> { Some(Box::new(Lora::new(16).with_alpha(32.0))) };
    let g128 = Rtn::new().with_bits(4).with_group_size(128);
    let nf4 = NormalFloat::new().with_double_quant(DoubleQuant::dynamic());
    vec![
        mode("peqa-channel", Rtn::new().with_bits(4), peqa()),
        mode("peqa-g128", g128, peqa()),
        mode("lora-g128", g128, lora()),
        mode("qlora-nf4", nf4, lora()),
        mode("dx-g128", g128, None),
        mode("dx-nf4", nf4, None),
    ]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let modes = modes();
    for name in &args.modes {
        if !modes.iter().any(|mode| mode.name == name) {
            let known: Vec<&str> = modes.iter().map(|mode| mode.name).collect();
            return Err(
                format!("unknown mode `{name}`; the modes are {}", known.join(", ")).into(),
            );
        }
    }
    let device = args.device.open();
    if args.steps > 0 {
        println!("{}", Ceilings::measure(&device));
    }
    println!(
        "{:?}, batch {} x {}, {}, checkpoint_blocks {}, fast {}, on {}",
        args.model,
        args.batch,
        args.seq_len,
        args.dtype.name.name(),
        args.checkpoint_blocks,
        args.fast,
        args.device.name
    );
    println!(
        "| mode | tokens/s | s/step | CPU s/step | trainable | packed MiB | peak resident MiB | on the device MiB |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    for mode in modes {
        if !args.modes.is_empty() && !args.modes.iter().any(|name| name == mode.name) {
            continue;
        }
        let mut model = args.model.init(&device);
        models::quantize(&mut model, &&*mode.quantizer, &[], |_| {})?;
        let n_trainable = match &mode.method {
            Some(method) => peft::attach(&mut model, &**method)?.n_trainable,
            None => {
                let mut first = FirstNorm::default();
                model = model.map(&mut first);
                first.n_trainable
            }
        };
        if args.fast {
            peft::set_precision(&mut model, Precision::Fast);
        }
        let model = with_embedding_in(model, args.dtype.name.dtype());
        let model = model.with_compute(args.dtype.float())?;
        measure(mode.name, model, n_trainable, &args)?;
    }
    Ok(())
}

fn measure(name: &str, mut model: Model, n_trainable: usize, args: &Args) -> peft::Result<()> {
    let device = model.device();
    device.seed(0);
    let vocab = model.config().vocab_size() as f64;
    let tokens = Tensor::<2>::random(
        [args.batch, args.seq_len],
        Distribution::Uniform(0.0, vocab),
        &device,
    );
    let batch = Batch::new(tokens.int())?;
    let packed = packed_bytes(&model);
    memory::reset_peak();
    let config = FitConfig::new()
        .with_steps(Some(args.steps + 1))
        .with_checkpoint_blocks(args.checkpoint_blocks);
    let mut clock = Instant::now();
    let mut cpu = f64::NAN;
    let mut shortest = f64::INFINITY;
    peft::fit(&mut model, &[batch], &config, |step, _| {
        if step.index > 1 {
            shortest = shortest.min(clock.elapsed().as_secs_f64());
        } else {
            cpu = cpu_seconds().unwrap_or(f64::NAN);
        }
        clock = Instant::now();
    })?;
    let cpu = (cpu_seconds().unwrap_or(f64::NAN) - cpu) / args.steps as f64;
    // Pages are kept for reuse, so that what is reserved is the most that was needed.
    let on_device = device.memory_pool_usage();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "| {name} | {:.1} | {shortest:.3} | {cpu:.3} | {n_trainable} | {:.1} | {:.0} | {} |",
        (args.batch * args.seq_len) as f64 / shortest,
        mib(packed as u64),
        memory::peak_bytes().map_or(f64::NAN, mib),
        on_device.map_or("-".into(), |usage| format!(
            "{:.0}",
            mib(usage.bytes_reserved)
        ))
    );
    Ok(())
}

/// Makes the first norm trainable.
#[derive(Default)]
struct FirstNorm {
    n_trainable: usize,
}

impl ModuleMapper for FirstNorm {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if D == 1 && self.n_trainable == 0 {
            self.n_trainable = param.val().shape().num_elements();
            return param.set_require_grad(true);
        }
        param
    }
}
