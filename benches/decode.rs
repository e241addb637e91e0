//! Greedy decoding of 64 tokens after a prompt of 128, compared with the ceilings of the machine: by default
//! with a LLaMA of 109.5 million parameters and an OPT of the shape of opt-125m, whose projections have 4 bits
//! in groups of 128. The head is first the tied embedding, then packed as the projections are.
//!
//! `cargo bench --bench decode`, with the features of other devices also `-- --device cuda --dtype bf16`.

#![expect(clippy::print_stdout, reason = "a program reports its results")]

use std::ops::ControlFlow;
use std::time::Instant;

use benches::{Ceilings, Shape, cpu_seconds, packed_bytes, with_embedding_in};
use clap::Parser;
use examples::device::DeviceArg;
use examples::dtype::DtypeArg;
use examples::memory;
use models::{Generation, Model};
use quant_core::{Quantizer, Rtn};

const PROMPT: u32 = 128;
const NEW: usize = 64;

/// Measure greedy decoding
#[derive(Parser)]
struct Args {
    /// Models to measure
    #[arg(
        long = "model",
        value_enum,
        value_delimiter = ',',
        value_name = "NAME,..",
        default_value = "110m,opt"
    )]
    models: Vec<Shape>,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    dtype: DtypeArg,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let device = args.device.open();
    println!("{}", Ceilings::measure(&device));
    let rtn = Rtn::new().with_bits(4).with_group_size(128);
    let (name, dtype) = (args.dtype.name.name(), args.dtype.name.dtype());
    for shape in args.models {
        let mut model = shape.init(&device);
        models::quantize(&mut model, &rtn, &[], |_| {})?;
        let model = with_embedding_in(model, dtype);
        let mut model = model.with_compute(args.dtype.float())?;
        let config = model.config();
        let dims = [config.hidden_size(), config.vocab_size()];
        let title = format!("{shape:?}, head in {name}");
        decode(&title, &model, (dtype.size() * dims[0] * dims[1]) as u64)?;
        models::quantize_head(&mut model, &rtn)?;
        let title = format!("{shape:?}, head in 4 bits");
        decode(&title, &model, rtn.format()?.n_bytes(dims)?)?;
    }
    Ok(())
}

/// Decodes with a head of `n_bytes` and prints the throughput.
fn decode(title: &str, model: &Model, n_bytes: u64) -> Result<(), Box<dyn std::error::Error>> {
    let prompt: Vec<u32> = (0..PROMPT).map(|at| at * 241 % 32_000).collect();
    memory::reset_peak();
    // The first run warms up.
    let (mut prefill, mut decode, mut cpu) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    for _ in 0..3 {
        let start = Instant::now();
        let mut first = None;
        models::generate(model, &prompt, &Generation::new(NEW), |_| {
            first.get_or_insert_with(|| (start.elapsed().as_secs_f64(), cpu_seconds()));
            ControlFlow::Continue(())
        })?;
        let (first, cpu_before) = first.expect("a token came");
        prefill = prefill.min(first);
        decode = decode.min(start.elapsed().as_secs_f64() - first);
        if let Some((before, after)) = cpu_before.zip(cpu_seconds()) {
            cpu = cpu.min(after - before);
        }
    }
    let peak = memory::peak_bytes().map_or(String::new(), |peak| {
        format!(
            "; peak resident {:.0} MiB",
            peak as f64 / f64::from(1 << 20)
        )
    });
    let per_token = decode / (NEW - 1) as f64;
    let (projections, head_bytes) = (packed_bytes(model) as f64, n_bytes as f64);
    println!(
        "{title}: prompt of {PROMPT} {:.1} tokens/s, {prefill:.3} s; decoding {NEW} {:.1} tokens/s, {:.2} ms each, {:.2} ms of CPU; weights read at {:.1} GB/s ({:.1} MB of projections, {:.1} MB of the head){peak}",
        f64::from(PROMPT) / prefill,
        1.0 / per_token,
        1e3 * per_token,
        1e3 * cpu / (NEW - 1) as f64,
        (projections + head_bytes) / per_token / 1e9,
        projections / 1e6,
        head_bytes / 1e6
    );
    Ok(())
}
