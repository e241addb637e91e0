use burn::tensor::Device;
use peft::{Batch, CausalLm, token_nll};
use serde::{Deserialize, Serialize};

use crate::rolling::{ScoredDocument, ScoredWindow, llama_cpp_windows, rolling_windows};
use crate::score::score;
use crate::statistics::{Bootstrap, Estimate};
use crate::{Error, Result};

/// Perplexity in the protocol `gptq`: non-overlapping windows, the mean over the `seq_len - 1`
/// targets of each, the mean of those (Frantar et al. 2023). The stream of tokens is that of
/// [`Pretrained::windows`](models::Pretrained::windows), without a first token that begins texts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// The mean negative log-likelihood of a token, in nats.
    pub nll: f64,
    /// Windows.
    pub n_windows: usize,
    /// Tokens of a window.
    pub seq_len: usize,
}

impl Perplexity {
    /// `exp(nll)`.
    pub fn value(&self) -> f64 {
        self.nll.exp()
    }
}

/// The perplexity of a model over windows of one length, in the protocol of [`Perplexity`].
///
/// # Errors
/// As [`window_losses`].
pub fn perplexity<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<Perplexity> {
    let losses = window_losses(model, batches)?;
    let n_windows = losses.len();
    Ok(Perplexity {
        nll: losses.iter().sum::<f64>() / n_windows as f64,
        n_windows,
        seq_len: batches[0].tokens().dims()[1],
    })
}

/// The mean loss of each window of the protocol of [`Perplexity`], in nats. Windows have no tokens that
/// are not to be predicted; for those see [`target_loss`].
///
/// # Errors
/// [`Error::NoWindows`], [`Error::PartialWindow`] for one that has, [`Error::MixedWindows`], [`peft::Error::Token`] for a token that the model
/// lacks, [`peft::Error::TooLong`] for windows that it has no places for, or [`Error::NonFinite`] with
/// the first window whose loss is not finite.
pub fn window_losses<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<Vec<f64>> {
    let seq_len = batches.first().ok_or(Error::NoWindows)?.tokens().dims()[1];
    let mut losses = Vec::new();
    for batch in batches {
        let found = batch.tokens().dims()[1];
        if found != seq_len {
            let expected = seq_len;
            return Err(Error::MixedWindows { expected, found });
        }
        batch.check(model)?;
        if batch.n_targets() < batch.targets().len() {
            let window = losses.len();
            return Err(Error::PartialWindow { window });
        }
        let nll = token_nll(model, batch).into_data().convert::<f32>();
        let nll = nll.as_slice::<f32>().expect("converted to f32");
        let n_targets = seq_len - 1;
        for window in nll.chunks_exact(n_targets) {
            let mean = window.iter().map(|&nll| f64::from(nll)).sum::<f64>() / n_targets as f64;
            if !mean.is_finite() {
                let window = losses.len();
                return Err(Error::NonFinite { window });
            }
            losses.push(mean);
        }
    }
    Ok(losses)
}

/// The mean loss of all tokens that are to be predicted, in nats.
///
/// # Errors
/// [`Error::NoWindows`], [`peft::Error::Token`] or [`peft::Error::TooLong`], or [`Error::NonFinite`] with
/// the first window whose loss is not finite.
pub fn target_loss<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<f64> {
    if batches.is_empty() {
        return Err(Error::NoWindows);
    }
    let (mut sum, mut n_targets, mut n_windows) = (0.0, 0, 0);
    for batch in batches {
        batch.check(model)?;
        let nll = token_nll(model, batch).into_data().convert::<f32>();
        let nll = nll.as_slice::<f32>().expect("converted to f32");
        let n = batch.targets().len() / batch.tokens().dims()[0];
        for window in nll.chunks_exact(n) {
            sum += window.iter().map(|&nll| f64::from(nll)).sum::<f64>();
            if !sum.is_finite() {
                return Err(Error::NonFinite { window: n_windows });
            }
            n_windows += 1;
        }
        n_targets += batch.n_targets();
    }
    Ok(sum / n_targets as f64)
}

/// The perplexity of llama.cpp's `perplexity` tool, by [`llama_cpp_windows`] of `n_ctx` tokens.
///
/// `tokens` are those of the whole text, with `bos` at the head if the tokenizer adds one.
///
/// # Errors
/// As [`llama_cpp_windows`], [`score`], or of the bootstrap over windows.
pub fn llama_cpp_perplexity<M: CausalLm>(
    model: &M,
    tokens: &[u32],
    n_ctx: usize,
    bos: Option<u32>,
    bootstrap: &Bootstrap,
    device: &Device,
) -> Result<Estimate> {
    let windows = llama_cpp_windows(tokens, n_ctx, bos)?;
    let losses = score(model, &windows, device)?;
    let sums: Vec<f64> = losses.iter().map(|losses| losses.iter().sum()).collect();
    let counts: Vec<f64> = losses.iter().map(|losses| losses.len() as f64).collect();
    Ok(bootstrap.ratio(&sums, &counts)?.map(f64::exp))
}

/// Documents with their rolling log-likelihoods, as lm-evaluation-harness has them.
///
/// Each is a text with its tokens; `prefix` is what the first token is predicted from, and `max_len`
/// how many the model reads at once: see [`rolling_windows`].
///
/// # Errors
/// As [`rolling_windows`] and [`score`].
pub fn word_losses<M: CausalLm>(
    model: &M,
    documents: &[(&str, Vec<u32>)],
    prefix: u32,
    max_len: usize,
    device: &Device,
) -> Result<Vec<ScoredDocument>> {
    let (mut windows, mut ends) = (Vec::new(), Vec::new());
    for (_, tokens) in documents {
        windows.extend(rolling_windows(tokens, prefix, max_len)?);
        ends.push(windows.len());
    }
    let losses = score(model, &windows, device)?;
    let mut start = 0;
    let scored = documents.iter().zip(ends).map(|((text, _), end)| {
        let loss: f64 = losses[start..end].iter().flatten().sum();
        start = end;
        ScoredDocument::new(text, -loss)
    });
    Ok(scored.collect())
}

/// The losses of each document's tokens, each document alone after `bos` and cut, with it, to
/// `max_len` tokens.
///
/// # Errors
/// As [`score`].
pub fn document_losses<M: CausalLm>(
    model: &M,
    documents: &[Vec<u32>],
    bos: u32,
    max_len: usize,
    device: &Device,
) -> Result<Vec<Vec<f64>>> {
    let window = |tokens: &Vec<u32>| {
        let n = tokens.len().min(max_len.saturating_sub(1));
        ScoredWindow {
            tokens: [&[bos], &tokens[..n]].concat(),
            scored: 1..n + 1,
        }
    };
    let windows: Vec<_> = documents.iter().map(window).collect();
    score(model, &windows, device)
}
