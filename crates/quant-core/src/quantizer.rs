use std::fmt;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Format, Gram, QuantTensor, Result};

/// What a quantizer must know of a layer's inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Needs {
    /// Nothing: the weight is enough.
    Nothing,
    /// Their [`Gram`].
    Gram,
    /// Their [`Gram`] with its drift from the inputs of the dense model.
    Drift,
}

/// A method that turns a dense weight into a packed one.
pub trait Quantizer {
    /// The format that the weights will have.
    ///
    /// # Errors
    /// If the settings make no format; checked before the first weight is touched.
    fn format(&self) -> Result<Format>;

    /// What it must know of a layer's inputs.
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// Quantizes one weight, `[d_in, d_out]`, onto the weight's device.
    ///
    /// # Errors
    /// If the weight does not fit the format, it or the Gram holds NaN or infinity, or the Gram is
    /// missing or of another size.
    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> Result<Quantized>;
}

impl<Q: Quantizer + ?Sized> Quantizer for Box<Q> {
    fn format(&self) -> Result<Format> {
        (**self).format()
    }

    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> Result<Quantized> {
        (**self).quantize(weight, gram)
    }
}

impl<Q: Quantizer + ?Sized> Quantizer for &Q {
    fn format(&self) -> Result<Format> {
        (**self).format()
    }

    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> Result<Quantized> {
        (**self).quantize(weight, gram)
    }
}

/// A quantized weight, and what had to be done for it.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The weight.
    pub weight: QuantTensor,
    /// What did not go by the book; empty where everything did.
    pub notes: Vec<Note>,
}

impl From<QuantTensor> for Quantized {
    fn from(weight: QuantTensor) -> Self {
        Self {
            weight,
            notes: Vec::new(),
        }
    }
}

/// What happened while a weight was quantized.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Note {
    /// Fewer tokens than inputs: directions that no token has seen are rounded at will.
    FewTokens {
        /// Tokens of the calibration.
        n_tokens: usize,
        /// Inputs of the layer.
        d_in: usize,
    },
    /// Inputs that were zero in every token; their weights are set to zero.
    DeadInputs {
        /// How many.
        n_inputs: usize,
    },
    /// The Hessian had no Cholesky factor until its damping was raised.
    Damped {
        /// The damping, as a fraction of the mean of the diagonal.
        damping: f64,
    },
    /// The factor was taken in double precision.
    DoublePrecision,
    /// Small entries of the Hessian's diagonal were raised.
    DiagonalFloor {
        /// To this fraction of the largest.
        fraction: f64,
    },
    /// No factor at all, or errors that grew without end: the weights were rounded to the nearest
    /// code.
    RoundedToNearest,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Note::FewTokens { n_tokens, d_in } => {
                write!(f, "{n_tokens} tokens for {d_in} inputs: calibrate on more")
            }
            Note::DeadInputs { n_inputs } => write!(f, "{n_inputs} inputs are always zero"),
            Note::Damped { damping } => write!(f, "damping raised to {damping}"),
            Note::DoublePrecision => write!(f, "factored in double precision"),
            Note::DiagonalFloor { fraction } => {
                write!(f, "diagonal raised to {fraction:e} of its largest entry")
            }
            Note::RoundedToNearest => write!(f, "no usable factor: rounded to nearest"),
        }
    }
}
