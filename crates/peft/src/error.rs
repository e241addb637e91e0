use burn::tensor::DType;
use quant_core::Format;

use crate::Fingerprint;

/// What can be wrong with an adapter, a layer, a file or a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a directory.
    #[error(transparent)]
    File(#[from] tensor_files::Error),
    /// A layer's weight could not be quantized or unpacked.
    #[error("layer `{path}`")]
    Quant {
        /// The layer.
        path: String,
        /// What was wrong.
        source: quant_core::Error,
    },
    /// No layer has a name that ends in one of the targets.
    #[error(
        "targets {targets:?} match none of the model's {n_linears} linear layers; their last names are {names:?}"
    )]
    NoTarget {
        /// The names looked for.
        targets: Vec<String>,
        /// How many layers there are.
        n_linears: usize,
        /// The last parts of their paths.
        names: Vec<String>,
    },
    /// A layer that holds an adapter already.
    #[error("layer `{path}` has an adapter already; merge it or activate others in its place")]
    AlreadyAdapted {
        /// The layer.
        path: String,
    },
    /// A layer whose weight is packed already.
    #[error("layer `{path}` is quantized already")]
    AlreadyQuantized {
        /// The layer.
        path: String,
    },
    /// A method that trains the grid, on a weight that has none.
    #[error(
        "{method} needs a quantized weight, but layer `{path}` is dense; quantize the model first"
    )]
    NeedsQuantized {
        /// The method.
        method: &'static str,
        /// The layer.
        path: String,
    },
    /// A rank that a layer's weight cannot have.
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
    #[error("layer `{path}` is {found:?}, its adapter would be F32; convert the weight to F32")]
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
        /// Why.
        reason: String,
    },
    /// Tiles that do not fit a weight.
    #[error(
        "{method} on layer `{path}`: {problem}; choose other tiles (`Tile::with_pool`, `Tile::with_repeat`) or another base, or leave the layer out of the targets"
    )]
    Tiles {
        /// The method.
        method: &'static str,
        /// The layer.
        path: String,
        /// What does not fit.
        problem: String,
    },
    /// Zeros that are to be trained, on a grid that has none.
    #[error(
        "PEQA cannot train the zeros of layer `{path}`: {format} has none; quantize to an affine grid"
    )]
    Zeros {
        /// The layer.
        path: String,
        /// Its format.
        format: Format,
    },
    /// An adapter that PEFT's files cannot hold.
    #[error("the adapter of layer `{path}` cannot be written for PEFT: {problem}")]
    NotForPeft {
        /// The layer.
        path: String,
        /// Why.
        problem: String,
    },
    /// An adapter that is no term of a sum.
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
    /// A value of a task that `f16` does not hold.
    #[error("{value} of layer `{path}` is out of the range of f16; keep the task in f32")]
    NotF16 {
        /// The layer.
        path: String,
        /// The value.
        value: f32,
    },
    /// A task that is not among those that are served.
    #[error("there is no task `{name}`; there are {names:?}")]
    UnknownTask {
        /// The task asked for.
        name: String,
        /// The tasks that there are.
        names: Vec<String>,
    },
    /// No layer has an adapter.
    #[error("the model has no adapters, or they are merged already; attach or activate some first")]
    NoAdapters,
    /// An adapter of other dimensions than its layer's.
    #[error("the adapter of layer `{path}` is {found:?}, its weight asks for {expected:?}")]
    Shape {
        /// The layer.
        path: String,
        /// What the weight asks for.
        expected: Vec<usize>,
        /// What the adapter has.
        found: Vec<usize>,
    },
    /// A quantizer that needs to see inputs, and none to see.
    #[error(
        "this quantizer needs the inputs of each layer; give it batches of text to calibrate on"
    )]
    NoCalibration,
    /// A calibration that is one sequence again and again.
    #[error(
        "all {n} sequences of the calibration are the same; give it different ones, or one of them"
    )]
    RepeatedCalibration {
        /// Sequences.
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
    /// A model that is not the merged one of a certificate.
    #[error("the model is {found}, the certificate is for {expected}: a parameter differs")]
    NotMerged {
        /// The merged model.
        expected: Fingerprint,
        /// The model at hand.
        found: Fingerprint,
    },
    /// Adapters of another base.
    #[error(
        "made for the base {expected}, but this model's is {found}; load the model that it was made with"
    )]
    OtherBase {
        /// The base it was made for.
        expected: Fingerprint,
        /// The base of the model at hand.
        found: Fingerprint,
    },
    /// A setting out of its range.
    #[error("{setting} is {value}; it must be {expected}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// Nothing to train on.
    #[error("there are no batches to train on")]
    NoBatches,
    /// No parameter of the model is trainable.
    #[error("all parameters are frozen; attach adapters first")]
    NothingToTrain,
    /// Training met NaN or infinity. The model is as it was before.
    #[error("{what} is not finite at step {step}; lower the learning rate, or look at the data")]
    NonFinite {
        /// The loss, or the gradient of a parameter.
        what: String,
        /// The step, counted from 1.
        step: usize,
    },
    /// A token that the model has no embedding for.
    #[error("token {token} is not among the {vocab_size} of the model's vocabulary")]
    Token {
        /// The token.
        token: i64,
        /// Tokens that the model has.
        vocab_size: usize,
    },
    /// A sequence that is too short to predict a token from another.
    #[error(
        "a batch of {batch} sequences of {seq} tokens has nothing to predict; it takes at least 1 of 2"
    )]
    EmptyBatch {
        /// Sequences.
        batch: usize,
        /// Tokens in each.
        seq: usize,
    },
    /// A text that the model has no places for.
    #[error(
        "a text of {len} tokens, with those still to be written; the model has places for {max}: cut it, use shorter windows, or write fewer"
    )]
    TooLong {
        /// Tokens of the text.
        len: usize,
        /// Places of the model.
        max: usize,
    },
    /// Texts that are not cut as a batch needs it.
    #[error("{problem}; texts lie one after the other, and each token of one has its beginning")]
    Spans {
        /// What is wrong.
        problem: String,
    },
    /// A batch none of whose tokens is to be predicted.
    #[error(
        "no token of a batch of {batch} sequences of {seq} tokens is to be predicted; leave such texts out"
    )]
    NoTargets {
        /// Sequences.
        batch: usize,
        /// Tokens in each.
        seq: usize,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
