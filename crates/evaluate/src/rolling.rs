//! The host side of perplexity protocols: windows of tokens, and what a loss is divided by.

use std::ops::Range;

use crate::error::{Error, Result, setting};
use crate::statistics::{Bootstrap, Estimate};
use crate::whitespace::is_space;

#[cfg(test)]
mod tests;

/// Tokens that a model reads at once, and which of them it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoredWindow {
    /// The tokens; the last one is only predicted, not read.
    pub tokens: Vec<u32>,
    /// The places of those that are scored, each given all tokens before it; never place 0.
    pub scored: Range<usize>,
}

impl ScoredWindow {
    /// A continuation after its context, of which the last tokens are kept that the model can read.
    ///
    /// As in lm-evaluation-harness (`lm_eval/models/huggingface.py`, `_loglikelihood_tokens`).
    ///
    /// # Errors
    /// [`Error::NoContext`], [`Error::NoContinuation`], or [`Error::LongContinuation`] for one of more
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

    /// Their places among the losses of the window, which begin with that of the second token.
    pub fn losses(&self) -> Range<usize> {
        self.scored.start - 1..self.scored.end - 1
    }
}

/// The windows of lm-evaluation-harness's `loglikelihood_rolling` over a document.
///
/// `prefix` is what the first token is predicted from, the beginning-of-sequence token as a rule, and
/// `max_len` how many tokens the model reads at once. Windows do not share scored tokens, and every
/// token is scored once. The last window reads as many tokens as the others, of which those that were
/// scored before are context; the first token of each other window sees one token of context. A
/// document without tokens has no windows.
///
/// `lm_eval/utils.py`, `get_rolling_token_windows` with `context_len=1`.
///
/// # Errors
/// [`peft::Error::Setting`] if `max_len` is 0.
pub fn rolling_windows(tokens: &[u32], prefix: u32, max_len: usize) -> Result<Vec<ScoredWindow>> {
    if max_len == 0 {
        return Err(setting("max_len", 0, "at least 1"));
    }
    // Place 0 is the prefix: token `i` of the document is at `i + 1`.
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

/// The windows of llama.cpp's `perplexity` tool over a text.
///
/// `tokens` are those of the whole text, with the beginning-of-sequence token at its head if the
/// tokenizer adds one, and then `bos` takes the place of the first token of every window. Of each
/// `n_ctx` tokens, 512 by default, those after place `n_ctx / 2` are scored: 255 of 512. What does not
/// fill a window at the end is left out. The perplexity is `exp` of the mean loss of all scored
/// tokens.
///
/// `tools/perplexity/perplexity.cpp`, `perplexity`, without a stride.
///
/// # Errors
/// [`peft::Error::Setting`] if `n_ctx` is below 3, which leaves nothing to score, or [`Error::FewTokens`] if
/// the text does not fill two windows.
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

/// A document of a rolling evaluation: its log-likelihood, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredDocument {
    /// The sum over all its tokens, in nats; not positive.
    pub log_likelihood: f64,
    /// Its [`word_count`].
    pub n_words: usize,
    /// Its bytes in UTF-8.
    pub n_bytes: usize,
}

impl ScoredDocument {
    /// A document with the sum of the log-likelihoods of its tokens.
    pub fn new(text: &str, log_likelihood: f64) -> Self {
        Self {
            log_likelihood,
            n_words: word_count(text),
            n_bytes: text.len(),
        }
    }
}

/// The words of a document as lm-evaluation-harness counts them.
///
/// Python's `len(re.split(r"\s+", text))`: one more than there are runs of whitespace, so that
/// whitespace at an end counts a word that is not there, and an empty text is one word.
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
/// [`Error::NoItems`], [`Error::NonFiniteItem`], or [`peft::Error::Setting`] of the bootstrap.
pub fn word_perplexity(documents: &[ScoredDocument], bootstrap: &Bootstrap) -> Result<Estimate> {
    let words = per(documents, bootstrap, |document| document.n_words)?;
    Ok(words.map(f64::exp))
}

/// `exp(-Σ log-likelihood / Σ bytes)` over documents.
///
/// # Errors
/// As [`word_perplexity`], or [`Error::Denominator`] for an empty document.
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

/// The loss for each of what documents have some number of.
fn per(
    documents: &[ScoredDocument],
    bootstrap: &Bootstrap,
    count: fn(&ScoredDocument) -> usize,
) -> Result<Estimate> {
    let losses: Vec<f64> = documents.iter().map(|of| -of.log_likelihood).collect();
    let counts: Vec<f64> = documents.iter().map(|of| count(of) as f64).collect();
    bootstrap.ratio(&losses, &counts)
}
