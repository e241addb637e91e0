//! Checks of a `tokenizer.json` before the crate `tokenizers` reads it.
//!
//! Limits are far above those of published tokenizers. They bound the memory and the depth of recursion
//! that a file can ask for; references from one part to another are checked where that crate follows
//! them unchecked.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::charsmap;
use super::library::{Result, within};
use super::stream::Continuity;

/// The largest file. Those of vocabularies of 260 thousand tokens have 35 MB.
const MAX_BYTES: usize = 100_000_000;

/// The deepest nesting of arrays and objects. Published files have up to 8.
const MAX_DEPTH: usize = 32;

/// The longest string, but for a table of characters.
const MAX_STRING: usize = 1 << 16;

/// The longest table of characters in base64. SentencePiece's own have 320 kB.
const MAX_CHARSMAP: usize = 1 << 22;

/// The most commas, colons and opening brackets: each is a value in memory. The largest published file
/// has 2 million.
const MAX_VALUES: usize = 6_000_000;

/// The longest string that is replaced.
const MAX_PATTERN: usize = 1 << 14;

/// The most regular expressions, each of which can become 10 MB, and as many look-arounds in them, each
/// of which is one more.
const MAX_REGEXES: usize = 16;

/// The longest text of all regular expressions. Those of published files have less than 1 kB.
const MAX_REGEX_BYTES: usize = 1 << 12;

/// The most normalizers, pre-tokenizers, decoders or post-processors, with those in sequences.
const MAX_STEPS: usize = 64;

/// The longest piece of a Unigram model, in bytes: the depth of a trie that is dropped recursively. Also
/// the longest string that a model puts in place of a text or beside it, and the longest added token.
const MAX_PIECE: usize = 512;

/// The most bytes of all pieces of a Unigram model, each of which can become 350.
const MAX_PIECES: usize = 1 << 23;

/// The longest word of a WordPiece model, whose time grows with its third power.
const MAX_WORD: u64 = 1000;

/// The most by which normalizers and pre-tokenizers may multiply the bytes of a text.
const MAX_GROWTH: f64 = 1e4;

/// The most by which decoders may multiply the bytes of a token.
const MAX_DECODER_GROWTH: f64 = 64.0;

/// The most bytes that a file can make of its added tokens, or of a text.
const MAX_GROWN: f64 = (1u64 << 28) as f64;

/// A growth that costs no more than other tokenizers do, whatever the text.
const PLAIN_GROWTH: f64 = 64.0;

/// What the parts of a file are known for.
pub(super) struct Checked {
    /// The most by which normalizers and pre-tokenizers multiply the bytes of a text.
    pub(super) growth: f64,
    pub(super) continuity: Continuity,
}

/// Parses a file within the limits of its size.
pub(super) fn parse(bytes: &[u8]) -> Result<Map<String, Value>> {
    let n = bytes.len();
    if n > MAX_BYTES {
        return Err(format!("has {n} bytes; at most {MAX_BYTES} are read"));
    }
    let is_value = |byte: &&u8| matches!(**byte, b',' | b':' | b'[' | b'{');
    let n_values = bytes.iter().filter(is_value).count();
    if n_values > MAX_VALUES {
        return Err(format!(
            "has up to {n_values} values; at most {MAX_VALUES} are read"
        ));
    }
    serde_json::from_slice(bytes).map_err(|error| format!("is not a JSON object: {error}"))
}

/// Checks what the parts of a file ask for.
pub(super) fn check(file: &Map<String, Value>) -> Result<Checked> {
    for (name, part) in file {
        within(name, check_sizes(part, 1))?;
    }
    let part = |name| file.get(name).unwrap_or(&Value::Null);
    within("model", check_model(part("model")))?;
    let mut growth = 1.0;
    let normalizers = steps("normalizer", part("normalizer"), "normalizers")?;
    for (place, step) in &normalizers {
        growth *= within(place, normalizer_growth(step))?;
    }
    within("added_tokens", check_added(part("added_tokens"), growth))?;
    let pre_tokenizers = steps("pre_tokenizer", part("pre_tokenizer"), "pretokenizers")?;
    for (place, step) in &pre_tokenizers {
        growth *= within(place, pre_tokenizer_growth(step))?;
    }
    let place = "normalizer, pre_tokenizer";
    within(place, check_growth("a text", growth, MAX_GROWTH))?;
    let decoders = steps("decoder", part("decoder"), "decoders")?;
    let of_token: f64 = decoders
        .iter()
        .map(|(_, step)| decoder_growth(step))
        .product();
    within(
        "decoder",
        check_growth("a token", of_token, MAX_DECODER_GROWTH),
    )?;
    let continuity = Continuity::of(decoders.iter().map(|(_, step)| *step));
    let all = [normalizers, pre_tokenizers, decoders].concat();
    check_regexes(all.iter().map(|(_, step)| *step))?;
    let mut template = None;
    for (place, step) in steps("post_processor", part("post_processor"), "processors")? {
        if step.get("single").is_some() {
            within(&place, check_template(step))?;
            if let Some(first) = template.replace(place.clone()) {
                return Err(format!("{place}: is a second template, after {first}"));
            }
        }
    }
    Ok(Checked { growth, continuity })
}

/// Checks that a text of `n_bytes` stays within bounds where its file makes it longer.
pub(super) fn check_text(n_bytes: usize, growth: f64) -> Result<()> {
    let grown = n_bytes as f64 * growth;
    if growth > PLAIN_GROWTH && grown > MAX_GROWN {
        return Err(format!(
            "normalizer, pre_tokenizer: can make a text of {n_bytes} bytes {growth:.0} times longer; split the text"
        ));
    }
    Ok(())
}

/// Added tokens are normalized when a file is read.
fn check_added(added: &Value, growth: f64) -> Result<()> {
    let mut n_bytes = 0;
    for (at, token) in added.as_array().into_iter().flatten().enumerate() {
        let n = text(token, "content").len();
        if n > MAX_PIECE {
            return Err(format!(
                "[{at}]: has a content of {n} bytes; at most {MAX_PIECE}"
            ));
        }
        n_bytes += n;
    }
    if n_bytes as f64 * growth > MAX_GROWN {
        return Err(format!(
            "has {n_bytes} bytes, which the normalizer can make {growth:.0} times longer"
        ));
    }
    Ok(())
}

fn check_regexes<'a>(steps: impl Iterator<Item = &'a Value>) -> Result<()> {
    let regexes: Vec<&str> = steps
        .filter_map(|step| step["pattern"]["Regex"].as_str())
        .collect();
    let n_bytes: usize = regexes.iter().map(|regex| regex.len()).sum();
    let around = ["(?=", "(?!", "(?<=", "(?<!"];
    let n_around: usize = (regexes.iter())
        .map(|regex| {
            around
                .iter()
                .map(|mark| regex.matches(mark).count())
                .sum::<usize>()
        })
        .sum();
    for (n, max, what) in [
        (regexes.len(), MAX_REGEXES, "regular expressions"),
        (
            n_around,
            MAX_REGEXES,
            "look-arounds in its regular expressions",
        ),
        (n_bytes, MAX_REGEX_BYTES, "bytes of regular expressions"),
    ] {
        if n > max {
            return Err(format!("has {n} {what}; at most {max}"));
        }
    }
    Ok(())
}

fn check_sizes(value: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(format!("is nested more than {MAX_DEPTH} deep"));
    }
    let check = |text: &str, max| match text.len() {
        n if n > max => Err(format!("has a string of {n} bytes; at most {max}")),
        _ => Ok(()),
    };
    match value {
        Value::String(text) => check(text, MAX_STRING),
        Value::Array(values) => values
            .iter()
            .try_for_each(|value| check_sizes(value, depth + 1)),
        Value::Object(values) => values.iter().try_for_each(|(key, value)| {
            check(key, MAX_STRING)?;
            match value {
                Value::String(map) if key == "precompiled_charsmap" => check(map, MAX_CHARSMAP),
                _ => check_sizes(value, depth + 1),
            }
        }),
        _ => Ok(()),
    }
}

/// A part and, where it is a sequence, the parts in it under `key`, each with its place.
fn steps<'a>(name: &str, part: &'a Value, key: &str) -> Result<Vec<(String, &'a Value)>> {
    let mut steps = vec![(name.to_owned(), part)];
    let mut at = 0;
    while let Some((place, step)) = steps.get(at) {
        // The library also reads an array, as the values of a part in the order of their keys.
        if !(step.is_object() || step.is_null()) {
            return Err(format!("{place}: is not an object"));
        }
        if let Some(Value::Array(inner)) = step.get(key) {
            let n = steps.len() + inner.len();
            if n > MAX_STEPS {
                return Err(format!("{place}: has {n} steps; at most {MAX_STEPS}"));
            }
            let place = place.clone();
            let inner = inner.iter().enumerate();
            steps.extend(inner.map(|(i, step)| (format!("{place}.{key}[{i}]"), step)));
        }
        at += 1;
    }
    Ok(steps)
}

fn check_model(model: &Value) -> Result<()> {
    if !(model.is_object() || model.is_null()) {
        return Err("is not an object".into());
    }
    match &model["vocab"] {
        Value::Object(vocab) => {
            check_ids(vocab)?;
            check_merges(model, vocab)?;
        }
        Value::Array(pieces) => check_pieces(pieces)?,
        _ => {}
    }
    // Tokens have copies of them, however short their text is.
    for name in [
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
    ] {
        let n = text(model, name).len();
        if n > MAX_PIECE {
            return Err(format!("{name}: has {n} bytes; at most {MAX_PIECE}"));
        }
    }
    match model["max_input_chars_per_word"].as_u64() {
        Some(n) if n > MAX_WORD => Err(format!(
            "max_input_chars_per_word: is {n}; at most {MAX_WORD}"
        )),
        _ => Ok(()),
    }
}

/// The token of an id would depend on the order of a hash map, were there two.
fn check_ids(vocab: &Map<String, Value>) -> Result<()> {
    let mut tokens = HashMap::with_capacity(vocab.len());
    for (token, id) in vocab {
        if let Some(id) = id.as_u64()
            && let Some(other) = tokens.insert(id, token)
        {
            return Err(format!(
                "vocab: `{other}` and `{token}` have the same id {id}"
            ));
        }
    }
    Ok(())
}

/// A merged token is written to a buffer of the length of the longest token, without the prefix of the
/// second.
fn check_merges(model: &Value, vocab: &Map<String, Value>) -> Result<()> {
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let prefix = model["continuing_subword_prefix"].as_str();
    let n_prefix = prefix.unwrap_or_default().len();
    let merges = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    for (at, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(merge) => merge.split_once(' '),
            merge => merge[0].as_str().zip(merge[1].as_str()),
        };
        let Some((first, second)) = pair else {
            continue;
        };
        let rest = second.get(n_prefix..);
        if rest.is_none_or(|rest| first.len() + rest.len() > longest) {
            return Err(format!(
                "merges[{at}]: `{first}` and `{second}` make no token of the vocabulary"
            ));
        }
    }
    Ok(())
}

fn check_pieces(pieces: &[Value]) -> Result<()> {
    let mut total = 0;
    for (at, piece) in pieces.iter().enumerate() {
        let n = piece[0].as_str().map_or(0, str::len);
        if n > MAX_PIECE {
            return Err(format!(
                "vocab[{at}]: has a piece of {n} bytes; at most {MAX_PIECE}"
            ));
        }
        total += n;
    }
    if total > MAX_PIECES {
        return Err(format!(
            "vocab: has pieces of {total} bytes; at most {MAX_PIECES}"
        ));
    }
    Ok(())
}

/// The most by which a normalizer multiplies the bytes of a text. For Unicode's normal forms, see its
/// FAQ on normalization.
fn normalizer_growth(step: &Value) -> Result<f64> {
    let mut growth = match kind(step) {
        "NFC" | "NFD" => 3.0,
        "NFKC" | "NFKD" => 11.0,
        "Lowercase" => 1.5,
        "ByteLevel" => 2.0,
        _ => 1.0,
    };
    // Of BERT, whatever its type is called: spaces around a Chinese character, decomposition, lower case.
    if kind(step).starts_with("Bert") || step.get("handle_chinese_chars").is_some() {
        growth *= 5.0 / 3.0 * 3.0 * 1.5;
    }
    if kind(step) == "Precompiled" || step.get("precompiled_charsmap").is_some() {
        let map = step["precompiled_charsmap"]
            .as_str()
            .ok_or("is not a string");
        let of_map = map.map_err(String::from).and_then(charsmap::decode);
        let of_map = of_map.and_then(|map| charsmap::growth(&map));
        growth *= within("precompiled_charsmap", of_map)?;
    }
    // A text may be a single byte between two added tokens.
    growth *= 1.0 + text(step, "prepend").len() as f64;
    Ok(growth * replacement_growth(step)?)
}

fn pre_tokenizer_growth(step: &Value) -> Result<f64> {
    if step["length"] == 0 {
        return Err("length: is 0".into());
    }
    replacement_growth(step)?;
    Ok(match kind(step) {
        // With a space before a byte.
        "ByteLevel" => 4.0,
        "Metaspace" => 1.0 + text(step, "replacement").len() as f64,
        _ => 1.0,
    })
}

fn decoder_growth(step: &Value) -> f64 {
    let mut growth = match kind(step) {
        "ByteLevel" => 3.0,
        _ => 1.0,
    };
    // A space before a token, or for a string that may be empty.
    for key in ["prefix", "suffix", "word_delimiter_token"] {
        growth *= if step.get(key).is_some() { 2.0 } else { 1.0 };
    }
    growth * replacement_growth(step).unwrap_or(f64::INFINITY)
}

/// The growth by replacing a pattern with the string `content`, if the step does that.
fn replacement_growth(step: &Value) -> Result<f64> {
    let n = text(step, "content").len() as f64;
    let pattern = &step["pattern"];
    let (n_matched, pattern) = match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
        (Some(string), _) => (string.len(), string),
        // It may match between any two bytes.
        (None, Some(regex)) => (0, regex),
        (None, None) => return Ok(1.0),
    };
    if pattern.len() > MAX_PATTERN {
        let n = pattern.len();
        return Err(format!("pattern: has {n} bytes; at most {MAX_PATTERN}"));
    }
    Ok(match n_matched {
        0 => 1.0 + n,
        matched => (n / matched as f64).max(1.0),
    })
}

fn check_growth(what: &str, growth: f64, max: f64) -> Result<()> {
    if growth > max {
        return Err(format!(
            "can make {what} {growth:.0} times longer; at most {max} times"
        ));
    }
    Ok(())
}

/// A template has the text once, and only tokens that it lists.
fn check_template(step: &Value) -> Result<()> {
    let mut n_texts = 0;
    for piece in step["single"].as_array().unwrap_or(&Vec::new()) {
        if let Some(sequence) = piece.get("Sequence") {
            if sequence["id"] != "A" {
                return Err("single: has a second text".into());
            }
            n_texts += 1;
        }
        if let Some(token) = piece["SpecialToken"]["id"].as_str()
            && step["special_tokens"].get(token).is_none()
        {
            return Err(format!("single: `{token}` is not in special_tokens"));
        }
    }
    if n_texts != 1 {
        return Err(format!("single: has the text {n_texts} times, not once"));
    }
    Ok(())
}

fn kind(step: &Value) -> &str {
    text(step, "type")
}

fn text<'a>(step: &'a Value, key: &str) -> &'a str {
    step[key].as_str().unwrap_or_default()
}
