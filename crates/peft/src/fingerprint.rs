use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

// Apart from the type, which errors name: the walk through a model knows layers, and they errors.
mod parameters;

/// What identifies a model without its adapters: its parameters, and what its outputs depend on besides.
///
/// The parts are
/// * the SHA-256 of all parameters with their names, and of the formats of the layers;
/// * the SHA-256 of the structure: the variants of enums, Boolean parameters, and the digits of `f64`
///   beyond those of `f32`;
/// * the settings that the model states ([`Identity`]);
/// * the SHA-256 of the tokenizer's files, if the model knows them.
///
/// Two models of one program with one fingerprint give the same bits.
///
/// # Examples
/// ```
/// # use burn::tensor::{Device, Tensor};
/// # use peft::{Fingerprint, Linear, Linears, Lora, Weight};
/// # #[derive(burn::module::Module, Debug)]
/// # struct Mlp {
/// #     up: Linear,
/// # }
/// # impl Linears for Mlp {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("up".into(), &self.up)]
/// #     }
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("up".into(), &mut self.up)]
/// #     }
/// # }
/// let weight = |value: f32| Weight::frozen(Tensor::full([4, 4], value, &Device::flex()));
/// let mut mlp = Mlp {
///     up: Linear::new(weight(1.0), None),
/// };
/// let base = Fingerprint::of(&mlp);
/// peft::attach(&mut mlp, &Lora::new(2))?;
/// assert_eq!(Fingerprint::of(&mlp), base);
/// mlp.up = Linear::new(weight(1.5), None);
/// assert_eq!(base.differences(&Fingerprint::of(&mlp)).len(), 1);
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct Fingerprint {
    parameters: String,
    // The parts that older files lack.
    #[serde(skip_serializing_if = "Option::is_none")]
    structure: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    settings: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
}

/// What the outputs of a model depend on besides its parameters, as text.
///
/// burn lists the parameters of a module only. Numbers, plain tensors and skipped fields are part of a
/// [`Fingerprint`] if [`Linears::identity`](crate::Linears::identity) states them here.
///
/// # Examples
/// ```
/// let identity = peft::Identity::default()
///     .with_setting("num_attention_heads", 8)
///     .with_setting("rope_theta", 10_000.0);
/// assert_ne!(identity, peft::Identity::default().with_setting("num_attention_heads", 4));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    settings: BTreeMap<String, String>,
    tokenizer: Option<String>,
}

impl Identity {
    /// States a setting. One value must have one text, however a file spells it.
    pub fn with_setting(mut self, name: impl Into<String>, value: impl fmt::Display) -> Self {
        self.settings.insert(name.into(), value.to_string());
        self
    }

    /// States the digest of the tokenizer's files, if there are any.
    pub fn with_tokenizer(mut self, digest: Option<String>) -> Self {
        self.tokenizer = digest;
        self
    }
}

/// A fingerprint in a file. Older ones are the digest of the parameters alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    Parameters(String),
    Parts {
        parameters: String,
        structure: Option<String>,
        settings: Option<BTreeMap<String, String>>,
        tokenizer: Option<String>,
    },
}

impl From<Stored> for Fingerprint {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Parameters(parameters) => Self {
                parameters,
                structure: None,
                settings: None,
                tokenizer: None,
            },
            Stored::Parts {
                parameters,
                structure,
                settings,
                tokenizer,
            } => Self {
                parameters,
                structure,
                settings,
                tokenizer,
            },
        }
    }
}

impl Fingerprint {
    /// The parts of this fingerprint that `found` does not share, in words; none if `found` is the model
    /// of this fingerprint.
    ///
    /// Parts that this fingerprint does not cover are not compared.
    pub fn differences(&self, found: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.parameters != found.parameters {
            differences.push(format!(
                "the parameters are {} where {} is expected",
                found.parameters, self.parameters
            ));
        }
        if self.structure.is_some() && self.structure != found.structure {
            differences.push("the structure differs".into());
        }
        if let Some(expected) = &self.settings {
            let none = BTreeMap::new();
            let found = found.settings.as_ref().unwrap_or(&none);
            let names: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
            let text = |value: Option<&String>| value.map_or("not stated".into(), String::clone);
            let differing = names
                .into_iter()
                .filter(|&name| expected.get(name) != found.get(name));
            differences.extend(differing.map(|name| {
                let [found, expected] = [found, expected].map(|all| text(all.get(name)));
                format!("{name} is {found} where {expected} is expected")
            }));
        }
        if self.tokenizer.is_some() && self.tokenizer != found.tokenizer {
            differences.push(match found.tokenizer {
                Some(_) => "the tokenizer differs".into(),
                None => "the tokenizer is missing".into(),
            });
        }
        differences
    }

    /// Whether it is the digest of the parameters alone, as in older files.
    pub(crate) fn is_of_parameters(&self) -> bool {
        self.structure.is_none() && self.settings.is_none() && self.tokenizer.is_none()
    }

    /// Checks that `found` is the base of this fingerprint.
    pub(crate) fn check_base(&self, found: &Self) -> Result<()> {
        if self.differences(found).is_empty() {
            return Ok(());
        }
        Err(Error::OtherBase {
            expected: self.clone(),
            found: found.clone(),
        })
    }

    /// The parts of a model that this fingerprint does not cover: nothing is known of them.
    ///
    /// Files of older versions cover the parameters only, and a model without a tokenizer has none that
    /// could be covered.
    pub fn not_covered(&self) -> Vec<&'static str> {
        let parts = [
            ("structure", self.structure.is_some()),
            ("settings", self.settings.is_some()),
            ("tokenizer", self.tokenizer.is_some()),
        ];
        let parts = parts.into_iter().filter(|(_, is_covered)| !is_covered);
        parts.map(|(name, _)| name).collect()
    }
}

/// The digest of the parameters.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.parameters)
    }
}
