use burn::tensor::{Int, Tensor};

use crate::{Batch, Error, Linears, Result, Spans};

/// A model of tokens: an embedding and blocks one after the other.
///
/// A [`CausalLm`](crate::CausalLm) predicts the next token from the output of the last block.
/// [`fit_with`](crate::fit_with) trains on any other scalar loss. The parts are called separately, so
/// that the caller decides which activations are kept.
pub trait Blocks: Linears {
    /// The positions of a batch's tokens in the form that the embedding and the blocks read, such as
    /// tables of rotary embeddings. `()` for a model that reads none.
    type Positions;

    /// The size of the vocabulary: tokens are `0 .. vocab_size`.
    fn vocab_size(&self) -> usize;

    /// The longest document that the model has positions for, in tokens; none without such a limit.
    fn max_positions(&self) -> Option<usize> {
        None
    }

    /// The number of blocks.
    fn n_blocks(&self) -> usize;

    /// The positions of the tokens of sequences, made once per batch.
    fn positions(&self, spans: &Spans) -> Self::Positions;

    /// Embeds tokens, `[batch, seq]`, to the input of the first block, `[batch, seq, hidden]`.
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    fn embed(&self, tokens: Tensor<2, Int>, positions: &Self::Positions) -> Tensor<3>;

    /// Runs `x`, `[batch, seq, hidden]`, through block `index`.
    ///
    /// It must be a function of its arguments and of the block's parameters: gradient checkpointing
    /// runs it again.
    fn block(&self, index: usize, x: Tensor<3>, positions: &Self::Positions) -> Tensor<3>;
}

impl Batch {
    /// Checks that the model has all tokens of the batch, and positions for them.
    ///
    /// # Errors
    /// [`Error::Token`] with one that is not in the vocabulary, [`Error::TooLong`] for a document of more
    /// tokens than [`Blocks::max_positions`].
    pub fn check(&self, model: &impl Blocks) -> Result<()> {
        self.check_within(model.vocab_size(), model.max_positions())
    }

    /// Checks tokens and positions as [`Batch::check`] does, against a model that is not in memory.
    ///
    /// # Errors
    /// As [`Batch::check`].
    pub fn check_within(&self, vocab_size: usize, max_positions: Option<usize>) -> Result<()> {
        let least = self.tokens().min().into_scalar::<i64>();
        let most = self.tokens().max().into_scalar::<i64>();
        let has = |token: i64| usize::try_from(token).is_ok_and(|token| token < vocab_size);
        if let Some(token) = [least, most].into_iter().find(|&token| !has(token)) {
            return Err(Error::Token { token, vocab_size });
        }
        let Some(max) = max_positions else {
            return Ok(());
        };
        if self.tokens().dims()[1] <= max {
            return Ok(());
        }
        let len = self.spans().positions().max().into_scalar::<i64>() as usize + 1;
        if len > max {
            return Err(Error::TooLong { len, max });
        }
        Ok(())
    }
}

/// The output of the last block, `[batch, seq, hidden]`, from embedded tokens of the same shape. `on_input`
/// is called with the index and the input of each block.
pub(crate) fn run_blocks<M: Blocks>(
    model: &M,
    mut x: Tensor<3>,
    positions: &M::Positions,
    mut on_input: impl FnMut(usize, &Tensor<3>),
) -> Tensor<3> {
    for index in 0..model.n_blocks() {
        on_input(index, &x);
        x = model.block(index, x, positions);
    }
    x
}

/// Runs a batch through all blocks: the output of the last one, `[batch, seq, hidden]`.
///
/// # Panics
/// If a token is not in the vocabulary ([`Batch::check`]).
pub fn last_output<M: Blocks>(model: &M, batch: &Batch) -> Tensor<3> {
    let positions = model.positions(batch.spans());
    let x = model.embed(batch.tokens(), &positions);
    run_blocks(model, x, &positions, |_, _| ())
}
