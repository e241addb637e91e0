//! OPT (Zhang et al. 2022, arXiv:2205.01068), with norms before attention and MLP or after them.

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Identity, Linear};
use serde_json::{Map, Value, json};

use crate::Result;
use crate::activation::Activation;
use crate::architecture::{
    Architecture, DecoderBlock, LearnedPositions, ModelType, Names, Parts, Shape, parts,
};
use crate::attention::{Attention, Heads};
use crate::kv_cache::KvCache;
use crate::norm::{Norm, NormKind};
use crate::positions::{Positions, Reach};
use crate::settings::{Settings, setters};
use crate::source::Source;

/// The row of the first token in the table of positions.
const FIRST_ROW: usize = 2;

const NAMES: Names = Names {
    prefix: "model.decoder",
    embedding: "embed_tokens",
    positions: "embed_positions",
    layers: "layers",
    norm: "final_layer_norm",
};

/// The shape of an OPT.
///
/// The default is the shape of OPT-125M.
#[derive(Clone, Debug, PartialEq)]
pub struct OptConfig {
    /// The number of tokens of the vocabulary.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The width inside the MLP.
    pub ffn_dim: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// The number of heads.
    pub num_attention_heads: usize,
    /// The number of positions that the model has embeddings for.
    pub max_position_embeddings: usize,
    /// The width of the embedding and of the head, which are projected if it is not `hidden_size`.
    pub word_embed_proj_dim: usize,
    /// Whether norms come before attention and MLP. Those of OPT-350M come after.
    pub do_layer_norm_before: bool,
    /// Whether the norm before the head is left out, where norms come before.
    pub remove_final_layer_norm: bool,
    /// The activation function of the MLP.
    pub activation: Activation,
    /// Whether the projections have biases.
    pub enable_bias: bool,
    /// Whether the norms have weights and biases.
    pub layer_norm_elementwise_affine: bool,
    /// Whether the embedding is the head as well.
    pub tie_word_embeddings: bool,
}

impl Default for OptConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50_272,
            hidden_size: 768,
            ffn_dim: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 2048,
            word_embed_proj_dim: 768,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            activation: Activation::Relu,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            tie_word_embeddings: true,
        }
    }
}

setters! {
    OptConfig:
    with_vocab_size vocab_size usize,
    with_hidden_size hidden_size usize,
    with_ffn_dim ffn_dim usize,
    with_num_hidden_layers num_hidden_layers usize,
    with_num_attention_heads num_attention_heads usize,
    with_max_position_embeddings max_position_embeddings usize,
    with_word_embed_proj_dim word_embed_proj_dim usize,
    with_do_layer_norm_before do_layer_norm_before bool,
    with_remove_final_layer_norm remove_final_layer_norm bool,
    with_activation activation Activation,
    with_enable_bias enable_bias bool,
    with_layer_norm_elementwise_affine layer_norm_elementwise_affine bool,
    with_tie_word_embeddings tie_word_embeddings bool,
}

impl OptConfig {
    fn read(settings: &Settings) -> Result<Self> {
        settings.ignore(&["dropout", "attention_dropout", "layerdrop", "init_std"]);
        let default = Self::default();
        let (heads, hidden) = (
            settings.size("num_attention_heads")?,
            settings.width("hidden_size")?,
        );
        if !hidden.is_multiple_of(heads) {
            let problem = format!("is {heads}, which does not divide the hidden size {hidden}");
            return Err(settings.refuse("num_attention_heads", problem));
        }
        let flag = |key: &str, default| settings.flag_or(key, default);
        Ok(Self {
            vocab_size: settings.width("vocab_size")?,
            hidden_size: hidden,
            ffn_dim: settings.width("ffn_dim")?,
            num_hidden_layers: settings.layers("num_hidden_layers")?,
            num_attention_heads: heads,
            max_position_embeddings: settings
                .size_or("max_position_embeddings", default.max_position_embeddings)?,
            word_embed_proj_dim: settings
                .optional_width("word_embed_proj_dim")?
                .unwrap_or(hidden),
            do_layer_norm_before: flag("do_layer_norm_before", true)?,
            remove_final_layer_norm: flag("_remove_final_layer_norm", false)?,
            activation: settings.activation_or("activation_function", default.activation)?,
            enable_bias: flag("enable_bias", true)?,
            layer_norm_elementwise_affine: flag("layer_norm_elementwise_affine", true)?,
            tie_word_embeddings: flag("tie_word_embeddings", true)?,
        })
    }

    /// The `config.json` of a new model of this shape.
    pub fn to_json(&self) -> Map<String, Value> {
        let json = json!({
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "ffn_dim": self.ffn_dim,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "word_embed_proj_dim": self.word_embed_proj_dim,
            "do_layer_norm_before": self.do_layer_norm_before,
            "_remove_final_layer_norm": self.remove_final_layer_norm,
            "activation_function": self.activation.name(),
            "enable_bias": self.enable_bias,
            "layer_norm_elementwise_affine": self.layer_norm_elementwise_affine,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        });
        match json {
            Value::Object(map) => map,
            _ => unreachable!("an object was written above"),
        }
    }
}

impl Architecture for OptConfig {
    type Block = OptBlock;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "opt",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        let max = self.max_position_embeddings;
        let norm = NormKind::Layer {
            affine: self.layer_norm_elementwise_affine,
            eps: 1e-5,
        };
        Shape {
            embedding_width: self.word_embed_proj_dim,
            tie_word_embeddings: self.tie_word_embeddings,
            has_final_norm: self.do_layer_norm_before && !self.remove_final_layer_norm,
            learned_positions: Some(LearnedPositions {
                n_rows: max + FIRST_ROW,
                first_row: FIRST_ROW,
            }),
            max_positions: Some(max),
            ..Shape::new(
                NAMES,
                self.vocab_size,
                self.hidden_size,
                self.num_hidden_layers,
                max,
                norm,
            )
        }
    }

    fn identity(&self) -> Identity {
        let affine = self.layer_norm_elementwise_affine;
        Identity::default()
            .with_setting("architecture", "opt")
            .with_setting("num_attention_heads", self.num_attention_heads)
            .with_setting("do_layer_norm_before", self.do_layer_norm_before)
            .with_setting("final_layer_norm", self.shape().has_final_norm)
            .with_setting("layer_norm_elementwise_affine", affine)
            .with_setting("activation_function", self.activation.name())
    }

    fn untie(&mut self) {
        self.tie_word_embeddings = false;
    }

    fn reach(&self, _: usize) -> Reach {
        Reach::default()
    }
}

#[derive(Module, Debug)]
pub(crate) struct OptBlock {
    self_attn: Attention,
    self_attn_layer_norm: Norm,
    fc1: Linear,
    fc2: Linear,
    final_layer_norm: Norm,
    /// Whether the norms come after attention and MLP.
    #[module(skip)]
    norm_after: bool,
    #[module(skip)]
    activation: Activation,
}

impl DecoderBlock for OptBlock {
    type Config = OptConfig;

    parts! {
        config =>
        norms:
            "self_attn_layer_norm" self_attn_layer_norm [config.hidden_size],
            "final_layer_norm" final_layer_norm [config.hidden_size],
        projections:
            0 "self_attn.q_proj" self_attn.q_proj
                [config.hidden_size; 2], bias config.enable_bias,
            0 "self_attn.k_proj" self_attn.k_proj
                [config.hidden_size; 2], bias config.enable_bias,
            0 "self_attn.v_proj" self_attn.v_proj
                [config.hidden_size; 2], bias config.enable_bias,
            1 "self_attn.out_proj" self_attn.o_proj
                [config.hidden_size; 2], bias config.enable_bias,
            2 "fc1" fc1
                [config.hidden_size, config.ffn_dim], bias config.enable_bias,
            3 "fc2" fc2
                [config.ffn_dim, config.hidden_size], bias config.enable_bias,
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [self_attn_layer_norm, final_layer_norm] = parts.norms()?;
        let [q_proj, k_proj, v_proj, o_proj, fc1, fc2] = parts.linears()?;
        let config = parts.config;
        let head_dim = config.hidden_size / config.num_attention_heads;
        Ok(Self {
            self_attn: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                heads: Heads::new(head_dim, parts.reach),
            },
            self_attn_layer_norm,
            fc1,
            fc2,
            final_layer_norm,
            norm_after: !config.do_layer_norm_before,
            activation: config.activation,
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
        if self.norm_after {
            x
        } else {
            self.self_attn_layer_norm.forward(x)
        }
    }

    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        match (stage, self.norm_after) {
            (1, true) => {
                let x = residual + self.self_attn.o_proj.forward(input);
                let x = self.self_attn_layer_norm.forward(x);
                (x.clone(), x)
            }
            (1, false) => {
                let x = residual + self.self_attn.o_proj.forward(input);
                (x.clone(), self.final_layer_norm.forward(x))
            }
            (2, _) => (residual, self.activation.apply(self.fc1.forward(input))),
            (_, true) => {
                let x = residual + self.fc2.forward(input);
                let x = self.final_layer_norm.forward(x);
                (x.clone(), x)
            }
            (_, false) => {
                let x = residual + self.fc2.forward(input);
                (x.clone(), x)
            }
        }
    }
}
