//! The adapter that makes a layer's output error least: QERA-exact (Zhang et al. 2025,
//! arXiv:2410.06040), which is CLoQ (Deng et al. 2025, arXiv:2501.18475) after OPTQ.
//!
//! Of all `L` of rank `r`, `Σ ‖x (W - Q - L)‖²` is least for `L = R⁻¹ (R E)_r`, where `E = W - Q`, `R` is any
//! square root of the Gram, `Rᵀ R = Σ x xᵀ`, and `(·)_r` cuts down to rank `r`. With the right singular
//! vectors `V` of `R E` that is `L = E V Vᵀ`: `R`, a Cholesky factor, is never inverted.

use burn::tensor::Tensor;
use peft::{Lora, Weight};
use quant_core::{Needs, Quantizer};

use crate::svd::{orthonormal, padded};
use crate::{Layer, LayerMethod, Result, Start, Truncation};

/// Quantizes, and gives the adapter that makes the error of the layer's output least.
///
/// Takes the quantizer's weight as it is: [`quant_core::Rtn`], normal floats, or [`quant_core::Optq`].
#[derive(Clone, Debug)]
pub struct Qera {
    lora: Lora,
    truncation: Truncation,
}

impl Qera {
    /// Of this rank, or with these adapters.
    pub fn new(lora: impl Into<Lora>) -> Self {
        let lora = lora.into();
        Self {
            truncation: Truncation {
                seed: lora.seed(),
                ..Truncation::default()
            },
            lora,
        }
    }

    /// How the factors are found.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.truncation = truncation;
        self
    }
}

impl LayerMethod for Qera {
    fn lora(&self) -> &Lora {
        &self.lora
    }

    fn needs(&self) -> Needs {
        Needs::Gram
    }

    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        layer.output_error(found)
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let rank = self.lora.rank();
        let gram = layer.gram.ok_or(peft::Error::NoCalibration)?;
        gram.check(layer.weight.dims()[0])
            .map_err(crate::Error::quant(layer.path))?;
        let root = gram.root().map_err(crate::Error::quant(layer.path))?;
        let (quantized, dense) = layer.quantize(layer.weight.clone(), quantizer)?;
        let error = layer.weight.clone() - dense;
        let low = layer.cut(&self.truncation, root.matmul(error.clone()), rank, None)?;
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
            weight: Weight::Quant(quantized.weight),
            factors: Some([left, right]),
            round: 1,
            error: low.error,
            notes: quantized.notes,
        })
    }
}
