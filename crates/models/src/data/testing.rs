//! What the tests of several modules need.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Example, Record};
use crate::Tokenizer;

/// The first tokens of the vocabulary, in their order.
pub(super) const SPECIAL: [&str; 6] = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
];

/// A byte-level BPE with a handful of merges: `Ġ` is a space, `Ċ` a line end.
pub(super) fn tokenizer(dir: &Path, post_processor: Value) -> Tokenizer {
    let bytes = (0..=255_u32).scan(256, |next, byte| {
        let is_plain = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if is_plain { byte } else { *next };
        *next += u32::from(!is_plain);
        char::from_u32(code).map(String::from)
    });
    let merges = ["Ġ b", "Ġ a", "Ġ x", "n o", "no w", "Ġ now", "Ã ©"];
    let merged = merges.map(|merge| merge.replace(' ', ""));
    let words = SPECIAL
        .map(String::from)
        .into_iter()
        .chain(bytes)
        .chain(merged);
    let vocab: serde_json::Map<String, Value> = words.zip((0..).map(Value::from)).collect();
    let added = SPECIAL.iter().enumerate().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    let json = json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(), "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": post_processor, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}});
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::open(&path).unwrap()
}

/// Puts `<s>` before a text and moves the offsets of tokens beyond their spaces, as LLaMA 3's does.
pub(super) fn like_llama_3() -> Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true});
    json!({"type": "Sequence", "processors": [byte_level, puts(&["<s>"], &[])]})
}

/// Puts tokens before and behind a text.
pub(super) fn puts(before: &[&str], behind: &[&str]) -> Value {
    let token = |token: &&str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single = before
        .iter()
        .map(token)
        .chain([text])
        .chain(behind.iter().map(token));
    let single: Vec<Value> = single.collect();
    let ids = before.iter().chain(behind).map(|token| {
        let id = SPECIAL.iter().position(|special| special == token);
        (
            token.to_string(),
            json!({"id": token, "ids": [id], "tokens": [token]}),
        )
    });
    let special: serde_json::Map<String, Value> = ids.collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": special})
}

/// The tokens of an example as they stand in the vocabulary, those to be learned with a `*`.
pub(super) fn written(example: &Example, tokenizer: &Tokenizer) -> String {
    let tokens = example.tokens().iter().zip(example.is_target());
    let words = tokens.map(|(&token, &is_target)| {
        let word = tokenizer.inner().id_to_token(token).unwrap();
        format!("{word}{}", if is_target { "*" } else { "" })
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A record of a file that is not there, on its line 7.
pub(super) fn record(fields: Value) -> Record {
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

/// A file of a directory that is gone with it.
pub(super) fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    (dir, path)
}
