use std::fmt;

use burn::tensor::Tensor;
use peft::Lora;
use quant_core::{Format, Needs, Quantizer, sum_of_squares};

use crate::{Layer, Result, Start};

/// An [`Initialization`](crate::Initialization) that looks at one layer at a time.
///
/// Its `Debug` form has all of its settings.
pub trait LayerMethod: fmt::Debug {
    /// The adapters: rank, `α`, targets and the rest.
    fn lora(&self) -> &Lora;

    /// The knowledge of a layer's inputs that it needs.
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// Whether it needs the [`Fisher`](peft::Fisher) information of the weights.
    fn needs_fisher(&self) -> bool {
        false
    }

    /// Checks that it can initialize an adapter for a layer of this format.
    ///
    /// # Errors
    /// [`Error::NoRange`](crate::Error::NoRange) from methods that learn the range of a grid.
    fn check(&self, path: &str, format: Format) -> Result<()> {
        let _ = (path, format);
        Ok(())
    }

    /// The squared error of a layer with the weight `found`, `[d_in, d_out]`, in the measure that the
    /// method minimizes.
    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        sum_of_squares(layer.weight.clone() - found)
    }

    /// Chooses the weight, packed by `quantizer`, and the adapter of a layer.
    ///
    /// # Errors
    /// [`Error::NoSvd`](crate::Error::NoSvd), or the error of the quantizer.
    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start>;

    /// Chooses the weight and the adapter of a layer that stays dense; by default, the weight as it is
    /// and an adapter that adds nothing.
    ///
    /// # Errors
    /// [`Error::NoSvd`](crate::Error::NoSvd).
    fn start_dense(&self, layer: &Layer<'_>) -> Result<Start> {
        Ok(Start::dense(layer.weight.clone(), None))
    }
}

/// QLoRA: the weight is quantized, and the adapter adds nothing.
impl LayerMethod for Lora {
    fn lora(&self) -> &Lora {
        self
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let (quantized, dense) = layer.quantize(layer.weight.clone(), quantizer)?;
        let error = sum_of_squares(layer.weight.clone() - dense);
        Ok(Start {
            plain: Some(quantized.weight.clone()),
            ..Start::packed(quantized, None, 1, error)
        })
    }
}
