use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::directory::{SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG};
use crate::{ConfigError, Result, TextError, Tokenizer};

#[cfg(test)]
mod tests;

/// A special token, such as the end of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its text, such as `</s>`.
    pub text: String,
    /// Its id in the vocabulary.
    pub id: u32,
}

/// The special tokens of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The beginning of a sequence.
    pub bos: Option<SpecialToken>,
    /// The end of a sequence.
    pub eos: Option<SpecialToken>,
    /// The padding of a row. It may be `eos`: lengths decide what is padding, not ids.
    pub pad: Option<SpecialToken>,
    /// The token of text that the vocabulary lacks.
    pub unk: Option<SpecialToken>,
    /// Whether the tokenizer adds `bos` to a text.
    pub add_bos: bool,
}

impl SpecialTokens {
    /// Reads the special tokens of the model in a directory.
    ///
    /// `tokenizer_config.json` states them, unless it has no `added_tokens_decoder` and
    /// `special_tokens_map.json` states others; both files are optional. `tokenizer.json` decides whether
    /// `bos` is added, and states it if no file does. `add_bos_token` is ignored, as by transformers 5.
    ///
    /// # Errors
    /// [`TextError::UnknownSpecial`] for a token that the vocabulary lacks;
    /// [`ConfigError::Disagreement`] if `tokenizer.json` adds another token than `bos`;
    /// [`ConfigError::Setting`] for a file that is not such a configuration.
    pub fn read(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        Self::of(&Stated::read(dir)?, tokenizer)
    }

    /// The special tokens that a `tokenizer_config.json` states by itself.
    pub(crate) fn stated(
        config: &Map<String, Value>,
        path: &Path,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let stated = Stated {
            config: (path.into(), config.clone()),
            map: (path.into(), Map::new()),
        };
        Self::of(&stated, tokenizer)
    }

    fn of(stated: &Stated, tokenizer: &Tokenizer) -> Result<Self> {
        let token = |name| match (stated.get(name), tokenizer.special(name)) {
            (Some((path, value)), _) => special_token(path, name, value, tokenizer),
            // It is added to the vocabulary if it is not in it.
            (None, Some(text)) => Ok(tokenizer.token_to_id(text).map(|id| SpecialToken {
                text: text.into(),
                id,
            })),
            (None, None) => Ok(None),
        };
        let mut special = Self {
            bos: token("bos_token")?,
            eos: token("eos_token")?,
            pad: token("pad_token")?,
            unk: token("unk_token")?,
            add_bos: false,
        };
        special.settle_bos(&stated.config.0, tokenizer)?;
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
        let added = tokenizer.added_before()?;
        let text = |&id: &u32| tokenizer.id_to_token(id).unwrap_or_default();
        let texts = || added.iter().map(text).collect::<Vec<_>>().join(" ");
        match (&self.bos, added.as_slice()) {
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
        self.add_bos = !added.is_empty();
        Ok(())
    }

    /// The token `bos`, which `needed_by` requires.
    ///
    /// # Errors
    /// [`TextError::MissingSpecial`] without one.
    pub fn need_bos(&self, needed_by: &str) -> Result<&SpecialToken> {
        need(self.bos.as_ref(), "bos_token", needed_by)
    }

    /// The token `eos`, which `needed_by` requires.
    ///
    /// # Errors
    /// [`TextError::MissingSpecial`] without one.
    pub fn need_eos(&self, needed_by: &str) -> Result<&SpecialToken> {
        need(self.eos.as_ref(), "eos_token", needed_by)
    }

    /// The id of the token for padding: `pad`, `eos`, or 0.
    pub fn padding(&self) -> u32 {
        let token = self.pad.as_ref().or(self.eos.as_ref());
        token.map_or(0, |token| token.id)
    }

    /// Each token with its name in configurations and chat templates.
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

/// Reads a token that is stated as a string, or as an object with its `content`.
fn special_token(
    path: &Path,
    name: &'static str,
    value: &Value,
    tokenizer: &Tokenizer,
) -> Result<Option<SpecialToken>> {
    let text = match value {
        Value::Null => return Ok(None),
        // Of some conversions of LLaMA.
        Value::String(text) if text.is_empty() => return Ok(None),
        Value::String(text) => Some(text.as_str()),
        other => other.get("content").and_then(Value::as_str),
    };
    let text = text.ok_or_else(|| {
        let problem = "is neither a string nor an object with a string `content`";
        ConfigError::setting(path, name, problem.into())
    })?;
    let id = tokenizer.token_to_id(text);
    let id = id.ok_or_else(|| TextError::UnknownSpecial {
        path: path.into(),
        name,
        token: text.into(),
        tokenizer: tokenizer.path().into(),
    })?;
    let text = text.into();
    Ok(Some(SpecialToken { text, id }))
}

/// The files of a directory that state special tokens.
pub(crate) struct Stated {
    config: (PathBuf, Map<String, Value>),
    map: (PathBuf, Map<String, Value>),
}

impl Stated {
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let (config_path, map_path) = (dir.join(TOKENIZER_CONFIG), dir.join(SPECIAL_TOKENS_MAP));
        let config = read_config(&config_path)?;
        let map = if config.contains_key("added_tokens_decoder") {
            Map::new()
        } else {
            read_config(&map_path)?
        };
        Ok(Self {
            config: (config_path, config),
            map: (map_path, map),
        })
    }

    /// `tokenizer_config.json`.
    pub(crate) fn config(&self) -> &Map<String, Value> {
        &self.config.1
    }

    /// What the files state under a name, and the file that does.
    pub(crate) fn get(&self, name: &str) -> Option<(&Path, &Value)> {
        [&self.map, &self.config]
            .into_iter()
            .find_map(|(path, json)| Some((path.as_path(), json.get(name)?)))
    }
}

/// Reads a configuration, which is empty if the file does not exist.
pub(crate) fn read_config(path: &Path) -> Result<Map<String, Value>> {
    if !tensor_files::is_there(path) {
        return Ok(Map::new());
    }
    let bytes = tensor_files::read_config(path)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let problem = format!("is not a JSON object: {error}");
        ConfigError::setting(path, "the file", problem).into()
    })
}
