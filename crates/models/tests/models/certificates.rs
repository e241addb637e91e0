//! What the certificate of a saved model covers: its parameters, its settings, its tokenizer and its files.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor};
use models::{
    Activation, CheckpointError, CheckpointFormat, Config, Error, GptqVersion, Model, Pretrained,
    load, load_verified, save, save_as, save_dense,
};
use peft::{Adapters, CausalLm, Certificate, Peqa};
use quant_core::Rtn;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tensor_files::FloatType;

use super::fixtures::{llama, opt, values, write_tokenizer};

fn logits(model: &Model) -> Vec<f32> {
    let tokens = Tensor::<2, Int>::from_data([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]], &Device::flex());
    values(model.forward(tokens))
}

/// A quantized, tuned and merged model, saved to `model` of the directory.
fn certified(config: impl Into<Config>) -> (TempDir, Pretrained) {
    let parent = tempfile::tempdir().unwrap();
    let tokenizer = parent.path().join("tokenizer.json");
    write_tokenizer(&tokenizer, 16);
    let model = Model::init(config, 1, &Device::flex());
    let mut lm = Pretrained::new(model, &tokenizer).unwrap();
    let rtn = Rtn::new().with_group_size(8).with_f16_scales(true);
    models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
    peft::attach(&mut lm.model, &Peqa::new()).unwrap();
    lm.certificate = Some(peft::merge(&mut lm.model).unwrap());
    save(&lm, parent.path().join("model")).unwrap();
    (parent, lm)
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let path = dir.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&path, Value::from(config).to_string()).unwrap();
}

fn copy(from: &Path, to: PathBuf) -> PathBuf {
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to
}

/// Edits of a `config.json` that leave every parameter as it is.
fn edits(edits: Value) -> Vec<Map<String, Value>> {
    let edits = edits.as_array().unwrap().iter();
    edits
        .map(|edit| edit.as_object().unwrap().clone())
        .collect()
}

/// Settings that change logits are part of the certificate and of the base of adapters.
#[test]
fn other_settings_are_another_model() {
    let of_llama = json!([
        {"rms_norm_eps": 1e-3},
        {"rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8}},
        // The same widths of the projections.
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ]);
    let of_opt = json!([
        {"num_attention_heads": 2},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_new"},
        {"do_layer_norm_before": false},
    ]);
    let opt = opt()
        .with_remove_final_layer_norm(true)
        .with_activation(Activation::Relu);
    for (config, all) in [(Config::from(llama()), of_llama), (opt.into(), of_opt)] {
        let (parent, lm) = certified(config);
        let saved = parent.path().join("model");
        let mut tuned = lm.model.clone();
        peft::freeze_base(&mut tuned);
        peft::attach(&mut tuned, &Peqa::new()).unwrap();
        let adapters = Adapters::of(&tuned).unwrap();
        for (at, edit) in edits(all).into_iter().enumerate() {
            let dir = copy(&saved, parent.path().join(at.to_string()));
            let (name, _) = edit.iter().next().unwrap();
            let name = name.replace("rope_scaling", "rope_type");
            edit_config(&dir, |config| config.extend(edit.clone()));
            let mut other = load(&dir, &Device::flex()).unwrap();
            assert_ne!(logits(&other.model), logits(&lm.model), "{edit:?}");
            let error = other.certificate.unwrap().verify(&other.model).unwrap_err();
            assert!(matches!(error, peft::Error::NotMerged { .. }), "{error}");
            assert!(
                error.to_string().contains(&format!("{name} is ")),
                "{error}"
            );
            let error = peft::activate(&mut other.model, &adapters).unwrap_err();
            assert!(matches!(error, peft::Error::OtherBase { .. }), "{error}");
        }
    }
}

/// Two spellings of one configuration are one model.
#[test]
fn settings_are_compared_by_their_meaning() {
    let (parent, lm) = certified(llama());
    let saved = parent.path().join("model");
    let spellings = json!([
        {"rope_theta": 10_000},
        {"rope_theta": null, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        // The next number in f64, which is the same in f32.
        {"rms_norm_eps": 1.000_000_000_1e-5},
        {"hidden_act": "swish", "use_cache": false, "torch_dtype": "bfloat16"},
        {"max_position_embeddings": 64},
        {"model_type": "mistral", "sliding_window": null},
    ]);
    for (at, edit) in edits(spellings).into_iter().enumerate() {
        let dir = copy(&saved, parent.path().join(at.to_string()));
        edit_config(&dir, |config| {
            config.extend(edit.clone());
            config.retain(|_, value| !value.is_null());
        });
        let other = load(&dir, &Device::flex()).unwrap();
        assert_eq!(logits(&other.model), logits(&lm.model), "{edit:?}");
        other.certificate.unwrap().verify(&other.model).unwrap();
        // The file is another one nevertheless.
        assert!(load_verified(&dir, &Device::flex()).is_err(), "{edit:?}");
    }
}

#[test]
fn another_tokenizer_is_found() {
    let (parent, lm) = certified(llama());
    let saved = parent.path().join("model");
    let certificate = lm.certificate.unwrap();
    assert!(certificate.merged.not_covered().is_empty());
    let verify = |name: &str, edit: &dyn Fn(&Path)| {
        let dir = copy(&saved, parent.path().join(name));
        edit(&dir);
        certificate.verify(&load(&dir, &Device::flex()).unwrap().model)
    };
    let generation = |dir: &Path| fs::write(dir.join("generation_config.json"), "{}").unwrap();
    verify("generation", &generation).unwrap();
    let expected = "the model is not the certified one: the tokenizer ";
    let words = |dir: &Path| {
        let path = dir.join("tokenizer.json");
        let text = fs::read_to_string(&path).unwrap();
        let swapped = text.replace("\"w1\":1,\"w2\":2", "\"w1\":2,\"w2\":1");
        assert_ne!(swapped, text);
        fs::write(path, swapped).unwrap();
    };
    let error = verify("words", &words).unwrap_err().to_string();
    assert_eq!(error, format!("{expected}differs"));
    let special = |dir: &Path| fs::write(dir.join("special_tokens_map.json"), "{}").unwrap();
    let error = verify("special", &special).unwrap_err().to_string();
    assert_eq!(error, format!("{expected}differs"));
    let none = |dir: &Path| fs::remove_file(dir.join("tokenizer.json")).unwrap();
    let error = verify("none", &none).unwrap_err().to_string();
    assert_eq!(error, format!("{expected}is missing"));
}

/// Every bit of every file counts, and a file that is added or removed.
#[test]
fn a_directory_is_what_was_saved() {
    let (parent, lm) = certified(llama());
    let saved = parent.path().join("model");
    let again = load_verified(&saved, &Device::flex()).unwrap();
    assert_eq!(again.certificate, lm.certificate);
    let names = [
        "SHA256SUMS",
        "certificate.json",
        "config.json",
        "model.safetensors",
    ];
    let names = names
        .into_iter()
        .chain(["tokenizer.json", "tokenizer_config.json"]);
    let names: Vec<&str> = names.collect();
    let mut found: Vec<_> = fs::read_dir(&saved)
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    found.sort();
    assert_eq!(found, names);
    for name in &names {
        let path = saved.join(name);
        let bytes = fs::read(&path).unwrap();
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert!(
                load_verified(&saved, &Device::flex()).is_err(),
                "{name} at {at}"
            );
        }
        fs::remove_file(&path).unwrap();
        assert!(load_verified(&saved, &Device::flex()).is_err(), "{name}");
        fs::write(&path, bytes).unwrap();
    }
    for name in [
        "generation_config.json",
        "model.safetensors.index.json",
        "other.safetensors",
        "Chat_Template.jinja",
    ] {
        fs::write(saved.join(name), "{}").unwrap();
        let error = load_verified(&saved, &Device::flex()).unwrap_err();
        let is_named = matches!(
            &error,
            Error::Checkpoint(CheckpointError::NotListed { path }) if *path == saved.join(name)
        );
        assert!(is_named, "{error}");
        fs::remove_file(saved.join(name)).unwrap();
    }
    for name in ["SHA256SUMS.asc", "README.md", ".gitattributes"] {
        fs::write(saved.join(name), "anything").unwrap();
    }
    load_verified(&saved, &Device::flex()).unwrap();
}

/// A certificate follows its model, and no other.
#[test]
fn a_certificate_is_saved_with_its_model_only() {
    // Sizes that fill words of 32 bits and groups of 8.
    let (parent, mut lm) = certified(llama().with_intermediate_size(24));
    let gptq = parent.path().join("gptq");
    // Untrained scales are those of the quantizer, which GPTQ holds.
    save_as(&lm, &gptq, CheckpointFormat::Gptq(GptqVersion::V2)).unwrap();
    let again = load_verified(&gptq, &Device::flex()).unwrap();
    assert_eq!(again.certificate, lm.certificate);

    let dense = parent.path().join("dense");
    save_dense(&lm, &dense, FloatType::F32).unwrap();
    let again = load_verified(&dense, &Device::flex()).unwrap();
    assert_eq!(again.certificate, None);

    let dir = parent.path().join("other");
    models::quantize_head(&mut lm.model, &Rtn::new()).unwrap();
    let error = save(&lm, &dir).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Checkpoint(CheckpointError::OtherCertificate { .. })
        ),
        "{error}"
    );
    assert!(!dir.exists());
    lm.certificate = None;
    save(&lm, &dir).unwrap();
    assert!(!dir.join("certificate.json").exists());

    // One without layers is no certificate, and does not load.
    let path = parent.path().join("model/certificate.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["layers"] = json!([]);
    fs::write(&path, json.to_string()).unwrap();
    assert!(Certificate::load(&path).is_err());
    let error = load(parent.path().join("model"), &Device::flex()).unwrap_err();
    assert!(
        error.to_string().contains("lists no merged layers"),
        "{error}"
    );
}
