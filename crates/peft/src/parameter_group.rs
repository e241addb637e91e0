use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Trained parameters with a learning rate or a weight decay of their own.
///
/// They are those whose path in the module matches a regular expression, such as `block.0.up.adapter.a`:
/// the names of fields in Rust, without those of variants. Of several groups that match, the first one
/// counts.
///
/// # Examples
/// ```
/// use peft::{FitConfig, ParameterGroup};
///
/// // Decay for the factors of LoRA, none for DoRA's norms and for biases.
/// let config = FitConfig::new()
///     .with_weight_decay(0.01)
///     .with_group(ParameterGroup::new(r"\.(magnitude|bias)$").with_weight_decay(0.0));
/// assert!(config.check().is_ok());
/// let config = config.with_group(ParameterGroup::new("(").with_rate_factor(2.0));
/// assert!(config.check().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    pattern: String,
    #[serde(default = "one")]
    pub(crate) rate_factor: f64,
    #[serde(default)]
    pub(crate) weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

impl ParameterGroup {
    /// The parameters whose path matches `pattern`, with the settings of the others.
    pub fn new(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            rate_factor: one(),
            weight_decay: None,
        }
    }

    /// Sets what the learning rate is multiplied by; 1 by default.
    pub fn with_rate_factor(mut self, rate_factor: f64) -> Self {
        self.rate_factor = rate_factor;
        self
    }

    /// Sets the weight decay; [`FitConfig::with_weight_decay`](crate::FitConfig::with_weight_decay) by
    /// default.
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = Some(weight_decay);
        self
    }

    pub(crate) fn pattern(&self) -> &str {
        &self.pattern
    }

    /// # Errors
    /// [`Error::Setting`] if it is no regular expression.
    pub(crate) fn regex(&self) -> Result<Regex> {
        Regex::new(&self.pattern).map_err(|_| Error::Setting {
            setting: "the pattern of a parameter group",
            value: format!("`{}`", self.pattern),
            expected: "a regular expression",
        })
    }
}
