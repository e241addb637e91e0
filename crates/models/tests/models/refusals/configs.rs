//! Configurations that make no model, and those that only look so.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use models::{Config, Error, OptConfig, Pretrained, load, quantize, save};
use quant_core::Rtn;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::{
    CONFIG, INDEX, LLAMA, Tensors, assert_file, assert_tensor, change, copy, refusal,
    refusal_of_plan, without,
};

/// A configuration of one of LLaMA's shape.
pub(super) fn llama(model_type: &str) -> Value {
    json!({
        "model_type": model_type,
        "vocab_size": 16,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    })
}

fn opt() -> Value {
    json!({
        "model_type": "opt",
        "vocab_size": 16,
        "hidden_size": 24,
        "ffn_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
        "word_embed_proj_dim": 24,
    })
}

/// A configuration with some of its settings replaced.
pub(super) fn with(config: &Value, settings: &Value) -> Value {
    let mut config = config.clone();
    for (setting, value) in settings.as_object().unwrap() {
        config[setting] = value.clone();
    }
    config
}

pub(super) fn read(config: &Value) -> Result<Config, Error> {
    Config::from_json(config.as_object().unwrap(), Path::new(CONFIG))
}

#[track_caller]
pub(super) fn assert_refused(config: &Value, name: &str, part: &str) {
    let error = read(config).unwrap_err();
    let Error::Config(models::ConfigError::Setting {
        setting, problem, ..
    }) = &error
    else {
        panic!("{name}, {part:?}: {error:?}");
    };
    let is_said = setting == name && problem.contains(part);
    assert!(is_said, "{name}, {part:?}: {error}");
}

#[test]
fn sizes_that_no_model_has_are_refused() {
    let of_llama = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "num_hidden_layers",
    ];
    let of_opt = [
        "vocab_size",
        "hidden_size",
        "ffn_dim",
        "num_attention_heads",
        "max_position_embeddings",
        "word_embed_proj_dim",
        "num_hidden_layers",
    ];
    for (config, sizes) in [(llama("llama"), &of_llama[..]), (opt(), &of_opt[..])] {
        read(&config).unwrap();
        for setting in sizes {
            for size in [0, 4_294_967_296_u64, u64::MAX] {
                let part = format!("is {size}; it must be 1 to");
                assert_refused(&with(&config, &json!({*setting: size})), setting, &part);
            }
        }
    }
    assert_refused(
        &with(&llama("llama"), &json!({"num_hidden_layers": 10_001})),
        "num_hidden_layers",
        "1 to 10000",
    );
}

/// As numbers of another kind, as texts, and not at all.
#[test]
fn sizes_that_are_no_whole_numbers_are_refused() {
    for config in [llama("llama"), opt()] {
        let values = [
            json!(24.5),
            json!("24"),
            json!(-24),
            json!(1e20),
            json!([24]),
            json!(true),
            Value::Null,
        ];
        for setting in ["hidden_size", "vocab_size", "num_hidden_layers"] {
            for value in &values {
                let config = with(&config, &json!({setting: value}));
                let part = format!("is {value}; it must be 1 to");
                assert_refused(&config, setting, &part);
            }
            let mut config = config.clone();
            config.as_object_mut().unwrap().remove(setting);
            assert_refused(&config, setting, "is missing");
        }
        // A whole number that is written as a float is one.
        let same = with(&config, &json!({"hidden_size": 24.0}));
        assert_eq!(read(&same).unwrap(), read(&config).unwrap());
    }
}

/// A null is no default where transformers has none, and the message names its key.
#[test]
fn a_null_is_refused_by_its_key() {
    for setting in [
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
    ] {
        let config = with(&llama("llama"), &json!({setting: null}));
        assert_refused(&config, setting, "is null; it must be");
    }
    for setting in ["head_dim", "num_key_value_heads", "rope_scaling"] {
        read(&with(&llama("llama"), &json!({setting: null}))).unwrap();
    }
}

/// Before anything is made for each of them.
#[test]
fn more_layers_than_a_model_has_are_refused_at_once() {
    for n_layers in [json!(4_000_000_000_u64), json!(u64::MAX)] {
        let dir = copy(LLAMA);
        change(dir.path(), |config, _| {
            config["num_hidden_layers"] = n_layers;
        });
        let clock = Instant::now();
        for error in [refusal(dir.path()), refusal_of_plan(dir.path())] {
            let is_said = matches!(&error, Error::Config(models::ConfigError::Setting { setting, .. }) if setting == "num_hidden_layers");
            assert!(is_said, "{error}");
        }
        assert!(clock.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_llama_that_cannot_be_computed_is_refused() {
    let rows = [
        (
            json!({"num_attention_heads": 5, "num_key_value_heads": 1}),
            "num_attention_heads",
            "does not divide the hidden size 24",
        ),
        (
            json!({"num_key_value_heads": 8}),
            "num_key_value_heads",
            "does not divide the 4 heads",
        ),
        // A head of 3: rotary embeddings turn pairs.
        (
            json!({"num_attention_heads": 8}),
            "head_dim",
            "is 3; rotary",
        ),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps", "is 0"),
        (json!({"rms_norm_eps": -1e-5}), "rms_norm_eps", "positive"),
        // Positive numbers of which f32, the type of the norms, makes 0, a subnormal number, and an
        // infinity.
        (json!({"rms_norm_eps": 1e-50}), "rms_norm_eps", "f32"),
        (json!({"rms_norm_eps": 1e-40}), "rms_norm_eps", "f32"),
        (json!({"rms_norm_eps": 1e39}), "rms_norm_eps", "f32"),
        (json!({"rope_theta": 0}), "rope_theta", "above 1"),
        (json!({"rope_theta": 1}), "rope_theta", "above 1"),
        (json!({"rope_theta": 0.5}), "rope_theta", "above 1"),
        (
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}),
            "rope_parameters.rope_theta",
            "above 1",
        ),
        (
            json!({"rms_norm_eps": "1e-5"}),
            "rms_norm_eps",
            "it must be a number",
        ),
        (
            json!({"tie_word_embeddings": "true"}),
            "tie_word_embeddings",
            "it must be true or false",
        ),
    ];
    for (settings, setting, part) in rows {
        assert_refused(&with(&llama("llama"), &settings), setting, part);
    }
}

#[test]
fn an_opt_that_cannot_be_computed_is_refused() {
    let rows = [
        (
            json!({"num_attention_heads": 5}),
            "num_attention_heads",
            "does not divide the hidden size 24",
        ),
        (
            json!({"activation_function": "mish"}),
            "activation_function",
            "`mish`; supported: relu",
        ),
        (
            json!({"activation_function": 7}),
            "activation_function",
            "is 7; it must be the name",
        ),
    ];
    for (settings, setting, part) in rows {
        assert_refused(&with(&opt(), &settings), setting, part);
    }
}

/// OPT of 350 million parameters has its norms behind what they belong to, and a narrower embedding.
#[test]
fn an_opt_with_norms_behind_is_read() {
    let settings = json!({"do_layer_norm_before": false, "word_embed_proj_dim": 16});
    let config = read(&with(&opt(), &settings)).unwrap();
    let is_read = matches!(
        config,
        Config::Opt(OptConfig {
            do_layer_norm_before: false,
            word_embed_proj_dim: 16,
            ..
        })
    );
    assert!(is_read, "{config:?}");
}

#[test]
fn an_opt_without_the_projections_of_its_embedding_is_refused() {
    const EMBEDDING: &str = "model.decoder.embed_tokens.weight";
    let dir = copy("opt_125m_style");
    change(dir.path(), |config, all| {
        config["word_embed_proj_dim"] = json!(32);
        let narrow = (Dtype::F32, vec![256, 32], vec![0; 4 * 256 * 32]);
        all.insert(EMBEDDING.into(), narrow);
    });
    let error = refusal(dir.path());
    let is_missed = matches!(
        &error,
        Error::File(tensor_files::Error::MissingTensor { tensor, .. })
            if tensor == "model.decoder.project_in.weight"
    );
    assert!(is_missed, "{error}");
    let dir = copy("opt_125m_style");
    change(dir.path(), |config, _| {
        config["max_position_embeddings"] = json!(65);
    });
    let positions = "model.decoder.embed_positions.weight";
    assert_tensor(&refusal(dir.path()), positions, "[66, 64]");
}

/// Each model type has the defaults of its own class in transformers.
#[test]
fn heads_of_keys_and_values_are_those_of_the_model_type() {
    let mut config = llama("mistral");
    config["num_attention_heads"] = json!(12);
    config
        .as_object_mut()
        .unwrap()
        .remove("num_key_value_heads");
    assert_refused(
        &config,
        "num_key_value_heads",
        "is 8, which does not divide the 12",
    );
    config["model_type"] = json!("llama");
    assert!(matches!(
        read(&config).unwrap(),
        Config::Llama(config) if config.num_key_value_heads == 12
    ));
}

#[test]
fn an_unknown_architecture_is_named_with_those_that_are_known() {
    for (model_type, name) in [
        (json!("gpt_neox"), "`gpt_neox`"),
        (json!("LLaMA"), "`LLaMA`"),
        (json!(7), "``"),
        (Value::Null, "``"),
    ] {
        let error = read(&with(&llama("llama"), &json!({"model_type": model_type}))).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Config(models::ConfigError::Architecture { .. })
            ),
            "{error:?}"
        );
        for part in [
            name,
            CONFIG,
            "supported: llama, mistral, qwen2, smollm3, opt, qwen3, gemma2",
        ] {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }
}

#[test]
fn a_configuration_that_is_no_json_object_is_refused() {
    let dir = copy(LLAMA);
    let path = dir.path().join(CONFIG);
    let fine = fs::read_to_string(&path).unwrap();
    let theta = |value: &str| {
        let changed = fine.replace(
            "\"rope_theta\": 10000.0",
            &format!("\"rope_theta\": {value}"),
        );
        assert_ne!(changed, fine);
        changed.into_bytes()
    };
    let deep = format!("{{\"a\": {}", "[".repeat(100_000));
    for (text, part) in [
        (Vec::new(), "EOF"),
        (b"[]".to_vec(), "expected a map"),
        (b"null".to_vec(), "expected a map"),
        (b"{\"model_type\": \"\xff\"}".to_vec(), "invalid unicode"),
        (format!("\u{feff}{fine}").into_bytes(), "expected value"),
        (format!("{fine}{{}}").into_bytes(), "trailing characters"),
        (fine.as_bytes()[..fine.len() / 2].to_vec(), "EOF"),
        (deep.into_bytes(), "recursion limit"),
        (theta("NaN"), "expected value"),
        (theta("Infinity"), "expected value"),
        (theta("-Infinity"), "invalid number"),
        (theta("1e999"), "out of range"),
    ] {
        fs::write(&path, text).unwrap();
        assert_file(&refusal(dir.path()), CONFIG, part);
        assert_file(&refusal_of_plan(dir.path()), CONFIG, part);
    }
}

/// The directory of the dense LLaMA after a change to it.
fn changed(how: impl FnOnce(&mut Value, &mut Tensors)) -> Result<Pretrained, Error> {
    let dir = copy(LLAMA);
    change(dir.path(), how);
    load(dir.path(), &Device::flex())
}

/// A head beside the embedding that is to be the head says nothing new, or something else.
#[test]
fn a_head_must_be_that_of_the_configuration() {
    const HEAD: &str = "lm_head.weight";
    let error = changed(|config, _| config["tie_word_embeddings"] = json!(true)).unwrap_err();
    let is_named =
        matches!(&error, Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor == HEAD);
    assert!(
        is_named && error.to_string().contains("another matrix"),
        "{error}"
    );
    let same = changed(|config, all| {
        config["tie_word_embeddings"] = json!(true);
        let embedding = all["model.embed_tokens.weight"].clone();
        all.insert(HEAD.into(), embedding);
    });
    assert!(same.unwrap().model.config().tie_word_embeddings());
    let error = changed(|_, all| drop(all.remove(HEAD))).unwrap_err();
    let is_missed = matches!(
        &error,
        Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor == HEAD
    );
    assert!(is_missed, "{error}");
}

#[test]
fn a_quantization_that_is_not_known_is_refused() {
    for (quantization, part) in [
        (json!({"quant_method": "fp8"}), "`fp8`"),
        (json!({"quant_method": "compressed-tensors"}), "supported: "),
        (json!({"bits": 4, "group_size": 128}), "is missing"),
        (json!({"quant_method": 4}), "is 4; it must be a text"),
        (json!("gptq"), "is \"gptq\"; it must be an object"),
        (json!([]), "is []; it must be an object"),
    ] {
        let error = changed(|config, all| {
            config["quantization_config"] = quantization;
            // Dense weights would not be those of it.
            let first = "model.layers.0.self_attn.q_proj.weight";
            all.get_mut(first).unwrap().0 = safetensors::Dtype::I16;
        });
        let error = error.unwrap_err();
        let is_said = matches!(
            &error,
            Error::Config(models::ConfigError::Setting { setting, problem, .. })
                if setting.starts_with("quantization_config") && problem.contains(part)
        );
        assert!(is_said, "{part}: {error}");
    }
    changed(|config, _| config["quantization_config"] = Value::Null).unwrap();
}

/// Asserts that a group is refused for being larger than a layer.
#[track_caller]
fn assert_too_large(error: &Error) {
    let is_said = matches!(
        error,
        Error::Peft(peft::Error::Quant {
            source: quant_core::Error::GroupSize { .. },
            ..
        })
    );
    assert!(is_said, "{error:?}");
}

#[test]
fn a_gptq_checkpoint_of_no_known_width_or_group_is_refused() {
    let refused = |setting: &str, value: Value| {
        let dir = copy("llama_gptq_w4_g32_sym");
        change(dir.path(), |config, _| {
            config["quantization_config"][setting] = value;
        });
        refusal(dir.path())
    };
    for (setting, value, part) in [
        ("bits", json!(0), "bits is 0; supported: 2, 3, 4, 8"),
        ("bits", json!(1), "bits is 1"),
        ("bits", json!(16), "bits is 16"),
        ("bits", json!(u64::MAX), "bits is 18446744073709551615"),
        ("bits", json!(-4), "bits is -4; supported"),
        ("bits", json!(4.5), "bits is 4.5; it must be a whole number"),
        ("bits", json!([4]), "bits is [4]; it must be a whole number"),
        ("group_size", json!(-32), "group_size is -32"),
        ("group_size", json!(i64::MIN), "group_size is -9223"),
        (
            "group_size",
            json!(32.5),
            "group_size is 32.5; it must be a whole",
        ),
        (
            "group_size",
            json!(1e300),
            "group_size is 1e+300; it must be a whole",
        ),
        (
            "group_size",
            json!("many"),
            "group_size is \"many\"; it must be",
        ),
        (
            "group_size",
            json!(u64::MAX),
            "group_size is 18446744073709551615",
        ),
    ] {
        let error = refused(setting, value);
        assert!(
            matches!(error, Error::Config(models::ConfigError::Setting { .. })),
            "{error:?}"
        );
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert_too_large(&refused("group_size", json!(i64::MAX)));
}

#[test]
fn a_layer_of_no_known_format_is_refused() {
    let dir = copy(LLAMA);
    let mut lm = load(dir.path(), &Device::flex()).unwrap();
    let rtn = Rtn::new().with_group_size(8);
    quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
    let packed = dir.path().join("packed");
    save(&lm, &packed).unwrap();
    let path = packed.join(CONFIG);
    let fine: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let refused = |setting: &str, value: Value| {
        let mut config = fine.clone();
        config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"][setting] = value;
        fs::write(&path, config.to_string()).unwrap();
        refusal(&packed)
    };
    for (setting, value, part) in [
        ("bits", json!(0), "not 0"),
        ("bits", json!(16), "not 16"),
        ("bits", json!(-4), "cannot be read"),
        ("bits", json!(4.0), "cannot be read"),
        ("group_size", json!(-1), "cannot be read"),
        ("group_size", json!(8.0), "cannot be read"),
        ("group_size", json!("8"), "cannot be read"),
        ("grid", json!("cubic"), "cannot be read"),
    ] {
        let error = refused(setting, value);
        assert!(
            matches!(error, Error::Config(models::ConfigError::Setting { .. })),
            "{error:?}"
        );
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert_too_large(&refused("group_size", json!(65)));
    assert_too_large(&refused("group_size", json!(u64::MAX)));
}

/// Parsed, JSON takes many times its size: 64 MB of `0,` take 2 GB.
#[test]
fn configurations_larger_than_any_are_refused() {
    let zeros = format!("{{\"settings\": [{}0]}}", "0,".repeat(2 << 20));
    let parsed = [
        CONFIG,
        INDEX,
        "quantize_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ];
    for name in parsed {
        let dir = without(name);
        fs::write(dir.path().join(name), &zeros).unwrap();
        assert_file(&refusal(dir.path()), name, "at most 4194304");
    }
}
