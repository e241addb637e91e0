//! Evaluates models by every protocol, and writes the results as JSON, Markdown and a chart.
//!
//! `cargo run --release --example evaluate` does so with the embedded model, in full precision and
//! quantized to 4, 3 and 2 bits; `-- --help` lists the options for other models.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Parser};
use evaluate::{
    AddBos, Bootstrap, CALIBRATION_BINS, ChoiceItem, Estimate, Measurement, Report, bits_per_byte,
    byte_perplexity, calibration_error, choices, compare, confidences, gsm8k, llama_cpp_perplexity,
    window_losses, word_losses, word_perplexity,
};
use examples::arguments::{BitsArg, SeqLenArg, at_least, distinct_names};
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::dtype::DtypeArg;
use examples::embedded::EmbeddedArg;
use examples::outcome::{Result, exit, write_files};
use examples::texts::{evaluation_batch, read};
use examples::{interrupt, memory, println};
use indicatif::{ProgressBar, ProgressStyle};
use instruct::read_records;
use models::{Model, Pretrained};
use peft::{Adapters, Batch};
use quant_core::{Quantizer, Rtn};

/// Evaluate models by every protocol, each result with its confidence interval
///
/// Text is measured as perplexities in several protocols, and against the first model. Without options, the
/// embedded model is measured in full precision and at 4, 3 and 2 bits, on text and questions that the
/// program makes.
#[derive(Parser)]
#[command(
    version,
    group = ArgGroup::new("data").args(["text", "choices", "gsm8k"]).multiple(true),
    mut_arg("bits", |arg| arg.help(
        "Bits to quantize the first model to, in groups of 32, for more models: `4 3 2` or `4,3,2` \
         [default: 4 3 2 of the embedded model]"
    )),
    after_help = "\
Examples:
  evaluate --model Llama-2-7b-hf --choices arc.jsonl --bits 4 3
  evaluate --model Llama-2-7b-loftq/base --adapters Llama-2-7b-loftq/adapter-tuned --text stories.txt
  evaluate --model Llama-2-7b-hf --model Llama-2-7b-4bit-task/4-bit --text stories.txt --seq-len 2048 \\
           --separator '<|endoftext|>' --choices arc.jsonl --gsm8k test.jsonl --shots train.jsonl --out report"
)]
struct Args {
    /// Hugging Face directory of a model [default: the embedded LLaMA]. May be given several times, for
    /// models with the same tokenizer; the others are compared with the first
    #[arg(
        long,
        value_name = "DIR",
        requires = "data",
        conflicts_with = "embedded"
    )]
    model: Vec<PathBuf>,
    /// Directory of adapters for the first model, of this program or of PEFT: one more model. May be given
    /// several times
    #[arg(long, value_name = "DIR", requires = "model")]
    adapters: Vec<PathBuf>,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    dtype: DtypeArg,
    #[command(flatten)]
    bits: BitsArg,
    /// Held-out text, documents separated by --separator
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Text between two documents of --text
    #[arg(long, value_name = "TEXT", default_value = "<|endoftext|>",
          value_parser = NonEmptyStringValueParser::new())]
    separator: String,
    /// Whether the documents of the protocol `word` begin with the token that begins texts [default: as the
    /// tokenizer does it]
    #[arg(long, value_name = "BOOL")]
    add_bos_token: Option<bool>,
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

/// The data that models are evaluated on, as far as it is asked for.
struct Data {
    text: Option<String>,
    choices: Option<Vec<ChoiceItem>>,
    problems: Option<Vec<gsm8k::Problem>>,
    shots: Vec<gsm8k::Problem>,
}

impl Args {
    fn add_bos(&self) -> AddBos {
        match self.add_bos_token {
            None => AddBos::AsTokenizer,
            Some(true) => AddBos::Always,
            Some(false) => AddBos::Never,
        }
    }
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
    let bits = args.bits.or(if args.model.is_empty() {
        &[4, 3, 2]
    } else {
        &[]
    });
    let rounded = |bits| Rtn::new().with_bits(bits).with_group_size(32);
    for &bits in &bits {
        rounded(bits).format()?;
    }
    let data = Data::read(args)?;
    let reference = models::load_as(&sources[0], &device, args.dtype.float())?;
    let max = reference.model.config().max_seq_len();
    let n_ctx = args.n_ctx.unwrap_or(512.min(max));
    if n_ctx > max && data.text.is_some() {
        let seq_len = n_ctx;
        return Err(models::Error::Text(models::TextError::SeqLen { seq_len, max }).into());
    }
    let names = if args.model.is_empty() {
        vec!["full precision".into()]
    } else {
        let dirs: Vec<PathBuf> = args.model.iter().chain(&args.adapters).cloned().collect();
        let mut names = distinct_names(&dirs);
        for name in &mut names[args.model.len()..] {
            *name = format!("adapters {name}");
        }
        names
    };
    let mut others = Vec::new();
    for (source, name) in sources.iter().zip(&names).skip(1) {
        let other = models::load_as(source, &device, args.dtype.float())?;
        // Checked before anything is measured: losses of tokens are compared.
        if let Some(text) = &data.text
            && other.encode(text)? != reference.encode(text)?
        {
            return Err(format!(
                "`{name}` and `{}` have different tokenizers; evaluate them one at a time",
                names[0]
            )
            .into());
        }
        others.push((name, other));
    }
    for (dir, name) in args.adapters.iter().zip(&names[args.model.len()..]) {
        let mut adapted = reference.clone();
        let adapters = Adapters::open_with_base(dir, &mut adapted.model)?;
        peft::activate(&mut adapted.model, &adapters)?;
        others.push((name, adapted));
    }
    let bootstrap = Bootstrap::new().with_seed(args.seed);
    let report = settings(args, &data, &names, &bits, n_ctx, &bootstrap);

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
    let files = [
        ("report.json", report.to_json()),
        ("report.md", report.to_markdown()),
        ("report.svg", report.to_svg()),
    ];
    write_files(output, &files)?;
    println!("{report}\nreport: {}", args.out.display());
    println!("peak memory: {}", memory::peak());
    ended
}

/// A report with every setting of what is measured.
fn settings(
    args: &Args,
    data: &Data,
    names: &[String],
    bits: &[usize],
    n_ctx: usize,
    bootstrap: &Bootstrap,
) -> Report {
    let made = || "generated by the program".into();
    let path = |path: &Option<PathBuf>| {
        let path = path.as_ref().map(|path| path.display().to_string());
        path.unwrap_or_else(made)
    };
    let widths = bits.iter().map(usize::to_string).collect::<Vec<_>>();
    let widths = format!("{}, in groups of 32, of the first model", widths.join(", "));
    let confidence = 100.0 * bootstrap.confidence();
    let intervals = format!(
        "{confidence} %, {} bootstrap resamples",
        bootstrap.resamples()
    );
    let program = format!("evaluate {}", env!("CARGO_PKG_VERSION"));
    let of_text = |value: String| data.text.as_ref().map(|_| value);
    let of_problems = |value: String| data.problems.as_ref().map(|_| value);

    let mut report = Report::new("Evaluation").with_setting("program", program);
    if args.model.is_empty() {
        report = report.with_setting("model", args.embedded.name());
    }
    for (name, dir) in names.iter().zip(&args.model) {
        report = report.with_setting(format!("model `{name}`"), dir.display());
    }
    for (name, dir) in names.iter().skip(args.model.len()).zip(&args.adapters) {
        report = report.with_setting(name, dir.display());
    }
    let settings = [
        ("bits", (!bits.is_empty()).then_some(widths)),
        ("device", Some(args.device.name.clone())),
        ("dtype", Some(args.dtype.name.name().into())),
        ("text", of_text(path(&args.text))),
        ("separator", of_text(format!("{:?}", args.separator))),
        (
            "add-bos-token",
            args.add_bos_token.and_then(|add| of_text(add.to_string())),
        ),
        ("seq-len", of_text(args.cut.seq_len.to_string())),
        ("n-ctx", of_text(n_ctx.to_string())),
        (
            "choices",
            data.choices.as_ref().map(|_| path(&args.choices)),
        ),
        ("gsm8k", of_problems(path(&args.gsm8k))),
        ("shots", args.shots.as_ref().map(|_| path(&args.shots))),
        (
            "max-new-tokens",
            of_problems(args.max_new_tokens.to_string()),
        ),
        ("limit", Some(args.limit.to_string())),
        ("confidence intervals", Some(intervals)),
        ("seed", Some(args.seed.to_string())),
        ("out", Some(args.out.display().to_string())),
    ];
    for (name, value) in settings {
        if let Some(value) = value {
            report = report.with_setting(name, value);
        }
    }
    report
}

impl Data {
    fn read(args: &Args) -> Result<Self> {
        if args.model.is_empty() {
            let questions = corpus::questions(args.limit, 30).into_iter();
            let item = |(context, choices, answer)| ChoiceItem {
                context,
                choices,
                answer,
            };
            return Ok(Self {
                // Each paragraph is a document.
                text: Some(corpus::text(Dialect::Plain, 50_000, 12).replace('\n', &args.separator)),
                choices: Some(questions.map(item).collect()),
                problems: None,
                shots: Vec::new(),
            });
        }
        let problems = |path: &PathBuf, n: usize| -> Result<Vec<gsm8k::Problem>> {
            let records = read_records(path)?;
            let problems = records.iter().take(n).map(gsm8k::Problem::of);
            Ok(problems.collect::<evaluate::Result<_>>()?)
        };
        let choices = |path: &PathBuf| -> Result<Vec<ChoiceItem>> {
            let records = read_records(path)?;
            let items = records.iter().take(args.limit).map(ChoiceItem::of);
            Ok(items.collect::<evaluate::Result<_>>()?)
        };
        let of_gsm8k = args.gsm8k.as_ref().map(|path| problems(path, args.limit));
        let shots = args.shots.as_ref().map(|path| problems(path, 5));
        Ok(Self {
            text: args.text.as_deref().map(read).transpose()?,
            choices: args.choices.as_ref().map(choices).transpose()?,
            problems: of_gsm8k.transpose()?,
            shots: shots.transpose()?.unwrap_or_default(),
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
            let mut batches = Vec::new();
            if let Some(text) = &self.data.text {
                step("windows of text");
                let plain = text.replace(&self.args.separator, "\n");
                let seq_len = self.args.cut.seq_len;
                let windows = lm.windows(&plain, seq_len)?.take(self.args.limit);
                batches = windows.batches(evaluation_batch(seq_len), &lm.model.device());
                self.windows(&lm.model, &batches, &mut column)?;
                step("llama.cpp's windows");
                self.llama_cpp(lm, &plain, &mut column)?;
                step("documents");
                self.documents(lm, text, &mut column)?;
            }
            if let Some(items) = &self.data.choices {
                step("multiple choice");
                self.choices(lm, items, &mut column)?;
            }
            if let Some(problems) = &self.data.problems {
                step("word problems");
                self.problems(lm, problems, &bar, &mut column)?;
            }
            if let Some(reference) = reference.filter(|_| !batches.is_empty()) {
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

    fn documents(&self, lm: &Pretrained, text: &str, column: &mut Column) -> Result<()> {
        let documents = text.split(&self.args.separator);
        let documents = documents.filter(|document| !document.trim().is_empty());
        let documents = documents.take(self.args.limit);
        let documents: Vec<&str> = documents.collect();
        let add_bos = self.args.add_bos();
        let scored = word_losses(lm, &documents, add_bos)?;
        let protocol = match add_bos {
            AddBos::AsTokenizer => "word",
            AddBos::Always => "word, add_bos_token=true",
            AddBos::Never => "word, add_bos_token=false",
        };
        let words = word_perplexity(&scored, &self.bootstrap)?;
        let bytes = byte_perplexity(&scored, &self.bootstrap)?;
        let bits = bits_per_byte(&scored, &self.bootstrap)?;
        column.add(protocol, "word perplexity", words, "documents", true);
        column.add(protocol, "byte perplexity", bytes, "documents", true);
        column.add(protocol, "bits per byte", bits, "documents", true);
        Ok(())
    }

    fn choices(&self, lm: &Pretrained, items: &[ChoiceItem], column: &mut Column) -> Result<()> {
        let scores = choices(lm, items)?;
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

    fn problems(
        &self,
        lm: &Pretrained,
        problems: &[gsm8k::Problem],
        bar: &ProgressBar,
        column: &mut Column,
    ) -> Result<()> {
        let shots = &self.data.shots;
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
