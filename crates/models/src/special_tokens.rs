use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{Encoding, Token};

use crate::checkpoint::TOKENIZER_CONFIG;
use crate::{Error, Result, Tokenizer};

#[cfg(test)]
mod tests;

const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// A token that stands for no text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// What it is written as, such as `</s>`.
    pub text: String,
    /// Its number in the vocabulary.
    pub id: u32,
}

/// The special tokens of a model, those that it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Before a text.
    pub bos: Option<SpecialToken>,
    /// Behind a text.
    pub eos: Option<SpecialToken>,
    /// Where a row has no text. It may well be `eos`: what is learned and attended to is decided
    /// by lengths, never by the number of a token.
    pub pad: Option<SpecialToken>,
    /// For what the vocabulary does not have.
    pub unk: Option<SpecialToken>,
    /// Whether the tokenizer puts `bos` before a text.
    pub add_bos: bool,
}

impl SpecialTokens {
    /// Those of a model's directory.
    ///
    /// `tokenizer_config.json` states them, and without `added_tokens_decoder` in it
    /// `special_tokens_map.json` overrides it; neither needs to be there. Whether `bos` is put is
    /// the matter of `tokenizer.json` (beside it, transformers 5 does not read `add_bos_token`, as
    /// 4 did for LLaMA), from which it is known where no file states it.
    ///
    /// # Errors
    /// [`Error::UnknownSpecial`] for a token that the vocabulary does not have,
    /// [`Error::Disagreement`] if `tokenizer.json` puts another token than `bos`; [`Error::Config`] for
    /// a file that is no such configuration.
    pub fn read(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let config_path = dir.join(TOKENIZER_CONFIG);
        let map_path = dir.join(SPECIAL_TOKENS_MAP);
        let config = read_config(&config_path)?;
        let map = match config.contains_key("added_tokens_decoder") {
            true => Map::new(),
            false => read_config(&map_path)?,
        };
        let token = |name| {
            let (path, value) = match map.get(name) {
                Some(value) => (&map_path, value),
                None => (&config_path, config.get(name).unwrap_or(&Value::Null)),
            };
            special_token(path, name, value, tokenizer)
        };
        let mut special = Self {
            bos: token("bos_token")?,
            eos: token("eos_token")?,
            pad: token("pad_token")?,
            unk: token("unk_token")?,
            add_bos: false,
        };
        special.settle_bos(&config_path, tokenizer)?;
        Ok(special)
    }

    fn settle_bos(&mut self, path: &Path, tokenizer: &Tokenizer) -> Result<()> {
        let disagree = |setting, in_first: String, in_second: String| Error::Disagreement {
            first: path.into(),
            second: tokenizer.path().into(),
            setting,
            in_first,
            in_second,
        };
        let put = put_before(tokenizer)?;
        let text = |&id: &u32| tokenizer.inner().id_to_token(id).unwrap_or_default();
        let texts = || put.iter().map(text).collect::<Vec<_>>().join(" ");
        match (&self.bos, put.as_slice()) {
            (_, []) => {}
            (None, [id]) => {
                let text = text(id);
                self.bos = Some(SpecialToken { text, id: *id });
            }
            (Some(bos), [id]) if bos.id == *id => {}
            (bos, _) => {
                let stated = bos.as_ref().map_or("none", |bos| &bos.text);
                return Err(disagree("bos_token", stated.into(), texts()));
            }
        }
        self.add_bos = !put.is_empty();
        Ok(())
    }

    /// The token before a text, for what cannot do without it.
    ///
    /// # Errors
    /// [`Error::MissingSpecial`], which says what needs it.
    pub fn need_bos(&self, needed_by: &str) -> Result<&SpecialToken> {
        need(self.bos.as_ref(), "bos_token", needed_by)
    }

    /// The token behind a text, for what cannot do without it.
    ///
    /// # Errors
    /// [`Error::MissingSpecial`], which says what needs it.
    pub fn need_eos(&self, needed_by: &str) -> Result<&SpecialToken> {
        need(self.eos.as_ref(), "eos_token", needed_by)
    }

    /// A token to fill rows up with: `pad`, or any other, for none of it is learned.
    pub fn filler(&self) -> u32 {
        let any = self.pad.as_ref().or(self.eos.as_ref());
        any.map_or(0, |token| token.id)
    }

    /// Each with the name that configurations and templates give it.
    pub fn named(&self) -> [(&'static str, Option<&SpecialToken>); 4] {
        [
            ("bos_token", self.bos.as_ref()),
            ("eos_token", self.eos.as_ref()),
            ("pad_token", self.pad.as_ref()),
            ("unk_token", self.unk.as_ref()),
        ]
    }
}

fn need<'a>(
    token: Option<&'a SpecialToken>,
    name: &'static str,
    needed_by: &str,
) -> Result<&'a SpecialToken> {
    token.ok_or_else(|| Error::MissingSpecial {
        name,
        needed_by: needed_by.into(),
    })
}

/// What the tokenizer puts before a text.
fn put_before(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    // One token that stands for any text, so that what is put behind it is told from that.
    let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
    let all = tokenizer.inner().post_process(text, None, true);
    let all = all.map_err(|error| Error::Tokenizer {
        path: tokenizer.path().into(),
        problem: error.to_string(),
    })?;
    let is_put = all.get_special_tokens_mask().iter();
    let n = is_put.take_while(|&&is_put| is_put == 1).count();
    Ok(all.get_ids()[..n].to_vec())
}

/// A token as a text, or as an object with its `content`.
fn special_token(
    path: &Path,
    name: &'static str,
    value: &Value,
    tokenizer: &Tokenizer,
) -> Result<Option<SpecialToken>> {
    let text = match value {
        Value::Null => return Ok(None),
        Value::String(text) => Some(text.as_str()),
        other => other.get("content").and_then(Value::as_str),
    };
    let text = text.ok_or_else(|| Error::Config {
        path: path.into(),
        setting: name.into(),
        problem: "is neither a text nor an object with its `content`".into(),
    })?;
    let id = tokenizer.inner().token_to_id(text);
    let id = id.ok_or_else(|| Error::UnknownSpecial {
        path: path.into(),
        name,
        token: text.into(),
        tokenizer: tokenizer.path().into(),
    })?;
    let text = text.into();
    Ok(Some(SpecialToken { text, id }))
}

/// The settings of a configuration; none if it is not there.
fn read_config(path: &Path) -> Result<Map<String, Value>> {
    if !tensor_files::is_there(path) {
        return Ok(Map::new());
    }
    let bytes = tensor_files::read(path)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Config {
        path: path.into(),
        setting: "the file".into(),
        problem: format!("is no JSON object: {error}"),
    })
}
