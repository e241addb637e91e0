//! Weights on uniform grids that are differentiable in their scales and zero-points.

use burn::tensor::Tensor;
use peft::{LayerShape, Recipe};
use quant_core::{Format, Grid, QuantTensor};

use crate::{Error, Result};

/// The uniform grid of a packed weight: its format, and how rows are grouped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UniformGrid {
    pub(crate) format: Format,
    pub(crate) max_code: f32,
    n_groups: usize,
    group_size: usize,
    /// `[d_in, d_out]`.
    dims: [usize; 2],
}

impl UniformGrid {
    /// The grid of a weight with groups of consecutive inputs.
    ///
    /// # Errors
    /// [`Error::NoRange`] if it has another grid.
    pub(crate) fn of(path: &str, quantized: &QuantTensor) -> Result<Self> {
        let format = quantized.format();
        check_range(path, format)?;
        if quantized.input_order().is_some() {
            let path = path.into();
            return Err(Error::NoRange { path, format });
        }
        let layout = quantized.layout();
        Ok(Self {
            format,
            max_code: ((1 << format.bits()) - 1) as f32,
            n_groups: layout.n_groups(),
            group_size: layout.group_size(),
            dims: quantized.dims(),
        })
    }

    /// `[d_in, d_out]` as `[n_groups, group_size, d_out]`, with zeros in a short last group.
    pub(crate) fn grouped(&self, weight: Tensor<2>) -> Tensor<3> {
        let [d_in, d_out] = self.dims;
        let missing = self.n_groups * self.group_size - d_in;
        let weight = if missing == 0 {
            weight
        } else {
            let zeros = Tensor::zeros([missing, d_out], &weight.device());
            Tensor::cat(vec![weight, zeros], 0)
        };
        weight.reshape([self.n_groups, self.group_size, d_out])
    }

    /// `[n_groups, group_size, d_out]` as `[d_in, d_out]`.
    pub(crate) fn rows(&self, weight: Tensor<3>) -> Tensor<2> {
        let [d_in, d_out] = self.dims;
        let weight = weight.reshape([self.n_groups * self.group_size, d_out]);
        weight.slice([0..d_in, 0..d_out])
    }

    /// `(clamp(round(w / s) + z, 0, m) - z) s`, in which `round` has the gradient of what it rounds.
    ///
    /// # Shapes
    /// - `weight`: `[n_groups, group_size, d_out]`
    /// - `scales`, `zeros`: `[n_groups, 1, d_out]`; no zeros on a symmetric grid
    /// - result: `[d_in, d_out]`
    pub(crate) fn fake_quantized(
        &self,
        weight: Tensor<3>,
        scales: Tensor<3>,
        zeros: Option<Tensor<3>>,
    ) -> Tensor<2> {
        let max_code = self.max_code;
        let zeros = zeros.unwrap_or_else(|| scales.ones_like() * ((max_code + 1.0) / 2.0));
        // For each weight, so that its two gradients cancel within the range before they are summed: of what
        // rounding would leave, AdamW makes steps of the full size.
        let zeros = zeros.expand(weight.dims());
        let codes = straight_through(weight / scales.clone(), Tensor::round) + zeros.clone();
        self.rows((codes.clamp(0.0, max_code) - zeros) * scales)
    }

    /// The weight rounded to nearest and packed; shapes as of [`UniformGrid::fake_quantized`].
    pub(crate) fn packed(
        &self,
        path: &str,
        weight: Tensor<3>,
        scales: Tensor<3>,
        zeros: Option<Tensor<3>>,
    ) -> Result<QuantTensor> {
        let plain = |values: Tensor<3>| values.inner().squeeze_dim::<2>(1);
        let weight = self.rows(weight);
        QuantTensor::on_grid(weight, self.format, plain(scales), zeros.map(plain))
            .map_err(Error::quant(path))
    }
}

/// Checks that a format has the range of a uniform grid.
pub(crate) fn check_range(path: &str, format: Format) -> Result<()> {
    match format.grid() {
        Grid::Affine | Grid::Symmetric => Ok(()),
        _ => Err(Error::NoRange {
            path: path.into(),
            format,
        }),
    }
}

/// Checks that the formats of all layers that a recipe quantizes have the range of a uniform grid.
pub(crate) fn check_ranges(layers: &[LayerShape], recipe: &dyn Recipe) -> Result<()> {
    for LayerShape { path, .. } in layers {
        if let Some(quantizer) = recipe.quantizer(path) {
            let format = quantizer.format().map_err(Error::quant(path))?;
            check_range(path, format)?;
        }
    }
    Ok(())
}

/// `f` of `values`, with the gradient of `values`.
pub(crate) fn straight_through(values: Tensor<3>, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
    let moved = f(values.clone().detach()) - values.clone().detach();
    values + moved
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use quant_core::{Quantizer, Rtn};

    use super::*;

    const DIMS: [usize; 2] = [10, 3];
    const GROUP: usize = 4;

    fn tensor<const D: usize>(values: &[f64], dims: [usize; D]) -> Tensor<D> {
        let values = values.iter().map(|&value| value as f32).collect();
        Tensor::from_data(TensorData::new::<f32, _>(values, dims), &Device::flex())
    }

    /// A weight, scales under which a part of it is outside of the range, and zeros that are not whole.
    fn values() -> [Vec<f64>; 3] {
        let wave = |n: usize, step: f64| (0..n).map(move |i| (i as f64 * step + 0.3).sin());
        [
            wave(30, 1.7).collect(),
            wave(9, 0.9).map(|value| 0.3 + 0.08 * value).collect(),
            wave(9, 2.3).map(|value| 1.4 + 0.6 * value).collect(),
        ]
    }

    /// `Σ r ŵ` in which `round` adds the constant that it added to `at`, which has the gradient that the
    /// straight-through estimator stands for.
    fn surrogate([weight, scales, zeros]: [&[f64]; 3], at: &[Vec<f64>; 3], r: &[f64]) -> f64 {
        let rounding = |value: f64, at: f64| value + (at.round_ties_even() - at);
        let each = (0..weight.len()).map(|i| {
            let group = i / DIMS[1] / GROUP * DIMS[1] + i % DIMS[1];
            let (scale, zero) = (scales[group], rounding(zeros[group], at[2][group]));
            let step = at[0][i] / at[1][group];
            let code = rounding(weight[i] / scale, step) + zero;
            // The ends of the range are within it.
            let level = step.round_ties_even() + at[2][group].round_ties_even();
            let code = if (0.0..=3.0).contains(&level) {
                code
            } else {
                level.clamp(0.0, 3.0)
            };
            r[i] * (code - zero) * scale
        });
        each.sum()
    }

    #[test]
    fn gradients_are_those_of_the_straight_through_estimator() {
        let rtn = Rtn::new().with_bits(2).with_group_size(GROUP);
        let at = values();
        let plain = rtn.quantize(tensor(&at[0], DIMS), None).unwrap().weight;
        let grid = UniformGrid::of("proj", &plain).unwrap();
        let r: Vec<f64> = (0..30).map(|i| (i as f64 * 0.4).cos()).collect();
        let leaf = |values: Tensor<3>| values.autodiff().require_grad();
        let weight = tensor(&at[0], DIMS).autodiff().require_grad();
        let [scales, zeros] = [&at[1], &at[2]].map(|values| leaf(tensor(values, [3, 1, 3])));
        let rounded = straight_through(zeros.clone(), Tensor::round);
        let padded = Tensor::cat(
            vec![weight.clone(), Tensor::zeros([2, 3], &weight.device())],
            0,
        );
        let groups = padded.reshape([3, GROUP, 3]);
        let found = grid.fake_quantized(groups, scales.clone(), Some(rounded));
        let loss = (found * tensor(&r, DIMS).autodiff()).sum();
        let [w, s, z] = [&at[0][..], &at[1], &at[2]];
        let value = loss.clone().inner().into_scalar::<f32>();
        assert!((f64::from(value) - surrogate([w, s, z], &at, &r)).abs() < 1e-5);
        let gradients = loss.backward();
        let floats = |tensor: Option<Tensor<1>>| -> Vec<f32> {
            tensor.unwrap().into_data().try_into_vec().unwrap()
        };
        let found = [
            floats(weight.grad(&gradients).map(|of| of.reshape([30]))),
            floats(scales.grad(&gradients).map(|of| of.reshape([9]))),
            floats(zeros.grad(&gradients).map(|of| of.reshape([9]))),
        ];
        let mut n_outside = 0;
        for (which, found) in found.iter().enumerate() {
            for (i, &found) in found.iter().enumerate() {
                let moved = |by: f64| {
                    let mut values = at.clone();
                    values[which][i] += by;
                    surrogate([&values[0], &values[1], &values[2]], &at, &r)
                };
                let expected = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                let error = (f64::from(found) - expected).abs();
                assert!(error < 1e-4, "{which} {i}: {found}, {expected}");
                n_outside += usize::from(which == 0 && found == 0.0);
            }
        }
        // Some are within the range, some outside of it.
        assert!((5..25).contains(&n_outside), "{n_outside}");
        assert!(found[2].iter().any(|&of_zero| of_zero.abs() > 1e-2));
    }
}
