//! Quantizes a LLaMA or an OPT, tunes its scales on a text or on instruction data, merges, saves, reloads, and proves that the
//! reloaded model is the tuned one.
//!
//! `cargo run --release --example adapt` does so with the model that the project ships;
//! `-- --help` lists what it does with yours.

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{ArgGroup, Parser, ValueEnum};
use examples::device::DeviceArg;
use examples::embedded::EmbeddedArg;
use examples::instructions::Instructions;
use examples::memory;
use examples::method::MethodName;
use examples::table;
use examples::tuning::{
    Cut, Perplexities, Result, Source, Texts, bits, exit, max_difference, n_windows, weights_bytes,
};
use indicatif::{ProgressBar, ProgressStyle};
use peft::{Adapters, Certificate, Exactness, FitConfig, OffGrid, Targets};
use quant_core::{Format, Quantizer};
use serde::Serialize;

/// Quantize a LLaMA or an OPT, tune it on a text or on records, merge, save, reload, and prove the merge
///
/// Without options, the model that comes with the program is tuned on a dialect of the language
/// that it knows, at 4, 3 and 2 bits.
#[derive(Parser)]
#[command(
    version,
    group = ArgGroup::new("tuned_on").args(["train", "data"]),
    after_help = "\
Examples:
  adapt --model Llama-2-7b-hf --train task.txt --eval held-out.txt --bits 4 --group-size 128 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-task
  adapt --model Llama-2-7b-hf --data gsm8k/train.jsonl --template gsm8k --method qa-lora --rank 16 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-gsm8k"
)]
struct Args {
    /// Hugging Face directory of a model [default: one that comes with the program]
    #[arg(long, value_name = "DIR", requires = "tuned_on")]
    model: Option<PathBuf>,
    /// Text to train on
    #[arg(long, value_name = "FILE", requires = "model", requires = "eval")]
    train: Option<PathBuf>,
    /// Records to train on instead, JSONL or a JSON array: prompts are given, answers learned
    #[arg(
        long,
        value_name = "FILE",
        requires = "model",
        conflicts_with = "train"
    )]
    data: Option<PathBuf>,
    #[command(flatten)]
    instructions: Instructions,
    /// Text of the same task to evaluate on
    #[arg(long, value_name = "FILE", requires = "train", conflicts_with = "data")]
    eval: Option<PathBuf>,
    /// Text like those that the model knows, to see what tuning costs there
    #[arg(long, value_name = "FILE", requires = "train", conflicts_with = "data")]
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
    #[arg(long, value_enum, default_value_t = MethodName::Peqa)]
    method: MethodName,
    /// Rank, for the methods that have one
    #[arg(long, value_name = "N", default_value_t = 4)]
    rank: usize,
    /// Alpha: what is added is multiplied by alpha / rank [default: the rank]
    #[arg(long, value_name = "X")]
    alpha: Option<f32>,
    /// What to do with adapters that the codes cannot hold
    #[arg(long, value_enum, default_value_t = Merge::Codes)]
    merge: Merge,
    /// Layers to train by the last part of their name, such as q_proj,v_proj [default: all]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    targets: Vec<String>,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
    /// Learning rate, the highest of a cosine [default: one for the method on a small model]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Windows in a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Tokens in a window, or in a row of records
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
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

impl Args {
    /// How far the merged model's logits may be from the tuned model's, relative to the largest, where
    /// the merge is no rounding: nothing on the CPU if it is exact. Elsewhere burn fuses operations
    /// into kernels, other ones where an adapter's operations are among them, and so rounds otherwise.
    /// (Not with `BURN_FUSION_MAX_EXPLORATIONS=0`.)
    fn tolerated_difference(&self, certificate: &Certificate) -> f32 {
        match self.device.name.as_str() {
            "flex" if certificate.is_exact() => 0.0,
            "flex" => 1e-4,
            _ => 1e-3,
        }
    }
}

/// What becomes of adapters that the codes of a packed weight cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Merge {
    /// They stay beside the base
    Codes,
    /// Their weights become dense
    Dense,
    /// Their weights are rounded anew, and a part of what was learned is lost
    Round,
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
    /// None if the adapters stay beside the base.
    certificate: Option<Certificate>,
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
    /// `gptq`: non-overlapping windows, mean over the targets of each. `targets`: mean over all tokens to
    /// be learned.
    perplexity_protocol: &'static str,
    /// What became of instruction data, to train on and to evaluate on.
    records: Option<[String; 2]>,
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

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    // Settings that cannot work are refused before anything is read.
    fit_config(args).check()?;
    let mut bits = args.bits.clone();
    bits.sort_unstable_by(|a, b| b.cmp(a));
    bits.dedup();
    let quantizers = bits
        .into_iter()
        .map(|bits| {
            let group_size = args.group_size.0;
            args.method.quantizer(bits, group_size, args.symmetric)
        })
        .collect::<Result<Vec<_>>>()?;
    for quantizer in &quantizers {
        quantizer.format()?;
    }
    if args.eval_windows == Some(0) {
        return Err("--eval-windows is 0; it must be at least 1".into());
    }
    if args.rank == 0 {
        return Err("--rank is 0; it must be at least 1".into());
    }
    if args.batch == 0 {
        return Err("--batch is 0; it must be at least 1".into());
    }
    if let Some(out) = &args.out {
        tensor_files::check_output(out)?;
    }
    let device = args.device.open();

    // Dropped, and so removed, at the end.
    let scratch = tempfile::tempdir()?;
    let source = args.embedded.or(args.model.as_ref(), scratch.path())?;
    let lm = models::load(&source, &device)?;
    let source_of_texts = match (&args.train, &args.eval, &args.data) {
        (Some(train), Some(eval), _) => Source::Files(train, eval, args.base.as_ref()),
        (_, _, Some(data)) => Source::Instructions(&args.instructions, data),
        _ => Source::Corpus,
    };
    let cut = Cut {
        source: source_of_texts,
        seq_len: args.seq_len,
        batch: args.batch,
        eval_windows: args.eval_windows.unwrap_or(usize::MAX),
        seed: args.seed,
    };
    let texts = Texts::new(&cut, &lm, &device)?;
    if let Some([train, eval]) = &texts.records {
        println!("to train on: {train}\nto evaluate on: {eval}\n");
    }
    let full_precision = texts.perplexities(&lm.model)?;
    let mut report = Report {
        model: args.embedded.name(args.model.as_ref()),
        perplexity_protocol: texts.protocol(),
        records: texts.records.clone(),
        seq_len: args.seq_len,
        n_task_windows: n_windows(&texts.task),
        n_base_windows: n_windows(&texts.base),
        steps: args.steps,
        learning_rate: fit_config(args).learning_rate(),
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
        let run = tune(args, &**quantizer, &source, &texts, &out, &device)?;
        report.runs.push(run);
        // What is done is reported even if the next run fails.
        tensor_files::write_json(&json, &report)?;
    }

    println!("\n{}", table(&report));
    for run in &report.runs {
        print!("{} bits: ", run.format.bits());
        match &run.certificate {
            Some(certificate) => println!("{certificate}"),
            None => println!(
                "the codes cannot hold {}: its adapters stay beside the base (`--merge dense`, `--merge round`)",
                run.method
            ),
        }
        print!("  {} logits: saved and reloaded are ", run.n_logits);
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

/// Quantizes, tunes, merges, saves to `out` and reloads, and compares on the way.
fn tune(
    args: &Args,
    quantizer: &dyn Quantizer,
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
    let layers = models::quantize(&mut lm.model, &quantizer, &[], |_| {})?;
    let errors = layers.iter().map(|layer| layer.error.weight.relative);
    let weight_error = errors.sum::<f64>() / layers.len() as f64;
    let rounded = texts.perplexities(&lm.model)?;

    let targets = match args.targets.is_empty() {
        true => Targets::All,
        false => Targets::from(args.targets.clone()),
    };
    let method = args
        .method
        .method(args.rank, args.alpha, &targets, args.seed);
    let attached = peft::attach(&mut lm.model, &*method)?;
    let mut losses = Vec::new();
    peft::fit(&mut lm.model, &texts.train, &fit_config(args), |step| {
        losses.push(step.loss);
        bar.set_message(format!("loss {:.3}", step.loss));
        bar.set_position(step.index as u64);
    })?;
    bar.set_message("evaluating, merging, saving, reloading");
    let tuned = texts.perplexities(&lm.model)?;
    let tuned_logits = texts.probe(&lm.model);

    let name = format!("{}-bit", format.bits());
    let adapters = out.join(format!("{name}-adapters"));
    Adapters::of(&lm.model)?.save(&adapters)?;
    let off_grid = match args.merge {
        Merge::Codes => OffGrid::Refuse,
        Merge::Dense => OffGrid::Dense,
        Merge::Round => OffGrid::Round(quantizer),
    };
    let certificate = match peft::merge_probed(&mut lm.model, off_grid, &texts.task[0]) {
        Ok(certificate) => Some(certificate),
        Err(peft::Error::MergeIntoPacked { .. }) => {
            peft::detach(&mut lm.model)?;
            None
        }
        Err(error) => return Err(error.into()),
    };
    let merged_logits = match &certificate {
        Some(_) => texts.probe(&lm.model),
        None => tuned_logits.clone(),
    };
    models::save(&lm, out.join(&name))?;
    drop(lm);

    let mut lm = models::load(out.join(&name), device)?;
    match &certificate {
        Some(certificate) => certificate.verify(&lm.model)?,
        None => drop(peft::activate(
            &mut lm.model,
            &Adapters::load(&adapters, device)?,
        )?),
    }
    let reloaded = texts.perplexities(&lm.model)?;
    let reloaded_logits = texts.probe(&lm.model);
    let max_logit_difference = max_difference(&merged_logits, &tuned_logits);
    let largest = tuned_logits
        .iter()
        .fold(0.0, |most: f32, logit| most.max(logit.abs()));
    let is_rounded = |certificate: &Certificate| {
        let mut layers = certificate.layers.iter();
        layers.any(|layer| matches!(layer.exactness, Exactness::Rounded { .. }))
    };
    let is_other = certificate.as_ref().is_some_and(|certificate| {
        let tolerated = args.tolerated_difference(certificate) * largest;
        !is_rounded(certificate) && max_logit_difference > tolerated
    });
    if is_other || bits(&reloaded_logits) != bits(&merged_logits) {
        return Err(
            format!("{format}: the merged model's logits are not the tuned model's").into(),
        );
    }
    bar.finish_and_clear();
    let run = Run {
        method: args.method.name(),
        format,
        n_bytes: weights_bytes(&out.join(&name))?
            + match &certificate {
                Some(_) => 0,
                None => weights_bytes(&adapters)?,
            },
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
        .with_learning_rate(args.lr.unwrap_or(args.method.learning_rate()))
        .with_steps(Some(args.steps))
        .with_warmup_steps(args.steps / 20)
        .with_seed(args.seed)
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
    format!(
        "perplexity: protocol `{}`, windows or rows of {} tokens, {} of the task, {} of the base text\n\n{}",
        report.perplexity_protocol,
        report.seq_len,
        report.n_task_windows,
        report.n_base_windows,
        table::markdown(&rows)
    )
}
