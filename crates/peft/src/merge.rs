use std::collections::BTreeMap;
use std::fmt;

use burn::module::Param;
use burn::tensor::Tensor;
use quant_core::{Format, QuantTensor, Quantizer};
use serde::{Deserialize, Serialize};

use crate::adapter::floats;
use crate::{Adapter, Batch, CausalLm, Error, Exactness, Fingerprint, Linears, Result, Weight};

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

/// One merged layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergedLayer {
    /// The path of the layer.
    pub path: String,
    /// The method of its adapter.
    pub method: String,
    /// The format of the merged weight; none if it is dense.
    pub format: Option<Format>,
    /// The distance from the adapted layer.
    pub exactness: Exactness,
}

/// The logits of a batch before and after a merge.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The number of logits compared.
    pub n_logits: usize,
    /// The largest change of a logit of the base by the adapters.
    pub max_adapter_change: f64,
    /// The largest change of a logit of the adapted model by the merge.
    pub max_merge_change: f64,
    /// The part of the adapters' change that is kept, `⟨m - b, a - b⟩ / ‖a - b‖²` over the logits `b`
    /// of the base, `a` of the adapted and `m` of the merged model; 1 if all of it is.
    pub retention: f64,
}

/// The result of [`merge`] layer by layer, and the fingerprint of the merged model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// The merged layers.
    pub layers: Vec<MergedLayer>,
    /// The fingerprint of the merged model.
    pub merged: Fingerprint,
    /// The logits of a batch before and after, from [`merge_probed`].
    pub probe: Option<Probe>,
}

impl Certificate {
    /// Whether all layers were merged exactly.
    pub fn is_exact(&self) -> bool {
        self.layers
            .iter()
            .all(|layer| layer.exactness == Exactness::Exact)
    }

    /// `exact`, `bounded` or `rounded`: the weakest of the layers.
    pub fn kind(&self) -> &'static str {
        let is = |kind: fn(&Exactness) -> bool| self.layers.iter().any(|l| kind(&l.exactness));
        if is(|exactness| matches!(exactness, Exactness::Rounded { .. })) {
            "rounded"
        } else if is(|exactness| matches!(exactness, Exactness::Bounded { .. })) {
            "bounded"
        } else {
            "exact"
        }
    }

    /// Checks that `model` is the merged model of this certificate, for example after it was saved
    /// and loaded again.
    ///
    /// # Errors
    /// [`Error::NotMerged`] if a parameter differs in any bit.
    pub fn verify(&self, model: &impl Linears) -> Result<()> {
        let found = Fingerprint::of(model);
        if found == self.merged {
            Ok(())
        } else {
            let expected = self.merged.clone();
            Err(Error::NotMerged { expected, found })
        }
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut methods: Vec<&str> = self.layers.iter().map(|l| l.method.as_str()).collect();
        methods.sort_unstable();
        methods.dedup();
        let kept = self
            .layers
            .iter()
            .filter(|layer| layer.format.is_some())
            .count();
        let n = self.layers.len();
        let (kind, methods) = (self.kind(), methods.join(", "));
        writeln!(
            f,
            "{kind} merge of {n} layers ({methods}); {kept} of them packed"
        )?;
        let each = self.layers.iter().map(|layer| layer.exactness);
        let error = each.clone().filter_map(|exactness| match exactness {
            Exactness::Bounded {
                max_weight_error,
                max_weight,
            } => Some(max_weight_error / max_weight),
            _ => None,
        });
        if let Some(error) = error.reduce(f64::max) {
            writeln!(
                f,
                "weights are the sums within {error:.1e} of a layer's largest weight"
            )?;
        }
        let retention = each.filter_map(|exactness| match exactness {
            Exactness::Rounded { retention, .. } => Some(retention),
            _ => None,
        });
        if let Some(retention) = retention.reduce(f64::min) {
            writeln!(
                f,
                "of what an adapter adds to the weights of its layer, {:.1} % or more is left",
                100.0 * retention
            )?;
        }
        if let Some(probe) = &self.probe {
            writeln!(
                f,
                "{} logits: the adapters change them by up to {:.3}, the merge by {:.1e}; retention {:.4}",
                probe.n_logits, probe.max_adapter_change, probe.max_merge_change, probe.retention
            )?;
        }
        write!(f, "merged model: {}", self.merged)
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
