use burn::tensor::{Device, Int, Tensor};
use kernels::linear_cross_entropy;

use crate::{Error, Linears, Result};

/// A language model that predicts each token from those before it, in parts: an embedding, blocks
/// one after the other, a norm, and a head.
///
/// Whoever runs the parts decides what is kept of them: [`forward`](CausalLm::forward) all logits,
/// [`token_nll`] none of them, and [`fit`](crate::fit()) with
/// [`checkpoint_blocks`](crate::FitConfig::checkpoint_blocks) the inputs of the blocks alone.
pub trait CausalLm: Linears {
    /// What the blocks know of the positions of a sequence, made once for all of them: tables of
    /// rotary embeddings for example. `()` for a model whose embedding says it all.
    type Positions;

    /// Tokens that the model has: it takes `0 .. vocab_size`.
    fn vocab_size(&self) -> usize;

    /// Blocks.
    fn n_blocks(&self) -> usize;

    /// The positions of sequences of `seq` tokens.
    fn positions(&self, seq: usize, device: &Device) -> Self::Positions;

    /// The input of the first block, `[batch, seq, hidden]`, of tokens `[batch, seq]`.
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3>;

    /// `x`, `[batch, seq, hidden]`, through block `index`: a function of its arguments and the
    /// block's parameters, which may be run again.
    fn block(&self, index: usize, x: Tensor<3>, positions: &Self::Positions) -> Tensor<3>;

    /// What the head reads of the output of the last block, `[batch, seq, hidden]`.
    fn norm(&self, x: Tensor<3>) -> Tensor<3>;

    /// The weight of the head, `[hidden, vocab]`: logits are its product with the output of
    /// [`norm`](CausalLm::norm). The loss, which goes through the head in parts, asks for it once; a
    /// packed head is unpacked for that.
    fn head(&self) -> Tensor<2>;

    /// The logits of `x`, the output of [`norm`](CausalLm::norm): its product with the head. A model
    /// whose head may be packed multiplies by what is packed.
    ///
    /// # Shapes
    /// - `x`: `[rows, hidden]`
    /// - result: `[rows, vocab]`
    fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        x.matmul(self.head())
    }

    /// The logits of the token after each of `tokens`.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`
    /// - result: `[batch, seq, vocab]`
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let positions = self.positions(tokens.dims()[1], &tokens.device());
        let x = self.norm(run_blocks(self, tokens, &positions, |_, _| ()));
        let [batch, seq, hidden] = x.dims();
        let logits = self.logits(x.reshape([batch * seq, hidden]));
        let vocab = logits.dims()[1];
        logits.reshape([batch, seq, vocab])
    }
}

/// The output of the last block. `on_input` sees each block's index and input.
pub(crate) fn run_blocks<M: CausalLm>(
    model: &M,
    tokens: Tensor<2, Int>,
    positions: &M::Positions,
    mut on_input: impl FnMut(usize, &Tensor<3>),
) -> Tensor<3> {
    let mut x = model.embed(tokens);
    for index in 0..model.n_blocks() {
        on_input(index, &x);
        x = model.block(index, x, positions);
    }
    x
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

    pub(crate) fn positions<M: CausalLm>(&self, model: &M) -> M::Positions {
        model.positions(self.tokens.dims()[1], &self.tokens.device())
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
    nll_of_output(model, last_output(model, batch), batch)
}

/// The output of the last block, `[batch, seq, hidden]`.
pub fn last_output<M: CausalLm>(model: &M, batch: &Batch) -> Tensor<3> {
    let positions = batch.positions(model);
    run_blocks(model, batch.tokens(), &positions, |_, _| ())
}

/// [`token_nll`] from the output of the last block, `[batch, seq, hidden]`.
pub fn nll_of_output<M: CausalLm>(model: &M, x: Tensor<3>, batch: &Batch) -> Tensor<2> {
    let [n, seq, hidden] = x.dims();
    let x = model.norm(x.slice([0..n, 0..seq - 1]));
    let x = x.reshape([n * (seq - 1), hidden]);
    let targets = batch.tokens().slice([0..n, 1..seq]);
    let targets = targets.reshape([n * (seq - 1)]);
    linear_cross_entropy(x, model.head(), targets).reshape([n, seq - 1])
}
