//! Parts of a `tokenizer.json`, for vocabularies in other files.

use std::collections::HashSet;

use serde_json::{Value, json};

/// The space of SentencePiece.
pub(crate) const SPACE: &str = "\u{2581}";

/// The most pairs of pieces that make a piece: more than those of a vocabulary of 260 thousand.
const MAX_MERGES: usize = 2_000_000;

/// The longest piece in bytes: each of its cuts is looked up.
const MAX_PIECE: usize = 512;

/// A piece of SentencePiece.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) text: &'a str,
    pub(crate) score: f32,
}

/// The pairs of pieces that make a piece, the highest score first, then in the order of the pieces: the
/// merges of SentencePiece's BPE.
///
/// Source: `SpmConverter.build_tokenizer_from_spm_proto` in `transformers/convert_slow_tokenizer.py`.
///
/// # Errors
/// If there are more than two million, or a piece has more than 512 bytes.
pub(crate) fn merges<'a>(
    pieces: impl Iterator<Item = Piece<'a>> + Clone,
) -> Result<Vec<[&'a str; 2]>, String> {
    let known: HashSet<&str> = pieces.clone().map(|piece| piece.text).collect();
    let mut merges: Vec<(f32, [&str; 2])> = Vec::new();
    for Piece { text, score } in pieces {
        let n = text.len();
        if n > MAX_PIECE {
            return Err(format!("has a piece of {n} bytes; at most {MAX_PIECE}"));
        }
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let pairs = cuts.filter(|(a, b)| known.contains(a) && known.contains(b));
        merges.extend(pairs.map(|(a, b)| (score, [a, b])));
        if merges.len() > MAX_MERGES {
            return Err(format!(
                "has more than {MAX_MERGES} pairs of pieces that make a piece"
            ));
        }
    }
    merges.sort_by(|(a, _), (b, _)| b.partial_cmp(a).unwrap_or(std::cmp::Ordering::Equal));
    Ok(merges.into_iter().map(|(_, pair)| pair).collect())
}

/// The decoder of byte-level BPE.
pub(crate) fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}

/// The replacement of a string.
pub(crate) fn replace(string: &str, content: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": string}, "content": content})
}

/// A space before each text between added tokens, or before the first alone.
pub(crate) fn metaspace(scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false})
}

/// The replacement of what an expression matches.
pub(crate) fn replace_regex(regex: &str, content: &str) -> Value {
    json!({"type": "Replace", "pattern": {"Regex": regex}, "content": content})
}

/// A second space at the beginning of a text, where a Metaspace puts none before the first.
pub(crate) fn second_space() -> Value {
    replace_regex(&format!(r"\A{SPACE}"), &SPACE.repeat(2))
}

/// The normalizer of a SentencePiece model that changes nothing but spaces.
pub(crate) fn sentence_piece_normalizer() -> Value {
    json!({"type": "Sequence", "normalizers": [replace(" ", SPACE), second_space()]})
}

/// The pre-tokenizer that goes with it.
pub(crate) fn sentence_piece_prefix() -> Value {
    json!({"type": "Sequence", "pretokenizers": [metaspace("always")]})
}

/// The steps that decode SentencePiece's tokens, which may have a space before the text.
pub(crate) fn sentence_piece_decoder(falls_back: bool, has_prefix: bool) -> Value {
    let mut decoders = vec![replace(SPACE, " ")];
    if falls_back {
        decoders.push(json!({"type": "ByteFallback"}));
    }
    if falls_back || has_prefix {
        decoders.push(json!({"type": "Fuse"}));
    }
    if has_prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}

/// The post-processor that puts a token before a text, and one after it.
pub(crate) fn template(before: Option<(u32, String)>, after: Option<(u32, String)>) -> Value {
    let special = |token: &Option<(u32, String)>, of: u8| {
        let token = token.as_ref();
        token.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": of}}))
    };
    let text = |id: &str, of: u8| {
        let text = json!({"Sequence": {"id": id, "type_id": of}});
        let around = [special(&before, of), Some(text), special(&after, of)];
        around.into_iter().flatten()
    };
    let single: Vec<Value> = text("A", 0).collect();
    let pair: Vec<Value> = text("A", 0).chain(text("B", 1)).collect();
    let tokens = before.iter().chain(&after).map(|(id, token)| {
        let stated = json!({"id": token, "ids": [id], "tokens": [token]});
        (token.clone(), stated)
    });
    let tokens: serde_json::Map<String, Value> = tokens.collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}
