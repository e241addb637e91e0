use peft::Identity;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::fields::Fields;

/// The scaling of the frequencies of a rotary embedding for longer texts, as in transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The ratio of the longest text to `max_position_embeddings`.
        factor: f64,
    },
    /// The base grows for texts longer than `max_position_embeddings` (NTK-aware), for all texts of a
    /// batch by the longest one.
    Dynamic {
        /// The ratio of the longest text to `max_position_embeddings`.
        factor: f64,
    },
    /// Low frequencies are divided and high ones kept (LLaMA 3.1).
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
    /// A ramp from kept to divided frequencies (YaRN, Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// The divisor of the low frequencies.
        factor: f64,
        /// The factor of cosines and sines.
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

impl RopeScaling {
    /// States the scaling of a model with so many positions, each setting as it is used.
    pub(crate) fn state(self, identity: Identity, max_positions: usize) -> Identity {
        let of_type = |name: &str| identity.clone().with_setting("rope_type", name);
        match self {
            Self::None => of_type("default"),
            Self::Linear { factor } => of_type("linear").with_setting("rope_factor", factor),
            Self::Dynamic { factor } => of_type("dynamic")
                .with_setting("rope_factor", factor)
                .with_setting("max_position_embeddings", max_positions),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => of_type("llama3")
                .with_setting("rope_factor", factor)
                .with_setting("low_freq_factor", low_freq_factor)
                .with_setting("high_freq_factor", high_freq_factor)
                .with_setting("original_max_position_embeddings", original),
            Self::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                original,
                truncate,
            } => of_type("yarn")
                .with_setting("rope_factor", factor)
                .with_setting("attention_factor", attention_factor)
                .with_setting("beta_fast", beta_fast)
                .with_setting("beta_slow", beta_slow)
                .with_setting("original_max_position_embeddings", original)
                .with_setting("truncate", truncate),
        }
    }
}

/// The settings of a rotary embedding in a `config.json`, in both of transformers' spellings.
#[derive(Deserialize)]
struct Raw {
    rope_theta: Option<f64>,
    rope_scaling: Option<Entry>,
    rope_parameters: Option<Entry>,
}

#[derive(Deserialize)]
struct Entry {
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

/// Reads the base of the frequencies and their scaling from a `config.json`.
///
/// # Errors
/// [`ConfigError::Setting`](crate::ConfigError::Setting) for a scaling that is unknown or incomplete, or two that
/// differ.
pub(crate) fn read(
    fields: &Fields,
    json: &Map<String, Value>,
    max_positions: usize,
) -> Result<(f64, RopeScaling)> {
    let raw: Raw = fields.read(json)?;
    for rope in ["rope_parameters", "rope_scaling"] {
        let by_layer = |rope: &Map<String, Value>| rope.values().any(Value::is_object);
        let rope_json = json.get(rope).and_then(Value::as_object);
        if rope_json.is_some_and(by_layer) {
            let problem = "differs between layers, which is not supported";
            return Err(fields.refuse(rope, problem.into()));
        }
    }
    if let (Some(first), Some(second)) = (
        json.get("rope_parameters").filter(|rope| !rope.is_null()),
        json.get("rope_scaling").filter(|rope| !rope.is_null()),
    ) && first != second
    {
        let problem = "differs from rope_parameters; keep the one that is right";
        return Err(fields.refuse("rope_scaling", problem.into()));
    }
    let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let theta = rope
        .and_then(|rope| rope.rope_theta)
        .or(raw.rope_theta)
        .unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 1.0) {
        let problem = format!("is {theta}; it must be above 1");
        return Err(fields.refuse("rope_theta", problem));
    }
    let scaling = match rope {
        Some(rope) => rope
            .scaling(max_positions)
            .map_err(|problem| fields.refuse("rope_scaling", problem))?,
        None => RopeScaling::None,
    };
    Ok((theta, scaling))
}

impl Entry {
    fn scaling(&self, max_positions: usize) -> Result<RopeScaling, String> {
        if self
            .partial_rotary_factor
            .is_some_and(|factor| factor != 1.0)
        {
            return Err("has a partial_rotary_factor, which is not supported".into());
        }
        let need = |name: &str, value: Option<f64>| match value {
            // Tables of angles are in f32.
            Some(value) if value > 0.0 && (value as f32).is_normal() => Ok(value),
            Some(value) => Err(format!(
                "has {name} {value}; it must be positive and within the range of f32"
            )),
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
                let magnitude = |scale: f64| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * scale * factor.ln() + 1.0
                    }
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
