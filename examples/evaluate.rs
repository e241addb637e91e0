//! Measures models by every protocol, and writes what was found as JSON, Markdown and a chart.
//!
//! `cargo run --release --example evaluate` does so with a model that the project ships, at full
//! precision and rounded to 4, 3 and 2 bits; `-- --help` lists what it does with yours.

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use clap::Parser;
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::embedded::{self, EmbeddedArg};
use examples::tuning::{Result, exit};
use indicatif::{ProgressBar, ProgressStyle};
use models::Pretrained;
use models::data::read_records;
use models::evaluate::{
    Bootstrap, CALIBRATION_BINS, ChoiceItem, Estimate, Measurement, Report, bits_per_byte,
    byte_perplexity, calibration, choices, compare, confidences, gsm8k, llama_cpp_perplexity,
    window_losses, word_losses, word_perplexity,
};
use quant_core::Rtn;

/// Measure models by every protocol, each number with its interval
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Example:
  evaluate --model Llama-2-7b-hf --model Llama-2-7b-4bit-task --text wikitext-test.txt --seq-len 2048 \\
           --choices arc.jsonl --gsm8k test.jsonl --shots train.jsonl --out report"
)]
struct Args {
    /// Hugging Face directories; others are compared with the first [default: one that comes with the
    /// program]
    #[arg(long, value_name = "DIR", requires = "text")]
    model: Vec<PathBuf>,
    /// Widths to which the first model is rounded, in groups of 32, and measured too
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    bits: Vec<usize>,
    /// Held-out text; documents are what `--separator` is between
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// What is between documents
    #[arg(long, value_name = "TEXT", default_value = "<|endoftext|>")]
    separator: String,
    /// Multiple choice, JSONL: context (or query, question), choices, answer
    #[arg(long, value_name = "FILE", requires = "model")]
    choices: Option<PathBuf>,
    /// Word problems, JSONL: question, answer
    #[arg(long, value_name = "FILE", requires = "model")]
    gsm8k: Option<PathBuf>,
    /// Solved problems to put before each, the first five of the file
    #[arg(long, value_name = "FILE", requires = "gsm8k")]
    shots: Option<PathBuf>,
    /// Tokens in a window
    #[arg(long, value_name = "N", default_value_t = 128)]
    seq_len: usize,
    /// Tokens in a window of llama.cpp's protocol [default: 512, or what the model was made for]
    #[arg(long, value_name = "N")]
    n_ctx: Option<usize>,
    /// Windows, documents, questions and problems at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: usize,
    /// Tokens of an answer to a word problem at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Seed of the intervals
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for report.json, report.md and report.svg
    #[arg(long, value_name = "DIR", default_value = "evaluate")]
    out: PathBuf,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

/// What models are measured on.
struct Data {
    text: String,
    choices: Vec<ChoiceItem>,
    problems: Vec<gsm8k::Problem>,
    shots: Vec<gsm8k::Problem>,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    peft::files::check_output(&args.out)?;
    if args.limit == 0 {
        return Err("--limit is 0; it must be at least 1".into());
    }
    let device = args.device.open();
    let scratch = tempfile::tempdir()?;
    let sources = match args.model.is_empty() {
        false => args.model.clone(),
        true => vec![embedded::write(scratch.path(), args.embedded.architecture)?],
    };
    let bits = match (args.model.is_empty(), &args.bits[..]) {
        (true, []) => &[4, 3, 2][..],
        (_, bits) => bits,
    };
    let data = Data::read(args)?;
    let reference = models::load(&sources[0], &device)?;
    let mut report = Report::new("Evaluation")
        .with_setting("model", name(&sources[0], args))
        .with_setting("device", &args.device.name)
        .with_setting("window, tokens", args.seq_len)
        .with_setting("first token of a document", "the BOS token, or else EOS")
        .with_setting("limit of items", args.limit)
        .with_setting("intervals", "95 %, 1000 resamples")
        .with_setting("seed", args.seed);
    measure(args, "full precision", &reference, None, &data, &mut report)?;
    for &bits in bits {
        let rtn = Rtn::new().with_bits(bits).with_group_size(32);
        let mut lm = reference.clone();
        models::quantize(&mut lm.model, &rtn, &[], |_| {})?;
        let name = format!("{bits} bits, groups of 32");
        measure(args, &name, &lm, Some(&reference), &data, &mut report)?;
    }
    for source in &sources[1..] {
        let lm = models::load(source, &device)?;
        measure(
            args,
            &name(source, args),
            &lm,
            Some(&reference),
            &data,
            &mut report,
        )?;
    }

    let markdown = report.to_markdown();
    println!("{markdown}");
    peft::files::write_directory(&args.out, |out| {
        let files = [
            ("report.json", report.to_json()),
            ("report.md", markdown),
            ("report.svg", report.to_svg()),
        ];
        for (name, text) in files {
            let path = out.join(name);
            std::fs::write(&path, text).map_err(|source| peft::Error::Io { path, source })?;
        }
        Ok(())
    })?;
    println!("report: {}", args.out.display());
    Ok(())
}

fn name(source: &Path, args: &Args) -> String {
    match args.model.is_empty() {
        true => format!("embedded {:?}", args.embedded.architecture),
        false => source.display().to_string(),
    }
}

impl Data {
    fn read(args: &Args) -> Result<Self> {
        let Some(text) = &args.text else {
            let questions = corpus::questions(args.limit, 30).into_iter();
            let item = |(context, choices, answer)| ChoiceItem {
                context,
                choices,
                answer,
            };
            return Ok(Self {
                // A paragraph about a person is a document.
                text: corpus::text(Dialect::Plain, 50_000, 12).replace('\n', &args.separator),
                choices: questions.map(item).collect(),
                problems: Vec::new(),
                shots: Vec::new(),
            });
        };
        let read = |path: &PathBuf| match std::fs::read_to_string(path) {
            Ok(text) => Ok(text),
            Err(error) => Err(format!("cannot read `{}`: {error}", path.display())),
        };
        let problems = |path: &Option<PathBuf>, n: usize| -> Result<Vec<gsm8k::Problem>> {
            let Some(path) = path else {
                return Ok(Vec::new());
            };
            let problem = |record: models::data::Record| {
                let line = record.line;
                let problem = serde_json::from_value(record.fields.into());
                problem
                    .map_err(|error| format!("`{}`, line {line}: {error}", path.display()).into())
            };
            read_records(path)?
                .into_iter()
                .take(n)
                .map(problem)
                .collect()
        };
        let mut choices = Vec::new();
        if let Some(path) = &args.choices {
            let text = read(path)?;
            let lines = text
                .lines()
                .enumerate()
                .filter(|(_, line)| !line.trim().is_empty());
            for (at, line) in lines.take(args.limit) {
                let item = ChoiceItem::parse(line, at + 1);
                choices.push(item.map_err(|error| format!("`{}`, {error}", path.display()))?);
            }
        }
        Ok(Self {
            text: read(text)?,
            choices,
            problems: problems(&args.gsm8k, args.limit)?,
            shots: problems(&args.shots, 5)?,
        })
    }
}

/// Adds what one model is worth to the report.
fn measure(
    args: &Args,
    name: &str,
    lm: &Pretrained,
    reference: Option<&Pretrained>,
    data: &Data,
    report: &mut Report,
) -> Result<()> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {prefix}: {msg}")?);
    bar.set_prefix(name.to_string());
    let step = |what: &'static str| {
        bar.set_message(what);
        bar.tick();
    };
    let mut add = |protocol: &str, metric: &str, estimate: Estimate, unit: &str, is_loss: bool| {
        report.measurements.push(Measurement {
            protocol: protocol.into(),
            metric: metric.into(),
            model: name.into(),
            estimate,
            unit: unit.into(),
            lower_is_better: is_loss,
        });
    };
    let bootstrap = Bootstrap::new().with_seed(args.seed);
    let model = &lm.model;
    let device: Device = model.device();
    let max_len = model.config().max_seq_len();

    step("windows of text");
    let plain = data.text.replace(&args.separator, "\n");
    let windows = lm.windows(&plain, args.seq_len)?.take(args.limit);
    let batches = windows.batches((1024 / args.seq_len).max(1), &device);
    let losses = bootstrap.mean(&window_losses(model, &batches)?)?;
    let protocol = format!("gptq-{}", args.seq_len);
    add(
        &protocol,
        "perplexity",
        losses.map(f64::exp),
        "windows",
        true,
    );
    add(&protocol, "NLL, nats", losses, "windows", true);

    step("llama.cpp's windows");
    let n_ctx = args.n_ctx.unwrap_or(512.min(max_len));
    let special = lm.special_tokens()?;
    let bos = special
        .bos
        .as_ref()
        .filter(|_| special.add_bos)
        .map(|bos| bos.id);
    let mut tokens = lm.encode_text(&plain)?;
    tokens.truncate(n_ctx.saturating_mul(args.limit));
    let estimate = llama_cpp_perplexity(model, &tokens, n_ctx, bos, &bootstrap, &device)?;
    add(
        &format!("llama.cpp-{n_ctx}"),
        "perplexity",
        estimate,
        "windows",
        true,
    );

    step("documents");
    let documents = data.text.split(&args.separator).map(str::trim);
    let documents = documents
        .filter(|document| !document.is_empty())
        .take(args.limit);
    let documents = documents
        .map(|document| Ok((document, lm.encode(document)?)))
        .collect::<Result<Vec<_>>>()?;
    let scored = word_losses(model, &documents, lm.first_token()?, max_len, &device)?;
    add(
        "word",
        "word perplexity",
        word_perplexity(&scored, &bootstrap)?,
        "documents",
        true,
    );
    add(
        "word",
        "byte perplexity",
        byte_perplexity(&scored, &bootstrap)?,
        "documents",
        true,
    );
    add(
        "word",
        "bits per byte",
        bits_per_byte(&scored, &bootstrap)?,
        "documents",
        true,
    );

    step("confidence of tokens");
    let items = confidences(model, &batches)?;
    add(
        "tokens",
        "accuracy",
        share(&bootstrap, items.iter().map(|(_, right)| *right))?,
        "tokens",
        false,
    );
    add("tokens", "ECE", ece(&bootstrap, &items)?, "tokens", true);

    if !data.choices.is_empty() {
        step("multiple choice");
        let scores = choices(lm, &data.choices)?;
        let right = scores.iter().map(|score| score.is_correct);
        let right_norm = scores.iter().map(|score| score.is_correct_norm);
        add(
            "choices",
            "acc",
            share(&bootstrap, right)?,
            "questions",
            false,
        );
        add(
            "choices",
            "acc_norm",
            share(&bootstrap, right_norm)?,
            "questions",
            false,
        );
        let items: Vec<_> = scores.iter().map(|score| score.confidence()).collect();
        add(
            "choices",
            "ECE",
            ece(&bootstrap, &items)?,
            "questions",
            true,
        );
    }

    if !data.problems.is_empty() {
        step("word problems");
        let mut n_done = 0;
        let answers = gsm8k::answers(lm, &data.shots, &data.problems, args.max_new_tokens, |_| {
            n_done += 1;
            bar.set_message(format!("word problem {n_done} of {}", data.problems.len()));
            bar.tick();
        })?;
        let protocol = format!("gsm8k, {} shots", data.shots.len());
        let strict = share(&bootstrap, answers.iter().map(|answer| answer.strict))?;
        let flexible = share(&bootstrap, answers.iter().map(|answer| answer.flexible))?;
        add(&protocol, "exact match, strict", strict, "problems", false);
        add(
            &protocol,
            "exact match, flexible",
            flexible,
            "problems",
            false,
        );
    }

    if let Some(reference) = reference {
        step("comparison with full precision");
        let comparison = compare(model, &reference.model, &batches)?;
        let divergence = bootstrap.mean(&comparison.divergence)?;
        let same_top = bootstrap.mean(&comparison.same_top)?;
        add(
            "full precision",
            "KL divergence, nats",
            divergence,
            "windows",
            true,
        );
        add(
            "full precision",
            "same top token",
            same_top,
            "windows",
            false,
        );
    }
    bar.finish_and_clear();
    Ok(())
}

/// How many are right.
fn share(bootstrap: &Bootstrap, right: impl Iterator<Item = bool>) -> Result<Estimate> {
    let right: Vec<f64> = right.map(|right| f64::from(u8::from(right))).collect();
    Ok(bootstrap.mean(&right)?)
}

/// The expected calibration error.
fn ece(bootstrap: &Bootstrap, items: &[(f64, bool)]) -> Result<Estimate> {
    // What is wrong with an item is said before items are drawn.
    calibration(items, CALIBRATION_BINS)?;
    let of = |drawn: &[usize]| {
        let drawn: Vec<_> = drawn.iter().map(|&at| items[at]).collect();
        calibration(&drawn, CALIBRATION_BINS).map_or(f64::NAN, |found| found.ece)
    };
    Ok(bootstrap.statistic(items.len(), of)?)
}
