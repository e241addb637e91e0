//! Quantizes a model with several quantizers, widths and group sizes, and compares perplexities; or with
//! one of each, reports the error of each layer, and saves the model in a format of your choice; or chooses
//! the width of each layer under a budget.
//!
//! `cargo run --release --example quantize` does the first with the embedded model; `-- --help` lists the
//! options for other models.

mod methods;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::Parser;
use evaluate::perplexity;
use examples::arguments::{BitsArg, EvalWindowsArg, GroupSize, ModelArgs, SeqLenArg, at_least};
use examples::corpus::{self, Dialect};
use examples::format::FormatName;
use examples::outcome::{Result, exit, save_as};
use examples::progress::Bar;
use examples::texts::{self, evaluation_batch, n_windows};
use examples::{interrupt, memory, println, stream, table};
use models::{AllocationStep, Model, Plan, Streaming, Windows, quantize_within};
use peft::{Batch, PerLayer};
use quant_core::Quantizer;
use tensor_files::Output;

use methods::{Method, Name};

/// Quantize a model and measure the loss of perplexity
///
/// Without options, the embedded model is quantized with several quantizers at 4, 3 and 2 bits, in groups
/// of several sizes.
#[derive(Parser)]
#[command(
    version,
    mut_arg("bits", |arg| arg.help(
        "Bits of a weight, one or several: 2, 3, 4, 8 [default: 4 3 2; with --bits-per-weight, all]"
    )),
    after_help = "\
Examples:
  quantize --model Llama-2-7b-hf --calibration c4.txt --eval wikitext.txt --seq-len 2048 \\
           --quantizer optq --bits 4 --group-size 128 --out Llama-2-7b-4bit --format gptq-v2
  quantize --model Llama-2-7b-hf --calibration c4.txt --seq-len 2048 --quantizer optq \\
           --bits-per-weight 3.2 --group-size 128 --out Llama-2-7b-3.2bit"
)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to calibrate on, which some quantizers do without [default: with --model, none; errors of
    /// outputs are then not reported]
    #[arg(long, value_name = "FILE", requires = "model")]
    calibration: Option<PathBuf>,
    /// Text to evaluate on, after the model is saved [default: with --model, no evaluation]
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Quantizers, one or several
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',', num_args = 1..,
          default_values_t = [Name::Rtn, Name::Clip, Name::Nf, Name::OptqNatural, Name::Optq])]
    quantizer: Vec<Name>,
    #[command(flatten)]
    bits: BitsArg,
    /// Choose one of --bits for each layer, so that the loss rises least and a weight takes so many bits on
    /// average, with scales and zeros in f32; for one quantizer and group size
    #[arg(long, value_name = "X")]
    bits_per_weight: Option<f64>,
    /// Weights that share a scale, one or several: numbers, or `channel` for all weights of an output
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1..,
          default_values = ["channel", "32", "128"])]
    group_size: Vec<GroupSize>,
    /// Quantize to symmetric grids, without zero-points
    #[arg(long)]
    symmetric: bool,
    /// Zero-points that are fractions of a code, as in GGUF, which --format gguf implies
    #[arg(long, conflicts_with = "symmetric")]
    fractional_zeros: bool,
    /// Quantize the scales of normal floats too (QLoRA's double quantization)
    #[arg(long)]
    double_quant: bool,
    /// Windows to calibrate on
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least::<1>)]
    samples: usize,
    #[command(flatten)]
    cut: SeqLenArg,
    #[command(flatten)]
    eval_windows: EvalWindowsArg,
    /// Passes of block-ap over the calibration for each block [default: 2]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Learning rates of block-ap: of scales and zero-points, and of weights [default: by the hidden size]
    #[arg(long, value_name = "X", num_args = 2)]
    lr: Vec<f64>,
    /// Seed of the choice of the calibration windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for the model; for one quantizer and group size, and one width or --bits-per-weight.
    /// With one width, one block is in memory at a time
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on after the last whole block of the same command, if it was stopped
    #[arg(long, requires = "out", conflicts_with = "bits_per_weight")]
    resume: bool,
    /// Format of the saved model
    #[arg(long, value_enum, default_value_t = FormatName::QuantCore)]
    format: FormatName,
}

/// What is done with a model.
enum Job {
    /// It is quantized in one way.
    One(Method),
    /// Each layer is quantized with one of several, by bytes for all projections.
    Within(Vec<Box<dyn Quantizer>>, u64),
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    if args.quantizer.contains(&Name::BlockAp) && args.format.fractional_zeros() {
        return Err(
            "block-ap learns whole zero-points, and GGUF holds others; use another --format".into(),
        );
    }
    let is_set = args.rounds.is_some() || !args.lr.is_empty();
    if is_set && !args.quantizer.contains(&Name::BlockAp) {
        return Err("--rounds and --lr are for --quantizer block-ap".into());
    }
    if ![0, 2].contains(&args.lr.len()) {
        return Err("--lr takes two rates, once".into());
    }
    let device = args.model.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.model.dir(scratch.path())?;
    match (job(args, &source)?, &args.out) {
        (Some((Job::One(method), _)), Some(out)) if args.format != FormatName::Gguf => {
            quantize_to(args, &method, out, &source, &device)?;
        }
        (Some(_), _) if args.resume => {
            return Err("--resume is for formats that are written block by block, not GGUF".into());
        }
        (Some((job, n_bytes)), out) => {
            let output = out.as_deref().map(interrupt::reserve).transpose()?;
            if let Some(output) = &output {
                output.require(n_bytes)?;
            }
            quantize(args, &job, output, &source, &device)?;
        }
        (None, _) => compare(args, &source, &device)?,
    }
    println!("peak memory: {}", memory::peak());
    Ok(())
}

/// Returns what is done with one model, and the bytes that it takes at most; none if several are compared.
fn job(args: &Args, source: &Path) -> Result<Option<(Job, u64)>> {
    match (
        &args.quantizer[..],
        &args.group_size[..],
        &args.bits.or(&[4, 3, 2])[..],
    ) {
        (&[name], &[group_size], _) if args.bits_per_weight.is_some() => {
            within(args, name, group_size, source).map(Some)
        }
        (&[name], &[group_size], &[bits]) => {
            let plan = checked_plan(args, &name.quantizer(bits, group_size, args), source)?;
            if name.needs_calibration() {
                args.require_calibration("this quantizer")?;
            }
            println!("{plan}\n");
            let method = name.method(bits, group_size, args, &plan.config);
            Ok(Some((Job::One(method), plan.n_bytes())))
        }
        _ if args.bits_per_weight.is_some() => {
            Err("--bits-per-weight takes one --quantizer and one --group-size".into())
        }
        _ if args.out.is_some() => Err(
            "--out takes one --quantizer and --group-size, and one of --bits or --bits-per-weight"
                .into(),
        ),
        _ if args.model.model.is_some() && args.eval.is_none() => {
            Err("several models are compared on a text: add --eval".into())
        }
        (names, ..) if names.iter().any(|name| name.needs_calibration()) => {
            args.require_calibration("one of the quantizers")?;
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Plans a quantization, and checks that the files can hold what comes of it.
fn checked_plan(args: &Args, recipe: &impl peft::Recipe, source: &Path) -> Result<Plan> {
    let plan = models::plan(source, recipe)?;
    if args.out.is_some() {
        plan.check(args.format.format())?;
    }
    Ok(plan)
}

/// Checks the widths and the budget of `--bits-per-weight`.
fn within(args: &Args, name: Name, group_size: GroupSize, source: &Path) -> Result<(Job, u64)> {
    args.require_calibration("--bits-per-weight")?;
    if name == Name::BlockAp {
        return Err(
            "--bits-per-weight is for quantizers that pack each layer by itself, not block-ap"
                .into(),
        );
    }
    let average = args.bits_per_weight.unwrap_or_default();
    let mut bits = args.bits.or(&[2, 3, 4, 8]);
    bits.reverse();
    let quantizer = |bits| name.quantizer(bits, group_size, args);
    let plans = bits
        .iter()
        .map(|&bits| checked_plan(args, &quantizer(bits), source));
    let plans: Vec<Plan> = plans.collect::<Result<_>>()?;
    let weights = plans[0]
        .layers
        .iter()
        .map(|layer| layer.dims[0] * layer.dims[1]);
    let n_weights = weights.sum::<usize>() as f64;
    let budget = (average * n_weights / 8.0) as u64;
    let least = plans.iter().map(Plan::n_bytes).min().unwrap_or(0);
    if budget < least {
        let least = 8.0 * least as f64 / n_weights;
        return Err(format!(
            "--bits-per-weight {average}: {} bits {} take {least:.3} with scales and zeros; raise it, or take larger groups (--group-size)",
            bits[0],
            groups(group_size),
        )
        .into());
    }
    let quantizers = bits.into_iter().map(quantizer).collect();
    Ok((Job::Within(quantizers, budget), budget))
}

fn groups(GroupSize(size): GroupSize) -> String {
    match size {
        Some(size) => format!("in groups of {size}"),
        None => "per channel".into(),
    }
}

/// Returns the windows to calibrate and, if there is a text for it, to evaluate on. Reads no weights.
fn windows(args: &Args, source: &Path) -> Result<(Option<Windows>, Option<Windows>)> {
    let (calibration, eval) = match &args.model.model {
        Some(_) => {
            let read = |path: &Option<PathBuf>| path.as_deref().map(texts::read).transpose();
            (read(&args.calibration)?, read(&args.eval)?)
        }
        None => (
            Some(corpus::text(Dialect::Plain, 200_000, 20)),
            Some(corpus::text(Dialect::Plain, 50_000, 12)),
        ),
    };
    let stored = models::plan(source, &PerLayer::default())?;
    let cut = |text: String, option: &str| {
        texts::planned_windows(&stored, &text, args.cut.seq_len, option)
    };
    let eval = eval.map(|text| cut(text, "--eval")).transpose()?;
    let calibration = calibration.map(|text| cut(text, "--calibration"));
    let calibration = calibration.transpose()?;
    Ok((
        calibration.map(|windows| windows.shuffled(args.seed).take(args.samples)),
        eval.map(|eval| eval.take(args.eval_windows.limit())),
    ))
}

fn batches(windows: Option<Windows>, size: usize, device: &Device) -> Vec<Batch> {
    windows.map_or(Vec::new(), |windows| windows.batches(size, device))
}

impl Args {
    /// Refuses a model without a calibration.
    fn require_calibration(&self, what: &str) -> Result<()> {
        match (&self.model.model, &self.calibration) {
            (Some(_), None) => {
                Err(format!("{what} learns from the inputs of layers: add --calibration").into())
            }
            _ => Ok(()),
        }
    }
}

/// Quantizes from files to files, and evaluates.
fn quantize_to(
    args: &Args,
    method: &Method,
    out: &Path,
    source: &Path,
    device: &Device,
) -> Result<()> {
    let (calibration, eval) = windows(args, source)?;
    let size = method.batch(args.cut.seq_len);
    let calibration = batches(calibration, size, device);
    let plan = models::plan(source, &method.quantizer)?;
    let n_tokens = n_windows(&calibration) * args.cut.seq_len;
    let batch_tokens = n_tokens.min(size * args.cut.seq_len);
    if let Some(peak) = method.memory(&plan, n_tokens, batch_tokens) {
        println!("about {} MiB in memory at the peak\n", peak >> 20);
    }
    let settings = Streaming::new(device)
        .with_format(args.format.format())
        .with_compute(args.model.dtype.float())
        .with_resume(args.resume);
    stream::through_blocks("quantizing", &plan, |on_step| {
        method.quantize_to(source, out, &calibration, &settings, on_step)
    })?;
    println!("\nsaved to {}", out.display());
    if let Some(eval) = eval {
        let quantized = models::load_as(out, device, args.model.dtype.float())?.model;
        compare_with_source(args, quantized, eval, source, device)?;
    }
    Ok(())
}

/// Quantizes, saves, and evaluates.
fn quantize(
    args: &Args,
    job: &Job,
    output: Option<Output>,
    source: &Path,
    device: &Device,
) -> Result<()> {
    let (calibration, eval) = windows(args, source)?;
    let size = match job {
        Job::One(method) => method.batch(args.cut.seq_len),
        Job::Within(..) => evaluation_batch(args.cut.seq_len),
    };
    let calibration = batches(calibration, size, device);
    let mut lm = models::load_as(source, device, args.model.dtype.float())?;
    // Quantized, it is another model.
    lm.certificate = None;
    match job {
        Job::One(method) => {
            let n_layers = peft::Linears::linears(&lm.model).len();
            let bar = Bar::new("quantizing", n_layers, "layers")?;
            method.quantize(&mut lm.model, &calibration, |path, line| {
                println!("{line}");
                bar.step(path);
            })?;
        }
        Job::Within(quantizers, budget) => {
            allocate(&mut lm.model, quantizers, &calibration, *budget)?;
        }
    }
    let mut refusal = None;
    if let Some(output) = output {
        let (dir, refused) = save_as(&lm, output, args.format.format())?;
        println!("\nsaved to {}", dir.display());
        refusal = refused;
    }
    if let Some(eval) = eval {
        compare_with_source(args, lm.model, eval, source, device)?;
    }
    refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
}

/// Prints the perplexity of a quantized model and that of its source. One of them is in memory at a time.
fn compare_with_source(
    args: &Args,
    quantized: Model,
    eval: Windows,
    source: &Path,
    device: &Device,
) -> Result<()> {
    let eval = eval.batches(evaluation_batch(args.cut.seq_len), device);
    let after = texts::perplexity("evaluating, quantized", &quantized, &eval)?;
    drop(quantized);
    let dense = models::load_as(source, device, args.model.dtype.float())?.model;
    let before = texts::perplexity("evaluating, dense", &dense, &eval)?;
    println!("\nperplexity {before:.4} before, {after:.4} after");
    Ok(())
}

/// Chooses the quantizer of each layer, and reports the choice beside the uniform one.
fn allocate(
    model: &mut Model,
    quantizers: &[Box<dyn Quantizer>],
    calibration: &[Batch],
    budget: u64,
) -> Result<()> {
    let linears = peft::Linears::linears(model);
    let n_layers = linears.len();
    let dims = linears.iter().map(|(_, linear)| linear.weight().dims());
    let n_weights: usize = dims.map(|[d_in, d_out]| d_in * d_out).sum();
    let names = [
        "gradients",
        "predicting",
        "quantizing",
        "quantizing uniformly",
    ];
    let lengths = [n_windows(calibration), n_layers, n_layers, n_layers];
    let mut bars = names.into_iter().zip(lengths);
    let mut next = || bars.next().expect("a bar for each kind of step");
    let (name, length) = next();
    let mut bar = Bar::new(name, length, "windows")?;
    let quantizers: Vec<&dyn Quantizer> = quantizers.iter().map(Box::as_ref).collect();
    let mut failed = None;
    let done = quantize_within(model, &quantizers, calibration, budget, |step| {
        if bar.is_full() {
            let (name, length) = next();
            match Bar::new(name, length, "layers") {
                Ok(new) => bar = new,
                Err(error) => failed = Some(error),
            }
        }
        bar.step(match step {
            AllocationStep::Predicted { path } => path,
            AllocationStep::Quantized(layer) => &layer.path,
            _ => "",
        });
    })?;
    drop(bar);
    if let Some(error) = failed {
        return Err(error);
    }

    let mut rows = vec![["layer", "bits", "bytes", "error of the output"].map(String::from)];
    for layer in &done.layers {
        let bits = layer
            .format
            .map_or("-".into(), |format| format.bits().to_string());
        let error = table::number(layer.error.output, 4);
        rows.push([layer.path.clone(), bits, layer.n_bytes.to_string(), error]);
    }
    println!("{}", table::markdown(&rows));
    let title = ["", "bits per weight", "predicted loss", "measured loss"];
    let mut rows = vec![title.map(String::from)];
    let dense = format!("{:.4}", done.dense);
    rows.push(["dense".into(), "-".into(), "-".into(), dense]);
    let uniform = done.uniform.as_ref().map(|uniform| {
        let format = quantizers[uniform.choice[0]].format();
        Ok::<_, quant_core::Error>((format!("all {}", format?), uniform))
    });
    let allocated = ("by the loss".into(), &done.allocated);
    for (name, assignment) in [Some(allocated), uniform.transpose()?]
        .into_iter()
        .flatten()
    {
        rows.push([
            name,
            format!("{:.3}", 8.0 * assignment.n_bytes as f64 / n_weights as f64),
            format!("{:.4}", assignment.predicted),
            format!("{:.4}", assignment.measured),
        ]);
    }
    println!("{}", table::markdown(&rows));
    let kept = if done.is_uniform() {
        "the same format for all layers"
    } else {
        "formats by layer"
    };
    println!("losses in nats on the calibration; kept: {kept}");
    Ok(())
}

/// Compares the quantizers at every width and group size.
fn compare(args: &Args, source: &Path, device: &Device) -> Result<()> {
    let (calibration, eval) = windows(args, source)?;
    let of = |method: &Method| {
        let size = method.batch(args.cut.seq_len);
        batches(calibration.clone(), size, device)
    };
    let mut n_calibrated = 0;
    let size = evaluation_batch(args.cut.seq_len);
    let eval = eval.expect("checked to be given").batches(size, device);
    let widths = args.bits.or(&[4, 3, 2]);
    // A width that a quantizer does not have is a gap in the table; a table of gaps is refused.
    let cells = widths.iter().flat_map(|&bits| {
        let sized = args.group_size.iter().map(move |&size| (bits, size));
        sized.flat_map(|(bits, size)| args.quantizer.iter().map(move |name| (name, bits, size)))
    });
    let mut plans =
        cells.map(|(name, bits, size)| models::plan(source, &name.quantizer(bits, size, args)));
    if let Some(Err(error)) = plans.next().filter(|plan| plan.is_err())
        && plans.all(|plan| plan.is_err())
    {
        return Err(error.into());
    }
    let full = perplexity(
        &models::load_as(source, device, args.model.dtype.float())?.model,
        &eval,
    )?;
    let n_cells = args.quantizer.len() * widths.len() * args.group_size.len();
    let bar = Bar::new("comparing", n_cells, "models")?;
    let clock = Instant::now();
    let mut rows = Vec::new();
    for &bits in &widths {
        for &name in &args.quantizer {
            let mut row = format!("| {bits} | {} ", name.title());
            for &group_size in &args.group_size {
                let quantizer = name.quantizer(bits, group_size, args);
                let cell = match models::plan(source, &quantizer) {
                    Ok(plan) => {
                        let method = name.method(bits, group_size, args, &plan.config);
                        let calibration = of(&method);
                        n_calibrated = n_windows(&calibration);
                        let mut lm = models::load_as(source, device, args.model.dtype.float())?;
                        method.quantize(&mut lm.model, &calibration, |_, _| {})?;
                        format!("{:.4}", perplexity(&lm.model, &eval)?.value())
                    }
                    // The quantizer does not have this width, or a layer this group size.
                    Err(models::Error::Checkpoint(models::CheckpointError::Plan { .. })) => {
                        "–".into()
                    }
                    Err(error) => return Err(error.into()),
                };
                row += &format!("| {cell} ");
                bar.step(&format!("{bits} bits, {}", name.title()));
            }
            rows.push(row + "|");
        }
    }
    drop(bar);
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
        n_calibrated,
        clock.elapsed().as_secs_f64(),
    );
    Ok(())
}
