//! The forms in which a tuned model can be kept.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use models::{FloatType, Model, Pretrained};
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

/// How a tuned model is kept in its forms.
pub struct Forms<'a> {
    /// The base of the adapters.
    pub base: &'a Pretrained,
    /// The quantizers of the base.
    pub recipe: &'a dyn Recipe,
    /// What retentions are measured on.
    pub probe: &'a Batch,
    /// A directory for the files of one form at a time.
    pub dir: &'a Path,
    /// The device to load on.
    pub device: &'a Device,
    /// The type of float that the base computes in.
    pub compute: FloatType,
}

impl Forms<'_> {
    /// Merges the adapters of a tuned model into the packed weights; if that cannot be done, keeps them beside the
    /// base, merges into dense weights, and merges and rounds again. Each form is saved, measured as it is loaded
    /// again, and removed.
    ///
    /// # Errors
    /// If a form cannot be made, saved or loaded, or the logits with the adapters beside the reloaded base are not
    /// those of the tuned model.
    pub fn of<T>(
        &self,
        tuned: &Model,
        measure: impl Fn(&Model) -> Result<T>,
    ) -> Result<Vec<Form<T>>> {
        let ways = [OffGrid::Refuse, OffGrid::Dense, OffGrid::Round(self.recipe)];
        let mut forms = Vec::new();
        for off_grid in ways {
            let is_first = matches!(off_grid, OffGrid::Refuse);
            let mut merged = self.base.clone();
            merged.model = tuned.clone();
            match peft::merge_probed(&mut merged.model, off_grid, self.probe) {
                Ok(certificate) => {
                    forms.push(self.merged(merged, certificate, &measure)?);
                    if is_first {
                        // The merged model is packed: the other forms have no advantage.
                        break;
                    }
                }
                Err(peft::Error::MergeIntoPacked { .. }) => {
                    forms.push(self.beside(tuned, &measure)?);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(forms)
    }

    fn merged<T>(
        &self,
        mut merged: Pretrained,
        certificate: Certificate,
        measure: impl Fn(&Model) -> Result<T>,
    ) -> Result<Form<T>> {
        merged.certificate = Some(certificate.clone());
        models::save(&merged, self.dir)?;
        drop(merged);
        let reloaded = models::load_verified(self.dir, self.device)?;
        let reloaded = reloaded.model.with_compute(self.compute)?;
        let n_bytes = weights_bytes(self.dir)?;
        fs::remove_dir_all(self.dir)?;
        let mut layers = certificate.layers.iter();
        let is_dense = layers.all(|layer| layer.format.is_none());
        Ok(Form {
            merge: if is_dense {
                "dense"
            } else {
                certificate.kind()
            }
            .into(),
            kept: measure(&reloaded)?,
            n_bytes,
            retention: certificate.probe.map_or(f64::NAN, |probe| probe.retention),
            certificate: Some(certificate),
        })
    }

    fn beside<T>(&self, tuned: &Model, measure: impl Fn(&Model) -> Result<T>) -> Result<Form<T>> {
        let [beside, of_base] = ["adapters", "base"].map(|name| self.dir.join(name));
        Adapters::of(tuned)?.save(&beside)?;
        models::save(self.base, &of_base)?;
        let mut reloaded = models::load_as(&of_base, self.device, self.compute)?.model;
        let adapters = Adapters::load(&beside, self.device)?;
        peft::activate(&mut reloaded, &adapters)?;
        let n_bytes = weights_bytes(&of_base)? + weights_bytes(&beside)?;
        fs::remove_dir_all(self.dir)?;
        let logits = |model: &Model| -> Vec<f32> {
            let logits = model.forward_spans(self.probe.tokens(), self.probe.spans());
            let logits = logits.into_data().convert::<f32>();
            logits.try_into_vec().expect("converted to f32")
        };
        if bits(&logits(&reloaded)) != bits(&logits(tuned)) {
            return Err("the logits of the reloaded model are not the tuned model's".into());
        }
        Ok(Form {
            merge: "beside".into(),
            kept: measure(&reloaded)?,
            n_bytes,
            retention: 1.0,
            certificate: None,
        })
    }
}
