//! The tokenizer in the metadata of a file, as the files of Hugging Face that state the same.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Map, Value as Json, json};
use tensor_files::gguf::{Array, Value};

use super::shape::Metadata;
use crate::Result;
use crate::checkpoint::directory::{CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG};
use crate::tokenizer::parts::{self, Piece, SPACE};
use crate::tokenizer::pre::Pre;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The special tokens, by their keys in GGUF and their names in `tokenizer_config.json`.
const SPECIAL: [(&str, &str); 4] = [
    ("tokenizer.ggml.bos_token_id", "bos_token"),
    ("tokenizer.ggml.eos_token_id", "eos_token"),
    ("tokenizer.ggml.padding_token_id", "pad_token"),
    ("tokenizer.ggml.unknown_token_id", "unk_token"),
];

/// The token that ends a turn, beside that which ends a text.
const EOT: &str = "tokenizer.ggml.eot_token_id";

/// The types of tokens, as in SentencePiece.
mod token_type {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const BYTE: i32 = 6;
}

/// The files of the tokenizer of a model: its `tokenizer.json`, `tokenizer_config.json` and chat template;
/// none if the file has no tokenizer. The tokens that end texts are put into `config`.
pub(super) fn files(
    metadata: &Metadata,
    config: &mut Map<String, Json>,
) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let Some(model) = metadata
        .get(MODEL, Value::as_str)?
        .filter(|&model| model != "none")
    else {
        return Ok(files);
    };
    let tokens = Tokens::read(metadata)?;
    let (mut tokenizer, adds_bos) = match model {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => sentence_piece(metadata, &tokens)?,
        other => {
            let problem = format!("is `{other}`; supported: gpt2, llama");
            return Err(metadata.refuse(MODEL, problem));
        }
    };
    let mut stated = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
    for (key, name) in SPECIAL {
        if let Some(id) = tokens.id(metadata, key)? {
            stated[name] = tokens.texts[id].as_str().into();
            if let Some(name) = name.strip_suffix("_token").filter(|name| *name != "unk") {
                config.insert(format!("{name}_token_id"), id.into());
            }
        }
    }
    if let (Some(eot), Some(eos)) = (
        tokens.id(metadata, EOT)?,
        config.get("eos_token_id").and_then(Json::as_u64),
    ) && eot as u64 != eos
    {
        config.insert("eos_token_id".into(), json!([eos, eot]));
    }
    let bos = tokens.id(metadata, SPECIAL[0].0)?;
    let adds_bos = metadata.get(ADD_BOS, Value::as_bool)?.unwrap_or(adds_bos);
    if let Some(bos) = bos.filter(|_| adds_bos) {
        // The key holds 32 bits.
        let bos = (bos as u32, tokens.texts[bos].clone());
        tokenizer["post_processor"] = parts::template(Some(bos), None);
    }
    tokenizer["version"] = "1.0".into();
    tokenizer["added_tokens"] = tokens.added();
    files.insert(TOKENIZER, bytes(&tokenizer));
    files.insert(TOKENIZER_CONFIG, bytes(&stated));
    if let Some(template) = metadata.get(TEMPLATE, Value::as_str)? {
        files.insert(CHAT_TEMPLATE, template.as_bytes().to_vec());
    }
    Ok(files)
}

fn bytes(json: &Json) -> Vec<u8> {
    serde_json::to_vec(json).expect("strings and numbers")
}

/// The vocabulary of a file.
struct Tokens<'a> {
    texts: &'a [String],
    types: Vec<i32>,
}

impl<'a> Tokens<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self> {
        let texts = metadata.need(TOKENS, Value::as_strings)?;
        let types = metadata.get(TYPES, |value| match value {
            Value::Array(Array::I32(types)) => Some(types.clone()),
            // As some programs write them.
            Value::Array(Array::U32(types)) => {
                Some(types.iter().map(|&of| of.min(99) as i32).collect())
            }
            _ => None,
        })?;
        let types = types.unwrap_or_else(|| vec![token_type::NORMAL; texts.len()]);
        check_length(metadata, TYPES, types.len(), texts.len())?;
        let mut seen = HashSet::with_capacity(texts.len());
        match texts.iter().position(|text| !seen.insert(text)) {
            None => Ok(Self { texts, types }),
            Some(at) => {
                let problem = format!("has the token `{}` twice", texts[at]);
                Err(metadata.refuse(TOKENS, problem))
            }
        }
    }

    /// The token that a key names.
    fn id(&self, metadata: &Metadata, key: &str) -> Result<Option<usize>> {
        match metadata.size(key)? {
            Some(id) if id >= self.texts.len() => {
                let n = self.texts.len();
                Err(metadata.refuse(key, format!("is {id}, of {n} tokens")))
            }
            id => Ok(id),
        }
    }

    /// The vocabulary of a `tokenizer.json`.
    fn vocab(&self) -> Json {
        let ids = self.texts.iter().zip(0..);
        Json::Object(
            ids.map(|(text, id): (_, u32)| (text.clone(), id.into()))
                .collect(),
        )
    }

    /// The `added_tokens` of a `tokenizer.json`: those that are found in a text before it is split.
    fn added(&self) -> Json {
        let added = (0..self.texts.len()).filter(|&id| {
            matches!(
                self.types[id],
                token_type::CONTROL | token_type::USER_DEFINED | token_type::UNKNOWN
            )
        });
        let added = added.map(|id| {
            json!({
                "id": id,
                "content": self.texts[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": self.types[id] != token_type::USER_DEFINED,
            })
        });
        added.collect()
    }
}

fn check_length(metadata: &Metadata, key: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(metadata.refuse(key, format!("has {found} elements for {expected} tokens")))
}

/// Byte-level BPE, `gpt2`.
fn byte_level(metadata: &Metadata, tokens: &Tokens) -> Result<(Json, bool)> {
    let name = metadata.need(PRE, Value::as_str)?;
    let pre = Pre::named(name).ok_or_else(|| {
        let problem = format!(
            "is `{name}`, which is not known; known: {}",
            Pre::all_names()
        );
        metadata.refuse(PRE, problem)
    })?;
    let merges = metadata.need(MERGES, Value::as_strings)?;
    let tokenizer = json!({
        "normalizer": pre.normalizer(),
        "pre_tokenizer": pre.pre_tokenizer(),
        "decoder": parts::byte_level(),
        "model": {
            "type": "BPE",
            "unk_token": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": tokens.vocab(),
            "merges": merges,
        },
    });
    Ok((tokenizer, pre.adds_bos))
}

/// SentencePiece's BPE with a fallback to bytes, `llama`: merges in the order of scores.
fn sentence_piece(metadata: &Metadata, tokens: &Tokens) -> Result<(Json, bool)> {
    let scores = metadata.need(SCORES, |value| match value {
        Value::Array(Array::F32(scores)) => Some(scores),
        _ => None,
    })?;
    check_length(metadata, SCORES, scores.len(), tokens.texts.len())?;
    let adds_space = metadata.get(ADD_SPACE, Value::as_bool)?.unwrap_or(true);
    let unknown = tokens.id(metadata, SPECIAL[3].0)?;
    let mut normalizers = vec![parts::replace(" ", SPACE)];
    if adds_space {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
    }
    let merges = merges(tokens, scores).map_err(|problem| metadata.refuse(TOKENS, problem))?;
    let tokenizer = json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": parts::sentence_piece_decoder(true, adds_space),
        "model": {
            "type": "BPE",
            "unk_token": unknown.map(|id| &tokens.texts[id]),
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": tokens.vocab(),
            "merges": merges,
        },
    });
    Ok((tokenizer, true))
}

/// The merges of the pieces.
fn merges<'a>(tokens: &Tokens<'a>, scores: &[f32]) -> Result<Vec<[&'a str; 2]>, String> {
    let is_piece = |id: &usize| {
        matches!(
            tokens.types[*id],
            token_type::NORMAL | token_type::USER_DEFINED
        )
    };
    let pieces = (0..tokens.texts.len()).filter(is_piece).map(|id| Piece {
        text: tokens.texts[id].as_str(),
        score: scores[id],
    });
    parts::merges(pieces)
}

/// A tokenizer that the format does not hold.
pub(super) struct Unwritable(pub(super) String);

/// The metadata of the tokenizer of a model, from its files.
///
/// # Errors
/// [`Unwritable`] with what the format does not hold.
pub(super) fn metadata(
    tokenizer: &Json,
    special: [(&str, Option<u32>); 4],
    adds_bos: bool,
    stop_tokens: &[u32],
    template: Option<&str>,
    vocab_size: usize,
) -> Result<Vec<(String, Value)>, Unwritable> {
    let unwritable = |problem: &str| Unwritable(problem.into());
    let model = &tokenizer["model"];
    if model["type"] != "BPE" {
        return Err(unwritable("its model is no BPE"));
    }
    let vocab = model["vocab"].as_object();
    let vocab = vocab.ok_or_else(|| unwritable("it has no vocabulary"))?;
    let n_tokens = vocab_size;
    let mut texts: Vec<Option<&str>> = vec![None; n_tokens];
    let mut types = vec![token_type::NORMAL; n_tokens];
    let beyond = |id: &Json| {
        Unwritable(format!(
            "it has the token {id}, and the model {n_tokens} tokens"
        ))
    };
    let place = |id: &Json| {
        let place = id.as_u64().and_then(|id| usize::try_from(id).ok());
        place.filter(|&id| id < n_tokens).ok_or_else(|| beyond(id))
    };
    // SentencePiece's tokens of bytes are known by their names.
    let falls_back = model["byte_fallback"] == true;
    for (text, id) in vocab {
        let id = place(id)?;
        texts[id] = Some(text);
        let byte = text
            .strip_prefix("<0x")
            .and_then(|hex| hex.strip_suffix('>'));
        if falls_back && byte.is_some_and(|hex| hex.len() == 2) {
            types[id] = token_type::BYTE;
        }
    }
    let unknown = model["unk_token"].as_str();
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let text = added["content"].as_str().unwrap_or_default();
        let id = place(&added["id"])?;
        texts[id] = Some(text);
        types[id] = match added["special"].as_bool() {
            _ if Some(text) == unknown => token_type::UNKNOWN,
            Some(true) => token_type::CONTROL,
            _ => token_type::USER_DEFINED,
        };
    }
    // Rows of the embedding that no text becomes.
    let texts = texts
        .into_iter()
        .zip(0..)
        .map(|(text, id): (_, usize)| match text {
            Some(text) => text.to_owned(),
            None => format!("[PAD{id}]"),
        });
    let texts: Vec<String> = texts.collect();
    for (text, of) in texts.iter().zip(&mut types) {
        if text.starts_with("[PAD") && !vocab.contains_key(text) && *of == token_type::NORMAL {
            // Unused, as llama.cpp's converter states it.
            *of = 5;
        }
    }
    let merges: Option<Vec<String>> = (model["merges"].as_array().into_iter().flatten())
        .map(|merge| match merge {
            Json::String(merge) => Some(merge.clone()),
            pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
        })
        .collect();
    let merges = merges.ok_or_else(|| unwritable("its merges are no pairs of texts"))?;

    let mut values = Vec::new();
    let text = |text: &str| Value::String(text.into());
    if falls_back {
        let scores = scores(&texts, &types, &merges);
        values.push((MODEL.into(), text("llama")));
        values.push((PRE.into(), text("default")));
        values.push((SCORES.into(), Value::Array(Array::F32(scores))));
        let is_of_model = tokenizer["normalizer"] == parts::sentence_piece_normalizer()
            && tokenizer["pre_tokenizer"] == parts::sentence_piece_prefix();
        if !(is_of_model || tokenizer["pre_tokenizer"].is_null()) {
            return Err(unwritable(
                "its pre-tokenizer is none of SentencePiece; only a space before a text is written",
            ));
        }
        let prepends = tokenizer["normalizer"].to_string().contains("\"Prepend\"");
        let adds_space = is_of_model || prepends;
        values.push((ADD_SPACE.into(), Value::Bool(adds_space)));
    } else {
        let pre = Pre::of(tokenizer).ok_or_else(|| {
            Unwritable(format!(
                "llama.cpp has no name for its pre-tokenizer that is known here; known: {}",
                Pre::all_names()
            ))
        })?;
        values.push((MODEL.into(), text("gpt2")));
        values.push((PRE.into(), text(pre.name())));
        values.push((MERGES.into(), Value::Array(Array::String(merges))));
    }
    values.push((TOKENS.into(), Value::Array(Array::String(texts))));
    values.push((TYPES.into(), Value::Array(Array::I32(types))));
    for ((key, _), (_, id)) in SPECIAL.into_iter().zip(special) {
        if let Some(id) = id {
            values.push((key.into(), Value::U32(id)));
        }
    }
    let eos = special[1].1;
    if let Some(&eot) = stop_tokens.iter().find(|&&id| Some(id) != eos) {
        values.push((EOT.into(), Value::U32(eot)));
    }
    values.push((ADD_BOS.into(), Value::Bool(adds_bos)));
    if let Some(template) = template {
        values.push((TEMPLATE.into(), text(template)));
    }
    Ok(values)
}

/// Scores in the order of merges, as in SentencePiece's BPE: minus the place of the first merge that makes
/// a piece. Pieces that none makes come last.
fn scores(texts: &[String], types: &[i32], merges: &[String]) -> Vec<f32> {
    let mut places: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for merge in merges {
        let next = places.len();
        let made = merge.replacen(' ', "", 1);
        places.entry(made).or_insert(next);
    }
    let last = places.len();
    let score = |(text, &of): (&String, &i32)| match of {
        token_type::NORMAL => -(places.get(text).copied().unwrap_or(last) as f32),
        _ => 0.0,
    };
    texts.iter().zip(types).map(score).collect()
}

/// The error of a tokenizer that the format does not hold.
impl From<Unwritable> for String {
    fn from(Unwritable(problem): Unwritable) -> Self {
        problem
    }
}
