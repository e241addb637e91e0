//! Evaluates models by every protocol, and writes the results as JSON, Markdown and a chart.
//!
//! `cargo run --release --example evaluate` does so with the embedded model, in full precision and
//! quantized to 4, 3 and 2 bits; `-- --help` lists the options for other models.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use clap::builder::NonEmptyStringValueParser;
use evaluate::{
    Bootstrap, CALIBRATION_BINS, ChoiceItem, Estimate, Measurement, Report, bits_per_byte,
    byte_perplexity, calibration_error, choices, compare, confidences, gsm8k, llama_cpp_perplexity,
    window_losses, word_losses, word_perplexity,
};
use examples::arguments::{SeqLenArg, at_least, distinct_names};
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::embedded::EmbeddedArg;
use examples::outcome::{Result, exit, write_files};
use examples::texts::{evaluation_batch, read};
use examples::{interrupt, println};
use indicatif::{ProgressBar, ProgressStyle};
use instruct::read_records;
use models::{Model, Pretrained};
use peft::Batch;
use quant_core::{Quantizer, Rtn};

/// Evaluate models by every protocol, each result with its confidence interval
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Example:
  evaluate --model Llama-2-7b-hf --model Llama-2-7b-4bit-task --text stories.txt --seq-len 2048 \\
           --separator '<|endoftext|>' --choices arc.jsonl --gsm8k test.jsonl --shots train.jsonl --out report"
)]
struct Args {
    /// Hugging Face directory of a model [default: the embedded LLaMA]. May be given several times, for
    /// models with the same tokenizer; the others are compared with the first
    #[arg(
        long,
        value_name = "DIR",
        requires = "text",
        conflicts_with = "embedded"
    )]
    model: Vec<PathBuf>,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
    /// Widths to quantize the first model to, in groups of 32, for more models
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    bits: Vec<usize>,
    /// Held-out text, documents separated by --separator
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Text between two documents
    #[arg(long, value_name = "TEXT", default_value = "<|endoftext|>",
          value_parser = NonEmptyStringValueParser::new())]
    separator: String,
    /// Multiple-choice questions, JSONL: context (or query, question), choices, answer
    #[arg(long, value_name = "FILE", requires = "model")]
    choices: Option<PathBuf>,
    /// Word problems, JSONL: question, answer
    #[arg(long, value_name = "FILE", requires = "model")]
    gsm8k: Option<PathBuf>,
    /// Solved problems for the prompt, of which the first five are used
    #[arg(long, value_name = "FILE", requires = "gsm8k")]
    shots: Option<PathBuf>,
    #[command(flatten)]
    cut: SeqLenArg,
    /// Tokens in a window of llama.cpp's protocol [default: 512, or the model's maximum if it is less]
    #[arg(long, value_name = "N")]
    n_ctx: Option<usize>,
    /// Maximum number of windows, documents, questions and problems
    #[arg(long, value_name = "N", default_value = "200", value_parser = at_least::<1>)]
    limit: usize,
    /// Maximum number of tokens of an answer to a word problem
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Seed of the resampling for the confidence intervals
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for report.json, report.md and report.svg
    #[arg(long, value_name = "DIR", default_value = "evaluate")]
    out: PathBuf,
}

/// The data that models are evaluated on.
struct Data {
    text: String,
    choices: Vec<ChoiceItem>,
    problems: Vec<gsm8k::Problem>,
    shots: Vec<gsm8k::Problem>,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let output = interrupt::reserve(&args.out)?;
    let device = args.device.open();
    let scratch = interrupt::scratch()?;
    let mut sources = args.model.clone();
    if sources.is_empty() {
        sources.push(args.embedded.write(scratch.path())?);
    }
    let mut bits = match (args.model.is_empty(), &args.bits[..]) {
        (true, []) => vec![4, 3, 2],
        (_, bits) => bits.to_vec(),
    };
    bits.sort_unstable_by(|a, b| b.cmp(a));
    bits.dedup();
    let rounded = |bits| Rtn::new().with_bits(bits).with_group_size(32);
    for &bits in &bits {
        rounded(bits).format()?;
    }
    let data = Data::read(args)?;
    let reference = models::load(&sources[0], &device)?;
    let max = reference.model.config().max_seq_len();
    let n_ctx = args.n_ctx.unwrap_or(512.min(max));
    if n_ctx > max {
        let seq_len = n_ctx;
        return Err(models::Error::Text(models::TextError::SeqLen { seq_len, max }).into());
    }
    let names = if args.model.is_empty() {
        vec!["full precision".into()]
    } else {
        distinct_names(&args.model)
    };
    let mut others = Vec::new();
    for (source, name) in sources.iter().zip(&names).skip(1) {
        let other = models::load(source, &device)?;
        // Checked before anything is measured.
        if other.encode(&data.text)? != reference.encode(&data.text)? {
            return Err(format!(
                "`{name}` and `{}` have different tokenizers; evaluate them one at a time",
                names[0]
            )
            .into());
        }
        others.push((name, other));
    }
    let bootstrap = Bootstrap::new().with_seed(args.seed);
    let dirs: Vec<String> = args
        .model
        .iter()
        .map(|dir| dir.display().to_string())
        .collect();
    let mut report = Report::new("Evaluation");
    if dirs.is_empty() {
        report = report.with_setting("model", args.embedded.name());
    }
    for (name, dir) in names.iter().zip(&dirs) {
        report = report.with_setting(format!("model `{name}`"), dir);
    }
    let path = |path: &Option<PathBuf>| {
        path.as_ref()
            .map_or("generated by the program".into(), |path| {
                path.display().to_string()
            })
    };
    for (name, value) in [
        ("device", args.device.name.clone()),
        ("text", path(&args.text)),
        ("separator", format!("{:?}", args.separator)),
        ("choices", path(&args.choices)),
        ("limit", args.limit.to_string()),
        (
            "confidence intervals",
            format!(
                "{} %, {} bootstrap resamples",
                100.0 * bootstrap.confidence(),
                bootstrap.resamples()
            ),
        ),
        ("seed", args.seed.to_string()),
    ] {
        report = report.with_setting(name, value);
    }
    if args.gsm8k.is_some() {
        report = report.with_setting("problems", path(&args.gsm8k));
        report = report.with_setting("shots", path(&args.shots));
    }

    let mut measured = Measured {
        args,
        data: &data,
        bootstrap,
        n_ctx,
        report,
    };
    let mut run = || -> Result<()> {
        measured.add(&names[0], &reference, None)?;
        for &bits in &bits {
            let mut lm = reference.clone();
            models::quantize(&mut lm.model, &rounded(bits), &[], |_| {})?;
            measured.add(&format!("{bits} bits, groups of 32"), &lm, Some(&reference))?;
        }
        for (name, lm) in &others {
            measured.add(name, lm, Some(&reference))?;
        }
        Ok(())
    };
    let ended = run();
    let report = measured.report;
    if report.measurements.is_empty() {
        return ended;
    }

    // The measurements before a failure are kept.
    let markdown = report.to_markdown();
    let files = [
        ("report.json", report.to_json()),
        ("report.md", markdown.clone()),
        ("report.svg", report.to_svg()),
    ];
    write_files(output, &files)?;
    println!("{markdown}\nreport: {}", args.out.display());
    ended
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
                // Each paragraph is a document.
                text: corpus::text(Dialect::Plain, 50_000, 12).replace('\n', &args.separator),
                choices: questions.map(item).collect(),
                problems: Vec::new(),
                shots: Vec::new(),
            });
        };
        let problems = |path: &Option<PathBuf>, n: usize| -> Result<Vec<gsm8k::Problem>> {
            let Some(path) = path else {
                return Ok(Vec::new());
            };
            let records = read_records(path)?;
            let problems = records.iter().take(n).map(gsm8k::Problem::of);
            Ok(problems.collect::<evaluate::Result<_>>()?)
        };
        let choices = match &args.choices {
            Some(path) => read_records(path)?,
            None => Vec::new(),
        };
        let choices = choices.iter().take(args.limit).map(ChoiceItem::of);
        let choices = choices.collect::<evaluate::Result<_>>()?;
        Ok(Self {
            text: read(text)?,
            choices,
            problems: problems(&args.gsm8k, args.limit)?,
            shots: problems(&args.shots, 5)?,
        })
    }
}

/// The measurements of all models.
struct Measured<'a> {
    args: &'a Args,
    data: &'a Data,
    bootstrap: Bootstrap,
    n_ctx: usize,
    report: Report,
}

/// The measurements of one model.
struct Column<'a> {
    report: &'a mut Report,
    model: &'a str,
}

impl Column<'_> {
    fn add(&mut self, protocol: &str, metric: &str, estimate: Estimate, unit: &str, is_loss: bool) {
        self.report.measurements.push(Measurement {
            protocol: protocol.into(),
            metric: metric.into(),
            model: self.model.into(),
            estimate,
            unit: unit.into(),
            lower_is_better: is_loss,
        });
    }
}

impl Measured<'_> {
    /// Measures one model, and compares it with the reference if there is one.
    fn add(&mut self, name: &str, lm: &Pretrained, reference: Option<&Pretrained>) -> Result<()> {
        let bar = ProgressBar::new_spinner();
        bar.set_style(ProgressStyle::with_template("{spinner} {prefix}: {msg}")?);
        bar.set_prefix(name.to_string());
        let step = |message: &'static str| {
            bar.set_message(message);
            bar.tick();
        };
        let mut report = std::mem::replace(&mut self.report, Report::new(""));
        let mut column = Column {
            report: &mut report,
            model: name,
        };
        let mut run = || -> Result<()> {
            step("windows of text");
            let plain = self.data.text.replace(&self.args.separator, "\n");
            let seq_len = self.args.cut.seq_len;
            let windows = lm.windows(&plain, seq_len)?.take(self.args.limit);
            let batches = windows.batches(evaluation_batch(seq_len), &lm.model.device());
            self.windows(&lm.model, &batches, &mut column)?;
            step("llama.cpp's windows");
            self.llama_cpp(lm, &plain, &mut column)?;
            step("documents");
            self.documents(lm, &mut column)?;
            step("multiple choice");
            self.choices(lm, &mut column)?;
            step("word problems");
            self.problems(lm, &bar, &mut column)?;
            if let Some(reference) = reference {
                step("comparison with the first model");
                let found = compare(&lm.model, &reference.model, &batches)?;
                let divergence = self.bootstrap.mean(&found.divergence)?;
                let same_top = self.bootstrap.mean(&found.same_top)?;
                let protocol = "against the first model";
                column.add(protocol, "KL divergence, nats", divergence, "windows", true);
                column.add(protocol, "same top-1 token", same_top, "windows", false);
            }
            Ok(())
        };
        let ended = run();
        self.report = report;
        bar.finish_and_clear();
        ended
    }

    fn windows(&self, model: &Model, batches: &[Batch], column: &mut Column) -> Result<()> {
        let losses = self.bootstrap.mean(&window_losses(model, batches)?)?;
        let protocol = format!("gptq-{}", self.args.cut.seq_len);
        column.add(
            &protocol,
            "perplexity",
            losses.map(f64::exp),
            "windows",
            true,
        );
        column.add(&protocol, "NLL, nats", losses, "windows", true);
        // The tokens of a window are not independent: whole windows are resampled.
        let items = confidences(model, batches)?;
        let right = |items: &Vec<(f64, bool)>| items.iter().filter(|(_, right)| *right).count();
        let right: Vec<f64> = items.iter().map(|items| right(items) as f64).collect();
        let counts: Vec<f64> = items.iter().map(|items| items.len() as f64).collect();
        let accuracy = self.bootstrap.ratio(&right, &counts)?;
        column.add(&protocol, "top-1 accuracy", accuracy, "windows", false);
        let error = calibration_error(&items, CALIBRATION_BINS, &self.bootstrap)?;
        column.add(&protocol, "ECE", error, "windows", true);
        Ok(())
    }

    fn llama_cpp(&self, lm: &Pretrained, plain: &str, column: &mut Column) -> Result<()> {
        let special = lm.special_tokens()?;
        let bos = special.bos.as_ref().filter(|_| special.add_bos);
        // llama.cpp drops a newline at the end of a file.
        let mut tokens = lm.encode_text(plain.strip_suffix('\n').unwrap_or(plain))?;
        tokens.truncate(self.n_ctx.saturating_mul(self.args.limit.max(2)));
        let (bos, device) = (bos.map(|bos| bos.id), lm.model.device());
        let estimate = llama_cpp_perplexity(
            &lm.model,
            &tokens,
            self.n_ctx,
            bos,
            &self.bootstrap,
            &device,
        )?;
        let protocol = format!("llama.cpp-{}", self.n_ctx);
        column.add(&protocol, "perplexity", estimate, "windows", true);
        Ok(())
    }

    fn documents(&self, lm: &Pretrained, column: &mut Column) -> Result<()> {
        let documents = self.data.text.split(&self.args.separator);
        let documents = documents.filter(|document| !document.trim().is_empty());
        let documents = documents.take(self.args.limit);
        let documents = documents
            .map(|document| Ok((document, lm.encode(document)?)))
            .collect::<Result<Vec<_>>>()?;
        let (prefix, max_len) = (lm.first_token()?, lm.model.config().max_seq_len());
        let scored = word_losses(&lm.model, &documents, prefix, max_len, &lm.model.device())?;
        let words = word_perplexity(&scored, &self.bootstrap)?;
        let bytes = byte_perplexity(&scored, &self.bootstrap)?;
        let bits = bits_per_byte(&scored, &self.bootstrap)?;
        column.add("word", "word perplexity", words, "documents", true);
        column.add("word", "byte perplexity", bytes, "documents", true);
        column.add("word", "bits per byte", bits, "documents", true);
        Ok(())
    }

    fn choices(&self, lm: &Pretrained, column: &mut Column) -> Result<()> {
        if self.data.choices.is_empty() {
            return Ok(());
        }
        let scores = choices(lm, &self.data.choices)?;
        let right = self.share(scores.iter().map(|score| score.is_correct))?;
        let right_norm = self.share(scores.iter().map(|score| score.is_correct_norm))?;
        let items: Vec<_> = scores
            .iter()
            .map(|score| vec![score.confidence()])
            .collect();
        let error = calibration_error(&items, CALIBRATION_BINS, &self.bootstrap)?;
        column.add("choices", "acc", right, "questions", false);
        column.add("choices", "acc_norm", right_norm, "questions", false);
        column.add("choices", "ECE", error, "questions", true);
        Ok(())
    }

    fn problems(&self, lm: &Pretrained, bar: &ProgressBar, column: &mut Column) -> Result<()> {
        let Data {
            problems, shots, ..
        } = self.data;
        if problems.is_empty() {
            return Ok(());
        }
        let mut n_done = 0;
        let answers = gsm8k::answers(lm, shots, problems, self.args.max_new_tokens, |_| {
            n_done += 1;
            bar.set_message(format!("word problem {n_done} of {}", problems.len()));
            bar.tick();
        })?;
        let protocol = format!("gsm8k, {} shots", shots.len());
        let strict = self.share(answers.iter().map(|answer| answer.strict))?;
        let flexible = self.share(answers.iter().map(|answer| answer.flexible))?;
        column.add(&protocol, "exact match, strict", strict, "problems", false);
        column.add(
            &protocol,
            "exact match, flexible",
            flexible,
            "problems",
            false,
        );
        Ok(())
    }

    /// Estimates the share of items that are right.
    fn share(&self, right: impl Iterator<Item = bool>) -> Result<Estimate> {
        let right: Vec<f64> = right.map(|right| f64::from(u8::from(right))).collect();
        Ok(self.bootstrap.mean(&right)?)
    }
}
