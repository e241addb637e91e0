//! What a tuning run is measured with: texts in windows, perplexities, logits, bytes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use evaluate::{perplexity, target_loss};
use models::{Pretrained, Windows};
use peft::{Batch, CausalLm};
use serde::Serialize;

use crate::corpus::{self, Dialect};
use crate::instructions::Instructions;

/// A result of an example.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The texts, in windows on a device.
pub struct Texts {
    /// To train on.
    pub train: Vec<Batch>,
    /// Of the same task, to evaluate on.
    pub task: Vec<Batch>,
    /// Like those that the model knows, if there is one.
    pub base: Vec<Batch>,
    /// What became of instruction data: of that to train on, and of that to evaluate on.
    pub records: Option<[String; 2]>,
}

/// Where texts come from, and how they are cut.
pub struct Cut<'a> {
    /// What they are.
    pub source: Source<'a>,
    /// Tokens in a window, or in a row of instruction data.
    pub seq_len: usize,
    /// Windows in a step.
    pub batch: usize,
    /// Windows of each text to evaluate on.
    pub eval_windows: usize,
    /// The seed of the order of the windows.
    pub seed: u64,
}

/// What a model is tuned on.
pub enum Source<'a> {
    /// The texts of the models that come with the programs.
    Corpus,
    /// Training, evaluation and base text.
    Files(&'a Path, &'a Path, Option<&'a PathBuf>),
    /// Records with prompts that are not learned.
    Instructions(&'a Instructions, &'a Path),
}

/// The perplexities of a model.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Perplexities {
    /// On the base text, if there is one.
    pub base: Option<f64>,
    /// On the task's evaluation text.
    pub task: f64,
}

impl Texts {
    /// Reads the texts, or makes those of the embedded model, and cuts them.
    ///
    /// # Errors
    /// If a text cannot be read, or is too short for a window.
    pub fn new(cut: &Cut, lm: &Pretrained, device: &Device) -> Result<Self> {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(text),
            Err(error) => Err(format!("cannot read `{}`: {error}", path.display())),
        };
        let (train, task, base) = match cut.source {
            Source::Instructions(instructions, data) => {
                return instructions.texts(data, cut, lm, device);
            }
            Source::Files(train, task, base) => (
                read(train)?,
                read(task)?,
                base.map(|base| read(base)).transpose()?,
            ),
            Source::Corpus => (
                corpus::text(Dialect::Old, 400_000, 10),
                corpus::text(Dialect::Old, 25_000, 11),
                Some(corpus::text(Dialect::Plain, 25_000, 12)),
            ),
        };
        let windows = |text: &str, option: &str| -> Result<Windows> {
            let windows = lm.windows(text, cut.seq_len);
            windows.map_err(|error| format!("the {option} text: {error}").into())
        };
        // Small enough for the activations of a batch to stay in memory that is used again.
        let evaluate = |windows: Windows| {
            let windows = windows.take(cut.eval_windows);
            windows.batches((1024 / cut.seq_len).max(1), device)
        };
        Ok(Self {
            train: windows(&train, "--train")?
                .shuffled(cut.seed)
                .batches(cut.batch, device),
            task: evaluate(windows(&task, "--eval")?),
            base: match base {
                Some(base) => evaluate(windows(&base, "--base")?),
                None => Vec::new(),
            },
            records: None,
        })
    }

    /// The protocol of [`Texts::perplexities`].
    pub fn protocol(&self) -> &'static str {
        match self.records {
            None => "gptq",
            Some(_) => "targets",
        }
    }

    /// Perplexities: in the protocol `gptq` on texts, of all tokens to be learned on instruction data.
    ///
    /// # Errors
    /// If the model does not have a token of the texts.
    pub fn perplexities(&self, model: &impl CausalLm) -> Result<Perplexities> {
        let base = match self.base.is_empty() {
            true => None,
            false => Some(perplexity(model, &self.base)?.value()),
        };
        let task = match self.records {
            None => perplexity(model, &self.task)?.value(),
            Some(_) => target_loss(model, &self.task)?.exp(),
        };
        Ok(Perplexities { base, task })
    }

    /// The logits of the first batches of the task.
    pub fn probe(&self, model: &impl CausalLm) -> Vec<f32> {
        let logits = |batch: &Batch| {
            let logits = model.forward_spans(batch.tokens(), batch.spans());
            let logits = logits.into_data().convert::<f32>();
            logits.try_into_vec::<f32>().expect("converted to f32")
        };
        self.task.iter().take(2).flat_map(logits).collect()
    }
}

/// How many windows are in batches.
pub fn n_windows(batches: &[Batch]) -> usize {
    batches.iter().map(|batch| batch.tokens().dims()[0]).sum()
}

/// The bits of numbers, to tell whether they are the same.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest difference, infinite where one of two different values is not a number.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| {
        let difference = (a - b).abs();
        match a.to_bits() == b.to_bits() {
            true => 0.0,
            false if difference.is_nan() => f32::INFINITY,
            false => difference,
        }
    });
    differences.fold(0.0, f32::max)
}

/// The bytes of all safetensors files in a directory.
///
/// # Errors
/// If it cannot be read.
pub fn weights_bytes(dir: &Path) -> Result<u64> {
    let mut n_bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            n_bytes += entry.metadata()?.len();
        }
    }
    Ok(n_bytes)
}

/// How a program ends: a failure is said with all its causes.
pub fn exit(result: Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprint!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
