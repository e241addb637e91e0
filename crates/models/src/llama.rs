//! LLaMA (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention.

use std::path::Path;

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Identity, Linear, Spans};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::Result;
use crate::architecture::{Architecture, DecoderBlock, Parts, Shape, parts};
use crate::attention::Attention;
use crate::fields::{Fields, setters};
use crate::kv_cache::KvCache;
use crate::norm::{Norm, NormKind};
use crate::positions::Positions;
use crate::rope::{Rope, Rotary};
use crate::rope_scaling::{self, RopeScaling};
use crate::source::Source;

/// The shape of a LLaMA, whose block Mistral and Qwen2 share.
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
    /// The number of tokens that attention reaches back, if it is limited. Longer texts are refused.
    pub sliding_window: Option<usize>,
    /// The constant that the norms add to the mean square.
    pub rms_norm_eps: f64,
    /// The base of the frequencies of the rotary embedding.
    pub rope_theta: f64,
    /// The scaling of the frequencies for longer texts.
    pub rope_scaling: RopeScaling,
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
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
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
    with_rms_norm_eps rms_norm_eps f64,
    with_rope_theta rope_theta f64,
    with_rope_scaling rope_scaling RopeScaling,
    with_attention_bias attention_bias bool,
    with_attention_output_bias attention_output_bias bool,
    with_mlp_bias mlp_bias bool,
    with_tie_word_embeddings tie_word_embeddings bool,
}

/// The settings of a `config.json`.
#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
}

fn default_positions() -> usize {
    2048
}

fn default_eps() -> f64 {
    1e-6
}

impl LlamaConfig {
    /// Reads and checks the `config.json` at `path`.
    ///
    /// # Errors
    /// [`ConfigError::Setting`](crate::ConfigError::Setting) for a setting that is missing, out of range or not
    /// supported.
    pub fn from_json(json: &Map<String, Value>, path: &Path) -> Result<Self> {
        let fields = Fields { path };
        let refuse = |setting: &str, problem: String| fields.refuse(setting, problem);
        let raw: Raw = fields.read(json)?;
        fields.check_sizes(&[
            ("vocab_size", raw.vocab_size),
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_attention_heads", raw.num_attention_heads),
            ("num_key_value_heads", raw.num_key_value_heads.unwrap_or(1)),
            ("head_dim", raw.head_dim.unwrap_or(1)),
            ("max_position_embeddings", raw.max_position_embeddings),
        ])?;
        fields.check_layers(raw.num_hidden_layers)?;
        if raw.model_type != "llama" {
            for setting in ["num_key_value_heads", "max_position_embeddings"] {
                if json.get(setting).is_none_or(Value::is_null) {
                    let problem =
                        "is missing, and its default differs between architectures; state it";
                    return Err(refuse(setting, problem.into()));
                }
            }
            if raw.mlp_bias {
                let problem = format!("is true, but {} has no biases in its MLP", raw.model_type);
                return Err(refuse("mlp_bias", problem));
            }
        }
        let window = raw.window(json.contains_key("sliding_window"));
        let max = raw.max_position_embeddings;
        if let Some(window) = window.filter(|&window| window < max) {
            let problem = format!(
                "is {window}, and texts may have {max} tokens: attention with a window is not supported; for texts of up to {window} tokens, set max_position_embeddings to {window}"
            );
            return Err(refuse("sliding_window", problem));
        }
        let (heads, hidden) = (raw.num_attention_heads, raw.hidden_size);
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("is {kv_heads}, which does not divide the {heads} heads");
            return Err(refuse("num_key_value_heads", problem));
        }
        if raw.head_dim.is_none() && !hidden.is_multiple_of(heads) {
            let problem = format!("is {heads}, which does not divide the hidden size {hidden}");
            return Err(refuse("num_attention_heads", problem));
        }
        let head_dim = raw.head_dim.unwrap_or(hidden / heads);
        if !head_dim.is_multiple_of(2) {
            return Err(refuse(
                "head_dim",
                format!("is {head_dim}; rotary embeddings turn pairs"),
            ));
        }
        // In f32, as the norms use it: what becomes 0 or an infinity there is refused.
        let eps = raw.rms_norm_eps as f32;
        if !(eps.is_normal() && eps > 0.0) {
            let problem = format!(
                "is {}; it must be positive and within the range of f32",
                raw.rms_norm_eps
            );
            return Err(refuse("rms_norm_eps", problem));
        }
        if let Some(act) = raw.hidden_act.filter(|act| act != "silu" && act != "swish") {
            return Err(refuse("hidden_act", format!("is `{act}`; supported: silu")));
        }
        let (theta, scaling) = rope_scaling::read(&fields, json, max)?;
        Ok(Self {
            vocab_size: raw.vocab_size,
            hidden_size: hidden,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: raw.max_position_embeddings,
            sliding_window: window,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: theta,
            rope_scaling: scaling,
            attention_bias: raw.attention_bias || raw.model_type == "qwen2",
            attention_output_bias: raw.attention_bias && raw.model_type != "qwen2",
            mlp_bias: raw.mlp_bias,
            tie_word_embeddings: raw.tie_word_embeddings,
        })
    }

    /// The `config.json` of a new model of this shape.
    ///
    /// # Panics
    /// If there is a rope scaling, or a combination of biases that no architecture has. Such models are
    /// loaded from files, whose `config.json` is kept.
    pub fn to_json(&self) -> Map<String, Value> {
        assert_eq!(
            self.rope_scaling,
            RopeScaling::None,
            "a new model has no rope scaling"
        );
        let (architecture, model_type) = match (self.attention_bias, self.attention_output_bias) {
            (true, false) => {
                assert!(
                    !self.mlp_bias,
                    "biases of queries, keys, values and the MLP alone"
                );
                ("Qwen2ForCausalLM", "qwen2")
            }
            (bias, output) => {
                assert_eq!(bias, output, "a bias of the last projection alone");
                ("LlamaForCausalLM", "llama")
            }
        };
        let json = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": null,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
        });
        match json {
            Value::Object(map) => map,
            _ => unreachable!("an object was written above"),
        }
    }

    pub(crate) fn rotary(&self) -> Rotary {
        Rotary {
            head_dim: self.head_dim,
            theta: self.rope_theta,
            scaling: self.rope_scaling,
            max_positions: self.max_position_embeddings,
        }
    }

    fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The longest text that the model was trained for, in tokens.
    fn max_seq_len(&self) -> usize {
        let max = self.max_position_embeddings;
        if let Some(window) = self.sliding_window {
            return max.min(window);
        }
        match self.rope_scaling {
            RopeScaling::None | RopeScaling::Llama3 { .. } => max,
            // Files differ in whether `max` is the length before or after scaling.
            RopeScaling::Linear { factor }
            | RopeScaling::Dynamic { factor }
            | RopeScaling::Yarn { factor, .. } => max.max((max as f64 * factor) as usize),
        }
    }
}

impl Raw {
    /// The sliding window of the layers that have one, as transformers reads it.
    fn window(&self, is_stated: bool) -> Option<usize> {
        /// The window of a Mistral whose file states none.
        const MISTRAL: usize = 4096;
        match self.model_type.as_str() {
            "mistral" if !is_stated => Some(MISTRAL),
            "mistral" => self.sliding_window,
            "qwen2" if self.use_sliding_window == Some(true) => {
                let n_layers = self.num_hidden_layers;
                let slides = match &self.layer_types {
                    Some(types) => types.iter().any(|layer| layer != "full_attention"),
                    // The layers from that one on have a window.
                    None => self.max_window_layers.is_none_or(|first| first < n_layers),
                };
                self.sliding_window.filter(|_| slides)
            }
            _ => None,
        }
    }
}

impl Architecture for LlamaConfig {
    type Block = LlamaBlock;

    const MODEL_TYPES: &'static [&'static str] = &["llama", "mistral", "qwen2"];

    fn shape(&self) -> Shape {
        let is_dynamic = matches!(self.rope_scaling, RopeScaling::Dynamic { .. });
        Shape {
            prefix: "model",
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            embedding_width: self.hidden_size,
            n_layers: self.num_hidden_layers,
            tie_word_embeddings: self.tie_word_embeddings,
            norm: NormKind::Rms {
                eps: self.rms_norm_eps,
            },
            final_norm: Some("norm"),
            position_rows: None,
            max_positions: self.sliding_window,
            max_cached: is_dynamic.then_some(self.max_position_embeddings),
            max_seq_len: self.max_seq_len(),
        }
    }

    fn identity(&self) -> Identity {
        let identity = Identity::default()
            .with_setting("architecture", "llama")
            .with_setting("num_attention_heads", self.num_attention_heads)
            .with_setting("num_key_value_heads", self.num_key_value_heads)
            .with_setting("head_dim", self.head_dim)
            .with_setting("hidden_act", "silu")
            // Norms add it in f32.
            .with_setting("rms_norm_eps", self.rms_norm_eps as f32)
            .with_setting("rope_theta", self.rope_theta);
        (self.rope_scaling).state(identity, self.max_position_embeddings)
    }

    fn positions(&self, spans: &Spans) -> Positions {
        Positions::rotary(Rope::new(&self.rotary(), spans), spans)
    }
}

#[derive(Module, Debug)]
pub(crate) struct LlamaBlock {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl DecoderBlock for LlamaBlock {
    type Config = LlamaConfig;

    parts! {
        config =>
        norms:
            "input_layernorm" input_layernorm [config.hidden_size],
            "post_attention_layernorm" post_attention_layernorm [config.hidden_size],
        projections:
            0 "self_attn.q_proj" self_attn.q_proj
                [config.hidden_size, config.query_width()], bias config.attention_bias,
            0 "self_attn.k_proj" self_attn.k_proj
                [config.hidden_size, config.key_width()], bias config.attention_bias,
            0 "self_attn.v_proj" self_attn.v_proj
                [config.hidden_size, config.key_width()], bias config.attention_bias,
            1 "self_attn.o_proj" self_attn.o_proj
                [config.query_width(), config.hidden_size], bias config.attention_output_bias,
            2 "mlp.gate_proj" mlp.gate_proj
                [config.hidden_size, config.intermediate_size], bias config.mlp_bias,
            2 "mlp.up_proj" mlp.up_proj
                [config.hidden_size, config.intermediate_size], bias config.mlp_bias,
            3 "mlp.down_proj" mlp.down_proj
                [config.intermediate_size, config.hidden_size], bias config.mlp_bias,
    }

    fn build<S: Source>(mut parts: Parts<Self, S>) -> Result<Self, S::Error> {
        let [input_layernorm, post_attention_layernorm] = parts.norms()?;
        let [
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        ] = parts.linears()?;
        let head_dim = parts.config.head_dim;
        Ok(Self {
            input_layernorm,
            self_attn: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                head_dim,
            },
            post_attention_layernorm,
            mlp: Mlp {
                gate_proj,
                up_proj,
                down_proj,
            },
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
        let Mlp {
            gate_proj,
            up_proj,
            down_proj,
        } = &self.mlp;
        match stage {
            1 => {
                let x = residual + self.self_attn.o_proj.forward(input);
                (x.clone(), self.post_attention_layernorm.forward(x))
            }
            2 => {
                let gate = gate_proj.forward(input.clone());
                (residual, kernels::silu_mul(gate, up_proj.forward(input)))
            }
            _ => {
                let x = residual + down_proj.forward(input);
                (x.clone(), x)
            }
        }
    }
}
