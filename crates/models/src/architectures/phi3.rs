//! Phi-3 (Abdin et al. 2024, arXiv:2404.14219): a LLaMA whose projections from one input are one matrix.

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Identity, Linear};
use serde_json::{Map, Value, json};

use super::llama::{Defaults, LlamaConfig, with_settings};
use crate::Result;
use crate::activation::Activation;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Parts, Shape, parts};
use crate::attention::Heads;
use crate::kv_cache::KvCache;
use crate::norm::Norm;
use crate::positions::{Positions, Reach};
use crate::rope::Rotary;
use crate::rope_scaling::{self, RopeScaling};
use crate::settings::{Settings, setters};
use crate::source::Source;

/// The shape of a Phi-3, or of a Phi-4-mini.
///
/// # Examples
/// ```
/// use models::{LlamaConfig, Model, Phi3Config};
///
/// let llama = LlamaConfig::default().with_num_hidden_layers(1).with_vocab_size(16);
/// let config = Phi3Config::default().with_llama(llama).with_rotary_dims(96);
/// let model = Model::init(config, 0, &burn::tensor::Device::flex());
/// // Queries, keys and values are one projection, and so are the two of the MLP.
/// assert_eq!(model.config().projections().len(), 4);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Phi3Config {
    /// The shape of the LLaMA that it is but for its fused projections.
    pub llama: LlamaConfig,
    /// The dimensions of a head that are rotated: the first ones.
    pub rotary_dims: usize,
}

impl Default for Phi3Config {
    fn default() -> Self {
        let llama = LlamaConfig::default();
        Self {
            rotary_dims: llama.head_dim,
            llama,
        }
    }
}

setters! {
    Phi3Config:
    with_llama llama LlamaConfig,
    with_rotary_dims rotary_dims usize,
}

impl Phi3Config {
    fn read(settings: &Settings) -> Result<Self> {
        settings.ignore(&["resid_pdrop", "embd_pdrop"]);
        let defaults = Defaults {
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            ..Defaults::default()
        };
        let llama = LlamaConfig::read(settings, defaults)?;
        let rotary = rope_scaling::read(settings, llama.of_model())?;
        if !matches!(
            rotary.scaling,
            RopeScaling::None | RopeScaling::LongRope { .. }
        ) {
            let problem = "is a scaling that Phi-3 does not have; supported: default, longrope";
            return Err(settings.refuse("rope_scaling", problem));
        }
        let window = settings.optional_size("sliding_window")?;
        Ok(Self {
            rotary_dims: rotary.dims,
            llama: llama.with_rotary(rotary).with_sliding_window(window),
        })
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling.
    pub fn to_json(&self) -> Map<String, Value> {
        let llama = &self.llama;
        let of_type = json!({
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "sliding_window": llama.sliding_window,
            "original_max_position_embeddings": llama.max_position_embeddings,
            "partial_rotary_factor": self.partial(),
        });
        with_settings(llama.common_json(), of_type)
    }

    /// The part of a head that is rotated, whose product with its width is cut to a whole number.
    fn partial(&self) -> f64 {
        let head_dim = self.llama.head_dim as f64;
        if self.rotary_dims == self.llama.head_dim {
            return 1.0;
        }
        let quotient = self.rotary_dims as f64 / head_dim;
        if (quotient * head_dim) as usize == self.rotary_dims {
            quotient
        } else {
            (self.rotary_dims as f64 + 0.5) / head_dim
        }
    }

    /// The widths of the queries, the keys and the values.
    fn widths(&self) -> [usize; 3] {
        let (queries, keys) = (self.llama.query_width(), self.llama.key_width());
        [queries, keys, keys]
    }
}

impl Architecture for Phi3Config {
    type Block = Phi3Block;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "phi3",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        self.llama.shape()
    }

    fn identity(&self) -> Identity {
        (self.llama.identity())
            .with_setting("architecture", "phi3")
            .with_setting("rotary_dims", self.rotary_dims)
    }

    fn untie(&mut self) {
        self.llama.untie();
    }

    fn reach(&self, layer: usize) -> Reach {
        let rotary = Rotary {
            dims: self.rotary_dims,
            ..self.llama.rotary()
        };
        Reach {
            rotary: Some(rotary),
            ..self.llama.reach(layer)
        }
    }
}

#[derive(Module, Debug)]
pub(crate) struct Phi3Block {
    input_layernorm: Norm,
    self_attn: FusedAttention,
    post_attention_layernorm: Norm,
    mlp: FusedMlp,
}

#[derive(Module, Debug)]
struct FusedAttention {
    qkv_proj: Linear,
    o_proj: Linear,
    #[module(skip)]
    widths: [usize; 3],
    #[module(skip)]
    heads: Heads,
}

#[derive(Module, Debug)]
struct FusedMlp {
    gate_up_proj: Linear,
    down_proj: Linear,
    #[module(skip)]
    activation: Activation,
}

/// Cuts the last dimension into parts.
fn split<const N: usize>(x: Tensor<3>, widths: [usize; N]) -> [Tensor<3>; N] {
    let mut start = 0;
    widths.map(|width| {
        let part = x.clone().narrow(2, start, width);
        start += width;
        part
    })
}

impl DecoderBlock for Phi3Block {
    type Config = Phi3Config;

    parts! {
        config =>
        norms:
            "input_layernorm" input_layernorm [config.llama.hidden_size],
            "post_attention_layernorm" post_attention_layernorm [config.llama.hidden_size],
        projections:
            0 "self_attn.qkv_proj" self_attn.qkv_proj
                [config.llama.hidden_size, config.widths().iter().sum()], bias false,
            1 "self_attn.o_proj" self_attn.o_proj
                [config.llama.query_width(), config.llama.hidden_size], bias false,
            2 "mlp.gate_up_proj" mlp.gate_up_proj
                [config.llama.hidden_size, 2 * config.llama.intermediate_size], bias false,
            3 "mlp.down_proj" mlp.down_proj
                [config.llama.intermediate_size, config.llama.hidden_size], bias false,
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [input_layernorm, post_attention_layernorm] = parts.norms()?;
        let [qkv_proj, o_proj, gate_up_proj, down_proj] = parts.linears()?;
        let config = parts.config;
        Ok(Self {
            input_layernorm,
            self_attn: FusedAttention {
                qkv_proj,
                o_proj,
                widths: config.widths(),
                heads: Heads::new(config.llama.head_dim, parts.reach),
            },
            post_attention_layernorm,
            mlp: FusedMlp {
                gate_up_proj,
                down_proj,
                activation: config.llama.hidden_act,
            },
        })
    }

    fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let FusedAttention {
            qkv_proj,
            widths,
            heads,
            ..
        } = &self.self_attn;
        let parts = split(qkv_proj.forward(input), *widths);
        let [q, k, v] = parts.map(|part| heads.split(part));
        heads.attend(q, k, v, positions, cache)
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
        match stage {
            1 => {
                let x = residual + self.self_attn.o_proj.forward(input);
                (x.clone(), self.post_attention_layernorm.forward(x))
            }
            2 => {
                let both = self.mlp.gate_up_proj.forward(input);
                let width = both.dims()[2] / 2;
                let [gate, up] = split(both, [width; 2]);
                (residual, self.mlp.activation.gate(gate, up))
            }
            _ => {
                let x = residual + self.mlp.down_proj.forward(input);
                (x.clone(), x)
            }
        }
    }
}
