//! The settings of each model type against transformers' configuration classes: `config_keys.json`, which
//! `tests/interop/config_keys.py` makes.

use std::path::Path;

use peft::Linears;
use serde_json::{Map, Value};

use super::Config;
use crate::Model;
use crate::positions::Reach;
use crate::settings::Settings;
use crate::source::Random;
use peft::Table;

const PATH: &str = "config.json";

fn golden() -> Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config_keys.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A configuration of a model type, which each probe has.
fn base(of_type: &Value, model_type: &str) -> Map<String, Value> {
    let probe = of_type["probes"][0]["json"].as_object().unwrap();
    let mut json = probe.clone();
    json.insert("model_type".into(), model_type.into());
    json
}

/// Every key that a class of transformers has is read, or is known to change no output.
#[test]
fn every_key_of_transformers_is_known() {
    let golden = golden();
    for model_type in Config::model_types() {
        let of_type = &golden[model_type];
        let mut json = base(of_type, model_type);
        for (key, default) in of_type["keys"].as_object().unwrap() {
            json.entry(key.clone()).or_insert(default.clone());
        }
        let settings = Settings::new(&json, Path::new(PATH));
        Config::from_settings(&settings, Path::new(PATH)).unwrap();
        let unknown = settings.unknown();
        assert!(unknown.is_empty(), "{model_type}: {unknown:?}");
    }
}

/// Where transformers refuses settings and this crate reads them: keys, and why.
const MORE: [(&str, &str); 7] = [
    (
        "num_key_value_heads",
        "a null is as many as those of the queries for every type",
    ),
    ("use_cache", "no output depends on it"),
    (
        "head_dim",
        "a null is the hidden size by the heads for every type",
    ),
    ("layer_types", "types whose layers are alike do not read it"),
    ("final_logit_softcapping", "a whole number is a number"),
    ("partial_rotary_factor", "a null is whole heads"),
    (
        "rope_scaling",
        "`su` is `longrope`, as older versions have it",
    ),
];

#[test]
fn settings_mean_what_they_mean_in_transformers() {
    let golden = golden();
    let mut n_equal = 0;
    for model_type in Config::model_types() {
        let of_type = &golden[model_type];
        let plain = base(of_type, model_type);
        for probe in of_type["probes"].as_array().unwrap() {
            let expected = &probe["found"];
            let mut json = probe["json"].as_object().unwrap().clone();
            json.insert("model_type".into(), model_type.into());
            let json = &json;
            let is_about = |(key, _): &(&str, &str)| json.get(*key) != plain.get(*key);
            let found = Config::from_json(json, Path::new(PATH));
            let refused = expected.get("refused").is_some();
            match found {
                Ok(_) if refused => assert!(MORE.iter().any(is_about), "{json:?}: {expected}"),
                Ok(config) => {
                    check(config, expected, json);
                    n_equal += 1;
                }
                Err(_) if refused => {}
                Err(error) => panic!("{json:?}: {error}"),
            }
        }
    }
    assert!(n_equal > 350, "{n_equal}");
}

fn check(config: Config, expected: &Value, json: &Map<String, Value>) {
    let layers = expected.get("layers").and_then(Value::as_array);
    let n_layers = config.num_hidden_layers();
    if let Some(layers) = layers {
        assert!([1, n_layers].contains(&layers.len()), "{json:?}");
        for (layer, expected) in (0..n_layers).zip(layers.iter().cycle()) {
            check_reach(&config.reach(layer), expected, json);
        }
    }
    let Ok(model) = Model::build(config, &mut Random::new(0, &burn::tensor::Device::flex()));
    let linears = model.linears();
    let weights = linears.iter().map(|(_, linear)| {
        let [d_in, d_out] = linear.weight().dims();
        d_in * d_out
    });
    let biases = linears.iter().filter_map(|(_, linear)| linear.bias());
    let biases = biases.map(|bias| bias.dims()[0]);
    let tables = model.tables();
    let tables = tables.iter().map(|(_, table)| match table {
        Table::Vector(vector) => vector.val().dims()[0],
        Table::Matrix(matrix) => matrix.val().dims().iter().product(),
    });
    let others = model.other_weights();
    let others = others
        .iter()
        .map(|(_, weight)| weight.dims().iter().product());
    let sizes: Vec<usize> = weights.chain(biases).chain(tables).chain(others).collect();
    assert_eq!(expected["n_parameters"], sizes.len(), "{json:?}");
    assert_eq!(
        expected["n_elements"],
        sizes.iter().sum::<usize>(),
        "{json:?}"
    );
}

fn check_reach(found: &Reach, expected: &Value, json: &Map<String, Value>) {
    let window = expected.get("window").and_then(Value::as_u64);
    assert_eq!(found.window.map(|window| window as u64), window, "{json:?}");
    let expected_frequencies = expected.get("frequencies").and_then(Value::as_array);
    let (Some(rotary), Some(expected_frequencies)) = (&found.rotary, expected_frequencies) else {
        assert_eq!(
            found.rotary.is_some(),
            expected_frequencies.is_some(),
            "{json:?}"
        );
        return;
    };
    let frequencies = rotary.frequencies(32);
    assert_eq!(frequencies.len(), expected_frequencies.len(), "{json:?}");
    for (found, expected) in frequencies.iter().zip(expected_frequencies) {
        let off = f64::from(*found) / expected.as_f64().unwrap() - 1.0;
        assert!(off.abs() < 1e-5, "{json:?}: {found} for {expected}");
    }
    let off = rotary.magnitude() / expected["magnitude"].as_f64().unwrap() - 1.0;
    assert!(off.abs() < 1e-6, "{json:?}: {}", rotary.magnitude());
}
