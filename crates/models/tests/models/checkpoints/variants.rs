//! Directories of GPTQ and bitsandbytes as the versions of several programs write them: each has the values
//! of one that is written in the usual way.

use std::path::Path;

use models::plan;
use peft::PerLayer;
use safetensors::Dtype;
use serde_json::json;

use super::*;

/// Changes a JSON file of a directory.
fn change_json(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(name);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// A golden directory with one configuration, whose settings and tensors were changed.
fn changed(name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> TempDir {
    let dir = copy(&golden(name));
    if name == GPTQ {
        fs::remove_file(dir.path().join("quantize_config.json")).unwrap();
    }
    let mut all = tensors(dir.path());
    change_json(dir.path(), "config.json", |config| {
        change(&mut config["quantization_config"], &mut all);
    });
    write(dir.path(), &all);
    dir
}

/// Asserts that a directory has the model of a golden one.
#[track_caller]
fn assert_is(dir: &Path, name: &str) {
    let lm = load(dir, &Device::flex()).unwrap();
    let expected = load(golden(name), &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&expected.model));
    let layers = |dir: &Path| plan(dir, &PerLayer::default()).unwrap().layers;
    assert_eq!(layers(dir), layers(&golden(name)));
}

/// The error of a directory, which a plan tells if it can.
fn refused(dir: &Path) -> Error {
    let error = load(dir, &Device::flex()).unwrap_err();
    if let Err(planned) = plan(dir, &PerLayer::default()) {
        assert_eq!(planned.to_string(), error.to_string());
    }
    error
}

/// AutoGPTQ before 0.7, optimum and transformers write no `checkpoint_format`. Where `sym` is true, all
/// zero-points are 8, which version 1 stores as 7.
#[test]
fn zero_points_in_the_middle_tell_their_version() {
    let unstated = |settings: &mut Value| {
        let settings = settings.as_object_mut().unwrap();
        for setting in [
            "checkpoint_format",
            "format",
            "meta",
            "pack_dtype",
            "lm_head",
        ] {
            settings.remove(setting);
        }
    };
    let shift = |all: &mut Tensors, by: u32| {
        for (name, (_, _, bytes)) in all.iter_mut() {
            if name.ends_with(".qzeros") {
                let (words, _) = bytes.as_chunks_mut::<4>();
                for word in words {
                    *word = (u32::from_le_bytes(*word).wrapping_add(by)).to_le_bytes();
                }
            }
        }
    };
    let dir = changed(GPTQ, |settings, _| {
        unstated(settings);
        settings["damp_percent"] = json!(0.01);
        settings["true_sequential"] = json!(true);
        settings["static_groups"] = json!(false);
        settings["model_name_or_path"] = json!(null);
        settings["modules_in_block_to_quantize"] = json!([["self_attn.q_proj"]]);
        settings["backend"] = json!("auto");
        settings["use_exllama"] = json!(true);
        settings["tokenizer"] = json!(null);
    });
    assert_is(dir.path(), GPTQ);
    // Version 2.
    let dir = changed(GPTQ, |settings, all| {
        unstated(settings);
        shift(all, 0x1111_1111);
    });
    assert_is(dir.path(), GPTQ);

    let refuse = |change: &dyn Fn(&mut Value, &mut Tensors)| {
        let error = refused(
            changed(GPTQ, |settings, all| {
                unstated(settings);
                change(settings, all);
            })
            .path(),
        );
        let is_said = matches!(
            error,
            Error::Checkpoint(CheckpointError::GptqVersion { .. })
        );
        assert!(is_said, "{error}");
    };
    // No middle of the codes, one of another, layers that contradict each other, and no word of `sym`.
    refuse(&|_, all| shift(all, 0x2222_2222));
    refuse(&|_, all| put(all, "qzeros", 3, 0x7777_7778));
    refuse(&|_, all| {
        let mut one = Tensors::from([(
            String::from("a.qzeros"),
            all[&format!("{LAYER}.qzeros")].clone(),
        )]);
        shift(&mut one, 0x1111_1111);
        all.insert(format!("{LAYER}.qzeros"), one.remove("a.qzeros").unwrap());
    });
    refuse(&|settings, _| settings["sym"] = Value::Null);
    refuse(&|settings, _| settings["sym"] = json!(false));
}

/// Numbers as texts and other spellings that programs accept.
#[test]
fn settings_may_be_spelled_in_other_ways() {
    let dir = changed(GPTQ, |settings, _| {
        settings["bits"] = json!("4");
        settings["group_size"] = json!(32.0);
        settings["quant_method"] = json!("GPTQ");
        settings["checkpoint_format"] = json!("GPTQ");
        settings["is_marlin_format"] = json!(false);
        settings["dynamic"] = json!(null);
        settings["sym"] = json!(true);
    });
    assert_is(dir.path(), GPTQ);
}

/// AutoGPTQ names the file of weights after the settings, or as it was told.
#[test]
fn weights_have_the_names_that_autogptq_gives_them() {
    let moved = |to: &str, told: Option<&str>| {
        let dir = copy(&golden(GPTQ));
        change_json(dir.path(), "config.json", |config| {
            config
                .as_object_mut()
                .unwrap()
                .remove("quantization_config");
        });
        change_json(dir.path(), "quantize_config.json", |config| {
            config["model_file_base_name"] = json!(told);
        });
        fs::rename(dir.path().join("model.safetensors"), dir.path().join(to)).unwrap();
        dir
    };
    for (to, told) in [
        ("gptq_model-4bit-32g.safetensors", None),
        (
            "gptq_model-4bit-32g.safetensors",
            Some("gptq_model-4bit-32g"),
        ),
        ("weights of mine.safetensors", Some("weights of mine")),
        // Renamed since, as on the Hub.
        ("model.safetensors", Some("gptq_model-4bit-32g")),
        ("gptq_model-4bit-32g.safetensors", Some("another")),
    ] {
        assert_is(moved(to, told).path(), GPTQ);
    }
    let error = refused(moved("other.safetensors", None).path());
    assert_says(
        error,
        &[
            "neither `model.safetensors`",
            "`other.safetensors`",
            "rename",
        ],
    );
    // The file that is told is read, and not another beside it; none outside of the directory is.
    let dir = moved("mine.safetensors", Some("mine"));
    fs::write(dir.path().join("model.safetensors"), b"not this").unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), b"nor this").unwrap();
    assert_is(dir.path(), GPTQ);
    let dir = moved("model.safetensors", Some("../elsewhere"));
    assert_is(dir.path(), GPTQ);
    // In shards, of which the index tells.
    let dir = moved("whole.safetensors", Some("gptq_model-4bit-32g"));
    let mut one = fixtures::read_tensors(&dir.path().join("whole.safetensors"));
    let two = one.split_off("model.layers.1");
    let mut map = json!({});
    for (at, part) in [one, two].into_iter().enumerate() {
        let name = format!("gptq_model-4bit-32g-0000{}-of-00002.safetensors", at + 1);
        for tensor in part.keys() {
            map[tensor] = json!(name);
        }
        fixtures::write_tensors(&dir.path().join(&name), &part);
    }
    let index = json!({ "metadata": {}, "weight_map": map }).to_string();
    let path = dir
        .path()
        .join("gptq_model-4bit-32g.safetensors.index.json");
    fs::write(path, index).unwrap();
    assert_is(dir.path(), GPTQ);
}

/// GPTQModel packs codes into integers of 8 to 64 bits.
#[test]
fn codes_may_be_in_integers_of_any_width() {
    for (dtype, name, size) in [
        (Dtype::I8, "int8", 1),
        (Dtype::I16, "int16", 2),
        (Dtype::I64, "int64", 8),
    ] {
        let dir = changed(GPTQ, |settings, all| {
            settings["pack_dtype"] = json!(name);
            for (name, (of, shape, bytes)) in all.iter_mut() {
                if name.ends_with(".qzeros") {
                    *of = dtype;
                    shape[1] = shape[1] * 4 / size;
                } else if name.ends_with(".qweight") {
                    *of = dtype;
                    let [rows, columns] = shape[..] else {
                        panic!("{shape:?}");
                    };
                    shape[0] = rows * 4 / size;
                    let byte = |row: usize, column: usize| {
                        bytes[(row / 4 * columns + column) * 4 + row % 4]
                    };
                    let words = (0..rows * 4 / size)
                        .flat_map(|row| (0..columns).map(move |column| (row, column)));
                    let words = words.flat_map(|(row, column)| {
                        (0..size).map(move |at| (row * size + at, column))
                    });
                    *bytes = words.map(|(row, column)| byte(row, column)).collect();
                }
            }
        });
        assert_is(dir.path(), GPTQ);
    }
    let error = refused(
        changed(GPTQ, |_, all| {
            all.get_mut(&format!("{LAYER}.qweight")).unwrap().0 = Dtype::F32;
        })
        .path(),
    );
    assert_says(error, &["down_proj.qweight", "is F32, not of integers"]);
}

/// bitsandbytes stores its bytes as numbers of other types, for programs that shard those.
#[test]
fn bytes_may_be_stored_as_numbers() {
    let stored_as = |dtype: Dtype, stated: Value| {
        changed(NF4, |settings, all| {
            settings["bnb_4bit_quant_storage"] = stated;
            for (name, (of, shape, _)) in all.iter_mut() {
                if name.ends_with("_proj.weight") {
                    *of = dtype;
                    shape[0] = shape[0] * 8 / dtype.bitsize();
                }
            }
        })
    };
    for (dtype, name) in [
        (Dtype::BF16, "bfloat16"),
        (Dtype::F16, "float16"),
        (Dtype::F32, "float32"),
        (Dtype::I8, "int8"),
        (Dtype::U8, "uint8"),
        (Dtype::BF16, "torch.bfloat16"),
    ] {
        assert_is(stored_as(dtype, json!(name)).path(), NF4);
        assert_is(stored_as(dtype, Value::Null).path(), NF4);
    }
    // Converted, so that the numbers are the same and the bytes are not.
    let error = refused(stored_as(Dtype::F16, json!("bfloat16")).path());
    assert_says(error, &["is F16", "that of BF16", "converted"]);
    let error = refused(stored_as(Dtype::I32, Value::Null).path());
    assert_says(error, &["is I32, not U8"]);
}

/// Configurations of bitsandbytes before transformers 4.36 do not state their method.
#[test]
fn load_in_4bit_states_bitsandbytes() {
    for key in ["load_in_4bit", "_load_in_4bit"] {
        let dir = changed(NF4, |settings, _| {
            *settings = json!({ key: true, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"] });
        });
        assert_is(dir.path(), NF4);
    }
    let dir = changed(NF4, |settings, _| {
        *settings = json!({ "load_in_8bit": true })
    });
    assert_says(refused(dir.path()), &["load_in_8bit is true", "4 bits"]);
    let dir = changed(NF4, |settings, _| {
        *settings = json!({ "bnb_4bit_quant_type": "nf4" })
    });
    assert_says(refused(dir.path()), &["quant_method is missing"]);
    let dir = changed(NF4, |settings, _| settings["load_in_4bit"] = json!("yes"));
    assert_says(
        refused(dir.path()),
        &["load_in_4bit is \"yes\"; it must be true or false"],
    );
}

/// A model that was dequantized or merged keeps the configuration of what it was.
#[test]
fn a_quantization_of_dense_weights_is_out_of_date() {
    for (quantization, method) in [
        (
            json!({ "quant_method": "bitsandbytes", "load_in_4bit": true }),
            "bitsandbytes",
        ),
        (json!({ "load_in_4bit": true }), "bitsandbytes"),
        (
            json!({ "quant_method": "bitsandbytes", "load_in_8bit": true }),
            "bitsandbytes",
        ),
        (
            json!({ "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": true }),
            "gptq",
        ),
        (
            json!({ "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm" }),
            "awq",
        ),
        (
            json!({ "quant_method": "quant-core", "format_version": 1, "layers": {} }),
            "quant-core",
        ),
    ] {
        let dir = copy(&golden("llama_bf16"));
        change_json(dir.path(), "config.json", |config| {
            config["quantization_config"] = quantization;
        });
        let error = refused(dir.path());
        let is_said = matches!(
            &error,
            Error::Checkpoint(CheckpointError::StaleQuantization { method: found, .. }) if found == method
        );
        assert!(is_said, "{error}");
        assert_says(
            &error,
            &["config.json", "dense", "remove its `quantization_config`"],
        );
    }
    let dir = copy(&golden("llama_bf16"));
    let beside = json!({ "bits": 4, "group_size": 32 }).to_string();
    fs::write(dir.path().join("quantize_config.json"), beside).unwrap();
    let error = refused(dir.path());
    assert_says(
        error,
        &["quantize_config.json", "(gptq)", "remove the file"],
    );
    // What is packed in a way that is not known is not dense.
    let dir = copy(&golden("llama_bf16"));
    change_json(dir.path(), "config.json", |config| {
        config["quantization_config"] = json!({ "quant_method": "fp8" });
    });
    let mut all = tensors(dir.path());
    let one = all.get_mut("model.layers.1.mlp.down_proj.weight").unwrap();
    (one.0, one.2) = (Dtype::F8_E4M3, one.2.iter().step_by(2).copied().collect());
    write(dir.path(), &all);
    assert_says(refused(dir.path()), &["the method `fp8`", "supported"]);
}
