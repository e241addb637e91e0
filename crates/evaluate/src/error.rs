use std::path::PathBuf;

use instruct::Record;

/// An error of an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model, a tokenizer or a generation.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// A token, a sequence or a setting.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// An evaluation without windows.
    #[error("there are no windows to evaluate on")]
    NoWindows,
    /// Windows of different lengths, whose perplexities cannot be compared.
    #[error("windows of {expected} and of {found} tokens; give a perplexity windows of one length")]
    MixedWindows {
        /// The length of the first window in tokens.
        expected: usize,
        /// The length of another window.
        found: usize,
    },
    /// A window with tokens that are not targets, in a protocol over whole windows.
    #[error("window {window} has tokens that are not targets; use `evaluate::target_loss`")]
    PartialWindow {
        /// The index of the window.
        window: usize,
    },
    /// A loss that is NaN or infinite.
    #[error("the loss of window {window} is not finite")]
    NonFinite {
        /// The index of the window.
        window: usize,
    },
    /// Models with vocabularies of different sizes.
    #[error(
        "the model has {found} tokens, the reference {expected}; compare models of one vocabulary"
    )]
    OtherVocabulary {
        /// The size of the vocabulary of the reference.
        expected: usize,
        /// The size of the vocabulary of the model.
        found: usize,
    },
    /// A text that is too short for llama.cpp's protocol.
    #[error(
        "the text has {n_tokens} tokens, fewer than two windows of {n_ctx}; use a longer text or a shorter window"
    )]
    FewTokens {
        /// The length of the text in tokens.
        n_tokens: usize,
        /// The length of a window in tokens.
        n_ctx: usize,
    },
    /// A window without a token before those that are scored.
    #[error("no token precedes the scored ones; begin the context with a token such as `bos`")]
    NoContext,
    /// A continuation without tokens.
    #[error(
        "the continuation `{continuation}` adds no tokens to its context; give a longer continuation"
    )]
    NoContinuation {
        /// The text of the continuation.
        continuation: String,
    },
    /// A continuation that is longer than the input of the model.
    #[error("the continuation has {n_tokens} tokens, but the model reads at most {max_len}")]
    LongContinuation {
        /// The length of the continuation in tokens.
        n_tokens: usize,
        /// The longest input of the model in tokens.
        max_len: usize,
    },
    /// A record that is not an item of a protocol.
    #[error("`{path}`, line {line}: {problem}")]
    Record {
        /// The file.
        path: PathBuf,
        /// The line of the record, counted from 1.
        line: usize,
        /// The reason.
        problem: String,
    },
    /// A log-likelihood that is NaN or infinite.
    #[error("choice {choice} has the log-likelihood {value}, which is not finite")]
    LogLikelihood {
        /// The index of the choice.
        choice: usize,
        /// Its log-likelihood.
        value: f64,
    },
    /// A statistic of no items.
    #[error("there are no items to take a statistic of")]
    NoItems,
    /// An item that is NaN or infinite.
    #[error("item {index} is {value}; statistics need finite items")]
    NonFiniteItem {
        /// The index of the item.
        index: usize,
        /// Its value.
        value: f64,
    },
    /// A denominator that is not positive and finite.
    #[error("item {index} has the denominator {value}; it must be positive and finite")]
    Denominator {
        /// The index of the item.
        index: usize,
        /// Its denominator.
        value: f64,
    },
    /// Lists that should have the same length.
    #[error("{expected} {of} and {found} {and}; give one of each for every item")]
    Unpaired {
        /// The name of the entries of the first list.
        of: &'static str,
        /// The length of the first list.
        expected: usize,
        /// The name of the entries of the second list.
        and: &'static str,
        /// The length of the second list.
        found: usize,
    },
    /// A confidence outside of 0 to 1.
    #[error("item {index} has the confidence {confidence}; it must be in 0 to 1")]
    Confidence {
        /// The index of the item.
        index: usize,
        /// Its confidence.
        confidence: f64,
    },
    /// JSON that is not a report.
    #[error("not a report: {problem}")]
    Report {
        /// The reason.
        problem: String,
    },
}

/// The error of a setting that is out of its range.
pub(crate) fn setting(
    setting: &'static str,
    value: impl ToString,
    expected: &'static str,
) -> Error {
    let value = value.to_string();
    let error = peft::Error::Setting {
        setting,
        value,
        expected,
    };
    error.into()
}

/// The error of a record that is not an item of a protocol.
pub(crate) fn refuse(record: &Record, problem: String) -> Error {
    Error::Record {
        path: record.path.to_path_buf(),
        line: record.line,
        problem,
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
