//! Quantizes a LLaMA, tunes its scales on a text, merges, saves, reloads, and proves that the
//! reloaded model is the tuned one.
//!
//! `cargo run --release --example adapt` does so with the model that the project ships;
//! `-- --help` lists what it does with yours.

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::{embedded, memory};
use indicatif::{ProgressBar, ProgressStyle};
use models::{Pretrained, Windows, perplexity};
use peft::{Adapters, Batch, CausalLm, Certificate, FitConfig, Peqa, Targets};
use quant_core::{Format, Quantizer, Rtn};
use serde::Serialize;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Quantize a LLaMA, tune it on a text, merge, save, reload, and prove the merge
///
/// Without options, the model that comes with the program is tuned on a dialect of the language
/// that it knows, at 4, 3 and 2 bits.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Example:
  adapt --model Llama-2-7b-hf --train task.txt --eval held-out.txt --bits 4 --group-size 128 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-task"
)]
struct Args {
    /// Hugging Face directory of a LLaMA [default: the embedded model]
    #[arg(long, value_name = "DIR", requires = "train", requires = "eval")]
    model: Option<PathBuf>,
    /// Text to train on
    #[arg(long, value_name = "FILE", requires = "model")]
    train: Option<PathBuf>,
    /// Text of the same task to evaluate on
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Text like those that the model knows, to see what tuning costs there
    #[arg(long, value_name = "FILE", requires = "model")]
    base: Option<PathBuf>,
    /// Bits of a weight, one or several: 2, 3, 4, 8
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [4, 3, 2])]
    bits: Vec<usize>,
    /// Weights that share a scale: a number, or `channel`
    #[arg(long, value_name = "N", default_value = "32", value_parser = group_size)]
    group_size: GroupSize,
    /// Use a symmetric grid, without zero-points
    #[arg(long)]
    symmetric: bool,
    /// What to train
    #[arg(long, value_enum, default_value_t = Method::Peqa)]
    method: Method,
    /// Layers to train by the last part of their name, such as q_proj,v_proj [default: all]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    targets: Vec<String>,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
    /// Learning rate, the highest of a cosine
    #[arg(long, value_name = "X", default_value_t = 2e-3)]
    lr: f64,
    /// Windows in a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Tokens in a window
    #[arg(long, value_name = "N", default_value_t = 128)]
    seq_len: usize,
    /// Windows of each text to evaluate on [default: all]
    #[arg(long, value_name = "N")]
    eval_windows: Option<usize>,
    /// Seed of the order of the windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for the tuned models, their adapters and report.json
    /// [default: none is kept but the report, in adapt-report.json]
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    out: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
}

impl Args {
    /// How far the merged model's logits may be from the tuned model's: nothing on the CPU. Elsewhere
    /// burn fuses operations into kernels, other ones where an adapter's operations are among them,
    /// and so rounds otherwise. (Not with `BURN_FUSION_MAX_EXPLORATIONS=0`.)
    fn tolerated_difference(&self) -> f32 {
        match self.device.name.as_str() {
            "flex" => 0.0,
            _ => 1e-3,
        }
    }
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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Method {
    /// The scales of the quantized weights (PEQA)
    Peqa,
}

/// The perplexities of a model.
#[derive(Clone, Copy, Debug, Serialize)]
struct Perplexities {
    /// On the base text, if there is one.
    base: Option<f64>,
    /// On the task's evaluation text.
    task: f64,
}

/// One run: a format, tuned.
#[derive(Debug, Serialize)]
struct Run {
    method: String,
    format: Format,
    /// Bytes of the saved weights.
    n_bytes: u64,
    n_trainable: usize,
    /// Relative error of the projections: the mean over the layers.
    weight_error: f64,
    rounded: Perplexities,
    /// The mean loss over the tokens of each step before it, in nats.
    losses: Vec<f64>,
    tuned: Perplexities,
    reloaded: Perplexities,
    certificate: Certificate,
    /// Logits of the tuned model that the merged and the reloaded one's are compared with.
    n_logits: usize,
    /// How far the merged model's are from them. The reloaded model's are the merged one's bit by bit.
    max_logit_difference: f32,
    /// From quantizing to the comparison.
    seconds: f64,
    /// Peak resident memory of the process in the run.
    peak_bytes: Option<u64>,
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// `gptq`: non-overlapping windows, mean over the targets of each.
    perplexity_protocol: &'static str,
    seq_len: usize,
    n_task_windows: usize,
    n_base_windows: usize,
    steps: usize,
    learning_rate: f64,
    batch: usize,
    seed: u64,
    device: String,
    /// Bytes of the weights before.
    n_bytes: u64,
    full_precision: Perplexities,
    runs: Vec<Run>,
}

/// The texts, in windows on the device.
struct Texts {
    train: Vec<Batch>,
    task: Vec<Batch>,
    base: Vec<Batch>,
}

impl Texts {
    fn perplexities(&self, model: &impl CausalLm) -> Result<Perplexities> {
        let base = match self.base.is_empty() {
            true => None,
            false => Some(perplexity(model, &self.base)?.value()),
        };
        let task = perplexity(model, &self.task)?.value();
        Ok(Perplexities { base, task })
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    // Settings that cannot work are refused before anything is read.
    fit_config(args).check()?;
    let mut bits = args.bits.clone();
    bits.sort_unstable_by(|a, b| b.cmp(a));
    bits.dedup();
    let quantizers: Vec<Rtn> = bits
        .into_iter()
        .map(|bits| {
            let rtn = Rtn::new().with_bits(bits).with_symmetric(args.symmetric);
            rtn.with_group_size(args.group_size.0)
        })
        .collect();
    for quantizer in &quantizers {
        quantizer.format()?;
    }
    if args.eval_windows == Some(0) {
        return Err("--eval-windows is 0; it must be at least 1".into());
    }
    if args.batch == 0 {
        return Err("--batch is 0; it must be at least 1".into());
    }
    if let Some(out) = &args.out {
        peft::files::check_output(out)?;
    }
    let device = args.device.open();

    // Dropped, and so removed, at the end.
    let scratch = tempfile::tempdir()?;
    let source = match &args.model {
        Some(dir) => dir.clone(),
        None => {
            let dir = scratch.path().join("embedded");
            std::fs::create_dir(&dir)?;
            embedded::write(&dir)?;
            dir
        }
    };
    let lm = models::load(&source, &device)?;
    let texts = texts(args, &lm, &device)?;
    let full_precision = texts.perplexities(&lm.model)?;
    let mut report = Report {
        model: match &args.model {
            Some(dir) => dir.display().to_string(),
            None => "embedded".into(),
        },
        perplexity_protocol: "gptq",
        seq_len: args.seq_len,
        n_task_windows: n_windows(&texts.task),
        n_base_windows: n_windows(&texts.base),
        steps: args.steps,
        learning_rate: args.lr,
        batch: args.batch,
        seed: args.seed,
        device: args.device.name.clone(),
        n_bytes: weights_bytes(&source)?,
        full_precision,
        runs: Vec::new(),
    };
    drop(lm);

    let out = match &args.out {
        Some(out) => out.clone(),
        None => scratch.path().join("out"),
    };
    let json = match &args.out {
        Some(out) => out.join("report.json"),
        None => PathBuf::from("adapt-report.json"),
    };
    for quantizer in &quantizers {
        let run = tune(args, quantizer, &source, &texts, &out, &device)?;
        report.runs.push(run);
        // What is done is reported even if the next run fails.
        peft::files::write_json(&json, &report)?;
    }

    println!("\n{}", table(&report));
    for run in &report.runs {
        println!("{} bits: {}", run.format.bits(), run.certificate);
        print!("  {} logits: merged and reloaded are ", run.n_logits);
        match run.max_logit_difference {
            0.0 => println!("the tuned ones, bit for bit\n"),
            most => println!("the same, bit for bit, and the tuned ones within {most:.1e}\n"),
        }
    }
    println!("report: {}", json.display());
    if let Some(out) = &args.out {
        println!("models and adapters: {}", out.display());
    }
    Ok(())
}

fn texts(args: &Args, lm: &Pretrained, device: &Device) -> Result<Texts> {
    let read = |path: &PathBuf| match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => Err(format!("cannot read `{}`: {error}", path.display())),
    };
    let (train, task, base) = match (&args.train, &args.eval) {
        (Some(train), Some(eval)) => (
            read(train)?,
            read(eval)?,
            args.base.as_ref().map(read).transpose()?,
        ),
        _ => (
            corpus::text(Dialect::Old, 400_000, 10),
            corpus::text(Dialect::Old, 25_000, 11),
            Some(corpus::text(Dialect::Plain, 25_000, 12)),
        ),
    };
    let windows = |text: &str, option: &str| -> Result<Windows> {
        let windows = lm.windows(text, args.seq_len);
        windows.map_err(|error| format!("the {option} text: {error}").into())
    };
    // Small enough for the activations of a batch to stay in memory that is used again.
    let evaluate = |windows: Windows| {
        let windows = windows.take(args.eval_windows.unwrap_or(usize::MAX));
        windows.batches((1024 / args.seq_len).max(1), device)
    };
    Ok(Texts {
        train: windows(&train, "--train")?
            .shuffled(args.seed)
            .batches(args.batch, device),
        task: evaluate(windows(&task, "--eval")?),
        base: match base {
            Some(base) => evaluate(windows(&base, "--base")?),
            None => Vec::new(),
        },
    })
}

/// Quantizes, tunes, merges, saves to `out` and reloads, and compares on the way.
fn tune(
    args: &Args,
    quantizer: &Rtn,
    source: &Path,
    texts: &Texts,
    out: &Path,
    device: &Device,
) -> Result<Run> {
    memory::reset_peak();
    let start = Instant::now();
    let format = quantizer.format()?;
    let bar = ProgressBar::new(args.steps as u64);
    bar.set_style(ProgressStyle::with_template(
        "{prefix} {bar:30} {pos}/{len} steps, {eta} left, {msg}",
    )?);
    bar.set_prefix(format.to_string());
    bar.set_message("quantizing");
    bar.tick();

    let mut lm = models::load(source, device)?;
    let layers = models::quantize(&mut lm.model, quantizer, &[], |_| {})?;
    let errors = layers.iter().map(|layer| layer.cost.distortion.relative);
    let weight_error = errors.sum::<f64>() / layers.len() as f64;
    let rounded = texts.perplexities(&lm.model)?;

    let method = match args.method {
        Method::Peqa => Peqa::new().with_targets(match args.targets.is_empty() {
            true => Targets::All,
            false => Targets::from(args.targets.clone()),
        }),
    };
    let attached = peft::attach(&mut lm.model, &method)?;
    let mut losses = Vec::new();
    peft::fit(&mut lm.model, &texts.train, &fit_config(args), |step| {
        losses.push(step.loss);
        bar.set_message(format!("loss {:.3}", step.loss));
        bar.set_position(step.index as u64);
    })?;
    bar.set_message("evaluating, merging, saving, reloading");
    let tuned = texts.perplexities(&lm.model)?;
    let tuned_logits = probe(&lm.model, &texts.task);

    let name = format!("{}-bit", format.bits());
    Adapters::of(&lm.model)?.save(out.join(format!("{name}-adapters")))?;
    let certificate = peft::merge(&mut lm.model)?;
    let merged_logits = probe(&lm.model, &texts.task);
    models::save(&lm, out.join(&name))?;
    drop(lm);

    let lm = models::load(out.join(&name), device)?;
    certificate.verify(&lm.model)?;
    let reloaded = texts.perplexities(&lm.model)?;
    let reloaded_logits = probe(&lm.model, &texts.task);
    let max_logit_difference = max_difference(&merged_logits, &tuned_logits);
    if max_logit_difference > args.tolerated_difference()
        || bits(&reloaded_logits) != bits(&merged_logits)
    {
        return Err(
            format!("{format}: the merged model's logits are not the tuned model's").into(),
        );
    }
    bar.finish_and_clear();
    let run = Run {
        method: args
            .method
            .to_possible_value()
            .expect("no method is hidden")
            .get_name()
            .into(),
        format,
        n_bytes: weights_bytes(&out.join(&name))?,
        n_trainable: attached.n_trainable,
        weight_error,
        rounded,
        losses,
        tuned,
        reloaded,
        certificate,
        n_logits: tuned_logits.len(),
        max_logit_difference,
        seconds: start.elapsed().as_secs_f64(),
        peak_bytes: memory::peak_bytes(),
    };
    println!(
        "{format}: rounding moved the weights by {:.1} %, task perplexity {:.3}; tuned {:.3}",
        100.0 * run.weight_error,
        run.rounded.task,
        run.tuned.task
    );
    Ok(run)
}

fn fit_config(args: &Args) -> FitConfig {
    FitConfig::new()
        .with_learning_rate(args.lr)
        .with_steps(Some(args.steps))
        .with_warmup_steps(args.steps / 20)
        .with_seed(args.seed)
}

/// The logits of the first batches.
fn probe(model: &impl CausalLm, batches: &[Batch]) -> Vec<f32> {
    let logits = |batch: &Batch| {
        let logits = model.forward(batch.tokens()).into_data().convert::<f32>();
        logits.try_into_vec::<f32>().expect("converted to f32")
    };
    batches.iter().take(2).flat_map(logits).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Zero for the same bits, and infinite where one of two different values is not a number.
fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| {
        let difference = (a - b).abs();
        match a.to_bits() == b.to_bits() {
            true => 0.0,
            false if difference.is_nan() => f32::INFINITY,
            false => difference,
        }
    });
    differences.fold(0.0, f32::max)
}

fn n_windows(batches: &[Batch]) -> usize {
    batches.iter().map(|batch| batch.tokens().dims()[0]).sum()
}

/// The bytes of all safetensors files in a directory.
fn weights_bytes(dir: &Path) -> Result<u64> {
    let mut n_bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            n_bytes += entry.metadata()?.len();
        }
    }
    Ok(n_bytes)
}

/// The report as a Markdown table.
fn table(report: &Report) -> String {
    let header = [
        "method",
        "bits",
        "group",
        "bytes",
        "trainable",
        "base text: before / after / reloaded",
        "task text: before / after / reloaded",
        "seconds",
        "peak MiB",
    ];
    let mut rows = vec![header.map(String::from)];
    let dash = || "-".to_string();
    let plain = |perplexity: Option<f64>| perplexity.map_or(dash(), |p| format!("{p:.3}"));
    let full = &report.full_precision;
    rows.push([
        "none".into(),
        dash(),
        dash(),
        report.n_bytes.to_string(),
        dash(),
        plain(full.base),
        plain(Some(full.task)),
        dash(),
        dash(),
    ]);
    for run in &report.runs {
        let stages = [run.rounded, run.tuned, run.reloaded];
        let each = |of: fn(&Perplexities) -> Option<f64>| match of(&stages[0]) {
            None => dash(),
            Some(_) => stages.each_ref().map(|stage| plain(of(stage))).join(" / "),
        };
        rows.push([
            run.method.clone(),
            run.format.bits().to_string(),
            run.format
                .group_size()
                .map_or("channel".into(), |n| n.to_string()),
            run.n_bytes.to_string(),
            run.n_trainable.to_string(),
            each(|p| p.base),
            each(|p| Some(p.task)),
            format!("{:.1}", run.seconds),
            run.peak_bytes.map_or(dash(), |n| (n >> 20).to_string()),
        ]);
    }
    let widths: Vec<usize> = (0..header.len())
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = format!(
        "perplexity: protocol `{}`, windows of {} tokens, {} of the task, {} of the base text\n\n",
        report.perplexity_protocol, report.seq_len, report.n_task_windows, report.n_base_windows
    );
    for (at, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            write!(text, "| {cell:>width$} ").expect("writing to a string");
        }
        text.push_str("|\n");
        if at == 0 {
            for width in &widths {
                write!(text, "|{:->1$}:", "", width + 1).expect("writing to a string");
            }
            text.push_str("|\n");
        }
    }
    text
}
