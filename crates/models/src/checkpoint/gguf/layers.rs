//! The formats of the packed layers of a saved directory, in `quantization_config`, and what GGUF does not
//! hold.

use std::collections::BTreeMap;
use std::path::Path;

use quant_core::{Format, QuantTensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::blocks::{block_type, refusal};
use crate::Result;
use crate::checkpoint::format::{self, PackedLayer, Refusals, refuse_config};
use crate::checkpoint::kind::CheckpointFormat;

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

    pub(super) fn of(layers: &format::Layers) -> Self {
        let layers = layers.packed.iter().chain(&layers.head);
        let layers = layers.map(|layer| (layer.path.clone(), layer.format));
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

/// The layers that blocks cannot hold, whatever their values.
pub(in crate::checkpoint) fn refusals<'a>(
    layers: impl IntoIterator<Item = &'a PackedLayer>,
) -> Refusals {
    let layers = layers.into_iter();
    let refused = layers.filter_map(|layer| {
        let refusal = refusal(layer.format, layer.dims)?;
        Some((layer.path.clone(), refusal))
    });
    refused.collect()
}

/// The reason why blocks do not hold the values of a weight; none for one that is refused for its format.
pub(in crate::checkpoint) fn reason_against_values(weight: &QuantTensor) -> Option<String> {
    if refusal(weight.format(), weight.dims()).is_some() {
        return None;
    }
    match block_type(weight) {
        Err(problem) => Some(problem),
        Ok(_) if CheckpointFormat::Gguf.stored_grid().holds(weight) => None,
        Ok(of) => Some(format!(
            "has scales or minimums that the f16 of {of} does not hold; round them when merging, or write with `save_gguf`, which measures the effect"
        )),
    }
}
