//! What the experiments have in common: the model, its texts, and how a model is measured and tuned.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::{ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor};
use evaluate::{Bootstrap, Estimate, window_losses};
use examples::corpus::{self, Dialect};
use examples::memory;
use examples::outcome::{Result, weights_bytes};
use examples::progress::Bar;
use examples::rate::{self, Search};
use examples::texts::{self, evaluation_batch, fit_config};
use examples::training::Watch;
use models::{Config, Model, Pretrained, Windows};
use peft::{Batch, Method, Recipe};
use quant_core::{Needs, Quantizer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::Args;
use crate::run_dir::Run;

/// A model and its texts, in a run.
pub(crate) struct Lab<'a> {
    pub(crate) args: &'a Args,
    pub(crate) run: Run,
    pub(crate) config: Config,
    pub(crate) scratch: &'a Path,
    pub(crate) device: Device,
    /// The directory of the dense model.
    pub(crate) source: PathBuf,
    pub(crate) calibration: Vec<Batch>,
    calibration_windows: Windows,
    train: Windows,
    pub(crate) eval: Vec<Batch>,
    drift: Vec<Batch>,
}

/// The mean loss of a token in nats, of each window of two texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Losses {
    /// Of held-out text of the kind that is tuned on.
    pub(crate) eval: Vec<f64>,
    /// Of text of another kind; empty if there is none.
    pub(crate) drift: Vec<f64>,
}

/// A quantized model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Quantized {
    pub(crate) losses: Losses,
    /// Bytes of its saved weights.
    pub(crate) n_bytes: u64,
    /// Seconds of quantizing.
    pub(crate) seconds: f64,
    /// Peak resident memory of quantizing, the dense model included.
    pub(crate) peak_bytes: Option<u64>,
}

/// A tuned model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Tuned {
    pub(crate) losses: Losses,
    pub(crate) learning_rate: f64,
    pub(crate) n_trainable: usize,
    /// Tokens that were read.
    pub(crate) n_tokens: usize,
    /// Seconds of tuning.
    pub(crate) seconds: f64,
    /// Peak resident memory of tuning.
    pub(crate) peak_bytes: Option<u64>,
}

/// How a model is tuned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Training {
    pub(crate) learning_rate: f64,
    /// The seed of the order of the windows.
    pub(crate) seed: u64,
    pub(crate) steps: usize,
}

impl<'a> Lab<'a> {
    /// Opens the run of the arguments, and reads its texts.
    ///
    /// # Errors
    /// As [`Run::open`]; if a text cannot be read, or is too short for a window.
    pub(crate) fn new(
        args: &'a Args,
        source: PathBuf,
        scratch: &'a Path,
        device: Device,
    ) -> Result<Self> {
        let embedded = args.model.model.is_none();
        let text = |path: &Option<PathBuf>, of: Dialect, n_chars, seed| match path {
            Some(path) => Ok(Some(texts::read(path)?)),
            None if embedded => Ok(Some(corpus::text(of, n_chars, seed))),
            None => Result::Ok(None),
        };
        let train = text(&args.train, Dialect::Plain, 400_000, 20)?;
        let train = train.expect("checked to be given");
        let eval = text(&args.eval, Dialect::Plain, 50_000, 12)?.expect("checked to be given");
        let drift = text(&args.drift, Dialect::Old, 50_000, 13)?;
        let stored = models::plan(&source, &peft::PerLayer::default())?;
        let cut =
            |text: &str, seq_len, option| texts::planned_windows(&stored, text, seq_len, option);
        let size = evaluation_batch(args.seq_len);
        let measured = |text: &str, option| -> Result<Vec<Batch>> {
            let windows = cut(text, args.seq_len, option)?.take(args.eval_windows);
            Ok(windows.batches(size, &device))
        };
        let calibration = cut(&train, args.seq_len, "--train")?.shuffled(0);
        let calibration_windows = calibration.take(args.samples);
        let setup = setup(args, &source, [Some(&train), Some(&eval), drift.as_ref()])?;
        Ok(Self {
            run: Run::open(&args.out, &setup)?,
            train: cut(&train, args.tune_len, "--train")?,
            eval: measured(&eval, "--eval")?,
            drift: drift.map_or(Ok(Vec::new()), |drift| measured(&drift, "--drift"))?,
            config: stored.config,
            calibration: calibration_windows.batches(size, &device),
            calibration_windows,
            args,
            scratch,
            device,
            source,
        })
    }

    /// Loads the dense model.
    pub(crate) fn load(&self) -> Result<Pretrained> {
        self.load_from(&self.source)
    }

    /// Loads a model.
    pub(crate) fn load_from(&self, dir: &Path) -> Result<Pretrained> {
        let mut lm = models::load_as(dir, &self.device, self.args.model.dtype.float())?;
        // It is about to be changed.
        lm.certificate = None;
        Ok(lm)
    }

    /// The calibration in batches of so many windows.
    pub(crate) fn calibration_by(&self, size: usize) -> Vec<Batch> {
        self.calibration_windows.batches(size, &self.device)
    }

    /// Measures a model on both texts.
    pub(crate) fn measure(&self, model: &Model) -> Result<Losses> {
        let bar = Bar::new("evaluating", self.eval.len() + self.drift.len(), "batches")?;
        let losses = |batches: &[Batch]| -> Result<Vec<f64>> {
            let mut losses = Vec::new();
            for batch in batches {
                losses.extend(window_losses(model, std::slice::from_ref(batch))?);
                bar.step("");
            }
            Ok(losses)
        };
        Ok(Losses {
            eval: losses(&self.eval)?,
            drift: losses(&self.drift)?,
        })
    }

    /// The losses of the dense model.
    pub(crate) fn dense(&self) -> Result<Losses> {
        self.run.cell("dense", || self.measure(&self.load()?.model))
    }

    /// Quantizes a model in memory with the calibration, if the quantizer needs one.
    pub(crate) fn quantize(&self, model: &mut Model, quantizer: &dyn Quantizer) -> Result<()> {
        let calibration = match quantizer.needs() {
            Needs::Nothing => &[],
            _ => &self.calibration[..],
        };
        let n_layers = peft::Linears::linears(model).len();
        let bar = Bar::new("quantizing", n_layers, "layers")?;
        models::quantize(model, &quantizer, calibration, |layer| {
            bar.step(&layer.path)
        })?;
        Ok(())
    }

    /// The cell of a quantizer.
    pub(crate) fn quantized(&self, name: &str, quantizer: &dyn Quantizer) -> Result<Quantized> {
        self.based(name, &quantizer, |model| self.quantize(model, quantizer))
    }

    /// The cell of another way to make a base in the formats of a recipe.
    pub(crate) fn based(
        &self,
        name: &str,
        recipe: &dyn Recipe,
        make: impl FnOnce(&mut Model) -> Result<()>,
    ) -> Result<Quantized> {
        self.run.cell(name, || {
            memory::reset_peak();
            let mut lm = self.load()?;
            let start = Instant::now();
            make(&mut lm.model)?;
            Ok(Quantized {
                seconds: start.elapsed().as_secs_f64(),
                peak_bytes: memory::peak_bytes(),
                losses: self.measure(&lm.model)?,
                n_bytes: models::plan(&self.source, recipe)?.n_bytes(),
            })
        })
    }

    /// The learning rate of a method, from trainings of a model that has its adapters.
    pub(crate) fn search(
        &self,
        name: &str,
        default: f64,
        model: impl FnOnce() -> Result<Model>,
    ) -> Result<Search> {
        self.run.cell(&format!("rate-{name}"), || {
            let fit = fit_config(default, self.args.search_steps, 0);
            let batches = self.batches(0, self.args.search_steps + 2 * 8);
            let search = rate::search(&model()?, &batches, &fit, self.args.search_steps)?;
            examples::println!("{name}: {search}");
            Ok(search)
        })
    }

    /// Tunes what trains in a model, and measures it.
    pub(crate) fn tune(
        &self,
        name: &str,
        model: &mut Model,
        n_trainable: usize,
        training: Training,
    ) -> Result<Tuned> {
        let Training {
            learning_rate,
            seed,
            steps,
        } = training;
        let batches = self.batches(seed, steps);
        let fit = fit_config(learning_rate, steps, seed);
        let start = Instant::now();
        memory::reset_peak();
        let mut watch = Watch::new(name.to_string(), steps, &batches, None)?;
        peft::fit(model, &batches, &fit, |_, training| {
            watch.step(training.steps())
        })?;
        watch.finish("", &[])?;
        let (seconds, peak_bytes) = (start.elapsed().as_secs_f64(), memory::peak_bytes());
        Ok(Tuned {
            losses: self.measure(model)?,
            learning_rate,
            n_trainable,
            n_tokens: steps * self.args.batch * self.args.tune_len,
            seconds,
            peak_bytes,
        })
    }

    /// So many training batches in the order of a seed, or all if there are fewer.
    pub(crate) fn batches(&self, seed: u64, n: usize) -> Vec<Batch> {
        let windows = self.train.shuffled(seed).take(n * self.args.batch);
        windows.batches(self.args.batch, &self.device)
    }

    /// The default learning rate of a method for the model.
    pub(crate) fn default_rate(&self, method: &dyn Method) -> f64 {
        method.learning_rate(self.config.hidden_size())
    }
}

/// The settings that all cells of a run share, and what the model and the texts were.
fn setup(args: &Args, source: &Path, texts: [Option<&String>; 3]) -> Result<Map<String, Value>> {
    let text = |text: Option<&String>| {
        text.map(|text| json!({"bytes": text.len(), "crc32c": crc32c::crc32c(text.as_bytes())}))
    };
    let [train, eval, drift] = texts.map(text);
    let setup = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": args.model.name(),
        "model_bytes": weights_bytes(source)?,
        "train": train,
        "eval": eval,
        "drift": drift,
        "group_size": args.group_size().to_string(),
        "seq_len": args.seq_len,
        "samples": args.samples,
        "eval_windows": args.eval_windows,
        "tune_len": args.tune_len,
        "batch": args.batch,
        "steps": args.steps,
        "search_steps": args.search_steps,
        "rank": args.rank,
        "device": args.model.device.name,
        "dtype": args.model.dtype.name.name(),
    });
    match setup {
        Value::Object(setup) => Ok(setup),
        _ => unreachable!("written as an object"),
    }
}

/// Lets all parameters of a model train, in `f32`.
pub(crate) fn unfrozen(model: Model) -> Model {
    struct Unfreeze;
    impl ModuleMapper for Unfreeze {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let param = param.map(|tensor| tensor.cast(DType::F32));
            param.set_require_grad(true)
        }
    }
    burn::module::Module::map(model, &mut Unfreeze)
}

impl Losses {
    /// The window-wise mean of several.
    pub(crate) fn mean(of: &[&Self]) -> Self {
        let mean = |text: fn(&Self) -> &[f64]| {
            let n_windows = text(of[0]).len();
            let at = |at: usize| of.iter().map(|losses| text(losses)[at]).sum::<f64>();
            (0..n_windows).map(|i| at(i) / of.len() as f64).collect()
        };
        Self {
            eval: mean(|of| &of.eval),
            drift: mean(|of| &of.drift),
        }
    }

    /// The perplexity of the held-out text.
    pub(crate) fn perplexity(&self) -> f64 {
        mean(&self.eval).exp()
    }

    /// The perplexity of the other text.
    pub(crate) fn drift(&self) -> Option<f64> {
        (!self.drift.is_empty()).then(|| mean(&self.drift).exp())
    }

    /// How much higher the loss of held-out text is than another model's, with an interval over the windows.
    pub(crate) fn above(&self, other: &Self) -> Result<Estimate> {
        let differences = self.eval.iter().zip(&other.eval).map(|(a, b)| a - b);
        let differences: Vec<f64> = differences.collect();
        Ok(Bootstrap::new().with_resamples(10_000).mean(&differences)?)
    }
}

fn mean(of: &[f64]) -> f64 {
    of.iter().sum::<f64>() / of.len() as f64
}
