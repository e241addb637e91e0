//! The weights of a directory, in one file or in several with an index.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;
use tensor_files::TensorFile;

use super::directory::WEIGHTS;
use crate::{CheckpointError, Result};

const INDEX: &str = "model.safetensors.index.json";

/// The files of weights.
pub(super) struct Shards {
    files: Vec<TensorFile>,
    /// The file of each tensor.
    of_tensor: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        if tensor_files::is_there(&dir.join(WEIGHTS)) {
            let file = TensorFile::open(&dir.join(WEIGHTS))?;
            let of_tensor = file.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Self {
                files: vec![file],
                of_tensor,
            });
        }
        let index_path = dir.join(INDEX);
        if !tensor_files::is_there(&index_path) {
            let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
            let is_pickled = |name: &&str| tensor_files::is_there(&dir.join(name));
            let hint = if pickled.iter().any(is_pickled) {
                "; it has a pickled `pytorch_model.bin`: convert it to safetensors first"
            } else {
                ""
            };
            let dir = dir.into();
            return Err(CheckpointError::NoWeights { dir, hint }.into());
        }

        let index: Index = tensor_files::read_json(&index_path)?;
        if index.weight_map.is_empty() {
            let problem = "lists no tensors".into();
            return Err(tensor_files::Error::File {
                path: index_path,
                problem,
            }
            .into());
        }
        let mut shards = Self {
            files: Vec::new(),
            of_tensor: HashMap::new(),
        };
        let mut opened: HashMap<String, usize> = HashMap::new();
        for (tensor, shard) in index.weight_map {
            let at = match opened.get(&shard) {
                Some(&at) => at,
                None => {
                    let at = shards.files.len();
                    shards.files.push(open_shard(dir, &index_path, &shard)?);
                    opened.insert(shard, at);
                    at
                }
            };
            if !shards.files[at].contains(&tensor) {
                let path = shards.files[at].path().into();
                return Err(tensor_files::Error::MissingTensor { path, tensor }.into());
            }
            shards.of_tensor.insert(tensor, at);
        }
        for (at, file) in shards.files.iter().enumerate() {
            let unlisted = file
                .names()
                .into_iter()
                .find(|name| shards.of_tensor.get(name) != Some(&at));
            if let Some(tensor) = unlisted {
                let problem = format!("is not listed for this file in `{INDEX}`");
                return Err(file.refuse(&tensor, problem).into());
            }
        }
        Ok(shards)
    }

    /// The names of all tensors, in order.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.of_tensor.keys().cloned().collect();
        names.sort();
        names
    }

    pub(super) fn contains(&self, tensor: &str) -> bool {
        self.of_tensor.contains_key(self.stored(tensor))
    }

    /// The name of a tensor in its file, which lacks the first part in a model that was saved without
    /// its head.
    pub(super) fn stored<'a>(&self, tensor: &'a str) -> &'a str {
        let is_there = |name: &&str| self.of_tensor.contains_key(*name);
        let short = tensor.strip_prefix("model.").filter(is_there);
        short.filter(|_| !is_there(&tensor)).unwrap_or(tensor)
    }

    /// The file with a tensor.
    pub(super) fn file(&mut self, tensor: &str) -> Result<&mut TensorFile> {
        match self.of_tensor.get(self.stored(tensor)) {
            Some(&at) => Ok(&mut self.files[at]),
            None => {
                let path = self
                    .files
                    .first()
                    .map(|file| file.path().into())
                    .unwrap_or_default();
                let tensor = tensor.into();
                Err(tensor_files::Error::MissingTensor { path, tensor }.into())
            }
        }
    }
}

fn open_shard(dir: &Path, index: &Path, shard: &str) -> Result<TensorFile> {
    // An index must not lead out of its directory.
    if Path::new(shard).file_name() != Some(shard.as_ref()) || shard.contains(['/', '\\', '\0']) {
        return Err(tensor_files::Error::File {
            path: index.into(),
            problem: format!("names a shard {shard:?}, which is not the name of a file beside it"),
        }
        .into());
    }
    let path = dir.join(shard);
    if !tensor_files::is_there(&path) {
        let error = CheckpointError::MissingShard {
            index: index.into(),
            shard: shard.into(),
        };
        return Err(error.into());
    }
    Ok(TensorFile::open(&path)?)
}
