use std::f64::consts::PI;

use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Gradients, Tensor};
use quant_core::{QuantTensor, Quantized};

use crate::blocks::LearnedLayer;
use crate::fake_quant::{UniformGrid, straight_through};
use crate::{Layer, Result, Start};

/// The share of the learning rates that is left after the last step.
const FINAL_RATIO: f64 = 1.0 / 20.0;
/// Scales stay within this factor of the first ones.
const SCALE_RANGE: f64 = 100.0;
/// The least positive number of `f16`, 2⁻²⁴.
const LEAST_F16: f32 = 5.960_464_5e-8;

/// The learning rates of the first step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) of_grids: f64,
    pub(super) of_weights: f64,
}

/// The weight and the grid of a layer, as they are trained.
pub(crate) struct Trained {
    /// `[n_groups, group_size, d_out]`, with zeros in a short last group.
    weight: Param<Tensor<3>>,
    grids: Grids,
    /// The scales of the quantizer, `[n_groups, 1, d_out]`.
    first_scales: Tensor<3>,
    grid: UniformGrid,
    rates: Rates,
    f16_scales: bool,
    optimizer: ModuleOptimizer,
}

/// Scales and zero-points, `[n_groups, 1, d_out]`.
#[derive(Module, Debug)]
struct Grids {
    scales: Param<Tensor<3>>,
    /// Not rounded; none on a symmetric grid.
    zeros: Option<Param<Tensor<3>>>,
}

impl Trained {
    pub(super) fn new(
        layer: &Layer<'_>,
        quantized: &QuantTensor,
        rates: Rates,
        f16_scales: bool,
    ) -> Result<Self> {
        let grid = UniformGrid::of(layer.path, quantized)?;
        let trained = |values: Tensor<3>| Param::from_tensor(values.autodiff());
        let first_scales = quantized.scales().unsqueeze_dim::<3>(1);
        let zeros = quantized.zeros().map(|zeros| zeros.unsqueeze_dim::<3>(1));
        Ok(Self {
            weight: trained(grid.grouped(layer.weight.clone())),
            grids: Grids {
                scales: trained(first_scales.clone()),
                zeros: zeros.map(|zeros| trained(zeros.clamp(0.0, grid.max_code))),
            },
            first_scales,
            grid,
            rates,
            f16_scales,
            optimizer: AdamWConfig::new()
                .with_weight_decay(0.0)
                .with_epsilon(1e-8)
                .init(),
        })
    }

    /// The scales and zeros that weights are rounded with.
    fn stored_grid(&self) -> (Tensor<3>, Option<Tensor<3>>) {
        let scales = self.grids.scales.val();
        let scales = match self.f16_scales {
            true => straight_through(scales, |scales| scales.cast(DType::F16).cast(DType::F32)),
            false => scales,
        };
        let zeros = self.grids.zeros.as_ref();
        let zeros = zeros.map(|zeros| straight_through(zeros.val(), Tensor::round));
        (scales, zeros)
    }

    /// Brings scales and zero-points back into their ranges.
    fn bound(&mut self) {
        let (first, max_code) = (&self.first_scales, self.grid.max_code);
        let Grids { scales, zeros } = self.grids.clone();
        self.grids = Grids {
            scales: bounded(scales, |scales| {
                let least = first.clone() / SCALE_RANGE;
                let least = least.clamp_min(if self.f16_scales { LEAST_F16 } else { 0.0 });
                let most = first.clone() * SCALE_RANGE;
                scales.max_pair(least).min_pair(most)
            }),
            zeros: zeros.map(|zeros| bounded(zeros, |zeros| zeros.clamp(0.0, max_code))),
        };
    }
}

/// A parameter with other values.
fn bounded(
    parameter: Param<Tensor<3>>,
    bound: impl FnOnce(Tensor<3>) -> Tensor<3>,
) -> Param<Tensor<3>> {
    parameter.map(|values| bound(values.inner()).autodiff().require_grad())
}

impl LearnedLayer for Trained {
    fn weight(&self) -> Tensor<2> {
        let (scales, zeros) = self.stored_grid();
        self.grid.fake_quantized(self.weight.val(), scales, zeros)
    }

    fn step(&mut self, gradients: &mut Gradients, done: f64) {
        let falling = 0.5 * (1.0 + (PI * done).cos());
        let factor = FINAL_RATIO + (1.0 - FINAL_RATIO) * falling;
        let Rates {
            of_grids,
            of_weights,
        } = self.rates;
        let of = GradientsParams::from_module(gradients, &self.grids);
        let optimizer = &mut self.optimizer;
        self.grids = optimizer.step(of_grids * factor, self.grids.clone(), of);
        let of = GradientsParams::from_module(gradients, &self.weight);
        self.weight = optimizer.step(of_weights * factor, self.weight.clone(), of);
        self.bound();
    }

    fn finish(self, path: &str, round: usize) -> Result<Start> {
        let (scales, zeros) = self.stored_grid();
        let weight = self.weight.val().inner();
        let packed = self.grid.packed(path, weight, scales, zeros)?;
        Ok(Start::packed(Quantized::from(packed), None, round, 0.0))
    }
}

#[cfg(test)]
mod tests;
