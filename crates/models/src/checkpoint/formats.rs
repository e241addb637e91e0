//! The formats of packed layers, each in a file of its own, and the format of a directory.

use std::path::Path;

use quant_core::QuantTensor;
use serde_json::{Map, Value};

use super::bitsandbytes::{self, Bitsandbytes};
use super::directory::CONFIG;
use super::exact::{self, Exact};
use super::format::{LayerFormat, Layers, Refusals, refuse_config};
use super::gguf;
use super::gptq::{self, Gptq};
use super::kind::{CheckpointFormat, GptqVersion};
use super::tensors::Tensors;
use crate::settings::Settings;
use crate::source::{HEAD, weight_name};
use crate::{CheckpointError, Config, Result};

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
        let all = layers.packed.iter().chain(&layers.head);
        match self {
            CheckpointFormat::QuantCore => Refusals::new(),
            CheckpointFormat::Gguf => gguf::refusals(all),
            CheckpointFormat::Gptq(version) => gptq::refusals(all, version),
            CheckpointFormat::Bitsandbytes => bitsandbytes::refusals(all),
        }
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
            CheckpointFormat::Gptq(_) => gptq::reasons_against_values(weight),
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
}

/// The tensors of a directory, and the format of those that are packed.
pub(super) struct Weights {
    pub(super) tensors: Tensors,
    pub(super) format: Option<Box<dyn LayerFormat>>,
}

/// Opens the tensors of the directory of a model of this shape, and their format, which the
/// `quantization_config` of `config.json` states, or `quantize_config.json`.
pub(super) fn open(dir: &Path, embedded: Option<Value>, shape: &Config) -> Result<Weights> {
    let config = dir.join(CONFIG);
    let embedded = embedded.filter(|json| !json.is_null());
    let method = match &embedded {
        Some(json) => Some(method(json, &config)?),
        None => None,
    };
    let files = match method.as_deref() {
        None | Some(gptq::METHOD) => gptq::config_files(dir, embedded.as_ref())?,
        Some(_) => Vec::new(),
    };
    let [told, made_up] = gptq::base_names(&files);
    let mut tensors = Tensors::open(dir, &told, &made_up, shape)?;
    let layers = shape.projections();
    let paths = layers.iter().map(|(path, _)| path.as_str());
    let packed = paths
        .chain([HEAD])
        .find_map(|path| packed_tensor(&tensors, path));
    if embedded.is_none() && files.is_empty() {
        return match packed {
            None => Ok(Weights {
                tensors,
                format: None,
            }),
            Some(tensor) => {
                let path = tensors.path(&tensor);
                Err(CheckpointError::UnstatedQuantization { path, tensor }.into())
            }
        };
    }
    if packed.is_none() && are_dense(&layers, &mut tensors)? {
        let (path, advice) = match &embedded {
            Some(_) => (config, "remove its `quantization_config`"),
            None => (dir.join(gptq::CONFIG_FILE), "remove the file"),
        };
        let method = method.unwrap_or(gptq::METHOD.into());
        let error = CheckpointError::StaleQuantization {
            path,
            method,
            advice,
        };
        return Err(error.into());
    }
    let format: Box<dyn LayerFormat> = match (method.as_deref(), &embedded) {
        (Some(exact::METHOD), Some(json)) => Box::new(Exact::open(json, &config)?),
        (Some(bitsandbytes::METHOD), Some(json)) => Box::new(Bitsandbytes::open(json, &config)?),
        (None | Some(gptq::METHOD), _) => Box::new(Gptq::open(files, &mut tensors)?),
        (Some(other), _) => {
            let supported = [exact::METHOD, gptq::METHOD, bitsandbytes::METHOD].join(", ");
            let problem = format!("has the method `{other}`; supported: {supported}");
            return Err(refuse_config(&config, problem));
        }
    };
    Ok(Weights {
        tensors,
        format: Some(format),
    })
}

/// The method of a `quantization_config`. Older ones of bitsandbytes do not state it.
fn method(json: &Value, config: &Path) -> Result<String> {
    let settings = Settings::within(json, config, "quantization_config")?;
    if let Some(method) = settings.optional_text("quant_method")? {
        return Ok(method.to_lowercase());
    }
    if bitsandbytes::is_stated(&settings)? {
        return Ok(bitsandbytes::METHOD.into());
    }
    Err(settings.refuse(
        "quant_method",
        "is missing; it is what tells the formats apart",
    ))
}

/// The name of a tensor of the layer at `path` in whatever format, if it is packed.
fn packed_tensor(tensors: &Tensors, path: &str) -> Option<String> {
    // The name of GPTQ is that of `exact` too.
    gptq::packed_tensor(tensors, path).or_else(|| bitsandbytes::packed_tensor(tensors, path))
}

/// Whether all layers have weights of floats, of their dimensions.
fn are_dense(layers: &[(String, [usize; 2])], tensors: &mut Tensors) -> Result<bool> {
    for (path, [d_in, d_out]) in layers {
        let name = weight_name(path);
        if !tensors.contains(&name)
            || tensors.shape(&name)? != [*d_out, *d_in]
            || !["F32", "F16", "BF16"].contains(&tensors.dtype(&name)?.as_str())
        {
            return Ok(false);
        }
    }
    Ok(true)
}
