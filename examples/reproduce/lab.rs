//! What the experiments have in common: the model, its texts, and how a model is measured and tuned.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor};
use evaluate::window_losses;
use examples::corpus::{self, Dialect};
use examples::format::FormatName;
use examples::method::MethodName;
use examples::outcome::Result;
use examples::progress::Bar;
use examples::rate::{self, Search};
use examples::texts::{self, evaluation_batch, fit_config, n_windows};
use examples::training::Watch;
use examples::{interrupt, memory, println};
use models::{Config, Model, Plan, Pretrained};
use peft::{Batch, Method, Targets};
use quant_core::{Needs, Quantizer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::Args;
use crate::losses::{Losses, Windows};
use crate::run_dir::Run;

/// The batches of the training text that choose learning rates and the end of a training, at most.
const HELD_OUT: usize = 4;

/// A model and its texts, in a run.
pub(crate) struct Lab<'a> {
    pub(crate) args: &'a Args,
    pub(crate) run: Run,
    pub(crate) config: Config,
    pub(crate) device: Device,
    /// The directory of the dense model.
    pub(crate) source: PathBuf,
    pub(crate) calibration: Vec<Batch>,
    calibration_windows: models::Windows,
    train: models::Windows,
    /// The end of the training text, which nothing is trained or calibrated on.
    held_out: models::Windows,
    pub(crate) eval: Vec<Batch>,
    drift: Vec<Batch>,
}

/// A quantized model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Quantized {
    pub(crate) losses: Losses,
    /// Bytes of its weights.
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
        stored: Plan,
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
        let cut =
            |text: &str, seq_len, option| texts::planned_windows(&stored, text, seq_len, option);
        let size = evaluation_batch(args.seq_len);
        let measured = |text: &str, option| -> Result<Vec<Batch>> {
            let windows = cut(text, args.seq_len, option)?.take(args.eval_windows);
            Ok(windows.batches(size, &device))
        };
        let all = cut(&train, args.tune_len, "--train")?;
        let n_train = all.len() - (HELD_OUT * args.batch).min(all.len() / 2);
        let calibration = cut(&train, args.seq_len, "--train")?;
        // Windows that end before those that are held out.
        let n_calibration = n_train * args.tune_len / args.seq_len;
        if n_train == all.len() || n_calibration == 0 {
            return Err(
                "the --train text: it is too short for a window, and one that is held out".into(),
            );
        }
        let select =
            |windows: &models::Windows, from, to| windows.select(&(from..to).collect::<Vec<_>>());
        let calibration = select(&calibration, 0, n_calibration).shuffled(0);
        let calibration = calibration.take(args.samples);
        let setup = setup(args, &source, [Some(&train), Some(&eval), drift.as_ref()])?;
        let drift = match &drift {
            Some(drift) => measured(drift, "--drift")?,
            None => Vec::new(),
        };
        Ok(Self {
            train: select(&all, 0, n_train),
            held_out: select(&all, n_train, all.len()),
            eval: measured(&eval, "--eval")?,
            drift,
            run: Run::open(&args.out, &setup)?,
            config: stored.config,
            calibration: calibration.batches(size, &device),
            calibration_windows: calibration,
            args,
            device,
            source,
        })
    }

    /// The calibration in batches of so many windows.
    pub(crate) fn calibration_by(&self, size: usize) -> Vec<Batch> {
        self.calibration_windows.batches(size, &self.device)
    }

    /// The held-out batches of the training text.
    pub(crate) fn held_out(&self) -> Vec<Batch> {
        self.held_out.batches(self.args.batch, &self.device)
    }

    /// So many training batches in the order of a seed, or all if there are fewer.
    pub(crate) fn batches(&self, seed: u64, n: usize) -> Vec<Batch> {
        let windows = self.train.shuffled(seed).take(n * self.args.batch);
        windows.batches(self.args.batch, &self.device)
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

    /// Measures a model on both texts.
    pub(crate) fn measure(&self, model: &Model) -> Result<Losses> {
        let bar = Bar::new("evaluating", self.eval.len() + self.drift.len(), "batches")?;
        let losses = |batches: &[Batch]| -> Result<Windows> {
            let mut losses = Vec::new();
            for batch in batches {
                match window_losses(model, std::slice::from_ref(batch)) {
                    Ok(of_batch) => losses.extend(of_batch),
                    Err(evaluate::Error::NonFinite { .. }) => {
                        return Ok(Windows::diverged(n_windows(batches)));
                    }
                    Err(error) => return Err(error.into()),
                }
                bar.step("");
            }
            Ok(Windows(losses))
        };
        Ok(Losses {
            eval: losses(&self.eval)?,
            drift: losses(&self.drift)?,
        })
    }

    /// The losses of a model that diverged.
    fn diverged(&self) -> Losses {
        Losses {
            eval: Windows::diverged(n_windows(&self.eval)),
            drift: Windows::diverged(n_windows(&self.drift)),
        }
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

    /// The cell of a base that `make` makes of the dense model, in the format of `quantizer`; saved as a model
    /// if it is to be `kept`.
    pub(crate) fn based(
        &self,
        name: &str,
        quantizer: &dyn Quantizer,
        kept: Option<&Path>,
        make: impl FnOnce(&mut Model) -> Result<()>,
    ) -> Result<Quantized> {
        self.run.cell(name, || {
            memory::reset_peak();
            let mut lm = self.load()?;
            let start = Instant::now();
            make(&mut lm.model)?;
            let (seconds, peak_bytes) = (start.elapsed().as_secs_f64(), memory::peak_bytes());
            if let Some(dir) = kept {
                replace(&lm, dir)?;
            }
            Ok(Quantized {
                seconds,
                peak_bytes,
                losses: self.measure(&lm.model)?,
                n_bytes: models::plan(&self.source, &quantizer)?.n_bytes(),
            })
        })
    }

    /// The directory of the quantized base of a method, which is made if it is not there.
    pub(crate) fn base(&self, method: MethodName, bits: usize) -> Result<PathBuf> {
        let size = self.args.group_size();
        let quantizer = method.quantizer(bits, size, false, FormatName::QuantCore)?;
        let grid = match quantizer.format()?.grid().is_codebook() {
            true => "nf",
            false => "affine",
        };
        let dir = self.run.model(&format!("{grid}-{bits}"));
        if !dir.exists() {
            let mut lm = self.load()?;
            self.quantize(&mut lm.model, &*quantizer)?;
            replace(&lm, &dir)?;
        }
        Ok(dir)
    }

    /// A method for all layers, of the rank of the options.
    pub(crate) fn adapters(&self, method: MethodName, seed: u64) -> Box<dyn Method> {
        let rank = self.args.rank;
        method.method(rank, rank as f32, &Targets::All, seed, false)
    }

    /// The learning rate of a method, from trainings of a model that has its adapters.
    pub(crate) fn search(
        &self,
        name: &str,
        default: f64,
        model: impl FnOnce() -> Result<Model>,
    ) -> Result<Search> {
        self.run.cell(&format!("rate-{name}"), || {
            let steps = self.args.search_steps;
            let fit = fit_config(default, steps, 0);
            let (train, held_out) = (self.batches(0, steps), self.held_out());
            let search = rate::search(&model()?, &train, &held_out, &fit, steps)?;
            println!("{name}: {search}");
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
        let mut watch = Watch::new(name.to_string(), steps, &batches, None)?;
        let fitted = peft::fit(model, &batches, &fit, |_, training| {
            watch.step(training.steps())
        });
        // A signal ends the training early.
        interrupt::wait_if_ending();
        let seconds = start.elapsed().as_secs_f64();
        let losses = match fitted {
            Ok(_) => {
                watch.finish("", &[])?;
                self.measure(model)?
            }
            Err(peft::Error::NonFinite { .. }) => self.diverged(),
            Err(error) => return Err(error.into()),
        };
        let of_step = |step: usize| batches[step % batches.len()].tokens().dims();
        let tokens = (0..steps).map(|step| of_step(step).iter().product::<usize>());
        Ok(Tuned {
            losses,
            learning_rate,
            n_trainable,
            n_tokens: tokens.sum(),
            seconds,
        })
    }

    /// The default learning rate of a method for the model.
    pub(crate) fn default_rate(&self, method: &dyn Method) -> f64 {
        method.learning_rate(self.config.hidden_size())
    }

    /// Runs one cell for each of the seeds.
    pub(crate) fn seeds<T: Serialize + serde::de::DeserializeOwned>(
        &self,
        name: &str,
        of: impl Fn(u64) -> Result<T>,
    ) -> Result<Vec<T>> {
        let seeds = self.args.seeds().into_iter();
        seeds
            .map(|seed| self.run.cell(&format!("{name}-seed-{seed}"), || of(seed)))
            .collect()
    }
}

/// Saves a model in the place of what a run that was stopped may have left there.
fn replace(lm: &Pretrained, dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    Ok(models::save(lm, dir)?)
}

/// The settings of a run, and what the model and the texts were.
fn setup(args: &Args, source: &Path, texts: [Option<&String>; 3]) -> Result<Map<String, Value>> {
    let text = |text: Option<&String>| {
        text.map(|text| json!({"bytes": text.len(), "crc32c": crc32c::crc32c(text.as_bytes())}))
    };
    let [train, eval, drift] = texts.map(text);
    let sizes = args.group_size.iter().map(ToString::to_string);
    let setup = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": checksums(source)?,
        "train": train,
        "eval": eval,
        "drift": drift,
        "bits": args.widths(),
        "group_size": sizes.collect::<Vec<_>>(),
        "seq_len": args.seq_len,
        "samples": args.samples,
        "eval_windows": args.eval_windows,
        "tune_len": args.tune_len,
        "batch": args.batch,
        "steps": args.steps,
        "search_steps": args.search_steps,
        "rank": args.rank,
        "seed": args.seeds(),
        "device": args.model.device.name,
        "arithmetic": args.model.device.arithmetic.map(|of| of.to_string()),
        "dtype": args.model.dtype.name.name(),
    });
    match setup {
        Value::Object(setup) => Ok(setup),
        _ => unreachable!("written as an object"),
    }
}

/// A checksum of each file of a model.
fn checksums(dir: &Path) -> Result<BTreeMap<String, u32>> {
    let mut checksums = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_file() && !name.starts_with('.') {
            let mut file = fs::File::open(&path)?;
            let (mut sum, mut buffer) = (0, vec![0; 1 << 20]);
            loop {
                match std::io::Read::read(&mut file, &mut buffer)? {
                    0 => break,
                    n => sum = crc32c::crc32c_append(sum, &buffer[..n]),
                }
            }
            checksums.insert(name.into_owned(), sum);
        }
    }
    Ok(checksums)
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
    model.map(&mut Unfreeze)
}
