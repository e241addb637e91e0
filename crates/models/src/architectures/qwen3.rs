//! Qwen3 (Yang et al. 2025, arXiv:2505.09388): a LLaMA whose queries and keys are normed.

use burn::module::Module;
use burn::tensor::Tensor;
use peft::Identity;
use serde_json::{Map, Value, json};

use super::gated::gated_parts;
use super::llama::qwen2::{windows, windows_to_json};
use super::llama::{Defaults, LlamaConfig, with_settings};
use crate::Result;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Parts, Shape};
use crate::attention::{Heads, NormedAttention};
use crate::kv_cache::KvCache;
use crate::mlp::GatedMlp;
use crate::norm::Norm;
use crate::positions::{Positions, Reach};
use crate::settings::Settings;
use crate::source::Source;

/// The shape of a Qwen3.
///
/// # Examples
/// ```
/// use models::{LlamaConfig, Model, Qwen3Config};
///
/// let llama = LlamaConfig::default().with_num_hidden_layers(1).with_vocab_size(16);
/// let model = Model::init(Qwen3Config::from(llama), 0, &burn::tensor::Device::flex());
/// assert_eq!(model.config().to_json()["model_type"], "qwen3");
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Qwen3Config {
    /// The shape of the LLaMA that it is but for the norms.
    pub llama: LlamaConfig,
}

impl From<LlamaConfig> for Qwen3Config {
    fn from(llama: LlamaConfig) -> Self {
        Self { llama }
    }
}

impl Qwen3Config {
    fn read(settings: &Settings) -> Result<Self> {
        let defaults = Defaults {
            num_key_value_heads: Some(32),
            head_dim: Some(128),
            max_position_embeddings: 32_768,
            ..Defaults::default()
        };
        let llama = LlamaConfig::read(settings, defaults)?.read_rotary(settings, 10_000.0)?;
        let (window, layers) = windows(settings, llama.num_hidden_layers)?;
        let bias = settings.flag_or("attention_bias", false)?;
        Ok(llama
            .with_sliding_window(window)
            .with_layer_attention(layers)
            .with_attention_bias(bias)
            .with_attention_output_bias(bias)
            .into())
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling, or the biases are not those of all projections of the attention or of none.
    pub fn to_json(&self) -> Map<String, Value> {
        let llama = &self.llama;
        let layers = llama.layer_attention.as_deref();
        let windows = windows_to_json(llama.sliding_window, layers, llama.num_hidden_layers);
        let of_type = json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": llama.has_attention_biases(),
        });
        let json = with_settings(llama.common_json(), windows);
        with_settings(json.into(), of_type)
    }
}

impl Architecture for Qwen3Config {
    type Block = Qwen3Block;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "qwen3",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        self.llama.shape()
    }

    fn identity(&self) -> Identity {
        self.llama.identity().with_setting("architecture", "qwen3")
    }

    fn untie(&mut self) {
        self.llama.untie();
    }

    fn reach(&self, layer: usize) -> Reach {
        self.llama.reach(layer)
    }
}

#[derive(Module, Debug)]
pub(crate) struct Qwen3Block {
    input_layernorm: Norm,
    self_attn: NormedAttention,
    post_attention_layernorm: Norm,
    mlp: GatedMlp,
}

impl DecoderBlock for Qwen3Block {
    type Config = Qwen3Config;

    gated_parts! {
        config => config.llama,
        attention: self_attn.attention,
        mlp: mlp,
        norms:
            "input_layernorm" input_layernorm [config.llama.hidden_size],
            "self_attn.q_norm" self_attn.q_norm [config.llama.head_dim],
            "self_attn.k_norm" self_attn.k_norm [config.llama.head_dim],
            "post_attention_layernorm" post_attention_layernorm [config.llama.hidden_size],
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [input_layernorm, q_norm, k_norm, post_attention_layernorm] = parts.norms()?;
        let llama = &parts.config.llama;
        let heads = Heads::new(llama.head_dim, parts.reach);
        let (attention, mlp) = parts.attention_and_mlp(heads, llama.hidden_act)?;
        Ok(Self {
            input_layernorm,
            self_attn: NormedAttention {
                attention,
                q_norm,
                k_norm,
            },
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
        let (o_proj, norm) = (
            &self.self_attn.attention.o_proj,
            &self.post_attention_layernorm,
        );
        self.mlp.advance(stage, residual, input, o_proj, norm)
    }
}
