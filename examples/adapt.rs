//! Quantizes a LLaMA or an OPT, tunes it on text or on instruction data, merges, saves and reloads it,
//! and checks that the reloaded model is the tuned one.
//!
//! `cargo run --release --example adapt` does so with the embedded model; `-- --help` lists the options
//! for other models.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{ArgGroup, Parser, ValueEnum};
use examples::arguments::{GroupSize, ModelArgs, TuneArgs};
use examples::instructions::Instructions;
use examples::method::MethodName;
use examples::outcome::{Result, bits, exit, max_difference, weights_bytes};
use examples::table::{self, number};
use examples::texts::{Cut, Perplexities, Source, Texts, fit_config, n_windows};
use examples::{interrupt, memory, print, println, progress};
use models::Pretrained;
use peft::{Adapters, Certificate, Exactness, FitConfig, Method, OffGrid, Targets};
use quant_core::{Format, Quantizer};
use serde::Serialize;
use tensor_files::Output;

/// Quantize a LLaMA or an OPT, fine-tune it, merge, save, reload, and verify the merge
///
/// Without options, the embedded model is tuned at 4, 3 and 2 bits on a dialect of the language that it
/// was trained on.
#[derive(Parser)]
#[command(
    version,
    group = ArgGroup::new("tuned_on").args(["train", "data"]),
    mut_arg("model", |arg| arg.requires("tuned_on")),
    after_help = "\
Examples:
  adapt --model Llama-2-7b-hf --train task.txt --eval held-out.txt --bits 4 --group-size 128 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-task
  adapt --model Llama-2-7b-hf --data gsm8k/train.jsonl --template gsm8k --method qa-lora --rank 16 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-gsm8k"
)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to train on
    #[arg(long, value_name = "FILE", requires = "model", requires = "eval")]
    train: Option<PathBuf>,
    /// Text of the same task to evaluate on
    #[arg(long, value_name = "FILE", requires = "train")]
    eval: Option<PathBuf>,
    /// Text of the model's earlier training data, to measure forgetting
    #[arg(long, value_name = "FILE", requires = "train")]
    base: Option<PathBuf>,
    /// Records to train on instead of text, JSONL or a JSON array
    #[arg(
        long,
        value_name = "FILE",
        requires = "model",
        conflicts_with = "train"
    )]
    data: Option<PathBuf>,
    #[command(flatten)]
    instructions: Instructions,
    /// Bits of a weight, one or several: 2, 3, 4, 8
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [4, 3, 2])]
    bits: Vec<usize>,
    /// Weights that share a scale: a number, or `channel` for all weights of an output
    #[arg(long, value_name = "N", default_value = "32")]
    group_size: GroupSize,
    /// Quantize to a symmetric grid, without zero-points
    #[arg(long)]
    symmetric: bool,
    /// Method of fine-tuning
    #[arg(long, value_enum, default_value_t = MethodName::Peqa)]
    method: MethodName,
    /// What to do with adapters that do not merge into a packed weight
    #[arg(long, value_enum, default_value_t = Merge::Codes)]
    merge: Merge,
    /// Layers to adapt by the last part of their path, such as q_proj,v_proj [default: all]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    targets: Vec<String>,
    #[command(flatten)]
    tune: TuneArgs,
    /// Seed of the adapters and of the order of the training data
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for the tuned models, their adapters and report.json
    /// [default: only the report is kept, as adapt-report.json]
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    out: Option<PathBuf>,
}

impl Args {
    fn method(&self) -> Box<dyn Method> {
        let targets = if self.targets.is_empty() {
            Targets::All
        } else {
            Targets::from(self.targets.clone())
        };
        let tune = &self.tune;
        self.method
            .method(tune.rank, tune.alpha(), &targets, self.seed)
    }

    /// The learning rate, by default that of the method at the hidden size of the model.
    fn learning_rate(&self, lm: &Pretrained) -> f64 {
        let hidden_size = lm.model.config().hidden_size();
        let rate = || self.method().learning_rate(hidden_size);
        self.tune.lr.unwrap_or_else(rate)
    }

    /// The largest difference of a logit of the merged and of the tuned model, relative to the largest
    /// logit, for a merge that rounds nothing. Zero on the CPU for an exact merge. On other devices the
    /// adapter's operations are fused into other kernels, which round differently, unless
    /// `BURN_FUSION_MAX_EXPLORATIONS=0` is set.
    fn tolerated_difference(&self, certificate: &Certificate) -> f32 {
        match self.model.device.name.as_str() {
            "flex" if certificate.is_exact() => 0.0,
            "flex" => 1e-4,
            _ => 1e-3,
        }
    }
}

/// What to do with adapters that do not merge into a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Merge {
    /// Keep them beside the base
    Codes,
    /// Merge them into dense weights
    Dense,
    /// Merge and quantize again, which loses a part of what was learned
    Round,
}

/// The results at one width.
#[derive(Debug, Serialize)]
struct Run {
    method: String,
    format: Format,
    /// Bytes of the saved weights.
    n_bytes: u64,
    n_trainable: usize,
    /// Relative quantization error of the projections, the mean over the layers.
    weight_error: f64,
    rounded: Perplexities,
    /// The mean loss over the targets of each step, in nats, before its update.
    losses: Vec<f64>,
    tuned: Perplexities,
    reloaded: Perplexities,
    /// None if the adapters are kept beside the base.
    certificate: Option<Certificate>,
    /// The number of logits of the tuned model that the merged and the reloaded one's are compared with.
    n_logits: usize,
    /// The largest difference of a logit of the merged and of the tuned model. The reloaded model's logits
    /// equal the merged one's bit for bit.
    max_logit_difference: f32,
    /// From quantizing to the comparison.
    seconds: f64,
    /// Peak resident memory of the process during the run.
    peak_bytes: Option<u64>,
}

/// The contents of the JSON file.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// `gptq`: the mean over non-overlapping windows of the mean NLL of each. `targets`: the mean NLL over
    /// all targets.
    perplexity_protocol: &'static str,
    /// How many records were encoded, cut and dropped, for training and for evaluation.
    records: Option<[String; 2]>,
    seq_len: usize,
    n_task_windows: usize,
    n_base_windows: usize,
    steps: usize,
    learning_rate: f64,
    batch: usize,
    seed: u64,
    device: String,
    /// Bytes of the weights of the model before quantization.
    n_bytes: u64,
    full_precision: Perplexities,
    runs: Vec<Run>,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    // Settings are checked before anything is read.
    args.tune.check()?;
    let mut bits = args.bits.clone();
    bits.sort_unstable_by(|a, b| b.cmp(a));
    bits.dedup();
    let quantizers = bits
        .into_iter()
        .map(|bits| args.method.quantizer(bits, args.group_size, args.symmetric))
        .collect::<Result<Vec<_>>>()?;
    for quantizer in &quantizers {
        quantizer.format()?;
    }
    let reserved = args.out.as_deref().map(interrupt::reserve).transpose()?;
    let device = args.model.device.open();

    let scratch = interrupt::scratch()?;
    let source = args.model.dir(scratch.path())?;
    if let Some(output) = &reserved {
        let plans = quantizers.iter().map(|of| models::plan(&source, of));
        let n_bytes = plans.map(|plan| Ok(plan?.n_bytes()));
        output.require(n_bytes.sum::<models::Result<u64>>()?)?;
    }
    let lm = models::load(&source, &device)?;
    let source_of_texts = match (&args.train, &args.eval, &args.data) {
        (Some(train), Some(eval), _) => Source::Files(train, eval, args.base.as_deref()),
        (_, _, Some(data)) => Source::Instructions(&args.instructions, data),
        _ => Source::Corpus,
    };
    let cut = Cut {
        source: source_of_texts,
        seq_len: args.tune.cut.seq_len,
        batch: args.tune.batch,
        eval_windows: args.tune.eval.limit(),
        seed: args.seed,
    };
    let texts = Texts::new(&cut, &lm, &device)?;
    if let Some([train, eval]) = &texts.records {
        println!("training records: {train}\nevaluation records: {eval}\n");
    }
    let full_precision = texts.perplexities(&lm.model)?;
    let mut report = Report {
        model: args.model.name(),
        perplexity_protocol: texts.protocol(),
        records: texts.records.clone(),
        seq_len: cut.seq_len,
        n_task_windows: n_windows(&texts.task),
        n_base_windows: n_windows(&texts.base),
        steps: args.tune.steps,
        learning_rate: args.learning_rate(&lm),
        batch: args.tune.batch,
        seed: args.seed,
        device: args.model.device.name.clone(),
        n_bytes: weights_bytes(&source)?,
        full_precision,
        runs: Vec::new(),
    };
    drop(lm);

    let dir = match &args.out {
        Some(out) => out.clone(),
        None => scratch.path().join("out"),
    };
    let mut out = Out { dir, reserved };
    let json = match &args.out {
        Some(out) => out.join("report.json"),
        None => PathBuf::from("adapt-report.json"),
    };
    for quantizer in &quantizers {
        let fit = fit_config(report.learning_rate, args.tune.steps, args.seed);
        let run = tune(args, &**quantizer, &fit, &source, &texts, &mut out, &device)?;
        report.runs.push(run);
        // A later failure does not lose this run.
        interrupt::uninterrupted(|| tensor_files::write_json(&json, &report))?;
    }

    println!("\n{}", table(&report));
    for run in &report.runs {
        print!("{} bits: ", run.format.bits());
        match &run.certificate {
            Some(certificate) => println!("{certificate}"),
            None => println!(
                "{} does not merge into a packed weight: its adapters are saved separately from the base (see --merge)",
                run.method
            ),
        }
        print!("  {} logits: the reloaded model's ", run.n_logits);
        match run.max_logit_difference {
            0.0 => println!("equal the tuned model's bit for bit\n"),
            most => println!(
                "equal the merged model's bit for bit, and the tuned model's within {most:.1e}\n"
            ),
        }
    }
    println!("report: {}", json.display());
    if let Some(out) = &args.out {
        println!("models and adapters: {}", out.display());
    }
    let ruined = report.runs.iter().filter(|run| run.is_ruined());
    let ruined: Vec<String> = ruined
        .map(|run| {
            let (before, after) = (run.rounded.task, run.tuned.task);
            format!("{}, from {before:.1} to {after:.1}", run.format)
        })
        .collect();
    if ruined.is_empty() {
        return Ok(());
    }
    Err(format!(
        "the training at a learning rate of {} raised the perplexity of its task ({}): lower --lr, or train on more text",
        report.learning_rate,
        ruined.join("; ")
    )
    .into())
}

impl Run {
    /// Whether the training more than doubled the perplexity of the task that it was for.
    fn is_ruined(&self) -> bool {
        self.tuned.task > 2.0 * self.rounded.task
    }
}

/// The directory that models and adapters are saved in. It is made with the first of them.
struct Out {
    dir: PathBuf,
    reserved: Option<Output>,
}

impl Out {
    /// Saves what `save` saves in the directory that it is called with.
    fn add(&mut self, save: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        match self.reserved.take() {
            Some(output) => output.write(save),
            None => interrupt::uninterrupted(|| save(&self.dir)),
        }
    }
}

/// Quantizes, tunes, merges, saves to `out`, reloads and compares.
fn tune(
    args: &Args,
    quantizer: &dyn Quantizer,
    fit: &FitConfig,
    source: &Path,
    texts: &Texts,
    out: &mut Out,
    device: &Device,
) -> Result<Run> {
    memory::reset_peak();
    let start = Instant::now();
    let format = quantizer.format()?;
    let bar = progress::bar(args.tune.steps, "steps")?;
    bar.set_prefix(format.to_string());
    bar.set_message("quantizing");

    let mut lm = models::load(source, device)?;
    let layers = models::quantize(&mut lm.model, &quantizer, &[], |_| {})?;
    let errors = layers.iter().map(|layer| layer.error.weight.relative);
    let weight_error = errors.sum::<f64>() / layers.len() as f64;
    let rounded = texts.perplexities(&lm.model)?;

    let attached = peft::attach(&mut lm.model, &*args.method())?;
    let mut losses = Vec::new();
    peft::fit(&mut lm.model, &texts.train, fit, |step, _| {
        losses.push(step.loss);
        bar.set_message(format!("loss {:.3}", step.loss));
        bar.set_position(step.index as u64);
    })?;
    bar.set_message("saving, evaluating, merging, reloading");
    let name = format!("{}-bit", format.bits());
    let name_of_adapters = format!("{name}-adapters");
    let adapters = Adapters::of(&lm.model)?;
    out.add(|dir| Ok(adapters.save(dir.join(&name_of_adapters))?))?;
    let tuned = texts.perplexities(&lm.model)?;
    let tuned_logits = texts.probe(&lm.model);
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
    lm.certificate = certificate.clone();
    out.add(|dir| Ok(models::save(&lm, dir.join(&name))?))?;
    drop(lm);

    let (saved, adapters) = (out.dir.join(&name), out.dir.join(&name_of_adapters));
    let mut lm = models::load_verified(&saved, device)?;
    if certificate.is_none() {
        peft::activate(&mut lm.model, &Adapters::load(&adapters, device)?)?;
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
        return Err(format!(
            "{format}: the logits of the reloaded model are not the tuned model's"
        )
        .into());
    }
    bar.finish_and_clear();
    let run = Run {
        method: args.method.name(),
        format,
        n_bytes: weights_bytes(&saved)?
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
        "{format}: relative weight error {:.1} %, task perplexity {:.3}, tuned {:.3}",
        100.0 * run.weight_error,
        run.rounded.task,
        run.tuned.task
    );
    Ok(run)
}

/// Formats the report as a Markdown table.
fn table(report: &Report) -> String {
    let header = [
        "method",
        "bits",
        "group",
        "bytes",
        "trainable",
        "base text: quantized / tuned / reloaded",
        "task text: quantized / tuned / reloaded",
        "seconds",
        "peak MiB",
    ];
    let mut rows = vec![header.map(String::from)];
    let dash = || "-".to_string();
    let plain = |perplexity| number(perplexity, 3);
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
            GroupSize(run.format.group_size()).to_string(),
            run.n_bytes.to_string(),
            run.n_trainable.to_string(),
            each(|p| p.base),
            each(|p| Some(p.task)),
            format!("{:.1}", run.seconds),
            run.peak_bytes.map_or(dash(), |n| (n >> 20).to_string()),
        ]);
    }
    format!(
        "perplexity by the protocol `{}`: {} windows of {} tokens of the task, {} of the base text\n\n{}",
        report.perplexity_protocol,
        report.n_task_windows,
        report.seq_len,
        report.n_base_windows,
        table::markdown(&rows)
    )
}
