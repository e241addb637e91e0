use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Fields;
use crate::Result;

/// The shape of an OPT (Zhang et al. 2022, arXiv:2205.01068), from a Hugging Face `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct OptConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub ffn_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Positions that the model has embeddings for.
    pub max_position_embeddings: usize,
    /// Width of the embedding and of the head, projected to and from `hidden_size` if it is another.
    pub word_embed_proj_dim: usize,
    /// Whether norms come before attention and MLP, and not after (as in the model of 350 million).
    pub do_layer_norm_before: bool,
    /// Whether the norm before the head is left out, where norms come before.
    pub remove_final_layer_norm: bool,
    /// What the MLP does with its inner values.
    pub activation: Activation,
    /// Whether the projections have biases.
    pub enable_bias: bool,
    /// Whether the norms have weights and biases.
    pub layer_norm_elementwise_affine: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
}

/// What an MLP does with its inner values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x Φ(x)` with the error function.
    Gelu,
    /// The same with the hyperbolic tangent in its place (`gelu_new`).
    GeluTanh,
}

/// `config.json` as it is written.
#[derive(Deserialize)]
struct Raw {
    vocab_size: usize,
    hidden_size: usize,
    ffn_dim: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    word_embed_proj_dim: Option<usize>,
    #[serde(default = "yes")]
    do_layer_norm_before: bool,
    #[serde(default, rename = "_remove_final_layer_norm")]
    remove_final_layer_norm: bool,
    activation_function: Option<String>,
    #[serde(default = "yes")]
    enable_bias: bool,
    #[serde(default = "yes")]
    layer_norm_elementwise_affine: bool,
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
}

fn default_positions() -> usize {
    2048
}

fn yes() -> bool {
    true
}

impl OptConfig {
    /// The configuration in a `config.json`, checked; `path` is where it is, for errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for what makes no model.
    pub fn from_json(json: &Map<String, Value>, path: &Path) -> Result<Self> {
        let fields = Fields { path };
        let raw: Raw = fields.read(json)?;
        let (heads, hidden) = (raw.num_attention_heads, raw.hidden_size);
        let width = raw.word_embed_proj_dim.unwrap_or(hidden);
        fields.check_sizes(&[
            ("vocab_size", raw.vocab_size),
            ("hidden_size", hidden),
            ("ffn_dim", raw.ffn_dim),
            ("num_attention_heads", heads),
            ("max_position_embeddings", raw.max_position_embeddings),
            ("word_embed_proj_dim", width),
        ])?;
        fields.check_layers(raw.num_hidden_layers)?;
        if !hidden.is_multiple_of(heads) {
            let problem = format!("is {heads}, which does not divide the hidden size {hidden}");
            return Err(fields.refuse("num_attention_heads", problem));
        }
        let activation = match raw.activation_function.as_deref().unwrap_or("relu") {
            "relu" => Activation::Relu,
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => {
                let problem = format!("is `{other}`; supported: relu, gelu, gelu_new");
                return Err(fields.refuse("activation_function", problem));
            }
        };
        Ok(Self {
            vocab_size: raw.vocab_size,
            hidden_size: hidden,
            ffn_dim: raw.ffn_dim,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: heads,
            max_position_embeddings: raw.max_position_embeddings,
            word_embed_proj_dim: width,
            do_layer_norm_before: raw.do_layer_norm_before,
            remove_final_layer_norm: raw.remove_final_layer_norm,
            activation,
            enable_bias: raw.enable_bias,
            layer_norm_elementwise_affine: raw.layer_norm_elementwise_affine,
            tie_word_embeddings: raw.tie_word_embeddings,
        })
    }

    /// A `config.json` of this shape.
    pub fn to_json(&self) -> Map<String, Value> {
        let activation = match self.activation {
            Activation::Relu => "relu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_new",
        };
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
            "activation_function": activation,
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
