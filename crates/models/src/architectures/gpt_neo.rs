//! GPT-Neo (Black et al. 2021): learned positions, scores without a factor, and a window in some layers.

use burn::module::Module;
use burn::tensor::Tensor;
use kernels::Scores;
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

/// The names of the tensors around the blocks of GPT-2 and its relatives.
pub(super) const NAMES: Names = Names {
    prefix: "transformer",
    embedding: "wte",
    positions: "wpe",
    layers: "h",
    norm: "ln_f",
};

/// The shape of a GPT-Neo.
///
/// The default is the shape of GPT-Neo-125M.
#[derive(Clone, Debug, PartialEq)]
pub struct GptNeoConfig {
    /// The number of tokens of the vocabulary.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The width inside the MLP.
    pub intermediate_size: usize,
    /// The number of blocks.
    pub num_layers: usize,
    /// The number of heads.
    pub num_heads: usize,
    /// The number of positions that the model has embeddings for.
    pub max_position_embeddings: usize,
    /// The number of tokens that a token attends to, itself included, in layers with a window.
    pub window_size: usize,
    /// Whether each layer has a window. Without it, every other layer has one, from the second on.
    pub has_window: Option<Vec<bool>>,
    /// The activation function of the MLP.
    pub activation: Activation,
    /// The constant that the norms add to the variance.
    pub layer_norm_epsilon: f64,
    /// Whether the embedding is the head as well.
    pub tie_word_embeddings: bool,
}

impl Default for GptNeoConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50_257,
            hidden_size: 768,
            intermediate_size: 3072,
            num_layers: 12,
            num_heads: 12,
            max_position_embeddings: 2048,
            window_size: 256,
            has_window: None,
            activation: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            tie_word_embeddings: true,
        }
    }
}

setters! {
    GptNeoConfig:
    with_vocab_size vocab_size usize,
    with_hidden_size hidden_size usize,
    with_intermediate_size intermediate_size usize,
    with_num_layers num_layers usize,
    with_num_heads num_heads usize,
    with_max_position_embeddings max_position_embeddings usize,
    with_window_size window_size usize,
    with_has_window has_window impl Into<Option<Vec<bool>>>,
    with_activation activation Activation,
    with_layer_norm_epsilon layer_norm_epsilon f64,
    with_tie_word_embeddings tie_word_embeddings bool,
}

impl GptNeoConfig {
    fn read(settings: &Settings) -> Result<Self> {
        settings.ignore(&[
            "resid_dropout",
            "embed_dropout",
            "attention_dropout",
            "classifier_dropout",
            // Made of `attention_types`.
            "attention_layers",
        ]);
        let hidden_size = settings.width("hidden_size")?;
        let num_layers = settings.layers_named(&["num_layers", "num_hidden_layers"])?;
        let num_heads = settings.size_named(&["num_heads", "num_attention_heads"])?;
        if !hidden_size.is_multiple_of(num_heads) {
            let problem =
                format!("is {num_heads}, which does not divide the hidden size {hidden_size}");
            return Err(settings.refuse("num_heads", problem));
        }
        let inner = settings.optional_width("intermediate_size")?;
        Ok(Self {
            vocab_size: settings.width("vocab_size")?,
            hidden_size,
            intermediate_size: inner.unwrap_or(4 * hidden_size),
            num_layers,
            num_heads,
            max_position_embeddings: settings.size_or("max_position_embeddings", 2048)?,
            window_size: settings.size_or("window_size", 256)?,
            has_window: Some(attention_types(settings, num_layers)?)
                .filter(|stated| (0..num_layers).any(|layer| stated[layer] != by_default(layer))),
            activation: settings.activation_or("activation_function", Activation::GeluTanh)?,
            layer_norm_epsilon: settings.positive_or("layer_norm_epsilon", 1e-5)?,
            tie_word_embeddings: settings.flag_or("tie_word_embeddings", true)?,
        })
    }

    fn slides(&self, layer: usize) -> bool {
        match &self.has_window {
            Some(layers) => layers[layer],
            None => by_default(layer),
        }
    }

    /// The `config.json` of a new model of this shape.
    pub fn to_json(&self) -> Map<String, Value> {
        let layers = (0..self.num_layers).map(|layer| {
            let name = if self.slides(layer) {
                "local"
            } else {
                "global"
            };
            json!([[name], 1])
        });
        let json = json!({
            "architectures": ["GPTNeoForCausalLM"],
            "model_type": "gpt_neo",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "window_size": self.window_size,
            "attention_types": layers.collect::<Vec<_>>(),
            "activation_function": self.activation.name(),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "tie_word_embeddings": self.tie_word_embeddings,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
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

/// Whether a layer has a window where nothing is stated.
fn by_default(layer: usize) -> bool {
    !layer.is_multiple_of(2)
}

/// Whether each layer has a window: `attention_types` is a list of lists of kinds, each with the number of
/// its repetitions.
fn attention_types(settings: &Settings, n_layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "attention_types";
    let default = json!([[["global", "local"], 12]]);
    let value = match settings.get(KEY) {
        Some(value) if !value.is_null() => value,
        _ => &default,
    };
    let refuse = |problem: String| settings.refuse(KEY, problem);
    let mut layers = Vec::new();
    for item in value.as_array().into_iter().flatten() {
        let kinds = item.get(0).and_then(Value::as_array);
        let n = item.get(1).and_then(Value::as_u64);
        let Some((kinds, n)) = kinds.zip(n) else {
            let problem = format!("has {item}, which is not a list of kinds and a number");
            return Err(refuse(problem));
        };
        for _ in 0..n {
            for kind in kinds {
                layers.push(match kind.as_str() {
                    Some("global") => false,
                    Some("local") => true,
                    _ => return Err(refuse(format!("has {kind}; supported: global, local"))),
                });
            }
            if layers.len() > n_layers || kinds.is_empty() {
                break;
            }
        }
    }
    if layers.len() == n_layers {
        return Ok(layers);
    }
    let problem = format!("does not make the {n_layers} layers of the model");
    Err(refuse(problem))
}

impl Architecture for GptNeoConfig {
    type Block = GptNeoBlock;

    const MODEL_TYPES: &'static [ModelType<Self>] = &[ModelType {
        name: "gpt_neo",
        read: Self::read,
    }];

    fn shape(&self) -> Shape {
        let max = self.max_position_embeddings;
        let norm = NormKind::Layer {
            affine: true,
            eps: self.layer_norm_epsilon,
        };
        Shape {
            tie_word_embeddings: self.tie_word_embeddings,
            learned_positions: Some(LearnedPositions {
                n_rows: max,
                first_row: 0,
            }),
            max_positions: Some(max),
            ..Shape::new(
                NAMES,
                self.vocab_size,
                self.hidden_size,
                self.num_layers,
                max,
                norm,
            )
        }
    }

    fn identity(&self) -> Identity {
        Identity::default()
            .with_setting("architecture", "gpt_neo")
            .with_setting("num_heads", self.num_heads)
            .with_setting("activation_function", self.activation.name())
            .with_setting("layer_norm_epsilon", self.layer_norm_epsilon as f32)
    }

    fn untie(&mut self) {
        self.tie_word_embeddings = false;
    }

    fn reach(&self, layer: usize) -> Reach {
        Reach {
            window: self.slides(layer).then_some(self.window_size),
            ..Reach::default()
        }
    }
}

#[derive(Module, Debug)]
pub(crate) struct GptNeoBlock {
    ln_1: Norm,
    attention: Attention,
    ln_2: Norm,
    c_fc: Linear,
    c_proj: Linear,
    #[module(skip)]
    activation: Activation,
}

impl DecoderBlock for GptNeoBlock {
    type Config = GptNeoConfig;

    parts! {
        config =>
        norms:
            "ln_1" ln_1 [config.hidden_size],
            "ln_2" ln_2 [config.hidden_size],
        projections:
            0 "attn.attention.q_proj" attention.q_proj [config.hidden_size; 2], bias false,
            0 "attn.attention.k_proj" attention.k_proj [config.hidden_size; 2], bias false,
            0 "attn.attention.v_proj" attention.v_proj [config.hidden_size; 2], bias false,
            1 "attn.attention.out_proj" attention.o_proj [config.hidden_size; 2], bias true,
            2 "mlp.c_fc" c_fc [config.hidden_size, config.intermediate_size], bias true,
            3 "mlp.c_proj" c_proj [config.intermediate_size, config.hidden_size], bias true,
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [ln_1, ln_2] = parts.norms()?;
        let [q_proj, k_proj, v_proj, o_proj, c_fc, c_proj] = parts.linears()?;
        let config = parts.config;
        let head_dim = config.hidden_size / config.num_heads;
        Ok(Self {
            ln_1,
            attention: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                heads: Heads {
                    scores: Scores::new(1.0),
                    ..Heads::new(head_dim, parts.reach)
                },
            },
            ln_2,
            c_fc,
            c_proj,
            activation: config.activation,
        })
    }

    fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        self.attention.attend(input, positions, cache)
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
                let x = residual + self.attention.o_proj.forward(input);
                (x.clone(), self.ln_2.forward(x))
            }
            2 => (residual, self.activation.apply(self.c_fc.forward(input))),
            _ => {
                let x = residual + self.c_proj.forward(input);
                (x.clone(), x)
            }
        }
    }
}
