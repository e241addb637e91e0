//! Special tokens that an example needs.

use std::fs;

use instruct::{Encoded, Error, Limit, Template, TooLong, encode, read_records};
use models::{SpecialTokens, Tokenizer};
use tempfile::TempDir;

#[path = "../../../models/tests/fixtures/word_level.rs"]
mod word_level;

use word_level::write_tokenizer;

/// A directory with a tokenizer of 16 words, none of which is a special token.
fn directory() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(&dir.path().join("tokenizer.json"), 16);
    dir
}

/// A word of the vocabulary ends texts, if the files say so.
#[test]
fn the_end_of_a_text_must_be_stated_and_known() {
    let dir = directory();
    let tokenizer = Tokenizer::open(&dir.path().join("tokenizer.json")).unwrap();
    let data = dir.path().join("data.jsonl");
    fs::write(&data, "{\"question\": \"w1\", \"answer\": \"w2\"}\n").unwrap();
    let records = read_records(&data).unwrap();
    let template = Template::fields("{{ question }}", " {{ answer }}").unwrap();
    let limit = Limit::new(8).with_too_long(TooLong::Refuse);
    let encode = || -> Result<Encoded, Error> {
        let special = SpecialTokens::read(dir.path(), &tokenizer)?;
        encode(&records, &template, &tokenizer, &special, limit)
    };
    let state = |json: &str| fs::write(dir.path().join("tokenizer_config.json"), json).unwrap();
    let error = encode().unwrap_err();
    let is_named = matches!(
        error,
        Error::Model(models::Error::Text(models::TextError::MissingSpecial {
            name: "eos_token",
            ..
        }))
    );
    assert!(is_named, "{error}");
    state("{\"eos_token\": \"w3\"}");
    assert_eq!(encode().unwrap().examples[0].tokens(), [1, 2, 3]);
    state("{\"eos_token\": \"</s>\"}");
    let error = encode().unwrap_err();
    let is_named = matches!(
        &error,
        Error::Model(models::Error::Text(models::TextError::UnknownSpecial { name: "eos_token", token, .. }))
            if token == "</s>"
    );
    assert!(is_named, "{error}");
}
