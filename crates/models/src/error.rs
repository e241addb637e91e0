use std::path::{Path, PathBuf};

use tensor_files::FloatType;

use crate::CheckpointFormat;

/// The errors of this crate, by subject.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of a file or a directory.
    #[error(transparent)]
    File(#[from] tensor_files::Error),
    /// An error of an adapter, a layer or a batch.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// An error of a configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An error of a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An error of a model that is quantized from files to files.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// An error of a text or a tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// An error of generation.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// An error of the allocation of bits.
    #[error(transparent)]
    Allocation(#[from] quant_core::AllocationError),
}

/// The errors of configurations.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// An architecture that this crate does not have.
    #[error("unsupported model type `{model_type}` in `{path}`; supported: {supported}")]
    Architecture {
        /// The configuration.
        path: PathBuf,
        /// Its `model_type`.
        model_type: String,
        /// The model types of this crate.
        supported: String,
    },
    /// A setting that is missing, out of range or not supported.
    #[error("`{path}`: {setting} {problem}")]
    Setting {
        /// The configuration.
        path: PathBuf,
        /// The setting.
        setting: String,
        /// The problem.
        problem: String,
    },
    /// A type of float in which a device does not compute.
    #[error("{device} does not compute in {compute:?}; load the model in F32")]
    Compute {
        /// The type.
        compute: FloatType,
        /// The device.
        device: String,
    },
    /// Two configurations of one model that contradict each other.
    #[error(
        "`{first}` and `{second}` disagree on {setting}: {in_first} and {in_second}; correct the one that is wrong"
    )]
    Disagreement {
        /// The first configuration.
        first: PathBuf,
        /// The second configuration.
        second: PathBuf,
        /// The setting.
        setting: &'static str,
        /// The value in the first configuration.
        in_first: String,
        /// The value in the second configuration.
        in_second: String,
    },
}

impl ConfigError {
    pub(crate) fn setting(path: &Path, setting: &str, problem: String) -> Self {
        Self::Setting {
            path: path.into(),
            setting: setting.into(),
            problem,
        }
    }
}

/// The errors of checkpoints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A directory without weights.
    #[error("`{dir}` has neither `model.safetensors` nor `model.safetensors.index.json`{hint}")]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// Advice for the weights that the directory has, if any.
        hint: String,
    },
    /// A file of weights that is in the index and not in the directory.
    #[error("`{index}` names the shard `{shard}`, which is missing; download it again")]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
    },
    /// A tensor that the model does not have.
    #[error("`{path}` has a tensor `{tensor}`, which the configuration has no place for")]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A GPTQ checkpoint with ambiguous zero-points.
    #[error(
        "`{path}` does not state its checkpoint_format, on which the zero-points depend; add `\"checkpoint_format\": \"gptq\"` (v1, zero-points stored minus one, as by AutoGPTQ) or `\"checkpoint_format\": \"gptq_v2\"`"
    )]
    GptqVersion {
        /// The configuration.
        path: PathBuf,
    },
    /// Zero-points of 0 that wrapped around when GPTQ v1 stored them minus one.
    #[error(
        "tensor `{tensor}` in `{path}`: a zero-point of 0 was stored minus one (group {group}, output {output}), and its effect on the neighboring zero-points depends on the program that wrote it; write the checkpoint as gptq_v2"
    )]
    WrappedZeros {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The group of the first such zero-point.
        group: usize,
        /// The output of the first such zero-point.
        output: usize,
    },
    /// A quantization that is stated of a model whose weights are all dense.
    #[error(
        "`{path}` states a quantization ({method}), but all weights beside it are dense: {advice} to use them as they are"
    )]
    StaleQuantization {
        /// The configuration.
        path: PathBuf,
        /// The method that it states.
        method: String,
        /// What is to be done.
        advice: &'static str,
    },
    /// Packed weights whose format nothing states.
    #[error(
        "`{path}` has a packed tensor `{tensor}`, and neither `config.json`, as its `quantization_config`, nor `quantize_config.json` states how it is packed; add the configuration that came with the weights"
    )]
    UnstatedQuantization {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Layers that a format does not hold exactly.
    #[error(
        "a {format} checkpoint does not hold these layers exactly, a {instead} checkpoint does:{}",
        list(layers)
    )]
    CannotHold {
        /// The format.
        format: CheckpointFormat,
        /// The layers, each with the reason.
        layers: Vec<(String, String)>,
        /// A format that holds the model.
        instead: CheckpointFormat,
    },
    /// Adapters that a GGUF file cannot hold.
    #[error(
        "llama.cpp adds products of two factors, without norms and biases, and nothing else; merge these adapters:{}",
        list(layers)
    )]
    GgufAdapters {
        /// The layers with other adapters, each with its method.
        layers: Vec<(String, String)>,
    },
    /// Values beyond the range of a type of float.
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
        /// The number of values.
        n: usize,
    },
    /// A model that has changed since its certificate was made.
    #[error(
        "{source}; a model that has changed is saved without its certificate, or with that of its own merge"
    )]
    OtherCertificate {
        /// The first difference.
        source: peft::Error,
    },
    /// A file that the sums of its directory do not list.
    #[error(
        "`{path}` is not in the `SHA256SUMS` of its directory: it was added to the saved model"
    )]
    NotListed {
        /// The file.
        path: PathBuf,
    },
    /// Layers that cannot be quantized as planned.
    #[error("these layers cannot be quantized as planned:{}", list(layers))]
    Plan {
        /// The layers, each with the reason.
        layers: Vec<(String, String)>,
    },
}

/// The errors of models that are quantized from files to files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// A recipe that names no quantizer for any layer.
    #[error("the recipe quantizes no layer: name one, or copy the files")]
    NothingToDo,
    /// A format whose tensors are all in one file.
    #[error("a {format} file is not written block by block: load the model, and save it")]
    Format {
        /// The format.
        format: CheckpointFormat,
    },
    /// A run that was stopped, where none was to be resumed.
    #[error(
        "`{path}` has the parts of a run that was stopped: resume it, or remove the directory to begin again"
    )]
    Unfinished {
        /// The directory.
        path: PathBuf,
    },
    /// A directory with parts of a result and no journal.
    #[error(
        "`{path}` has files and no `journal.json`, without which they are of no use; remove it"
    )]
    NoJournal {
        /// The directory.
        path: PathBuf,
    },
    /// A run that was stopped, and that was of other settings.
    #[error(
        "`{path}` has the parts of a run that was stopped, and its {what} is another: it was {was}, now it is {is}; resume with what it was, or remove the directory to begin again"
    )]
    Differs {
        /// The directory.
        path: PathBuf,
        /// What differs.
        what: String,
        /// The setting of the run that was stopped.
        was: String,
        /// The setting of this run.
        is: String,
    },
    /// A file of weights that is not what it was at the beginning of the run.
    #[error(
        "`{path}` has changed since the run began{}; resume it if the file is what it was, or remove the parts of the run and begin again",
        tensor.as_ref().map(|tensor| format!(" (tensor `{tensor}`)")).unwrap_or_default()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// The tensor that was found to be another one.
        tensor: Option<String>,
    },
}

/// The errors of texts and tokenizers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A tokenizer that cannot be read, or that refuses a text.
    #[error("`{path}`: {problem}")]
    Tokenizer {
        /// The file of the tokenizer.
        path: PathBuf,
        /// The message of the tokenizer.
        problem: String,
    },
    /// A model without a tokenizer.
    #[error(
        "`{dir}` has no tokenizer, which texts need; add the model's `tokenizer.json`, `tokenizer.model`, or `vocab.json` with `merges.txt`"
    )]
    NoTokenizer {
        /// The directory.
        dir: PathBuf,
    },
    /// A text that is shorter than a window.
    #[error(
        "the text has {n_tokens} tokens, fewer than a window of {seq_len}; use a longer text or a shorter window"
    )]
    ShortText {
        /// The number of tokens of the text.
        n_tokens: usize,
        /// The number of tokens of a window.
        seq_len: usize,
    },
    /// A window that is longer than the model was trained for.
    #[error("windows of {seq_len} tokens; choose 2 to {max}, which the model was trained for")]
    SeqLen {
        /// The number of tokens of a window.
        seq_len: usize,
        /// The longest window of the model.
        max: usize,
    },
    /// A special token outside of the vocabulary.
    #[error(
        "`{path}`: {name} is `{token}`, which is not in the vocabulary of `{tokenizer}`; use the two files of one model"
    )]
    UnknownSpecial {
        /// The configuration.
        path: PathBuf,
        /// The name of the token.
        name: &'static str,
        /// The text of the token.
        token: String,
        /// The file of the tokenizer.
        tokenizer: PathBuf,
    },
    /// A special token that is required and not stated.
    #[error("{needed_by} needs its `{name}`; state it in the model's `tokenizer_config.json`")]
    MissingSpecial {
        /// The name of the token.
        name: &'static str,
        /// The part that needs the token.
        needed_by: String,
    },
}

/// The errors of generation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// An empty prompt.
    #[error("the prompt has no tokens; give at least one")]
    NoTokens,
    /// More tokens than the cache holds.
    #[error("{len} tokens for a cache of {max_len}; make a larger cache")]
    CacheFull {
        /// The number of tokens, with those in the cache.
        len: usize,
        /// The largest number of tokens in the cache.
        max_len: usize,
    },
    /// A cache so long that the rope scaling, `dynamic` or `longrope`, would change the keys in it.
    #[error(
        "a cache for {max_len} tokens: beyond {max}, the rope scaling of the model, `dynamic` or `longrope`, rotates all keys again, and cached keys cannot be; generate fewer tokens"
    )]
    DynamicRope {
        /// The largest number of tokens in the cache.
        max_len: usize,
        /// The longest text whose rotations no longer one changes.
        max: usize,
    },
    /// Logits that are NaN or infinite.
    #[error("the logits after {position} tokens are not finite")]
    NonFiniteLogits {
        /// The number of tokens before.
        position: usize,
    },
}

/// A line for each reason: the layer, or the number of layers and the first of them.
fn list(layers: &[(String, String)]) -> String {
    let mut reasons: Vec<(&str, &str, usize)> = Vec::new();
    for (path, reason) in layers {
        match reasons.iter_mut().find(|(_, known, _)| known == reason) {
            Some((_, _, n)) => *n += 1,
            None => reasons.push((path, reason, 1)),
        }
    }
    let lines = reasons.into_iter().map(|(path, reason, n)| match n {
        1 => format!("\n  `{path}`: {reason}"),
        n => format!("\n  {n} layers, the first of them `{path}`: {reason}"),
    });
    lines.collect()
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
