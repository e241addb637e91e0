//! QERA-exact (Zhang et al. 2025, arXiv:2410.06040), which is CLoQ (Deng et al. 2025, arXiv:2501.18475)
//! after OPTQ: the adapter that minimizes the error of a layer's output.
//!
//! Of all `L` of rank `r`, `Σ ‖x (W - Q - L)‖²` is least for `L = R⁻¹ (R E)_r`, where `E = W - Q`, `R` is any
//! square root of the Gram, `Rᵀ R = Σ x xᵀ`, and `(·)_r` cuts down to rank `r`. With the right singular
//! vectors `V` of `R E` that is `L = E V Vᵀ`: `R`, a Cholesky factor, is never inverted.

use burn::tensor::Tensor;
use peft::Lora;
use quant_core::{Needs, Quantizer};

use crate::factoring::Factoring;
use crate::svd::{orthonormal, padded};
use crate::{Error, Layer, LayerMethod, Result, Start, Truncation};

/// Quantizes, and computes the adapter that minimizes the error of the layer's output.
///
/// The weight is the quantizer's: that of [`quant_core::Rtn`], of normal floats, or of
/// [`quant_core::Optq`].
#[derive(Clone, Debug)]
pub struct Qera(Factoring);

impl Qera {
    /// QERA of this rank, or with these adapters.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(Factoring::new(lora))
    }

    /// The decomposition that computes the factors.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.0.truncation = truncation;
        self
    }
}

impl LayerMethod for Qera {
    fn lora(&self) -> &Lora {
        &self.0.lora
    }

    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        layer.output_error(found)
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let rank = self.0.lora.rank();
        let root = layer.checked_gram()?.root();
        let root = root.map_err(Error::quant(layer.path))?;
        let (quantized, dense) = layer.quantize(layer.weight.clone(), quantizer)?;
        let error = layer.weight.clone() - dense;
        let low = self.0.cut(layer, root.matmul(error.clone()), None)?;
        // The rows of `right` are `s vᵀ`; where `s` is the rounding of the largest, its row is too.
        let norms = low.right.clone().square().sum_dim(1).sqrt();
        let least = norms.clone().max().into_scalar::<f32>() * 1e-6;
        let kept = norms.clone().greater_elem(least).float();
        let rows = low.right / norms.clamp_min(f32::MIN_POSITIVE) * kept;
        let v = orthonormal(rows.transpose(), 0.0);
        let v = v.unwrap_or_else(|| Tensor::zeros([layer.weight.dims()[1], 1], &error.device()));
        let left = padded(error.matmul(v.clone()), rank, 1);
        let right = padded(v.transpose(), rank, 0);
        Ok(Start {
            plain: Some(quantized.weight.clone()),
            ..Start::packed(quantized, Some([left, right]), 1, low.error)
        })
    }
}
