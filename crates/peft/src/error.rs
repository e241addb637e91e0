use std::path::{Path, PathBuf};

use burn::tensor::DType;
use quant_core::Format;

use crate::Fingerprint;

/// An error of an adapter, a layer, a file or a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of a file or a directory.
    #[error(transparent)]
    File(#[from] tensor_files::Error),
    /// A layer whose weight could not be quantized or dequantized.
    #[error("layer `{path}`")]
    Quant {
        /// The layer.
        path: String,
        /// The error.
        source: quant_core::Error,
    },
    /// Targets that match no layer.
    #[error(
        "targets {targets:?} match none of the model's {n_linears} linear layers; their last names are {names:?}"
    )]
    NoTarget {
        /// The targets.
        targets: Vec<String>,
        /// The number of layers.
        n_linears: usize,
        /// The last parts of their paths.
        names: Vec<String>,
    },
    /// A layer that has an adapter already.
    #[error("layer `{path}` has an adapter already; merge it, or activate others instead")]
    AlreadyAdapted {
        /// The layer.
        path: String,
    },
    /// A layer whose weight is quantized already.
    #[error("layer `{path}` is quantized already")]
    AlreadyQuantized {
        /// The layer.
        path: String,
    },
    /// A method that trains the grid, for a dense weight.
    #[error(
        "{method} needs a quantized weight, but layer `{path}` is dense; quantize the model first"
    )]
    NeedsQuantized {
        /// The method.
        method: &'static str,
        /// The layer.
        path: String,
    },
    /// A rank above the smaller side of a layer's weight.
    #[error(
        "a rank of {rank} is more than the smaller side of layer `{path}`, {dims:?}; lower it, or leave the layer out of the targets"
    )]
    Rank {
        /// The layer.
        path: String,
        /// The rank.
        rank: usize,
        /// `[d_in, d_out]`.
        dims: [usize; 2],
    },
    /// A dense weight of another dtype than that of its adapter.
    #[error(
        "layer `{path}` is {found:?}, whose values its adapter, in F32, does not hold; convert the weight to F32"
    )]
    NotF32 {
        /// The layer.
        path: String,
        /// The dtype of its weight.
        found: DType,
    },
    /// An adapter whose sum with a packed weight is not on the grid.
    #[error(
        "layer `{path}` is packed, and its codes cannot hold {method}: {reason}; keep the adapters beside the base (`Adapters::save`), merge into a dense weight (`OffGrid::Dense`), or round anew (`OffGrid::Round`), which loses a part of what was learned"
    )]
    MergeIntoPacked {
        /// The method.
        method: &'static str,
        /// The layer.
        path: String,
        /// The reason.
        reason: String,
    },
    /// Tiles that do not fit a weight; [`Tile::with_pool`](crate::Tile::with_pool) and
    /// [`Tile::with_repeat`](crate::Tile::with_repeat) choose others.
    #[error(
        "{method} on layer `{path}`: {problem}; choose other tiles or another base, or leave the layer out of the targets"
    )]
    Tiles {
        /// The method.
        method: &'static str,
        /// The layer.
        path: String,
        /// The problem.
        problem: String,
    },
    /// Trained zeros, for a grid that has none.
    #[error(
        "PEQA cannot train the zeros of layer `{path}`: {format} has none; quantize to an affine grid"
    )]
    Zeros {
        /// The layer.
        path: String,
        /// Its format.
        format: Format,
    },
    /// Scales to be trained in `f16`, of a base whose scales are not.
    #[error(
        "PEQA cannot train the scales of layer `{path}` in f16: those of the base are not; quantize with `with_f16_scales`, or round the merged model (`MergeConfig::with_stored_grid`)"
    )]
    ScalesNotF16 {
        /// The layer.
        path: String,
    },
    /// A directory of adapters in the other of the two formats.
    #[error(
        "`{path}` is a configuration of adapters of {format}: read it with `{function}`, or with `Adapters::open`, which reads both formats"
    )]
    OtherDirectory {
        /// The configuration.
        path: PathBuf,
        /// Whose format it has.
        format: &'static str,
        /// The function that reads it.
        function: &'static str,
    },
    /// Parameters of the base in a file of PEFT that are not those of the model.
    #[error(
        "`{path}` has parameters of the base that differ from those of the model: {}; read it with `Adapters::open_with_base`, which gives them to the model",
        listed(parameters)
    )]
    OtherParameters {
        /// The file.
        path: PathBuf,
        /// The names of the parameters.
        parameters: Vec<String>,
    },
    /// An adapter that PEFT's files cannot hold.
    #[error("the adapter of layer `{path}` cannot be written for PEFT: {problem}")]
    NotForPeft {
        /// The layer.
        path: String,
        /// The reason.
        problem: String,
    },
    /// An adapter that cannot be a term of a combination.
    #[error("the adapter of layer `{path}` is {method}; only LoRA without a bias can be combined")]
    NotCombined {
        /// The layer.
        path: String,
        /// Its method.
        method: &'static str,
    },
    /// A trained bias for a layer that has none.
    #[error("the adapter of layer `{path}` has a bias, the layer has none")]
    NoBias {
        /// The layer.
        path: String,
    },
    /// A value of a task out of the range of `f16`.
    #[error("{value} of layer `{path}` is out of the range of f16; keep the task in f32")]
    NotF16 {
        /// The layer.
        path: String,
        /// The value.
        value: f32,
    },
    /// A task that is not served.
    #[error("no task `{name}`; the tasks are {names:?}")]
    UnknownTask {
        /// The name of the task.
        name: String,
        /// The names of those that are.
        names: Vec<String>,
    },
    /// A model without adapters.
    #[error("the model has no adapters, or they are merged already; attach or activate some first")]
    NoAdapters,
    /// Parameters outside of adapters that are trainable, of a model whose adapters are taken.
    #[error(
        "{} outside of the adapters, which do not hold {}; call `peft::freeze_base`, before the training if it is to leave the base as it is, or after it to take the adapters and save the changed base too",
        trainable(parameters), if parameters.len() == 1 { "it" } else { "them" }
    )]
    TrainableOutside {
        /// The parameters.
        parameters: Vec<String>,
    },
    /// A record of burn's that does not fit the model.
    #[error(
        "the record does not fit the model: {problem}; build the model as the recorded one was, with the `Formats` of that model"
    )]
    Record {
        /// The problem.
        problem: String,
    },
    /// An adapter whose dimensions do not fit its layer.
    #[error("the adapter of layer `{path}` is {found:?}, its weight needs {expected:?}")]
    Shape {
        /// The layer.
        path: String,
        /// The dimensions that the weight needs.
        expected: Vec<usize>,
        /// The dimensions of the adapter.
        found: Vec<usize>,
    },
    /// Factors of an adapter whose product can be beyond the range of `f32`.
    #[error(
        "the {method} of layer `{path}` has factors whose product reaches {largest:e}, beyond f32; its file is damaged, or its training diverged"
    )]
    Overflow {
        /// The method.
        method: &'static str,
        /// The layer.
        path: String,
        /// The bound on an element of the product.
        largest: f64,
    },
    /// A quantizer that needs inputs, without a calibration.
    #[error(
        "this quantizer needs the inputs of each layer; give it batches of text to calibrate on"
    )]
    NoCalibration,
    /// A calibration that repeats one sequence.
    #[error(
        "all {n} sequences of the calibration are the same; give it different ones, or one of them"
    )]
    RepeatedCalibration {
        /// The number of sequences.
        n: usize,
    },
    /// A layer that a recipe names and the model does not have.
    #[error("the model has no projection `{path}`, which the recipe names")]
    NoLayer {
        /// The path.
        path: String,
    },
    /// An adapter for a layer that the model does not have.
    #[error("the adapters are for a layer `{path}`, which the model does not have")]
    UnknownLayer {
        /// The layer.
        path: String,
    },
    /// A model other than the merged one of a certificate.
    #[error(
        "the model is not the certified one: {}",
        expected.differences(found).join("; ")
    )]
    NotMerged {
        /// The fingerprint of the merged model.
        expected: Fingerprint,
        /// The fingerprint of the model.
        found: Fingerprint,
    },
    /// A layer of a certificate that the model does not have as the certificate says.
    #[error(
        "the certificate is for a layer `{path}`, which the model does not have in that format"
    )]
    NotCertified {
        /// The layer.
        path: String,
    },
    /// A certificate that certifies nothing.
    #[error("the certificate {problem}")]
    Certificate {
        /// The problem.
        problem: String,
    },
    /// Adapters of another base.
    #[error(
        "made for another base: {}; load the model that it was made with",
        expected.differences(found).join("; ")
    )]
    OtherBase {
        /// The fingerprint of the base that they were made for.
        expected: Fingerprint,
        /// The fingerprint of the base of the model.
        found: Fingerprint,
    },
    /// A setting out of range.
    #[error("{setting} is {value}; it must be {expected}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// Its range.
        expected: &'static str,
    },
    /// A training without batches.
    #[error("there are no batches to train on")]
    NoBatches,
    /// A model without trainable parameters.
    #[error("all parameters are frozen; attach adapters first")]
    NothingToTrain,
    /// A parameter of 16 bits, which does not hold small steps, that would be trained.
    #[error("`{path}` is {found:?} and would be trained; cast it to F32, or freeze it")]
    TrainsIn16Bits {
        /// The parameter.
        path: String,
        /// Its dtype.
        found: DType,
    },
    /// A group of parameters that has none.
    #[error(
        "no trained parameter matches the pattern `{pattern}` of a group; the first of them are {paths:?}"
    )]
    NoParameter {
        /// The pattern.
        pattern: String,
        /// The first paths of trained parameters.
        paths: Vec<String>,
    },
    /// NaN or infinity during training. The model is unchanged.
    #[error(
        "{what} is not finite at step {step}; lower the learning rate, or look at the data{}",
        before(checkpoint.as_deref())
    )]
    NonFinite {
        /// The loss and where it ceases to be finite, with blocks counted from 0; or the gradient of a
        /// parameter, the parameter, or the loss on the held-out batches.
        what: String,
        /// The step, counted from 1.
        step: usize,
        /// The newest checkpoint, whose parameters are finite.
        checkpoint: Option<PathBuf>,
    },
    /// A checkpoint of another training than the one that would be resumed.
    #[error(
        "`{path}` is of another training: {}; give what it was begun with, or choose another directory",
        differences.join("; ")
    )]
    OtherTraining {
        /// The checkpoint.
        path: PathBuf,
        /// What differs, as it was and as it is.
        differences: Vec<String>,
    },
    /// A training by several members that cannot go on together.
    #[error("{problem}")]
    Group {
        /// What is wrong.
        problem: String,
    },
    /// A trained parameter that checkpoints do not hold.
    #[error("`{path}` is {found:?}, which checkpoints of a training do not hold; cast it to F32")]
    NotSaved {
        /// The parameter.
        path: String,
        /// Its dtype.
        found: DType,
    },
    /// A device without memory for a step of training. The model is unchanged.
    #[error(
        "the device has no memory for {n_bytes} more bytes at step {step}; take smaller batches with more accumulation, `FitConfig::with_checkpoint_blocks`, or compute in 16 bits"
    )]
    OutOfMemory {
        /// The bytes that were asked for.
        n_bytes: u64,
        /// The step, counted from 1.
        step: usize,
    },
    /// Another failure of a device in training. The model is unchanged.
    #[error("the device failed at step {step}: {reason}")]
    Device {
        /// What the device reports.
        reason: String,
        /// The step, counted from 1.
        step: usize,
    },
    /// The gradient of a layer's weight that is NaN or infinite.
    #[error(
        "the gradient of layer `{path}` is not finite; its weights, or the texts, are out of the range of f32"
    )]
    NonFiniteGradient {
        /// The layer.
        path: String,
    },
    /// A token that is not in the vocabulary.
    #[error("token {token} is not among the {vocab_size} of the model's vocabulary")]
    Token {
        /// The token.
        token: i64,
        /// The size of the vocabulary.
        vocab_size: usize,
    },
    /// A batch without sequences, or whose sequences are too short to predict a token from another.
    #[error(
        "a batch of {batch} sequences of {seq} tokens has no targets; it needs at least 1 sequence of 2 tokens"
    )]
    EmptyBatch {
        /// Sequences.
        batch: usize,
        /// Tokens in each.
        seq: usize,
    },
    /// A document that the model has no positions for.
    #[error(
        "a document of {len} tokens, with those still to be generated, is longer than the model's {max} positions; cut it, use shorter windows, or generate fewer"
    )]
    TooLong {
        /// Tokens of the document.
        len: usize,
        /// Positions of the model.
        max: usize,
    },
    /// Documents or padding that do not fit their batch.
    #[error(
        "{problem}; documents must follow each other, and all tokens of one must have the same start"
    )]
    Spans {
        /// The problem.
        problem: String,
    },
    /// A batch without targets.
    #[error(
        "no token of a batch of {batch} sequences of {seq} tokens is a target; leave such sequences out"
    )]
    NoTargets {
        /// Sequences.
        batch: usize,
        /// Tokens in each.
        seq: usize,
    },
    /// The error of a [`StageMethod`](crate::StageMethod) of another crate.
    #[error(transparent)]
    Method(Box<dyn std::error::Error + Send + Sync>),
}

/// The first parameters of a list, and how many more there are.
fn listed(parameters: &[String]) -> String {
    let named = parameters.iter().take(3).map(|name| format!("`{name}`"));
    let named = named.collect::<Vec<_>>().join(", ");
    match parameters.len() {
        0..=3 => named,
        n => format!("{named} and {} more parameters", n - 3),
    }
}

fn trainable(parameters: &[String]) -> String {
    let verb = if parameters.len() == 1 { "is" } else { "are" };
    format!("{} {verb} trainable", listed(parameters))
}

/// Where a training was well.
fn before(checkpoint: Option<&Path>) -> String {
    let path = checkpoint.map(Path::display);
    path.map_or(String::new(), |path| format!(", and go on from `{path}`"))
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure of a device, which burn reports as text when a tensor is read.
    pub(crate) fn of_device(reason: impl std::fmt::Display, step: usize) -> Self {
        let reason = reason.to_string();
        match failed_allocation(&reason) {
            Some(n_bytes) => Self::OutOfMemory { n_bytes, step },
            None => Self::Device { reason, step },
        }
    }
}

/// The bytes of an allocation that a device had no memory for, from the text with which burn reports a failure when a
/// tensor is read; `None` for another failure.
///
/// # Examples
/// ```
/// let report = "An IO error happened\nCaused by:\n  out of device memory allocating 4096 bytes";
/// assert_eq!(peft::failed_allocation(report), Some(4096));
/// ```
pub fn failed_allocation(report: &str) -> Option<u64> {
    // CubeCL's two errors of an allocation.
    let asked = [
        "out of device memory allocating ",
        "can't allocate buffer of size: ",
    ];
    asked.into_iter().find_map(|words| {
        let (_, rest) = report.split_once(words)?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_devices_say_what_was_asked_for() {
        let reason =
            "An error happened\nCaused by:\n  out of device memory allocating 4096 bytes\n";
        let error = Error::of_device(reason, 3);
        assert!(
            matches!(
                error,
                Error::OutOfMemory {
                    n_bytes: 4096,
                    step: 3
                }
            ),
            "{error}"
        );
        let error = Error::of_device("can't allocate buffer of size: 17\n", 1);
        assert!(
            matches!(
                error,
                Error::OutOfMemory {
                    n_bytes: 17,
                    step: 1
                }
            ),
            "{error}"
        );
        let error = Error::of_device("an illegal address", 2);
        assert_eq!(
            error.to_string(),
            "the device failed at step 2: an illegal address"
        );
    }
}
