//! Quantizes a LLaMA with several quantizers, bit widths and group sizes, and compares perplexities;
//! or with one of each, shows what every layer cost, and saves the model for other programs.
//!
//! `cargo run --release --example quantize` does the first with the model that the project ships;
//! `-- --help` lists what it does with yours.

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use evaluate::perplexity;
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::embedded::EmbeddedArg;
use examples::tuning::{Result, exit};
use indicatif::{ProgressBar, ProgressStyle};
use models::{CheckpointFormat, GptqVersion};
use peft::Batch;
use quant_core::{DoubleQuant, GroupRange, NormalFloat, Optq, Order, Quantizer, Rtn};

/// Quantize a LLaMA and measure what it costs
///
/// Without options, the model that comes with the program is quantized by every method, at 4, 3 and
/// 2 bits, in groups of several sizes.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Example:
  quantize --model Llama-2-7b-hf --calibration c4.txt --eval wikitext.txt --seq-len 2048 \\
           --quantizer optq --bits 4 --group-size 128 --out Llama-2-7b-4bit --format gptq-v2"
)]
struct Args {
    /// Hugging Face directory of a model [default: one that comes with the program]
    #[arg(long, value_name = "DIR", requires = "calibration", requires = "eval")]
    model: Option<PathBuf>,
    /// Text to calibrate on
    #[arg(long, value_name = "FILE", requires = "model")]
    calibration: Option<PathBuf>,
    /// Text to evaluate on, another one
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Quantizers, one or several
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',',
          default_values_t = [Name::Rtn, Name::Clip, Name::Nf, Name::Optq, Name::OptqAct])]
    quantizer: Vec<Name>,
    /// Bits of a weight, one or several: 2, 3, 4, 8
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [4, 3, 2])]
    bits: Vec<usize>,
    /// Weights that share a scale, one or several: numbers, or `channel`
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = group_size,
          default_values = ["channel", "32", "128"])]
    group_size: Vec<GroupSize>,
    /// Use symmetric grids, without zero-points
    #[arg(long)]
    symmetric: bool,
    /// Quantize the scales of normal floats too, as QLoRA does
    #[arg(long)]
    double_quant: bool,
    /// Windows to calibrate on
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Tokens in a window
    #[arg(long, value_name = "N", default_value = "128", value_parser = seq_len)]
    seq_len: usize,
    /// Seed of the choice of windows to calibrate on
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for the model; for one quantizer, width and group size
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What the model is saved as
    #[arg(long, value_enum, default_value_t = Target::QuantCore)]
    format: Target,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

#[derive(Clone, Copy, Debug)]
struct GroupSize(Option<usize>);

fn group_size(value: &str) -> std::result::Result<GroupSize, String> {
    match value {
        "channel" | "-1" => Ok(GroupSize(None)),
        _ => match value.parse() {
            Ok(n) if n > 0 => Ok(GroupSize(Some(n))),
            _ => Err("a positive number, or `channel` for one scale per output".into()),
        },
    }
}

fn seq_len(value: &str) -> std::result::Result<usize, String> {
    match value.parse() {
        Ok(n) if n > 1 => Ok(n),
        _ => Err("a number of at least 2".into()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Round to nearest on full ranges
    Rtn,
    /// Round to nearest on ranges searched for
    Clip,
    /// Normal float (NF4 and its relatives)
    Nf,
    /// bitsandbytes' FP4
    Fp4,
    /// OPTQ, published as GPTQ
    Optq,
    /// OPTQ, inputs in descending order, static groups
    OptqAct,
    /// OPTQ, groups in descending order
    OptqGroups,
    /// OPTQ on ranges searched for
    OptqClip,
    /// GPTAQ: OPTQ that makes up for drifting inputs
    Gptaq,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Target {
    /// The workspace's exact format
    QuantCore,
    /// GPTQ, zero-points stored less one
    Gptq,
    /// GPTQ, zero-points stored as they are
    GptqV2,
    /// bitsandbytes, normal floats and FP4 alone
    Bitsandbytes,
}

impl Target {
    fn format(self) -> CheckpointFormat {
        match self {
            Target::QuantCore => CheckpointFormat::QuantCore,
            Target::Gptq => CheckpointFormat::Gptq(GptqVersion::V1),
            Target::GptqV2 => CheckpointFormat::Gptq(GptqVersion::V2),
            Target::Bitsandbytes => CheckpointFormat::Bitsandbytes,
        }
    }
}

impl Name {
    fn title(self) -> &'static str {
        match self {
            Name::Rtn => "RTN",
            Name::Clip => "RTN, clip search",
            Name::Nf => "NF",
            Name::Fp4 => "FP4",
            Name::Optq => "OPTQ",
            Name::OptqAct => "OPTQ, act-order static",
            Name::OptqGroups => "OPTQ, act-order by group",
            Name::OptqClip => "OPTQ, clip search",
            Name::Gptaq => "GPTAQ",
        }
    }

    fn quantizer(
        self,
        bits: usize,
        GroupSize(group_size): GroupSize,
        args: &Args,
    ) -> Box<dyn Quantizer> {
        let (symmetric, double) = (args.symmetric, args.double_quant.then(DoubleQuant::dynamic));
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
        // What the checkpoint can hold.
        let f16 = matches!(args.format, Target::Gptq | Target::GptqV2);
        let rtn = rtn.with_symmetric(symmetric).with_f16_scales(f16);
        let nf = NormalFloat::new().with_bits(bits);
        let optq = Optq::new().with_bits(bits).with_group_size(group_size);
        let optq = optq.with_symmetric(symmetric).with_f16_scales(f16);
        match self {
            Name::Rtn => Box::new(rtn),
            Name::Clip => Box::new(rtn.with_range(GroupRange::Clipped)),
            Name::Nf => Box::new(nf.with_block_size(group_size).with_double_quant(double)),
            Name::Fp4 => {
                let fp4 = NormalFloat::float4().with_bits(bits);
                Box::new(fp4.with_block_size(group_size).with_double_quant(double))
            }
            Name::Optq => Box::new(optq),
            Name::OptqAct => Box::new(optq.with_order(Order::Descending)),
            Name::OptqGroups => Box::new(optq.with_order(Order::DescendingByGroup)),
            Name::OptqClip => Box::new(optq.with_range(GroupRange::Clipped)),
            Name::Gptaq => Box::new(optq.with_drift(0.25)),
        }
    }
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let single = match (&args.quantizer[..], &args.bits[..], &args.group_size[..]) {
        (&[name], &[bits], &[group_size]) => Some(name.quantizer(bits, group_size, args)),
        _ if args.out.is_some() => {
            return Err("--out takes one quantizer, one width and one group size".into());
        }
        _ => None,
    };
    if let Some(out) = &args.out {
        tensor_files::check_output(out)?;
    }
    let device = args.device.open();
    // Dropped, and so removed, at the end.
    let scratch = tempfile::tempdir()?;
    let source = args.embedded.or(args.model.as_ref(), scratch.path())?;
    match single {
        Some(method) => one(args, &*method, &source, &device),
        None => table(args, &source, &device),
    }
}

/// What to calibrate on, and what to evaluate on.
fn texts(args: &Args, source: &Path, device: &Device) -> Result<(Vec<Batch>, Vec<Batch>)> {
    let read = |path: &PathBuf| match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => Err(format!("cannot read `{}`: {error}", path.display())),
    };
    let (calibration, eval) = match (&args.calibration, &args.eval) {
        (Some(calibration), Some(eval)) => (read(calibration)?, read(eval)?),
        _ => (
            corpus::text(Dialect::Plain, 200_000, 20),
            corpus::text(Dialect::Plain, 50_000, 12),
        ),
    };
    let lm = models::load(source, device)?;
    let windows = |text: &str, option: &str| -> Result<models::Windows> {
        let windows = lm.windows(text, args.seq_len);
        windows.map_err(|error| format!("the {option} text: {error}").into())
    };
    let batch = (1024 / args.seq_len).max(1);
    let calibration = windows(&calibration, "--calibration")?;
    let calibration = calibration.shuffled(args.seed).take(args.samples);
    let eval = windows(&eval, "--eval")?;
    Ok((
        calibration.batches(batch, device),
        eval.batches(batch, device),
    ))
}

/// One method: every layer, and the model saved.
fn one(args: &Args, method: &dyn Quantizer, source: &Path, device: &Device) -> Result<()> {
    let plan = models::plan(source, &method)?;
    println!("{plan}\n");
    let (calibration, eval) = texts(args, source, device)?;
    let mut lm = models::load(source, device)?;
    let before = perplexity(&lm.model, &eval)?.value();
    models::quantize(&mut lm.model, &method, &calibration, |layer| {
        print!("{}: {}", layer.path, layer.error);
        for note in &layer.notes {
            print!("; {note}");
        }
        println!("; {:.2} s", layer.seconds);
    })?;
    let after = perplexity(&lm.model, &eval)?.value();
    println!("\nperplexity {before:.4} before, {after:.4} after");
    if let Some(out) = &args.out {
        models::save_as(&lm, out, args.format.format())?;
        println!("saved to {}", out.display());
    }
    Ok(())
}

/// Every method at every width and group size.
fn table(args: &Args, source: &Path, device: &Device) -> Result<()> {
    let (calibration, eval) = texts(args, source, device)?;
    let full = perplexity(&models::load(source, device)?.model, &eval)?;
    let n_cells = args.quantizer.len() * args.bits.len() * args.group_size.len();
    let bar = ProgressBar::new(n_cells as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len}, {eta} left, {msg}",
    )?);
    let clock = Instant::now();
    let mut rows = Vec::new();
    for &bits in &args.bits {
        for &name in &args.quantizer {
            let mut row = format!("| {bits} | {} ", name.title());
            for &group_size in &args.group_size {
                bar.set_message(format!("{bits} bits, {}", name.title()));
                let method = name.quantizer(bits, group_size, args);
                let cell = match models::plan(source, &method) {
                    Ok(_) => {
                        let mut lm = models::load(source, device)?;
                        models::quantize(&mut lm.model, &method, &calibration, |_| {})?;
                        format!("{:.4}", perplexity(&lm.model, &eval)?.value())
                    }
                    // A width that the grid lacks, a group that does not fit.
                    Err(models::Error::Checkpoint(models::CheckpointError::Plan { .. })) => {
                        "–".into()
                    }
                    Err(error) => return Err(error.into()),
                };
                row += &format!("| {cell} ");
                bar.inc(1);
            }
            rows.push(row + "|");
        }
    }
    bar.finish_and_clear();
    let groups = args.group_size.iter().map(|GroupSize(size)| match size {
        Some(size) => format!("| group {size} "),
        None => "| per channel ".into(),
    });
    println!("| bits | quantizer {}|", groups.collect::<String>());
    println!("|---|---|{}", "---:|".repeat(args.group_size.len()));
    println!("{}", rows.join("\n"));
    println!(
        "\nperplexity over {} windows of {} tokens; {:.4} in full precision; calibrated on {} windows; {:.0} s",
        full.n_windows,
        full.seq_len,
        full.value(),
        calibration
            .iter()
            .map(|batch| batch.tokens().dims()[0])
            .sum::<usize>(),
        clock.elapsed().as_secs_f64(),
    );
    Ok(())
}
