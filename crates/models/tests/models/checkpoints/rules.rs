//! GPTQModel's rules for the settings of single layers.

use std::path::Path;

use models::CheckpointFormat::Gptq;
use models::GptqVersion::{V1, V2};
use models::plan;
use peft::PerLayer;
use quant_core::{Grid, Rtn};
use serde::Deserialize;
use serde_json::json;

use super::*;

/// The settings of layers for which there is no rule.
const BASE: (usize, Option<usize>, bool) = (4, Some(8), true);

#[derive(Deserialize)]
struct Case {
    /// The rules, as text.
    dynamic: String,
    /// What GPTQModel says of each layer: other settings, `false` for one that is left out, or nothing.
    layers: serde_json::Map<String, Value>,
}

/// A model of two blocks, each layer of which has its bits, group size and symmetry.
fn mixed(of: impl Fn(&str) -> Option<(usize, Option<usize>, bool)>) -> (TempDir, Pretrained) {
    let (dir, mut lm) = pretrained(&config(32, 64).with_num_hidden_layers(2));
    for (path, linear) in lm.model.linears_mut() {
        if let Some((bits, group_size, symmetric)) = of(&path) {
            let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
            let rtn = rtn.with_symmetric(symmetric).with_f16_scales(true);
            linear.quantize(&path, &rtn, None).unwrap();
        }
    }
    (dir, lm)
}

/// States these rules, as text, in the directory that a model was saved to.
fn state(dir: &Path, rules: &str) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let settings = &mut config["quantization_config"];
    let (bits, group_size, sym) = BASE;
    settings["bits"] = json!(bits);
    settings["group_size"] = json!(group_size);
    settings["sym"] = json!(sym);
    settings["dynamic"] = json!("THE RULES");
    let text = config.to_string().replace("\"THE RULES\"", rules);
    fs::write(path, text).unwrap();
    let _ = fs::remove_file(dir.join("quantize_config.json"));
}

/// Asserts that a directory has the layers of a model.
fn assert_is(dir: &Path, lm: &Pretrained) {
    let again = load(dir, &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    let planned = plan(dir, &PerLayer::default()).unwrap();
    let formats = planned.layers.into_iter().map(|layer| layer.format);
    let expected = lm.model.linears().into_iter();
    let expected: Vec<_> = expected
        .map(|(_, linear)| linear.weight().format())
        .collect();
    assert_eq!(formats.collect::<Vec<_>>(), expected);
}

#[test]
fn rules_say_of_each_layer_what_they_say_in_gptqmodel() {
    let cases = fs::read(golden("dynamic.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
    assert_eq!(cases.len(), 11);
    for Case { dynamic, layers } in cases {
        let (dir, lm) = mixed(|path| match &layers[path] {
            Value::Bool(false) => None,
            said => {
                let (bits, group_size, sym) = BASE;
                let group_size = match said["group_size"].as_i64() {
                    Some(-1) => None,
                    Some(size) => Some(size as usize),
                    None => group_size,
                };
                let bits = said["bits"].as_u64().map_or(bits, |bits| bits as usize);
                Some((bits, group_size, said["sym"].as_bool().unwrap_or(sym)))
            }
        });
        let path = dir.path().join("model");
        save_as(&lm, &path, Gptq(V2)).unwrap();
        state(&path, &dynamic);
        assert_is(&path, &lm);
    }
}

/// Layers of several formats are saved with a rule for each that differs from most, and no rule more.
#[test]
fn layers_of_several_formats_are_saved_with_rules() {
    let (dir, lm) = mixed(|path| match path {
        _ if path.ends_with("v_proj") => Some((8, None, true)),
        _ if path.ends_with("1.mlp.up_proj") => Some((2, Some(16), true)),
        _ if path.ends_with("0.mlp.up_proj") => None,
        _ => Some((3, Some(32), true)),
    });
    let lm = reads_back(&dir, &lm, Gptq(V1));
    reads_back(&dir, &lm, Gptq(V2));
    let config = fs::read(dir.path().join("GPTQ v1/quantize_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let settings = ["bits", "group_size", "sym", "lm_head"].map(|name| &config[name]);
    assert_eq!(
        settings,
        [&json!(3), &json!(32), &json!(true), &json!(false)]
    );
    let of_v = json!({ "bits": 8, "group_size": -1, "sym": true });
    let rules = json!({
        r"+:^model\.layers\.0\.self_attn\.v_proj$": of_v,
        r"+:^model\.layers\.1\.self_attn\.v_proj$": of_v,
        r"+:^model\.layers\.1\.mlp\.up_proj$": { "bits": 2, "group_size": 16, "sym": true },
        r"-:^model\.layers\.0\.mlp\.up_proj$": {},
    });
    assert_eq!(config["dynamic"], rules);
}

/// Some layers asymmetric, which one rule says.
#[test]
fn a_rule_may_change_the_symmetry_alone() {
    let (dir, lm) = mixed(|path| Some((4, Some(8), !path.contains("mlp"))));
    let lm = reads_back(&dir, &lm, Gptq(V2));
    let path = dir.path().join("GPTQ v2");
    state(&path, r#"{ "+:.*\\.mlp\\.": { "sym": false } }"#);
    assert_is(&path, &lm);
    let formats = lm.model.linears().into_iter();
    let grids = formats.map(|(_, linear)| linear.weight().format().unwrap().grid());
    let affine = grids.filter(|grid| *grid == Grid::Affine).count();
    assert_eq!(affine, 6);
}

/// Inputs in another order in some layers alone, and no word of it in others.
#[test]
fn a_rule_may_change_the_order_alone() {
    let (dir, lm) = mixed(|_| Some(BASE));
    let path = dir.path().join("model");
    save_as(&lm, &path, Gptq(V2)).unwrap();
    let mut all = tensors(&path);
    all.retain(|name, _| !name.ends_with("mlp.up_proj.g_idx"));
    write(&path, &all);
    let stated = |desc_act: bool, rules: &str| {
        state(&path, rules);
        let config = path.join("config.json");
        let text = fs::read_to_string(&config).unwrap();
        let text = text.replace(
            "\"desc_act\":false,\"d",
            &format!("\"desc_act\":{desc_act},\"d"),
        );
        fs::write(config, text).unwrap();
        load(&path, &Device::flex())
    };
    assert!(stated(false, "{}").is_ok());
    let error = stated(false, r#"{ ".*up_proj": { "desc_act": true } }"#);
    assert_says(
        error.unwrap_err(),
        &["no tensor `model.layers.0.mlp.up_proj.g_idx`"],
    );
}

#[test]
fn rules_that_cannot_be_followed_are_refused_by_their_keys() {
    let (dir, lm) = mixed(|_| Some(BASE));
    let path = dir.path().join("model");
    save_as(&lm, &path, Gptq(V2)).unwrap();
    let cases: [(&str, &[&str]); 11] = [
        (
            r#"{ ".*(up_proj": {} }"#,
            &["dynamic.`.*(up_proj`", "no expression"],
        ),
        (
            r#"{ "a": { "bits": 5 }, "b": {} }"#,
            &["dynamic.`a`.bits is 5"],
        ),
        (r#"{ "a": { "bits": null } }"#, &[]),
        (r#"{ "a": null }"#, &[]),
        (
            r#"{ "a": { "group_size": 0 } }"#,
            &["dynamic.`a`.group_size is 0"],
        ),
        (r#"{ "a": { "sym": 1 } }"#, &["dynamic.`a`.sym is 1"]),
        (r#"{ "a": 8 }"#, &["dynamic.`a` is 8, not an object"]),
        (r#"[ "a" ]"#, &["dynamic is [\"a\"], not an object"]),
        (
            r#"{ "-:.*k_proj": {} }"#,
            &[
                "dynamic.`-:.*k_proj` leaves out `model.layers.0.self_attn.k_proj`",
                "k_proj.qweight",
            ],
        ),
        (
            r#"{ ".*k_proj": { "bits": 8 } }"#,
            &["k_proj.qweight", "[4, 32]", "[8, 32]"],
        ),
        (r#"{ "(a|a|b*)*c": {} }"#, &[]),
    ];
    for (rules, parts) in cases {
        state(&path, rules);
        match load(&path, &Device::flex()) {
            Ok(_) => assert!(parts.is_empty(), "{rules} is read"),
            Err(error) => {
                assert!(!parts.is_empty(), "{rules}: {error}");
                assert_says(error, parts);
            }
        }
    }
}
