//! GPT-J (Wang and Komatsuzaki 2021): attention and MLP read one norm and are added together, and a part of
//! each head is rotated.

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Identity, Linear};
use serde_json::{Map, Value, json};

use super::gpt_neo::NAMES;
use crate::Result;
use crate::activation::Activation;
use crate::architecture::{Architecture, DecoderBlock, ModelType, Parts, Shape, parts};
use crate::attention::{Attention, Heads};
use crate::kv_cache::KvCache;
use crate::norm::{Norm, NormKind};
use crate::positions::{Positions, Reach};
use crate::rope::Rotary;
use crate::rope_scaling::RopeScaling;
use crate::settings::{Settings, setters};
use crate::source::Source;

/// The shape of a GPT-J.
///
/// The default is the shape of GPT-J-6B.
#[derive(Clone, Debug, PartialEq)]
pub struct GptJConfig {
    /// The number of tokens of the vocabulary.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub n_embd: usize,
    /// The width inside the MLP.
    pub n_inner: usize,
    /// The number of blocks.
    pub n_layer: usize,
    /// The number of heads.
    pub n_head: usize,
    /// The longest text that the model has positions for, in tokens.
    pub n_positions: usize,
    /// The dimensions of a head that are rotated: the first ones.
    pub rotary_dim: usize,
    /// The activation function of the MLP.
    pub activation: Activation,
    /// The constant that the norms add to the variance.
    pub layer_norm_epsilon: f64,
    /// Whether the embedding is the head as well.
    pub tie_word_embeddings: bool,
}

impl Default for GptJConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50_400,
            n_embd: 4096,
            n_inner: 16_384,
            n_layer: 28,
            n_head: 16,
            n_positions: 2048,
            rotary_dim: 64,
            activation: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            tie_word_embeddings: false,
        }
    }
}

setters! {
    GptJConfig:
    with_vocab_size vocab_size usize,
    with_n_embd n_embd usize,
    with_n_inner n_inner usize,
    with_n_layer n_layer usize,
    with_n_head n_head usize,
    with_n_positions n_positions usize,
    with_rotary_dim rotary_dim usize,
    with_activation activation Activation,
    with_layer_norm_epsilon layer_norm_epsilon f64,
    with_tie_word_embeddings tie_word_embeddings bool,
}

impl GptJConfig {
    fn read(settings: &Settings) -> Result<Self> {
        settings.ignore(&["resid_pdrop", "embd_pdrop", "attn_pdrop"]);
        let n_embd = settings.size_named(&["n_embd", "hidden_size"])?;
        settings.check_width("n_embd", n_embd)?;
        let n_head = settings.size_named(&["n_head", "num_attention_heads"])?;
        if !n_embd.is_multiple_of(n_head) {
            let problem = format!("is {n_head}, which does not divide the width {n_embd}");
            return Err(settings.refuse("n_head", problem));
        }
        let (head_dim, rotary_dim) = (n_embd / n_head, settings.size_or("rotary_dim", 64)?);
        if rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let problem = format!(
                "is {rotary_dim}; it must be even and at most the {head_dim} dimensions of a head"
            );
            return Err(settings.refuse("rotary_dim", problem));
        }
        let positions = ["n_positions", "max_position_embeddings"];
        Ok(Self {
            vocab_size: settings.width("vocab_size")?,
            n_embd,
            n_inner: settings.optional_width("n_inner")?.unwrap_or(4 * n_embd),
            n_layer: settings.layers_named(&["n_layer", "num_hidden_layers"])?,
            n_head,
            n_positions: settings.size_named_or(&positions, 2048)?,
            rotary_dim,
            activation: settings.activation_or("activation_function", Activation::GeluTanh)?,
            layer_norm_epsilon: settings.positive_or("layer_norm_epsilon", 1e-5)?,
            tie_word_embeddings: settings.flag_or("tie_word_embeddings", false)?,
        })
    }

    /// The `config.json` of a new model of this shape.
    pub fn to_json(&self) -> Map<String, Value> {
        let json = json!({
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "vocab_size": self.vocab_size,
            "n_embd": self.n_embd,
            "n_inner": self.n_inner,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_positions": self.n_positions,
            "rotary_dim": self.rotary_dim,
            "activation_function": self.activation.name(),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "tie_word_embeddings": self.tie_word_embeddings,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": null,
            "eos_token_id": null,
            "pad_token_id": null,
        });
        match json {
            Value::Object(map) => map,
            _ => unreachable!("an object was written above"),
        }
    }
}

impl Architecture for GptJConfig {
    type Block = GptJBlock;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "gptj",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        let norm = NormKind::Layer {
            affine: true,
            eps: self.layer_norm_epsilon,
        };
        Shape {
            tie_word_embeddings: self.tie_word_embeddings,
            has_head_bias: true,
            max_positions: Some(self.n_positions),
            ..Shape::new(
                NAMES,
                self.vocab_size,
                self.n_embd,
                self.n_layer,
                self.n_positions,
                norm,
            )
        }
    }

    fn identity(&self) -> Identity {
        Identity::default()
            .with_setting("architecture", "gptj")
            .with_setting("n_head", self.n_head)
            .with_setting("rotary_dim", self.rotary_dim)
            .with_setting("activation_function", self.activation.name())
            .with_setting("layer_norm_epsilon", self.layer_norm_epsilon as f32)
    }

    fn untie(&mut self) {
        self.tie_word_embeddings = false;
    }

    fn reach(&self, _: usize) -> Reach {
        let rotary = Rotary {
            dims: self.rotary_dim,
            theta: 10_000.0,
            scaling: RopeScaling::None,
            max_positions: self.n_positions,
        };
        Reach {
            rotary: Some(rotary),
            ..Reach::default()
        }
    }
}

#[derive(Module, Debug)]
pub(crate) struct GptJBlock {
    ln_1: Norm,
    attn: Attention,
    fc_in: Linear,
    fc_out: Linear,
    #[module(skip)]
    rotary_dim: usize,
    #[module(skip)]
    activation: Activation,
}

/// Moves the pairs among the first `dims` dimensions of each head from neighbors, which GPT-J turns, to the
/// two halves that [`Rope`](crate::rope::Rope) turns. The products of queries and keys stay the same.
fn halves(x: Tensor<4>, dims: usize) -> Tensor<4> {
    let [batch, seq, heads, dim] = x.dims();
    let turned = x.clone().narrow(3, 0, dims);
    let turned = turned.reshape([batch, seq, heads, dims / 2, 2]);
    let turned = turned.swap_dims(3, 4).reshape([batch, seq, heads, dims]);
    if dims == dim {
        return turned;
    }
    Tensor::cat(vec![turned, x.narrow(3, dims, dim - dims)], 3)
}

impl DecoderBlock for GptJBlock {
    type Config = GptJConfig;

    parts! {
        config =>
        norms:
            "ln_1" ln_1 [config.n_embd],
        projections:
            0 "attn.q_proj" attn.q_proj [config.n_embd; 2], bias false,
            0 "attn.k_proj" attn.k_proj [config.n_embd; 2], bias false,
            0 "attn.v_proj" attn.v_proj [config.n_embd; 2], bias false,
            1 "attn.out_proj" attn.o_proj [config.n_embd; 2], bias false,
            2 "mlp.fc_in" fc_in [config.n_embd, config.n_inner], bias true,
            3 "mlp.fc_out" fc_out [config.n_inner, config.n_embd], bias true,
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [ln_1] = parts.norms()?;
        let [q_proj, k_proj, v_proj, o_proj, fc_in, fc_out] = parts.linears()?;
        let config = parts.config;
        Ok(Self {
            ln_1,
            attn: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                heads: Heads::new(config.n_embd / config.n_head, parts.reach),
            },
            fc_in,
            fc_out,
            rotary_dim: config.rotary_dim,
            activation: config.activation,
        })
    }

    fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [q, k, v] = self.attn.project(input);
        let (q, k) = (halves(q, self.rotary_dim), halves(k, self.rotary_dim));
        self.attn.heads.attend(q, k, v, positions, cache)
    }

    fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        self.ln_1.forward(x)
    }

    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        match stage {
            1 => {
                // The MLP reads what the attention read.
                let normed = self.ln_1.forward(residual.clone());
                (residual + self.attn.o_proj.forward(input), normed)
            }
            2 => (residual, self.activation.apply(self.fc_in.forward(input))),
            _ => {
                let x = residual + self.fc_out.forward(input);
                (x.clone(), x)
            }
        }
    }
}
