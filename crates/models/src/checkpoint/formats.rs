//! The formats of packed layers, each in a file of its own.

use std::path::Path;

use quant_core::QuantTensor;
use serde_json::{Map, Value};

use super::bitsandbytes::{self, Bitsandbytes};
use super::directory::CONFIG;
use super::exact::{self, Exact};
use super::format::{LayerFormat, Layers, PackedLayer, Refusals, refuse_config};
use super::gguf;
use super::gptq::{self, Gptq};
use super::kind::{CheckpointFormat, GptqVersion};
use super::tensors::Tensors;
use crate::source::HEAD;
use crate::{CheckpointError, Result};

impl CheckpointFormat {
    /// Makes the format for the layers of a model with this `config.json`, none of which it refuses.
    ///
    /// # Panics
    /// For GGUF, whose tensors are in another kind of file.
    pub(super) fn for_layers(
        self,
        layers: &Layers,
        config: &Map<String, Value>,
    ) -> Box<dyn LayerFormat> {
        match self {
            CheckpointFormat::QuantCore => Box::new(Exact::for_layers(layers)),
            CheckpointFormat::Gptq(version) => Box::new(Gptq::for_layers(layers, version)),
            CheckpointFormat::Bitsandbytes => Box::new(Bitsandbytes::for_layers(layers, config)),
            CheckpointFormat::Gguf => unreachable!("GGUF has no safetensors"),
        }
    }

    /// The layers that a checkpoint of this format cannot hold, whatever their values.
    pub(super) fn refusals(self, layers: &Layers) -> Refusals {
        let mut refusals = match self {
            CheckpointFormat::QuantCore => return Refusals::new(),
            CheckpointFormat::Gguf => {
                return gguf::refusals(layers.packed.iter().chain(&layers.head));
            }
            CheckpointFormat::Gptq(_) => gptq::refusals(&layers.packed),
            CheckpointFormat::Bitsandbytes => bitsandbytes::refusals(&layers.packed),
        };
        refusals.extend(layers.head.as_ref().map(refuse_head));
        refusals
    }

    /// Checks that a checkpoint of this format can hold the layers, as far as their formats tell.
    pub(super) fn check(self, layers: &Layers) -> Result<()> {
        let refusals = self.refusals(layers);
        if refusals.is_empty() {
            return Ok(());
        }
        let error = CheckpointError::CannotHold {
            format: self,
            layers: refusals,
            instead: Self::instead(|other| other.refusals(layers).is_empty()),
        };
        Err(error.into())
    }

    /// The reasons why a checkpoint of this format cannot hold the values of a weight whose format it
    /// holds.
    pub(super) fn reasons_against_values(self, weight: &QuantTensor) -> Vec<String> {
        match self {
            CheckpointFormat::QuantCore => Vec::new(),
            CheckpointFormat::Gptq(version) => gptq::reasons_against_values(weight, version),
            CheckpointFormat::Bitsandbytes => bitsandbytes::reason_against_values(weight)
                .into_iter()
                .collect(),
            CheckpointFormat::Gguf => gguf::reason_against_values(weight).into_iter().collect(),
        }
    }

    /// A format for layers that this one cannot hold, of which `holds` tells whether a format can.
    pub(super) fn instead(holds: impl Fn(Self) -> bool) -> Self {
        let others = [Self::Gptq(GptqVersion::V2), Self::Bitsandbytes];
        let mut others = others.into_iter();
        others
            .find(|other| holds(*other))
            .unwrap_or(Self::QuantCore)
    }

    /// Opens the format of a directory, if it has packed layers.
    pub(super) fn open(dir: &Path, json: Option<Value>) -> Result<Option<Box<dyn LayerFormat>>> {
        let config = dir.join(CONFIG);
        let Some(json) = json.filter(|json| !json.is_null()) else {
            return Ok(if tensor_files::is_there(&dir.join(gptq::CONFIG_FILE)) {
                Some(Box::new(Gptq::open(dir, None)?))
            } else {
                None
            });
        };
        let method = json.get("quant_method").and_then(Value::as_str);
        Ok(Some(match method.unwrap_or_default() {
            exact::METHOD => Box::new(Exact::open(json, &config)?),
            gptq::METHOD => Box::new(Gptq::open(dir, Some(json))?),
            bitsandbytes::METHOD => Box::new(Bitsandbytes::open(&json, &config)?),
            other => {
                let supported = [exact::METHOD, gptq::METHOD, bitsandbytes::METHOD].join(", ");
                let problem = format!("has the method `{other}`; supported: {supported}");
                return Err(refuse_config(&config, problem));
            }
        }))
    }
}

/// The refusal of a packed head by a format that only packs projections.
fn refuse_head(head: &PackedLayer) -> (String, String) {
    let format = head.format;
    let reason = format!("is {format}, and in such a checkpoint only projections are packed");
    (HEAD.into(), reason)
}

/// The name of a tensor of the layer at `path` in a directory that declares no format, if it is packed.
pub(super) fn undeclared_tensor(tensors: &Tensors, path: &str) -> Option<String> {
    // The name of GPTQ is that of `exact` too.
    gptq::packed_tensor(tensors, path).or_else(|| bitsandbytes::packed_tensor(tensors, path))
}
