//! Initializes adapters so that they compensate the quantization error: with every method, comparing
//! perplexities before and after some tuning; or with one method, reporting each layer, and saving the
//! base and its adapters as a PEFT directory, with one block in memory at a time if the method can.
//!
//! `cargo run --release --example loftq_init` does the first with the embedded model; `-- --help` lists
//! the options for other models.

mod saved;
mod stream;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use examples::arguments::{BitsArg, GroupSize, ModelArgs, TuneArgs, at_least};
use examples::corpus::{self, Dialect};
use examples::format::FormatName;
use examples::initialization::{
    GridName, InitName, InitPresetName, InitSettings, allocated, lq_lora, narrower,
};
use examples::outcome::{Result, exit, max_difference};
use examples::progress::Bar;
use examples::stream::initialized;
use examples::texts::{self, evaluation_batch, fit_config};
use examples::training::Watch;
use examples::{interrupt, println, table};
use loftq::InitializedLayer;
use models::{Config, Model, Plan, Windows};
use peft::{Adapters, Batch, FitConfig, Lora, PerLayer, Recipe};
use quant_core::Quantizer;
use tensor_files::Output;

use saved::{Saved, save};

/// Initialize LoRA adapters so that they compensate the quantization error
///
/// Without options, the embedded model is initialized with every method at 4, 3 and 2 bits, in groups of
/// 32 and 64, and tuned for some steps on text like its training data.
#[derive(Parser)]
#[command(
    version,
    mut_arg("rank", |arg| arg.default_value("8")),
    mut_arg("bits", |arg| arg.help(
        "Bits of a weight, one or several, as in `4 3 2` or `4,3,2`: 2, 3, 4, 8 [default: 4 3 2]"
    )),
    mut_arg("steps", |arg| arg.default_value("30").help("Optimizer steps; 0 for none")),
    after_help = "\
Example:
  loftq_init --model Llama-2-7b-hf --train wikitext.txt --eval wikitext-test.txt --seq-len 1024 \\
             --method loftq --grid nf --bits 4 --group-size 64 --rank 64 --alpha 16 \\
             --out Llama-2-7b-loftq --format bitsandbytes"
)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to calibrate and to train on [default: with --model and --out, none, for methods that look at
    /// weights alone and --steps 0]
    #[arg(long, value_name = "FILE", requires = "model")]
    train: Option<PathBuf>,
    /// Text to evaluate on [default: with --model and --out, no evaluation]
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Initializations, one or several
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',',
          default_values_t = InitName::value_variants().to_vec())]
    method: Vec<InitName>,
    /// Base, initialization and training of a paper, of which --lr changes the rate
    #[arg(long, value_enum, value_name = "NAME",
          conflicts_with_all = ["method", "bits", "group_size", "grid", "average_bits", "rank", "alpha"])]
    preset: Option<InitPresetName>,
    /// Widths; 4, 3 and 2 by default.
    #[command(flatten)]
    bits: BitsArg,
    /// Weights that share a scale, one or several: numbers, or `channel` for all weights of an output
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1..,
          default_values = ["32", "64"])]
    group_size: Vec<GroupSize>,
    /// Grid of the base
    #[arg(long, value_enum, default_value_t = GridName::Affine)]
    grid: GridName,
    /// Average bits of a weight, with scales and zero-points in f32: LQ-LoRA chooses --bits and
    /// --group-size of each layer within this budget
    #[arg(long, value_name = "X")]
    average_bits: Option<f64>,
    /// Windows to calibrate on, for the methods that need a calibration
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least::<1>)]
    samples: usize,
    #[command(flatten)]
    tune: TuneArgs,
    /// Peak learning rate of the cosine schedule [default: by the hidden size]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Seeds of the adapters, and of the choice and the order of the windows; one or several
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [0])]
    seed: Vec<u64>,
    /// New directory for `base`, the adapters it starts with in `adapter`, those after --steps in
    /// `adapter-tuned`, and `report.json`; for one method and one seed. But for lq-lora, rilq and
    /// --format gguf, one block is in memory at a time until they are written
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on after the last whole block of the same command, if it was stopped
    #[arg(long, requires = "out")]
    resume: bool,
    /// Format of the saved base
    #[arg(long, value_enum, default_value_t = FormatName::QuantCore)]
    format: FormatName,
}

impl Args {
    /// The method of the preset, or the ones that were asked for.
    fn names(&self) -> Vec<InitName> {
        match self.preset {
            Some(preset) => vec![preset.name()],
            None => self.method.clone(),
        }
    }

    /// The widths of all bases.
    fn widths(&self) -> Vec<usize> {
        self.bits.or(&[4, 3, 2])
    }

    /// The quantizers of all bases.
    fn quantizers(&self) -> Vec<Box<dyn Quantizer>> {
        if let Some(preset) = self.preset {
            return vec![preset.settings().quantizer];
        }
        let (widths, names) = (self.widths(), self.method.iter());
        let names = names.filter(|name| name.fits(self.grid));
        let bases = pairs(&widths, &self.group_size);
        let bases: Vec<(usize, GroupSize)> = bases.map(|(&bits, &size)| (bits, size)).collect();
        let each = |name: &InitName| {
            let bases = bases.iter();
            let quantizers =
                bases.map(|&(bits, size)| name.quantizer(self.grid, bits, size, self.format));
            quantizers.collect::<Vec<_>>()
        };
        names.flat_map(each).collect()
    }

    /// The settings for one base.
    fn settings(&self, config: &Config) -> InitSettings {
        let (steps, seed) = (self.tune.steps, self.seed[0]);
        if let Some(preset) = self.preset {
            let settings = preset.settings();
            let rate = self.lr.unwrap_or(settings.fit.learning_rate());
            let fit = settings.fit.with_learning_rate(rate).with_seed(seed);
            return InitSettings {
                fit: fit.with_steps(steps),
                ..settings
            };
        }
        let name = self.method[0];
        InitSettings {
            quantizer: name.quantizer(self.grid, self.widths()[0], self.group_size[0], self.format),
            method: name.method(self.lora(seed), config),
            fit: fit_config(self.learning_rate(config), steps, seed),
        }
    }

    fn lora(&self, seed: u64) -> Lora {
        let lora = Lora::new(self.tune.rank).with_seed(seed);
        lora.with_alpha(self.tune.alpha())
    }

    /// The learning rate of the tuning. By default 1e-3 at the width of the embedded models, and the 3e-4 of
    /// `loftq::presets` at 4096.
    fn learning_rate(&self, config: &Config) -> f64 {
        let rate = self.lr;
        rate.unwrap_or_else(|| 1e-3 * narrower(config).powf(1.0 / 3.0))
    }

    /// Whether base and adapters are written block by block.
    fn is_by_block(&self) -> bool {
        self.out.is_some()
            && self.format != FormatName::Gguf
            && self.names().into_iter().all(InitName::is_by_block)
    }

    /// Refuses a model without the texts that are needed.
    fn check_texts(&self) -> Result<()> {
        let calibrated = self.names().into_iter().any(InitName::is_calibrated);
        let refuse = |option: &str, why: &str| Err(format!("{why}: add {option}").into());
        match (&self.model.model, self.is_by_block()) {
            (None, _) => Ok(()),
            (Some(_), false) if self.eval.is_none() => {
                refuse("--eval", "models are compared on a text")
            }
            (Some(_), by_block) if self.train.is_none() && (!by_block || calibrated) => {
                refuse("--train", "the method is calibrated on a text")
            }
            _ if self.train.is_none() && self.tune.steps > 0 => {
                refuse("--train, or --steps 0", "adapters are tuned on a text")
            }
            _ => Ok(()),
        }
    }
}

/// The batches of one seed.
struct Texts {
    calibration: Vec<Batch>,
    train: Vec<Batch>,
    eval: Vec<Batch>,
}

impl Texts {
    /// The texts of the options, of which some may be missing, or those of the embedded model.
    fn new(args: &Args, stored: &Plan, seed: u64, device: &Device) -> Result<Self> {
        let (seq_len, batch) = (args.tune.cut.seq_len, args.tune.batch);
        let windows = |path: &Option<PathBuf>, option, n_chars, seed| -> Result<Option<Windows>> {
            let text = match (path, &args.model.model) {
                (Some(path), _) => texts::read(path)?,
                (None, None) => corpus::text(Dialect::Plain, n_chars, seed),
                (None, Some(_)) => return Ok(None),
            };
            texts::planned_windows(stored, &text, seq_len, option).map(Some)
        };
        let train = windows(&args.train, "--train", 400_000, 20)?;
        let train = train.map(|train| train.shuffled(seed));
        let eval = windows(&args.eval, "--eval", 25_000, 12)?;
        let eval = eval.map(|eval| eval.take(args.tune.eval.limit()));
        let batches = |windows: Option<Windows>, size| {
            windows.map_or(Vec::new(), |windows| windows.batches(size, device))
        };
        let calibration = train.clone().map(|train| train.take(args.samples));
        Ok(Self {
            calibration: batches(calibration, batch),
            train: batches(train, batch),
            eval: batches(eval, evaluation_batch(seq_len)),
        })
    }
}

/// The results of one initialization.
#[derive(Clone, Debug)]
struct Run {
    method: InitName,
    bits: usize,
    group_size: GroupSize,
    /// Perplexity after the initialization.
    before: f64,
    /// Perplexity after tuning.
    after: f64,
    /// Seconds of the initialization.
    seconds: f64,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let single = args.names().len() == 1 && args.seed.len() == 1;
    let several = args.preset.is_none() && args.widths().len() * args.group_size.len() > 1;
    if args.average_bits.is_some() && (args.method != [InitName::LqLora] || !single) {
        return Err("--average-bits needs --method lq-lora and one --seed".into());
    }
    if !args.names().iter().any(|method| method.fits(args.grid)) {
        return Err("these methods do not have --grid nf; use affine or symmetric".into());
    }
    if args.out.is_some() && (!single || several && args.average_bits.is_none()) {
        return Err(
            "--out needs one --method and one each of --bits, --group-size and --seed".into(),
        );
    }
    if args.preset.is_some() && !single {
        return Err("--preset needs one --seed".into());
    }
    let learns_ranges = |name: &InitName| matches!(name, InitName::Apiq | InitName::ApiqBlock);
    if args.format.f16_scales() && args.names().iter().any(learns_ranges) {
        let format = args.format.format();
        return Err(format!("ApiQ learns scales in f32, which {format} does not hold").into());
    }
    if args.tune.steps > 0 {
        args.tune.check(args.lr)?;
    }
    let by_block = args.is_by_block();
    if args.resume && !by_block {
        return Err("--resume is for methods and formats that are written block by block, not lq-lora, rilq or GGUF".into());
    }
    args.check_texts()?;
    let output = args.out.as_deref().filter(|_| !by_block);
    let output = output.map(interrupt::reserve).transpose()?;
    let device = args.model.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.model.dir(scratch.path())?;
    for quantizer in args.quantizers() {
        check(args, &models::plan(&source, &quantizer)?, output.as_ref())?;
    }
    let stored = models::plan(&source, &PerLayer::default())?;
    for (text, option) in [(&args.train, "--train"), (&args.eval, "--eval")] {
        if let Some(text) = text {
            texts::check(&stored, &texts::read(text)?, args.tune.cut.seq_len, option)?;
        }
    }
    match &args.out {
        Some(out) if by_block => stream::one(args, out, &source, &device),
        _ if single && (!several || args.average_bits.is_some()) => {
            one(args, output, &stored, &device)
        }
        _ => compare(args, &stored, &device),
    }
}

fn pairs<'a, A, B>(a: &'a [A], b: &'a [B]) -> impl Iterator<Item = (&'a A, &'a B)> {
    a.iter().flat_map(|a| b.iter().map(move |b| (a, b)))
}

/// Checks that a plan can be saved in its format and place.
fn check(args: &Args, plan: &Plan, output: Option<&Output>) -> Result<()> {
    if args.out.is_some() {
        plan.check(args.format.format())?;
    }
    if let Some(output) = output {
        output.require(plan.n_bytes())?;
    }
    Ok(())
}

/// Initializes with one method, reports each layer, and saves base and adapters.
fn one(args: &Args, output: Option<Output>, stored: &Plan, device: &Device) -> Result<()> {
    let source = &stored.dir;
    let mut lm = models::load_as(source, device, args.model.dtype.float())?;
    let texts = Texts::new(args, stored, args.seed[0], device)?;
    let InitSettings {
        quantizer,
        method,
        fit,
    } = args.settings(&stored.config);
    let recipe: Box<dyn Recipe> = match args.average_bits {
        Some(average) => {
            let recipe = chosen(args, average, &lm.model, &texts)?;
            check(args, &models::plan(source, &recipe)?, output.as_ref())?;
            Box::new(recipe)
        }
        None => Box::new(quantizer),
    };
    let full = texts::perplexity("evaluating", &lm.model, &texts.eval)?;
    let n_layers = peft::Linears::linears(&lm.model).len();
    let bar = Bar::new("initializing", n_layers, "layers")?;
    let show = |layer: &InitializedLayer| {
        bar.step("");
        println!("{}", initialized(layer));
    };
    let layers = loftq::init(&mut lm.model, &*method, &*recipe, &texts.calibration, show)?;
    drop(bar);
    let n_bytes: usize = layers.iter().map(|layer| layer.report.n_bytes).sum();
    let mut base = lm.clone();
    // Quantized, it is another model.
    base.certificate = None;
    let adapters = peft::detach(&mut base.model)?;
    let saved = match output {
        Some(output) => Some(save(args, output, &base, &adapters, &layers)?),
        None => None,
    };
    let started = texts::perplexity("evaluating", &lm.model, &texts.eval)?;
    let bare = texts::perplexity("evaluating, base", &base.model, &texts.eval)?;
    println!(
        "\nperplexity: dense {full:.4}, base {bare:.4}, base with adapters {started:.4}; {n_bytes} bytes in packed layers"
    );
    if let Some(saved) = &saved {
        let mut again = models::load_as(&saved.base, device, args.model.dtype.float())?;
        let adapters = Adapters::open(&saved.adapter, &again.model)?;
        peft::activate(&mut again.model, &adapters)?;
        let probe = |model: &Model| {
            let logits = peft::CausalLm::forward(model, texts.eval[0].tokens()).into_data();
            logits.convert::<f32>().try_into_vec::<f32>()
        };
        let (started, again) = (probe(&lm.model), probe(&again.model));
        let difference = max_difference(&started.expect("f32"), &again.expect("f32"));
        if difference > 1e-4 {
            return Err(
                format!("the logits of the reloaded model differ by up to {difference:e}").into(),
            );
        }
        println!("the logits of the reloaded model differ by at most {difference:e}");
    }
    let tuned = saved.as_ref().map(Saved::adapter_tuned);
    tune(args, &mut lm.model, &texts, &fit, tuned.as_deref())?;
    let refusal = saved.and_then(|saved| saved.refusal);
    refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
}

/// Tunes the adapters of a model, and saves and measures them.
fn tune(
    args: &Args,
    model: &mut Model,
    texts: &Texts,
    fit: &FitConfig,
    dir: Option<&Path>,
) -> Result<()> {
    let steps = args.tune.steps;
    if steps == 0 {
        return Ok(());
    }
    let fit = &fit
        .clone()
        .with_checkpoint_blocks(args.tune.checkpoint_blocks);
    let mut watch = Watch::new("tuning".into(), steps, &texts.train, None)?;
    peft::fit(model, &texts.train, fit, |_, training| {
        watch.step(training.steps())
    })?;
    watch.finish("", &[])?;
    if let Some(dir) = dir {
        let adapters = Adapters::of(model)?;
        interrupt::uninterrupted(|| adapters.save_hf(dir, model))?;
        println!("saved after {steps} steps of tuning: {}", dir.display());
    }
    if !texts.eval.is_empty() {
        let tuned = texts::perplexity("evaluating", model, &texts.eval)?;
        println!("perplexity {tuned:.4} after {steps} steps of tuning");
    }
    Ok(())
}

/// Chooses bits and group size of each layer by LQ-LoRA's errors within the budget.
fn chosen(args: &Args, average: f64, model: &Model, texts: &Texts) -> Result<PerLayer> {
    let widths = args.widths();
    let quantizers = pairs(&widths, &args.group_size).map(|(&bits, &size)| {
        move || InitName::LqLora.quantizer(args.grid, bits, size, args.format)
    });
    let quantizers: Vec<_> = quantizers.collect();
    let method = lq_lora(args.lora(args.seed[0]));
    let linears = peft::Linears::linears(model).into_iter();
    let sizes = linears.map(|(_, linear)| linear.weight().dims().iter().product::<usize>());
    let budget = (average * sizes.sum::<usize>() as f64 / 8.0) as u64;
    allocated(model, &method, &quantizers, &texts.calibration, budget)
}

/// Compares the methods at every width and group size.
fn compare(args: &Args, stored: &Plan, device: &Device) -> Result<()> {
    let clock = Instant::now();
    let widths = args.widths();
    let lm = models::load_as(&stored.dir, device, args.model.dtype.float())?;
    let methods: Vec<InitName> = (args.method.iter().copied())
        .filter(|method| method.fits(args.grid))
        .collect();
    let n_runs = args.seed.len() * widths.len() * args.group_size.len() * methods.len();
    let bar = Bar::new("comparing", n_runs, "models")?;
    let learning_rate = args.learning_rate(&stored.config);
    let mut runs = Vec::new();
    let mut full = f64::NAN;
    for &seed in &args.seed {
        let texts = Texts::new(args, stored, seed, device)?;
        full = texts::perplexity("evaluating", &lm.model, &texts.eval)?;
        for (&bits, &group_size) in pairs(&widths, &args.group_size) {
            for &method in &methods {
                let quantizer = method.quantizer(args.grid, bits, group_size, args.format);
                let calibration = if method.is_calibrated() {
                    &texts.calibration[..]
                } else {
                    &[]
                };
                let mut model = lm.model.clone();
                let clock = Instant::now();
                let initialization = method.method(args.lora(seed), &stored.config);
                loftq::init(
                    &mut model,
                    &*initialization,
                    &quantizer,
                    calibration,
                    |_| {},
                )?;
                let seconds = clock.elapsed().as_secs_f64();
                let before = texts::perplexity("evaluating", &model, &texts.eval)?;
                let mut after = before;
                if args.tune.steps > 0 {
                    let fit = fit_config(learning_rate, args.tune.steps, seed);
                    peft::fit(&mut model, &texts.train, &fit, |_, _| {})?;
                    after = texts::perplexity("evaluating", &model, &texts.eval)?;
                }
                runs.push(Run {
                    method,
                    bits,
                    group_size,
                    before,
                    after,
                    seconds,
                });
                bar.step(&format!("{bits} bits, {}", method.title()));
            }
        }
    }
    drop(bar);

    for (&group_size, &bits) in pairs(&args.group_size, &widths) {
        let mut rows = vec![["method", "start", "tuned", "seconds"].map(String::from)];
        for &method in &methods {
            let of = |value: fn(&Run) -> f64| {
                let values = runs.iter().filter(|run| {
                    (run.method, run.bits, run.group_size) == (method, bits, group_size)
                });
                table::spread(&values.map(value).collect::<Vec<_>>())
            };
            rows.push([
                method.title().into(),
                of(|run| run.before),
                of(|run| run.after),
                of(|run| run.seconds),
            ]);
        }
        println!(
            "{bits} bits, group size {group_size}\n\n{}",
            table::markdown(&rows)
        );
    }
    println!(
        "perplexity by the protocol gptq, dense {full:.4}; rank {}, {} steps of tuning at {learning_rate:e}; mean and spread of seeds {:?}; {:.0} s",
        args.tune.rank,
        args.tune.steps,
        args.seed,
        clock.elapsed().as_secs_f64()
    );
    Ok(())
}
