//! The shape of a model, and its blocks, of any of the [`architectures`](crate::architectures).

use std::ops::Range;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Identity, Linear, Spans};
use serde_json::{Map, Value};

use crate::architecture::{Architecture, DecoderBlock, Projection, Shape};
use crate::architectures::architectures;
use crate::kv_cache::KvCache;
use crate::norm::Norm;
use crate::positions::{Positions, Reach};
use crate::settings::Settings;
use crate::source::{Shapes, Source};
use crate::{ConfigError, Result};

#[cfg(test)]
mod keys;
#[cfg(test)]
mod tests;

/// The block of an architecture.
type BlockOf<C> = <C as Architecture>::Block;

/// Defines what has a case for each architecture.
macro_rules! define {
    ([] $($(#[$doc:meta])* $name:ident $config:ty;)+) => {
        /// The shape of a model of one of the architectures, from Hugging Face's `config.json`.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub enum Config {
            $($(#[$doc])* $name($config),)+
        }

        /// A block of one of the architectures.
        #[derive(Module, Debug)]
        #[expect(
            clippy::large_enum_variant,
            reason = "all blocks of a model are of one variant"
        )]
        pub(crate) enum Block {
            $($name(BlockOf<$config>),)+
        }

        impl Config {
            /// Reads the settings of a model type, if it is one of an architecture.
            fn read(model_type: &str, settings: &Settings) -> Option<Result<Self>> {
                $(
                    let mut of_architecture = <$config>::MODEL_TYPES.iter();
                    if let Some(found) = of_architecture.find(|of| of.name == model_type) {
                        return Some((found.read)(settings).map(Self::$name));
                    }
                )+
                None
            }

            /// The model types of all architectures.
            pub(crate) fn model_types() -> Vec<&'static str> {
                let mut all = Vec::new();
                $(all.extend(<$config>::MODEL_TYPES.iter().map(|of| of.name));)+
                all
            }
        }

        impl Block {
            /// Builds the block of a layer.
            pub(crate) fn build<S: Source>(
                config: &Config,
                layer: usize,
                source: &mut S,
            ) -> Result<Self, S::Error> {
                match config {
                    $(Config::$name(config) => config.build_block(layer, source).map(Self::$name),)+
                }
            }
        }

        $(
            impl From<$config> for Config {
                fn from(config: $config) -> Self {
                    Self::$name(config)
                }
            }

            impl From<&$config> for Config {
                fn from(config: &$config) -> Self {
                    Self::$name(config.clone())
                }
            }
        )+
    };
}

architectures!(define);

/// See [`of`].
macro_rules! match_each {
    (
        [$enum:ident, $value:expr, $of:ident => $result:expr]
        $($(#[$doc:meta])* $name:ident $config:ty;)+
    ) => {
        match $value {
            $($enum::$name($of) => $result,)+
        }
    };
}

/// Evaluates an expression on the configuration or the block of any architecture.
macro_rules! of {
    ($($arguments:tt)*) => {
        architectures!(match_each $($arguments)*)
    };
}

/// The settings of a `config.json` that no output depends on: of training, of generation, of other tasks
/// and of programs.
const WITHOUT_EFFECT: &[&str] = &[
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "model_type",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

impl Block {
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
        Self::from_settings(&Settings::new(json, path), path)
    }

    fn from_settings(settings: &Settings, path: &Path) -> Result<Self> {
        let model_type = settings.get("model_type").and_then(Value::as_str);
        let model_type = model_type.unwrap_or_default();
        let has_code =
            |code: &Value| !code.is_null() && code.as_object().is_none_or(|code| !code.is_empty());
        if settings.get("auto_map").is_some_and(has_code) {
            let problem = format!(
                "names code that comes with the model, which is not run here; if the model is a plain `{model_type}`, remove the key"
            );
            return Err(settings.refuse("auto_map", problem));
        }
        settings.ignore(WITHOUT_EFFECT);
        // What transformers reads for every model type.
        settings.only("is_causal", true)?;
        settings.only("is_encoder_decoder", false)?;
        if settings.has("per_layer_config") {
            let problem = "has settings of single layers, which are not supported";
            return Err(settings.refuse("per_layer_config", problem));
        }
        Self::read(model_type, settings).unwrap_or_else(|| {
            let error = ConfigError::Architecture {
                path: path.into(),
                model_type: model_type.into(),
                supported: Self::model_types().join(", "),
            };
            Err(error.into())
        })
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If no `config.json` has this shape, such as one with a rope scaling, or with biases or windows that the
    /// model type does not have.
    pub fn to_json(&self) -> Map<String, Value> {
        let json = of!(Self, self, config => config.to_json());
        let read = Self::from_json(&json, Path::new("config.json")).expect("the shape of a model");
        assert!(
            read.identity() == self.identity() && read.block_modules().eq(self.block_modules()),
            "no config.json has this shape"
        );
        json
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
            let path = self.shape().block_path(layer);
            of!(Self, self, config => config.modules(&path))
        })
    }

    /// The path of a block.
    pub(crate) fn block_path(&self, layer: usize) -> String {
        self.shape().block_path(layer)
    }

    pub(crate) fn shape(&self) -> Shape {
        of!(Self, self, config => config.shape())
    }

    /// The settings that the outputs depend on and that parameters and their shapes do not show.
    pub(crate) fn identity(&self) -> Identity {
        let identity = of!(Self, self, config => config.identity());
        let layers = 0..self.num_hidden_layers();
        let max_len = self.max_seq_len();
        let layers = layers.map(|layer| self.reach(layer).within(max_len));
        Reach::state(identity, &layers.collect::<Vec<_>>())
    }

    fn reach(&self, layer: usize) -> Reach {
        of!(Self, self, config => config.reach(layer))
    }

    /// The positions of the tokens of sequences.
    pub(crate) fn positions(&self, spans: &Spans) -> Positions {
        let reaches = of!(Self, self, config => config.reaches());
        let learned = self.shape().learned_positions;
        let rows = learned.map(|learned| spans.positions() + learned.first_row as i64);
        Positions::new(&reaches, rows, spans)
    }

    /// Gives the model a head that is not the embedding.
    pub(crate) fn untie(&mut self) {
        of!(Self, self, config => config.untie());
    }
}

impl From<&Config> for Config {
    fn from(config: &Config) -> Self {
        config.clone()
    }
}
