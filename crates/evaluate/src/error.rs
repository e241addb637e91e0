use std::path::PathBuf;

/// An evaluation that cannot be made, or has no number.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model, its tokenizer or its directory.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// A batch, a token or a setting.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// Nothing to evaluate on.
    #[error("there are no windows to evaluate on")]
    NoWindows,
    /// Windows of different lengths, whose perplexities do not compare.
    #[error("windows of {expected} and of {found} tokens; a perplexity takes one length")]
    MixedWindows {
        /// Tokens of the first window.
        expected: usize,
        /// Tokens of another.
        found: usize,
    },
    /// A window some of whose tokens are not to be predicted, in a protocol over whole windows.
    #[error(
        "some tokens of the batch at window {window} are not to be predicted; take the mean over targets (`evaluate::target_loss`)"
    )]
    PartialWindow {
        /// The window, counted from 0.
        window: usize,
    },
    /// A loss that is NaN or infinite.
    #[error("the loss is not finite in window {window}")]
    NonFinite {
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
}

/// A setting that is out of its range.
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

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
