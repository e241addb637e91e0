use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::grid::UniformGrid;
use crate::{
    Error, Format, Gram, GroupRange, Needs, Parts, QuantTensor, Quantized, Quantizer, Result,
};

/// Round to nearest: each group's range is cut into equal steps, each value goes to the next code.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{Quantizer, Rtn};
///
/// let weight = Tensor::<2>::from_data([[0.0], [0.3], [1.1], [3.0]], &Device::flex());
/// let quantized = Rtn::new().with_bits(2).quantize(weight, None)?;
/// assert_eq!(quantized.weight.codes(), [0, 0, 1, 3]);
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtn {
    grid: UniformGrid,
    per_tensor: bool,
}

impl Default for Rtn {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtn {
    /// 4 bits, affine, one group per channel, full ranges.
    pub fn new() -> Self {
        Self {
            grid: UniformGrid::new(),
            per_tensor: false,
        }
    }

    /// Bits of a code: 2, 3, 4 or 8.
    pub fn with_bits(mut self, bits: usize) -> Self {
        self.grid.bits = bits;
        self
    }

    /// Inputs that share a scale; `None` for one group per channel.
    pub fn with_group_size(mut self, group_size: impl Into<Option<usize>>) -> Self {
        self.grid.group_size = group_size.into();
        self
    }

    /// Whether the grid is symmetric, without zeros.
    pub fn with_symmetric(mut self, symmetric: bool) -> Self {
        self.grid.symmetric = symmetric;
        self
    }

    /// What part of a range the grid spans.
    pub fn with_range(mut self, range: GroupRange) -> Self {
        self.grid.range = range;
        self
    }

    /// Whether scales are rounded to `f16` first, and the weights to the grids of those: what a GPTQ
    /// checkpoint holds.
    pub fn with_f16_scales(mut self, f16: bool) -> Self {
        self.grid.f16_scales = f16;
        self
    }

    /// Whether all groups share one grid, that of the whole weight and its full range.
    pub fn with_per_tensor(mut self, per_tensor: bool) -> Self {
        self.per_tensor = per_tensor;
        self
    }

    /// Whether a symmetric grid is that of OPTQ's reference code bit for bit, which spans half the
    /// range of a group without negative weights, and so clips the larger half of them.
    pub fn with_reference_symmetric(mut self, reference: bool) -> Self {
        self.grid.reference_symmetric = reference;
        self
    }
}

impl Quantizer for Rtn {
    fn format(&self) -> Result<Format> {
        if self.per_tensor && self.grid.range != GroupRange::Full {
            return Err(Error::SearchPerTensor);
        }
        self.grid.format()
    }

    fn needs(&self) -> Needs {
        match self.grid.range {
            GroupRange::ClippedForOutput => Needs::Gram,
            GroupRange::Full | GroupRange::Clipped => Needs::Nothing,
        }
    }

    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> Result<Quantized> {
        let format = self.format()?;
        let dims @ [d_in, _] = weight.dims();
        let layout = format.layout(dims)?;
        let of_input = match (self.needs(), gram) {
            (Needs::Nothing, _) => None,
            (_, Some(gram)) => {
                gram.check(d_in)?;
                Some(diagonal(gram))
            }
            (_, None) => return Err(Error::NoGram),
        };
        let device = weight.device();
        let (words, grids) = kernels::with_values(weight, |weight| -> Result<_> {
            let grids = match self.per_tensor {
                true => self.grid.grids_per_tensor(weight, &layout),
                false => self.grid.grids(weight, &layout, of_input.as_deref()),
            }?;
            let zeros = grids.zeros.as_deref();
            let words = kernels::encode(weight, &grids.scales, zeros, &layout);
            Ok((words, grids))
        })?;
        let parts = Parts::new(words, grids.scales, grids.zeros);
        Ok(QuantTensor::from_parts(parts, format, dims, &device)?.into())
    }
}

/// The mean square of each input, up to a factor.
pub(crate) fn diagonal(gram: &Gram) -> Vec<f32> {
    let d_in = gram.d_in();
    kernels::with_values(gram.sum(), |sum| {
        (0..d_in).map(|i| sum[i * d_in + i]).collect()
    })
}
