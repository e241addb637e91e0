//! The list of architectures. A new one adds a line to each list of this file.

use std::ops::Range;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Identity, Linear, Spans};
use serde_json::{Map, Value};

use crate::architecture::{Architecture, DecoderBlock, Projection, Shape};
use crate::fields::Fields;
use crate::kv_cache::KvCache;
use crate::llama::{LlamaBlock, LlamaConfig};
use crate::norm::Norm;
use crate::opt::{OptBlock, OptConfig};
use crate::positions::Positions;
use crate::source::{Shapes, Source};
use crate::{ConfigError, Result};

#[cfg(test)]
mod tests;

/// The shape of a model of one of the architectures, from Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// LLaMA, Mistral, Qwen2.
    Llama(LlamaConfig),
    /// OPT.
    Opt(OptConfig),
}

/// A block of one of the architectures.
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "all blocks of a model are of one variant"
)]
pub(crate) enum Block {
    Llama(LlamaBlock),
    Opt(OptBlock),
}

/// Evaluates an expression on the configuration or the block of any architecture.
macro_rules! of {
    ($enum:ident, $value:expr, $of:ident => $result:expr) => {
        match $value {
            $enum::Llama($of) => $result,
            $enum::Opt($of) => $result,
        }
    };
}

/// The reader of each architecture.
const READERS: [(&[&str], Reader); 2] = [
    (LlamaConfig::MODEL_TYPES, |json, path| {
        LlamaConfig::from_json(json, path).map(Config::Llama)
    }),
    (OptConfig::MODEL_TYPES, |json, path| {
        OptConfig::from_json(json, path).map(Config::Opt)
    }),
];

type Reader = fn(&Map<String, Value>, &Path) -> Result<Config>;

impl Block {
    /// Builds the block at `path`.
    pub(crate) fn build<S: Source>(
        config: &Config,
        path: String,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        match config {
            Config::Llama(config) => config.build_block(path, source).map(Self::Llama),
            Config::Opt(config) => config.build_block(path, source).map(Self::Opt),
        }
    }

    /// The projections of each stage.
    pub(crate) fn stages(&self) -> Vec<Range<usize>> {
        of!(Self, self, block => block.stages())
    }

    /// The projections, with their paths in the block.
    pub(crate) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        of!(Self, self, block => block.linears())
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        of!(Self, self, block => block.linears_mut())
    }

    /// The norms, with their paths in the block.
    pub(crate) fn norms(&self) -> Vec<(&'static str, &Norm)> {
        of!(Self, self, block => block.norms())
    }

    /// See [`DecoderBlock::attend`].
    pub(crate) fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        of!(Self, self, block => block.attend(input, positions, cache))
    }

    /// See [`DecoderBlock::enter`].
    pub(crate) fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        of!(Self, self, block => block.enter(x))
    }

    /// See [`DecoderBlock::advance`].
    pub(crate) fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        of!(Self, self, block => block.advance(stage, residual, input))
    }

    /// See [`DecoderBlock::forward`].
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        of!(Self, self, block => block.forward(x, positions, cache))
    }
}

impl Config {
    /// Reads and checks the `config.json` at `path`.
    ///
    /// # Errors
    /// [`ConfigError::Architecture`] for a model type of no known architecture,
    /// [`ConfigError::Setting`] for a setting that is missing, out of range or not supported.
    ///
    /// # Examples
    /// ```
    /// use std::path::Path;
    ///
    /// let mut json = models::OptConfig::default().to_json();
    /// let config = models::Config::from_json(&json, Path::new("config.json"))?;
    /// assert_eq!(config.num_hidden_layers(), 12);
    /// json["num_attention_heads"] = 5.into();
    /// let error = models::Config::from_json(&json, Path::new("config.json")).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "`config.json`: num_attention_heads is 5, which does not divide the hidden size 768"
    /// );
    /// # Ok::<(), models::Error>(())
    /// ```
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
        let reads = |(model_types, _): &&(&[&str], Reader)| model_types.contains(&model_type);
        match READERS.iter().find(reads) {
            Some((_, read)) => read(json, path),
            None => {
                let error = ConfigError::Architecture {
                    path: path.into(),
                    model_type: model_type.into(),
                    supported: READERS.map(|(types, _)| types.join(", ")).join(", "),
                };
                Err(error.into())
            }
        }
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// As [`LlamaConfig::to_json`].
    pub fn to_json(&self) -> Map<String, Value> {
        of!(Self, self, config => config.to_json())
    }

    /// The number of tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.shape().vocab_size
    }

    /// The width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.shape().hidden_size
    }

    /// The number of blocks.
    pub fn num_hidden_layers(&self) -> usize {
        self.shape().n_layers
    }

    /// Whether the embedding is the head as well.
    pub fn tie_word_embeddings(&self) -> bool {
        self.shape().tie_word_embeddings
    }

    /// The longest text that the model was trained for, in tokens.
    pub fn max_seq_len(&self) -> usize {
        self.shape().max_seq_len
    }

    /// The projections of a model of this shape with their `[d_in, d_out]`, in the order in which
    /// [`Model`](crate::Model) lists them.
    pub fn projections(&self) -> Vec<(String, [usize; 2])> {
        let shape = self.shape();
        let of_block = of!(Self, self, config => config.projections());
        let of_block = |layer| {
            let path = shape.block_path(layer);
            let all = of_block.iter();
            all.map(move |Projection { name, dims, .. }| (format!("{path}.{name}"), *dims))
        };
        (0..shape.n_layers).flat_map(of_block).collect()
    }

    /// The projections and the norms of all blocks, each with the names and shapes of the tensors that a file
    /// of a dense model has.
    pub(crate) fn block_modules(&self) -> impl Iterator<Item = (String, Shapes)> {
        (0..self.shape().n_layers).flat_map(move |layer| {
            let path = self.block_path(layer);
            of!(Self, self, config => config.modules(&path))
        })
    }

    /// The first part of the names of all tensors but the head's.
    pub(crate) fn prefix(&self) -> &'static str {
        self.shape().prefix
    }

    /// The path of a block.
    pub(crate) fn block_path(&self, layer: usize) -> String {
        self.shape().block_path(layer)
    }

    pub(crate) fn shape(&self) -> Shape {
        of!(Self, self, config => config.shape())
    }

    /// See [`Architecture::identity`].
    pub(crate) fn identity(&self) -> Identity {
        of!(Self, self, config => config.identity())
    }

    pub(crate) fn positions(&self, spans: &Spans) -> Positions {
        of!(Self, self, config => config.positions(spans))
    }

    /// Gives the model a head that is not the embedding.
    pub(crate) fn untie(&mut self) {
        of!(Self, self, config => config.tie_word_embeddings = false);
    }
}

/// Converts the configuration of an architecture, by value or by reference.
macro_rules! from {
    ($($config:ident => $variant:ident,)+) => {
        $(
            impl From<$config> for Config {
                fn from(config: $config) -> Self {
                    Self::$variant(config)
                }
            }

            impl From<&$config> for Config {
                fn from(config: &$config) -> Self {
                    Self::$variant(config.clone())
                }
            }
        )+
    };
}

from! {
    LlamaConfig => Llama,
    OptConfig => Opt,
}

impl From<&Config> for Config {
    fn from(config: &Config) -> Self {
        config.clone()
    }
}
