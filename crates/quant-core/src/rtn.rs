use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::quant_tensor::{floats, non_finite};
use crate::{Error, Format, Grid, Parts, QuantTensor, Quantizer, Result, grid};

/// Round to nearest: each group's range is cut into equal steps, each value goes to the next code.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{Quantizer, Rtn};
///
/// let weight = Tensor::<2>::from_data([[0.0], [0.3], [1.1], [3.0]], &Device::flex());
/// let packed = Rtn::new().with_bits(2).quantize(weight)?;
/// assert_eq!(packed.codes(), [0, 0, 1, 3]);
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtn {
    bits: usize,
    group_size: Option<usize>,
    symmetric: bool,
}

impl Default for Rtn {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtn {
    /// 4 bits, affine, one group per channel.
    pub fn new() -> Self {
        Self {
            bits: 4,
            group_size: None,
            symmetric: false,
        }
    }

    /// Bits of a code: 2, 3, 4 or 8.
    pub fn with_bits(mut self, bits: usize) -> Self {
        self.bits = bits;
        self
    }

    /// Inputs that share a scale; `None` for one group per channel.
    pub fn with_group_size(mut self, group_size: impl Into<Option<usize>>) -> Self {
        self.group_size = group_size.into();
        self
    }

    /// Whether the grid is symmetric, without zeros.
    pub fn with_symmetric(mut self, symmetric: bool) -> Self {
        self.symmetric = symmetric;
        self
    }
}

impl Quantizer for Rtn {
    fn format(&self) -> Result<Format> {
        let grid = if self.symmetric {
            Grid::Symmetric
        } else {
            Grid::Affine
        };
        Format::new(self.bits, self.group_size, grid)
    }

    fn quantize(&self, weight: Tensor<2>) -> Result<QuantTensor> {
        let format = self.format()?;
        let dims @ [d_in, d_out] = weight.dims();
        let layout = format.layout(dims)?;
        let device = weight.device();
        let weight = floats(weight);
        non_finite("the weight", &weight, d_out)?;

        let (bits, max_code) = (format.bits(), ((1 << format.bits()) - 1) as f32);
        let center = layout.center();
        let mut codes = Vec::with_capacity(d_in * d_out);
        let mut scales = Vec::with_capacity(layout.n_groups() * d_out);
        let mut zeros = Vec::new();
        for (group, rows) in weight.chunks(layout.group_size() * d_out).enumerate() {
            let ranges = ranges(rows, d_out);
            let mut grids = Vec::with_capacity(d_out);
            for (column, &(low, high)) in ranges.iter().enumerate() {
                let grid = match format.grid() {
                    Grid::Affine => grid::affine(low, high, bits),
                    Grid::Symmetric => grid::symmetric(low, high, bits).map(|s| (s, center)),
                };
                grids.push(grid.ok_or(Error::Span {
                    group,
                    column,
                    low,
                    high,
                })?);
            }
            for row in rows.chunks_exact(d_out) {
                let code = |(&w, &(s, z)): (&f32, &(f32, f32))| grid::code(w, s, z, max_code);
                codes.extend(row.iter().zip(&grids).map(code));
            }
            scales.extend(grids.iter().map(|(scale, _)| scale));
            if format.grid() == Grid::Affine {
                zeros.extend(grids.iter().map(|(_, zero)| zero));
            }
        }
        let parts = Parts {
            columns: kernels::tiles_to_columns(&kernels::pack(&codes, &layout), &layout),
            scales,
            zeros: (format.grid() == Grid::Affine).then_some(zeros),
        };
        QuantTensor::from_parts(parts, format, dims, &device)
    }
}

/// The smallest and the largest value of each column.
fn ranges(rows: &[f32], d_out: usize) -> Vec<(f32, f32)> {
    let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); d_out];
    for row in rows.chunks_exact(d_out) {
        for ((low, high), &w) in ranges.iter_mut().zip(row) {
            *low = low.min(w);
            *high = high.max(w);
        }
    }
    ranges
}
