//! Tokenizers of directories without a `tokenizer.json`, from the vocabularies of Python tokenizers.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::library::Library;
use super::{Tokenizer, byte_level, parts, sentence_piece};
use crate::checkpoint::directory::{
    ADDED_TOKENS, CONFIG, MERGES, SENTENCE_PIECE, TOKENIZER_CONFIG, VOCAB,
};
use crate::special_tokens::{Stated, read_config};
use crate::{ConfigError, Error, Result, TextError};

/// The special tokens that a configuration can name, in the order in which transformers adds them.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The configurations of a directory that decide how its vocabulary is converted.
pub(super) struct Settings {
    stated: Stated,
    /// The class of the tokenizer, without `Fast`.
    class: Option<String>,
    model_type: Option<String>,
}

impl Settings {
    fn read(dir: &Path) -> Result<Self> {
        let stated = Stated::read(dir)?;
        let config = read_config(&dir.join(CONFIG))?;
        let class = [stated.config(), &config];
        let class = class
            .into_iter()
            .find_map(|of| of.get("tokenizer_class")?.as_str());
        let class = class.map(|class| class.trim_end_matches("Fast").to_owned());
        let model_type = config.get("model_type").and_then(Value::as_str);
        Ok(Self {
            class,
            model_type: model_type.map(str::to_owned),
            stated,
        })
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.stated.config().get(name)?.as_bool()
    }

    /// Whether transformers reads SentencePiece's model by the class `LlamaTokenizer`, which it never
    /// does for a Mistral.
    pub(super) fn is_llama(&self) -> bool {
        self.class.as_deref() == Some("LlamaTokenizer")
            && self.model_type.as_deref() != Some("mistral")
    }

    pub(super) fn is_qwen2(&self) -> bool {
        self.class.as_deref() == Some("Qwen2Tokenizer")
            || self.model_type.as_deref() == Some("qwen2")
    }

    /// The special tokens that have no name.
    fn extra(&self) -> Vec<Token> {
        let lists = EXTRA.into_iter();
        let lists = lists.filter_map(|name| Some(self.stated.get(name)?.1));
        lists.flat_map(tokens).collect()
    }

    /// The tokens that a configuration states with their ids, in the order of these: those of
    /// `tokenizer_config.json`, or else of `added_tokens.json`.
    ///
    /// Of `added_tokens.json`, tokens that have a name or that `tokenizer_config.json` lists are special; those
    /// that `special_tokens_map.json` lists are not.
    fn with_ids(&self, dir: &Path, named: &[Token]) -> Result<BTreeMap<u32, Token>> {
        const DECODER: &str = "added_tokens_decoder";
        let (name, stated) = match self.stated.config().get(DECODER) {
            Some(stated) => (TOKENIZER_CONFIG, stated.as_object().cloned()),
            None => (ADDED_TOKENS, Some(read_config(&dir.join(ADDED_TOKENS))?)),
        };
        let refuse = |key: &str, problem: &str| {
            let path = dir.join(name);
            Error::from(ConfigError::setting(&path, key, problem.into()))
        };
        let stated = stated.ok_or_else(|| refuse(DECODER, "is not an object"))?;
        let listed = EXTRA
            .iter()
            .filter_map(|name| self.stated.config().get(*name));
        let listed: Vec<Token> = listed.flat_map(tokens).collect();
        let token = |(key, value): (String, Value)| {
            let (id, token) = if name == TOKENIZER_CONFIG {
                (key.parse().ok(), Token::read(&value, false))
            } else {
                let mut special = named.iter().chain(&listed);
                let is_special = special.any(|token| token.content == key);
                let token = Token::read(&json!({"content": key}), is_special);
                (value.as_u64().and_then(|id| u32::try_from(id).ok()), token)
            };
            let pair = id.zip(token);
            pair.ok_or_else(|| refuse(&key, "is not a token with its id"))
        };
        stated.into_iter().map(token).collect()
    }

    /// Whether the class has a byte-level vocabulary, whatever other files there are.
    fn is_byte_level(&self) -> bool {
        let class = self.class.as_deref();
        let of_class = matches!(class, Some("GPT2Tokenizer" | "CodeGenTokenizer"));
        of_class || self.is_qwen2() || self.model_type.as_deref() == Some("opt")
    }
}

/// The lists of special tokens that have no name.
const EXTRA: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// The special tokens of a list.
fn tokens(list: &Value) -> Vec<Token> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(|token| Token::read(token, true)).collect()
}

/// A `tokenizer.json` without added tokens, made of a vocabulary.
pub(super) struct Converted {
    pub(super) json: Map<String, Value>,
    /// The ids of the vocabulary.
    pub(super) vocab: HashMap<String, u32>,
    /// The tokens that are found in a text before it is split.
    pub(super) added: Vec<Token>,
    /// The special tokens that a configuration need not state.
    pub(super) specials: Vec<(&'static str, String)>,
    /// Whether added tokens are found in a text before it is normalized, whatever is stated.
    pub(super) finds_raw: bool,
    /// The most by which a text grows, if it is known better than by the steps.
    pub(super) growth: Option<f64>,
}

/// Whether spaces before punctuation are removed from a decoded text.
pub(super) const CLEAN_UP: &str = "clean_up_tokenization_spaces";

/// An added token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    content: String,
    /// `single_word`, `lstrip`, `rstrip`, `normalized` and `special`.
    flags: [bool; 5],
}

const NORMALIZED: usize = 3;
const FLAGS: [&str; 5] = ["single_word", "lstrip", "rstrip", "normalized", "special"];

impl Token {
    /// A token that is found as it is.
    pub(super) fn plain(content: &str, special: bool) -> Self {
        Self {
            content: content.to_owned(),
            flags: [false, false, false, false, special],
        }
    }

    /// Reads a text, or an object with a `content`, as `AddedToken` of Python; `special` if it does not
    /// say.
    fn read(value: &Value, special: bool) -> Option<Self> {
        if let Some(content) = value.as_str() {
            return Some(Self::plain(content, special));
        }
        let content = value.get("content")?.as_str()?;
        let special = value["special"].as_bool().unwrap_or(special);
        let defaults = [false, false, false, !special, special];
        let mut flags = defaults;
        for (flag, name) in flags.iter_mut().zip(FLAGS) {
            *flag = value[name].as_bool().unwrap_or(*flag);
        }
        let content = content.to_owned();
        Some(Self { content, flags })
    }
}

/// The added tokens of a tokenizer, with their ids.
struct Added<'a> {
    vocab: &'a HashMap<String, u32>,
    tokens: Vec<(u32, Token)>,
}

impl Added<'_> {
    /// The place of a token: that in the vocabulary, or else the next one.
    fn id(&self, content: &str) -> u32 {
        let added = self
            .tokens
            .iter()
            .find(|(_, token)| token.content == content);
        let known = added
            .map(|(id, _)| *id)
            .or(self.vocab.get(content).copied());
        known.unwrap_or_else(|| {
            let last = self.tokens.iter().map(|(id, _)| id.saturating_add(1)).max();
            last.unwrap_or(0).max(self.vocab.len() as u32)
        })
    }

    /// Adds a token; of one that is added twice the last flags hold.
    fn add(&mut self, id: u32, token: Token) {
        if token.content.is_empty() {
            return;
        }
        match self.tokens.iter_mut().find(|(known, _)| *known == id) {
            Some((_, known)) if known.content == token.content => *known = token,
            _ => self.tokens.push((id, token)),
        }
    }

    fn json(&self) -> Value {
        let token = |(id, token): &(u32, Token)| {
            let mut json = json!({"id": id, "content": token.content});
            for (name, flag) in FLAGS.iter().zip(token.flags) {
                json[name] = flag.into();
            }
            json
        };
        self.tokens.iter().map(token).collect()
    }
}

/// Reads the tokenizer of a directory from the vocabulary in it, if there is one.
pub(super) fn read(dir: &Path) -> Result<Option<Tokenizer>> {
    let is_there = |name: &str| tensor_files::is_there(&dir.join(name));
    let has_model = is_there(SENTENCE_PIECE);
    let has_vocab = is_there(VOCAB) && is_there(MERGES);
    if !(has_model || has_vocab) {
        return Ok(None);
    }
    let settings = Settings::read(dir)?;
    let (name, converted) = if has_vocab && (settings.is_byte_level() || !has_model) {
        let vocab = of_file(dir, VOCAB, byte_level::read_vocab)?;
        let merges = of_file(dir, MERGES, |bytes| byte_level::read_merges(bytes, &vocab))?;
        (VOCAB, byte_level::convert(&vocab, merges, &settings))
    } else {
        let convert = |bytes: &[u8]| sentence_piece::convert(bytes, &settings);
        (SENTENCE_PIECE, of_file(dir, SENTENCE_PIECE, convert)?)
    };
    let path = dir.join(name);
    let (json, specials, growth) = complete(converted, &settings, dir)?;
    match Library::of(json, growth) {
        Ok(library) => Ok(Some(Tokenizer {
            library: library.cleaned_up(settings.flag(CLEAN_UP) == Some(true)),
            path,
            specials,
        })),
        Err(problem) => Err(TextError::Tokenizer { path, problem }.into()),
    }
}

fn of_file<T>(
    dir: &Path,
    name: &str,
    read: impl FnOnce(&[u8]) -> super::library::Result<T>,
) -> Result<T> {
    let path = dir.join(name);
    let bytes = tensor_files::read(&path)?;
    read(&bytes).map_err(|problem| TextError::Tokenizer { path, problem }.into())
}

type Parts = (Map<String, Value>, Vec<(&'static str, String)>, Option<f64>);

/// Adds the special tokens that the configurations state.
///
/// Source: `TokenizersBackend.__init__` in `transformers/tokenization_utils_tokenizers.py`.
fn complete(converted: Converted, settings: &Settings, dir: &Path) -> Result<Parts> {
    let Converted {
        mut json,
        vocab,
        added,
        specials,
        finds_raw,
        growth,
    } = converted;
    let special = |name: &str| match settings.stated.get(name) {
        Some((_, value)) => Token::read(value, true),
        None => {
            let (_, text) = specials.iter().find(|(of, _)| *of == name)?;
            Some(Token::plain(text, true))
        }
    };
    let mut tokens = Added {
        vocab: &vocab,
        tokens: Vec::new(),
    };
    let named: Vec<Token> = NAMES.into_iter().filter_map(special).collect();
    let extra = settings.extra();
    let with_ids = settings.with_ids(dir, &named)?;
    let others = named.into_iter().chain(extra).chain(added);
    let is_new = |token: &Token| !with_ids.values().any(|of| of.content == token.content);
    let others: Vec<Token> = others.filter(is_new).collect();
    for (id, mut token) in with_ids {
        token.flags[NORMALIZED] &= !finds_raw;
        tokens.add(id, token);
    }
    for token in others {
        tokens.add(tokens.id(&token.content), token);
    }
    let put = |name: &str, flag: &str| {
        let token = special(name).filter(|token| !token.content.is_empty())?;
        (settings.flag(flag) == Some(true)).then(|| (tokens.id(&token.content), token.content))
    };
    let before = put("bos_token", "add_bos_token");
    let after = put("eos_token", "add_eos_token");
    json.insert("post_processor".into(), parts::template(before, after));
    json.insert("added_tokens".into(), tokens.json());
    Ok((json, specials, growth))
}
