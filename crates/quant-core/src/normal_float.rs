use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::uniform::finite_ranges;
use crate::{
    DoubleQuant, DoubleScales, Format, Gram, Grid, Parts, QuantTensor, Quantized, Quantizer,
    Result, ScaleLevels, Scales,
};

/// Rounding to the nearest level of a codebook, scaled to the largest magnitude of each block.
///
/// NF2, NF3 and NF4 (Dettmers et al. 2023, arXiv:2305.14314), and FP4.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{DoubleQuant, Error, Grid, NormalFloat, Quantizer};
///
/// let weight = Tensor::<2>::from_data([[-2.0], [0.1], [0.7], [2.0]], &Device::flex());
/// let qlora = NormalFloat::new().with_block_size(4).with_double_quant(DoubleQuant::dynamic());
/// assert_eq!(qlora.quantize(weight.clone(), None)?.weight.codes(), [0, 8, 11, 15]);
///
/// let error = qlora.with_bits(8).quantize(weight, None).unwrap_err();
/// assert_eq!(error, Error::GridBits { bits: 8, grid: Grid::NormalFloat });
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NormalFloat {
    bits: usize,
    block_size: Option<usize>,
    grid: Grid,
    double_quant: Option<DoubleQuant>,
}

impl Default for NormalFloat {
    fn default() -> Self {
        Self::new()
    }
}

impl NormalFloat {
    /// NF4 in blocks of 64 inputs, with scales that are floats.
    pub fn new() -> Self {
        Self {
            bits: 4,
            block_size: Some(64),
            grid: Grid::NormalFloat,
            double_quant: None,
        }
    }

    /// bitsandbytes' FP4 in blocks of 64 inputs.
    pub fn float4() -> Self {
        Self {
            grid: Grid::Float4,
            ..Self::new()
        }
    }

    /// Sets the bits of a code: 2, 3 or 4.
    pub fn with_bits(mut self, bits: usize) -> Self {
        self.bits = bits;
        self
    }

    /// Sets the number of inputs that share a scale; `None` for one block per channel.
    pub fn with_block_size(mut self, block_size: impl Into<Option<usize>>) -> Self {
        self.block_size = block_size.into();
        self
    }

    /// Sets whether the levels of 2 and 3 bits have their own offset: [`Grid::NormalFloatByBits`].
    ///
    /// Has no effect on FP4, which has no offset.
    pub fn with_offset_by_bits(mut self, by_bits: bool) -> Self {
        self.grid = match (self.grid, by_bits) {
            (Grid::Float4, _) => Grid::Float4,
            (_, true) => Grid::NormalFloatByBits,
            (_, false) => Grid::NormalFloat,
        };
        self
    }

    /// Sets the format of quantized scales; `None` for scales that are floats.
    pub fn with_double_quant(mut self, double_quant: impl Into<Option<DoubleQuant>>) -> Self {
        self.double_quant = double_quant.into();
        self
    }
}

impl Quantizer for NormalFloat {
    fn format(&self) -> Result<Format> {
        let format = Format::new(self.bits, self.block_size, self.grid)?;
        match self.double_quant {
            Some(double_quant) => format.with_double_quant(double_quant),
            None => Ok(format),
        }
    }

    fn quantize(&self, weight: Tensor<2>, _: Option<&Gram>) -> Result<Quantized> {
        let format = self.format()?;
        let dims = weight.dims();
        let layout = format.layout(dims)?;
        let device = weight.device();
        let (words, scales) = kernels::with_values(weight, |weight| -> Result<_> {
            let (low, high) = finite_ranges(weight, &layout)?;
            let absmax: Vec<f32> = low.iter().zip(&high).map(|(l, h)| h.max(-l)).collect();
            let (used, scales) = match self.double_quant {
                None => (absmax.clone(), Scales::Float(absmax)),
                Some(double) => {
                    let scales = DoubleScales::quantize(&absmax, layout.n_groups(), double);
                    // bitsandbytes rounds weights by the exact scales, LQ-LoRA by the quantized ones.
                    let used = match double.levels {
                        ScaleLevels::Dynamic => absmax,
                        ScaleLevels::Unsigned { .. } => {
                            scales.dequantize(layout.n_groups(), double)
                        }
                    };
                    (used, Scales::Double(scales))
                }
            };
            Ok((kernels::encode(weight, &used, None, &layout), scales))
        })?;
        let parts = Parts {
            words,
            scales,
            zeros: None,
            input_order: None,
        };
        Ok(QuantTensor::from_parts(parts, format, dims, &device)?.into())
    }
}
