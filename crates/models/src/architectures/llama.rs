//! LLaMA (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention, and the model types that
//! share its block.

use burn::module::Module;
use burn::tensor::Tensor;
use peft::Identity;
use serde_json::{Map, Value, json};

use super::gated::gated_parts;
use super::layer_attention::LayerAttention;
use crate::Result;
use crate::activation::Activation;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Names, Parts, Shape};
use crate::attention::{Attention, Heads};
use crate::kv_cache::KvCache;
use crate::mlp::GatedMlp;
use crate::norm::{Norm, NormKind};
use crate::positions::{Positions, Reach};
use crate::rope::Rotary;
use crate::rope_scaling::{self, OfModel, RopeScaling};
use crate::settings::{Settings, setters};
use crate::source::Source;

mod mistral;
pub(super) mod qwen2;
mod smollm3;

/// The shape of a LLaMA, whose block Mistral, Qwen2 and SmolLM3 share.
///
/// The default is the shape of Llama-2-7B.
///
/// # Examples
/// ```
/// let config = models::LlamaConfig::default()
///     .with_vocab_size(64)
///     .with_hidden_size(32)
///     .with_intermediate_size(80)
///     .with_num_hidden_layers(2)
///     .with_num_attention_heads(4)
///     .with_num_key_value_heads(2)
///     .with_head_dim(8);
/// let model = models::Model::init(config, 0, &burn::tensor::Device::flex());
/// assert_eq!(model.config().projections().len(), 14);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// The number of tokens of the vocabulary.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The width inside the MLP.
    pub intermediate_size: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// The number of heads of the queries.
    pub num_attention_heads: usize,
    /// The number of heads of keys and values, a divisor of `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// The width of a head.
    pub head_dim: usize,
    /// The longest text that the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// The number of tokens that a token attends to, itself included, in layers with a window.
    pub sliding_window: Option<usize>,
    /// The attention of each layer, if they differ. Without it all layers rotate queries and keys, and
    /// have the window if there is one.
    pub layer_attention: Option<Vec<LayerAttention>>,
    /// The constant that the norms add to the mean square.
    pub rms_norm_eps: f64,
    /// The base of the frequencies of the rotary embedding.
    pub rope_theta: f64,
    /// The scaling of the frequencies for longer texts.
    pub rope_scaling: RopeScaling,
    /// The activation function of the MLP.
    pub hidden_act: Activation,
    /// Whether queries, keys and values have biases.
    pub attention_bias: bool,
    /// Whether the output projection of the attention has a bias.
    pub attention_output_bias: bool,
    /// Whether the projections of the MLP have biases.
    pub mlp_bias: bool,
    /// Whether the embedding is the head as well.
    pub tie_word_embeddings: bool,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            max_position_embeddings: 4096,
            sliding_window: None,
            layer_attention: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            hidden_act: Activation::Silu,
            attention_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
        }
    }
}

setters! {
    LlamaConfig:
    with_vocab_size vocab_size usize,
    with_hidden_size hidden_size usize,
    with_intermediate_size intermediate_size usize,
    with_num_hidden_layers num_hidden_layers usize,
    with_num_attention_heads num_attention_heads usize,
    with_num_key_value_heads num_key_value_heads usize,
    with_head_dim head_dim usize,
    with_max_position_embeddings max_position_embeddings usize,
    with_sliding_window sliding_window impl Into<Option<usize>>,
    with_layer_attention layer_attention impl Into<Option<Vec<LayerAttention>>>,
    with_rms_norm_eps rms_norm_eps f64,
    with_rope_theta rope_theta f64,
    with_rope_scaling rope_scaling RopeScaling,
    with_hidden_act hidden_act Activation,
    with_attention_bias attention_bias bool,
    with_attention_output_bias attention_output_bias bool,
    with_mlp_bias mlp_bias bool,
    with_tie_word_embeddings tie_word_embeddings bool,
}

/// What a configuration class of transformers assumes where `config.json` is silent.
pub(super) struct Defaults {
    /// That of the queries if there is none.
    pub(super) num_key_value_heads: Option<usize>,
    /// The hidden size by the heads if there is none.
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    /// The key of the activation function, and the function.
    pub(super) activation: (&'static str, Activation),
    pub(super) tie_word_embeddings: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            activation: ("hidden_act", Activation::Silu),
            tie_word_embeddings: false,
        }
    }
}

impl LlamaConfig {
    /// `llama`: all layers alike, without a window, with biases as stated.
    fn read_llama(settings: &Settings) -> Result<Self> {
        let config = Self::read(settings, Defaults::default())?;
        // A product in parts, which is the same.
        settings.ignore(&["pretraining_tp"]);
        let bias = settings.flag_or("attention_bias", false)?;
        let config = config
            .with_attention_bias(bias)
            .with_attention_output_bias(bias)
            .with_mlp_bias(settings.flag_or("mlp_bias", false)?);
        config.read_rotary(settings, 10_000.0)
    }

    /// Reads the settings that all model types have.
    pub(super) fn read(settings: &Settings, defaults: Defaults) -> Result<Self> {
        settings.ignore(&["attention_dropout"]);
        let (hidden, heads) = (
            settings.width("hidden_size")?,
            settings.size("num_attention_heads")?,
        );
        let kv_heads =
            settings.optional_size_or("num_key_value_heads", defaults.num_key_value_heads)?;
        let kv_heads = kv_heads.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("is {kv_heads}, which does not divide the {heads} heads");
            return Err(settings.refuse("num_key_value_heads", problem));
        }
        let head_dim = settings.optional_size_or("head_dim", defaults.head_dim)?;
        if head_dim.is_none() && !hidden.is_multiple_of(heads) {
            let problem = format!("is {heads}, which does not divide the hidden size {hidden}");
            return Err(settings.refuse("num_attention_heads", problem));
        }
        let head_dim = head_dim.unwrap_or(hidden / heads);
        if !head_dim.is_multiple_of(2) {
            let problem = format!("is {head_dim}; rotary embeddings turn pairs");
            return Err(settings.refuse("head_dim", problem));
        }
        settings.check_width("head_dim", heads.saturating_mul(head_dim))?;
        let (key, activation) = defaults.activation;
        let max = defaults.max_position_embeddings;
        Ok(Self {
            vocab_size: settings.width("vocab_size")?,
            hidden_size: hidden,
            intermediate_size: settings.width("intermediate_size")?,
            num_hidden_layers: settings.layers("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: settings.size_or("max_position_embeddings", max)?,
            rms_norm_eps: settings.positive_or("rms_norm_eps", defaults.rms_norm_eps)?,
            hidden_act: settings.activation_or(key, activation)?,
            tie_word_embeddings: settings
                .flag_or("tie_word_embeddings", defaults.tie_word_embeddings)?,
            ..Self::default()
        })
    }

    /// Reads the rotation of whole heads in all layers.
    pub(super) fn read_rotary(self, settings: &Settings, theta: f64) -> Result<Self> {
        let of_model = self.of_model().with_theta(theta);
        let rotary = rope_scaling::read(settings, of_model)?;
        let rotary = rope_scaling::whole_heads(settings, rotary, self.head_dim)?;
        Ok(self.with_rotary(rotary))
    }

    /// What its rotations depend on.
    pub(super) fn of_model(&self) -> OfModel {
        OfModel::new(self.head_dim, self.max_position_embeddings)
    }

    pub(super) fn with_rotary(self, rotary: Rotary) -> Self {
        self.with_rope_theta(rotary.theta)
            .with_rope_scaling(rotary.scaling)
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling, or a combination of biases and windows that no model type has. Such
    /// models are loaded from files, whose `config.json` is kept.
    pub fn to_json(&self) -> Map<String, Value> {
        with_settings(self.common_json(), self.of_type())
    }

    /// The settings that all model types have.
    ///
    /// # Panics
    /// If there is a rope scaling.
    pub(super) fn common_json(&self) -> Value {
        assert_eq!(
            self.rope_scaling,
            RopeScaling::None,
            "a new model has no rope scaling"
        );
        json!({
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": self.hidden_act.name(),
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": null,
            "tie_word_embeddings": self.tie_word_embeddings,
            // The defaults of some model types are beyond a small vocabulary.
            "bos_token_id": null,
            "eos_token_id": null,
            "pad_token_id": null,
        })
    }

    /// The settings of the model type that has this combination of biases and windows.
    fn of_type(&self) -> Value {
        let layers = self.layer_attention.as_deref();
        let has_rope = layers.is_none_or(|layers| layers.iter().all(|layer| layer.has_rope));
        let biases = (
            self.attention_bias,
            self.attention_output_bias,
            self.mlp_bias,
        );
        match (biases, self.sliding_window, layers) {
            _ if !has_rope => smollm3::to_json(self),
            ((true, false, false), ..) => qwen2::to_json(self),
            ((false, false, false), Some(_), None) => mistral::to_json(self),
            ((bias, output, mlp_bias), None, None) if bias == output => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "attention_bias": bias,
                "mlp_bias": mlp_bias,
            }),
            _ => panic!("no model type has these biases and windows"),
        }
    }

    /// The attention of a layer; where none is stated, a rotating one with a window if it is usual.
    pub(super) fn attention(
        &self,
        layer: usize,
        has_window: impl Fn(usize) -> bool,
    ) -> LayerAttention {
        let usual = || LayerAttention::sliding(has_window(layer));
        let stated = self.layer_attention.as_ref();
        stated.map_or_else(usual, |layers| layers[layer])
    }

    pub(crate) fn rotary(&self) -> Rotary {
        Rotary {
            dims: self.head_dim,
            theta: self.rope_theta,
            scaling: self.rope_scaling.clone(),
            max_positions: self.max_position_embeddings,
        }
    }

    /// Whether the projections of the attention have biases, of model types that have them all or none.
    ///
    /// # Panics
    /// If some have and others have not, or the MLP has biases.
    pub(super) fn has_attention_biases(&self) -> bool {
        assert_eq!(
            (self.attention_bias, self.mlp_bias),
            (self.attention_output_bias, false),
            "biases of some projections of the attention alone, or of the MLP"
        );
        self.attention_bias
    }

    pub(super) fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    pub(super) fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

/// Objects of settings as one; the second one has priority.
///
/// # Panics
/// If one is no object.
pub(super) fn with_settings(first: Value, second: Value) -> Map<String, Value> {
    match (first, second) {
        (Value::Object(first), Value::Object(second)) => first.into_iter().chain(second).collect(),
        _ => panic!("settings are objects"),
    }
}

/// The names of LLaMA's tensors around the blocks, which most later decoders have.
pub(super) const NAMES: Names = Names {
    prefix: "model",
    embedding: "embed_tokens",
    positions: "",
    layers: "layers",
    norm: "norm",
};

impl Architecture for LlamaConfig {
    type Block = LlamaBlock;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[
        ModelType {
            name: "llama",
            read: Self::read_llama,
        },
        mistral::MODEL_TYPE,
        qwen2::MODEL_TYPE,
        smollm3::MODEL_TYPE,
    ];

    fn shape(&self) -> Shape {
        let max = self.max_position_embeddings;
        let norm = NormKind::Rms {
            eps: self.rms_norm_eps,
        };
        Shape {
            tie_word_embeddings: self.tie_word_embeddings,
            max_cached: self.rope_scaling.longest_alike(max),
            ..Shape::new(
                NAMES,
                self.vocab_size,
                self.hidden_size,
                self.num_hidden_layers,
                self.rope_scaling.max_seq_len(max),
                norm,
            )
        }
    }

    fn identity(&self) -> Identity {
        Identity::default()
            .with_setting("architecture", "llama")
            .with_setting("num_attention_heads", self.num_attention_heads)
            .with_setting("num_key_value_heads", self.num_key_value_heads)
            .with_setting("head_dim", self.head_dim)
            .with_setting("hidden_act", self.hidden_act.name())
            // Norms add it in f32.
            .with_setting("rms_norm_eps", self.rms_norm_eps as f32)
    }

    fn untie(&mut self) {
        self.tie_word_embeddings = false;
    }

    fn reach(&self, layer: usize) -> Reach {
        let attention = self.attention(layer, |_| true);
        Reach {
            window: self.sliding_window.filter(|_| attention.has_window),
            rotary: attention.has_rope.then(|| self.rotary()),
            ..Reach::default()
        }
    }
}

#[derive(Module, Debug)]
pub(crate) struct LlamaBlock {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    mlp: GatedMlp,
}

impl DecoderBlock for LlamaBlock {
    type Config = LlamaConfig;

    gated_parts! {
        config => config,
        attention: self_attn,
        mlp: mlp,
        norms:
            "input_layernorm" input_layernorm [config.hidden_size],
            "post_attention_layernorm" post_attention_layernorm [config.hidden_size],
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [input_layernorm, post_attention_layernorm] = parts.norms()?;
        let heads = Heads::new(parts.config.head_dim, parts.reach);
        let (self_attn, mlp) = parts.attention_and_mlp(heads, parts.config.hidden_act)?;
        Ok(Self {
            input_layernorm,
            self_attn,
            post_attention_layernorm,
            mlp,
        })
    }

    fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        self.self_attn.attend(input, positions, cache)
    }

    fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        self.input_layernorm.forward(x)
    }

    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        let norm = &self.post_attention_layernorm;
        self.mlp
            .advance(stage, residual, input, &self.self_attn.o_proj, norm)
    }
}
