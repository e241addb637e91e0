//! The texts of a tuning run, in windows, and the perplexities and logits that are measured on them.

use std::path::Path;
use std::slice;

use burn::tensor::Device;
use evaluate::{target_loss, window_losses};
use models::{Plan, Pretrained, Windows};
use peft::{Batch, CausalLm, FitConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::corpus::{self, Dialect};
use crate::instructions::Instructions;
use crate::outcome::Result;
use crate::progress::Bar;

/// The batches that a model is trained and measured on.
pub struct Texts {
    /// Training batches.
    pub train: Vec<Batch>,
    /// Evaluation batches of the same task.
    pub task: Vec<Batch>,
    /// Evaluation batches of the text that the model was trained on before; none if there is none.
    pub base: Vec<Batch>,
    /// How many records were encoded, cut and dropped, for training and for evaluation.
    pub records: Option<[String; 2]>,
}

/// The source of the texts and the sizes of their windows.
#[derive(Clone, Copy)]
pub struct Cut<'a> {
    /// Where the texts come from.
    pub source: Source<'a>,
    /// Tokens in a window, or in a row of packed records.
    pub seq_len: usize,
    /// Windows or rows in a training batch.
    pub batch: usize,
    /// Windows of each text to evaluate on, at most.
    pub eval_windows: usize,
    /// The seed of the order of the windows.
    pub seed: u64,
}

/// The data that a model is tuned on.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// The generated texts of [`corpus`].
    Corpus,
    /// Files: training, evaluation and base text.
    Files(&'a Path, &'a Path, Option<&'a Path>),
    /// Records of prompts and answers, of which the answers are targets.
    Instructions(&'a Instructions, &'a Path),
}

/// The perplexities of a model.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Perplexities {
    /// On the base text, if there is one.
    pub base: Option<f64>,
    /// On the evaluation text of the task.
    pub task: f64,
}

impl Cut<'_> {
    /// Checks the texts as far as is possible without the model.
    ///
    /// # Errors
    /// If one cannot be read, or is too short for a window.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        match self.source {
            Source::Corpus => Ok(()),
            Source::Instructions(instructions, data) => instructions.check(data),
            Source::Files(train, task, base) => {
                let texts = [
                    (Some(train), "--train"),
                    (Some(task), "--eval"),
                    (base, "--base"),
                ];
                let mut texts = texts.into_iter();
                texts.try_for_each(|(path, option)| match path {
                    Some(path) => check(plan, &read(path)?, self.seq_len, option),
                    None => Ok(()),
                })
            }
        }
    }
}

impl Texts {
    /// Reads or generates the texts and cuts them into windows.
    ///
    /// # Errors
    /// If a text cannot be read, or is too short for a window.
    pub fn new(cut: &Cut, lm: &Pretrained, device: &Device) -> Result<Self> {
        let (train, task, base) = match cut.source {
            Source::Instructions(instructions, data) => {
                return instructions.texts(data, cut, lm, device);
            }
            Source::Files(train, task, base) => {
                (read(train)?, read(task)?, base.map(read).transpose()?)
            }
            Source::Corpus => (
                corpus::text(Dialect::Old, 400_000, 10),
                corpus::text(Dialect::Old, 25_000, 11),
                Some(corpus::text(Dialect::Plain, 25_000, 12)),
            ),
        };
        let evaluate = |text: &str, option: &str| -> Result<Vec<Batch>> {
            let windows = windows(lm, text, cut.seq_len, option)?;
            let windows = windows.take(cut.eval_windows);
            Ok(windows.batches(evaluation_batch(cut.seq_len), device))
        };
        Ok(Self {
            train: windows(lm, &train, cut.seq_len, "--train")?
                .shuffled(cut.seed)
                .batches(cut.batch, device),
            task: evaluate(&task, "--eval")?,
            base: match base {
                Some(base) => evaluate(&base, "--base")?,
                None => Vec::new(),
            },
            records: None,
        })
    }

    /// The name of the protocol of [`Texts::perplexities`].
    pub fn protocol(&self) -> &'static str {
        match self.records {
            None => "gptq",
            Some(_) => "targets",
        }
    }

    /// Measures perplexities: of texts by the protocol `gptq`, of records over all targets.
    ///
    /// # Errors
    /// If a token of the texts is not in the vocabulary of the model.
    pub fn perplexities(&self, model: &impl CausalLm) -> Result<Perplexities> {
        let base = if self.base.is_empty() {
            None
        } else {
            Some(perplexity("evaluating, base text", model, &self.base)?)
        };
        let task = match self.records {
            None => perplexity("evaluating", model, &self.task)?,
            Some(_) => target_perplexity("evaluating", model, &self.task)?,
        };
        Ok(Perplexities { base, task })
    }

    /// Returns the logits of the first two evaluation batches of the task, or of the first alone if they are many:
    /// several models' are in memory at a time.
    pub fn probe(&self, model: &impl CausalLm) -> Vec<f32> {
        const MANY: usize = 1 << 24;
        let logits = |batch: &Batch| {
            let logits = model.forward_spans(batch.tokens(), batch.spans());
            let logits = logits.into_data().convert::<f32>();
            logits.try_into_vec::<f32>().expect("converted to f32")
        };
        let mut batches = self.task.iter().take(2);
        let mut all = batches.next().map_or(Vec::new(), logits);
        if all.len() < MANY {
            batches.for_each(|batch| all.extend(logits(batch)));
        }
        all
    }
}

/// Measures a perplexity by the protocol `gptq`, with a bar of this name.
///
/// # Errors
/// As [`window_losses`].
pub fn perplexity(name: &'static str, model: &impl CausalLm, batches: &[Batch]) -> Result<f64> {
    let bar = Bar::new(name, batches.len(), "batches")?;
    let mut losses = Vec::new();
    for batch in batches {
        losses.extend(window_losses(model, slice::from_ref(batch))?);
        bar.step("");
    }
    Ok((losses.iter().sum::<f64>() / losses.len() as f64).exp())
}

/// Measures the perplexity over all targets, with a bar of this name.
fn target_perplexity(name: &'static str, model: &impl CausalLm, batches: &[Batch]) -> Result<f64> {
    let bar = Bar::new(name, batches.len(), "batches")?;
    let (mut sum, mut n_targets) = (0.0, 0);
    for batch in batches.iter().filter(|batch| batch.n_targets() > 0) {
        let n = batch.n_targets();
        sum += target_loss(model, slice::from_ref(batch))? * n as f64;
        n_targets += n;
        bar.step("");
    }
    Ok((sum / n_targets as f64).exp())
}

/// Reads a text file, or the documents of a `.jsonl` file, its fields `text`, with an empty line between two.
///
/// # Errors
/// If it cannot be read, is not UTF-8, or a record has no text.
pub fn read(path: &Path) -> Result<String> {
    if path.extension().is_some_and(|of| of == "jsonl") {
        return documents(path);
    }
    let refuse = |problem: String| format!("`{}`: {problem}", path.display());
    let bytes = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let before = error.as_bytes().iter().take(at);
        let line = 1 + before.filter(|byte| **byte == b'\n').count();
        refuse(format!(
            "invalid UTF-8 at byte {at}, in line {line}; save the file as UTF-8"
        ))
    });
    Ok(text?)
}

fn documents(path: &Path) -> Result<String> {
    let mut all = String::new();
    for record in instruct::read_records(path)? {
        let Some(Value::String(text)) = record.fields.get("text") else {
            return Err(format!(
                "`{}`, line {}: no text in the field `text`",
                path.display(),
                record.line
            )
            .into());
        };
        if !all.is_empty() {
            all.push_str("\n\n");
        }
        all.push_str(text);
    }
    Ok(all)
}

/// Checks that the text of an option of the program fills a window, before the model is loaded.
///
/// # Errors
/// If it is too short for one, or the model cannot have windows of this length.
pub fn check(plan: &Plan, text: &str, seq_len: usize, option: &str) -> Result<()> {
    let checked = plan.check_text(text, seq_len);
    checked.map_err(|error| format!("the {option} text: {error}").into())
}

/// Cuts the text of an option of the program into windows.
///
/// # Errors
/// If it is too short for one, or the model cannot have windows of this length.
pub fn windows(lm: &Pretrained, text: &str, seq_len: usize, option: &str) -> Result<Windows> {
    let windows = lm.windows(text, seq_len);
    windows.map_err(|error| format!("the {option} text: {error}").into())
}

/// Cuts the text of an option of the program into windows, as [`windows`] does, without the model.
///
/// # Errors
/// As [`windows`].
pub fn planned_windows(plan: &Plan, text: &str, seq_len: usize, option: &str) -> Result<Windows> {
    let windows = plan.windows(text, seq_len);
    windows.map_err(|error| format!("the {option} text: {error}").into())
}

/// The number of windows in a batch that is only evaluated.
pub fn evaluation_batch(seq_len: usize) -> usize {
    // 1024 tokens: activations stay in memory that is used again for the next batch.
    (1024 / seq_len).max(1)
}

/// The number of windows in batches.
pub fn n_windows(batches: &[Batch]) -> usize {
    batches.iter().map(|batch| batch.tokens().dims()[0]).sum()
}

/// The training settings of the programs: a cosine schedule after a warm-up of a twentieth of the steps.
pub fn fit_config(learning_rate: f64, steps: usize, seed: u64) -> FitConfig {
    FitConfig::new()
        .with_learning_rate(learning_rate)
        .with_steps(Some(steps))
        .with_warmup_steps(steps / 20)
        .with_seed(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_the_texts_of_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c4.jsonl");
        let good = "{\"text\": \"One.\\nTwo.\"}\n{\"url\": \"x\", \"text\": \"Three.\"}\n";
        std::fs::write(&path, good).unwrap();
        assert_eq!(read(&path).unwrap(), "One.\nTwo.\n\nThree.");
        std::fs::write(&path, "{\"text\": \"One.\"}\n{\"texts\": \"Two.\"}\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(
            error.contains("c4.jsonl") && error.contains("line 2"),
            "{error}"
        );
        // Any other file is a text, whatever is in it.
        let path = dir.path().join("c4.txt");
        std::fs::write(&path, good).unwrap();
        assert_eq!(read(&path).unwrap(), good);
    }
}
