use std::path::PathBuf;

use tensor_files::FloatType;

use crate::CheckpointFormat;

/// What can be wrong with a checkpoint, a text or a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a directory.
    #[error(transparent)]
    File(#[from] tensor_files::Error),
    /// An adapter or a layer.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// A model of another architecture.
    #[error(
        "unsupported model type `{model_type}` in `{path}`; supported: llama, mistral, qwen2, opt"
    )]
    Architecture {
        /// The configuration.
        path: PathBuf,
        /// Its `model_type`.
        model_type: String,
    },
    /// A configuration that describes no model, or one that this crate does not have.
    #[error("`{path}`: {setting} {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The setting.
        setting: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A directory without weights.
    #[error("`{dir}` has neither `model.safetensors` nor `model.safetensors.index.json`{hint}")]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What is there instead.
        hint: &'static str,
    },
    /// A file of weights that the index names and the directory does not have.
    #[error("`{index}` names the shard `{shard}`, which is not there; fetch it again")]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
    },
    /// A tensor that the model has no place for.
    #[error("`{path}` has a tensor `{tensor}`, which the configuration has no place for")]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A GPTQ checkpoint whose zero-points can be read in two ways.
    #[error(
        "`{path}` does not state its checkpoint_format, on which the zero-points depend; add `\"checkpoint_format\": \"gptq\"` (v1, zero-points stored minus one: AutoGPTQ's) or `\"checkpoint_format\": \"gptq_v2\"`"
    )]
    GptqVersion {
        /// The configuration.
        path: PathBuf,
    },
    /// Two configurations of one checkpoint that say different things.
    #[error(
        "`{first}` and `{second}` disagree on {setting}: {in_first} and {in_second}; correct the one that is wrong"
    )]
    Disagreement {
        /// One configuration.
        first: PathBuf,
        /// The other.
        second: PathBuf,
        /// The setting.
        setting: &'static str,
        /// Its value in the first.
        in_first: String,
        /// Its value in the second.
        in_second: String,
    },
    /// GPTQ's `g_idx` that puts inputs into no groups of the configuration's size.
    #[error("tensor `{tensor}` in `{path}`: {problem}")]
    GroupIndex {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// Zero-points of 0 that GPTQ v1 stored minus one, which wrapped around.
    #[error(
        "tensor `{tensor}` in `{path}`: a zero-point of 0 was stored minus one (group {group}, output {output}), and what it did to those beside it depends on the program that wrote it; write the checkpoint as gptq_v2"
    )]
    WrappedZeros {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The group of the first such zero-point.
        group: usize,
        /// Its output.
        output: usize,
    },
    /// A packed weight where the format of a checkpoint has a dense one.
    #[error(
        "`{path}` has `{tensor}`: `{layer}` is quantized, but only projections can be in a checkpoint of this format"
    )]
    PackedLayer {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The layer.
        layer: String,
    },
    /// Layers that a format of checkpoints does not hold exactly.
    #[error(
        "a {format} checkpoint does not hold these layers exactly, a {instead} checkpoint does:{}",
        list(layers)
    )]
    CannotHold {
        /// The format.
        format: CheckpointFormat,
        /// The layers, each with what is against it.
        layers: Vec<(String, String)>,
        /// A format that holds the model.
        instead: CheckpointFormat,
    },
    /// Values that a type of float does not reach.
    #[error(
        "tensor `{tensor}` has {n} values beyond the range of {float:?}, such as {value}; write it as F32 or Bf16"
    )]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The type of float.
        float: FloatType,
        /// The first of the values.
        value: f32,
        /// How many there are.
        n: usize,
    },
    /// A tokenizer that could not be read, or does not take a text.
    #[error("`{path}`: {problem}")]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What it said.
        problem: String,
    },
    /// A text for a model that came without a tokenizer.
    #[error("`{dir}` has no `tokenizer.json`, without which a text has no tokens")]
    NoTokenizer {
        /// The directory.
        dir: PathBuf,
    },
    /// A text that does not fill a window.
    #[error(
        "the text has {n_tokens} tokens, fewer than one window of {seq_len}; use a longer text or a shorter window"
    )]
    ShortText {
        /// Tokens of the text.
        n_tokens: usize,
        /// Tokens of a window.
        seq_len: usize,
    },
    /// A window that the model was not made for.
    #[error(
        "windows of {seq_len} tokens; they must have 2 to {max}, the positions that it was made for"
    )]
    SeqLen {
        /// Tokens of a window.
        seq_len: usize,
        /// Positions of the model.
        max: usize,
    },
    /// Layers that cannot be quantized as planned.
    #[error("the plan does not work for these layers:{}", list(layers))]
    Plan {
        /// The layers, each with what is against it.
        layers: Vec<(String, String)>,
    },
    /// A text of no tokens, after which nothing can be predicted.
    #[error("there are no tokens to continue; give a prompt of at least one")]
    NoTokens,
    /// More tokens than a cache was made for.
    #[error("the text comes to {len} tokens, the cache was made for {max_len}")]
    CacheFull {
        /// Tokens with those to be read.
        len: usize,
        /// Tokens that the cache takes.
        max_len: usize,
    },
    /// A rope scaling that depends on the length of the text, on a text so long that it does.
    #[error(
        "a cache for {max_len} tokens: beyond {max} the model's `dynamic` rope scaling turns all tokens anew for each length, and cached ones cannot be; generate no more"
    )]
    DynamicRope {
        /// Tokens that the cache was to take.
        max_len: usize,
        /// Positions of the model without scaling.
        max: usize,
    },
    /// Logits that are NaN or infinite.
    #[error("the logits after {position} tokens are not finite")]
    NonFiniteLogits {
        /// Tokens read.
        position: usize,
    },
    /// A special token that the vocabulary lacks.
    #[error(
        "`{path}`: {name} is `{token}`, which is not in the vocabulary of `{tokenizer}`; the two files are from different models"
    )]
    UnknownSpecial {
        /// The configuration.
        path: PathBuf,
        /// The name of the token.
        name: &'static str,
        /// Its text.
        token: String,
        /// The file of the tokenizer.
        tokenizer: PathBuf,
    },
    /// A special token that is required and not stated.
    #[error("{needed_by} needs its `{name}`; state it in the model's `tokenizer_config.json`")]
    MissingSpecial {
        /// The name of the token.
        name: &'static str,
        /// The part of the model or of the program that requires it.
        needed_by: String,
    },
}

fn list(layers: &[(String, String)]) -> String {
    let lines = layers.iter();
    lines
        .map(|(path, reason)| format!("\n  `{path}`: {reason}"))
        .collect()
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
