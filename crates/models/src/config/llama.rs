use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Fields;
use crate::Result;

/// The shape of a LLaMA, from a Hugging Face `config.json`; Mistral's and Qwen2's blocks are the same.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values; each serves as many query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// Tokens that a token sees at most, itself among them, if that is not all before it: texts are no
    /// longer than that.
    pub sliding_window: Option<usize>,
    /// What the norms add to the mean square.
    pub rms_norm_eps: f64,
    /// The base of the rotary embedding's frequencies.
    pub rope_theta: f64,
    /// How the frequencies are changed for longer texts.
    pub rope_scaling: RopeScaling,
    /// Whether queries, keys and values have biases.
    pub attention_bias: bool,
    /// Whether the last projection of the attention has a bias.
    pub attention_output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
}

/// How the frequencies of a rotary embedding are changed for longer texts, as transformers does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All are divided by `factor`.
    Linear {
        /// How much longer texts may be.
        factor: f64,
    },
    /// The base grows once a text is longer than `max_position_embeddings` (NTK-aware), by the longest
    /// text of a batch for all of them, as in transformers.
    Dynamic {
        /// How much longer texts may be.
        factor: f64,
    },
    /// Low frequencies are divided, high ones kept, as in LLaMA 3.1.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Positions before the model was extended.
        original: usize,
    },
    /// A ramp between divided and kept frequencies (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// The divisor of the low frequencies.
        factor: f64,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Positions before the model was extended.
        original: usize,
        /// Whether the ramp begins and ends at whole dimensions.
        truncate: bool,
    },
}

/// `config.json` as it is written, in both of transformers' spellings.
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
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
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

#[derive(Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; some files have both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

impl LlamaConfig {
    /// The names of the architectures that are of this shape, as `config.json` has them.
    pub(super) const MODEL_TYPES: [&str; 3] = ["llama", "mistral", "qwen2"];

    /// The configuration in a `config.json`, checked; `path` is where it is, for errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for what makes no model.
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
                    let problem = "is missing; what it is without it differs between architectures";
                    return Err(refuse(setting, problem.into()));
                }
            }
            if raw.mlp_bias {
                let problem = format!("is true, which a {} has not", raw.model_type);
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
        for rope in ["rope_parameters", "rope_scaling"] {
            let by_layer = |rope: &Map<String, Value>| rope.values().any(Value::is_object);
            if json
                .get(rope)
                .and_then(Value::as_object)
                .is_some_and(by_layer)
            {
                let problem = "differs between layers, which is not supported";
                return Err(refuse(rope, problem.into()));
            }
        }
        if let (Some(first), Some(second)) = (
            json.get("rope_parameters").filter(|rope| !rope.is_null()),
            json.get("rope_scaling").filter(|rope| !rope.is_null()),
        ) && first != second
        {
            let problem = "is beside another rope_parameters; keep the one that is right";
            return Err(refuse("rope_scaling", problem.into()));
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
        if !(raw.rms_norm_eps.is_finite() && raw.rms_norm_eps > 0.0) {
            return Err(refuse(
                "rms_norm_eps",
                format!("is {}; it must be positive", raw.rms_norm_eps),
            ));
        }
        if let Some(act) = raw.hidden_act.filter(|act| act != "silu" && act != "swish") {
            return Err(refuse("hidden_act", format!("is `{act}`; supported: silu")));
        }
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let theta = rope
            .and_then(|rope| rope.rope_theta)
            .or(raw.rope_theta)
            .unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(refuse(
                "rope_theta",
                format!("is {theta}; it must be above 1"),
            ));
        }
        let scaling = match rope {
            Some(rope) => rope
                .scaling(raw.max_position_embeddings)
                .map_err(|problem| refuse("rope_scaling", problem))?,
            None => RopeScaling::None,
        };
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

    /// The longest text that the model was made for, in tokens.
    pub fn max_seq_len(&self) -> usize {
        let max = self.max_position_embeddings;
        if let Some(window) = self.sliding_window {
            return max.min(window);
        }
        match self.rope_scaling {
            RopeScaling::None | RopeScaling::Llama3 { .. } => max,
            // Files differ in whether `max` is the length before or after.
            RopeScaling::Linear { factor }
            | RopeScaling::Dynamic { factor }
            | RopeScaling::Yarn { factor, .. } => max.max((max as f64 * factor) as usize),
        }
    }

    /// A `config.json` of this shape, for a model without a rope scaling.
    ///
    /// # Panics
    /// If there is a scaling, or biases of projections that no architecture has alone: such models come
    /// from files, which have their own `config.json`.
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
}

impl Raw {
    /// The window of the layers that have one, as transformers reads it.
    fn window(&self, is_stated: bool) -> Option<usize> {
        /// Of a Mistral that says nothing of it.
        const MISTRAL: usize = 4096;
        match self.model_type.as_str() {
            "mistral" if !is_stated => Some(MISTRAL),
            "mistral" => self.sliding_window,
            "qwen2" if self.use_sliding_window == Some(true) => {
                let n_layers = self.num_hidden_layers;
                let slides = match &self.layer_types {
                    Some(types) => types.iter().any(|layer| layer != "full_attention"),
                    // The layers from there on.
                    None => self.max_window_layers.is_none_or(|first| first < n_layers),
                };
                self.sliding_window.filter(|_| slides)
            }
            _ => None,
        }
    }
}

impl RawRope {
    fn scaling(&self, max_positions: usize) -> Result<RopeScaling, String> {
        if self
            .partial_rotary_factor
            .is_some_and(|factor| factor != 1.0)
        {
            return Err("has a partial_rotary_factor, which is not supported".into());
        }
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(format!("has {name} {value}; it must be positive")),
            None => Err(format!("has no {name}")),
        };
        let original = self
            .original_max_position_embeddings
            .unwrap_or(max_positions);
        if original == 0 {
            return Err("has original_max_position_embeddings 0".into());
        }
        let factor = || need("factor", self.factor);
        match self
            .rope_type
            .as_deref()
            .or(self.r#type.as_deref())
            .unwrap_or("default")
        {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "dynamic" => Ok(RopeScaling::Dynamic { factor: factor()? }),
            "llama3" => {
                let low_freq_factor = need("low_freq_factor", self.low_freq_factor)?;
                let high_freq_factor = need("high_freq_factor", self.high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err("has a high_freq_factor that is not above low_freq_factor".into());
                }
                Ok(RopeScaling::Llama3 {
                    factor: factor()?,
                    low_freq_factor,
                    high_freq_factor,
                    original,
                })
            }
            "yarn" => {
                let factor = match self.factor {
                    Some(_) => factor()?,
                    None => max_positions as f64 / original as f64,
                };
                let magnitude = |scale: f64| match factor <= 1.0 {
                    true => 1.0,
                    false => 0.1 * scale * factor.ln() + 1.0,
                };
                let scales = self.mscale.zip(self.mscale_all_dim);
                let inferred = match scales.filter(|&(a, b)| a != 0.0 && b != 0.0) {
                    Some((mscale, all)) => magnitude(mscale) / magnitude(all),
                    None => magnitude(1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    attention_factor: need(
                        "attention_factor",
                        Some(self.attention_factor.unwrap_or(inferred)),
                    )?,
                    beta_fast: need("beta_fast", Some(self.beta_fast.unwrap_or(32.0)))?,
                    beta_slow: need("beta_slow", Some(self.beta_slow.unwrap_or(1.0)))?,
                    original,
                    truncate: self.truncate.unwrap_or(true),
                })
            }
            other => Err(format!(
                "has the type `{other}`; supported: default, linear, dynamic, llama3, yarn"
            )),
        }
    }
}
