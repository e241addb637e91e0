//! Fixtures of the unit tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use models::Tokenizer;
use serde_json::Value;
use tempfile::TempDir;

use crate::{Example, Record};

#[path = "../../models/tests/fixtures/tokenizer.rs"]
mod fixture;

pub(crate) use fixture::{like_llama_3, puts};

/// The tokenizer of the fixture.
pub(crate) fn tokenizer(dir: &Path, post_processor: Value) -> Tokenizer {
    Tokenizer::open(&fixture::write_byte_level(dir, post_processor)).unwrap()
}

/// The tokens of an example as the vocabulary spells them, targets with a `*`.
pub(crate) fn written(example: &Example, tokenizer: &Tokenizer) -> String {
    let tokens = example.tokens().iter().zip(example.is_target());
    let words = tokens.map(|(&token, &is_target)| {
        let word = tokenizer.id_to_token(token).unwrap();
        format!("{word}{}", if is_target { "*" } else { "" })
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A record on line 7 of a file that does not exist.
pub(crate) fn record(fields: Value) -> Record {
    let Value::Object(fields) = fields else {
        panic!("not an object: {fields}");
    };
    let path: Arc<Path> = Path::new("data.jsonl").into();
    Record {
        fields,
        path,
        line: 7,
    }
}

/// A file in a temporary directory.
pub(crate) fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    (dir, path)
}
