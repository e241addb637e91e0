//! From the weights of a group to its scale and zero.
//!
//! The arithmetic is that of the reference quantizer of OPTQ (Frantar et al. 2023,
//! arXiv:2210.17323), in `f32` with halves rounded to even.

use half::f16;
use kernels::{ClipLoss, Layout};
use serde::{Deserialize, Serialize};

use crate::quant_tensor::check_finite;
use crate::{Error, Format, Grid, Result};

/// What part of a group's range its grid spans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupRange {
    /// From the smallest to the largest weight.
    #[default]
    Full,
    /// The part, of 100 % down to 21 %, with the least `Σ |ŵ - w|^2.4`: the search of the reference
    /// code of OPTQ, there the option `mse`.
    Clipped,
    /// The part with the least `Σ h (ŵ - w)²`, `h` being the mean square of each input: the error of
    /// the layer's output if its inputs were independent. Needs a [`Gram`](crate::Gram).
    ClippedForOutput,
}

/// How the grids of a uniform format are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UniformGrid {
    pub(crate) bits: usize,
    pub(crate) group_size: Option<usize>,
    pub(crate) symmetric: bool,
    pub(crate) range: GroupRange,
    /// Whether a symmetric group without negative weights gets the reference code's half range.
    pub(crate) reference_symmetric: bool,
    /// Whether scales are rounded to f16 before a weight is.
    pub(crate) f16_scales: bool,
}

impl UniformGrid {
    pub(crate) const fn new() -> Self {
        Self {
            bits: 4,
            group_size: None,
            symmetric: false,
            range: GroupRange::Full,
            reference_symmetric: false,
            f16_scales: false,
        }
    }

    pub(crate) fn format(&self) -> Result<Format> {
        let grid = match self.symmetric {
            true => Grid::Symmetric,
            false => Grid::Affine,
        };
        Format::new(self.bits, self.group_size, grid)
    }

    /// Scales and zeros for `weight`, `[d_in, d_out]`; `of_input` weighs the errors of each input.
    pub(crate) fn grids(
        &self,
        weight: &[f32],
        layout: &Layout,
        of_input: Option<&[f32]>,
    ) -> Result<Grids> {
        let (low, high) = finite_ranges(weight, layout)?;
        self.grids_of(weight, low, high, layout, of_input)
    }

    /// As [`UniformGrid::grids`], with one full range for all.
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
        of_input: Option<&[f32]>,
    ) -> Result<Grids> {
        let max_code = ((1 << self.bits) - 1) as f32;
        for (at, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
            let (least, most) = (*low, *high);
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
                return Err(Error::Span {
                    group: at / layout.d_out(),
                    column: at % layout.d_out(),
                    low: least,
                    high: most,
                });
            }
            if scale == 0.0 {
                (*low, *high) = (-1.0, 1.0);
            }
        }
        let (mut scales, zeros): (Vec<f32>, Vec<f32>) = match (self.range, of_input) {
            (GroupRange::Full, _) => low
                .iter()
                .zip(&high)
                .map(|(&low, &high)| kernels::grid_of_range(low, high, max_code))
                .unzip(),
            (GroupRange::Clipped, _) => {
                kernels::clip_search(weight, &low, &high, ClipLoss::Power, layout)
            }
            (GroupRange::ClippedForOutput, Some(of_input)) => {
                kernels::clip_search(weight, &low, &high, ClipLoss::Inputs(of_input), layout)
            }
            (GroupRange::ClippedForOutput, None) => return Err(Error::NoGram),
        };
        if self.f16_scales {
            for (at, scale) in scales.iter_mut().enumerate() {
                // The least scale above zero, for what rounds to nothing.
                let rounded = f16::from_f32(*scale).max(f16::from_bits(1));
                if rounded.is_infinite() {
                    return Err(Error::Span {
                        group: at / layout.d_out(),
                        column: at % layout.d_out(),
                        low: low[at],
                        high: high[at],
                    });
                }
                *scale = rounded.to_f32();
            }
        }
        Ok(Grids {
            scales,
            zeros: (!self.symmetric).then_some(zeros),
        })
    }
}

/// `[n_groups, d_out]` each; no zeros on a symmetric grid.
#[derive(Clone, Debug)]
pub(crate) struct Grids {
    pub(crate) scales: Vec<f32>,
    pub(crate) zeros: Option<Vec<f32>>,
}

/// The ranges of the groups of a weight that is finite.
pub(crate) fn finite_ranges(weight: &[f32], layout: &Layout) -> Result<(Vec<f32>, Vec<f32>)> {
    let (low, high) = kernels::group_ranges(weight, layout);
    if low.iter().chain(&high).any(|value| !value.is_finite()) {
        check_finite("the weight", weight, layout.d_out())?;
    }
    Ok((low, high))
}
