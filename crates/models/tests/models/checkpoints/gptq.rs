//! GPTQ checkpoints and models that are refused.

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor};
use models::CheckpointFormat::Gptq;
use models::ConfigError;
use models::GptqVersion::{V1, V2};
use quant_core::{NormalFloat, Rtn};
use serde_json::json;

use super::*;

#[test]
fn gptq_checkpoints_that_cannot_be_read_right_are_refused() {
    let config = |setting: &'static str, value: Value| {
        refusal(GPTQ, |config, _| {
            config["quantization_config"][setting] = value
        })
    };
    let error = refusal(GPTQ, |config, _| {
        let settings = config["quantization_config"].as_object_mut().unwrap();
        settings.remove("checkpoint_format");
        settings.remove("format");
        settings.insert("sym".into(), json!(false));
    });
    assert!(
        matches!(
            error,
            Error::Checkpoint(CheckpointError::GptqVersion { .. })
        ),
        "{error}"
    );
    assert_says(
        &error,
        &["config.json", "\"checkpoint_format\": \"gptq_v2\""],
    );
    assert_says(
        config("checkpoint_format", json!("marlin")),
        &["`marlin`", "gptq_v2"],
    );
    assert_says(config("format", json!("gptq_p")), &["format is `gptq_p`"]);
    assert_says(
        config("format", json!("gptq_v2")),
        &["`checkpoint_format` is another"],
    );
    assert_says(config("bits", json!(5)), &["bits is 5"]);
    assert_says(config("bits", json!("four")), &["bits is \"four\""]);
    assert_says(config("bits", Value::Null), &["bits is missing"]);
    assert_says(
        config("sym", json!("yes")),
        &["sym is \"yes\"; it must be true"],
    );
    assert_says(config("desc_act", json!(1)), &["desc_act is 1, not true"]);
    assert_says(config("dynamic", json!([])), &["dynamic is []"]);
    assert_says(
        config("rotation", json!("hadamard")),
        &["rotation is `hadamard`"],
    );
    assert_says(config("group_size", json!(0)), &["group_size is 0"]);
    assert_says(config("group_size", json!(-2)), &["group_size is -2"]);
    assert_says(config("group_size", json!(64)), &["scales", "[1, 64]"]);
    assert_says(
        config("group_size", json!(128)),
        &["layer `model.layers.0.self_attn.q_proj`"],
    );
    assert_says(config("bits", json!(8)), &["qweight", "[16, 64]"]);
    assert_says(config("pack_dtype", json!("int4")), &["`int4`", "int64"]);
    assert_says(
        config("is_marlin_format", json!(true)),
        &["is_marlin_format"],
    );
    assert_says(
        config("quant_method", json!("hqq")),
        &["`hqq`", "gptq, bitsandbytes"],
    );

    let error = refusal(GPTQ, |_, all| put(all, "g_idx", 3, 5));
    let is_named = matches!(
        &error,
        Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor.ends_with("down_proj.g_idx")
    );
    assert!(is_named, "{error}");
    assert_says(&error, &[LAYER, "input 3 is in group 5, but there are 5"]);
    let error = refusal(GPTQ, |_, all| put(all, "g_idx", 0, u32::MAX));
    assert_says(&error, &["group -1"]);
    let error = refusal(GPTQ, |_, all| put(all, "g_idx", 0, 1));
    assert_says(&error, &["group 0 has 31 inputs, not 32"]);
    let error = refusal(GPTQ, |_, all| {
        let g_idx = all.get_mut(&format!("{LAYER}.g_idx")).unwrap();
        g_idx.1 = vec![159];
        g_idx.2.truncate(4 * 159);
    });
    assert_says(&error, &["g_idx", "[159]", "[160]"]);

    // Inputs in another order, and no word of which.
    let error = refusal(GPTQ, |config, all| {
        config["quantization_config"]["desc_act"] = json!(true);
        all.remove(&format!("{LAYER}.g_idx"));
    });
    let missing = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor.ends_with("down_proj.g_idx"));
    assert!(missing, "{error}");
    // Zero-points read in the wrong way are off by one.
    let error = refusal(GPTQ, |config, _| {
        config["quantization_config"]["format"] = json!("gptq_v2");
        config["quantization_config"]["checkpoint_format"] = json!("gptq_v2");
    });
    assert_says(
        &error,
        &["qzeros", "zero-point of 7", "`checkpoint_format`"],
    );

    let wrapped = |quantizer: &str| {
        refusal(GPTQ, |config, all| {
            config["quantization_config"]["meta"]["quantizer"] = json!(quantizer);
            config["quantization_config"]["sym"] = json!(false);
            put(all, "qzeros", 9, 0x7777_77F7);
            // Never reached where the zero-points are read.
            all.remove("model.norm.weight");
        })
    };
    let error = wrapped("auto_gptq:0.7.1");
    assert!(
        matches!(
            &error,
            Error::Checkpoint(CheckpointError::WrappedZeros {
                group: 1,
                output: 9,
                ..
            })
        ),
        "{error}"
    );
    assert_says(&error, &["mlp.down_proj.qzeros", "gptq_v2"]);
    assert_says(
        wrapped("gptqmodel:7.7.0"),
        &["no tensor `model.norm.weight`"],
    );

    let error = refusal(GPTQ, |_, all| {
        let head = all["model.layers.0.mlp.up_proj.qweight"].clone();
        all.insert("lm_head.qweight".into(), head);
    });
    assert_says(&error, &["lm_head is not true", "`lm_head.qweight`"]);
    let error = refusal(GPTQ, |_, all| {
        all.remove(&format!("{LAYER}.scales"));
    });
    assert_says(&error, &["no tensor `model.layers.0.mlp.down_proj.scales`"]);
}

#[test]
fn the_two_configurations_of_gptq_must_agree() {
    let with = |change: &dyn Fn(&mut Value, &mut Value)| {
        let dir = copy(&golden(GPTQ));
        let paths = ["config.json", "quantize_config.json"].map(|name| dir.path().join(name));
        let read =
            |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let (mut first, mut second) = (read(&paths[0]), read(&paths[1]));
        change(&mut first, &mut second);
        fs::write(&paths[0], first.to_string()).unwrap();
        fs::write(&paths[1], second.to_string()).unwrap();
        load(dir.path(), &Device::flex())
    };
    for (setting, value) in [
        ("bits", json!(8)),
        ("group_size", json!(-1)),
        ("sym", json!(false)),
        ("desc_act", json!(true)),
        ("checkpoint_format", json!("gptq_v2")),
        ("dynamic", json!({"-:other": {}})),
    ] {
        let error = with(&|first, second| {
            first["quantization_config"]["dynamic"] = json!({"-:one": {}});
            second.as_object_mut().unwrap().remove("format");
            second[setting] = value.clone();
        });
        let error = error.unwrap_err();
        assert!(
            matches!(&error, Error::Config(ConfigError::Disagreement { .. })),
            "{error}"
        );
        assert_says(&error, &["`quantize_config.json`"].map(|_| setting));
        assert_says(&error, &["/config.json`", "/quantize_config.json`"]);
    }
    let unstated = |config: &mut Value| {
        let settings = config.as_object_mut().unwrap();
        settings.remove("checkpoint_format");
        settings.remove("format");
    };
    // One of them may leave it to the other, or not be there.
    assert!(with(&|first, _| unstated(&mut first["quantization_config"])).is_ok());
    assert!(with(&|_, second| unstated(second)).is_ok());
    let alone = |first: &mut Value, second: &mut Value| {
        first.as_object_mut().unwrap().remove("quantization_config");
        second.as_object_mut().unwrap().remove("quant_method");
    };
    let lm = with(&alone).unwrap();
    assert!(lm.model.linears()[0].1.weight().format().is_some());
    let error = with(&|first, second| {
        alone(first, second);
        unstated(second);
        second["sym"] = Value::Null;
    });
    assert_says(
        error.unwrap_err(),
        &["quantize_config.json", "does not state"],
    );
}

#[test]
fn models_that_gptq_does_not_hold_are_refused() {
    let rtn = Rtn::new().with_group_size(8);
    let refused = |make: &dyn Fn(&mut Model), version| {
        let (_dir, mut lm) = quantized(&config(32, 64), &rtn);
        round_to_gptq(&mut lm.model);
        make(&mut lm.model);
        cannot_hold(&lm, Gptq(version))
    };
    // Changes the zeros of two layers.
    let zeros = |value: f32| {
        move |model: &mut Model| {
            for (path, linear) in model.linears_mut() {
                if path.ends_with("k_proj") || path.ends_with("up_proj") {
                    change(linear, |parts, format| {
                        parts.zeros.as_mut().unwrap()[..3].fill(value);
                        format
                    });
                }
            }
        }
    };
    let paths = [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
    ];
    let check = |(layers, instead): (Vec<(String, String)>, String), reason: &str, other: &str| {
        let found: Vec<&str> = layers.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(found, paths);
        for (_, found) in &layers {
            assert_says(found, &[reason]);
        }
        assert_eq!(instead, other);
    };
    check(
        refused(&zeros(1.5), V2),
        "3 zeros that are not whole",
        "quant-core",
    );
    check(
        refused(&zeros(16.0), V2),
        "3 zeros outside of 0 to 15",
        "quant-core",
    );
    check(
        refused(&zeros(-1.0), V2),
        "3 zeros outside of 0 to 15",
        "quant-core",
    );

    // Asymmetric layers of version 1, which GPTQModel loads from no other program.
    let (layers, instead) = refused(&|_| (), V1);
    assert_eq!((layers.len(), instead.as_str()), (7, "GPTQ v2"));
    assert_says(&layers[0].1, &["4-bit affine", "GPTQModel", "version 1"]);

    // The zero-points of weights that are nowhere negative.
    let (dir, mut lm) = quantized(&config(32, 64), &rtn);
    for (path, linear) in lm.model.linears_mut() {
        let [d_in, d_out] = linear.weight().dims();
        let weight = Tensor::<1, Int>::arange(0..(d_in * d_out) as i64, &Device::flex());
        let weight = weight.float().sin().abs().reshape([d_in, d_out]);
        *linear = Linear::new(Weight::frozen(weight), None);
        linear.quantize(&path, &rtn, None).unwrap();
        change(linear, |parts, format| {
            if let Scales::Float(scales) = &mut parts.scales {
                scales.fill(0.125);
            }
            format
        });
    }
    save_as(&lm, dir.path().join("positive"), Gptq(V2)).unwrap();

    let (_dir, lm) = quantized(&config(32, 64), &rtn);
    let (layers, instead) = cannot_hold(&lm, Gptq(V2));
    assert_eq!((layers.len(), instead.as_str()), (7, "quant-core"));
    assert_says(
        &layers[0].1,
        &["scales of 128 that f16 does not hold exactly"],
    );

    let (_dir, mut lm) = quantized(&config(32, 68), &rtn);
    round_to_gptq(&mut lm.model);
    let (layers, _) = cannot_hold(&lm, Gptq(V2));
    let reasons: BTreeMap<&str, &str> = layers
        .iter()
        .map(|(path, reason)| (path.rsplit('.').next().unwrap(), reason.as_str()))
        .collect();
    assert_eq!(
        reasons.keys().copied().collect::<Vec<_>>(),
        ["down_proj", "gate_proj", "up_proj"]
    );
    assert_says(
        reasons["down_proj"],
        &["short last group: 68 inputs in groups of 8"],
    );
    assert_says(reasons["down_proj"], &["68 inputs of 4 bits"]);
    assert_says(reasons["up_proj"], &["68 outputs of 4 bits"]);

    let (_dir, lm) = quantized(&config(32, 64), &NormalFloat::new().with_block_size(32));
    let (layers, instead) = cannot_hold(&lm, Gptq(V1));
    assert_eq!((layers.len(), instead.as_str()), (7, "bitsandbytes"));
    assert_says(&layers[0].1, &["4-bit normal float", "uniform"]);
}
