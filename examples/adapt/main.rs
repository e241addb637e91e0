//! Quantizes a LLaMA or an OPT, tunes it on text or on instruction data, merges, saves and reloads it,
//! and checks that the reloaded model is the tuned one.
//!
//! `cargo run --release --example adapt` does so with the embedded model; `-- --help` lists the options
//! for other models.

mod place;
mod rate;
mod report;
mod tune;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, Parser, ValueEnum};
use examples::arguments::{BitsArg, GroupSize, ModelArgs, TuneArgs, at_least};
use examples::dtype::DtypeName;
use examples::format::FormatName;
use examples::instructions::Instructions;
use examples::method::{MethodName, PresetName, Settings};
use examples::optimizer::OptimizerName;
use examples::outcome::{Result, exit, weights_bytes};
use examples::progress::Bar;
use examples::texts::{Cut, Source, Texts, fit_config, n_windows};
use examples::{eprintln, group, interrupt, print, println, settings};
use models::{Plan, Pretrained};
use peft::{Adapter, Adapters, Certificate, Group, PerLayer, Targets, TileMethod};
use serde::Serialize;

use place::Place;
use rate::Rate;
use report::{Report, table};
use tune::{Base, formats, tune};

const DEFAULT_BITS: [usize; 3] = [4, 3, 2];
const DEFAULT_GROUP_SIZE: GroupSize = GroupSize(Some(32));

/// The name of the file of the report.
const REPORT: &str = "report.json";

/// Quantize a language model, fine-tune it, merge, save, reload, and verify the merge
///
/// A model that is packed already, by `quantize` or in a format of GPTQ or bitsandbytes, is tuned on its
/// codes. Without options, the embedded model is tuned at 4, 3 and 2 bits on a dialect of the language that
/// it was trained on.
#[derive(Parser)]
#[command(
    version,
    group = ArgGroup::new("tuned_on").args(["train", "data"]),
    mut_arg("model", |arg| arg.requires("tuned_on")),
    mut_arg("bits", |arg| arg.help(
        "Bits of a weight of a model that is not packed, one or several: 2, 3, 4, 8 [default: 4 3 2]"
    )),
    after_help = "\
Examples:
  adapt --model Llama-2-7b-hf --train task.txt --eval held-out.txt --bits 4 --group-size 128 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-task
  adapt --model Llama-2-7b-4bit-gptq --data gsm8k/train.jsonl --template gsm8k --format gptq-v2 \\
        --seq-len 512 --batch 4 --steps 300 --out Llama-2-7b-4bit-gsm8k
  adapt --model Llama-2-7b-hf --data gsm8k/train.jsonl --template gsm8k --preset qa-lora \\
        --seq-len 512 --batch 16 --steps 300 --out Llama-2-7b-qa-lora"
)]
struct Args {
    /// TOML file of options, `lr = 1e-3`, before those given here; a result has its own as adapt.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// Directory of adapters of a packed model to go on from, of this program or of PEFT, instead of fresh
    /// ones
    #[arg(long, value_name = "DIR", requires_all = ["model", "lr"],
          conflicts_with_all = ["method", "rank", "alpha", "targets"])]
    adapters: Option<PathBuf>,
    /// Text to train on
    #[arg(long, value_name = "FILE", requires = "model", requires = "eval")]
    train: Option<PathBuf>,
    /// Text of the same task to evaluate on
    #[arg(long, value_name = "FILE", requires = "train")]
    eval: Option<PathBuf>,
    /// Text of the model's earlier training data, to measure forgetting
    #[arg(long, value_name = "FILE", requires = "train")]
    base: Option<PathBuf>,
    /// Records to train on instead of text: JSONL, a JSON array, CSV, TSV or, with the feature `parquet`, Parquet
    #[arg(
        long,
        value_name = "FILE",
        requires = "model",
        conflicts_with = "train"
    )]
    data: Option<PathBuf>,
    #[command(flatten)]
    instructions: Instructions,
    /// Base, method and learning rate of a paper, with its schedule; a packed model is its own base
    #[arg(long, value_enum, value_name = "NAME",
          conflicts_with_all = ["method", "bits", "group_size", "symmetric", "rank", "alpha", "adapters"])]
    preset: Option<PresetName>,
    #[command(flatten)]
    bits: BitsArg,
    /// Weights that share a scale: a number, or `channel` for all weights of an output [default: 32]
    #[arg(long, value_name = "N")]
    group_size: Option<GroupSize>,
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
    /// Peak learning rate of the cosine schedule; `auto` tries some around the default for 20 steps each
    /// [default: by the method, the hidden size and the optimizer]
    #[arg(long, value_name = "X|auto", verbatim_doc_comment)]
    lr: Option<Rate>,
    /// Optimizer
    #[arg(long, value_enum, value_name = "NAME", default_value_t = OptimizerName::AdamW)]
    optimizer: OptimizerName,
    /// Steps between two evaluations on the task in the course of the training [default: none]
    #[arg(long, value_name = "N", value_parser = at_least::<1>)]
    eval_every: Option<usize>,
    /// Evaluations in a row without a lower loss that end the training; the best adapters are kept
    #[arg(long, value_name = "N", requires = "eval_every", value_parser = at_least::<1>)]
    patience: Option<usize>,
    /// Seed of the adapters and of the order of the training data
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// New directory for the tuned models and their adapters; for each training metrics.jsonl, curves.svg
    /// and an event file of TensorBoard, in N-bit-training; report.json, and adapt.toml with all options.
    /// While the program runs they are in DIR.partial/files
    /// [default: only the report is kept, as adapt-report.json]
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    out: Option<PathBuf>,
    /// Steps between two checkpoints, in DIR.partial; removed in the end
    #[arg(long, value_name = "N", default_value = "25", value_parser = at_least::<1>)]
    checkpoint_every: usize,
    /// Go on after the last whole checkpoint of the same command, if it was stopped
    #[arg(long, requires = "out")]
    resume: bool,
    /// Format of the tuned models. Scales are trained in f16 where it holds no others
    #[arg(long, value_enum, default_value_t = FormatName::QuantCore)]
    format: FormatName,
    /// Round scales and zero-points that the format does not hold, and measure the loss
    #[arg(long)]
    allow_rounding: bool,
}

impl Args {
    /// The settings of the preset, or of the other options; those of scales in `f16` if asked.
    fn settings(&self, bits: usize, hidden_size: usize, f16_scales: bool) -> Result<Settings> {
        let targets = if self.targets.is_empty() {
            Targets::All
        } else {
            Targets::from(self.targets.clone())
        };
        if let Some(preset) = self.preset {
            let mut settings = preset.settings(&targets, self.seed, f16_scales);
            let rate = self.rate(settings.fit.learning_rate());
            let fit = settings.fit.with_learning_rate(rate);
            let fit = fit.with_steps(self.tune.steps).with_seed(self.seed);
            settings.fit = self.optimizer.of(fit);
            return Ok(settings);
        }
        let group_size = self.group_size.unwrap_or(DEFAULT_GROUP_SIZE);
        let (rank, alpha) = (self.tune.rank, self.tune.alpha());
        let method = self
            .method
            .method(rank, alpha, &targets, self.seed, f16_scales);
        let rate = self.rate(method.learning_rate(hidden_size));
        Ok(Settings {
            quantizer: self
                .method
                .quantizer(bits, group_size, self.symmetric, self.format)?,
            method,
            fit: (self.optimizer).of(fit_config(rate, self.tune.steps, self.seed)),
        })
    }

    /// The learning rate that is given, or the default for AdamW as it is for the optimizer.
    fn rate(&self, default: f64) -> f64 {
        let given = self.lr.and_then(Rate::value);
        given.unwrap_or(default * self.optimizer.rate_factor())
    }

    fn method_name(&self) -> MethodName {
        self.preset.map_or(self.method, PresetName::method)
    }

    /// The widths to quantize to, the largest first; none if the model is packed.
    fn widths(&self, stored: &Plan) -> Result<Vec<usize>> {
        if !stored.is_packed() {
            return Ok(match self.preset {
                // The width of a preset is its own.
                Some(_) => vec![4],
                None => self.bits.or(&DEFAULT_BITS),
            });
        }
        if self.bits.is_given() || self.group_size.is_some() || self.symmetric {
            return Err(format!(
                "`{}` is packed already ({}), and its codes are kept: leave out --bits, --group-size and --symmetric",
                self.model.name(),
                formats(stored)
            )
            .into());
        }
        Ok(Vec::new())
    }

    /// Adds what was chosen where an option was not given.
    fn choose(&self, bases: &[Base], settings: &mut settings::Settings) {
        let Some(first) = bases.first() else { return };
        if self.lr != Some(Rate::Auto) {
            settings.set("lr", first.settings.fit.learning_rate());
        }
        if !first.is_packed && self.preset.is_none() {
            let bits = self.bits.or(&DEFAULT_BITS).into_iter();
            settings.set("bits", bits.map(|bits| bits as i64).collect::<Vec<_>>());
            match self.group_size.unwrap_or(DEFAULT_GROUP_SIZE) {
                GroupSize(Some(size)) => settings.set("group-size", size as i64),
                channel => settings.set("group-size", channel.to_string()),
            }
        }
    }

    /// Checks what formats tell of a base and its tuned models.
    fn check(&self, plan: &Plan) -> Result<()> {
        if self.merge != Merge::Dense {
            plan.check(self.format.format())?;
        }
        if self.adapters.is_some() && !plan.is_packed() {
            return Err("--adapters needs the packed model that they were made for".into());
        }
        if self.adapters.is_some() && self.lr == Some(Rate::Auto) {
            return Err("--lr auto tries rates around the default of --method, which --adapters does without: give a number".into());
        }
        Ok(())
    }

    /// Checks that what adapters merge into is held by the format.
    fn check_merge(&self, plan: &Plan, merging: Merging) -> Result<()> {
        if self.merge != Merge::Codes || !merging.into_codes {
            return Ok(());
        }
        let (format, grid) = (self.format.format(), self.format.format().stored_grid());
        let refuse = |problem: &str| {
            Err(format!(
                "{problem}: keep --format quant-core, or give --allow-rounding, which may leave little of what is learned"
            )
            .into())
        };
        if merging.zeros && grid.whole_zeros() && !self.allow_rounding {
            return refuse(&format!(
                "the merge makes zero-points fractions, and {format} holds whole ones (as --method peqa leaves them)"
            ));
        }
        if grid.f16_minimums() && !self.allow_rounding {
            return refuse(&format!(
                "the merge changes the weight of code 0 of each group, and {format} holds it in f16"
            ));
        }
        if merging.f32_scales && grid.f16_scales() && !self.allow_rounding {
            return refuse(&format!(
                "the adapters train scales in f32, and {format} holds f16"
            ));
        }
        // Smaller groups come of blocks that straddle rows, and share the scale of their block.
        let sizes = plan
            .layers
            .iter()
            .filter_map(|layer| layer.format?.group_size());
        if self.format == FormatName::Bitsandbytes && sizes.min().is_some_and(|size| size < 32) {
            return Err("blocks of bitsandbytes straddle the rows of this model, so that its groups cannot be tuned one by one: keep --format quant-core".into());
        }
        Ok(())
    }

    /// Checks that a packed base can be saved in its format, and returns whether the format holds it as it
    /// is.
    fn check_base(&self, lm: &Pretrained, merging: Merging) -> Result<bool> {
        let held = match models::check_format(lm, self.format.format()) {
            Ok(()) => return Ok(true),
            Err(held) => held,
        };
        let is_replaced = match self.merge {
            Merge::Dense => true,
            Merge::Round => self.targets.is_empty() && !merging.into_codes,
            Merge::Codes => false,
        };
        if is_replaced {
            return Ok(false);
        }
        if self.merge == Merge::Codes && !merging.into_codes {
            return Err(format!(
                "such adapters are kept beside their base, which is then not rounded: give --merge round, --merge dense, or --format quant-core; {held}"
            )
            .into());
        }
        if self.allow_rounding {
            Ok(false)
        } else {
            Err(format!("{held}\ngive --allow-rounding, or --format quant-core").into())
        }
    }

    /// The largest difference of a logit of the merged and of the tuned model, relative to the largest
    /// logit, for a merge that rounds nothing. Zero for an exact merge, but for other devices than the CPU
    /// with the feature `fusion`: there the adapter's operations are fused into other kernels, which round
    /// differently, unless `BURN_FUSION_MAX_EXPLORATIONS=0` is set.
    fn tolerated_difference(&self, certificate: &Certificate) -> f32 {
        let is_cpu = self.model.device.name == "flex";
        if certificate.is_exact() && (is_cpu || !cfg!(feature = "fusion")) {
            return 0.0;
        }
        let of_device = if is_cpu { 1e-4 } else { 1e-3 };
        // Some roundings of activations, one after the other.
        match self.model.dtype.name {
            DtypeName::F32 => of_device,
            DtypeName::F16 => 16.0 / 2048.0,
            DtypeName::Bf16 => 16.0 / 256.0,
        }
    }
}

/// What the merge of some adapters changes of a packed weight.
#[derive(Clone, Copy, Debug)]
struct Merging {
    /// They merge into its codes.
    into_codes: bool,
    /// Zero-points become fractions.
    zeros: bool,
    /// Scales become floats that `f16` does not hold.
    f32_scales: bool,
}

impl Merging {
    /// That of the adapters of a method, whose scales are trained in `f16` or not.
    fn of_method(method: MethodName, f16_scales: bool) -> Self {
        let scales = matches!(method, MethodName::Peqa | MethodName::PeqaZeros);
        Self {
            into_codes: method.merges_into_codes(),
            zeros: method.trains_zeros(),
            f32_scales: scales && !f16_scales,
        }
    }

    /// That of some adapters.
    fn of(adapters: &Adapters) -> Self {
        let mut merging = Self {
            into_codes: true,
            zeros: false,
            f32_scales: false,
        };
        for (_, adapter) in adapters.layers() {
            match adapter {
                Adapter::Peqa(peqa) => {
                    merging.zeros |= peqa.zero_shifts().is_some();
                    merging.f32_scales |= !peqa.f16_scales();
                }
                Adapter::Tile(tile) if tile.method() != TileMethod::QBara => merging.zeros = true,
                _ => merging.into_codes = false,
            }
        }
        merging
    }
}

/// What to do with adapters that do not merge into a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Merge {
    /// Keep them beside the base
    Codes,
    /// Merge them into dense weights
    Dense,
    /// Merge and quantize again, which loses a part of what was learned
    Round,
}

/// Checks a packed model and its adapters by their values.
fn packed_base(args: &Args, source: &Path, plan: Plan, lm: &Pretrained) -> Result<Base> {
    let hidden_size = plan.config.hidden_size();
    let f16 = args.format.f16_scales();
    let adapters = match &args.adapters {
        Some(dir) => Some(Adapters::open(dir, &lm.model)?),
        None => None,
    };
    let merging = match &adapters {
        Some(adapters) => Merging::of(adapters),
        None => Merging::of_method(args.method_name(), f16),
    };
    args.check_merge(&plan, merging)?;
    // Scales that are not f16 are trained as they are, and rounded in the end.
    let is_held = args.check_base(lm, merging)?;
    let settings = args.settings(4, hidden_size, f16 && is_held)?;
    let mut model = lm.model.clone();
    match &adapters {
        Some(adapters) => peft::activate(&mut model, adapters).map(drop)?,
        None => peft::attach(&mut model, &*settings.method).map(drop)?,
    }
    Ok(Base {
        source: source.into(),
        is_packed: true,
        plan,
        settings,
        merging,
        adapters,
    })
}

fn main() -> ExitCode {
    exit(|| {
        let (args, settings) = settings::parse();
        group::among(|group| run(&args, settings, group))
    })
}

fn run(args: &Args, mut settings: settings::Settings, group: &dyn Group) -> Result<()> {
    // What settings, configurations and headers tell is checked before anything else is read.
    args.tune.check(args.lr.and_then(Rate::value))?;
    let scratch = interrupt::scratch()?;
    let out = args.out.as_deref();
    let place = Place::open(out, scratch.path(), &settings, args.resume, group)?;
    let device = args.model.device.open();
    let source = args.model.dir(scratch.path())?;
    let stored = models::plan(&source, &PerLayer::default())?;
    args.check(&stored)?;
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
    cut.check(&stored)?;
    let f16 = args.format.f16_scales();
    let mut bases = Vec::new();
    for bits in args.widths(&stored)? {
        let settings = args.settings(bits, stored.config.hidden_size(), f16)?;
        let plan = models::plan(&source, &settings.quantizer)?;
        args.check(&plan)?;
        plan.check_method(&*settings.method, &device)?;
        let merging = Merging::of_method(args.method_name(), f16);
        args.check_merge(&plan, merging)?;
        bases.push(Base {
            source: source.clone(),
            is_packed: false,
            plan,
            settings,
            merging,
            adapters: None,
        });
    }
    let packed = stored.is_packed().then(|| stored.n_bytes());
    let sizes = bases.iter().map(|base| base.plan.n_bytes());
    place.require(sizes.chain(packed).sum())?;
    if stored.is_packed() {
        match &args.adapters {
            Some(dir) => {
                // That it is there; the model tells whether it fits.
                let config = dir.join("adapter_config.json");
                tensor_files::read_json::<serde_json::Value>(&config)?;
            }
            None => {
                let settings = args.settings(4, stored.config.hidden_size(), f16)?;
                stored.check_method(&*settings.method, &device)?;
                let merging = Merging::of_method(args.method_name(), f16);
                args.check_merge(&stored, merging)?;
            }
        }
    }
    let lm = {
        let _bar = Bar::unmeasured("loading")?;
        models::load_as(&source, &device, args.model.dtype.float())?
    };
    if stored.is_packed() {
        bases.push(packed_base(args, &source, stored.clone(), &lm)?);
    }
    let texts = Texts::new(&cut, &lm, &device)?;
    if let Some([train, eval]) = &texts.records {
        println!("training records: {train}\nevaluation records: {eval}\n");
    }
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        model: args.model.name(),
        is_packed: stored.is_packed(),
        preset: args.preset,
        targets: args.targets.clone(),
        merge: args.merge,
        allow_rounding: args.allow_rounding,
        perplexity_protocol: texts.protocol(),
        records: texts.records.clone(),
        seq_len: cut.seq_len,
        n_task_windows: n_windows(&texts.task),
        n_base_windows: n_windows(&texts.base),
        batch: args.tune.batch,
        n_processes: group.size(),
        seed: args.seed,
        device: args.model.device.name.clone(),
        dtype: args.model.dtype.name.name(),
        n_bytes: weights_bytes(&source)?,
        full_precision: if stored.is_packed() {
            None
        } else {
            Some(texts.perplexities(&lm.model)?)
        },
        runs: Vec::new(),
    };
    drop(lm);

    args.choose(&bases, &mut settings);
    place.begin(&settings)?;
    let json = match &args.out {
        Some(_) => place.files().join(REPORT),
        None => PathBuf::from("adapt-report.json"),
    };
    let mut refusals = Vec::new();
    for base in &bases {
        let name = tune::name(&base.plan);
        let done = match place.done(&name)? {
            Some(done) => {
                println!("{}: done before", done.run.formats);
                done
            }
            None => {
                let Some(done) = tune(args, base, &texts, &place, group, &device)? else {
                    // The first process does the rest.
                    continue;
                };
                place.finish(&name, &done)?;
                done
            }
        };
        let refusal = done.refusal.as_ref();
        refusals.extend(refusal.map(|refusal| format!("{}: {refusal}", done.run.formats)));
        report.runs.push(done.run);
        // A later failure does not lose this run.
        interrupt::uninterrupted(|| tensor_files::write_json(&json, &report))?;
    }
    if group.rank() > 0 {
        return Ok(());
    }
    place.publish()?;
    interrupt::on_end("");
    let json = args.out.as_ref().map_or(json, |out| out.join(REPORT));

    println!("\n{}", table(&report));
    for run in &report.runs {
        print!("{}: ", run.formats);
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
    for run in &report.runs {
        let (before, after) = (run.rounded.task, run.tuned.task);
        if after <= before {
            continue;
        }
        let problem = format!(
            "the training at a learning rate of {} raised the perplexity of its task ({}, from {before:.3} to {after:.3}): lower --lr, let --lr auto choose, or train on more text",
            run.fit.learning_rate(),
            run.formats
        );
        if run.is_ruined() {
            refusals.push(problem);
        } else {
            eprintln!("warning: {problem}");
        }
    }
    if refusals.is_empty() {
        return Ok(());
    }
    Err(refusals.join("\n").into())
}
