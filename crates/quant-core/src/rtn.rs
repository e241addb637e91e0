use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::uniform::{UniformGrid, uniform_grid_settings};
use crate::{
    Error, Format, Gram, GroupRange, Needs, Parts, QuantTensor, Quantized, Quantizer, Result,
};

/// Rounding to nearest: each weight becomes the nearest level of a uniform grid.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{Error, Quantizer, Rtn};
///
/// let weight = Tensor::<2>::from_data([[0.0], [0.3], [1.1], [3.0]], &Device::flex());
/// let quantized = Rtn::new().with_bits(2).quantize(weight.clone(), None)?;
/// assert_eq!(quantized.weight.codes(), [0, 0, 1, 3]);
///
/// let error = Rtn::new().with_group_size(5).quantize(weight, None).unwrap_err();
/// assert_eq!(error, Error::GroupSize { group_size: 5, d_in: 4 });
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtn {
    grid: UniformGrid,
    per_tensor: bool,
}

uniform_grid_settings!(Rtn);

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

    /// Sets whether all groups share one grid, which spans the full range of the weight.
    pub fn with_per_tensor(mut self, per_tensor: bool) -> Self {
        self.per_tensor = per_tensor;
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
        let moments = match (self.needs(), gram) {
            (Needs::Nothing, _) => None,
            (_, Some(gram)) => {
                gram.check(d_in)?;
                Some(gram.diagonal())
            }
            (_, None) => return Err(Error::NoGram),
        };
        let device = weight.device();
        let (words, grids) = kernels::with_values(weight, |weight| -> Result<_> {
            let grids = if self.per_tensor {
                self.grid.grids_per_tensor(weight, &layout)?
            } else {
                self.grid.grids(weight, &layout, moments.as_deref())?
            };
            let zeros = grids.zeros.as_deref();
            let words = kernels::encode(weight, &grids.scales, zeros, &layout);
            Ok((words, grids))
        })?;
        let parts = Parts::new(words, grids.scales, grids.zeros);
        Ok(QuantTensor::from_parts(parts, format, dims, &device)?.into())
    }
}
