//! The last layer of a language model.

use burn::backend::{Backend, ExtensionType, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, Tensor};

use crate::dtype::{cast, widened};
use crate::softcap::Softcap;

/// The last layer of a language model, whose outputs are the logits: a weight, a bias and a soft cap.
///
/// The logits are `x · weight + bias` or, with a soft cap, `cap · tanh((x · weight + bias) / cap)` (Gemma
/// Team 2024, arXiv:2408.00118, section 2). A matrix is a weight alone.
///
/// The dtypes of the weight and of the bias may be others than that of `x`.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use kernels::{OutputHead, linear_cross_entropy};
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::zeros([3, 2], &device);
/// // Logits of 1000 and 0, capped to 1 and 0.
/// let bias = Tensor::<1>::from_data([1000.0, 0.0], &device);
/// let head = OutputHead::new(weight).with_bias(bias).with_softcap(1.0);
/// let targets = Tensor::<1, Int>::from_data([1], &device);
/// let nll = linear_cross_entropy(Tensor::ones([1, 3], &device), head, targets);
/// assert!((nll.into_scalar::<f32>() - (1.0 + 1f32.exp()).ln()).abs() < 1e-6);
/// ```
#[derive(Clone, Debug)]
pub struct OutputHead {
    pub(super) weight: Tensor<2>,
    pub(super) bias: Option<Tensor<1>>,
    pub(super) softcap: Option<Softcap>,
}

impl OutputHead {
    /// The head of a weight, `[hidden, vocab]`, which may be a transposed embedding.
    pub fn new(weight: Tensor<2>) -> Self {
        Self {
            weight,
            bias: None,
            softcap: None,
        }
    }

    /// Sets what is added to the products with the weight, `[vocab]`, nothing by default.
    pub fn with_bias(mut self, bias: impl Into<Option<Tensor<1>>>) -> Self {
        self.bias = bias.into();
        self
    }

    /// Sets the bound that logits approach, none by default.
    ///
    /// # Panics
    /// If the cap is not positive and finite.
    #[track_caller]
    pub fn with_softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.softcap = softcap.into().map(Softcap::new);
        self
    }
}

impl From<Tensor<2>> for OutputHead {
    fn from(weight: Tensor<2>) -> Self {
        Self::new(weight)
    }
}

/// An [`OutputHead`] of a backend.
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub(crate) struct Head<B: Backend> {
    /// `[hidden, vocab]`.
    pub(super) weight: FloatTensor<B>,
    #[extension_type]
    pub(super) bias: Bias<B>,
    pub(super) softcap: Option<Softcap>,
}

/// The bias of a head, or its gradient. (burn's extensions take no `Option` of a tensor.)
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub(crate) enum Bias<B: Backend> {
    /// All are 0.
    Absent,
    /// `[vocab]`.
    Each(FloatTensor<B>),
}

impl<B: Backend> Head<B> {
    /// The head with its weight in another dtype.
    pub(super) fn cast(self, dtype: DType) -> Self {
        Self {
            weight: cast::<B>(self.weight, dtype),
            ..self
        }
    }

    /// The logits of `x`, `[rows, vocab]`, in `F32` where `x` is of 16 bits; the weight is of the dtype of
    /// `x`.
    pub(super) fn logits(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        let logits = widened::<B>(B::float_matmul(x, self.weight.clone()));
        let logits = match &self.bias {
            Bias::Each(bias) => {
                let bias = cast::<B>(bias.clone(), logits.dtype());
                let row = [1, bias.shape()[0]];
                B::float_add(logits, B::float_reshape(bias, row.into()))
            }
            Bias::Absent => logits,
        };
        match self.softcap {
            Some(cap) => cap.apply::<B>(logits),
            None => logits,
        }
    }

    /// The derivatives of the logits for what is capped, if they are.
    pub(super) fn slope(&self, logits: &FloatTensor<B>) -> Option<FloatTensor<B>> {
        self.softcap.map(|cap| cap.slope::<B>(logits.clone()))
    }
}
