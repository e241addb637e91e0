use burn::tensor::Tensor;

use crate::{Format, QuantTensor, Result};

/// A method that turns a dense weight into a packed one.
pub trait Quantizer {
    /// The format that the weights will have.
    ///
    /// # Errors
    /// If the settings make no format; checked before the first weight is touched.
    fn format(&self) -> Result<Format>;

    /// Quantizes one weight, `[d_in, d_out]`, onto the weight's device.
    ///
    /// # Errors
    /// If the weight does not fit the format, or holds NaN or infinity.
    fn quantize(&self, weight: Tensor<2>) -> Result<QuantTensor>;
}
