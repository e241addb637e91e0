use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use quant_core::Format;
use serde::{Deserialize, Serialize};

use crate::adapter::number;
use crate::{Error, Exactness, Fingerprint, Linears, Result};

/// The method of a layer without an adapter.
pub(crate) const NO_METHOD: &str = "none";

/// One merged layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergedLayer {
    /// The path of the layer.
    pub path: String,
    /// The method of its adapter; `none` of a layer without one, which was rounded for a file.
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
    #[serde(deserialize_with = "number")]
    pub max_adapter_change: f64,
    /// The largest change of a logit of the adapted model by the merge.
    #[serde(deserialize_with = "number")]
    pub max_merge_change: f64,
    /// The part of the adapters' change that is kept, `⟨m - b, a - b⟩ / ‖a - b‖²` over the logits `b`
    /// of the base, `a` of the adapted and `m` of the merged model; 1 if all of it is.
    #[serde(deserialize_with = "number")]
    pub retention: f64,
}

/// The result of [`merge`](crate::merge()) layer by layer, and the fingerprint of the merged model.
///
/// A certificate is a JSON file. One that lists no layers is not read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Certificate {
    /// The merged layers, and those that were rounded for a file.
    pub layers: Vec<MergedLayer>,
    /// The fingerprint of the merged model.
    pub merged: Fingerprint,
    /// The logits of a batch before and after, from [`merge_probed`](crate::merge_probed).
    pub probe: Option<Probe>,
}

/// `certificate.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// Raised when the meaning of a file changes; files of the first version do not state it.
    #[serde(default = "first_version")]
    format_version: u32,
    layers: Vec<MergedLayer>,
    merged: Fingerprint,
    probe: Option<Probe>,
}

/// In the first version, a fingerprint covers the parameters only; in 2, it does not tell them apart.
const FORMAT_VERSIONS: [u32; 3] = [1, 2, 3];

fn first_version() -> u32 {
    FORMAT_VERSIONS[0]
}

impl From<Certificate> for Stored {
    fn from(certificate: Certificate) -> Self {
        let Certificate {
            layers,
            merged,
            probe,
        } = certificate;
        Self {
            // A certificate that was read from an older file promises no more than it did.
            format_version: merged.version(FORMAT_VERSIONS),
            layers,
            merged,
            probe,
        }
    }
}

impl TryFrom<Stored> for Certificate {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        let Stored {
            format_version,
            layers,
            merged,
            probe,
        } = stored;
        merged.check_version(FORMAT_VERSIONS, format_version)?;
        let certificate = Self {
            layers,
            merged,
            probe,
        };
        certificate.check()?;
        Ok(certificate)
    }
}

impl Certificate {
    /// Writes a JSON file atomically, and replaces an existing one.
    ///
    /// # Errors
    /// [`tensor_files::Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(tensor_files::write_json(path.as_ref(), self)?)
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// [`tensor_files::Error::File`] if it is no certificate, or one without layers.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Ok(tensor_files::read_json(path.as_ref())?)
    }

    /// Checks that it is for layers, each of them once.
    fn check(&self) -> Result<(), String> {
        if self.layers.is_empty() {
            return Err("lists no merged layers, so that it certifies nothing".into());
        }
        let mut paths = BTreeSet::new();
        match self.layers.iter().find(|layer| !paths.insert(&layer.path)) {
            Some(layer) => Err(format!("lists layer `{}` twice", layer.path)),
            None => Ok(()),
        }
    }

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
    /// What the fingerprint does not cover is not checked: see [`Fingerprint::not_covered`].
    ///
    /// # Errors
    /// [`Error::NotMerged`] if a parameter differs in any bit, or a setting or the tokenizer differs;
    /// [`Error::AlreadyAdapted`] if a layer has an adapter; [`Error::NotCertified`] if the model
    /// lacks a layer of the certificate, or has it in another format; [`Error::Certificate`] if it lists no
    /// layers, or one twice.
    pub fn verify(&self, model: &impl Linears) -> Result<()> {
        self.check()
            .map_err(|problem| Error::Certificate { problem })?;
        let mut formats = BTreeMap::new();
        for (path, linear) in model.linears() {
            if linear.adapter.is_some() {
                return Err(Error::AlreadyAdapted { path });
            }
            formats.insert(path, linear.weight.format());
        }
        let found = Fingerprint::of(model);
        if !self.merged.differences(&found).is_empty() {
            let expected = self.merged.clone();
            return Err(Error::NotMerged { expected, found });
        }
        let is_other = |layer: &&MergedLayer| formats.get(&layer.path) != Some(&layer.format);
        match self.layers.iter().find(is_other) {
            Some(layer) => Err(Error::NotCertified {
                path: layer.path.clone(),
            }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let layers = self.layers.iter().map(|layer| layer.method.as_str());
        let mut methods: Vec<&str> = layers.filter(|&method| method != NO_METHOD).collect();
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
        write!(f, "merged model: {}", self.merged)?;
        let not_covered = self.merged.not_covered();
        if !not_covered.is_empty() {
            write!(f, "\nnot covered: {}", not_covered.join(", "))?;
        }
        Ok(())
    }
}
