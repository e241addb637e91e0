//! Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms before and behind attention and MLP, soft caps, and
//! a window in every other layer.

use burn::module::Module;
use burn::tensor::Tensor;
use kernels::Scores;
use peft::Identity;
use serde_json::{Map, Value, json};

use super::gated::gated_parts;
use super::layer_attention::{LayerAttention, check_window, layer_types};
use super::llama::{Defaults, LlamaConfig, NAMES, with_settings};
use crate::Result;
use crate::activation::Activation;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Parts, Shape};
use crate::attention::{Attention, Heads};
use crate::kv_cache::KvCache;
use crate::mlp::GatedMlp;
use crate::norm::{Norm, NormKind};
use crate::positions::{Positions, Reach};
use crate::settings::{Settings, setters};
use crate::source::Source;

/// The shape of a Gemma 2.
///
/// The default has the settings of Gemma-2-2B beside its sizes, and the sizes of Llama-2-7B.
///
/// # Examples
/// ```
/// use models::{Gemma2Config, LlamaConfig, Model};
///
/// let llama = Gemma2Config::default().llama.with_num_hidden_layers(2).with_vocab_size(16);
/// let config = Gemma2Config::default().with_llama(llama).with_final_logit_softcapping(None);
/// let model = Model::init(config, 0, &burn::tensor::Device::flex());
/// assert_eq!(model.config().to_json()["layer_types"][0], "sliding_attention");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Gemma2Config {
    /// The shape of the LLaMA that it is but for its norms, its caps and the factor of its embeddings.
    /// Without [`LlamaConfig::layer_attention`] every other layer, from the first on, has a window.
    pub llama: LlamaConfig,
    /// Scores are divided by its square root.
    pub query_pre_attn_scalar: usize,
    /// The soft cap of the scores.
    pub attn_logit_softcapping: Option<f64>,
    /// The soft cap of the logits.
    pub final_logit_softcapping: Option<f64>,
}

impl Default for Gemma2Config {
    fn default() -> Self {
        let llama = LlamaConfig::default()
            .with_rms_norm_eps(1e-6)
            .with_hidden_act(Activation::GeluTanh)
            .with_sliding_window(4096)
            .with_tie_word_embeddings(true);
        Self {
            llama,
            query_pre_attn_scalar: 256,
            attn_logit_softcapping: Some(50.0),
            final_logit_softcapping: Some(30.0),
        }
    }
}

setters! {
    Gemma2Config:
    with_llama llama LlamaConfig,
    with_query_pre_attn_scalar query_pre_attn_scalar usize,
    with_attn_logit_softcapping attn_logit_softcapping impl Into<Option<f64>>,
    with_final_logit_softcapping final_logit_softcapping impl Into<Option<f64>>,
}

/// Whether a layer has a window where nothing is stated.
fn has_window(layer: usize) -> bool {
    layer.is_multiple_of(2)
}

/// What `config.json` has for a Gemma where it is silent, in transformers' classes.
pub(super) fn defaults(max_position_embeddings: usize) -> Defaults {
    Defaults {
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        max_position_embeddings,
        activation: ("hidden_activation", Activation::GeluTanh),
        tie_word_embeddings: true,
        ..Defaults::default()
    }
}

/// Reads biases and windows: those of `layer_types`, or by the rule of the configuration. `usual` is that
/// of a new model.
pub(super) fn read_layers(
    llama: LlamaConfig,
    settings: &Settings,
    usual: impl Fn(usize) -> bool,
    rule: impl Fn(usize) -> bool,
) -> Result<LlamaConfig> {
    settings.only("use_bidirectional_attention", false)?;
    let n_layers = llama.num_hidden_layers;
    let window = settings.optional_size_or("sliding_window", 4096)?;
    let types = layer_types(settings, n_layers)?;
    let types = types.unwrap_or_else(|| (0..n_layers).map(rule).collect());
    let is_usual = (0..n_layers).all(|layer| types[layer] == usual(layer));
    let layers: Vec<LayerAttention> = types.into_iter().map(LayerAttention::sliding).collect();
    check_window(settings, window, &layers)?;
    let bias = settings.flag_or("attention_bias", false)?;
    Ok(llama
        .with_sliding_window(window)
        .with_layer_attention((!is_usual).then_some(layers))
        .with_attention_bias(bias)
        .with_attention_output_bias(bias))
}

/// The settings of a Gemma beside those that all model types have.
pub(super) fn to_json(
    llama: &LlamaConfig,
    has_window: impl Fn(usize) -> bool + Copy,
) -> Map<String, Value> {
    let layers = 0..llama.num_hidden_layers;
    let layers = layers.map(|layer| llama.attention(layer, has_window).name());
    let of_gemma = json!({
        "hidden_activation": llama.hidden_act.name(),
        "attention_bias": llama.has_attention_biases(),
        "sliding_window": llama.sliding_window,
        "layer_types": layers.collect::<Vec<_>>(),
    });
    with_settings(llama.common_json(), of_gemma)
}

/// The shape of a Gemma around its blocks.
pub(super) fn shape(llama: &LlamaConfig, logit_softcap: Option<f64>) -> Shape {
    let norm = NormKind::RmsOffset {
        eps: llama.rms_norm_eps,
    };
    Shape {
        names: NAMES,
        norm,
        embedding_scale: Some((llama.hidden_size as f64).sqrt()),
        logit_softcap,
        ..llama.shape()
    }
}

impl Gemma2Config {
    fn read(settings: &Settings) -> Result<Self> {
        let llama = LlamaConfig::read(settings, defaults(8192))?.read_rotary(settings, 10_000.0)?;
        let llama = read_layers(llama, settings, has_window, has_window)?;
        let cap = |key: &str, default| settings.optional_positive_or(key, default);
        Ok(Self {
            llama,
            query_pre_attn_scalar: settings.size_or("query_pre_attn_scalar", 256)?,
            attn_logit_softcapping: cap("attn_logit_softcapping", 50.0)?,
            final_logit_softcapping: cap("final_logit_softcapping", 30.0)?,
        })
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling, or there are biases of some projections of the attention alone, or of the
    /// MLP.
    pub fn to_json(&self) -> Map<String, Value> {
        let of_type = json!({
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "attn_logit_softcapping": self.attn_logit_softcapping,
            "final_logit_softcapping": self.final_logit_softcapping,
        });
        with_settings(to_json(&self.llama, has_window).into(), of_type)
    }
}

impl Architecture for Gemma2Config {
    type Block = Gemma2Block;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "gemma2",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        shape(&self.llama, self.final_logit_softcapping)
    }

    fn identity(&self) -> Identity {
        let cap = |cap: Option<f64>| cap.unwrap_or(0.0);
        (self.llama.identity())
            .with_setting("architecture", "gemma2")
            .with_setting("query_pre_attn_scalar", self.query_pre_attn_scalar)
            .with_setting("attn_logit_softcapping", cap(self.attn_logit_softcapping))
            .with_setting("final_logit_softcapping", cap(self.final_logit_softcapping))
    }

    fn untie(&mut self) {
        self.llama.untie();
    }

    fn reach(&self, layer: usize) -> Reach {
        Reach {
            window: (self.llama.sliding_window)
                .filter(|_| self.llama.attention(layer, has_window).has_window),
            rotary: Some(self.llama.rotary()),
            ..Reach::default()
        }
    }
}

#[derive(Module, Debug)]
pub(crate) struct Gemma2Block {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    pre_feedforward_layernorm: Norm,
    mlp: GatedMlp,
    post_feedforward_layernorm: Norm,
}

impl DecoderBlock for Gemma2Block {
    type Config = Gemma2Config;

    gated_parts! {
        config => config.llama,
        attention: self_attn,
        mlp: mlp,
        norms:
            "input_layernorm" input_layernorm [config.llama.hidden_size],
            "post_attention_layernorm" post_attention_layernorm [config.llama.hidden_size],
            "pre_feedforward_layernorm" pre_feedforward_layernorm [config.llama.hidden_size],
            "post_feedforward_layernorm" post_feedforward_layernorm [config.llama.hidden_size],
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [
            input_layernorm,
            post_attention_layernorm,
            pre_feedforward_layernorm,
            post_feedforward_layernorm,
        ] = parts.norms()?;
        let config = parts.config;
        let scores = Scores::new(1.0 / (config.query_pre_attn_scalar as f64).sqrt())
            .with_softcap(config.attn_logit_softcapping);
        let heads = Heads {
            scores,
            ..Heads::new(config.llama.head_dim, parts.reach)
        };
        let (self_attn, mlp) = parts.attention_and_mlp(heads, config.llama.hidden_act)?;
        Ok(Self {
            input_layernorm,
            self_attn,
            post_attention_layernorm,
            pre_feedforward_layernorm,
            mlp,
            post_feedforward_layernorm,
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
        let norms = [
            &self.post_attention_layernorm,
            &self.pre_feedforward_layernorm,
            &self.post_feedforward_layernorm,
        ];
        let o_proj = &self.self_attn.o_proj;
        self.mlp
            .advance_between_norms(stage, residual, input, o_proj, norms)
    }
}
