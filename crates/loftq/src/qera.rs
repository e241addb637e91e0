//! The adapter that makes a layer's output error least: QERA-exact (Zhang et al. 2025,
//! arXiv:2410.06040), which is CLoQ (Deng et al. 2025, arXiv:2501.18475) after OPTQ.
//!
//! Of all `L` of rank `r`, `Σ ‖x (W - Q - L)‖²` is least for `L = R⁻¹ (R E)_r`, where `E = W - Q`, `R` is any
//! square root of the Gram, `Rᵀ R = Σ x xᵀ`, and `(·)_r` cuts down to rank `r`. With the right singular
//! vectors `V` of `R E` that is `L = E V Vᵀ`: `R`, a Cholesky factor, is never inverted.

use peft::{Lora, Weight};
use quant_core::{Needs, Quantizer};

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

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let gram = layer.gram.ok_or(peft::Error::NoCalibration)?;
        let root = gram.root().map_err(crate::Error::quant(layer.path))?;
        let (quantized, dense) = layer.quantize(layer.weight.clone(), quantizer)?;
        let error = layer.weight.clone() - dense;
        let low = self
            .truncation
            .of(root.matmul(error.clone()), self.lora.rank(), None);
        let low = low.ok_or_else(|| layer.no_svd())?;
        // The rows of `right` are `s vᵀ`.
        let squares = low.right.clone().square().sum_dim(1);
        let right = low.right / squares.clamp_min(f32::MIN_POSITIVE).sqrt();
        let left = error.matmul(right.clone().transpose());
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
