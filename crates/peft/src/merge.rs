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
        writeln!(
            f,
            "exact merge of {n} layers ({methods}); {kept} of them stay packed"
        )?;
        write!(f, "merged model: {}", self.merged)
    }
}

/// Folds every adapter into its weight.
///
/// Packed weights stay packed with the same codes; nothing is rounded.
///
/// # Errors
/// [`Error::NoAdapters`] if there is nothing to merge, or the reason why a layer cannot be merged.
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
