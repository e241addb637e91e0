use std::fs;

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::Error;

#[path = "../../tests/fixtures/tokenizer.rs"]
mod fixture;

use fixture::{like_llama_3, puts, write_byte_level};

/// A directory with these files, and its tokenizer.
fn directory(post_processor: Value, config: Value, map: Value) -> (TempDir, Tokenizer) {
    let dir = tempfile::tempdir().unwrap();
    let path = write_byte_level(dir.path(), post_processor);
    let tokenizer = Tokenizer::open(&path).unwrap();
    for (name, json) in [(TOKENIZER_CONFIG, config), (SPECIAL_TOKENS_MAP, map)] {
        if !json.is_null() {
            fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
    }
    (dir, tokenizer)
}

fn read(post_processor: Value, config: Value, map: Value) -> Result<SpecialTokens> {
    let (dir, tokenizer) = directory(post_processor, config, map);
    SpecialTokens::read(dir.path(), &tokenizer)
}

fn token(text: &str, id: u32) -> Option<SpecialToken> {
    let text = text.into();
    Some(SpecialToken { text, id })
}

#[test]
fn a_text_or_an_object() {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},
        "pad_token": null, "add_bos_token": true});
    let special = read(like_llama_3(), config, Value::Null).unwrap();
    let expected = SpecialTokens {
        bos: token("<s>", 1),
        eos: token("</s>", 2),
        pad: None,
        unk: None,
        add_bos: true,
    };
    assert_eq!(special, expected);
    assert_eq!(special.padding(), 2);
}

#[test]
fn files_have_the_precedence_of_transformers() {
    let config = json!({"eos_token": "</s>", "pad_token": "</s>"});
    let map = json!({"eos_token": "<|im_end|>", "unk_token": "<unk>"});
    let special = read(Value::Null, config, map.clone()).unwrap();
    assert_eq!(special.eos, token("<|im_end|>", 5));
    assert_eq!(special.pad, token("</s>", 2));
    assert_eq!(special.unk, token("<unk>", 0));
    let config = json!({"eos_token": "</s>", "added_tokens_decoder": {}});
    let special = read(Value::Null, config, map).unwrap();
    assert_eq!((special.eos, special.unk), (token("</s>", 2), None));
}

#[test]
fn without_files() {
    let none = read(Value::Null, Value::Null, Value::Null).unwrap();
    assert_eq!(none, SpecialTokens::default());
    assert_eq!(none.padding(), 0);
    // A token before a text is `bos`, whether or not one is added after it.
    let special = read(puts(&["<s>"], &["</s>"]), Value::Null, Value::Null).unwrap();
    assert_eq!(
        (special.bos, special.eos, special.add_bos),
        (token("<s>", 1), None, true)
    );
    let after = read(puts(&[], &["</s>"]), Value::Null, Value::Null).unwrap();
    assert_eq!(after, SpecialTokens::default());
}

#[test]
fn a_token_that_the_vocabulary_does_not_have() {
    let error = read(Value::Null, json!({"pad_token": "[PAD]"}), Value::Null).unwrap_err();
    assert!(
        matches!(&error, Error::Text(TextError::UnknownSpecial { name: "pad_token", token, path, .. })
        if token == "[PAD]" && path.ends_with(TOKENIZER_CONFIG))
    );
    let error = read(Value::Null, Value::Null, json!({"eos_token": "<eos>"})).unwrap_err();
    assert!(
        matches!(&error, Error::Text(TextError::UnknownSpecial { path, .. }) if path.ends_with(SPECIAL_TOKENS_MAP))
    );
}

#[test]
fn files_that_disagree_on_bos() {
    let config = json!({"bos_token": "<pad>"});
    let error = read(like_llama_3(), config, Value::Null).unwrap_err();
    assert!(
        matches!(&error, Error::Config(ConfigError::Disagreement { setting: "bos_token", in_first, in_second, .. })
        if in_first == "<pad>" && in_second == "<s>")
    );
    let two = puts(&["<s>", "<|im_start|>"], &[]);
    let error = read(two, json!({"bos_token": "<s>"}), Value::Null).unwrap_err();
    assert!(
        matches!(&error, Error::Config(ConfigError::Disagreement { in_second, .. }) if in_second == "<s> <|im_start|>")
    );
    // `tokenizer.json` decides whether it is added, as for transformers.
    for (post_processor, stated) in [(like_llama_3(), false), (Value::Null, true)] {
        let config = json!({"bos_token": "<s>", "add_bos_token": stated});
        let special = read(post_processor, config, Value::Null).unwrap();
        assert_eq!(special.add_bos, !stated);
    }
    let config = json!({"bos_token": null, "add_bos_token": true});
    assert_eq!(
        read(Value::Null, config, Value::Null).unwrap(),
        SpecialTokens::default()
    );
}

#[test]
fn invalid_configurations() {
    for token in [json!(1), json!({"text": "<s>"})] {
        let error = read(Value::Null, json!({"bos_token": token}), Value::Null).unwrap_err();
        assert!(
            matches!(&error, Error::Config(ConfigError::Setting { setting, .. }) if setting == "bos_token")
        );
    }
    let error = read(Value::Null, json!([]), Value::Null).unwrap_err();
    assert!(
        matches!(&error, Error::Config(ConfigError::Setting { setting, .. }) if setting == "the file")
    );
}

#[test]
fn a_missing_token_is_named() {
    let none = SpecialTokens::default();
    let error = none.need_bos("the protocol `documents`").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the protocol `documents` needs its `bos_token`; state it in the model's `tokenizer_config.json`"
    );
    let error = none.need_eos("the end of a text").unwrap_err();
    assert!(matches!(
        error,
        Error::Text(TextError::MissingSpecial {
            name: "eos_token",
            ..
        })
    ));
}
