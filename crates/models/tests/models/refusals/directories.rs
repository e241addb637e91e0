//! Files that stand in for others, and shards that are not those of their index.

use std::fs;

use burn::tensor::Device;
use models::{Error, load, plan};
use peft::{Adapters, Fingerprint};
use quant_core::Rtn;
use serde_json::{Value, json};

use super::{
    INDEX, PLACES, SHARDS, STAND_INS, Tensors, WEIGHTS, assert_file, assert_tensor, copy, golden,
    read_tensors, refusal, refusal_of_plan, sharded, without, write_tensors,
};

#[test]
fn what_stands_in_for_a_file_is_named() {
    for name in PLACES {
        for (content, part) in STAND_INS {
            let dir = without(name);
            fs::write(dir.path().join(name), content).unwrap();
            assert_file(&refusal(dir.path()), name, part);
        }
    }
    for (content, part) in STAND_INS {
        let dir = sharded(|_, _| ());
        fs::write(dir.path().join(SHARDS[1]), content).unwrap();
        assert_file(&refusal(dir.path()), SHARDS[1], part);
        assert_file(&refusal_of_plan(dir.path()), SHARDS[1], part);
    }
}

#[test]
fn what_stands_in_for_a_file_of_adapters_is_named() {
    const CONFIG: &str = "adapter_config.json";
    const TENSORS: &str = "adapter_model.safetensors";
    let model = load(golden("llama_gqa"), &Device::flex()).unwrap().model;
    for (content, part) in STAND_INS {
        for name in [CONFIG, TENSORS] {
            let dir = tempfile::tempdir().unwrap();
            for file in [CONFIG, TENSORS] {
                let bytes = fs::read(golden("lora_llama_all").join(file)).unwrap();
                fs::write(dir.path().join(file), bytes).unwrap();
            }
            assert!(Adapters::load_hf(dir.path(), &model).is_ok());
            fs::write(dir.path().join(name), content).unwrap();
            let error = Adapters::load_hf(dir.path(), &model).unwrap_err();
            assert_file(&error.into(), name, part);
            if name == CONFIG {
                let error = Adapters::load(dir.path(), &Device::flex()).unwrap_err();
                assert_file(&error.into(), name, part);
            }
        }
    }
}

#[test]
fn pickled_weights_are_not_read() {
    for name in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        let dir = without(WEIGHTS);
        fs::write(dir.path().join(name), "").unwrap();
        let error = refusal(dir.path());
        assert!(
            matches!(
                error,
                Error::Checkpoint(models::CheckpointError::NoWeights { .. })
            ),
            "{error}"
        );
        assert!(error.to_string().contains("convert it"), "{error}");
    }
    // The pickle of PyTorch before 1.6, which is no zip archive, under another name.
    let dir = without(WEIGHTS);
    let pickle = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";
    fs::write(dir.path().join(WEIGHTS), pickle).unwrap();
    assert_file(&refusal(dir.path()), WEIGHTS, "not a safetensors file");
}

/// The error after a change to two shards and their index.
fn refusal_of(change: impl FnOnce(&mut [Tensors; 2], &mut Value)) -> Error {
    let dir = sharded(change);
    let (error, of_plan) = (refusal(dir.path()), refusal_of_plan(dir.path()));
    assert_eq!(error.to_string(), of_plan.to_string());
    error
}

#[test]
fn shards_that_are_not_those_of_the_index_are_refused() {
    const FIRST: &str = "lm_head.weight";
    let error = refusal_of(|files, _| {
        let tensor = files[0][FIRST].clone();
        files[1].insert(FIRST.into(), tensor);
    });
    assert_tensor(&error, FIRST, "is not listed for this file");
    let error = refusal_of(|_, index| {
        index["weight_map"].as_object_mut().unwrap().remove(FIRST);
    });
    assert_tensor(&error, FIRST, "is not listed for this file");
    let error = refusal_of(|_, index| index["weight_map"][FIRST] = json!(SHARDS[1]));
    let is_missed = matches!(
        &error,
        Error::File(tensor_files::Error::MissingTensor { path, tensor })
            if path.ends_with(SHARDS[1]) && tensor == FIRST
    );
    assert!(is_missed, "{error}");
}

/// On any system: what is a name on one is a path on another.
#[test]
fn a_shard_is_a_name_and_no_path() {
    for shard in [
        "a\\one.safetensors",
        "..\\one.safetensors",
        "C:\\one.safetensors",
        "\\\\server\\share\\one.safetensors",
        "C:/one.safetensors",
        "./one.safetensors",
        "one.safetensors/",
        "one.safetensors\0",
        "\0",
        ".",
    ] {
        let error = refusal_of(|_, index| index["weight_map"]["lm_head.weight"] = json!(shard));
        assert_file(&error, INDEX, "not the name of a file beside it");
    }
}

#[test]
fn an_index_that_is_none_is_refused() {
    for (text, part) in [
        ("", "EOF"),
        ("[]", "invalid length"),
        ("{}", "missing field `weight_map`"),
        ("{\"weight_map\": []}", "invalid type"),
        ("{\"weight_map\": {\"a\": 1}}", "invalid type"),
        (
            "{\"weight_map\": {\"a\": [\"one.safetensors\"]}}",
            "invalid type",
        ),
        (
            "{\"weight_map\": {}, \"weight_map\": {}}",
            "duplicate field",
        ),
        ("{\"weight_map\": {}} {}", "trailing characters"),
        ("\u{feff}{\"weight_map\": {}}", "expected value"),
    ] {
        let dir = without(INDEX);
        fs::write(dir.path().join(INDEX), text).unwrap();
        assert_file(&refusal(dir.path()), INDEX, part);
    }
}

/// Many files have it wrong, and nothing depends on it: the sizes are those of the shards.
#[test]
fn the_total_size_of_an_index_is_passed_over() {
    for metadata in [
        json!({"total_size": 1}),
        json!({"total_size": -1.5}),
        json!({"total_size": "231 kB"}),
        Value::Null,
    ] {
        let dir = sharded(|_, index| index["metadata"] = metadata);
        load(dir.path(), &Device::flex()).unwrap();
    }
}

/// Models that were saved without their heads have such names.
#[test]
fn names_without_the_first_part_are_read() {
    for name in ["llama_gqa", "opt_350m_style"] {
        let dir = copy(name);
        let path = dir.path().join(WEIGHTS);
        let short = read_tensors(&path).into_iter().map(|(name, tensor)| {
            let name = name.strip_prefix("model.").unwrap_or(&name);
            (name.to_owned(), tensor)
        });
        write_tensors(&path, &short.collect());
        let read =
            |dir: &std::path::Path| Fingerprint::of(&load(dir, &Device::flex()).unwrap().model);
        // The golden directory has no tokenizer.
        let differences = read(&golden(name)).differences(&read(dir.path()));
        assert!(differences.is_empty(), "{differences:?}");
        assert!(plan(dir.path(), &Rtn::new().with_group_size(16)).is_ok());
    }
}
