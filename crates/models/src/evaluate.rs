use peft::{Batch, CausalLm, token_nll};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Perplexity in the protocol `gptq`: non-overlapping windows, the mean over the `seq_len - 1`
/// targets of each, the mean of those (Frantar et al. 2023).
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
/// [`Error::NoWindows`], [`Error::MixedWindows`], [`peft::Error::Token`] for a token that the model
/// lacks, or [`Error::NonFinite`] with the first window whose loss is not finite.
pub fn perplexity<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<Perplexity> {
    let seq_len = batches.first().ok_or(Error::NoWindows)?.tokens().dims()[1];
    let (mut sum, mut n_windows) = (0.0, 0);
    for batch in batches {
        let found = batch.tokens().dims()[1];
        if found != seq_len {
            let expected = seq_len;
            return Err(Error::MixedWindows { expected, found });
        }
        batch.check(model)?;
        let nll = token_nll(model, batch).into_data().convert::<f32>();
        let nll = nll.as_slice::<f32>().expect("converted to f32");
        let n_targets = seq_len - 1;
        for window in nll.chunks_exact(n_targets) {
            let mean = window.iter().map(|&nll| f64::from(nll)).sum::<f64>() / n_targets as f64;
            if !mean.is_finite() {
                return Err(Error::NonFinite { window: n_windows });
            }
            sum += mean;
            n_windows += 1;
        }
    }
    Ok(Perplexity {
        nll: sum / n_windows as f64,
        n_windows,
        seq_len,
    })
}
