use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{Encoding, Token};

use crate::checkpoint::directory::TOKENIZER_CONFIG;
use crate::{ConfigError, Result, TextError, Tokenizer};

#[cfg(test)]
mod tests;

const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// A token with a meaning other than its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// The name of the token, such as `</s>`.
    pub text: String,
    /// The id in the vocabulary.
    pub id: u32,
}

/// The special tokens of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The token before a text.
    pub bos: Option<SpecialToken>,
    /// The token after a text.
    pub eos: Option<SpecialToken>,
    /// The padding token. It may be `eos`, since targets and attention depend on lengths and not on the
    /// ids of tokens.
    pub pad: Option<SpecialToken>,
    /// The token for text outside of the vocabulary.
    pub unk: Option<SpecialToken>,
    /// Whether the tokenizer adds `bos` before a text.
    pub add_bos: bool,
}

impl SpecialTokens {
    /// Reads the special tokens of a model's directory.
    ///
    /// They are stated by `tokenizer_config.json`, and by `special_tokens_map.json`, which takes
    /// precedence unless the former has `added_tokens_decoder`. Both files are optional. Whether `bos` is
    /// added is decided by `tokenizer.json`, as in transformers 5, which also states `bos` if no other
    /// file does.
    ///
    /// # Errors
    /// [`TextError::UnknownSpecial`] for a token outside of the vocabulary,
    /// [`ConfigError::Disagreement`] if `tokenizer.json` adds another token than `bos`,
    /// [`ConfigError::Setting`] for a file that is no configuration.
    pub fn read(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let config_path = dir.join(TOKENIZER_CONFIG);
        let map_path = dir.join(SPECIAL_TOKENS_MAP);
        let config = read_config(&config_path)?;
        let map = if config.contains_key("added_tokens_decoder") {
            Map::new()
        } else {
            read_config(&map_path)?
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
        let disagree = |setting, in_first: String, in_second: String| ConfigError::Disagreement {
            first: path.into(),
            second: tokenizer.path().into(),
            setting,
            in_first,
            in_second,
        };
        let put = added_before(tokenizer)?;
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
                return Err(disagree("bos_token", stated.into(), texts()).into());
            }
        }
        self.add_bos = !put.is_empty();
        Ok(())
    }

    /// The token before a text.
    ///
    /// # Errors
    /// [`TextError::MissingSpecial`] with the name of what needs it.
    pub fn need_bos(&self, needed_by: &str) -> Result<&SpecialToken> {
        need(self.bos.as_ref(), "bos_token", needed_by)
    }

    /// The token after a text.
    ///
    /// # Errors
    /// [`TextError::MissingSpecial`] with the name of what needs it.
    pub fn need_eos(&self, needed_by: &str) -> Result<&SpecialToken> {
        need(self.eos.as_ref(), "eos_token", needed_by)
    }

    /// A token for padding: `pad`, or any other, since padding is never a target.
    pub fn filler(&self) -> u32 {
        let any = self.pad.as_ref().or(self.eos.as_ref());
        any.map_or(0, |token| token.id)
    }

    /// The tokens with their names in configurations and templates.
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
    token.ok_or_else(|| {
        let needed_by = needed_by.into();
        TextError::MissingSpecial { name, needed_by }.into()
    })
}

/// The tokens that the tokenizer adds before a text.
fn added_before(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    // A token that represents the text separates the tokens before it from those after it.
    let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
    let all = tokenizer.inner().post_process(text, None, true);
    let all = all.map_err(|error| TextError::Tokenizer {
        path: tokenizer.path().into(),
        problem: error.to_string(),
    })?;
    let is_put = all.get_special_tokens_mask().iter();
    let n = is_put.take_while(|&&is_put| is_put == 1).count();
    Ok(all.get_ids()[..n].to_vec())
}

/// Reads a token, which is a string or an object with its `content`.
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
    let text = text.ok_or_else(|| {
        let problem = "is neither a text nor an object with its `content`";
        ConfigError::setting(path, name, problem.into())
    })?;
    let id = tokenizer.inner().token_to_id(text);
    let id = id.ok_or_else(|| TextError::UnknownSpecial {
        path: path.into(),
        name,
        token: text.into(),
        tokenizer: tokenizer.path().into(),
    })?;
    let text = text.into();
    Ok(Some(SpecialToken { text, id }))
}

/// Reads a configuration, empty if there is no such file.
fn read_config(path: &Path) -> Result<Map<String, Value>> {
    if !tensor_files::is_there(path) {
        return Ok(Map::new());
    }
    let bytes = tensor_files::read(path)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let problem = format!("is no JSON object: {error}");
        ConfigError::setting(path, "the file", problem).into()
    })
}
