use std::collections::BTreeMap;
use std::fmt;

use quant_core::Format;
use serde::{Deserialize, Serialize};

use crate::{Error, Fingerprint, Linears, Result};

/// How near a merged layer is to the adapted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Exactness {
    /// The merged weight is computed from the same numbers by the same operations: every output
    /// is bit-equal.
    Exact,
    /// Each output, before the bias, differs by at most [`Exactness::bound`] times the sum of the
    /// magnitudes of its terms, for LoRA `Σᵢ |xᵢ| (|W| + σ |A| |B|)ᵢⱼ`, where nothing underflows and
    /// the device's own product of `f32` rounds to `f32` (one that takes TF32 for it does not).
    Bounded {
        /// How often a term is rounded, in `f32`, in the adapted and the merged layer together.
        roundings: usize,
    },
}

impl Exactness {
    /// The relative difference that the roundings can make, `n u / (1 - n u)` with `u = 2⁻²⁴`
    /// (Higham 2002, Accuracy and Stability of Numerical Algorithms, §3.1); 0 if exact.
    pub fn bound(self) -> f64 {
        match self {
            Exactness::Exact => 0.0,
            Exactness::Bounded { roundings } => {
                let n_u = roundings as f64 * 2f64.powi(-24);
                if n_u < 1.0 {
                    n_u / (1.0 - n_u)
                } else {
                    f64::INFINITY
                }
            }
        }
    }
}

/// One merged layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergedLayer {
    /// Its path.
    pub path: String,
    /// The method of the adapter that was folded in.
    pub method: String,
    /// The format the weight has kept; none if it is dense.
    pub format: Option<Format>,
    /// How near the result is.
    pub exactness: Exactness,
}

/// What [`merge`] did, and the fingerprint by which the result is known again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// The merged layers.
    pub layers: Vec<MergedLayer>,
    /// The fingerprint of the merged model.
    pub merged: Fingerprint,
}

impl Certificate {
    /// Whether all layers were merged exactly.
    pub fn is_exact(&self) -> bool {
        self.layers
            .iter()
            .all(|layer| layer.exactness == Exactness::Exact)
    }

    /// Checks that `model` is the merged model of this certificate, such as after it was saved and
    /// loaded again.
    ///
    /// # Errors
    /// [`Error::NotMerged`] if a parameter differs in a bit.
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
        let methods = methods.join(", ");
        let kind = if self.is_exact() { "exact" } else { "bounded" };
        writeln!(
            f,
            "{kind} merge of {n} layers ({methods}); {kept} of them stay packed"
        )?;
        write!(f, "merged model: {}", self.merged)
    }
}

/// Folds every adapter into its weight.
///
/// Packed weights stay packed with the same codes: an adapter that would need others is refused.
///
/// # Errors
/// [`Error::NoAdapters`] if there is nothing to merge, [`Error::MergeIntoPacked`], or another reason
/// why a layer cannot be merged.
/// Then the model is as it was.
pub fn merge<M: Linears>(model: &mut M) -> Result<Certificate> {
    let mut layers = Vec::new();
    let mut weights = BTreeMap::new();
    for (path, linear) in model.linears() {
        let Some(adapter) = &linear.adapter else {
            continue;
        };
        let (weight, exactness) = adapter.merge(&path, &linear.weight)?;
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
            linear.adapter = None;
        }
    }
    let merged = Fingerprint::of(model);
    Ok(Certificate { layers, merged })
}
