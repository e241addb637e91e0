//! The formats of the packed layers of a saved directory, in `quantization_config`, and what GGUF does not
//! hold.

use std::collections::BTreeMap;
use std::path::Path;

use quant_core::Format;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::blocks::{block_type, refusal};
use crate::Result;
use crate::checkpoint::format::{PackedFormat, Projections, Refusals, refuse_config};
use crate::checkpoint::kind::CheckpointFormat;
use crate::source::HEAD;

/// The `quant_method` of a directory.
pub(in crate::checkpoint) const METHOD: &str = "gguf";
const VERSION: u32 = 1;

/// `quantization_config` in `config.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Layers {
    quant_method: String,
    format_version: u32,
    layers: BTreeMap<String, Format>,
}

impl Layers {
    pub(super) fn open(json: Value, config: &Path) -> Result<Self> {
        let refuse = |problem| Err(refuse_config(config, problem));
        match serde_json::from_value::<Self>(json) {
            Err(error) => refuse(format!("cannot be read: {error}")),
            Ok(found) if found.format_version != VERSION => {
                let version = found.format_version;
                refuse(format!(
                    "has the version {version}; this program reads {VERSION}"
                ))
            }
            Ok(found) => Ok(found),
        }
    }

    pub(super) fn of(model: &Projections) -> Self {
        let layers = packed(model).map(|(path, weight)| (path.to_owned(), weight.format()));
        Self {
            quant_method: METHOD.into(),
            format_version: VERSION,
            layers: layers.collect(),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("strings and numbers")
    }

    /// The format of a layer, if it is packed.
    pub(super) fn format(&self, path: &str) -> Option<Format> {
        self.layers.get(path).copied()
    }

    /// Checks that all layers are of the model.
    pub(super) fn check_paths(&self, paths: &[String], config: &Path) -> Result<()> {
        match self.layers.keys().find(|path| !paths.contains(path)) {
            None => Ok(()),
            Some(path) => {
                let problem =
                    format!("lists `{path}`, which is no projection of the model and no head");
                Err(refuse_config(config, problem))
            }
        }
    }
}

/// The packed layers of a model, with its head.
pub(super) fn packed<'a>(
    model: &'a Projections,
) -> impl Iterator<Item = (&'a str, &'a quant_core::QuantTensor)> {
    let layers = model.packed.iter();
    let layers = layers.map(|(path, weight)| (path.as_str(), *weight));
    layers.chain(model.head.map(|head| (HEAD, head)))
}

/// The layers that blocks cannot hold, whatever their values.
pub(in crate::checkpoint) fn refusals(layers: &[PackedFormat]) -> Refusals {
    let refused = layers.iter().filter_map(|&(path, format, dims)| {
        let refusal = refusal(format, dims)?;
        Some((path.into(), refusal))
    });
    refused.collect()
}

/// The layers that blocks do not hold exactly.
pub(in crate::checkpoint) fn refused(model: &Projections) -> Refusals {
    let refused = packed(model).filter_map(|(path, weight)| {
        let problem = match block_type(weight) {
            Err(problem) => problem,
            Ok(_) if CheckpointFormat::Gguf.stored_grid().holds(weight) => return None,
            Ok(of) => format!(
                "has scales or minimums that the f16 of {of} does not hold; round them when merging, or write with `save_gguf`, which measures the effect"
            ),
        };
        Some((path.into(), problem))
    });
    refused.collect()
}
