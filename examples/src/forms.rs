//! The forms in which a tuned model can be kept.

use std::path::Path;

use burn::tensor::Device;
use models::{Model, Pretrained};
use peft::{Adapters, Batch, CausalLm, Certificate, OffGrid, Recipe};

use crate::outcome::{Result, bits, weights_bytes};

/// A tuned model in one form, saved, loaded again and measured.
#[derive(Clone, Debug)]
pub struct Form<T> {
    /// Merged `exact`, `bounded`, `rounded` or `dense`, or with adapters `beside` the base.
    pub merge: String,
    /// What was measured of the model after it was loaded.
    pub kept: T,
    /// Bytes of the files.
    pub n_bytes: u64,
    /// The part of the adapters' change of the logits that the merge retains.
    pub retention: f64,
    /// The certificate of the merge, if there was one.
    pub certificate: Option<Certificate>,
}

/// Merges the adapters of `adapted`, whose base is `base`, into the packed weights; if that cannot be done,
/// keeps them beside the base, merges into dense weights, and merges and rounds by `recipe` again. Each form is
/// saved below `dir` and measured as it is loaded again.
///
/// # Errors
/// If a form cannot be made, saved or loaded, or the logits of the adapters beside the reloaded base are not those
/// of the tuned model.
pub fn forms<T>(
    base: &Pretrained,
    adapted: &Model,
    recipe: &dyn Recipe,
    probe: &Batch,
    dir: &Path,
    device: &Device,
    measure: impl Fn(&Model) -> Result<T>,
) -> Result<Vec<Form<T>>> {
    let logits = |model: &Model| -> Vec<f32> {
        let logits = model.forward_spans(probe.tokens(), probe.spans());
        let logits = logits.into_data().convert::<f32>();
        logits.try_into_vec().expect("converted to f32")
    };
    let ways = [
        ("codes", OffGrid::Refuse),
        ("dense", OffGrid::Dense),
        ("rounded", OffGrid::Round(recipe)),
    ];
    let mut forms = Vec::new();
    for (kind, off_grid) in ways {
        let mut merged = base.clone();
        merged.model = adapted.clone();
        let dir = dir.join(kind);
        match peft::merge_probed(&mut merged.model, off_grid, probe) {
            Ok(certificate) => {
                merged.certificate = Some(certificate.clone());
                models::save(&merged, &dir)?;
                let reloaded = models::load_verified(&dir, device)?;
                let retention = certificate.probe.map_or(f64::NAN, |probe| probe.retention);
                let mut layers = certificate.layers.iter();
                let is_dense = layers.all(|layer| layer.format.is_none());
                forms.push(Form {
                    merge: if is_dense {
                        "dense"
                    } else {
                        certificate.kind()
                    }
                    .into(),
                    kept: measure(&reloaded.model)?,
                    n_bytes: weights_bytes(&dir)?,
                    retention,
                    certificate: Some(certificate),
                });
                if kind == "codes" {
                    // The merged model is packed: the other forms have no advantage.
                    break;
                }
            }
            Err(peft::Error::MergeIntoPacked { .. }) => {
                let beside = dir.join("adapters");
                Adapters::of(adapted)?.save(&beside)?;
                let of_base = dir.join("base");
                models::save(base, &of_base)?;
                let mut reloaded = models::load(&of_base, device)?;
                let adapters = Adapters::load(&beside, device)?;
                peft::activate(&mut reloaded.model, &adapters)?;
                if bits(&logits(&reloaded.model)) != bits(&logits(adapted)) {
                    return Err("the logits of the reloaded model are not the tuned model's".into());
                }
                forms.push(Form {
                    merge: "beside".into(),
                    kept: measure(&reloaded.model)?,
                    n_bytes: weights_bytes(&of_base)? + weights_bytes(&beside)?,
                    retention: 1.0,
                    certificate: None,
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(forms)
}
