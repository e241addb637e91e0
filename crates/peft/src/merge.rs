use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::Tensor;
use quant_core::{QuantTensor, Quantizer, StoredGrid};

use crate::adapter::floats;
use crate::certificate::NO_METHOD;
use crate::{
    Adapter, Batch, CausalLm, Certificate, Error, Exactness, Fingerprint, Linear, Linears,
    MergedLayer, Probe, Recipe, Result, Weight,
};

/// The treatment of a packed weight whose codes cannot hold its adapter, in [`merge_with`].
#[derive(Clone, Copy, Default)]
pub enum OffGrid<'a> {
    /// The merge is refused, and the model is unchanged.
    #[default]
    Refuse,
    /// The merged weight is dense.
    Dense,
    /// The sum is quantized again, by the quantizer that the recipe has for the layer; without one, the
    /// merge is refused. A part of the adapter is lost; the certificate says how much.
    Round(&'a dyn Recipe),
}

/// The settings of a merge; an [`OffGrid`] converts into one.
#[derive(Clone, Copy, Default)]
pub struct MergeConfig<'a> {
    off_grid: OffGrid<'a>,
    stored_grid: StoredGrid,
}

impl<'a> MergeConfig<'a> {
    /// Refuses adapters that codes cannot hold, and rounds nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the treatment of packed weights whose codes cannot hold their adapters; refused by default.
    pub fn with_off_grid(mut self, off_grid: OffGrid<'a>) -> Self {
        self.off_grid = off_grid;
        self
    }

    /// Sets the scales and zeros that the file of the merged model holds; all by default.
    ///
    /// Scales and zeros of every packed layer are rounded to them, with or without an adapter. The
    /// certificate lists each layer that this changes as rounded; the method of one without an adapter
    /// is `none`.
    pub fn with_stored_grid(mut self, stored_grid: StoredGrid) -> Self {
        self.stored_grid = stored_grid;
        self
    }
}

impl<'a> From<OffGrid<'a>> for MergeConfig<'a> {
    fn from(off_grid: OffGrid<'a>) -> Self {
        Self::new().with_off_grid(off_grid)
    }
}

/// Merges every adapter into its weight; packed weights keep their codes.
///
/// # Errors
/// [`Error::NoAdapters`] if there is nothing to merge, as after a merge,
/// [`Error::MergeIntoPacked`] if the codes of a packed weight cannot hold the sum, [`Error::Quant`] if
/// the sum is not finite. The model is then unchanged.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Error, Linear, Linears, Lora, OffGrid, Peqa, Weight};
/// use quant_core::Rtn;
///
/// # #[derive(burn::module::Module, Debug)]
/// # struct Layer {
/// #     proj: Linear,
/// # }
/// #
/// # impl Linears for Layer {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("proj".into(), &self.proj)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("proj".into(), &mut self.proj)]
/// #     }
/// # }
///
/// let weight = Weight::frozen(Tensor::from_floats([[0.5, -1.0], [2.0, 0.25]], &Device::flex()));
/// let mut model = Layer { proj: Linear::new(weight, None) };
/// model.proj.quantize("proj", &Rtn::new().with_bits(4), None)?;
///
/// peft::attach(&mut model, &Peqa::new())?;
/// assert!(peft::merge(&mut model)?.is_exact());
///
/// peft::attach(&mut model, &Lora::new(1))?;
/// assert!(matches!(peft::merge(&mut model), Err(Error::MergeIntoPacked { .. })));
/// let certificate = peft::merge_with(&mut model, OffGrid::Dense)?;
/// assert_eq!(certificate.kind(), "bounded");
/// # Ok::<(), peft::Error>(())
/// ```
pub fn merge<M: Linears>(model: &mut M) -> Result<Certificate> {
    merge_with(model, OffGrid::Refuse)
}

/// Merges as [`merge`] does, with other settings: an [`OffGrid`] or a [`MergeConfig`].
///
/// # Errors
/// As [`merge`], and those of the quantizer and of [`QuantTensor::rounded_to`]. The model is then
/// unchanged.
pub fn merge_with<'a, M: Linears>(
    model: &mut M,
    config: impl Into<MergeConfig<'a>>,
) -> Result<Certificate> {
    let config = config.into();
    if model.linears().iter().all(|(_, of)| of.adapter.is_none()) {
        return Err(Error::NoAdapters);
    }
    let mut layers = Vec::new();
    let mut weights = BTreeMap::new();
    for (path, linear) in model.linears() {
        let merged = match &linear.adapter {
            Some(adapter) => {
                adapter.ops().check(&path, linear)?;
                Some(merge_layer(
                    &path,
                    adapter,
                    &linear.weight,
                    config.off_grid,
                )?)
            }
            None => None,
        };
        let stored = stored(&path, linear, merged.as_ref(), config.stored_grid)?;
        let Some((weight, exactness)) = stored.or(merged) else {
            continue;
        };
        let method = linear.adapter.as_ref().map_or(NO_METHOD, Adapter::method);
        layers.push(MergedLayer {
            path: path.clone(),
            method: method.into(),
            format: weight.format(),
            exactness,
        });
        weights.insert(path, weight);
    }
    for (path, linear) in model.linears_mut() {
        if let Some(weight) = weights.remove(&path) {
            linear.weight = weight;
            if let Some(bias) = linear.adapter.take().and_then(|adapter| adapter.bias()) {
                linear.replace_bias(bias.detach());
            }
        }
    }
    Ok(Certificate {
        layers,
        merged: Fingerprint::of(model),
        probe: None,
    })
}

/// Merges as [`merge_with`] does, and compares the logits of `probe` before and after.
///
/// # Errors
/// As [`merge_with`], and [`Error::Token`] if a token of the batch is not in the vocabulary.
pub fn merge_probed<'a, M: CausalLm>(
    model: &mut M,
    config: impl Into<MergeConfig<'a>>,
    probe: &Batch,
) -> Result<Certificate> {
    probe.check(model)?;
    let logits =
        |model: &M| floats(probe.of_text(model.forward_spans(probe.tokens(), probe.spans())));
    let mut before = model.clone();
    crate::set_dropout(&mut before, None);
    let adapted = logits(&before);
    for (_, linear) in before.linears_mut() {
        linear.adapter = None;
    }
    let base = logits(&before);
    let certificate = merge_with(model, config)?;
    let merged = logits(model);

    let change = |a: &[f32], b: &[f32]| {
        let changes = a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b));
        // NaN is the largest change.
        changes.fold(0.0, |most: f64, change| match change.abs() {
            change if change > most || change.is_nan() => change,
            _ => most,
        })
    };
    let probe = Probe {
        n_logits: adapted.len(),
        max_adapter_change: change(&adapted, &base),
        max_merge_change: change(&merged, &adapted),
        retention: retention(&base, &adapted, &merged),
    };
    Ok(Certificate {
        probe: Some(probe),
        ..certificate
    })
}

/// `⟨m - b, a - b⟩ / ‖a - b‖²`; 1 where the adapter does nothing.
fn retention(base: &[f32], adapted: &[f32], merged: &[f32]) -> f64 {
    let (mut kept, mut all) = (0.0, 0.0);
    for ((&base, &adapted), &merged) in base.iter().zip(adapted).zip(merged) {
        let [base, adapted, merged] = [base, adapted, merged].map(f64::from);
        kept += (merged - base) * (adapted - base);
        all += (adapted - base) * (adapted - base);
    }
    if all == 0.0 { 1.0 } else { kept / all }
}

fn merge_layer(
    path: &str,
    adapter: &Adapter,
    weight: &Weight,
    off_grid: OffGrid,
) -> Result<(Weight, Exactness)> {
    let packed = match weight {
        Weight::Quant(packed) => adapter.ops().on_codes(path, packed),
        Weight::Dense(_) => return dense(path, adapter, weight),
    };
    match (packed, off_grid) {
        (Err(Error::MergeIntoPacked { .. }), OffGrid::Dense) => dense(path, adapter, weight),
        (Err(refusal @ Error::MergeIntoPacked { .. }), OffGrid::Round(recipe)) => {
            let quantizer = recipe.quantizer(path).ok_or(refusal)?;
            let (packed, exactness) = rounded(path, adapter, weight, quantizer)?;
            Ok((Weight::Quant(packed), exactness))
        }
        (packed, _) => packed.map(|(packed, exactness)| (Weight::Quant(packed), exactness)),
    }
}

fn dense(path: &str, adapter: &Adapter, weight: &Weight) -> Result<(Weight, Exactness)> {
    let (sum, exactness) = adapter.ops().to_dense(weight);
    let sum = finite(path, sum)?;
    let sum = Param::from_tensor(sum).set_require_grad(weight.trains());
    Ok((Weight::Dense(sum), exactness))
}

fn rounded(
    path: &str,
    adapter: &Adapter,
    weight: &Weight,
    quantizer: &dyn Quantizer,
) -> Result<(QuantTensor, Exactness)> {
    let (sum, _) = adapter.ops().to_dense(weight);
    let sum = finite(path, sum)?;
    let packed = quantizer.quantize(sum.clone(), None);
    let packed = packed.map_err(quant_error(path))?;
    let packed = match weight {
        Weight::Quant(weight) => packed.weight.with_precision(weight.precision()),
        Weight::Dense(_) => packed.weight,
    };
    let exactness = rounding(weight, sum, &packed);
    Ok((packed, exactness))
}

/// The packed weight of a layer, merged if it has an adapter, with the scales and zeros of a file; `None`
/// if they are its own.
fn stored(
    path: &str,
    linear: &Linear,
    merged: Option<&(Weight, Exactness)>,
    grid: StoredGrid,
) -> Result<Option<(Weight, Exactness)>> {
    let weight = merged.map_or(&linear.weight, |(weight, _)| weight);
    let Weight::Quant(packed) = weight else {
        return Ok(None);
    };
    if grid.holds(packed) {
        return Ok(None);
    }
    let rounded = packed.clone().rounded_to(grid).map_err(quant_error(path))?;
    let exactness = rounding(&linear.weight, linear.to_dense(), &rounded);
    Ok(Some((Weight::Quant(rounded), exactness)))
}

/// How much of `sum`, the weight with its adapter, is kept by what it was rounded to.
fn rounding(weight: &Weight, sum: Tensor<2>, rounded: &QuantTensor) -> Exactness {
    Exactness::Rounded {
        relative_error: rounded.distortion(sum.clone()).relative,
        retention: retention(
            &floats(weight.to_dense()),
            &floats(sum),
            &floats(rounded.dequantize()),
        ),
    }
}

fn quant_error(path: &str) -> impl FnOnce(quant_core::Error) -> Error {
    let path = path.into();
    |source| Error::Quant { path, source }
}

/// `sum`, of the layer at `path`, if it is finite.
fn finite(path: &str, sum: Tensor<2>) -> Result<Tensor<2>> {
    let sum = sum.detach();
    let d_out = sum.dims()[1];
    let values = floats(sum.clone());
    quant_core::check_finite("the merged weight", &values, d_out).map_err(quant_error(path))?;
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_is_the_part_along_what_was_added() {
        let base = [1.0, 1.0, 1.0];
        let adapted = [3.0, 1.0, 1.0];
        // A quarter of the way, and as far again to the sides.
        assert_eq!(retention(&base, &adapted, &[1.5, 9.0, -4.0]), 0.25);
        assert_eq!(retention(&base, &adapted, &adapted), 1.0);
        assert_eq!(retention(&base, &adapted, &base), 0.0);
        assert_eq!(retention(&base, &adapted, &[-1.0, 1.0, 1.0]), -1.0);
        assert_eq!(retention(&base, &base, &adapted), 1.0);
    }
}
