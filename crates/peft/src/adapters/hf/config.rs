//! `adapter_config.json` of PEFT, both ways.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::lora;
use super::patterns::Patterns;
use crate::adapter::hf::{HfConfig, HfFormat, HfLayer, hf_number, read_config};
use crate::adapter::vera;
use crate::targets::last_name;
use crate::{Error, Result};

/// The types of adapters that are read and written.
const FORMATS: [&HfFormat; 2] = [&lora::FORMAT, &vera::HF_FORMAT];

/// Keys of every type of adapter that are read.
const READ: [&str; 5] = [
    "layers_pattern",
    "layers_to_transform",
    "peft_type",
    "r",
    "target_modules",
];

/// Keys that do not change what an adapter computes: where it comes from, and how a weight is
/// stored.
const IGNORED: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
];

/// The type of adapter that a configuration states, none of whose keys is unknown here.
pub(super) fn format(config: &HfConfig) -> Result<&'static HfFormat, String> {
    let format = match config.get("peft_type").and_then(Value::as_str) {
        Some(name) => FORMATS
            .into_iter()
            .find(|format| format.peft_type == name)
            .ok_or_else(|| {
                let known = FORMATS.map(|format| format.peft_type).join(" and ");
                format!("peft_type is {name}; only {known} can be read")
            })?,
        None => return Err("has no peft_type: it is not a configuration of PEFT; for a directory of this program, use `Adapters::load`".into()),
    };
    let known = |key: &str| {
        let mut lists = [&READ[..], &IGNORED, format.read_keys, format.ignored_keys].into_iter();
        lists.any(|keys| keys.contains(&key))
    };
    for (key, value) in config {
        let neutral = match value {
            Value::Null => true,
            Value::Bool(on) => !on,
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Number(_) => false,
        };
        if !known(key) && !neutral {
            return Err(format!(
                "`{key}` is {value}, which this program cannot honour"
            ));
        }
    }
    Ok(format)
}

/// The layers that a configuration chooses.
pub(super) fn patterns(config: &HfConfig) -> Result<Patterns, String> {
    Patterns::new(read_config(config)?)
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
        if layer.rank != rank {
            ranks.insert(path.to_string(), json!(layer.rank));
        }
        if layer.alpha != alpha {
            alphas.insert(path.to_string(), hf_number(layer.alpha));
        }
    }

    let adapted: BTreeSet<&str> = layers.iter().map(|(path, _)| *path).collect();
    let is_whole = |name: &str| {
        let mut named = paths.iter().filter(|path| last_name(path) == name);
        named.all(|path| adapted.contains(path.as_str()))
    };
    let targets: BTreeSet<&str> = adapted
        .iter()
        .map(|path| match last_name(path) {
            name if is_whole(name) => name,
            _ => path,
        })
        .collect();

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
    Ok(config)
}

fn object(value: Value) -> HfConfig {
    match value {
        Value::Object(object) => object,
        other => unreachable!("{other} is not an object"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, text) in [(16.0, "16"), (0.1, "0.1"), (0.0, "0.0"), (2.5, "2.5")] {
            assert_eq!(hf_number(value).to_string(), text);
        }
    }
}
