use burn::tensor::{DType, Tensor};
use peft::{FisherRoots, Linear, Weight};
use quant_core::{Gram, Note, QuantTensor, Quantized, Quantizer, sum_of_squares};

use crate::{Error, Result};

/// A dense layer before its initialization.
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// Its path.
    pub path: &'a str,
    /// Its weight, `[d_in, d_out]`.
    pub weight: Tensor<2>,
    /// The Gram of its inputs, if there is calibration.
    pub gram: Option<&'a Gram>,
    /// The Fisher information of its weight, if the method needs it.
    pub fisher: Option<&'a FisherRoots>,
}

impl<'a> Layer<'a> {
    /// A layer of a model, its weight in `f32`.
    pub(crate) fn of(path: &'a str, linear: &Linear, gram: Option<&'a Gram>) -> Self {
        Self {
            path,
            weight: linear.weight().to_dense().cast(DType::F32),
            gram,
            fisher: None,
        }
    }

    /// The Gram of the inputs, checked against the layer.
    pub(crate) fn checked_gram(&self) -> Result<&'a Gram> {
        let gram = self.gram.ok_or(peft::Error::NoCalibration)?;
        gram.check(self.weight.dims()[0])
            .map_err(Error::quant(self.path))?;
        Ok(gram)
    }

    /// Quantizes a weight of the layer's size. Returns it packed and dequantized.
    pub(crate) fn quantize(
        &self,
        weight: Tensor<2>,
        quantizer: &dyn Quantizer,
    ) -> Result<(Quantized, Tensor<2>)> {
        let quantized = quantizer.quantize(weight, self.gram);
        let quantized = quantized.map_err(Error::quant(self.path))?;
        let dense = quantized.weight.dequantize();
        Ok((quantized, dense))
    }

    /// `‖X (W - Ŵ)‖²`, or `‖W - Ŵ‖²` without calibration.
    pub(crate) fn output_error(&self, found: Tensor<2>) -> f64 {
        let difference = self.weight.clone() - found;
        match self.gram {
            Some(gram) => gram.energy(difference).max(0.0),
            None => sum_of_squares(difference),
        }
    }
}

/// The weight and the factors of the adapter that a method chose for a layer.
#[derive(Clone, Debug)]
pub struct Start {
    /// The weight.
    pub weight: Weight,
    /// `[d_in, r]` and `[r, d_out]`, whose product the adapter adds; none for a product of zero.
    pub factors: Option<[Tensor<2>; 2]>,
    /// The weight quantized alone, where the method computed it.
    pub plain: Option<QuantTensor>,
    /// The round that was kept, counted from 1.
    pub round: usize,
    /// The squared error that the method minimizes, in its own measure; ApiQ's without the part that
    /// no weight can change.
    pub error: f64,
    /// Notes of the quantizer.
    pub notes: Vec<Note>,
}

impl Start {
    /// A start from a packed weight.
    pub(crate) fn packed(
        quantized: Quantized,
        factors: Option<[Tensor<2>; 2]>,
        round: usize,
        error: f64,
    ) -> Self {
        Self {
            weight: Weight::Quant(quantized.weight),
            factors,
            plain: None,
            round,
            error,
            notes: quantized.notes,
        }
    }

    /// The start of a layer that stays dense.
    pub(crate) fn dense(weight: Tensor<2>, factors: Option<[Tensor<2>; 2]>) -> Self {
        Self {
            weight: Weight::frozen(weight),
            factors,
            plain: None,
            round: 1,
            error: 0.0,
            notes: Vec::new(),
        }
    }

    /// The sum of the weight and the product of the factors, `[d_in, d_out]`.
    pub fn sum(&self) -> Tensor<2> {
        let weight = self.weight.to_dense();
        match &self.factors {
            Some([a, b]) => kernels::add_low_rank(weight, a.clone(), b.clone()),
            None => weight,
        }
    }
}
