//! The sum of a packed weight and a matrix that is constant over tiles, in the zeros of its grid.

use quant_core::{Grid, QuantTensor, Result};

use crate::Exactness;
use crate::adapter::tensors::{floats, largest, of_roundings, tensor};

/// The reason why the groups of a weight cannot hold a matrix that is constant over tiles of `pool`
/// inputs, if there is one.
pub(super) fn groups_outside(weight: &QuantTensor, pool: usize) -> Option<String> {
    let format = weight.format();
    if format.grid() != Grid::Affine {
        return Some(format!("{format} has no zeros to hold it"));
    }
    let [d_in, d_out] = weight.dims();
    let mut scales = floats(weight.scales()).into_iter();
    if let Some(at) = scales.position(|scale| scale == 0.0) {
        let [group, output] = [at / d_out, at % d_out];
        return Some(format!(
            "the scale of group {group} of output {output} is 0"
        ));
    }
    let group = weight.layout().group_size();
    let order = weight.input_order();
    let tile = |row: usize| {
        let input = order.as_ref().map_or(row, |order| order[row] as usize);
        input / pool
    };
    (0..d_in)
        .find(|&row| tile(row) != tile(row / group * group))
        .map(|_| match &order {
            Some(_) => "its groups gather inputs of several tiles (`desc_act`)".into(),
            None => format!("groups of {group} inputs straddle tiles of {pool} inputs"),
        })
}

/// The value of each group and output, where `values` has one for each tile of `[pool, repeat]` and
/// groups lie inside tiles.
pub(super) fn of_groups(
    weight: &QuantTensor,
    [pool, repeat]: [usize; 2],
    values: &[f64],
) -> Vec<f64> {
    let order = weight.input_order();
    let layout = weight.layout();
    let [n_groups, d_out] = layout.grid_shape();
    let n_out = d_out / repeat;
    let mut groups = Vec::with_capacity(n_groups * d_out);
    for group in 0..n_groups {
        let row = group * layout.group_size();
        let input = order.as_ref().map_or(row, |order| order[row] as usize);
        let tiles = &values[input / pool * n_out..][..n_out];
        groups.extend((0..d_out).map(|output| tiles[output / repeat]));
    }
    groups
}

/// The weight on an affine grid with `added`, a value for each group and output, in its zeros.
pub(super) fn add(weight: &QuantTensor, added: &[f64]) -> Result<(QuantTensor, Exactness)> {
    let scales = floats(weight.scales());
    let zeros = floats(weight.zeros().expect("an affine grid"));
    // In f64, so that each zero is rounded once.
    let mut merged = Vec::with_capacity(zeros.len());
    let mut max_error = 0f64;
    for ((&scale, &zero), &added) in scales.iter().zip(&zeros).zip(added) {
        let (scale, zero) = (f64::from(scale), f64::from(zero));
        let shifted = (zero - added / scale) as f32;
        let error = scale * (zero - f64::from(shifted)) - added;
        max_error = max_error.max(error.abs());
        merged.push(shifted);
    }
    let scales = weight.scales();
    let zeros = tensor(merged, weight.layout().grid_shape(), &scales.device());
    let merged = weight.clone().with_grid(scales, Some(zeros))?;
    let max_weight = largest(merged.dequantize());
    let exactness = Exactness::Bounded {
        // A weight in f32 is rounded twice, when the zero is subtracted and when it is scaled.
        max_weight_error: max_error + of_roundings(2) * max_weight,
        max_weight,
    };
    Ok((merged, exactness))
}
