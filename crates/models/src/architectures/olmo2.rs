//! OLMo 2 (OLMo Team 2024, arXiv:2501.00656): norms behind attention and MLP, and of all queries and keys.

use burn::module::Module;
use burn::tensor::Tensor;
use peft::Identity;
use serde_json::{Map, Value, json};

use super::gated::gated_parts;
use super::llama::{Defaults, LlamaConfig, with_settings};
use crate::Result;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Parts, Shape};
use crate::attention::{Attention, Heads};
use crate::kv_cache::KvCache;
use crate::mlp::GatedMlp;
use crate::norm::Norm;
use crate::positions::{Positions, Reach};
use crate::settings::Settings;
use crate::source::Source;

/// The shape of an OLMo 2.
///
/// # Examples
/// ```
/// use models::{LlamaConfig, Model, Olmo2Config};
///
/// let llama = LlamaConfig::default().with_num_hidden_layers(1).with_vocab_size(16);
/// let model = Model::init(Olmo2Config::from(llama), 0, &burn::tensor::Device::flex());
/// assert_eq!(model.config().to_json()["model_type"], "olmo2");
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Olmo2Config {
    /// The shape of the LLaMA that it is but for the norms.
    pub llama: LlamaConfig,
}

impl From<LlamaConfig> for Olmo2Config {
    fn from(llama: LlamaConfig) -> Self {
        Self { llama }
    }
}

impl Olmo2Config {
    fn read(settings: &Settings) -> Result<Self> {
        let defaults = Defaults {
            rms_norm_eps: 1e-5,
            ..Defaults::default()
        };
        let llama = LlamaConfig::read(settings, defaults)?.read_rotary(settings, 10_000.0)?;
        let bias = settings.flag_or("attention_bias", false)?;
        Ok(llama
            .with_attention_bias(bias)
            .with_attention_output_bias(bias)
            .into())
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling, or there are biases of some projections of the attention alone, or of the
    /// MLP.
    pub fn to_json(&self) -> Map<String, Value> {
        let llama = &self.llama;
        let of_type = json!({
            "architectures": ["Olmo2ForCausalLM"],
            "model_type": "olmo2",
            "attention_bias": llama.has_attention_biases(),
        });
        with_settings(llama.common_json(), of_type)
    }
}

impl Architecture for Olmo2Config {
    type Block = Olmo2Block;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "olmo2",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        self.llama.shape()
    }

    fn identity(&self) -> Identity {
        self.llama.identity().with_setting("architecture", "olmo2")
    }

    fn untie(&mut self) {
        self.llama.untie();
    }

    fn reach(&self, layer: usize) -> Reach {
        self.llama.reach(layer)
    }
}

#[derive(Module, Debug)]
pub(crate) struct Olmo2Block {
    self_attn: Attention,
    q_norm: Norm,
    k_norm: Norm,
    post_attention_layernorm: Norm,
    mlp: GatedMlp,
    post_feedforward_layernorm: Norm,
}

impl DecoderBlock for Olmo2Block {
    type Config = Olmo2Config;

    gated_parts! {
        config => config.llama,
        attention: self_attn,
        mlp: mlp,
        norms:
            "self_attn.q_norm" q_norm [config.llama.query_width()],
            "self_attn.k_norm" k_norm [config.llama.key_width()],
            "post_attention_layernorm" post_attention_layernorm [config.llama.hidden_size],
            "post_feedforward_layernorm" post_feedforward_layernorm [config.llama.hidden_size],
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [
            q_norm,
            k_norm,
            post_attention_layernorm,
            post_feedforward_layernorm,
        ] = parts.norms()?;
        let llama = &parts.config.llama;
        let heads = Heads::new(llama.head_dim, parts.reach);
        let (self_attn, mlp) = parts.attention_and_mlp(heads, llama.hidden_act)?;
        Ok(Self {
            self_attn,
            q_norm,
            k_norm,
            post_attention_layernorm,
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
        let Attention {
            q_proj,
            k_proj,
            v_proj,
            heads,
            ..
        } = &self.self_attn;
        let q = self.q_norm.forward(q_proj.forward(input.clone()));
        let k = self.k_norm.forward(k_proj.forward(input.clone()));
        let [q, k, v] = [q, k, v_proj.forward(input)].map(|x| heads.split(x));
        heads.attend(q, k, v, positions, cache)
    }

    fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        x
    }

    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        match stage {
            1 => {
                let attended = self.self_attn.o_proj.forward(input);
                let x = residual + self.post_attention_layernorm.forward(attended);
                (x.clone(), x)
            }
            2 => (residual, self.mlp.gate(input)),
            _ => {
                let y = self.mlp.down_proj.forward(input);
                let x = residual + self.post_feedforward_layernorm.forward(y);
                (x.clone(), x)
            }
        }
    }
}
