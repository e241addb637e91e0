//! Windows of tokens, and the lengths of documents by which losses are divided.

use std::ops::Range;

use crate::error::{Error, Result, setting};
use crate::statistics::{Bootstrap, Estimate};
use crate::whitespace::is_space;

#[cfg(test)]
mod tests;

/// Tokens that a model reads at once, and the range of those that are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoredWindow {
    /// The tokens. The last one is predicted, and not read.
    pub tokens: Vec<u32>,
    /// The indices of the scored tokens, each predicted from all tokens before it; never 0.
    pub scored: Range<usize>,
}

impl ScoredWindow {
    /// A window that scores a continuation after as much of its context as the model reads.
    ///
    /// Source: `_loglikelihood_tokens` in `lm_eval/models/huggingface.py`.
    ///
    /// # Errors
    /// [`Error::NoContext`]; [`Error::NoContinuation`]; [`Error::LongContinuation`] for one of more
    /// than `max_len` tokens.
    pub fn after(context: &[u32], continuation: &[u32], max_len: usize) -> Result<Self> {
        if context.is_empty() {
            return Err(Error::NoContext);
        }
        if continuation.is_empty() {
            let continuation = String::new();
            return Err(Error::NoContinuation { continuation });
        }
        let n_tokens = continuation.len();
        if n_tokens > max_len {
            return Err(Error::LongContinuation { n_tokens, max_len });
        }
        let kept = context.len().min(max_len.saturating_add(1) - n_tokens);
        let tokens = [&context[context.len() - kept..], continuation].concat();
        let scored = kept..tokens.len();
        Ok(Self { tokens, scored })
    }

    /// The scored tokens.
    pub fn targets(&self) -> &[u32] {
        &self.tokens[self.scored.clone()]
    }

    /// The indices of their losses among those of the window, which begin at the second token.
    pub fn losses(&self) -> Range<usize> {
        self.scored.start - 1..self.scored.end - 1
    }
}

/// Cuts a document into the windows of lm-evaluation-harness's `loglikelihood_rolling`.
///
/// The first token is predicted from `prefix`, usually `bos`, and the model reads at most `max_len`
/// tokens. Every token is scored in one window. The last window reads `max_len` tokens too, some of
/// which only serve as context; the first token of each other window has one token of context. A
/// document without tokens has no windows.
///
/// Source: `get_rolling_token_windows` in `lm_eval/utils.py`, with `context_len=1`.
///
/// # Errors
/// [`peft::Error::Setting`] if `max_len` is 0.
///
/// # Examples
/// ```
/// use evaluate::{Error, rolling_windows};
///
/// let windows = rolling_windows(&[5, 6, 7], 1, 2)?;
/// assert_eq!(windows[0].tokens, [1, 5, 6]);
/// assert_eq!(windows[1].targets(), [7]);
///
/// assert!(matches!(rolling_windows(&[5, 6, 7], 1, 0), Err(Error::Peft(_))));
/// # Ok::<(), evaluate::Error>(())
/// ```
pub fn rolling_windows(tokens: &[u32], prefix: u32, max_len: usize) -> Result<Vec<ScoredWindow>> {
    if max_len == 0 {
        return Err(setting("max_len", 0, "at least 1"));
    }
    // Index 0 is the prefix: token `i` of the document is at `i + 1`.
    let tokens = [&[prefix], tokens].concat();
    let window = |first: usize| {
        let end = first.saturating_add(max_len).min(tokens.len());
        let start = end.saturating_sub(max_len.saturating_add(1));
        ScoredWindow {
            tokens: tokens[start..end].to_vec(),
            scored: first - start..end - start,
        }
    };
    Ok((1..tokens.len()).step_by(max_len).map(window).collect())
}

/// Cuts a text into the windows of llama.cpp's `perplexity` tool.
///
/// `tokens` are those of the whole text, after `bos` if the tokenizer adds it; `bos` then replaces the
/// first token of every window. Of each window of `n_ctx` tokens, 512 in llama.cpp, those after index
/// `n_ctx / 2` are scored: 255 of 512. Tokens after the last full window are dropped. The perplexity is
/// `exp` of the mean loss over all scored tokens.
///
/// Source: `perplexity` in `tools/perplexity/perplexity.cpp`, without a stride.
///
/// # Errors
/// [`peft::Error::Setting`] if `n_ctx` is below 3, which leaves nothing to score; [`Error::FewTokens`]
/// for a text of less than two windows.
pub fn llama_cpp_windows(
    tokens: &[u32],
    n_ctx: usize,
    bos: Option<u32>,
) -> Result<Vec<ScoredWindow>> {
    if n_ctx < 3 {
        return Err(setting("n_ctx", n_ctx, "at least 3"));
    }
    let n_tokens = tokens.len();
    if n_tokens / n_ctx < 2 {
        return Err(Error::FewTokens { n_tokens, n_ctx });
    }
    let window = |tokens: &[u32]| {
        let mut tokens = tokens.to_vec();
        tokens[0] = bos.unwrap_or(tokens[0]);
        ScoredWindow {
            tokens,
            scored: n_ctx / 2 + 1..n_ctx,
        }
    };
    Ok(tokens.chunks_exact(n_ctx).map(window).collect())
}

/// The log-likelihood of a document and its length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredDocument {
    /// The sum over its tokens in nats, at most 0.
    pub log_likelihood: f64,
    /// The number of words by [`word_count`].
    pub n_words: usize,
    /// The number of bytes in UTF-8.
    pub n_bytes: usize,
}

impl ScoredDocument {
    /// A document with the given sum of log-likelihoods.
    pub fn new(text: &str, log_likelihood: f64) -> Self {
        Self {
            log_likelihood,
            n_words: word_count(text),
            n_bytes: text.len(),
        }
    }
}

/// Counts the words of a document as lm-evaluation-harness does.
///
/// It is `len(re.split(r"\s+", text))` of Python, the number of runs of whitespace plus one: whitespace
/// at either end adds an empty word, and an empty text has one word.
pub fn word_count(text: &str) -> usize {
    let mut was_space = false;
    let begins_run = |c: char| {
        let is_space = is_space(c);
        let begins = is_space && !was_space;
        was_space = is_space;
        begins
    };
    1 + text
        .chars()
        .map(begins_run)
        .filter(|&begins| begins)
        .count()
}

/// `exp(-Σ log-likelihood / Σ words)` over documents.
///
/// # Errors
/// As [`Bootstrap::ratio`].
pub fn word_perplexity(documents: &[ScoredDocument], bootstrap: &Bootstrap) -> Result<Estimate> {
    let words = per(documents, bootstrap, |document| document.n_words)?;
    Ok(words.map(f64::exp))
}

/// `exp(-Σ log-likelihood / Σ bytes)` over documents.
///
/// # Errors
/// As [`Bootstrap::ratio`]; [`Error::Denominator`] for an empty document.
pub fn byte_perplexity(documents: &[ScoredDocument], bootstrap: &Bootstrap) -> Result<Estimate> {
    let bytes = per(documents, bootstrap, |document| document.n_bytes)?;
    Ok(bytes.map(f64::exp))
}

/// `-Σ log-likelihood / (Σ bytes ln 2)` over documents.
///
/// # Errors
/// As [`byte_perplexity`].
pub fn bits_per_byte(documents: &[ScoredDocument], bootstrap: &Bootstrap) -> Result<Estimate> {
    let bytes = per(documents, bootstrap, |document| document.n_bytes)?;
    Ok(bytes.map(|nats| nats / std::f64::consts::LN_2))
}

/// The loss per unit, such as a word, that `count` counts.
fn per(
    documents: &[ScoredDocument],
    bootstrap: &Bootstrap,
    count: fn(&ScoredDocument) -> usize,
) -> Result<Estimate> {
    let losses: Vec<f64> = documents.iter().map(|of| -of.log_likelihood).collect();
    let counts: Vec<f64> = documents.iter().map(|of| count(of) as f64).collect();
    bootstrap.ratio(&losses, &counts)
}
