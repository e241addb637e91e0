//! The results of `adapt`: a JSON file and a table.

use examples::format::FormatName;
use examples::method::PresetName;
use examples::table::{self, number};
use examples::texts::Perplexities;
use peft::{BestEvaluation, Certificate, FitConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Merge;

/// The contents of the JSON file.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The version of this program, and the command that was given.
    pub(crate) version: &'static str,
    pub(crate) command: Vec<String>,
    pub(crate) model: String,
    /// Whether the model was packed before.
    pub(crate) is_packed: bool,
    pub(crate) preset: Option<PresetName>,
    pub(crate) targets: Vec<String>,
    pub(crate) merge: Merge,
    pub(crate) allow_rounding: bool,
    /// `gptq`: the mean over non-overlapping windows of the mean NLL of each. `targets`: the mean NLL over
    /// all targets.
    pub(crate) perplexity_protocol: &'static str,
    /// How many records were encoded, cut and dropped, for training and for evaluation.
    pub(crate) records: Option<[String; 2]>,
    pub(crate) seq_len: usize,
    pub(crate) n_task_windows: usize,
    pub(crate) n_base_windows: usize,
    pub(crate) batch: usize,
    /// The processes that trained together, each with a batch of a step.
    pub(crate) n_processes: usize,
    pub(crate) seed: u64,
    pub(crate) device: String,
    pub(crate) dtype: &'static str,
    /// Bytes of the weights of the model before quantization.
    pub(crate) n_bytes: u64,
    /// Of the model before quantization; none if it was packed before.
    pub(crate) full_precision: Option<Perplexities>,
    pub(crate) runs: Vec<Run>,
}

/// The results of one base.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) method: String,
    /// The formats of the packed layers.
    pub(crate) formats: String,
    /// The group size of the first of them.
    pub(crate) group_size: Option<usize>,
    /// The format of the saved model.
    pub(crate) saved_as: FormatName,
    /// Bytes of the saved weights.
    pub(crate) n_bytes: u64,
    pub(crate) n_trainable: usize,
    /// The settings of the adapters, each once, as `adapter_config.json` has them.
    pub(crate) settings: Vec<Value>,
    pub(crate) fit: FitConfig,
    /// Relative quantization error of the projections, the mean over the layers; none if they were
    /// packed before.
    pub(crate) weight_error: Option<f64>,
    pub(crate) rounded: Perplexities,
    /// The mean loss over the targets of each step, in nats, before its update.
    pub(crate) losses: Vec<f64>,
    /// The step after which the training was resumed, if it was.
    pub(crate) resumed_from: Option<usize>,
    /// The best evaluation in the course of the training; the adapters are those of it with `--patience`.
    pub(crate) best: Option<BestEvaluation>,
    /// Whether the training ended before its last step, since evaluations did not improve.
    pub(crate) is_ended_early: bool,
    /// What may be wrong with the training.
    pub(crate) warnings: Vec<String>,
    pub(crate) tuned: Perplexities,
    pub(crate) reloaded: Perplexities,
    /// None if the adapters are kept beside the base.
    pub(crate) certificate: Option<Certificate>,
    /// The number of logits of the tuned model that the merged and the reloaded one's are compared with.
    pub(crate) n_logits: usize,
    /// The largest difference of a logit of the merged and of the tuned model. The reloaded model's logits
    /// equal the merged one's bit for bit.
    pub(crate) max_logit_difference: f32,
    /// From quantizing to the comparison.
    pub(crate) seconds: f64,
    /// Peak resident memory of the process during the run.
    pub(crate) peak_bytes: Option<u64>,
}

impl Run {
    /// Whether the training more than doubled the perplexity of the task that it was for.
    pub(crate) fn is_ruined(&self) -> bool {
        self.tuned.task > 2.0 * self.rounded.task
    }
}

/// Formats the report as a Markdown table.
pub(crate) fn table(report: &Report) -> String {
    let header = [
        "method",
        "weights",
        "bytes",
        "trainable",
        "base text: quantized / tuned / reloaded",
        "task text: quantized / tuned / reloaded",
        "seconds",
        "peak MiB",
    ];
    let mut rows = vec![header.map(String::from)];
    let dash = || "-".to_string();
    let plain = |perplexity| number(perplexity, 3);
    if let Some(full) = &report.full_precision {
        rows.push([
            "none".into(),
            "dense".into(),
            report.n_bytes.to_string(),
            dash(),
            plain(full.base),
            plain(Some(full.task)),
            dash(),
            dash(),
        ]);
    }
    for run in &report.runs {
        let stages = [run.rounded, run.tuned, run.reloaded];
        let each = |of: fn(&Perplexities) -> Option<f64>| match of(&stages[0]) {
            None => dash(),
            Some(_) => stages.each_ref().map(|stage| plain(of(stage))).join(" / "),
        };
        rows.push([
            run.method.clone(),
            run.formats.clone(),
            run.n_bytes.to_string(),
            run.n_trainable.to_string(),
            each(|p| p.base),
            each(|p| Some(p.task)),
            format!("{:.1}", run.seconds),
            run.peak_bytes.map_or(dash(), |n| (n >> 20).to_string()),
        ]);
    }
    format!(
        "perplexity by the protocol `{}`: {} windows of {} tokens of the task, {} of the base text\n\n{}",
        report.perplexity_protocol,
        report.n_task_windows,
        report.seq_len,
        report.n_base_windows,
        table::markdown(&rows)
    )
}
