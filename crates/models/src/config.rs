//! The shapes of models, from Hugging Face's `config.json`.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result};

mod llama;
mod opt;

pub use llama::{LlamaConfig, RopeScaling};
pub use opt::{Activation, OptConfig};

/// Blocks above which a configuration is taken for damaged: each has a list of names.
const MAX_LAYERS: usize = 10_000;

/// The shape of a model of one of the architectures.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// LLaMA, Mistral, Qwen2.
    Llama(LlamaConfig),
    /// OPT.
    Opt(OptConfig),
}

impl Config {
    /// The configuration in a `config.json`, checked; `path` is where it is, for errors.
    ///
    /// # Errors
    /// [`Error::Architecture`] for a model type that there is none of here, [`Error::Config`] for what
    /// makes no model.
    pub fn from_json(json: &Map<String, Value>, path: &Path) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str);
        let model_type = model_type.unwrap_or_default();
        let has_code =
            |code: &Value| !code.is_null() && code.as_object().is_none_or(|code| !code.is_empty());
        if json.get("auto_map").is_some_and(has_code) {
            let problem = format!(
                "names code that comes with the model, which is not run here; if the model is a plain `{model_type}`, remove the key"
            );
            return Err(Fields { path }.refuse("auto_map", problem));
        }
        if LlamaConfig::MODEL_TYPES.contains(&model_type) {
            return LlamaConfig::from_json(json, path).map(Self::Llama);
        }
        match model_type {
            "opt" => OptConfig::from_json(json, path).map(Self::Opt),
            _ => Err(Error::Architecture {
                path: path.into(),
                model_type: model_type.into(),
            }),
        }
    }

    /// A `config.json` of this shape.
    ///
    /// # Panics
    /// As [`LlamaConfig::to_json`].
    pub fn to_json(&self) -> Map<String, Value> {
        match self {
            Self::Llama(config) => config.to_json(),
            Self::Opt(config) => config.to_json(),
        }
    }

    /// Tokens.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(config) => config.vocab_size,
            Self::Opt(config) => config.vocab_size,
        }
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Llama(config) => config.hidden_size,
            Self::Opt(config) => config.hidden_size,
        }
    }

    /// Blocks.
    pub fn num_hidden_layers(&self) -> usize {
        match self {
            Self::Llama(config) => config.num_hidden_layers,
            Self::Opt(config) => config.num_hidden_layers,
        }
    }

    /// Whether the head is the embedding.
    pub fn tie_word_embeddings(&self) -> bool {
        match self {
            Self::Llama(config) => config.tie_word_embeddings,
            Self::Opt(config) => config.tie_word_embeddings,
        }
    }

    /// The same with a head of its own.
    pub(crate) fn untie(&mut self) {
        match self {
            Self::Llama(config) => config.tie_word_embeddings = false,
            Self::Opt(config) => config.tie_word_embeddings = false,
        }
    }

    /// The longest text that the model was made for, in tokens.
    pub fn max_seq_len(&self) -> usize {
        match self {
            Self::Llama(config) => config.max_seq_len(),
            Self::Opt(config) => config.max_position_embeddings,
        }
    }

    /// The projections of a model of this shape with their `[d_in, d_out]`, in the order in which
    /// [`Model`](crate::Model) lists them.
    pub fn projections(&self) -> Vec<(String, [usize; 2])> {
        let of_block = match self {
            Self::Llama(config) => config.projections(),
            Self::Opt(config) => config.projections(),
        };
        let of_block = |layer| {
            let path = self.block_path(layer);
            let all = of_block.iter();
            all.map(move |(name, dims)| (format!("{path}.{name}"), *dims))
        };
        (0..self.num_hidden_layers()).flat_map(of_block).collect()
    }

    /// What the names of a model's tensors begin with, but for those of the head.
    pub(crate) fn prefix(&self) -> &'static str {
        match self {
            Self::Llama(_) => "model",
            Self::Opt(_) => "model.decoder",
        }
    }

    pub(crate) fn block_path(&self, layer: usize) -> String {
        format!("{}.layers.{layer}", self.prefix())
    }
}

impl From<LlamaConfig> for Config {
    fn from(config: LlamaConfig) -> Self {
        Self::Llama(config)
    }
}

impl From<OptConfig> for Config {
    fn from(config: OptConfig) -> Self {
        Self::Opt(config)
    }
}

impl From<&LlamaConfig> for Config {
    fn from(config: &LlamaConfig) -> Self {
        Self::Llama(config.clone())
    }
}

impl From<&OptConfig> for Config {
    fn from(config: &OptConfig) -> Self {
        Self::Opt(config.clone())
    }
}

impl From<&Config> for Config {
    fn from(config: &Config) -> Self {
        config.clone()
    }
}

/// The settings of one file.
struct Fields<'a> {
    path: &'a Path,
}

impl Fields<'_> {
    fn refuse(&self, setting: &str, problem: String) -> Error {
        Error::Config {
            path: self.path.into(),
            setting: setting.into(),
            problem,
        }
    }

    fn read<T: DeserializeOwned>(&self, json: &Map<String, Value>) -> Result<T> {
        let read = serde_json::from_value(Value::Object(json.clone()));
        read.map_err(|error| self.refuse("a setting", format!("cannot be read: {error}")))
    }

    fn check_sizes(&self, sizes: &[(&str, usize)]) -> Result<()> {
        let most = u32::MAX as usize;
        match sizes.iter().find(|(_, size)| !(1..=most).contains(size)) {
            None => Ok(()),
            Some((setting, size)) => {
                let problem = format!("is {size}; it must be 1 to {most}");
                Err(self.refuse(setting, problem))
            }
        }
    }

    fn check_layers(&self, n_layers: usize) -> Result<()> {
        if (1..=MAX_LAYERS).contains(&n_layers) {
            return Ok(());
        }
        let problem = format!("is {n_layers}; it must be 1 to {MAX_LAYERS}");
        Err(self.refuse("num_hidden_layers", problem))
    }
}
