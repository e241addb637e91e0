//! The files of a directory besides the tensors.

use std::collections::BTreeMap;
use std::path::Path;

use peft::Certificate;
use serde_json::{Map, Value};
use tensor_files::IntoOutput;

use crate::{ConfigError, Error, Result};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
pub(crate) const GENERATION: &str = "generation_config.json";
pub(crate) const ADDED_TOKENS: &str = "added_tokens.json";
/// The vocabularies of Python tokenizers.
pub(crate) const SENTENCE_PIECE: &str = "tokenizer.model";
pub(crate) const VOCAB: &str = "vocab.json";
pub(crate) const MERGES: &str = "merges.txt";
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The certificate of a merged model.
pub(super) const CERTIFICATE: &str = "certificate.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
/// The files that are copied when a model is saved.
const CARRIED: [&str; 9] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    CHAT_TEMPLATE,
    ADDED_TOKENS,
    SENTENCE_PIECE,
    VOCAB,
    MERGES,
    GENERATION,
];

/// The `eos_token_id` of `generation_config.json` or of `config.json`: one token, or several, of a
/// vocabulary of `vocab_size`.
pub(crate) fn stop_tokens(
    dir: &Path,
    config: &Map<String, Value>,
    carried: &BTreeMap<&'static str, Vec<u8>>,
    vocab_size: usize,
) -> Result<Vec<u32>> {
    const SETTING: &str = "eos_token_id";
    let refuse = |file: &str, setting: &str, problem: String| {
        Error::from(ConfigError::setting(&dir.join(file), setting, problem))
    };
    let generation = match carried.get(GENERATION) {
        Some(bytes) => serde_json::from_slice::<Map<String, Value>>(bytes)
            .map_err(|error| refuse(GENERATION, "the file", format!("is no object: {error}")))?,
        None => Map::new(),
    };
    let (file, ids) = match generation.get(SETTING).filter(|ids| !ids.is_null()) {
        Some(ids) => (GENERATION, ids),
        None => (CONFIG, config.get(SETTING).unwrap_or(&Value::Null)),
    };
    let id = |id: &Value| {
        let token = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let token =
            token.ok_or_else(|| refuse(file, SETTING, format!("is {id}, which is no token")))?;
        if (token as usize) < vocab_size {
            return Ok(token);
        }
        // The model cannot produce it: its texts would not end, and the files are of two models.
        let problem = format!(
            "is {token}, but the vocabulary of the model has {vocab_size} tokens; use the files of one model"
        );
        Err(refuse(file, SETTING, problem))
    };
    match ids {
        Value::Null => Ok(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Ok(vec![id(one)?]),
    }
}

/// Reads the files of a directory that are copied when the model is saved.
pub(crate) fn carried(dir: &Path) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let mut carried = BTreeMap::new();
    for name in CARRIED {
        if tensor_files::is_there(&dir.join(name)) {
            let read = match name {
                // Those that are parsed, and not only copied.
                TOKENIZER_CONFIG | SPECIAL_TOKENS_MAP | GENERATION => tensor_files::read_config,
                _ => tensor_files::read,
            };
            carried.insert(name, read(&dir.join(name))?);
        }
    }
    Ok(carried)
}

/// The digest of the files that decide which tokens a text has; none if there is no tokenizer.
pub(crate) fn tokenizer_digest(carried: &BTreeMap<&'static str, Vec<u8>>) -> Option<String> {
    let has = |name: &str| carried.contains_key(name);
    if !(has(TOKENIZER) || has(SENTENCE_PIECE) || (has(VOCAB) && has(MERGES))) {
        return None;
    }
    let files = carried.iter().filter(|(name, _)| **name != GENERATION);
    let digest = tensor_files::digest(files.map(|(name, bytes)| (*name, bytes.as_slice())));
    Some(format!("sha256:{digest}"))
}

/// The files of a directory to be written.
pub(super) struct Files<'a> {
    pub(super) config: &'a Map<String, Value>,
    pub(super) carried: &'a BTreeMap<&'static str, Vec<u8>>,
    /// A second configuration, with its name.
    pub(super) second: Option<(&'static str, &'a Value)>,
    /// The certificate of the model, if it is merged.
    pub(super) certificate: Option<&'a Certificate>,
}

impl Files<'_> {
    /// Writes a directory, whose tensors `write` writes into the file of the given path.
    pub(super) fn write(
        &self,
        dir: impl IntoOutput,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        tensor_files::write_directory(dir, |dir| {
            write(&dir.join(WEIGHTS))?;
            self.write_beside(dir)
        })
    }

    /// Writes the files beside the tensors, which are in the directory already, and the sums of all.
    pub(super) fn write_beside(&self, dir: &Path) -> Result<()> {
        for (name, bytes) in self.carried {
            tensor_files::write(&dir.join(name), bytes)?;
        }
        if let Some((name, config)) = self.second {
            tensor_files::write_json(&dir.join(name), config)?;
        }
        if let Some(certificate) = self.certificate {
            certificate.save(dir.join(CERTIFICATE))?;
        }
        tensor_files::write_json(&dir.join(CONFIG), self.config)?;
        Ok(tensor_files::write_sums(dir)?)
    }
}
