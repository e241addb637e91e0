use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};
use kernels::{OutputHead, linear_cross_entropy};
use quant_core::QuantTensor;

use crate::blocks::run_blocks;
use crate::{Batch, Blocks, Spans, Weight, last_output};

/// A language model that predicts each token from those before it: [`Blocks`], a norm and a head.
///
/// [`forward`](CausalLm::forward) computes all logits. [`token_nll`] goes from the output of the norm and
/// the head to one number per token, without the logits of all tokens in memory.
pub trait CausalLm: Blocks {
    /// The input of the head, from the output of the last block, `[batch, seq, hidden]`.
    fn norm(&self, x: Tensor<3>) -> Tensor<3>;

    /// The head, which makes logits of the output of [`norm`](CausalLm::norm).
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

/// The head of a [`CausalLm`]: a weight and, if the model has them, a bias and a soft cap.
///
/// The logits are `x · weight + bias`, capped to `cap · tanh(logits / cap)`. All results of a model go
/// through [`logits`](Head::logits) or [`nll`](Head::nll).
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::Head;
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::eye(2, &device);
/// let bias = Tensor::<1>::from_data([0.0, 1e6], &device);
/// let head = Head::from(weight).with_bias(bias).with_softcap(30.0);
/// let logits = head.logits(Tensor::zeros([1, 2], &device));
/// assert_eq!(logits.into_data().try_to_vec::<f32>().unwrap(), [0.0, 30.0]);
/// ```
#[derive(Clone, Debug)]
pub struct Head<'a> {
    weight: HeadWeight<'a>,
    bias: Option<Tensor<1>>,
    softcap: Option<f64>,
}

/// The weight of a [`Head`], `[hidden, vocab]`.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one at a time, on the stack"
)]
pub enum HeadWeight<'a> {
    /// Floats of any dtype: a weight of its own, or the transposed embedding of a tied head.
    Dense(Tensor<2>),
    /// A packed weight.
    Quant(&'a QuantTensor),
}

impl HeadWeight<'_> {
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

impl<'a> From<HeadWeight<'a>> for Head<'a> {
    fn from(weight: HeadWeight<'a>) -> Self {
        Self {
            weight,
            bias: None,
            softcap: None,
        }
    }
}

impl From<Tensor<2>> for Head<'_> {
    fn from(weight: Tensor<2>) -> Self {
        HeadWeight::Dense(weight).into()
    }
}

impl<'a> From<&'a Weight> for Head<'a> {
    fn from(weight: &'a Weight) -> Self {
        match weight {
            Weight::Dense(weight) => weight.val().into(),
            Weight::Quant(weight) => HeadWeight::Quant(weight).into(),
        }
    }
}

impl<'a> Head<'a> {
    /// Sets what is added to the products with the weight, `[vocab]`, nothing by default.
    pub fn with_bias(mut self, bias: impl Into<Option<Tensor<1>>>) -> Self {
        self.bias = bias.into();
        self
    }

    /// Sets the bound that logits approach, none by default; it is positive and finite.
    pub fn with_softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.softcap = softcap.into();
        self
    }

    /// The weight, whose products with the output of [`norm`](CausalLm::norm) are logits only of a head
    /// without a bias and a cap.
    pub fn weight(&self) -> &HeadWeight<'a> {
        &self.weight
    }

    /// The logits of `x`.
    ///
    /// # Shapes
    /// - `x`: `[rows, hidden]`
    /// - result: `[rows, vocab]`, in the dtype of `x`
    ///
    /// # Panics
    /// If `x` is of another width, or the soft cap is not positive and finite.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        let logits = match &self.weight {
            HeadWeight::Dense(weight) => kernels::matmul(x, weight.clone()),
            HeadWeight::Quant(weight) => weight.matmul(x),
        };
        let logits = match &self.bias {
            Some(bias) => {
                let bias = bias.clone().cast(logits.dtype());
                logits + bias.unsqueeze::<2>()
            }
            None => logits,
        };
        match self.softcap {
            Some(cap) => kernels::softcap(logits, cap),
            None => logits,
        }
    }

    /// The negative log-likelihood of a target after each row of `x`, in nats, without the logits of all
    /// rows in memory.
    ///
    /// A packed weight is dequantized once per call.
    ///
    /// # Shapes
    /// - `x`: `[rows, hidden]`
    /// - `targets`: `[rows]`, tokens of the vocabulary
    /// - result: `[rows]`, in `f32` where `x` is of 16 bits
    ///
    /// # Panics
    /// As [`kernels::linear_cross_entropy`].
    pub fn nll(&self, x: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        let head = OutputHead::new(self.weight.at_rest())
            .with_bias(self.bias.clone())
            .with_softcap(self.softcap);
        linear_cross_entropy(x, head, targets)
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
    let Some(rows) = batch.target_rows() else {
        return model.head().nll(x, targets).reshape([n, seq - 1]);
    };
    // Only the rows of targets are multiplied by the head: of instruction data, a part.
    let (x, targets) = (x.select(0, rows.clone()), targets.select(0, rows.clone()));
    let losses = model.head().nll(x, targets);
    let none = Tensor::zeros([n * (seq - 1)], (&losses.device(), losses.dtype()));
    let all = none.select_assign(0, rows, losses, IndexingUpdateOp::Add);
    all.reshape([n, seq - 1])
}
