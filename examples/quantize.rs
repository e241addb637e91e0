//! Quantizes a model with several quantizers, widths and group sizes, and compares perplexities; or with
//! one of each, reports the error of each layer, and saves the model in a format of your choice.
//!
//! `cargo run --release --example quantize` does the first with the embedded model; `-- --help` lists the
//! options for other models.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use evaluate::perplexity;
use examples::arguments::{GroupSize, ModelArgs, SeqLenArg, at_least};
use examples::corpus::{self, Dialect};
use examples::outcome::{Result, exit, save_as};
use examples::texts::{self, evaluation_batch, n_windows};
use examples::{interrupt, print, println, progress};
use models::{CheckpointFormat, GptqVersion};
use peft::Batch;
use quant_core::{DoubleQuant, GroupRange, NormalFloat, Optq, Order, Quantizer, Rtn};
use tensor_files::Output;

/// Quantize a LLaMA or an OPT and measure the loss of perplexity
///
/// Without options, the embedded model is quantized with several quantizers at 4, 3 and 2 bits, in groups
/// of several sizes.
#[derive(Parser)]
#[command(
    version,
    mut_arg("model", |arg| arg.requires("calibration").requires("eval")),
    after_help = "\
Example:
  quantize --model Llama-2-7b-hf --calibration c4.txt --eval wikitext.txt --seq-len 2048 \\
           --quantizer optq --bits 4 --group-size 128 --out Llama-2-7b-4bit --format gptq-v2"
)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to calibrate on
    #[arg(long, value_name = "FILE", requires = "model")]
    calibration: Option<PathBuf>,
    /// Text to evaluate on
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Quantizers, one or several
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',',
          default_values_t = [Name::Rtn, Name::Clip, Name::Nf, Name::OptqNatural, Name::Optq])]
    quantizer: Vec<Name>,
    /// Bits of a weight, one or several: 2, 3, 4, 8
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [4, 3, 2])]
    bits: Vec<usize>,
    /// Weights that share a scale, one or several: numbers, or `channel` for all weights of an output
    #[arg(long, value_name = "N,..", value_delimiter = ',',
          default_values = ["channel", "32", "128"])]
    group_size: Vec<GroupSize>,
    /// Quantize to symmetric grids, without zero-points
    #[arg(long)]
    symmetric: bool,
    /// Quantize the scales of normal floats too (QLoRA's double quantization)
    #[arg(long)]
    double_quant: bool,
    /// Windows to calibrate on
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least::<1>)]
    samples: usize,
    #[command(flatten)]
    cut: SeqLenArg,
    /// Seed of the choice of the calibration windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for the model; for one quantizer, width and group size
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Format of the saved model
    #[arg(long, value_enum, default_value_t = Target::QuantCore)]
    format: Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Round to nearest, over the range of each group
    Rtn,
    /// Round to nearest, over the range of least squared error
    Clip,
    /// Normal floats (NF4, NF3, NF2)
    Nf,
    /// FP4 of bitsandbytes
    Fp4,
    /// OPTQ (GPTQ) with static act-order: inputs in descending order, groups as they are
    Optq,
    /// OPTQ, inputs in their natural order
    OptqNatural,
    /// OPTQ, whole groups in descending order
    OptqGroups,
    /// OPTQ in natural order, over ranges of least squared error
    OptqClip,
    /// GPTAQ: OPTQ in natural order that corrects for the drift of the inputs
    Gptaq,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Target {
    /// Format of this workspace, which holds every model exactly
    QuantCore,
    /// GPTQ v1, whose zero-points are stored less one
    Gptq,
    /// GPTQ v2
    GptqV2,
    /// bitsandbytes, for NF4 and FP4
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
            Name::Optq => "OPTQ, act-order static",
            Name::OptqNatural => "OPTQ, natural order",
            Name::OptqGroups => "OPTQ, act-order by group",
            Name::OptqClip => "OPTQ, natural order, clip search",
            Name::Gptaq => "GPTAQ, natural order",
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
        // GPTQ checkpoints hold scales in f16.
        let f16 = matches!(args.format, Target::Gptq | Target::GptqV2);
        let rtn = rtn.with_symmetric(symmetric).with_f16_scales(f16);
        let nf = NormalFloat::new().with_bits(bits);
        let optq = Optq::new().with_bits(bits).with_group_size(group_size);
        let optq = optq.with_symmetric(symmetric).with_f16_scales(f16);
        let natural = optq.with_order(Order::Natural);
        match self {
            Name::Rtn => Box::new(rtn),
            Name::Clip => Box::new(rtn.with_range(GroupRange::Clipped)),
            Name::Nf => Box::new(nf.with_block_size(group_size).with_double_quant(double)),
            Name::Fp4 => {
                let fp4 = NormalFloat::float4().with_bits(bits);
                Box::new(fp4.with_block_size(group_size).with_double_quant(double))
            }
            Name::Optq => Box::new(optq.with_order(Order::Descending)),
            Name::OptqNatural => Box::new(natural),
            Name::OptqGroups => Box::new(optq.with_order(Order::DescendingByGroup)),
            Name::OptqClip => Box::new(natural.with_range(GroupRange::Clipped)),
            Name::Gptaq => Box::new(natural.with_drift(0.25)),
        }
    }
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let single = match (&args.quantizer[..], &args.bits[..], &args.group_size[..]) {
        (&[name], &[bits], &[group_size]) => Some(name.quantizer(bits, group_size, args)),
        _ if args.out.is_some() => {
            return Err("--out takes one quantizer, one width and one group size".into());
        }
        _ => None,
    };
    let output = args.out.as_deref().map(interrupt::reserve).transpose()?;
    let device = args.model.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.model.dir(scratch.path())?;
    match single {
        Some(method) => one(args, &*method, output, &source, &device),
        None => table(args, &source, &device),
    }
}

/// Returns the calibration and the evaluation batches.
fn batches(args: &Args, source: &Path, device: &Device) -> Result<(Vec<Batch>, Vec<Batch>)> {
    let (calibration, eval) = match (&args.calibration, &args.eval) {
        (Some(calibration), Some(eval)) => (texts::read(calibration)?, texts::read(eval)?),
        _ => (
            corpus::text(Dialect::Plain, 200_000, 20),
            corpus::text(Dialect::Plain, 50_000, 12),
        ),
    };
    let lm = models::load(source, device)?;
    let seq_len = args.cut.seq_len;
    let windows = |text: &str, option| texts::windows(&lm, text, seq_len, option);
    let calibration = windows(&calibration, "--calibration")?;
    let calibration = calibration.shuffled(args.seed).take(args.samples);
    let eval = windows(&eval, "--eval")?;
    let size = evaluation_batch(seq_len);
    Ok((
        calibration.batches(size, device),
        eval.batches(size, device),
    ))
}

/// Quantizes with one quantizer, reports each layer and saves the model.
fn one(
    args: &Args,
    method: &dyn Quantizer,
    output: Option<Output>,
    source: &Path,
    device: &Device,
) -> Result<()> {
    let plan = models::plan(source, &method)?;
    println!("{plan}\n");
    if let Some(output) = &output {
        plan.check(args.format.format())?;
        output.require(plan.n_bytes())?;
    }
    let (calibration, eval) = batches(args, source, device)?;
    let mut lm = models::load(source, device)?;
    // Quantized, it is another model.
    lm.certificate = None;
    let before = perplexity(&lm.model, &eval)?.value();
    models::quantize(&mut lm.model, &method, &calibration, |layer| {
        print!("{}: {}", layer.path, layer.error);
        for note in &layer.notes {
            print!("; {note}");
        }
        println!("; {:.2} s", layer.seconds);
    })?;
    let mut refusal = None;
    if let Some(output) = output {
        let (dir, refused) = save_as(&lm, output, args.format.format())?;
        println!("\nsaved to {}", dir.display());
        refusal = refused;
    }
    let after = perplexity(&lm.model, &eval)?.value();
    println!("\nperplexity {before:.4} before, {after:.4} after");
    refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
}

/// Compares the quantizers at every width and group size.
fn table(args: &Args, source: &Path, device: &Device) -> Result<()> {
    let (calibration, eval) = batches(args, source, device)?;
    let full = perplexity(&models::load(source, device)?.model, &eval)?;
    let n_cells = args.quantizer.len() * args.bits.len() * args.group_size.len();
    let bar = progress::bar(n_cells, "models")?;
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
                    // The quantizer does not have this width, or a layer this group size.
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
    let groups = args.group_size.iter().map(|size| match size.0 {
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
        n_windows(&calibration),
        clock.elapsed().as_secs_f64(),
    );
    Ok(())
}
