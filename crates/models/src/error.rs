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
    /// A token that the model has no embedding for.
    #[error(
        "token {token} is not among the {vocab_size} of the model's vocabulary; its tokenizer belongs to another model"
    )]
    Token {
        /// The token.
        token: u32,
        /// Tokens that the model has.
        vocab_size: usize,
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
    /// A loss that is NaN or infinite.
    #[error("the loss is not finite in window {window}")]
    NonFinite {
        /// The window, counted from 0.
        window: usize,
    },
    /// A window some of whose tokens are not to be predicted, in a protocol over whole windows.
    #[error(
        "some tokens of the batch at window {window} are not to be predicted; take the mean over targets (`evaluate::target_loss`)"
    )]
    PartialWindow {
        /// The window, counted from 0.
        window: usize,
    },
    /// Models whose predictions are of other tokens.
    #[error("a model with {found} tokens, compared with one that has {expected}")]
    OtherVocabulary {
        /// Tokens of the reference.
        expected: usize,
        /// Tokens of the model.
        found: usize,
    },
    /// Windows of different lengths, whose perplexities do not compare.
    #[error("windows of {expected} and of {found} tokens; a perplexity takes one length")]
    MixedWindows {
        /// Tokens of the first window.
        expected: usize,
        /// Tokens of another.
        found: usize,
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
    /// A statistic of nothing.
    #[error("there are no items to take a statistic of; evaluate at least one")]
    NoItems,
    /// An item that is NaN or infinite.
    #[error("item {index} is {value}; a statistic takes finite numbers")]
    NonFiniteItem {
        /// The item, counted from 0.
        index: usize,
        /// What it is.
        value: f64,
    },
    /// A denominator that weighs an item with nothing, or less.
    #[error("item {index} has the denominator {value}; a ratio takes positive, finite ones")]
    Denominator {
        /// The item, counted from 0.
        index: usize,
        /// Its denominator.
        value: f64,
    },
    /// Lists of which each should have one entry for every item.
    #[error("{expected} {of} and {found} {and}; give one of each for every item")]
    Unpaired {
        /// What the first list has.
        of: &'static str,
        /// Entries of the first list.
        expected: usize,
        /// What the second list has.
        and: &'static str,
        /// Entries of the second list.
        found: usize,
    },
    /// A setting out of its range.
    #[error("{setting} is {value}; it must be {allowed}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// A confidence that is no probability.
    #[error("item {index} has the confidence {confidence}; a confidence is 0 to 1")]
    Confidence {
        /// The item, counted from 0.
        index: usize,
        /// Its confidence.
        confidence: f64,
    },
    /// A record that is no multiple-choice item.
    #[error("`{path}`, line {line}: {problem}")]
    ChoiceLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it, and what it should have.
        problem: String,
    },
    /// A log-likelihood by which choices cannot be compared.
    #[error("choice {choice} has the log-likelihood {value}; it must be finite to be compared")]
    LogLikelihood {
        /// The choice, counted from 0.
        choice: usize,
        /// Its log-likelihood.
        value: f64,
    },
    /// A continuation that has no tokens of its own.
    #[error(
        "the continuation `{continuation}` adds no tokens to its context, so it has no likelihood; give a longer one"
    )]
    NoContinuation {
        /// The text after the context.
        continuation: String,
    },
    /// A continuation without a token that its first one could be predicted from.
    #[error("the context has no tokens; give at least the beginning-of-sequence token")]
    NoContext,
    /// A continuation that does not fit what the model reads at once.
    #[error("a continuation of {n_tokens} tokens; the model reads {max_len} at once")]
    LongContinuation {
        /// Tokens of the continuation.
        n_tokens: usize,
        /// Tokens that the model reads at once.
        max_len: usize,
    },
    /// A text that llama.cpp's protocol refuses.
    #[error(
        "the text has {n_tokens} tokens; llama.cpp asks for two windows, {}: use a longer text or a shorter window", 2 * n_ctx
    )]
    FewTokens {
        /// Tokens of the text.
        n_tokens: usize,
        /// Tokens of a window.
        n_ctx: usize,
    },
    /// A file that is no report.
    #[error("not a report: {problem}")]
    Report {
        /// What is wrong with it.
        problem: String,
    },
    /// A path that leads to no file, such as a directory or a pipe.
    #[error("`{path}` is {found}, where a file was expected")]
    NotFile {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A file that stands in for data, or holds it in another form.
    #[error("`{path}` is {found}, where records in JSON were expected; {advice}")]
    NotRecords {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A file without a record.
    #[error("`{path}` has no records; it must have JSON objects, one a line, or an array of them")]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// A record that is not JSON.
    #[error(
        "`{path}`, line {line}, column {column}: {problem}; a file has one JSON object a line, or an array of objects"
    )]
    NotJson {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column in bytes, counted from 1.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A record that has no named fields.
    #[error("`{path}`, line {line}: {found}, where an object with named fields was expected")]
    NotObject {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is there.
        found: &'static str,
    },
    /// A line that is not UTF-8.
    #[error("`{path}`, line {line}, column {column}: not UTF-8; save the file in that encoding")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column in bytes, counted from 1.
        column: usize,
    },
    /// A record of a length that no text has.
    #[error(
        "`{path}`, line {line}: a record of more than {max} bytes; is each record on a line of its own?"
    )]
    LongRecord {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The bytes that a record may have.
        max: usize,
    },

    /// A record without a field that the template names.
    #[error("`{path}`, line {line}: no field `{field}`, which the template names; there {}", fields(.found))]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The field.
        field: String,
        /// The fields that are there.
        found: Vec<String>,
    },
    /// A field of a record that is not what the template takes.
    #[error("`{path}`, line {line}: `{field}` {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A template that cannot be read.
    #[error("the {template} template, line {line}: {problem}")]
    BadTemplate {
        /// Which one.
        template: &'static str,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A template that does not take a record.
    #[error("`{path}`, line {line}: the {template} template does not take it: {problem}")]
    Render {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// Which template.
        template: &'static str,
        /// What it said.
        problem: String,
    },
    /// A chat template that renders the same messages otherwise when more follow.
    #[error(
        "`{path}`, line {line}: the chat template is not prefix-stable at message {message}: its text changes with what follows, so that what is learned would not be what is asked for; end the conversation before it, or correct the template"
    )]
    PrefixUnstable {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The assistant's message, counted from 0.
        message: usize,
    },
    /// A model without a chat template.
    #[error(
        "`{dir}` has no chat template, neither `chat_template.jinja` nor `chat_template` in `tokenizer_config.json`; take the one that the model was trained with, or templates for the fields of a record"
    )]
    NoChatTemplate {
        /// The directory.
        dir: PathBuf,
    },

    /// A special token that the tokenizer does not have.
    #[error(
        "`{path}`: {name} is `{token}`, which is not in the vocabulary of `{tokenizer}`; the two belong to different models"
    )]
    UnknownSpecial {
        /// The configuration.
        path: PathBuf,
        /// Which token.
        name: &'static str,
        /// Its text.
        token: String,
        /// The tokenizer's file.
        tokenizer: PathBuf,
    },
    /// A special token that is needed and not stated.
    #[error("{needed_by} needs its `{name}`; state it in the model's `tokenizer_config.json`")]
    MissingSpecial {
        /// Which token.
        name: &'static str,
        /// What needs it.
        needed_by: String,
    },
    /// An example of more tokens than are allowed.
    #[error(
        "`{path}`, line {line}: {n_tokens} tokens, more than the {max_len} that are allowed; leave such records out, have them cut, or allow more"
    )]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// Its tokens.
        n_tokens: usize,
        /// Tokens that are allowed.
        max_len: usize,
    },
    /// Records none of which has anything to learn.
    #[error(
        "nothing is left to learn of {n_records} records: {n_too_long} are longer than {max_len} tokens, {n_without_targets} have no token to be learned in the first {max_len}; allow more tokens, or look at the template"
    )]
    NoExamples {
        /// Records that there were.
        n_records: usize,
        /// Those left out for their length.
        n_too_long: usize,
        /// Those without a token to be learned.
        n_without_targets: usize,
        /// Tokens that are allowed.
        max_len: usize,
    },
    /// An example that no row holds.
    #[error(
        "example {example} has {n_tokens} tokens, more than a row of {seq_len}; encode with a limit of {seq_len}"
    )]
    LongExample {
        /// The example, counted from 0.
        example: usize,
        /// Its tokens.
        n_tokens: usize,
        /// Tokens of a row.
        seq_len: usize,
    },
    /// Nothing to evaluate on.
    #[error("there are no windows to evaluate on")]
    NoWindows,
}

fn list(layers: &[(String, String)]) -> String {
    let lines = layers.iter();
    lines
        .map(|(path, reason)| format!("\n  `{path}`: {reason}"))
        .collect()
}

fn fields(found: &[String]) -> String {
    match found {
        [] => "are none".into(),
        [one] => format!("is `{one}`"),
        several => format!("are `{}`", several.join("`, `")),
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
