//! Initializes adapters so that they compensate the quantization error: with every method, comparing
//! perplexities before and after some tuning; or with one method, reporting each layer, and saving the
//! base and its adapters as a PEFT directory.
//!
//! `cargo run --release --example loftq_init` does the first with the embedded model; `-- --help` lists
//! the options for other models.

mod methods;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use examples::arguments::{BitsArg, GroupSize, ModelArgs, TuneArgs, at_least};
use examples::corpus::{self, Dialect};
use examples::format::FormatName;
use examples::outcome::{Result, exit, max_difference, save_as};
use examples::progress::Bar;
use examples::texts::{self, evaluation_batch, fit_config};
use examples::training::Watch;
use examples::{interrupt, println, table};
use loftq::InitializedLayer;
use models::{Model, Plan, Pretrained};
use peft::{Adapters, Batch, Lora, PerLayer, Recipe};
use quant_core::{Quantizer, allocate};
use serde::Serialize;
use tensor_files::Output;

use methods::{GridName, Name, PresetName, Settings, lq_lora, narrower};

/// Initialize LoRA adapters so that they compensate the quantization error
///
/// Without options, the embedded model is initialized with every method at 4, 3 and 2 bits, in groups of
/// 32 and 64, and tuned for some steps on text like its training data.
#[derive(Parser)]
#[command(
    version,
    mut_arg("model", |arg| arg.requires("train").requires("eval")),
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
    /// Text to calibrate and to train on
    #[arg(long, value_name = "FILE", requires = "model")]
    train: Option<PathBuf>,
    /// Text to evaluate on
    #[arg(long, value_name = "FILE", requires = "model")]
    eval: Option<PathBuf>,
    /// Initializations, one or several
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',',
          default_values_t = Name::value_variants().to_vec())]
    method: Vec<Name>,
    /// Base, initialization and training of a paper, of which --lr changes the rate
    #[arg(long, value_enum, value_name = "NAME",
          conflicts_with_all = ["method", "bits", "group_size", "grid", "average_bits", "rank", "alpha"])]
    preset: Option<PresetName>,
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
    /// `adapter-tuned`, and `report.json`; for one method and one seed
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Format of the saved base
    #[arg(long, value_enum, default_value_t = FormatName::QuantCore)]
    format: FormatName,
}

impl Args {
    /// The method of the preset, or the ones that were asked for.
    fn names(&self) -> Vec<Name> {
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
        let each = |name: &Name| {
            let bases = bases.iter();
            let quantizers = bases.map(|&(bits, size)| name.quantizer(self, bits, size));
            quantizers.collect::<Vec<_>>()
        };
        names.flat_map(each).collect()
    }

    /// The settings for one base.
    fn settings(&self, model: &Model) -> Settings {
        let (steps, seed) = (self.tune.steps, self.seed[0]);
        if let Some(preset) = self.preset {
            let settings = preset.settings();
            let rate = self.lr.unwrap_or(settings.fit.learning_rate());
            let fit = settings.fit.with_learning_rate(rate).with_seed(seed);
            return Settings {
                fit: fit.with_steps(steps),
                ..settings
            };
        }
        let name = self.method[0];
        Settings {
            quantizer: name.quantizer(self, self.widths()[0], self.group_size[0]),
            method: name.method(self.lora(seed), model),
            fit: fit_config(self.learning_rate(model), steps, seed),
        }
    }

    fn lora(&self, seed: u64) -> Lora {
        let lora = Lora::new(self.tune.rank).with_seed(seed);
        lora.with_alpha(self.tune.alpha())
    }

    /// The learning rate of the tuning. By default 1e-3 at the width of the embedded models, and the 3e-4 of
    /// `loftq::presets` at 4096.
    fn learning_rate(&self, model: &Model) -> f64 {
        let rate = self.lr;
        rate.unwrap_or_else(|| 1e-3 * narrower(model).powf(1.0 / 3.0))
    }
}

/// The batches of one seed.
struct Texts {
    calibration: Vec<Batch>,
    train: Vec<Batch>,
    eval: Vec<Batch>,
}

impl Texts {
    fn new(args: &Args, lm: &Pretrained, seed: u64, device: &Device) -> Result<Self> {
        let read = |path: &Option<PathBuf>, n_chars, seed| match path {
            Some(path) => texts::read(path),
            None => Ok(corpus::text(Dialect::Plain, n_chars, seed)),
        };
        let (train, eval) = (
            read(&args.train, 400_000, 20)?,
            read(&args.eval, 25_000, 12)?,
        );
        let (seq_len, batch) = (args.tune.cut.seq_len, args.tune.batch);
        let train = texts::windows(lm, &train, seq_len, "--train")?.shuffled(seed);
        let eval = texts::windows(lm, &eval, seq_len, "--eval")?.take(args.tune.eval.limit());
        Ok(Self {
            calibration: train.clone().take(args.samples).batches(batch, device),
            train: train.batches(batch, device),
            eval: eval.batches(evaluation_batch(seq_len), device),
        })
    }
}

/// The results of one initialization.
#[derive(Clone, Debug)]
struct Run {
    method: Name,
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
    if args.average_bits.is_some() && (args.method != [Name::LqLora] || !single) {
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
    let learns_ranges = |name: &Name| matches!(name, Name::Apiq | Name::ApiqBlock);
    if args.format.f16_scales() && args.names().iter().any(learns_ranges) {
        let format = args.format.format();
        return Err(format!("ApiQ learns scales in f32, which {format} does not hold").into());
    }
    if args.tune.steps > 0 {
        args.tune.check(args.lr)?;
    }
    let output = args.out.as_deref().map(interrupt::reserve).transpose()?;
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
    if single && (!several || args.average_bits.is_some()) {
        one(args, output, &source, &device)
    } else {
        compare(args, &source, &device)
    }
}

fn pairs<'a, A, B>(a: &'a [A], b: &'a [B]) -> impl Iterator<Item = (&'a A, &'a B)> {
    a.iter().flat_map(|a| b.iter().map(move |b| (a, b)))
}

/// Checks that a plan can be saved in its format and place.
fn check(args: &Args, plan: &Plan, output: Option<&Output>) -> Result<()> {
    if let Some(output) = output {
        plan.check(args.format.format())?;
        output.require(plan.n_bytes())?;
    }
    Ok(())
}

/// Initializes with one method, reports each layer, and saves base and adapters.
fn one(args: &Args, output: Option<Output>, source: &Path, device: &Device) -> Result<()> {
    let mut lm = models::load_as(source, device, args.model.dtype.float())?;
    let texts = Texts::new(args, &lm, args.seed[0], device)?;
    let Settings {
        quantizer,
        method,
        fit,
    } = args.settings(&lm.model);
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
        println!("{}", described(layer));
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
    if args.tune.steps > 0 {
        let steps = args.tune.steps;
        let mut watch = Watch::new("tuning".into(), steps, &texts.train, None)?;
        peft::fit(&mut lm.model, &texts.train, &fit, |_, training| {
            watch.step(training.steps())
        })?;
        watch.finish("", &[])?;
        if let Some(saved) = &saved {
            let (adapters, dir) = (Adapters::of(&lm.model)?, saved.adapter_tuned());
            interrupt::uninterrupted(|| adapters.save_hf(&dir, &base.model))?;
            println!("saved after {steps} steps of tuning: {}", dir.display());
        }
        let tuned = texts::perplexity("evaluating", &lm.model, &texts.eval)?;
        println!("perplexity {tuned:.4} after {steps} steps of tuning");
    }
    let refusal = saved.and_then(|saved| saved.refusal);
    refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
}

/// A line about a layer.
fn described(layer: &InitializedLayer) -> String {
    let (before, after) = (layer.before, layer.report.error);
    let mut line = format!("{}: ", layer.report.path);
    if let Some(format) = layer.report.format {
        line += &format!("{format}, ");
    }
    line += &format!(
        "weight error {:.4} to {:.4}",
        before.weight.relative, after.weight.relative
    );
    if let (Some(before), Some(after)) = (before.output, after.output) {
        line += &format!(", output error {before:.4} to {after:.4}");
    }
    for note in &layer.report.notes {
        line += &format!("; {note}");
    }
    line + &format!("; round {}, {:.2} s", layer.round, layer.report.seconds)
}

/// The contents of the JSON file.
#[derive(Serialize)]
struct Report<'a> {
    /// The version of this program, and the command that was given.
    version: &'static str,
    command: Vec<String>,
    model: String,
    device: String,
    dtype: &'static str,
    layers: &'a [InitializedLayer],
}

/// The directories of a base and the adapters that it starts with.
struct Saved {
    base: PathBuf,
    adapter: PathBuf,
    /// Why the base is not in the format that was asked for.
    refusal: Option<models::Error>,
}

impl Saved {
    /// The directory of the tuned adapters.
    fn adapter_tuned(&self) -> PathBuf {
        self.adapter.with_file_name("adapter-tuned")
    }
}

/// Saves the base and its initial adapters.
fn save(
    args: &Args,
    output: Output,
    base: &Pretrained,
    adapters: &Adapters,
    layers: &[InitializedLayer],
) -> Result<Saved> {
    let out = output.dir().to_path_buf();
    let mut saved = Saved {
        base: out.join("base"),
        adapter: out.join("adapter"),
        refusal: None,
    };
    output.write(|dir| -> Result<()> {
        let to_base = interrupt::reserve(&dir.join("base"))?;
        let (to_base, refusal) = save_as(base, to_base, args.format.format())?;
        if let Some(name) = to_base.file_name() {
            saved.base.set_file_name(name);
        }
        saved.refusal = refusal;
        adapters.save_hf(dir.join("adapter"), &base.model)?;
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().collect(),
            model: args.model.name(),
            device: args.model.device.name.clone(),
            dtype: args.model.dtype.name.name(),
            layers,
        };
        Ok(tensor_files::write_json(&dir.join("report.json"), &report)?)
    })?;
    println!(
        "saved: the base {}, the adapters that it starts with {}",
        saved.base.display(),
        saved.adapter.display()
    );
    Ok(saved)
}

/// Chooses bits and group size of each layer by LQ-LoRA's errors within the budget.
fn chosen(args: &Args, average: f64, model: &Model, texts: &Texts) -> Result<PerLayer> {
    let widths = args.widths();
    let quantizers: Vec<Box<dyn Quantizer>> = pairs(&widths, &args.group_size)
        .map(|(&bits, &group_size)| Name::LqLora.quantizer(args, bits, group_size))
        .collect();
    let method = lq_lora(args.lora(args.seed[0]));
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
        let (bits, group_size) = pairs(&widths, &args.group_size)
            .nth(choice)
            .expect("one of the candidates");
        let quantizer = Name::LqLora.quantizer(args, *bits, *group_size);
        recipe.0.insert(path.clone(), quantizer);
    }
    Ok(recipe)
}

/// Compares the methods at every width and group size.
fn compare(args: &Args, source: &Path, device: &Device) -> Result<()> {
    let clock = Instant::now();
    let widths = args.widths();
    let lm = models::load_as(source, device, args.model.dtype.float())?;
    let methods: Vec<Name> = (args.method.iter().copied())
        .filter(|method| method.fits(args.grid))
        .collect();
    let n_runs = args.seed.len() * widths.len() * args.group_size.len() * methods.len();
    let bar = Bar::new("comparing", n_runs, "models")?;
    let learning_rate = args.learning_rate(&lm.model);
    let mut runs = Vec::new();
    let mut full = f64::NAN;
    for &seed in &args.seed {
        let texts = Texts::new(args, &lm, seed, device)?;
        full = texts::perplexity("evaluating", &lm.model, &texts.eval)?;
        for (&bits, &group_size) in pairs(&widths, &args.group_size) {
            for &method in &methods {
                let quantizer = method.quantizer(args, bits, group_size);
                let calibration = if method.is_calibrated() {
                    &texts.calibration[..]
                } else {
                    &[]
                };
                let mut model = lm.model.clone();
                let clock = Instant::now();
                let initialization = method.method(args.lora(seed), &model);
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

/// Formats the mean and the largest deviation from it.
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
