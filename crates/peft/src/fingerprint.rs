use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

// Apart from the type, which errors name: the walk through a model knows layers, and they errors.
mod parameters;
mod running;

pub(crate) use parameters::is_enum;
use running::Running;

/// What identifies a model without its adapters: its parameters, and what its outputs depend on besides.
///
/// The parts are
/// * the SHA-256 of all parameters with their names, and of the formats of the layers, with its beginnings
///   parameter by parameter, which tell the first one that differs;
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
#[serde(from = "Stored", into = "Stored")]
pub struct Fingerprint {
    parameters: String,
    /// None in a fingerprint of an older version, which is of the parameters alone.
    others: Option<Box<Others>>,
}

/// The parts of a fingerprint besides the parameters.
#[derive(Clone, Debug)]
struct Others {
    structure: String,
    identity: Identity,
    /// None in a fingerprint of an older version.
    running: Option<Running>,
}

/// Without the digests after each parameter, which older versions do not have: that of all parameters
/// decides.
impl PartialEq for Others {
    fn eq(&self, other: &Self) -> bool {
        self.structure == other.structure && self.identity == other.identity
    }
}

impl Eq for Others {}

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
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "expected a fingerprint: a digest, or an object with parameters, structure, settings and perhaps tokenizer and running"
)]
enum Stored {
    Parameters(String),
    Parts {
        parameters: String,
        structure: String,
        settings: BTreeMap<String, String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tokenizer: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        running: Option<Running>,
    },
}

impl From<Stored> for Fingerprint {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Parameters(parameters) => Self {
                parameters,
                others: None,
            },
            Stored::Parts {
                parameters,
                structure,
                settings,
                tokenizer,
                running,
            } => Self {
                parameters,
                others: Some(Box::new(Others {
                    structure,
                    identity: Identity {
                        settings,
                        tokenizer,
                    },
                    running,
                })),
            },
        }
    }
}

impl From<Fingerprint> for Stored {
    fn from(fingerprint: Fingerprint) -> Self {
        let Fingerprint { parameters, others } = fingerprint;
        let Some(others) = others else {
            return Self::Parameters(parameters);
        };
        let Others {
            structure,
            identity,
            running,
        } = *others;
        Self::Parts {
            parameters,
            structure,
            settings: identity.settings,
            tokenizer: identity.tokenizer,
            running,
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
            let running = |of: &'_ Self| of.others.as_ref()?.running.clone();
            let first = running(self).zip(running(found));
            let first = first.and_then(|(expected, found)| expected.first_difference(&found));
            differences.push(format!(
                "the parameters are {} where {} is expected{}",
                found.parameters,
                self.parameters,
                first.map_or(String::new(), |first| format!(", from `{first}` on")),
            ));
        }
        let Some(expected) = &self.others else {
            return differences;
        };
        let Some(found) = &found.others else {
            differences.push("of the structure and the settings nothing is known".into());
            return differences;
        };
        if expected.structure != found.structure {
            differences.push("the structure differs".into());
        }
        let [all, found_all] = [expected, found].map(|of| &of.identity.settings);
        let names: BTreeSet<&String> = all.keys().chain(found_all.keys()).collect();
        let text = |value: Option<&String>| value.map_or("not stated".into(), String::clone);
        let differing = names
            .into_iter()
            .filter(|&name| all.get(name) != found_all.get(name));
        differences.extend(differing.map(|name| {
            let [found, expected] = [found_all, all].map(|all| text(all.get(name)));
            format!("{name} is {found} where {expected} is expected")
        }));
        let [expected, found] = [expected, found].map(|of| &of.identity.tokenizer);
        if expected.is_some() && expected != found {
            differences.push(match found {
                Some(_) => "the tokenizer differs".into(),
                None => "the tokenizer is missing".into(),
            });
        }
        differences
    }

    /// Which of the versions of a file has such a fingerprint: of the parameters alone, of all parts but for
    /// the beginnings of the digest, or of all.
    pub(crate) fn version(&self, [oldest, older, newest]: [u32; 3]) -> u32 {
        match &self.others {
            None => oldest,
            Some(others) if others.running.is_none() => older,
            Some(_) => newest,
        }
    }

    /// Checks that a file of a version has the fingerprint of that version, and that the program reads it.
    pub(crate) fn check_version(&self, versions: [u32; 3], found: u32) -> Result<(), String> {
        let [oldest, _, newest] = versions;
        if !versions.contains(&found) {
            return Err(format!(
                "format_version is {found}, this program reads {oldest} to {newest}"
            ));
        }
        if self.version(versions) != found {
            return Err(format!(
                "format_version is {found}, which the parts of the fingerprint contradict"
            ));
        }
        Ok(())
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
        match &self.others {
            None => vec!["structure", "settings", "tokenizer"],
            Some(others) if others.identity.tokenizer.is_none() => vec!["tokenizer"],
            Some(_) => Vec::new(),
        }
    }
}

/// The digest of the parameters.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.parameters)
    }
}
