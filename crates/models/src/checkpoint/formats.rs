//! The formats of packed layers, each in a file of its own.

use std::path::Path;

use serde_json::{Map, Value};

use super::bitsandbytes::{self, Bitsandbytes};
use super::directory::CONFIG;
use super::exact::{self, Exact};
use super::format::{LayerFormat, PackedFormat, Projections, Refusals, refuse_config};
use super::gguf;
use super::gptq::{self, Gptq};
use super::kind::{CheckpointFormat, GptqVersion};
use super::tensors::Tensors;
use crate::Result;

impl CheckpointFormat {
    /// Makes the format for the layers of a model with this `config.json`.
    ///
    /// # Panics
    /// For GGUF, whose tensors are in another kind of file.
    pub(super) fn for_model(
        self,
        model: &Projections,
        config: &Map<String, Value>,
    ) -> Result<Box<dyn LayerFormat>, Refusals> {
        Ok(match self {
            CheckpointFormat::QuantCore => Box::new(Exact::for_model(model)),
            CheckpointFormat::Gptq(version) => Box::new(Gptq::for_model(model, version)?),
            CheckpointFormat::Bitsandbytes => Box::new(Bitsandbytes::for_model(model, config)?),
            CheckpointFormat::Gguf => unreachable!("GGUF has no safetensors"),
        })
    }

    /// The layers that a checkpoint of this format cannot hold, whatever their values.
    pub(super) fn refusals(self, layers: &[PackedFormat]) -> Refusals {
        match self {
            CheckpointFormat::QuantCore => Refusals::new(),
            CheckpointFormat::Gptq(_) => gptq::refusals(layers),
            CheckpointFormat::Bitsandbytes => bitsandbytes::refusals(layers),
            CheckpointFormat::Gguf => gguf::refusals(layers),
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

/// The name of a tensor of the layer at `path` in a directory that declares no format, if it is packed.
pub(super) fn undeclared_tensor(tensors: &Tensors, path: &str) -> Option<String> {
    // The name of GPTQ is that of `exact` too.
    gptq::packed_tensor(tensors, path).or_else(|| bitsandbytes::packed_tensor(tensors, path))
}
