use peft::{Batch, CausalLm};

use crate::{Error, Result};

/// The differences between the predictions of a model and of a reference, one for each window.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The Kullback-Leibler divergence `Σ p ln(p / q)` in nats, where `p` is the distribution of the
    /// reference: the mean over the tokens of a window.
    pub divergence: Vec<f64>,
    /// The fraction of the tokens of a window after which both models predict the same token.
    pub same_top: Vec<f64>,
}

/// Compares a model with a reference, such as itself in full precision, over windows of text.
///
/// The predictions after every token of a window count, the last one included. Both models read the
/// same tokens, so that their tokenizers must be the same. Sums are in f64.
///
/// # Errors
/// [`Error::OtherVocabulary`]; [`Error::NoWindows`]; [`Error::PartialWindow`] for a window with
/// padding; [`peft::Error::Token`]; [`peft::Error::TooLong`]; [`Error::NonFinite`] with the first window
/// whose divergence is not finite.
pub fn compare<A: CausalLm, B: CausalLm>(
    model: &A,
    reference: &B,
    batches: &[Batch],
) -> Result<Comparison> {
    let vocab = model.vocab_size();
    if vocab != reference.vocab_size() {
        let expected = reference.vocab_size();
        let found = vocab;
        return Err(Error::OtherVocabulary { expected, found });
    }
    let mut comparison = Comparison {
        divergence: Vec::new(),
        same_top: Vec::new(),
    };
    if batches.is_empty() {
        return Err(Error::NoWindows);
    }
    for batch in batches {
        batch.check(model)?;
        batch.check(reference)?;
        if batch.is_padded() {
            let window = comparison.divergence.len();
            return Err(Error::PartialWindow { window });
        }
        let [_, seq] = batch.tokens().dims();
        let (q, p) = (logits(model, batch), logits(reference, batch));
        for (q, p) in q.chunks_exact(seq * vocab).zip(p.chunks_exact(seq * vocab)) {
            let (mut divergence, mut same) = (0.0, 0);
            for (q, p) in q.chunks_exact(vocab).zip(p.chunks_exact(vocab)) {
                let (q, p) = (Prediction::of(q), Prediction::of(p));
                divergence += p.divergence(&q);
                same += usize::from(p.top == q.top);
            }
            if !divergence.is_finite() {
                let window = comparison.divergence.len();
                return Err(Error::NonFinite { window });
            }
            comparison.divergence.push(divergence / seq as f64);
            comparison.same_top.push(same as f64 / seq as f64);
        }
    }
    Ok(comparison)
}

/// The confidence of a model in each target, and whether it was right, one list for each window.
///
/// The confidence is the probability of the likeliest token, which is right if it is the target.
/// [`calibration_error`](crate::calibration_error()) takes the lists.
///
/// # Errors
/// [`Error::NoWindows`]; [`peft::Error::Token`]; [`peft::Error::TooLong`].
pub fn confidences<M: CausalLm>(model: &M, batches: &[Batch]) -> Result<Vec<Vec<(f64, bool)>>> {
    if batches.is_empty() {
        return Err(Error::NoWindows);
    }
    let vocab = model.vocab_size();
    let mut items = Vec::new();
    for batch in batches {
        batch.check(model)?;
        let [_, seq] = batch.tokens().dims();
        let tokens = batch.tokens().into_data().convert::<i64>();
        let tokens = tokens.as_slice::<i64>().expect("converted to i64");
        let logits = logits(model, batch);
        for (row, targets) in batch.targets().chunks_exact(seq - 1).enumerate() {
            let mut of_window = Vec::new();
            for position in (0..seq - 1).filter(|&position| targets[position]) {
                let at = row * seq + position;
                let prediction = Prediction::of(&logits[at * vocab..(at + 1) * vocab]);
                let confidence = prediction.probability(prediction.top);
                of_window.push((confidence, tokens[at + 1] == prediction.top as i64));
            }
            items.push(of_window);
        }
    }
    Ok(items)
}

/// The logits of a batch, row by row.
fn logits<M: CausalLm>(model: &M, batch: &Batch) -> Vec<f32> {
    let logits = model.forward_spans(batch.tokens(), batch.spans());
    let logits = logits.into_data().convert::<f32>().try_into_vec();
    logits.expect("converted to f32")
}

/// The distribution of the next token.
struct Prediction<'a> {
    logits: &'a [f32],
    /// The first of the likeliest tokens.
    top: usize,
    /// The logarithm of the sum of exponentials.
    lse: f64,
}

impl<'a> Prediction<'a> {
    fn of(logits: &'a [f32]) -> Self {
        let larger = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
        let top = (1..logits.len()).fold(0, larger);
        let most = f64::from(logits[top]);
        let sum: f64 = (logits.iter())
            .map(|&logit| (f64::from(logit) - most).exp())
            .sum();
        Self {
            logits,
            top,
            lse: most + sum.ln(),
        }
    }

    fn probability(&self, token: usize) -> f64 {
        (f64::from(self.logits[token]) - self.lse).exp()
    }

    /// `Σ p ln(p / q)`.
    fn divergence(&self, q: &Self) -> f64 {
        let both = self.logits.iter().zip(q.logits);
        both.map(|(&p, &q_logit)| {
            let p = f64::from(p) - self.lse;
            p.exp() * (p - (f64::from(q_logit) - q.lse))
        })
        .sum()
    }
}
