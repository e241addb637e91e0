use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};
use kernels::linear_cross_entropy;
use quant_core::QuantTensor;

use crate::blocks::run_blocks;
use crate::{Batch, Blocks, Spans, Weight, last_output};

/// A language model that predicts each token from those before it: [`Blocks`], a norm and a head.
///
/// [`forward`](CausalLm::forward) computes all logits. [`token_nll`] goes from the output of the norm and
/// the weight of the head to one number per token, without the logits of all tokens in memory.
pub trait CausalLm: Blocks {
    /// The input of the head, from the output of the last block, `[batch, seq, hidden]`.
    fn norm(&self, x: Tensor<3>) -> Tensor<3>;

    /// The head, whose product with the output of [`norm`](CausalLm::norm) is the logits.
    fn head(&self) -> Head<'_>;

    /// The logits of the token after each of `tokens`; each sequence is one document.
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

    /// The logits of sequences of several documents; otherwise as [`forward`](CausalLm::forward).
    ///
    /// # Panics
    /// If a token is not in the vocabulary, or the spans are those of other sequences.
    fn forward_spans(&self, tokens: Tensor<2, Int>, spans: &Spans) -> Tensor<3> {
        let positions = self.positions(spans);
        let x = self.embed(tokens, &positions);
        let x = self.norm(run_blocks(self, x, &positions, |_, _| ()));
        let [batch, seq, hidden] = x.dims();
        let logits = self.head().logits(x.reshape([batch * seq, hidden]));
        let vocab = logits.dims()[1];
        logits.reshape([batch, seq, vocab])
    }
}

/// The weight of the head of a [`CausalLm`], `[hidden, vocab]`.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one at a time, on the stack"
)]
pub enum Head<'a> {
    /// Floats of any dtype: a weight of its own, or the transposed embedding of a tied head.
    Dense(Tensor<2>),
    /// A packed weight.
    Quant(&'a QuantTensor),
}

impl<'a> From<&'a Weight> for Head<'a> {
    fn from(weight: &'a Weight) -> Self {
        match weight {
            Weight::Dense(weight) => Self::Dense(weight.val()),
            Weight::Quant(weight) => Self::Quant(weight),
        }
    }
}

impl Head<'_> {
    /// The product of `x` and the head.
    ///
    /// # Shapes
    /// - `x`: `[rows, hidden]`
    /// - result: `[rows, vocab]`, in the dtype of `x`
    ///
    /// # Panics
    /// If `x` is of another width.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => kernels::matmul(x, weight.clone()),
            Self::Quant(weight) => weight.matmul(x),
        }
    }

    /// The weight in `f32`, `[hidden, vocab]`; a packed one is dequantized.
    pub fn to_dense(&self) -> Tensor<2> {
        self.at_rest().cast(DType::F32)
    }

    /// The weight in floats: a dense one in the dtype in which it is in memory.
    fn at_rest(&self) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.clone(),
            Self::Quant(weight) => weight.dequantize(),
        }
    }
}

/// The negative log-likelihood of each token after the first, in nats, `[batch, seq - 1]`, in `f32`; zero
/// for tokens that are not targets.
///
/// # Panics
/// If a token is not in the vocabulary ([`Batch::check`]).
pub fn token_nll<M: CausalLm>(model: &M, batch: &Batch) -> Tensor<2> {
    nll_of_output(model, last_output(model, batch), batch)
}

/// [`token_nll`] from the output of the last block, `[batch, seq, hidden]`.
///
/// A packed head is dequantized once per call.
pub fn nll_of_output<M: CausalLm>(model: &M, x: Tensor<3>, batch: &Batch) -> Tensor<2> {
    let [n, seq, _] = x.dims();
    let x = model.norm(x.slice([0..n, 0..seq - 1]));
    let [_, _, hidden] = x.dims();
    let x = x.reshape([n * (seq - 1), hidden]);
    let targets = batch.tokens().slice([0..n, 1..seq]);
    let targets = targets.reshape([n * (seq - 1)]);
    let head = model.head().at_rest();
    let Some(rows) = batch.target_rows() else {
        return linear_cross_entropy(x, head, targets).reshape([n, seq - 1]);
    };
    // Only the rows of targets are multiplied by the head: of instruction data, a part.
    let (x, targets) = (x.select(0, rows.clone()), targets.select(0, rows.clone()));
    let losses = linear_cross_entropy(x, head, targets);
    let none = Tensor::zeros([n * (seq - 1)], (&losses.device(), losses.dtype()));
    let all = none.select_assign(0, rows, losses, IndexingUpdateOp::Add);
    all.reshape([n, seq - 1])
}
