//! The files of a model that is read block by block.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use burn::tensor::Device;
use serde_json::{Map, Value};
use tensor_files::FloatType;

use super::super::directory::{CONFIG, carried, stop_tokens};
use super::super::formats::open;
use super::super::gptq;
use super::super::load::Checkpoint;
use crate::model::check_compute;
use crate::norm::Norm;
use crate::source::{HEAD, Shapes, Vector, weight_name};
use crate::{Config, Model, Result, StreamError};

/// The files of a model, which must stay as they are.
pub(super) struct Inputs<'a> {
    dir: &'a Path,
    device: &'a Device,
    compute: FloatType,
    shape: Config,
    /// `config.json` without `quantization_config`.
    pub(super) config: Map<String, Value>,
    pub(super) carried: BTreeMap<&'static str, Vec<u8>>,
    /// Of each file of weights, the SHA-256 of its length and its header.
    pub(super) headers: BTreeMap<String, String>,
    stamps: Vec<Stamp>,
}

/// A file of weights, with its length and the time when it was last written.
#[derive(PartialEq)]
struct Stamp(PathBuf, u64, Option<SystemTime>);

impl Stamp {
    fn of(path: PathBuf) -> Result<Self> {
        match fs::metadata(&path) {
            Ok(found) => Ok(Self(path, found.len(), found.modified().ok())),
            Err(cause) => Err(tensor_files::Error::Io { path, cause }.into()),
        }
    }
}

impl<'a> Inputs<'a> {
    /// Opens the files of a model of this shape, and checks that they have the tensors that it needs, and
    /// no others.
    pub(super) fn open(
        dir: &'a Path,
        shape: &Config,
        device: &'a Device,
        compute: FloatType,
    ) -> Result<Self> {
        check_compute(compute, device)?;
        let mut config: Map<String, Value> = tensor_files::read_json(&dir.join(CONFIG))?;
        config.shift_remove("quantization_config");
        let carried = carried(dir)?;
        stop_tokens(dir, &config, &carried, shape.vocab_size())?;
        let mut inputs = Self {
            dir,
            device,
            compute,
            shape: shape.clone(),
            config,
            carried,
            headers: BTreeMap::new(),
            stamps: Vec::new(),
        };
        let mut checkpoint = inputs.checkpoint()?;
        inputs.headers = checkpoint.tensors.headers()?;
        let files = checkpoint.tensors.files().into_iter();
        inputs.stamps = files.map(Stamp::of).collect::<Result<_>>()?;
        inputs.check_tensors(&mut checkpoint)?;
        Ok(inputs)
    }

    /// The tensors: a file that vanished or was cut since is found now.
    pub(super) fn checkpoint(&self) -> Result<Checkpoint> {
        let mut config: Map<String, Value> = tensor_files::read_json(&self.dir.join(CONFIG))?;
        let quantization = config.shift_remove("quantization_config");
        let weights = open(self.dir, quantization, &self.shape)?;
        Ok(Checkpoint::new(weights, self.device))
    }

    /// A model that can embed tokens, and do nothing else.
    pub(super) fn embedding(&self) -> Result<Model> {
        let mut embedding = Model::embedding(self.shape.clone(), &mut self.checkpoint()?)?;
        embedding.compute = self.compute;
        Ok(embedding)
    }

    /// The SHA-256 of the configurations, and of the files that are copied.
    pub(super) fn sums(&self) -> Result<BTreeMap<String, String>> {
        let carried = self.carried.iter().map(|(&name, bytes)| {
            let sum = tensor_files::digest([(name, bytes.as_slice())]);
            (name.to_string(), sum)
        });
        let mut sums: BTreeMap<String, String> = carried.collect();
        for name in [CONFIG, gptq::CONFIG_FILE] {
            let path = self.dir.join(name);
            if tensor_files::is_there(&path) {
                sums.insert(name.into(), tensor_files::sha256(&path)?);
            }
        }
        Ok(sums)
    }

    /// Checks that no file of weights was written since the beginning.
    pub(super) fn check_same(&self) -> Result<()> {
        for stamp in &self.stamps {
            if Stamp::of(stamp.0.clone())? != *stamp {
                let path = stamp.0.clone();
                return Err(StreamError::Changed { path, tensor: None }.into());
            }
        }
        Ok(())
    }

    /// Checks that tensors have these SHA-256.
    pub(super) fn check_sums(&self, sums: &BTreeMap<String, String>) -> Result<()> {
        let mut tensors = self.checkpoint()?.tensors;
        for (name, sum) in sums {
            if tensors.sha256(name)? != *sum {
                let path = tensors.path(name);
                let tensor = Some(name.clone());
                return Err(StreamError::Changed { path, tensor }.into());
            }
        }
        Ok(())
    }

    /// Refuses tensors that are missing, of another shape, or that the model has no place for.
    fn check_tensors(&self, checkpoint: &mut Checkpoint) -> Result<()> {
        let (mut known, mut packed) = (HashSet::new(), Vec::new());
        let modules: Vec<_> = self
            .ends()
            .into_iter()
            .chain(self.shape.block_modules())
            .collect();
        for (path, tensors) in &modules {
            let is_packed = checkpoint.packed_tensor(path).is_some();
            if is_packed {
                packed.push(format!("{path}."));
            }
            for (name, dims) in tensors {
                // The weight of a packed layer is in other tensors.
                if !is_packed || *name != weight_name(path) {
                    checkpoint.tensors.check(name, dims)?;
                }
                known.insert(name.clone());
            }
        }
        let paths: Vec<String> = modules.into_iter().map(|(path, _)| path).collect();
        checkpoint.check_paths(&paths, &self.dir.join(CONFIG))?;
        let names = checkpoint.tensors.names().into_iter();
        let is_known = |name: &String| {
            let is_part = |path: &String| name.starts_with(path) && !name.ends_with(".bias");
            known.contains(name) || packed.iter().any(is_part)
        };
        let leftovers = names.filter(|name| !is_known(name)).collect();
        checkpoint.check_leftovers(&self.shape, leftovers)
    }

    /// The modules before the first block and after the last one, with their tensors.
    fn ends(&self) -> Vec<(String, Shapes)> {
        let shape = self.shape.shape();
        let (hidden, vocab) = (shape.hidden_size, shape.vocab_size);
        let width = shape.embedding_width;
        let matrix = |path: String, rows, columns| {
            let name = weight_name(&path);
            (path, vec![(name, vec![rows, columns])])
        };
        let mut ends = vec![matrix(shape.embedding_path(), vocab, width)];
        if let Some(learned) = shape.learned_positions {
            ends.push(matrix(shape.positions_path(), learned.n_rows, hidden));
        }
        if width != hidden {
            ends.push(matrix(shape.project_in_path(), hidden, width));
            ends.push(matrix(shape.project_out_path(), width, hidden));
        }
        if shape.has_final_norm {
            let path = shape.norm_path();
            let kinds = Norm::kinds(shape.norm).into_iter();
            let tensors = kinds.map(|kind| (kind.name(&path), vec![hidden])).collect();
            ends.push((path, tensors));
        }
        let mut head = Vec::new();
        if !shape.tie_word_embeddings {
            head.push((weight_name(HEAD), vec![vocab, width]));
        }
        if shape.has_head_bias {
            head.push((Vector::Bias.name(HEAD), vec![vocab]));
        }
        if !head.is_empty() {
            ends.push((HEAD.into(), head));
        }
        ends
    }
}
