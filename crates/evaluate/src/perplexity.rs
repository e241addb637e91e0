use burn::tensor::Device;
use models::Pretrained;
use peft::{Batch, CausalLm, token_nll};
use serde::{Deserialize, Serialize};

use crate::harness::{AddBos, encode};
use crate::rolling::{ScoredDocument, ScoredWindow, llama_cpp_windows, rolling_windows};
use crate::score::score;
use crate::statistics::{Bootstrap, Estimate};
use crate::{Error, Result};

/// A perplexity in the protocol `gptq` of Frantar et al. 2023, arXiv:2210.17323.
///
/// The text is cut into windows that do not overlap. The loss is the mean over windows of the mean over
/// the `seq_len - 1` targets of a window. No token that begins texts is added, as in
/// [`Pretrained::windows`](models::Pretrained::windows).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// The mean negative log-likelihood of a token in nats.
    pub nll: f64,
    /// The number of windows.
    pub n_windows: usize,
    /// The length of a window in tokens.
    pub seq_len: usize,
}

impl Perplexity {
    /// The perplexity, `exp(nll)`.
    pub fn value(&self) -> f64 {
        self.nll.exp()
    }
}

/// Evaluates the perplexity of a model over windows of one length, in the protocol of [`Perplexity`].
///
/// # Errors
/// As [`window_losses`].
///
/// # Examples
/// ```
/// use burn::tensor::Device;
/// use evaluate::{Error, perplexity};
/// use models::{LlamaConfig, Model, Windows};
///
/// let device = Device::flex();
/// let config = LlamaConfig::default()
///     .with_vocab_size(16)
///     .with_hidden_size(8)
///     .with_intermediate_size(8)
///     .with_num_hidden_layers(1)
///     .with_num_attention_heads(1)
///     .with_num_key_value_heads(1)
///     .with_head_dim(8);
/// let model = Model::init(config, 0, &device);
/// let windows = Windows::new((0..16).collect(), 8)?;
/// let found = perplexity(&model, &windows.batches(2, &device))?;
/// assert_eq!((found.n_windows, found.seq_len), (2, 8));
/// // An untrained model finds all 16 tokens about equally likely.
/// assert!((found.value() - 16.0).abs() < 1.0);
///
/// assert!(matches!(perplexity(&model, &[]), Err(Error::NoWindows)));
/// # Ok::<(), evaluate::Error>(())
/// ```
pub fn perplexity<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<Perplexity> {
    let losses = window_losses(model, batches)?;
    let n_windows = losses.len();
    Ok(Perplexity {
        nll: losses.iter().sum::<f64>() / n_windows as f64,
        n_windows,
        seq_len: batches[0].tokens().dims()[1],
    })
}

/// The mean loss of each window in nats, in the protocol of [`Perplexity`].
///
/// For batches with tokens that are not targets see [`target_loss`].
///
/// # Errors
/// [`Error::NoWindows`]; [`Error::PartialWindow`] for a window with tokens that are not targets;
/// [`Error::MixedWindows`]; [`peft::Error::Token`] for a token that the model lacks;
/// [`peft::Error::TooLong`] for windows beyond the positions of the model; [`Error::NonFinite`] with
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
        for sum in window_sums(model, batch, losses.len())? {
            losses.push(sum / (seq_len - 1) as f64);
        }
    }
    Ok(losses)
}

/// The mean loss over all targets of some batches, in nats.
///
/// # Errors
/// [`Error::NoWindows`]; [`peft::Error::Token`]; [`peft::Error::TooLong`]; [`Error::NonFinite`] with
/// the first window whose loss is not finite.
pub fn target_loss<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<f64> {
    if batches.is_empty() {
        return Err(Error::NoWindows);
    }
    let (mut sum, mut n_targets, mut n_windows) = (0.0, 0, 0);
    for batch in batches {
        batch.check(model)?;
        let sums = window_sums(model, batch, n_windows)?;
        n_windows += sums.len();
        sum = sums.iter().fold(sum, |sum, of_window| sum + of_window);
        n_targets += batch.n_targets();
    }
    Ok(sum / n_targets as f64)
}

/// The summed losses of each sequence of a batch, which begins with window `first`.
fn window_sums<M: CausalLm>(model: &M, batch: &Batch, first: usize) -> Result<Vec<f64>> {
    let nll = token_nll(model, batch).into_data().convert::<f32>();
    let nll = nll.as_slice::<f32>().expect("converted to f32");
    let n_targets = batch.tokens().dims()[1] - 1;
    let windows = nll.chunks_exact(n_targets).enumerate();
    windows
        .map(|(at, window)| {
            let sum = window.iter().map(|&nll| f64::from(nll)).sum::<f64>();
            let window = first + at;
            sum.is_finite()
                .then_some(sum)
                .ok_or(Error::NonFinite { window })
        })
        .collect()
}

/// The perplexity of llama.cpp's `perplexity` tool, by [`llama_cpp_windows`] of `n_ctx` tokens.
///
/// `tokens` are those of the whole text, after `bos` if the tokenizer adds it.
///
/// # Errors
/// As [`llama_cpp_windows`], [`score`] and [`Bootstrap::ratio`].
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

/// The rolling log-likelihoods of documents, as in lm-evaluation-harness.
///
/// The first token of a document is predicted from [`Pretrained::first_token`], and the model reads at most
/// as many tokens as it was trained for: see [`rolling_windows`]. By default, that is with
/// [`AddBos::AsTokenizer`], a tokenizer that adds the token that begins texts adds it to each document,
/// where it is predicted as all others are.
///
/// Source: `HFLM.loglikelihood_rolling` in `lm_eval/models/huggingface.py` 0.4.13.
///
/// # Errors
/// As [`Pretrained::encode`], [`Pretrained::first_token`] and [`score`].
pub fn word_losses(
    lm: &Pretrained,
    documents: &[&str],
    add_bos: AddBos,
) -> Result<Vec<ScoredDocument>> {
    let (prefix, max_len) = (lm.first_token()?, lm.model.config().max_seq_len());
    let (mut windows, mut ends) = (Vec::new(), Vec::new());
    for text in documents {
        let tokens = encode(lm, text, add_bos)?;
        windows.extend(rolling_windows(&tokens, prefix, max_len)?);
        ends.push(windows.len());
    }
    let losses = score(&lm.model, &windows, &lm.model.device())?;
    let mut start = 0;
    let scored = documents.iter().zip(ends).map(|(text, end)| {
        let loss: f64 = losses[start..end].iter().flatten().sum();
        start = end;
        ScoredDocument::new(text, -loss)
    });
    Ok(scored.collect())
}

/// The losses of the tokens of each document in nats, each document alone.
///
/// A document follows `bos` and is cut to `max_len` tokens, `bos` included.
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
