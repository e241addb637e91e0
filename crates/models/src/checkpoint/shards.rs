//! The weights of a directory, in one file or in several with an index.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use tensor_files::TensorFile;

use crate::{CheckpointError, Result};

/// The name of the weights without its extension.
const MODEL: &str = "model";

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

/// Writes the index of the files of weights in a directory, each with its tensors.
pub(super) fn write_index(dir: &Path, shards: &[String]) -> Result<()> {
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for shard in shards {
        let file = TensorFile::open(&dir.join(shard))?;
        total_size += file.n_bytes();
        weight_map.extend(file.names().into_iter().map(|name| (name, shard)));
    }
    let index = json!({
        "metadata": { "total_size": total_size },
        "weight_map": weight_map,
    });
    Ok(tensor_files::write_json(
        &dir.join(index_name(MODEL)),
        &index,
    )?)
}

fn weights_name(base: &str) -> String {
    format!("{base}.safetensors")
}

fn index_name(base: &str) -> String {
    format!("{base}.safetensors.index.json")
}

impl Shards {
    /// Opens the weights of a directory: `model.safetensors` or its shards, unless there are some of one of
    /// the names `first`, or there are none but those of one of the names `last`.
    pub(super) fn open(dir: &Path, first: &[String], last: &[String]) -> Result<Self> {
        let model = [MODEL.to_string()];
        for base in first.iter().chain(&model).chain(last) {
            // A configuration must not lead out of its directory.
            if !is_file_name(base) {
                continue;
            }
            let weights = dir.join(weights_name(base));
            if tensor_files::is_there(&weights) {
                return Self::of_file(&weights);
            }
            let index = dir.join(index_name(base));
            if tensor_files::is_there(&index) {
                return Self::of_index(dir, index);
            }
        }
        let hint = hint(dir);
        let dir = dir.into();
        Err(CheckpointError::NoWeights { dir, hint }.into())
    }

    fn of_index(dir: &Path, index_path: PathBuf) -> Result<Self> {
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
                let index = index_path.file_name().unwrap_or_default();
                let index = index.to_string_lossy();
                let problem = format!("is not listed for this file in `{index}`");
                return Err(file.refuse(&tensor, problem).into());
            }
        }
        Ok(shards)
    }

    /// The tensors of one file.
    pub(super) fn of_file(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let of_tensor = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok(Self {
            files: vec![file],
            of_tensor,
        })
    }

    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| file.path().into()).collect()
    }

    /// See [`Tensors::headers`](super::tensors::Tensors::headers).
    pub(super) fn headers(&mut self) -> Result<BTreeMap<String, String>> {
        let mut headers = BTreeMap::new();
        for file in &mut self.files {
            let name = file.path().file_name().unwrap_or_default();
            let name = name.to_string_lossy().into_owned();
            headers.insert(name, file.header_sha256()?);
        }
        Ok(headers)
    }

    /// The names of all tensors, in order.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.of_tensor.keys().cloned().collect();
        names.sort();
        names
    }

    /// The file with a tensor.
    pub(super) fn file(&mut self, tensor: &str) -> Result<&mut TensorFile> {
        match self.of_tensor.get(tensor) {
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
    if !is_file_name(shard) {
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

fn is_file_name(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref()) && !name.contains(['/', '\\', '\0'])
}

/// Advice for the weights that a directory has, under other names or in other formats.
fn hint(dir: &Path) -> String {
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    let is_pickled = |name: &&str| tensor_files::is_there(&dir.join(name));
    if pickled.iter().any(is_pickled) {
        return "; it has a pickled `pytorch_model.bin`: convert it to safetensors first".into();
    }
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut others: Vec<String> = names
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    others.sort();
    match &others[..] {
        [] => String::new(),
        [one] => format!(
            "; it has `{one}`: if these are the weights, rename the file to `{}`",
            weights_name(MODEL)
        ),
        [first, ..] => format!("; it has `{first}` and others like it, and no index of them"),
    }
}
