//! Uniform grids: from the weights of a group to its scale and zero-point.
//!
//! The arithmetic is that of the reference quantizer of OPTQ (Frantar et al. 2023,
//! arXiv:2210.17323), in `f32` with halves rounded to even.

use kernels::{ClipLoss, Layout, ZeroPoint};
use serde::{Deserialize, Serialize};

use crate::stored_grid::{f16_minimum, in_f16, zero_of};
use crate::values::check_finite;
use crate::{Error, Format, Grid, Result};

/// The range that the grid of a group spans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupRange {
    /// From the smallest to the largest weight.
    #[default]
    Full,
    /// The fraction of the full range, of 1.00, 0.99, .. 0.21, with the least `Σ |ŵ - w|^2.4`: the
    /// option `mse` of OPTQ's reference code.
    Clipped,
    /// The fraction with the least `Σ h (ŵ - w)²`, where `h` is the mean square of each input: the
    /// output error of a layer whose inputs are uncorrelated. Needs a [`Gram`](crate::Gram).
    ClippedForOutput,
}

/// The settings of a uniform grid, which several quantizers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UniformGrid {
    pub(crate) bits: usize,
    pub(crate) group_size: Option<usize>,
    pub(crate) symmetric: bool,
    pub(crate) range: GroupRange,
    pub(crate) reference_symmetric: bool,
    pub(crate) f16_scales: bool,
    #[serde(default)]
    pub(crate) fractional_zeros: bool,
}

/// The builders of a quantizer with a [`UniformGrid`] in its field `grid`.
macro_rules! uniform_grid_settings {
    ($quantizer:ty) => {
        /// The settings of the grid.
        impl $quantizer {
            /// Sets the bits of a code: 2, 3, 4 or 8.
            pub fn with_bits(mut self, bits: usize) -> Self {
                self.grid.bits = bits;
                self
            }

            /// Sets the number of inputs that share a scale; `None` for one group per channel.
            pub fn with_group_size(mut self, group_size: impl Into<Option<usize>>) -> Self {
                self.grid.group_size = group_size.into();
                self
            }

            /// Sets whether the grid is symmetric, without zero-points.
            pub fn with_symmetric(mut self, symmetric: bool) -> Self {
                self.grid.symmetric = symmetric;
                self
            }

            /// Sets the range that the grid of a group spans.
            pub fn with_range(mut self, range: $crate::GroupRange) -> Self {
                self.grid.range = range;
                self
            }

            /// Sets whether scales are rounded to `f16` before weights are rounded to the grid.
            ///
            /// GPTQ checkpoints hold scales in `f16`: with this, saving one changes no weight.
            pub fn with_f16_scales(mut self, f16_scales: bool) -> Self {
                self.grid.f16_scales = f16_scales;
                self
            }

            /// Sets whether the zero-points of an affine grid are fractions of a code.
            ///
            /// Both ends of a group's range are then levels, and the range need not include 0. Weights that
            /// are on such a grid already, as those of GGUF's Q4_1 are, are not changed. With scales in
            /// `f16`, the level of code 0 is an `f16` too, as GGUF holds it; GPTQ checkpoints hold whole
            /// zero-points.
            pub fn with_fractional_zeros(mut self, fractional_zeros: bool) -> Self {
                self.grid.fractional_zeros = fractional_zeros;
                self
            }

            /// Sets whether a symmetric grid is that of OPTQ's reference code, bit for bit.
            ///
            /// The reference's grid spans half the range of a group without negative weights, and
            /// so clips the larger half of them.
            pub fn with_reference_symmetric(mut self, reference: bool) -> Self {
                self.grid.reference_symmetric = reference;
                self
            }
        }
    };
}
pub(crate) use uniform_grid_settings;

impl UniformGrid {
    /// 4 bits, affine, one group per channel, full ranges.
    pub(crate) const fn new() -> Self {
        Self {
            bits: 4,
            group_size: None,
            symmetric: false,
            range: GroupRange::Full,
            reference_symmetric: false,
            f16_scales: false,
            fractional_zeros: false,
        }
    }

    pub(crate) fn format(&self) -> Result<Format> {
        let grid = if self.symmetric {
            Grid::Symmetric
        } else {
            Grid::Affine
        };
        Format::new(self.bits, self.group_size, grid)
    }

    /// Scales and zeros for `weight`, `[d_in, d_out]`; `moments` holds the mean square of each input
    /// up to a factor, for [`GroupRange::ClippedForOutput`] alone.
    pub(crate) fn grids(
        &self,
        weight: &[f32],
        layout: &Layout,
        moments: Option<&[f32]>,
    ) -> Result<Grids> {
        let (low, high) = finite_ranges(weight, layout)?;
        self.grids_of(weight, low, high, layout, moments)
    }

    /// As [`UniformGrid::grids`], with the range of the whole weight for every group.
    pub(crate) fn grids_per_tensor(&self, weight: &[f32], layout: &Layout) -> Result<Grids> {
        let (low, high) = finite_ranges(weight, layout)?;
        let n = low.len();
        let low = vec![low.into_iter().fold(f32::INFINITY, f32::min); n];
        let high = vec![high.into_iter().fold(f32::NEG_INFINITY, f32::max); n];
        self.grids_of(weight, low, high, layout, None)
    }

    fn grids_of(
        &self,
        weight: &[f32],
        mut low: Vec<f32>,
        mut high: Vec<f32>,
        layout: &Layout,
        moments: Option<&[f32]>,
    ) -> Result<Grids> {
        let span = |at: usize, low: f32, high: f32| Error::Span {
            group: at / layout.d_out(),
            column: at % layout.d_out(),
            low,
            high,
        };
        let max_code = ((1 << self.bits) - 1) as f32;
        let zero_point = if self.fractional_zeros && !self.symmetric {
            ZeroPoint::Fractional
        } else {
            ZeroPoint::Whole
        };
        for (at, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
            let (least, most) = (*low, *high);
            if zero_point == ZeroPoint::Fractional {
                if ((*high - *low) / max_code).is_infinite() {
                    return Err(span(at, least, most));
                }
                continue;
            }
            // Zero is always inside the range, and so is a value of the grid.
            *low = low.min(0.0);
            *high = high.max(0.0);
            if self.symmetric {
                *high = high.max(-*low);
                if *low < 0.0 || !self.reference_symmetric {
                    *low = -*high;
                }
            }
            let (scale, _) = kernels::grid_of_range(*low, *high, max_code);
            if scale.is_infinite() {
                return Err(span(at, least, most));
            }
            if scale == 0.0 {
                (*low, *high) = (-1.0, 1.0);
            }
        }
        let search = |loss| kernels::clip_search(weight, &low, &high, loss, zero_point, layout);
        let (mut scales, mut zeros): (Vec<f32>, Vec<f32>) = match (self.range, moments) {
            (GroupRange::Full, _) => low
                .iter()
                .zip(&high)
                .map(|(&low, &high)| zero_point.grid(low, high, max_code))
                .unzip(),
            (GroupRange::Clipped, _) => search(ClipLoss::Power),
            (GroupRange::ClippedForOutput, Some(moments)) => search(ClipLoss::Inputs(moments)),
            (GroupRange::ClippedForOutput, None) => return Err(Error::NoGram),
        };
        if self.f16_scales {
            for (at, scale) in scales.iter_mut().enumerate() {
                let minimum = f16_minimum(*scale, zeros[at]);
                *scale = in_f16(*scale);
                let is_fractional = zero_point == ZeroPoint::Fractional;
                if scale.is_infinite() || (is_fractional && minimum.is_infinite()) {
                    return Err(span(at, low[at], high[at]));
                }
                if is_fractional {
                    zeros[at] = zero_of(minimum, *scale);
                }
            }
        }
        Ok(Grids {
            scales,
            zeros: (!self.symmetric).then_some(zeros),
        })
    }
}

/// Scales and zeros, `[n_groups, d_out]` each; no zeros on a symmetric grid.
#[derive(Clone, Debug)]
pub(crate) struct Grids {
    pub(crate) scales: Vec<f32>,
    pub(crate) zeros: Option<Vec<f32>>,
}

/// The smallest and the largest weight of each group and output.
///
/// # Errors
/// [`Error::NonFinite`] if there is a NaN or an infinity.
pub(crate) fn finite_ranges(weight: &[f32], layout: &Layout) -> Result<(Vec<f32>, Vec<f32>)> {
    let (low, high) = kernels::group_ranges(weight, layout);
    if low.iter().chain(&high).any(|value| !value.is_finite()) {
        check_finite("the weight", weight, layout.d_out())?;
    }
    Ok((low, high))
}
