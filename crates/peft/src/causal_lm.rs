use burn::tensor::{Int, Tensor, activation::log_softmax};

use crate::{Error, Linears, Result};

/// A language model that predicts each token from those before it.
pub trait CausalLm: Linears {
    /// Tokens that the model has: it takes `0 .. vocab_size`.
    fn vocab_size(&self) -> usize;

    /// The logits of the token after each of `tokens`.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`
    /// - result: `[batch, seq, vocab]`
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3>;
}

/// Sequences of one length, `[batch, seq]`, whose tokens after the first are to be predicted.
#[derive(Clone, Debug)]
pub struct Batch {
    tokens: Tensor<2, Int>,
}

impl Batch {
    /// # Errors
    /// [`Error::EmptyBatch`] unless there is a sequence of two tokens.
    pub fn new(tokens: Tensor<2, Int>) -> Result<Self> {
        let [batch, seq] = tokens.dims();
        if batch == 0 || seq < 2 {
            return Err(Error::EmptyBatch { batch, seq });
        }
        Ok(Self { tokens })
    }

    /// `[batch, seq]`.
    pub fn tokens(&self) -> Tensor<2, Int> {
        self.tokens.clone()
    }

    /// Checks that the model has all tokens.
    ///
    /// # Errors
    /// [`Error::Token`] with one that is not below `vocab_size`.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let least = self.tokens.clone().min().into_scalar::<i64>();
        let most = self.tokens.clone().max().into_scalar::<i64>();
        let has = |token: i64| usize::try_from(token).is_ok_and(|token| token < vocab_size);
        match [least, most].into_iter().find(|&token| !has(token)) {
            Some(token) => Err(Error::Token { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// Tokens to be predicted.
    pub fn n_targets(&self) -> usize {
        let [batch, seq] = self.tokens.dims();
        batch * (seq - 1)
    }
}

/// The negative log-likelihood of each token after the first, in nats, `[batch, seq - 1]`.
pub fn token_nll<M: CausalLm>(model: &M, batch: &Batch) -> Tensor<2> {
    let [n, seq] = batch.tokens.dims();
    let logits = model.forward(batch.tokens());
    let vocab = logits.dims()[2];
    let logits = logits
        .slice([0..n, 0..seq - 1])
        .reshape([n * (seq - 1), vocab]);
    let targets = batch
        .tokens()
        .slice([0..n, 1..seq])
        .reshape([n * (seq - 1), 1]);
    log_softmax(logits, 1)
        .gather(1, targets)
        .neg()
        .reshape([n, seq - 1])
}
