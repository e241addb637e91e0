use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::Tensor;
use quant_core::{QuantTensor, Quantizer};

use crate::adapter::floats;
use crate::{
    Adapter, Batch, CausalLm, Certificate, Error, Exactness, Fingerprint, Linears, MergedLayer,
    Probe, Result, Weight,
};

/// The treatment of a packed weight whose codes cannot hold its adapter, in [`merge_with`].
#[derive(Clone, Copy, Default)]
pub enum OffGrid<'a> {
    /// The merge is refused, and the model is unchanged.
    #[default]
    Refuse,
    /// The merged weight is dense.
    Dense,
    /// The sum is quantized again. A part of the adapter is lost; the certificate says how much.
    Round(&'a dyn Quantizer),
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

/// Merges as [`merge`] does, and treats weights whose codes cannot hold the sum as `off_grid` says.
///
/// # Errors
/// As [`merge`], and those of the quantizer. The model is then unchanged.
pub fn merge_with<M: Linears>(model: &mut M, off_grid: OffGrid) -> Result<Certificate> {
    let mut layers = Vec::new();
    let mut weights = BTreeMap::new();
    for (path, linear) in model.linears() {
        let Some(adapter) = &linear.adapter else {
            continue;
        };
        adapter.ops().check(&path, linear)?;
        let (weight, exactness) = merge_layer(&path, adapter, &linear.weight, off_grid)?;
        layers.push(MergedLayer {
            path: path.clone(),
            method: adapter.method().into(),
            format: weight.format(),
            exactness,
        });
        weights.insert(path, weight);
    }
    if layers.is_empty() {
        return Err(Error::NoAdapters);
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
pub fn merge_probed<M: CausalLm>(
    model: &mut M,
    off_grid: OffGrid,
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
    let certificate = merge_with(model, off_grid)?;
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
        (Err(Error::MergeIntoPacked { .. }), OffGrid::Round(quantizer)) => {
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
    let packed = packed.map_err(|source| Error::Quant {
        path: path.into(),
        source,
    })?;
    let packed = match weight {
        Weight::Quant(weight) => packed.weight.with_precision(weight.precision()),
        Weight::Dense(_) => packed.weight,
    };
    let exactness = Exactness::Rounded {
        relative_error: packed.distortion(sum.clone()).relative,
        retention: retention(
            &floats(weight.to_dense()),
            &floats(sum),
            &floats(packed.dequantize()),
        ),
    };
    Ok((packed, exactness))
}

/// `sum`, of the layer at `path`, if it is finite.
fn finite(path: &str, sum: Tensor<2>) -> Result<Tensor<2>> {
    let sum = sum.detach();
    let d_out = sum.dims()[1];
    let values = floats(sum.clone());
    quant_core::check_finite("the merged weight", &values, d_out).map_err(|source| {
        Error::Quant {
            path: path.into(),
            source,
        }
    })?;
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
