//! Rotations and windows that cannot be computed.

use models::Config;
use serde_json::{Value, json};

use super::configs::{assert_refused, llama, read, with};

#[test]
fn a_rope_scaling_that_cannot_be_computed_is_refused() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    let yarn = json!({"rope_type": "yarn", "factor": 4.0});
    let rows = [
        (json!({"type": "linear", "factor": 0}), "factor", "is 0;"),
        (
            json!({"type": "dynamic", "factor": -2.0}),
            "factor",
            "is -2;",
        ),
        (json!({"type": "linear", "factor": 1e39}), "factor", "is 1"),
        (json!({"type": "linear"}), "factor", "is missing"),
        (
            json!({"rope_type": "longrope"}),
            "short_factor",
            "is missing",
        ),
        (json!({"rope_type": "ntk"}), "rope_type", "`ntk`; supported"),
        (
            json!({"rope_type": 7}),
            "rope_type",
            "is 7; it must be a text",
        ),
        (
            json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
            "short_factor",
            "1 numbers for 3 pairs",
        ),
        (
            json!({"rope_type": "longrope", "short_factor": [1, 0, 1], "long_factor": [1, 1, 1]}),
            "short_factor",
            "has 0;",
        ),
        (
            json!({"rope_type": "default", "partial_rotary_factor": 0.7}),
            "partial_rotary_factor",
            "rotates 4 of 6 dimensions",
        ),
        (
            json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
            "turn pairs",
        ),
        (
            with(&llama3, &json!({"high_freq_factor": 1.0})),
            "high_freq_factor",
            "not above the low_freq_factor",
        ),
        (
            with(&llama3, &json!({"low_freq_factor": null})),
            "low_freq_factor",
            "is missing",
        ),
        (with(&llama3, &json!({"factor": 0.0})), "factor", "is 0;"),
        (
            with(&llama3, &json!({"original_max_position_embeddings": 0})),
            "original_max_position_embeddings",
            "is 0;",
        ),
        (with(&yarn, &json!({"beta_fast": 0})), "beta_fast", "is 0;"),
        (
            with(&yarn, &json!({"beta_slow": -1})),
            "beta_slow",
            "is -1;",
        ),
        (
            with(&yarn, &json!({"attention_factor": 0})),
            "attention_factor",
            "is 0;",
        ),
    ];
    for (scaling, key, part) in rows {
        for object in ["rope_scaling", "rope_parameters"] {
            let config = with(&llama("llama"), &json!({object: scaling}));
            let at_the_top = part.contains("rotates 4");
            let key = match at_the_top {
                true => key.to_string(),
                false => format!("{object}.{key}"),
            };
            assert_refused(&config, &key, part);
        }
    }
    for (setting, value) in [
        ("is_causal", json!(false)),
        ("is_encoder_decoder", json!(true)),
        ("per_layer_config", json!({"0": {}})),
        ("partial_rotary_factor", json!(0.7)),
    ] {
        assert_refused(
            &with(&llama("llama"), &json!({setting: value})),
            setting,
            "",
        );
    }
    for scaling in [llama3, yarn, Value::Null] {
        read(&with(&llama("llama"), &json!({"rope_scaling": scaling}))).unwrap();
    }
}

#[test]
fn windows_that_are_not_as_the_layers_say_are_refused() {
    let (mistral, qwen2) = (llama("mistral"), llama("qwen2"));
    let of_qwen2 = |settings: Value| {
        let window = json!({"use_sliding_window": true, "sliding_window": 16});
        with(&with(&qwen2, &window), &settings)
    };
    let layers = |second: &str| json!({"layer_types": ["full_attention", second]});
    assert_refused(
        &with(&mistral, &json!({"sliding_window": 0})),
        "sliding_window",
        "is 0;",
    );
    let rows = [
        (layers("chunked_attention"), "layer_types", "has `chunked"),
        (
            json!({"layer_types": ["full_attention"]}),
            "layer_types",
            "has 1 layers",
        ),
        (
            json!({"layer_types": "full_attention"}),
            "layer_types",
            "a list of texts",
        ),
        (
            with(
                &layers("sliding_attention"),
                &json!({"use_sliding_window": false}),
            ),
            "sliding_window",
            "is not set",
        ),
    ];
    for (settings, key, part) in rows {
        assert_refused(&of_qwen2(settings), key, part);
    }
    for (settings, windows) in [
        (json!({"use_sliding_window": false}), None),
        (json!({"max_window_layers": 2}), None),
        (layers("full_attention"), None),
        (json!({"max_window_layers": 0}), Some(16)),
        (layers("sliding_attention"), Some(16)),
    ] {
        let Config::Llama(config) = read(&of_qwen2(settings)).unwrap() else {
            panic!("Qwen2 is of LLaMA's family");
        };
        assert_eq!(config.sliding_window, windows);
    }
}

/// Widths whose sums and products do not fit 64 bits.
#[test]
fn matrices_wider_than_any_model_are_refused() {
    let most = u32::MAX;
    for model_type in ["llama", "phi3"] {
        let heads =
            json!({"num_attention_heads": most, "num_key_value_heads": most, "head_dim": most - 1});
        assert_refused(
            &with(&llama(model_type), &heads),
            "head_dim",
            "makes a matrix of width",
        );
        for key in ["hidden_size", "intermediate_size", "vocab_size"] {
            let config = with(&llama(model_type), &json!({key: most - 3, "head_dim": 8}));
            assert_refused(&config, key, "makes a matrix of width 4294967292");
        }
    }
}

#[test]
fn one_rotation_for_both_kinds_of_layers_is_refused() {
    let config = with(
        &llama("gemma3_text"),
        &json!({"rope_parameters": {"rope_type": "default"}}),
    );
    assert_refused(&config, "rope_parameters", "is one rotation");
}
