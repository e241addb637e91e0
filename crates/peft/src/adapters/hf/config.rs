//! `adapter_config.json` of PEFT, both ways.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::lora;
use super::patterns::{Chosen, Patterns, is_end};
use crate::adapter::hf::{HfConfig, HfFormat, HfKey, HfLayer, HfRole, hf_number, read_config};
use crate::adapter::vera;
use crate::adapters::PEFT_TYPE;
use crate::python_regex::escaped;
use crate::targets::last_name;
use crate::{Error, Result};

/// The types of adapters that are read and written.
const FORMATS: [&HfFormat; 2] = [&lora::FORMAT, &vera::HF_FORMAT];

/// Keys of every type of adapter.
const KEYS: [HfKey; 13] = [
    HfKey::read("layers_pattern"),
    HfKey::read("layers_to_transform"),
    HfKey::read("modules_to_save"),
    HfKey::read("peft_type"),
    HfKey::read("r"),
    HfKey::read("target_modules"),
    HfKey::read("task_type"),
    HfKey::ignored("auto_mapping", "the class of the base in Python"),
    HfKey::ignored(
        "base_model_name_or_path",
        "where the base was; the model at hand is the base",
    ),
    HfKey::ignored("fan_in_fan_out", "PEFT turns it off for linear layers"),
    HfKey::ignored("inference_mode", "whether the adapter was to be trained"),
    HfKey::ignored("peft_version", "formats are told apart by their keys"),
    HfKey::ignored("revision", "where the base was"),
];

/// The keys of the configurations of a type.
fn keys(format: &'static HfFormat) -> impl Iterator<Item = &'static HfKey> {
    KEYS.iter().chain(format.keys)
}

/// The type of adapter that a configuration states, none of whose keys is unknown here.
pub(super) fn format(config: &HfConfig) -> Result<&'static HfFormat, String> {
    let name = config.get(PEFT_TYPE).and_then(Value::as_str);
    let name = name.ok_or_else(|| format!("has no name of a type of adapter in `{PEFT_TYPE}`"))?;
    let format = FORMATS.into_iter().find(|format| format.peft_type == name);
    let format = format.ok_or_else(|| {
        let known = FORMATS.map(|format| format.peft_type).join(" and ");
        format!("{PEFT_TYPE} is {name}; only {known} can be read")
    })?;
    for (key, value) in config {
        let known = keys(format).find(|known| known.name == key);
        let refuse = |reason: &str| Err(format!("`{key}` is {value}: {reason}"));
        match known.map(|known| known.role) {
            Some(HfRole::Read | HfRole::Ignored(_)) => (),
            Some(HfRole::Refused(_)) | None if is_neutral(value) => (),
            Some(HfRole::Refused(reason)) => {
                return refuse(&format!("{reason}, which this program does not do"));
            }
            None => return refuse("the key is unknown to this program"),
        }
    }
    match config.get("task_type").and_then(Value::as_str) {
        Some(task @ ("SEQ_CLS" | "TOKEN_CLS" | "QUESTION_ANS")) => Err(format!(
            "task_type is {task}: the adapter is for a model with a head of classes or spans, not for one that predicts tokens"
        )),
        _ => Ok(format),
    }
}

/// Whether a value turns a setting off.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Number(_) => false,
    }
}

/// The layers that a configuration chooses.
pub(super) fn patterns(config: &HfConfig) -> Result<Patterns, String> {
    Patterns::new(read_config::<Chosen>(config)?)
}

/// The configuration of adapters of layers of a model whose layers are at `paths`.
pub(super) fn written(layers: &[(&str, HfLayer)], paths: &[String]) -> Result<HfConfig> {
    // The rank and alpha of most layers are the rule, the others are exceptions.
    let mut counts: BTreeMap<(usize, u32), usize> = BTreeMap::new();
    for (_, layer) in layers {
        let rank_and_alpha = (layer.rank, layer.alpha.to_bits());
        *counts.entry(rank_and_alpha).or_default() += 1;
    }
    let most = counts.iter().max_by_key(|(_, count)| **count);
    let (Some((&(rank, alpha), _)), Some((_, first))) = (most, layers.first()) else {
        return Err(Error::NoAdapters);
    };
    let alpha = f32::from_bits(alpha);
    let format = FORMATS
        .into_iter()
        .find(|format| format.peft_type == first.peft_type)
        .expect("each type that is written is in the list");
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (path, layer) in layers {
        let digests = |layer: &HfLayer| -> Vec<String> {
            let shared = layer.shared.iter();
            shared.map(|(_, shared)| shared.digest().into()).collect()
        };
        let same = layer.peft_type == first.peft_type
            && layer.settings == first.settings
            && digests(layer) == digests(first);
        if !same {
            return Err(Error::NotForPeft {
                path: path.to_string(),
                problem:
                    "differs from the other layers in method, dropout, group size or shared tensors"
                        .into(),
            });
        }
        // A path as it is would match others: it is a pattern for the ends of paths.
        let pattern = || format!("^{}", escaped(path));
        if layer.rank != rank {
            ranks.insert(pattern(), json!(layer.rank));
        }
        if layer.alpha != alpha {
            alphas.insert(pattern(), hf_number(layer.alpha));
        }
    }

    let targets = targets(layers, paths);
    let mut config = object(json!({
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "peft_type": format.peft_type,
        "peft_version": "0.21.2",
        "r": rank,
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }));
    config.extend(object((format.config)()));
    let mut set = |key: &str, value: Value| config.insert(key.into(), value);
    let any = layers.iter().flat_map(|(_, layer)| &layer.any);
    for (key, value) in first.settings.iter().chain(any) {
        set(key, value.clone());
    }
    if let Some(alpha_key) = format.alpha_key {
        set(alpha_key, hf_number(alpha));
        set("rank_pattern", ranks.into());
        set("alpha_pattern", alphas.into());
    }
    // As PEFT writes them, but for the patterns, of which the first that matches decides.
    config.sort_keys();
    Ok(config)
}

/// The layers that have adapters, among those at `paths`: the ends of their paths, or a pattern where an
/// end of one is that of another layer.
fn targets(layers: &[(&str, HfLayer)], paths: &[String]) -> Value {
    let adapted: BTreeSet<&str> = layers.iter().map(|(path, _)| *path).collect();
    let names_only_adapted = |name: &str| {
        let mut named = paths.iter().filter(|path| is_end(path, name));
        named.all(|path| adapted.contains(path.as_str()))
    };
    let ends: BTreeSet<&str> = adapted
        .iter()
        .map(|path| match last_name(path) {
            name if names_only_adapted(name) => name,
            _ => path,
        })
        .collect();
    if ends.iter().all(|end| names_only_adapted(end)) {
        return json!(ends);
    }
    let paths: Vec<String> = adapted.into_iter().map(escaped).collect();
    json!(format!("(?:{})", paths.join("|")))
}

fn object(value: Value) -> HfConfig {
    match value {
        Value::Object(object) => object,
        other => unreachable!("{other} is not an object"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Each field of PEFT's configurations (`tests/golden/make_fields.py`) has its place in the lists.
    #[test]
    fn the_keys_are_those_of_peft() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fields.json");
        let fields: BTreeMap<String, BTreeMap<String, Value>> =
            tensor_files::read_json(&path).unwrap();
        for format in FORMATS {
            let fields = &fields[format.peft_type];
            let of_peft: Vec<&str> = fields.keys().map(String::as_str).collect();
            let mut listed: Vec<&str> = keys(format).map(|key| key.name).collect();
            listed.sort_unstable();
            assert_eq!(listed, of_peft);
            for key in keys(format) {
                let is_refused = matches!(key.role, HfRole::Refused(_));
                let default = &fields[key.name];
                assert!(!is_refused || is_neutral(default), "{}", key.name);
            }
            // The default configuration is read.
            let mut config: HfConfig = fields.clone().into_iter().collect();
            config.insert(PEFT_TYPE.into(), format.peft_type.into());
            assert!(super::format(&config).is_ok());
        }
    }

    #[test]
    fn keys_that_are_refused_are_named_with_the_reason() {
        for format in FORMATS {
            for key in keys(format) {
                let HfRole::Refused(reason) = key.role else {
                    continue;
                };
                let mut config = HfConfig::new();
                config.insert(PEFT_TYPE.into(), format.peft_type.into());
                for value in [json!(true), json!([1]), json!({"a": 1}), json!(1)] {
                    config.insert(key.name.into(), value);
                    let error = super::format(&config).err().unwrap();
                    assert!(
                        error.contains(key.name) && error.contains(reason),
                        "{error}"
                    );
                }
                for value in [Value::Null, json!(false), json!({}), json!([])] {
                    config.insert(key.name.into(), value);
                    assert!(super::format(&config).is_ok(), "{}", key.name);
                }
            }
        }
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, text) in [(16.0, "16"), (0.1, "0.1"), (0.0, "0.0"), (2.5, "2.5")] {
            assert_eq!(hf_number(value).to_string(), text);
        }
    }
}
