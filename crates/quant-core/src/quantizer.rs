use std::fmt;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Format, Gram, QuantTensor, Result};

/// The statistics of a layer's inputs that a quantizer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Needs {
    /// None: the weight is enough.
    Nothing,
    /// The [`Gram`] matrix.
    Gram,
    /// The [`Gram`] matrix with its drift from the inputs of the dense model.
    Drift,
}

/// A method that turns a dense weight into a packed one.
///
/// Two quantizers that print the same as [`Debug`](fmt::Debug) give the same weights.
pub trait Quantizer: fmt::Debug {
    /// The format of the quantized weights.
    ///
    /// # Errors
    /// If the settings are not valid. Callers check this before they quantize the first weight.
    fn format(&self) -> Result<Format>;

    /// The statistics of a layer's inputs that [`quantize`](Self::quantize) needs.
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// Quantizes a weight, `[d_in, d_out]`, to the weight's device.
    ///
    /// # Errors
    /// If the weight does not fit the format, the weight or the Gram matrix holds a NaN or an
    /// infinity, or the Gram matrix is missing or has another size.
    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> Result<Quantized>;
}

macro_rules! through_a_pointer {
    ($pointer:ty) => {
        impl<Q: Quantizer + ?Sized> Quantizer for $pointer {
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
    };
}
through_a_pointer!(Box<Q>);
through_a_pointer!(&Q);

/// A quantized weight, and notes on exceptions.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The weight.
    pub weight: QuantTensor,
    /// The exceptions from the method; empty if there were none.
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

/// An exception from a method while it quantized a weight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Note {
    /// There were fewer tokens than inputs: some directions of the input space have no activations.
    FewTokens {
        /// The tokens of the calibration.
        n_tokens: usize,
        /// The inputs of the layer.
        d_in: usize,
    },
    /// Some inputs were zero in every token. Their weights are set to zero.
    DeadInputs {
        /// The number of these inputs.
        n_inputs: usize,
    },
    /// The damping of the Hessian was raised until it had a Cholesky factor.
    Damped {
        /// The raised damping, as a fraction of the mean of the diagonal.
        damping: f64,
    },
    /// The Hessian was factored in double precision.
    DoublePrecision,
    /// Small entries of the Hessian's diagonal were raised.
    DiagonalFloor {
        /// The fraction of the largest entry to which they were raised.
        fraction: f64,
    },
    /// The weight was rounded to nearest: there was no factor, or errors grew without bound.
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
