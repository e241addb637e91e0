use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use kernels::linear_cross_entropy;

use crate::{Batch, Linears, Spans};

/// A language model that predicts each token from those before it, in parts: an embedding, blocks
/// one after the other, a norm, and a head.
///
/// Whoever runs the parts decides what is kept of them: [`forward`](CausalLm::forward) all logits,
/// [`token_nll`] none of them, and [`fit`](crate::fit()) with
/// [`checkpoint_blocks`](crate::FitConfig::checkpoint_blocks) the inputs of the blocks alone.
pub trait CausalLm: Linears {
    /// What the embedding and the blocks know of the places of tokens, made once for all of them: which
    /// tokens see each other, tables of rotary embeddings. `()` for a model that needs neither.
    type Positions;

    /// Tokens that the model has: it takes `0 .. vocab_size`.
    fn vocab_size(&self) -> usize;

    /// The longest text that the model has places for, in tokens; none if any length can be computed,
    /// as with rotary embeddings.
    fn max_positions(&self) -> Option<usize> {
        None
    }

    /// Blocks.
    fn n_blocks(&self) -> usize;

    /// The places of the tokens of sequences.
    fn positions(&self, spans: &Spans) -> Self::Positions;

    /// The input of the first block, `[batch, seq, hidden]`, of tokens `[batch, seq]`.
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    fn embed(&self, tokens: Tensor<2, Int>, positions: &Self::Positions) -> Tensor<3>;

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

    /// The logits of the token after each of `tokens`, each sequence being one text.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`
    /// - result: `[batch, seq, vocab]`
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let spans = Spans::whole(tokens.dims()[1], &tokens.device());
        self.forward_spans(tokens, &spans)
    }

    /// [`forward`](CausalLm::forward) where the sequences are made up of texts.
    ///
    /// # Panics
    /// If a token is not in the vocabulary, or the spans are those of other sequences.
    fn forward_spans(&self, tokens: Tensor<2, Int>, spans: &Spans) -> Tensor<3> {
        let positions = self.positions(spans);
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
    let mut x = model.embed(tokens, positions);
    for index in 0..model.n_blocks() {
        on_input(index, &x);
        x = model.block(index, x, positions);
    }
    x
}

/// The negative log-likelihood of each token after the first, in nats, `[batch, seq - 1]`; nothing for
/// tokens that are not to be predicted.
pub fn token_nll<M: CausalLm>(model: &M, batch: &Batch) -> Tensor<2> {
    nll_of_output(model, last_output(model, batch), batch)
}

/// The output of the last block, `[batch, seq, hidden]`.
pub fn last_output<M: CausalLm>(model: &M, batch: &Batch) -> Tensor<3> {
    let positions = model.positions(batch.spans());
    run_blocks(model, batch.tokens(), &positions, |_, _| ())
}

/// [`token_nll`] from the output of the last block, `[batch, seq, hidden]`.
pub fn nll_of_output<M: CausalLm>(model: &M, x: Tensor<3>, batch: &Batch) -> Tensor<2> {
    let [n, seq, _] = x.dims();
    let x = model.norm(x.slice([0..n, 0..seq - 1]));
    let [_, _, hidden] = x.dims();
    let x = x.reshape([n * (seq - 1), hidden]);
    let targets = batch.tokens().slice([0..n, 1..seq]);
    let targets = targets.reshape([n * (seq - 1)]);
    let Some(rows) = batch.target_rows() else {
        return linear_cross_entropy(x, model.head(), targets).reshape([n, seq - 1]);
    };
    // The head is multiplied by what is predicted alone: of instruction data that is a part.
    let (x, targets) = (x.select(0, rows.clone()), targets.select(0, rows.clone()));
    let losses = linear_cross_entropy(x, model.head(), targets);
    let none = Tensor::zeros([n * (seq - 1)], (&losses.device(), losses.dtype()));
    let all = none.select_assign(0, rows, losses, IndexingUpdateOp::Add);
    all.reshape([n, seq - 1])
}
