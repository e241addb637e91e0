//! Starts adapters where they make up for the quantization error: with every method, and compares
//! perplexities before and after some tuning; or with one, shows what every layer gained, and saves the
//! base and a PEFT directory of its adapters.
//!
//! `cargo run --release --example loftq_init` does the first with the model that the project ships;
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
use examples::table;
use examples::tuning::{Result, exit, max_difference};
use indicatif::{ProgressBar, ProgressStyle};
use loftq::{Apiq, ApiqBlock, Initialization, InitializedLayer, Loftq, LqLora, Pissa, Qera, Rilq};
use models::{CheckpointFormat, Model, Pretrained};
use peft::{Adapters, Batch, FitConfig, Lora, PerLayer, Recipe};
use quant_core::{NormalFloat, Optq, Quantizer, Rtn, allocate};

/// Start adapters where they make up for the quantization error
///
/// Without options, the model that comes with the program is initialized by every method, at 4, 3 and 2
/// bits, in groups of 32 and 64, and tuned a little on text of its own kind.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Example:
  loftq_init --model Llama-2-7b-hf --train wikitext.txt --eval wikitext-test.txt --seq-len 1024 \\
             --method loftq --grid nf --bits 4 --group-size 64 --rank 64 --alpha 16 \\
             --out Llama-2-7b-loftq --format bitsandbytes"
)]
struct Args {
    /// Hugging Face directory of a model [default: one that comes with the program]
    #[arg(long, value_name = "DIR", requires = "train", requires = "eval")]
    model: Option<PathBuf>,
    /// Text to calibrate and to tune on
    #[arg(long, value_name = "FILE", requires = "model")]
    train: Option<PathBuf>,
    /// Text to evaluate on, another one
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Methods, one or several
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',',
          default_values_t = Name::value_variants().to_vec())]
    method: Vec<Name>,
    /// Bits of a weight, one or several: 2, 3, 4, 8
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [4, 3, 2])]
    bits: Vec<usize>,
    /// Weights that share a scale, one or several
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [32, 64])]
    group_size: Vec<usize>,
    /// Grid of the base
    #[arg(long, value_enum, default_value_t = GridName::Affine)]
    grid: GridName,
    /// Rank of the adapters
    #[arg(long, value_name = "N", default_value_t = 8)]
    rank: usize,
    /// Alpha: what is added is multiplied by alpha / rank [default: the rank]
    #[arg(long, value_name = "X")]
    alpha: Option<f32>,
    /// Bits of a weight on average, scales and zeros in f32 too: LQ-LoRA chooses from --bits and
    /// --group-size for each layer
    #[arg(long, value_name = "X")]
    average_bits: Option<f64>,
    /// Windows to calibrate on, for the methods that look at inputs
    #[arg(long, value_name = "N", default_value_t = 64)]
    samples: usize,
    /// Tokens in a window
    #[arg(long, value_name = "N", default_value = "128", value_parser = seq_len)]
    seq_len: usize,
    /// Optimizer steps of the tuning that is compared; 0 for none
    #[arg(long, value_name = "N", default_value_t = 30)]
    steps: usize,
    /// Windows in a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Learning rate of the tuning, the highest of a cosine
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    lr: f64,
    /// Windows to evaluate on [default: all]
    #[arg(long, value_name = "N")]
    eval_windows: Option<usize>,
    /// Seeds, one or several: of the adapters, and of the choice and the order of windows
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [0])]
    seed: Vec<u64>,
    /// New directory for `base`, `adapter` and `report.json`; for one method and one seed
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What the base is saved as
    #[arg(long, value_enum, default_value_t = Format::QuantCore)]
    format: Format,
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

fn seq_len(value: &str) -> std::result::Result<usize, String> {
    match value.parse() {
        Ok(n) if n > 1 => Ok(n),
        _ => Err("a number of at least 2".into()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Adapters that add nothing
    Qlora,
    /// Quantizing and factoring in turn
    Loftq,
    /// The largest singular values of the weight
    Pissa,
    /// Factoring and quantizing in turn, weighed by the Fisher information
    LqLora,
    /// The least error of a layer's output
    Qera,
    /// The same after OPTQ; uniform grids only
    Cloq,
    /// Learned ranges and adapters, layer by layer; uniform grids only
    Apiq,
    /// The same block by block
    ApiqBlock,
    /// All adapters tuned together to the dense model's last hidden state
    Rilq,
}

impl Name {
    fn title(self) -> &'static str {
        match self {
            Self::Qlora => "QLoRA",
            Self::Loftq => "LoftQ",
            Self::Pissa => "PiSSA",
            Self::LqLora => "LQ-LoRA",
            Self::Qera => "QERA",
            Self::Cloq => "CLoQ",
            Self::Apiq => "ApiQ-lw",
            Self::ApiqBlock => "ApiQ-bw",
            Self::Rilq => "RILQ",
        }
    }

    fn method(self, lora: Lora) -> Box<dyn Initialization<Model>> {
        match self {
            Self::Qlora => Box::new(lora),
            Self::Loftq => Box::new(Loftq::new(lora)),
            Self::Pissa => Box::new(Pissa::new(lora)),
            Self::LqLora => Box::new(lq_lora(lora)),
            Self::Qera | Self::Cloq => Box::new(Qera::new(lora)),
            // Rates for a model of a million parameters, and for few steps.
            Self::Apiq => Box::new(Apiq::new(lora).with_learning_rates(1e-2, 5e-3)),
            Self::ApiqBlock => Box::new(ApiqBlock::new(lora).with_learning_rates(1e-2, 5e-3)),
            Self::Rilq => {
                let fit = FitConfig::new()
                    .with_learning_rate(3e-3)
                    .with_steps(Some(40))
                    .with_seed(lora.seed());
                Box::new(Rilq::new(lora).with_fit(fit))
            }
        }
    }

    fn quantizer(self, grid: GridName, bits: usize, group_size: usize) -> Box<dyn Quantizer> {
        let symmetric = grid == GridName::Symmetric;
        match (grid, self) {
            (GridName::Nf, _) => {
                let nf = NormalFloat::new().with_bits(bits);
                Box::new(nf.with_block_size(group_size))
            }
            (_, Self::Cloq) => {
                let optq = Optq::new().with_bits(bits).with_group_size(group_size);
                Box::new(optq.with_symmetric(symmetric))
            }
            _ => {
                let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
                Box::new(rtn.with_symmetric(symmetric))
            }
        }
    }

    fn fits(self, grid: GridName) -> bool {
        let uniform = matches!(self, Self::Cloq | Self::Apiq | Self::ApiqBlock);
        grid != GridName::Nf || !uniform
    }

    /// Whether it looks at text.
    fn looks(self) -> bool {
        !matches!(self, Self::Qlora | Self::Loftq | Self::Pissa)
    }
}

fn lq_lora(lora: Lora) -> LqLora {
    LqLora::new(lora).with_fisher(true)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GridName {
    /// Uniform, with zero-points
    Affine,
    /// Uniform, without
    Symmetric,
    /// Normal floats: NF4, NF3, NF2
    Nf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// The workspace's own, which holds every grid
    QuantCore,
    /// bitsandbytes, for transformers and PEFT: normal floats of 4 bits
    Bitsandbytes,
}

/// The texts of one seed.
struct Texts {
    calibration: Vec<Batch>,
    train: Vec<Batch>,
    eval: Vec<Batch>,
}

impl Texts {
    fn new(args: &Args, lm: &Pretrained, seed: u64, device: &Device) -> Result<Self> {
        let read = |path: &Option<PathBuf>, n_chars, seed| match path {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|error| format!("cannot read `{}`: {error}", path.display())),
            None => Ok(corpus::text(Dialect::Plain, n_chars, seed)),
        };
        let (train, eval) = (
            read(&args.train, 400_000, 20)?,
            read(&args.eval, 25_000, 12)?,
        );
        let windows = |text: &str, option: &str| {
            let windows = lm.windows(text, args.seq_len);
            windows.map_err(|error| format!("the {option} text: {error}"))
        };
        let train = windows(&train, "--train")?.shuffled(seed);
        let eval = windows(&eval, "--eval")?.take(args.eval_windows.unwrap_or(usize::MAX));
        Ok(Self {
            calibration: train.clone().take(args.samples).batches(args.batch, device),
            train: train.batches(args.batch, device),
            eval: eval.batches((1024 / args.seq_len).max(1), device),
        })
    }
}

/// One model, initialized and tuned.
#[derive(Clone, Debug)]
struct Run {
    method: Name,
    bits: usize,
    group_size: usize,
    /// Perplexity as it starts.
    before: f64,
    /// Perplexity after tuning.
    after: f64,
    /// Seconds of the initialization.
    seconds: f64,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    for (option, n) in [
        ("--samples", args.samples),
        ("--batch", args.batch),
        ("--eval-windows", args.eval_windows.unwrap_or(1)),
    ] {
        if n == 0 {
            return Err(format!("{option} is 0; it must be at least 1").into());
        }
    }
    let single = args.method.len() == 1 && args.seed.len() == 1;
    let several = args.bits.len() * args.group_size.len() > 1;
    if args.average_bits.is_some() && (args.method != [Name::LqLora] || !single) {
        return Err("--average-bits is for --method lq-lora and one --seed".into());
    }
    if !args.method.iter().any(|method| method.fits(args.grid)) {
        return Err("these methods need a uniform grid".into());
    }
    if args.out.is_some() && (!single || several && args.average_bits.is_none()) {
        return Err(
            "--out takes one --method, and one each of --bits, --group-size, --seed".into(),
        );
    }
    for &method in &args.method {
        for (&bits, &group_size) in pairs(&args.bits, &args.group_size) {
            method.quantizer(args.grid, bits, group_size).format()?;
        }
    }
    if args.steps > 0 {
        fit_config(args, 0).check()?;
    }
    if let Some(out) = &args.out {
        tensor_files::check_output(out)?;
    }
    let device = args.device.open();
    let scratch = tempfile::tempdir()?;
    let source = args.embedded.or(args.model.as_ref(), scratch.path())?;
    match single && (!several || args.average_bits.is_some()) {
        true => one(args, &source, &device),
        false => compare(args, &source, &device),
    }
}

fn pairs<'a, A, B>(a: &'a [A], b: &'a [B]) -> impl Iterator<Item = (&'a A, &'a B)> {
    a.iter().flat_map(|a| b.iter().map(move |b| (a, b)))
}

fn lora(args: &Args, seed: u64) -> Lora {
    let alpha = args.alpha.unwrap_or(args.rank as f32);
    Lora::new(args.rank).with_alpha(alpha).with_seed(seed)
}

fn fit_config(args: &Args, seed: u64) -> FitConfig {
    FitConfig::new()
        .with_learning_rate(args.lr)
        .with_steps(Some(args.steps))
        .with_warmup_steps(args.steps / 20)
        .with_seed(seed)
}

/// One method: what each layer gained, and the directories.
fn one(args: &Args, source: &Path, device: &Device) -> Result<()> {
    let (name, seed) = (args.method[0], args.seed[0]);
    let mut lm = models::load(source, device)?;
    let texts = Texts::new(args, &lm, seed, device)?;
    let full = perplexity(&lm.model, &texts.eval)?.value();
    let recipe: Box<dyn Recipe> = match args.average_bits {
        Some(average) => Box::new(chosen(args, average, &lm.model, &texts)?),
        None => {
            let quantizer = name.quantizer(args.grid, args.bits[0], args.group_size[0]);
            Box::new(quantizer)
        }
    };
    let method = name.method(lora(args, seed));
    let show = |layer: &InitializedLayer| {
        let (before, after) = (layer.before, layer.report.error);
        print!("{}: ", layer.report.path);
        if let Some(format) = layer.report.format {
            print!("{format}, ");
        }
        print!(
            "weight error {:.4} to {:.4}",
            before.weight.relative, after.weight.relative
        );
        if let (Some(before), Some(after)) = (before.output, after.output) {
            print!(", of the output {before:.4} to {after:.4}");
        }
        for note in &layer.report.notes {
            print!("; {note}");
        }
        println!("; round {}, {:.2} s", layer.round, layer.report.seconds);
    };
    let layers = loftq::init(&mut lm.model, &*method, &*recipe, &texts.calibration, show)?;
    let n_bytes: usize = layers.iter().map(|layer| layer.report.n_bytes).sum();
    let started = perplexity(&lm.model, &texts.eval)?.value();
    let mut base = lm.clone();
    let adapters = peft::detach(&mut base.model)?;
    let bare = perplexity(&base.model, &texts.eval)?.value();
    println!(
        "\nperplexity {full:.4} dense, {bare:.4} of the base, {started:.4} with its adapters; {n_bytes} bytes in packed layers"
    );
    if let Some(out) = &args.out {
        let again = save(args, out, &base, &adapters, &layers, device)?;
        let probe = |model: &Model| {
            let logits = peft::CausalLm::forward(model, texts.eval[0].tokens()).into_data();
            logits.convert::<f32>().try_into_vec::<f32>()
        };
        let (started, again) = (probe(&lm.model), probe(&again.model));
        let difference = max_difference(&started.expect("f32"), &again.expect("f32"));
        if difference > 1e-4 {
            return Err(format!("read again, logits differ by {difference:e}").into());
        }
        println!("read again, logits differ by {difference:e} at most");
    }
    if args.steps > 0 {
        peft::fit(&mut lm.model, &texts.train, &fit_config(args, seed), |_| {})?;
        let tuned = perplexity(&lm.model, &texts.eval)?.value();
        println!("perplexity {tuned:.4} after {} steps of tuning", args.steps);
    }
    Ok(())
}

/// Writes base and adapters as they start, and reads them again.
fn save(
    args: &Args,
    out: &Path,
    base: &Pretrained,
    adapters: &Adapters,
    layers: &[InitializedLayer],
    device: &Device,
) -> Result<Pretrained> {
    let format = match args.format {
        Format::QuantCore => CheckpointFormat::QuantCore,
        Format::Bitsandbytes => CheckpointFormat::Bitsandbytes,
    };
    std::fs::create_dir_all(out)?;
    let (to_base, to_adapter) = (out.join("base"), out.join("adapter"));
    models::save_as(base, &to_base, format)?;
    adapters.save_hf(&to_adapter, &base.model)?;
    tensor_files::write_json(&out.join("report.json"), &layers)?;
    let mut again = models::load(&to_base, device)?;
    let adapters = Adapters::load_hf(&to_adapter, &again.model)?;
    peft::activate(&mut again.model, &adapters)?;
    println!("saved: {}, {}", to_base.display(), to_adapter.display());
    Ok(again)
}

/// The bits and groups of each layer by LQ-LoRA's errors, under the budget.
fn chosen(args: &Args, average: f64, model: &Model, texts: &Texts) -> Result<PerLayer> {
    let quantizers: Vec<Box<dyn Quantizer>> = pairs(&args.bits, &args.group_size)
        .map(|(&bits, &group_size)| Name::LqLora.quantizer(args.grid, bits, group_size))
        .collect();
    let method = lq_lora(lora(args, args.seed[0]));
    let candidates: Vec<&dyn Quantizer> = quantizers.iter().map(Box::as_ref).collect();
    let layers = loftq::sensitivities(model, &method, &candidates, &texts.calibration)?;
    let n_weights: usize = (peft::Linears::linears(model).iter())
        .map(|(_, linear)| linear.weight().dims().iter().product::<usize>())
        .sum();
    let budget = (average * n_weights as f64 / 8.0) as u64;
    let costs: Vec<_> = layers.iter().map(|(_, costs)| costs.clone()).collect();
    let allocation = allocate(&costs, budget)?;
    let mut recipe = PerLayer::default();
    for ((path, _), &choice) in layers.iter().zip(&allocation.choice) {
        let (bits, group_size) = pairs(&args.bits, &args.group_size)
            .nth(choice)
            .expect("one of the candidates");
        let quantizer = Name::LqLora.quantizer(args.grid, *bits, *group_size);
        recipe.0.insert(path.clone(), quantizer);
    }
    Ok(recipe)
}

/// Every method at every width and group size.
fn compare(args: &Args, source: &Path, device: &Device) -> Result<()> {
    let clock = Instant::now();
    let lm = models::load(source, device)?;
    let methods: Vec<Name> = (args.method.iter().copied())
        .filter(|method| method.fits(args.grid))
        .collect();
    let n_runs = args.seed.len() * args.bits.len() * args.group_size.len() * methods.len();
    let bar = ProgressBar::new(n_runs as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len}, {eta} left, {msg}",
    )?);
    let mut runs = Vec::new();
    let mut full = f64::NAN;
    for &seed in &args.seed {
        let texts = Texts::new(args, &lm, seed, device)?;
        full = perplexity(&lm.model, &texts.eval)?.value();
        for (&bits, &group_size) in pairs(&args.bits, &args.group_size) {
            for &method in &methods {
                bar.set_message(format!("{bits} bits, {}", method.title()));
                let quantizer = method.quantizer(args.grid, bits, group_size);
                let calibration = match method.looks() {
                    true => &texts.calibration[..],
                    false => &[],
                };
                let mut model = lm.model.clone();
                let clock = Instant::now();
                let initialization = method.method(lora(args, seed));
                loftq::init(
                    &mut model,
                    &*initialization,
                    &quantizer,
                    calibration,
                    |_| {},
                )?;
                let seconds = clock.elapsed().as_secs_f64();
                let before = perplexity(&model, &texts.eval)?.value();
                let mut after = before;
                if args.steps > 0 {
                    peft::fit(&mut model, &texts.train, &fit_config(args, seed), |_| {})?;
                    after = perplexity(&model, &texts.eval)?.value();
                }
                runs.push(Run {
                    method,
                    bits,
                    group_size,
                    before,
                    after,
                    seconds,
                });
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();

    for (&group_size, &bits) in pairs(&args.group_size, &args.bits) {
        let mut rows = vec![["method", "start", "tuned", "seconds"].map(String::from)];
        for &method in &methods {
            let of = |value: fn(&Run) -> f64| {
                let values = runs.iter().filter(|run| {
                    (run.method, run.bits, run.group_size) == (method, bits, group_size)
                });
                spread(&values.map(value).collect::<Vec<_>>())
            };
            rows.push([
                method.title().into(),
                of(|run| run.before),
                of(|run| run.after),
                of(|run| run.seconds),
            ]);
        }
        println!(
            "{bits} bits, groups of {group_size}\n\n{}",
            table::markdown(&rows)
        );
    }
    println!(
        "perplexity, protocol gptq, {full:.4} dense; rank {}, {} steps of tuning at {:e}; mean and spread of seeds {:?}; {:.0} s",
        args.rank,
        args.steps,
        args.lr,
        args.seed,
        clock.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The mean, and how far the values are from it.
fn spread(values: &[f64]) -> String {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let digits = if mean < 100.0 { 3 } else { 0 };
    match values {
        [_] => format!("{mean:.digits$}"),
        _ => {
            let far = values.iter().map(|value| (value - mean).abs());
            let far = far.fold(0.0, f64::max);
            format!("{mean:.digits$} ± {far:.digits$}")
        }
    }
}
