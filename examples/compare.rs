//! Fine-tunes one quantized model with each of ten methods under one budget of trainable parameters,
//! merges, saves and reloads it, and prints a table.
//!
//! `cargo run --release --example compare` takes some minutes; `-- --help` lists its options.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::Parser;
use examples::arguments::{BitsArg, EvalWindowsArg, GroupSize, at_least};
use examples::device::DeviceArg;
use examples::embedded::EmbeddedArg;
use examples::format::FormatName;
use examples::forms::{Form, Forms};
use examples::method::MethodName;
use examples::outcome::{Result, exit, weights_bytes, write_files};
use examples::table::{self, number};
use examples::texts::{Cut, Perplexities, Source, Texts, fit_config};
use examples::{interrupt, memory, println};
use models::{FloatType, Model, Pretrained};
use peft::{Certificate, Method, Targets};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use quant_core::{Format, Quantizer};
use serde::Serialize;

/// Fine-tune one quantized model with each of ten methods under one budget of parameters, and compare
/// the results
///
/// The methods are PEQA with and without zero-points, QA-HiRA, QA-LoRA, QA-BLoRA, LoRA, rsLoRA, DoRA,
/// QLoRA and Q-BaRA; VeRA and Bayesian-LoRA are left out.
#[derive(Parser)]
#[command(
    version,
    mut_arg("bits", |arg| arg.help(
        "Bits of a weight, one or several, as in `4 3 2` or `4,3,2`: 2, 3, 4 [default: 3]"
    ))
)]
struct Args {
    #[command(flatten)]
    bits: BitsArg,
    /// Weights that share a scale: a number, or `channel` for all weights of an output
    #[arg(long, value_name = "N", default_value = "32")]
    group_size: GroupSize,
    /// Trainable parameters that no method may exceed
    #[arg(long, value_name = "N", default_value_t = 31_000)]
    budget: usize,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value = "60", value_parser = at_least::<1>)]
    steps: usize,
    #[command(flatten)]
    eval: EvalWindowsArg,
    /// Seed of the adapters and of the order of the windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for compare.md, compare.json and compare.svg
    #[arg(long, value_name = "DIR", default_value = "compare")]
    out: PathBuf,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

/// The methods, each with a factor of its group size: with groups twice as large, PEQA's scales and
/// zero-points are as many parameters as the scales alone.
const METHODS: [(MethodName, usize); 10] = [
    (MethodName::Peqa, 1),
    (MethodName::PeqaZeros, 2),
    (MethodName::QaHira, 1),
    (MethodName::QaLora, 1),
    (MethodName::QaBLora, 1),
    (MethodName::Lora, 1),
    (MethodName::RsLora, 1),
    (MethodName::Dora, 1),
    (MethodName::QLora, 1),
    (MethodName::QBara, 1),
];

/// A tuned model in one of the forms in which it can be kept.
#[derive(Debug, Serialize)]
struct Row {
    method: String,
    format: Format,
    rank: Option<usize>,
    n_trainable: usize,
    /// Perplexities of the quantized model before tuning.
    rounded: Perplexities,
    /// Perplexities of the kept model, saved and loaded again.
    kept: Perplexities,
    /// Bytes of the files that are kept.
    n_bytes: u64,
    /// Peak resident memory of the process from quantizing to the end of tuning.
    peak_bytes: Option<u64>,
    /// From quantizing to the end of tuning.
    seconds: f64,
    /// The form: merged `exact`, `bounded`, `rounded` or `dense`, or with adapters `beside` the base.
    merge: String,
    /// The part of the adapters' change of the logits that the merge retains.
    retention: f64,
    certificate: Option<Certificate>,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    model: &'static str,
    perplexity_protocol: &'static str,
    bits: Vec<usize>,
    group_size: Option<usize>,
    budget: usize,
    steps: usize,
    seed: u64,
    device: String,
    n_bytes: u64,
    full_precision: Perplexities,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let widths = args.bits.or(&[3]);
    let runs = widths.iter().flat_map(|&bits| METHODS.map(|of| (bits, of)));
    let runs: Vec<(usize, (MethodName, usize))> = runs.collect();
    for &(bits, (method, groups)) in &runs {
        let group_size = args.group_size(groups);
        method
            .quantizer(bits, group_size, false, FormatName::QuantCore)?
            .format()?;
    }
    let output = interrupt::reserve(&args.out)?;
    let device = args.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.embedded.write(scratch.path())?;
    let lm = models::load(&source, &device)?;
    let cut = Cut {
        source: Source::Corpus,
        seq_len: 128,
        batch: 8,
        eval_windows: args.eval.limit(),
        seed: args.seed,
    };
    let texts = Texts::new(&cut, &lm, &device)?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        model: args.embedded.name(),
        perplexity_protocol: "gptq",
        bits: widths,
        group_size: args.group_size.0,
        budget: args.budget,
        steps: args.steps,
        seed: args.seed,
        device: args.device.name.clone(),
        n_bytes: weights_bytes(&source)?,
        full_precision: texts.perplexities(&lm.model)?,
        rows: Vec::new(),
    };
    for (bits, method) in runs {
        let rows = tune(args, bits, method, &lm, &texts, scratch.path(), &device)?;
        for row in &rows {
            println!(
                "{} bits, {}: {}, task perplexity {:.3}",
                bits, row.method, row.merge, row.kept.task
            );
        }
        report.rows.extend(rows);
    }
    let text = markdown(&report);
    let files = [
        ("compare.md", text.clone()),
        (
            "compare.json",
            serde_json::to_string_pretty(&report)? + "\n",
        ),
        ("compare.svg", chart(&report)),
    ];
    write_files(output, &files)?;
    println!("\n{text}\ntable, figures and chart: {}", args.out.display());
    Ok(())
}

impl Args {
    /// The group size times a factor.
    fn group_size(&self, factor: usize) -> GroupSize {
        GroupSize(self.group_size.0.map(|size| size * factor))
    }

    fn method(&self, method: MethodName, rank: usize) -> Box<dyn Method> {
        method.method(rank, rank as f32, &Targets::All, self.seed, false)
    }
}

/// Attaches the method with the largest rank that the budget and the layers allow.
fn attach(args: &Args, method: MethodName, model: &mut Model) -> Result<(Option<usize>, usize)> {
    let mut best = None;
    for rank in 1.. {
        let mut larger = model.clone();
        match peft::attach(&mut larger, &*args.method(method, rank)) {
            Ok(attached) if attached.n_trainable <= args.budget => {
                best = Some((larger, rank, attached.n_trainable));
            }
            // The rank exceeds the number of pools or outputs of a layer.
            Ok(_) => break,
            Err(peft::Error::Rank { .. } | peft::Error::Tiles { .. }) if best.is_some() => break,
            Err(error) => return Err(error.into()),
        }
        if !method.has_rank() {
            break;
        }
    }
    let Some((adapted, rank, n_trainable)) = best else {
        return Err(format!(
            "{} has more than {} trainable parameters at rank 1; raise --budget",
            method.name(),
            args.budget
        )
        .into());
    };
    *model = adapted;
    Ok((method.has_rank().then_some(rank), n_trainable))
}

/// Quantizes and tunes, and saves and reloads the result in each form that the method has.
fn tune(
    args: &Args,
    bits: usize,
    (method, groups): (MethodName, usize),
    source: &Pretrained,
    texts: &Texts,
    scratch: &Path,
    device: &Device,
) -> Result<Vec<Row>> {
    memory::reset_peak();
    let start = Instant::now();
    let quantizer =
        method.quantizer(bits, args.group_size(groups), false, FormatName::QuantCore)?;
    let mut lm = source.clone();
    lm.certificate = None;
    models::quantize(&mut lm.model, &quantizer, &[], |_| {})?;
    let mut adapted = lm.model.clone();
    let (rank, n_trainable) = attach(args, method, &mut adapted)?;
    let hidden_size = lm.model.config().hidden_size();
    let attached = args.method(method, rank.unwrap_or(1));
    let learning_rate = attached.learning_rate(hidden_size);
    let fit = fit_config(learning_rate, args.steps, args.seed);
    peft::fit(&mut adapted, &texts.train, &fit, |_, _| {})?;
    let (seconds, peak_bytes) = (start.elapsed().as_secs_f64(), memory::peak_bytes());
    let rounded = texts.perplexities(&lm.model)?;
    let dir = scratch.join(format!("{bits}-{}", method.name()));
    let forms = Forms {
        base: &lm,
        recipe: &quantizer,
        probe: &texts.task[0],
        dir: &dir,
        device,
        compute: FloatType::F32,
    };
    let forms = forms.of(&adapted, |model| texts.perplexities(model));
    let forms = forms.map_err(|error| format!("{}: {error}", method.name()))?;
    let row = |form: Form<Perplexities>| Row {
        method: method.name(),
        format: quantizer.format().expect("checked at the start"),
        rank,
        n_trainable,
        rounded,
        kept: form.kept,
        n_bytes: form.n_bytes,
        peak_bytes,
        seconds,
        merge: form.merge,
        retention: form.retention,
        certificate: form.certificate,
    };
    Ok(forms.into_iter().map(row).collect())
}

fn markdown(report: &Report) -> String {
    let header = [
        "method",
        "base",
        "rank",
        "trainable",
        "kept as",
        "task text",
        "base text",
        "retention",
        "bytes",
        "peak MiB",
        "seconds",
    ];
    let mut rows = vec![header.map(String::from)];
    let dash = || "-".to_string();
    let full = &report.full_precision;
    let plain = |method: &str, base: String, of: &Perplexities, bytes: Option<u64>| {
        [
            method.into(),
            base,
            dash(),
            dash(),
            dash(),
            number(Some(of.task), 3),
            number(of.base, 3),
            dash(),
            bytes.map_or(dash(), |bytes| bytes.to_string()),
            dash(),
            dash(),
        ]
    };
    rows.push(plain("none", "16 bits".into(), full, Some(report.n_bytes)));
    let mut bases = Vec::new();
    for row in &report.rows {
        if !bases.contains(&row.format) {
            bases.push(row.format);
            rows.push(plain("none", base(&row.format), &row.rounded, None));
        }
    }
    for row in &report.rows {
        rows.push([
            row.method.clone(),
            base(&row.format),
            row.rank.map_or(dash(), |rank| rank.to_string()),
            row.n_trainable.to_string(),
            row.merge.clone(),
            number(Some(row.kept.task), 3),
            number(row.kept.base, 3),
            number(Some(row.retention), 4),
            row.n_bytes.to_string(),
            row.peak_bytes.map_or(dash(), |n| (n >> 20).to_string()),
            format!("{:.1}", row.seconds),
        ]);
    }
    table::markdown(&rows)
}

/// The widths, `4, 3`.
fn list(bits: &[usize]) -> String {
    let bits: Vec<String> = bits.iter().map(usize::to_string).collect();
    bits.join(", ")
}

/// A short name of a format.
fn base(format: &Format) -> String {
    let grid = match format.double_quant() {
        Some(_) => "NF, double",
        None => "affine",
    };
    let group_size = format.group_size().map_or("-".into(), |n| n.to_string());
    format!("{}-bit {grid}, {group_size}", format.bits())
}

/// Draws the perplexities of the task as bars in the colour of the form that the model is kept in.
fn chart(report: &Report) -> String {
    let colour = |merge: &str| match merge {
        "exact" => RGBColor(0x1b, 0x7a, 0x43),
        "bounded" => RGBColor(0x6f, 0xb7, 0x6f),
        "rounded" => RGBColor(0xc4, 0x4e, 0x42),
        "dense" => RGBColor(0x8c, 0x8c, 0x8c),
        _ => RGBColor(0x4a, 0x78, 0xb5),
    };
    // Names, bars, and a column of values to the right of all bars.
    let (left, top, bar, width, values) = (190, 96, 24, 900, 80);
    let right = width - values;
    let height = top + bar * (report.rows.len() as i32 + 1) + 30;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32));
        let area = area.into_drawing_area();
        let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        let small = text(14);
        let at_end = small.pos(Pos::new(HPos::Right, VPos::Top));
        let draw = || -> std::result::Result<(), DrawingAreaErrorKind<_>> {
            area.fill(&WHITE)?;
            let title = format!(
                "{}: task perplexity after {} steps, {} bits, at most {} trainable parameters",
                report.model,
                report.steps,
                list(&report.bits),
                report.budget
            );
            area.draw(&Text::new(title, (20, 14), text(18)))?;
            let kinds = ["exact", "bounded", "rounded", "dense", "beside"];
            for (at, kind) in kinds.iter().enumerate() {
                let x = left + 130 * at as i32;
                let box_ = [(x, 50), (x + 14, 64)];
                area.draw(&Rectangle::new(box_, colour(kind).filled()))?;
                area.draw(&Text::new(*kind, (x + 20, 50), small.clone()))?;
            }
            // Bars begin at 1, the least perplexity.
            let perplexities = report.rows.iter().map(|row| row.kept.task);
            let (from, most) = (1.0, perplexities.fold(report.full_precision.task, f64::max));
            let scale = f64::from(right - left) / (most - from);
            let x = |value: f64| left + ((value - from) * scale) as i32;
            for (at, row) in report.rows.iter().enumerate() {
                let y = top + bar * at as i32;
                let mut label = match row.rank {
                    Some(rank) => format!("{} (rank {rank})", row.method),
                    None => row.method.clone(),
                };
                if report.bits.len() > 1 {
                    label = format!("{}: {label}", row.format.bits());
                }
                area.draw(&Text::new(label, (20, y + 2), small.clone()))?;
                let box_ = [(left, y), (x(row.kept.task), y + bar - 6)];
                area.draw(&Rectangle::new(box_, colour(&row.merge).filled()))?;
                let value = number(Some(row.kept.task), 3);
                area.draw(&Text::new(value, (width - 20, y + 2), at_end.clone()))?;
            }
            let full = x(report.full_precision.task);
            let end = top + bar * report.rows.len() as i32;
            area.draw(&PathElement::new([(full, top - 6), (full, end)], BLACK))?;
            let label = format!(
                "before tuning, full precision: {:.3}",
                report.full_precision.task
            );
            let style = if full > width / 2 { at_end } else { small };
            area.draw(&Text::new(label, (full, end + 8), style))?;
            area.present()
        };
        draw().expect("a string takes what is drawn");
    }
    svg
}
