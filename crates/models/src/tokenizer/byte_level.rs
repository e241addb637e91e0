//! GPT-2's byte-level BPE, `vocab.json` with `merges.txt`.

use serde_json::{Map, Value, json};

use super::library::Result;
use super::parts;
use super::pre::Pre;
use super::vocabularies::{Converted, Settings};

/// The tokenizer of a vocabulary and its merges, as transformers converts it.
///
/// Source: `models/gpt2/tokenization_gpt2.py` and `models/qwen2/tokenization_qwen2.py` of transformers.
pub(super) fn convert(
    vocab: &Map<String, Value>,
    merges: Vec<Value>,
    settings: &Settings,
) -> Converted {
    let ids = vocab.iter().filter_map(|(token, id)| {
        let id = u32::try_from(id.as_u64()?).ok()?;
        Some((token.clone(), id))
    });
    let ids = ids.collect();
    let (pre, specials) = if settings.is_qwen2() {
        ("qwen2", ["eos_token", "pad_token", "unk_token"])
    } else {
        ("gpt-2", ["bos_token", "eos_token", "unk_token"])
    };
    let pre = Pre::named(pre).expect("a name of the list");
    let mut pre_tokenizer = pre.pre_tokenizer();
    if settings.flag("add_prefix_space") == Some(true) {
        let n_steps = pre_tokenizer["pretokenizers"].as_array().map(Vec::len);
        let last = match n_steps {
            Some(n) => &mut pre_tokenizer["pretokenizers"][n - 1],
            None => &mut pre_tokenizer,
        };
        last["add_prefix_space"] = true.into();
    }
    let json = json!({
        "normalizer": pre.normalizer(),
        "pre_tokenizer": pre_tokenizer,
        "decoder": parts::byte_level(),
        "model": {"type": "BPE", "unk_token": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges},
    });
    let Value::Object(json) = json else {
        unreachable!("an object was made");
    };
    Converted {
        json,
        vocab: ids,
        added: Vec::new(),
        specials: specials.map(|name| (name, END.to_owned())).into(),
        finds_raw: false,
        growth: None,
    }
}

/// The token that the class takes for every special token that is not stated.
const END: &str = "<|endoftext|>";

/// Reads a `vocab.json`: tokens with their ids.
pub(super) fn read_vocab(bytes: &[u8]) -> Result<Map<String, Value>> {
    let n = bytes.len();
    if n > MAX_BYTES {
        return Err(format!("has {n} bytes; at most {MAX_BYTES} are read"));
    }
    let vocab: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| format!("is not a JSON object: {error}"))?;
    let is_id = |id: &Value| id.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
    match vocab.iter().find(|(_, id)| !is_id(id)) {
        Some((token, id)) => Err(format!("`{token}` has the id {id}, which is no token's")),
        None => Ok(vocab),
    }
}

/// Reads a `merges.txt`: after a line with its version, two tokens of a vocabulary on each line.
pub(super) fn read_merges(bytes: &[u8], vocab: &Map<String, Value>) -> Result<Vec<Value>> {
    let n = bytes.len();
    if n > MAX_BYTES {
        return Err(format!("has {n} bytes; at most {MAX_BYTES} are read"));
    }
    let text = str::from_utf8(bytes).map_err(|error| format!("is not UTF-8: {error}"))?;
    let mut merges = Vec::new();
    for (at, line) in text.trim_end_matches(['\r', '\n']).split('\n').enumerate() {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.starts_with("#version") || (at == 0 && line.is_empty()) {
            continue;
        }
        let refuse = |problem: String| Err(format!("line {}: {problem}", at + 1));
        let pair = line
            .split_once(' ')
            .filter(|(a, b)| !(a.is_empty() || b.is_empty() || b.contains(' ')));
        let Some((first, second)) = pair else {
            return refuse(format!(
                "`{line}` is not two tokens with a space between them"
            ));
        };
        for token in [first, second, &[first, second].concat()] {
            if !vocab.contains_key(token) {
                return refuse(format!("`{token}` is not in `vocab.json`"));
            }
        }
        merges.push(json!([first, second]));
    }
    Ok(merges)
}

/// The largest file. Those of vocabularies of 150 thousand tokens have 3 MB.
const MAX_BYTES: usize = 1 << 25;
