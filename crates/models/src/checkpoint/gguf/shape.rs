//! The configuration in the metadata of a file, both ways.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::path::Path;

use serde_json::{Map, Value as Json, json};
use tensor_files::gguf::Value;

use super::names::Architecture;
use crate::{Activation, ConfigError, Error, LlamaConfig, Result, RopeScaling};

const ARCHITECTURE: &str = "general.architecture";

/// LLaMA 3.1 and later, whose settings files do not state: they have the factors that come of them.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_POSITIONS: usize = 8192;

/// The metadata of a file, for checked access.
pub(super) struct Metadata<'a> {
    pub(super) path: &'a Path,
    pub(super) values: &'a BTreeMap<String, Value>,
}

impl<'a> Metadata<'a> {
    /// An error about a key.
    pub(super) fn refuse(&self, key: &str, problem: impl Into<String>) -> Error {
        ConfigError::setting(self.path, key, problem.into()).into()
    }

    /// A value of a key, if it is there; `read` returns none for a value of another type.
    pub(super) fn get<T>(
        &self,
        key: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let read = read(value).ok_or_else(|| self.refuse(key, "is of another type than it has"));
        read.map(Some)
    }

    /// A value of a key that must be there.
    pub(super) fn need<T>(&self, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
        let value = self.get(key, read)?;
        value.ok_or_else(|| self.refuse(key, "is missing"))
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, |value| usize::try_from(value.as_u64()?).ok())
    }

    /// The architecture of the file.
    pub(super) fn architecture(&self) -> Result<Architecture> {
        let name = self.need(ARCHITECTURE, Value::as_str)?;
        let known = Architecture::ALL.into_iter();
        match known.clone().find(|(of, _)| *of == name) {
            Some((_, architecture)) => Ok(architecture),
            None => {
                let names: Vec<&str> = known.map(|(name, _)| name).collect();
                let error = ConfigError::Architecture {
                    path: self.path.into(),
                    model_type: name.into(),
                    supported: names.join(", "),
                };
                Err(error.into())
            }
        }
    }

    /// The `config.json` of the model, whose tensors `has` tells and whose embedding has `vocab_size` rows.
    ///
    /// `rope_freqs` are the factors of the rotary frequencies, if the file has them.
    pub(super) fn config(
        &self,
        vocab_size: usize,
        has: impl Fn(&str) -> bool,
        rope_freqs: Option<&[f32]>,
    ) -> Result<Map<String, Json>> {
        let architecture = self.architecture()?;
        let key = |name: &str| format!("{}.{name}", architecture.name());
        let size = |name: &str| -> Result<usize> {
            let key = key(name);
            let size = self.size(&key)?;
            size.ok_or_else(|| self.refuse(&key, "is missing"))
        };
        for name in ["expert_count", "expert_used_count"] {
            if self.size(&key(name))?.is_some_and(|n| n > 0) {
                let problem = "is a mixture of experts, which is not supported";
                return Err(self.refuse(&key(name), problem));
            }
        }
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let kv_heads = self.size(&key("attention.head_count_kv"))?.unwrap_or(heads);
        let head_dim = match self.size(&key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None => hidden.checked_div(heads).unwrap_or(0),
        };
        for name in ["rope.dimension_count", "attention.value_length"] {
            if let Some(other) = self.size(&key(name))?.filter(|&other| other != head_dim) {
                let problem = format!("is {other}, and heads have {head_dim} dimensions");
                return Err(self.refuse(&key(name), problem));
            }
        }
        let context = size("context_length")?;
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let eps = self.need(&eps_key, Value::as_f64)?;
        let theta = self.get(&key("rope.freq_base"), Value::as_f64)?;
        let window = self.size(&key("attention.sliding_window"))?;
        let window = window.filter(|&window| window > 0);
        let (class, model_type) = match (architecture, window) {
            (Architecture::Llama, None) => ("LlamaForCausalLM", "llama"),
            // Of the models that are `llama` here, those with a window.
            (Architecture::Llama, Some(_)) => ("MistralForCausalLM", "mistral"),
            (Architecture::Qwen2, None) => ("Qwen2ForCausalLM", "qwen2"),
            (Architecture::Qwen2, Some(_)) => {
                let problem = "is not read for qwen2";
                return Err(self.refuse(&key("attention.sliding_window"), problem));
            }
        };
        let config = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": size("feed_forward_length")?,
            "num_hidden_layers": size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": context,
            "sliding_window": window,
            "hidden_act": "silu",
            "rms_norm_eps": eps,
            "rope_theta": theta.unwrap_or(10_000.0),
            "rope_scaling": self.rope_scaling(key, head_dim, theta.unwrap_or(10_000.0), rope_freqs)?,
            "attention_bias": has("blk.0.attn_q.bias"),
            "mlp_bias": has("blk.0.ffn_gate.bias"),
            "tie_word_embeddings": !has("output.weight"),
        });
        match config {
            Json::Object(config) => Ok(config),
            _ => unreachable!("an object was written above"),
        }
    }

    fn rope_scaling(
        &self,
        key: impl Fn(&str) -> String,
        head_dim: usize,
        theta: f64,
        rope_freqs: Option<&[f32]>,
    ) -> Result<Json> {
        let kind_key = key("rope.scaling.type");
        let kind = self.get(&kind_key, Value::as_str)?.unwrap_or("none");
        let factor_key = key("rope.scaling.factor");
        let factor = self.get(&factor_key, Value::as_f64)?;
        match (kind, rope_freqs) {
            ("none", None) => Ok(Json::Null),
            ("linear", None) => {
                let factor = factor.ok_or_else(|| self.refuse(&factor_key, "is missing"))?;
                Ok(json!({"rope_type": "linear", "factor": factor}))
            }
            // Of the families, only LLaMA 3.1 and later have factors; those of other settings are refused.
            ("none", Some(found)) => {
                let factor = found.iter().copied().fold(1.0, f32::max);
                // What the file has decides how many there are, not what it claims.
                let same = found.len() == head_dim / 2 && {
                    let expected = llama3_factors(head_dim, theta, f64::from(factor));
                    let mut pairs = expected.iter().zip(found);
                    pairs.all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs())
                };
                if !same {
                    let problem = format!(
                        "are not the factors of LLaMA 3.1 for {ORIGINAL_POSITIONS} positions"
                    );
                    return Err(self.refuse(super::names::ROPE_FREQS, problem));
                }
                Ok(json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": LOW_FREQ_FACTOR,
                    "high_freq_factor": HIGH_FREQ_FACTOR,
                    "original_max_position_embeddings": ORIGINAL_POSITIONS,
                }))
            }
            (other, _) => {
                let problem = format!("is `{other}`; supported: none, linear");
                Err(self.refuse(&kind_key, problem))
            }
        }
    }
}

/// The factors by which LLaMA 3.1 divides each frequency.
fn llama3_factors(head_dim: usize, theta: f64, factor: f64) -> Vec<f32> {
    let original = ORIGINAL_POSITIONS as f64;
    let (longest, shortest) = (original / LOW_FREQ_FACTOR, original / HIGH_FREQ_FACTOR);
    let factor = |i: usize| {
        let wavelength = 2.0 * PI * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < shortest {
            1.0
        } else if wavelength > longest {
            factor
        } else {
            let span = HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR;
            let smooth = (original / wavelength - LOW_FREQ_FACTOR) / span;
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..head_dim / 2).map(|i| factor(i) as f32).collect()
}

/// Metadata, and the factors of the rotary frequencies if there are any.
type Stated = (Vec<(String, Value)>, Option<Vec<f32>>);

/// The metadata of a model's shape, and the factors of its rotary frequencies if it has them.
///
/// # Errors
/// The setting that the format does not hold, with the reason.
pub(super) fn metadata(
    architecture: Architecture,
    config: &LlamaConfig,
    name: &str,
) -> Result<Stated, (&'static str, String)> {
    let key = |of: &str| format!("{}.{of}", architecture.name());
    let size = |of: &str, size: usize| (key(of), Value::U32(size as u32));
    let float = |of: &str, value: f64| (key(of), Value::F32(value as f32));
    let mut values = vec![
        (
            ARCHITECTURE.into(),
            Value::String(architecture.name().into()),
        ),
        ("general.type".into(), Value::String("model".into())),
        ("general.name".into(), Value::String(name.into())),
        ("general.quantization_version".into(), Value::U32(2)),
        size("vocab_size", config.vocab_size),
        size("context_length", config.max_position_embeddings),
        size("embedding_length", config.hidden_size),
        size("feed_forward_length", config.intermediate_size),
        size("block_count", config.num_hidden_layers),
        size("attention.head_count", config.num_attention_heads),
        size("attention.head_count_kv", config.num_key_value_heads),
        size("attention.key_length", config.head_dim),
        size("attention.value_length", config.head_dim),
        size("rope.dimension_count", config.head_dim),
        float("attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        float("rope.freq_base", config.rope_theta),
    ];
    if config.rope_theta != f64::from(config.rope_theta as f32) {
        let problem = format!("is {}, which f32 does not hold", config.rope_theta);
        return Err(("rope_theta", problem));
    }
    if config.hidden_act != Activation::Silu {
        let problem = format!(
            "is {:?}, and the format's models have SiLU",
            config.hidden_act
        );
        return Err(("hidden_act", problem));
    }
    if let Some(window) = config.sliding_window {
        // llama.cpp computes none in these architectures.
        if window < config.max_position_embeddings {
            let problem = format!("is {window}, which llama.cpp does not compute here");
            return Err(("sliding_window", problem));
        }
        values.push(size("attention.sliding_window", window));
    }
    let factors = match config.rope_scaling {
        RopeScaling::None => None,
        RopeScaling::Linear { factor } => {
            values.push((key("rope.scaling.type"), Value::String("linear".into())));
            values.push(float("rope.scaling.factor", factor));
            None
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: LOW_FREQ_FACTOR,
            high_freq_factor: HIGH_FREQ_FACTOR,
            original: ORIGINAL_POSITIONS,
        } => Some(llama3_factors(config.head_dim, config.rope_theta, factor)),
        ref other => {
            let problem = format!("is {other:?}, which is not written to GGUF");
            return Err(("rope_scaling", problem));
        }
    };
    Ok((values, factors))
}
