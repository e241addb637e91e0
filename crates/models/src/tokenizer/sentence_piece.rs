//! The model of SentencePiece, `tokenizer.model`.
//!
//! Kudo & Richardson 2018, arXiv:1808.06226; `src/sentencepiece_model.proto`.

use std::collections::HashSet;

use prost::Message;
use serde_json::{Map, Value, json};

use super::charsmap;
use super::library::{Result, within};
use super::parts::{self, Piece, SPACE, merges, metaspace, replace, replace_regex};
use super::vocabularies::{Converted, Settings, Token};

/// The largest file. That of a vocabulary of 260 thousand tokens has 4 MB.
const MAX_BYTES: usize = 1 << 24;

/// The most bytes that may begin a piece.
const MAX_PIECES: usize = 1 << 21;

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40", default = "0")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
    #[prost(string, optional, tag = "45", default = "<unk>")]
    unk_piece: Option<String>,
    #[prost(string, optional, tag = "46", default = "<s>")]
    bos_piece: Option<String>,
    #[prost(string, optional, tag = "47", default = "</s>")]
    eos_piece: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// The types of pieces.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

const UNIGRAM: i32 = 1;
const BPE: i32 = 2;

/// The tokenizer of a model, as transformers converts it.
///
/// Of `LlamaTokenizer` the class decides how a text is normalized, of all others the model itself: then a
/// text has the tokens of SentencePiece.
///
/// Source: `TokenizersBackend._convert_from_sentencepiece` in
/// `transformers/tokenization_utils_tokenizers.py`, `SpmConverter.build_tokenizer_from_spm_proto` in
/// `convert_slow_tokenizer.py`, and `models/llama/tokenization_llama.py`.
pub(super) fn convert(bytes: &[u8], settings: &Settings) -> Result<Converted> {
    let model = read(bytes)?;
    let trainer = model.trainer.clone().unwrap_or_default();
    let is_unigram = match trainer.model_type() {
        UNIGRAM => true,
        BPE => false,
        other => {
            let problem = "is a model of words or characters";
            return Err(format!(
                "trainer_spec: model_type: is {other}, which {problem}; supported: 1 (unigram), 2 (BPE)"
            ));
        }
    };
    // What the class makes of a unigram model are no tokens of it.
    let of_llama = settings.is_llama() && !is_unigram;
    let mut steps = if of_llama {
        llama_steps(settings)
    } else {
        model.steps(settings)?
    };
    steps
        .json
        .insert("model".into(), model.model(&trainer, is_unigram, of_llama)?);
    let specials = [
        ("bos_token", trainer.bos_id(), trainer.bos_piece(), "<s>"),
        ("eos_token", trainer.eos_id(), trainer.eos_piece(), "</s>"),
        ("unk_token", trainer.unk_id(), trainer.unk_piece(), "<unk>"),
    ];
    let specials = specials
        .into_iter()
        .filter_map(|(name, id, piece, of_class)| {
            let text = match (of_llama, id >= 0) {
                (true, _) => of_class,
                (false, true) if piece.is_empty() => of_class,
                (false, true) => piece,
                (false, false) => return None,
            };
            Some((name, text.to_owned()))
        });
    let special = |kind: i32| kind == CONTROL || (of_llama && kind == USER_DEFINED);
    let added = model.pieces.iter().filter(|piece| special(piece.kind()));
    let added = added.map(|piece| Token::plain(piece.piece(), piece.kind() == CONTROL));
    Ok(Converted {
        vocab: (0..)
            .zip(&model.pieces)
            .map(|(id, piece)| (piece.piece().to_owned(), id))
            .collect(),
        added: added.collect(),
        specials: specials.collect(),
        finds_raw: !of_llama && model.normalizer.unwrap_or_default().add_dummy_prefix(),
        growth: Some(steps.growth),
        json: steps.json,
    })
}

fn read(bytes: &[u8]) -> Result<ModelProto> {
    let n = bytes.len();
    if n > MAX_BYTES {
        return Err(format!("has {n} bytes; at most {MAX_BYTES} are read"));
    }
    // The tag of a piece: each is some bytes in the file, and many in memory.
    let n_tags = bytes.iter().filter(|&&byte| byte == 0x0a).count();
    if n_tags > MAX_PIECES {
        return Err(format!(
            "has up to {n_tags} pieces; at most {MAX_PIECES} are read"
        ));
    }
    let model = ModelProto::decode(bytes);
    let model = model.map_err(|error| format!("is no model of SentencePiece: {error}"))?;
    if model.pieces.is_empty() {
        return Err("is no model of SentencePiece: has no pieces".into());
    }
    let mut seen = HashSet::with_capacity(model.pieces.len());
    for (at, piece) in model.pieces.iter().enumerate() {
        let text = piece.piece();
        let problem = if text.is_empty() {
            "is empty".into()
        } else if !seen.insert(text) {
            format!("is `{text}`, as another is")
        } else if !piece.score().is_finite() {
            format!("has the score {}", piece.score())
        } else {
            continue;
        };
        return Err(format!("pieces[{at}]: {problem}"));
    }
    Ok(model)
}

/// What is done with a text before the model and with tokens after it.
struct Steps {
    json: Map<String, Value>,
    /// The most by which a text grows.
    growth: f64,
}

impl Steps {
    fn new(normalizer: Value, pre_tokenizer: Value, decoder: Value, growth: f64) -> Self {
        let json = [
            ("normalizer", normalizer),
            ("pre_tokenizer", pre_tokenizer),
            ("decoder", decoder),
        ];
        let json = json.map(|(name, step)| (name.to_owned(), step));
        Self {
            json: json.into_iter().collect(),
            growth,
        }
    }
}

/// The bytes of [`SPACE`] for one.
const SPACE_GROWTH: f64 = 3.0;

fn llama_steps(settings: &Settings) -> Steps {
    let has_prefix = settings.flag("add_prefix_space").unwrap_or(true);
    let scheme = match (has_prefix, settings.flag("legacy").unwrap_or(false)) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    let decoder = parts::sentence_piece_decoder(true, has_prefix);
    Steps::new(Value::Null, metaspace(scheme), decoder, SPACE_GROWTH)
}

impl ModelProto {
    fn steps(&self, settings: &Settings) -> Result<Steps> {
        let spec = self.normalizer.clone().unwrap_or_default();
        let is_legacy = settings.flag("legacy").unwrap_or(true);
        let (mut normalizers, mut growth) = (Vec::new(), 1.0);
        let map = spec.precompiled_charsmap();
        if !map.is_empty() {
            growth = within(
                "normalizer_spec: precompiled_charsmap",
                charsmap::growth(map),
            )?;
            let map = charsmap::encode(map);
            normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        if spec.remove_extra_whitespaces() {
            normalizers.push(replace_regex(r"\A +| +\z", ""));
            normalizers.push(replace_regex(" {2,}", " "));
        }
        if spec.escape_whitespaces() {
            normalizers.push(replace(" ", SPACE));
            growth *= SPACE_GROWTH;
        }
        let has_prefix = spec.add_dummy_prefix();
        if has_prefix && is_legacy {
            normalizers.push(parts::second_space());
        }
        let mut pre_tokenizers = Vec::new();
        if has_prefix {
            pre_tokenizers.push(metaspace(if is_legacy { "always" } else { "first" }));
        }
        pre_tokenizers.extend(self.user_defined());
        let pre_tokenizer = match pre_tokenizers.is_empty() {
            true => Value::Null,
            false => json!({"type": "Sequence", "pretokenizers": pre_tokenizers}),
        };
        let falls_back = self
            .trainer
            .as_ref()
            .is_some_and(TrainerSpec::byte_fallback);
        Ok(Steps::new(
            json!({"type": "Sequence", "normalizers": normalizers}),
            pre_tokenizer,
            parts::sentence_piece_decoder(falls_back, has_prefix),
            growth,
        ))
    }

    /// The pieces that are always tokens of their own, the longest first.
    fn user_defined(&self) -> Option<Value> {
        let pieces = self.pieces.iter();
        let pieces = pieces.filter(|piece| piece.kind() == USER_DEFINED);
        let mut pieces: Vec<&str> = pieces.map(PieceProto::piece).collect();
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.chars().count()));
        let escaped: Vec<String> = pieces.iter().map(|piece| escape(piece)).collect();
        let pattern = escaped.join("|");
        (!pieces.is_empty()).then(|| {
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false})
        })
    }

    fn model(&self, trainer: &TrainerSpec, is_unigram: bool, of_llama: bool) -> Result<Value> {
        let falls_back = of_llama || trainer.byte_fallback();
        if is_unigram {
            let vocab = self.pieces.iter();
            let vocab: Vec<Value> = vocab
                .map(|piece| json!([piece.piece(), piece.score()]))
                .collect();
            let unknown = usize::try_from(trainer.unk_id()).ok();
            return Ok(json!({"type": "Unigram", "vocab": vocab, "unk_id": unknown,
                "byte_fallback": falls_back}));
        }
        let is_merged = |piece: &&PieceProto| of_llama || piece.kind() == NORMAL;
        let pieces = self.pieces.iter().filter(is_merged).map(|piece| Piece {
            text: piece.piece(),
            score: piece.score(),
        });
        let merges: Vec<Value> = merges(pieces)?.iter().map(|pair| json!(pair)).collect();
        let ids = (0..).zip(&self.pieces);
        let vocab: Map<String, Value> = ids
            .map(|(id, piece): (u32, _)| (piece.piece().to_owned(), id.into()))
            .collect();
        let unknown = (!of_llama).then(|| trainer.unk_piece());
        let unknown = unknown.filter(|unknown| vocab.contains_key(*unknown));
        let has_user_defined = self.user_defined().is_some();
        Ok(
            json!({"type": "BPE", "unk_token": unknown, "fuse_unk": true,
            "byte_fallback": falls_back, "ignore_merges": !of_llama && has_user_defined,
            "vocab": vocab, "merges": merges}),
        )
    }
}

/// The expression that matches a text.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        if r"\.+*?()|[]{}^$".contains(character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}
