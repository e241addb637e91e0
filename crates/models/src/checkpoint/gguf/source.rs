//! The parameters of a model in a GGUF file, or in several.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft::Weight;
use quant_core::QuantTensor;
use tensor_files::gguf::{BlockType, GgufFile, Value};

use super::blocks::{natural_format, unpack};
use super::layers::Layers;
use super::names::{self, Architecture, ROPE_FREQS, reordered};
use crate::checkpoint::format::quant_error;
use crate::checkpoint::packing::transpose;
use crate::source::{HEAD, Source, Vector, weight_name};
use crate::{CheckpointError, Config, Error, LlamaConfig, Result};

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NO: &str = "split.no";

/// The tensors of a GGUF file and of its further parts, if it is split.
pub(super) struct Tensors {
    files: Vec<GgufFile>,
    /// The file of each tensor.
    of_tensor: HashMap<String, usize>,
}

impl Tensors {
    /// Opens a file, or the first of a set; returns the metadata too.
    pub(super) fn open(path: &Path) -> Result<(Self, BTreeMap<String, Value>)> {
        let mut first = GgufFile::open(path)?;
        let metadata = first.take_metadata();
        let mut opened = Self {
            files: vec![first],
            of_tensor: HashMap::new(),
        };
        for path in parts(path, &metadata)? {
            opened.files.push(GgufFile::open(&path)?);
        }
        for (at, file) in opened.files.iter().enumerate() {
            for name in file.names() {
                if opened.of_tensor.insert(name.into(), at).is_some() {
                    let problem = "is in two parts of the model".into();
                    return Err(file.refuse(name, problem).into());
                }
            }
        }
        Ok((opened, metadata))
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.of_tensor.contains_key(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.of_tensor.keys()
    }

    /// The file of a tensor, or the first.
    pub(super) fn file(&mut self, name: &str) -> &mut GgufFile {
        let at = self.of_tensor.get(name).copied().unwrap_or(0);
        &mut self.files[at]
    }

    /// The number of rows of a matrix.
    pub(super) fn rows(&mut self, name: &str) -> Result<usize> {
        let file = self.file(name);
        match file.shape(name) {
            Some(&[rows, _]) => Ok(rows),
            Some(shape) => {
                let problem = format!("has the shape {shape:?}, not two dimensions");
                Err(file.refuse(name, problem).into())
            }
            None => {
                let (path, tensor) = (file.path().into(), name.into());
                Err(tensor_files::Error::MissingTensor { path, tensor }.into())
            }
        }
    }

    /// The factors of the rotary frequencies, if the file has them.
    pub(super) fn rope_freqs(&mut self) -> Result<Option<Vec<f32>>> {
        let file = self.file(ROPE_FREQS);
        match file.shape(ROPE_FREQS) {
            None => Ok(None),
            Some(&[n]) => Ok(Some(file.values(ROPE_FREQS, [n])?)),
            Some(shape) => {
                let problem = format!("has the shape {shape:?}, not one dimension");
                Err(file.refuse(ROPE_FREQS, problem).into())
            }
        }
    }
}

/// The further parts of a set whose first part is at `path`: `NAME-00001-of-00003.gguf`.
fn parts(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<Vec<PathBuf>> {
    let number = |key: &str| metadata.get(key).and_then(Value::as_u64).unwrap_or(0);
    let (n, no) = (number(SPLIT_COUNT), number(SPLIT_NO));
    if n <= 1 {
        return Ok(Vec::new());
    }
    let refuse = |problem: String| {
        let path = path.into();
        Err(tensor_files::Error::File { path, problem }.into())
    };
    if no != 0 {
        return refuse(format!("is part {} of {n}; give the first", no + 1));
    }
    let name = path.file_name().and_then(|name| name.to_str());
    let Some(stem) = name.and_then(|name| name.strip_suffix(&format!("-00001-of-{n:05}.gguf")))
    else {
        return refuse(format!(
            "is the first of {n} parts, and not named NAME-00001-of-{n:05}.gguf, so that the others cannot be found"
        ));
    };
    let part = |at: u64| path.with_file_name(format!("{stem}-{at:05}-of-{n:05}.gguf"));
    let mut all = Vec::new();
    for at in 2..=n {
        let part = part(at);
        if !tensor_files::is_there(&part) {
            let (index, shard) = (path.into(), part.display().to_string());
            return Err(CheckpointError::MissingShard { index, shard }.into());
        }
        all.push(part);
    }
    Ok(all)
}

/// A source of the parameters of a file, which are frozen.
pub(super) struct Parameters<'a> {
    pub(super) tensors: Tensors,
    pub(super) architecture: Architecture,
    pub(super) shape: LlamaConfig,
    /// The formats of the packed layers, if they are stated.
    pub(super) layers: Option<Layers>,
    pub(super) device: &'a Device,
    taken: HashSet<String>,
}

impl<'a> Parameters<'a> {
    pub(super) fn new(
        tensors: Tensors,
        architecture: Architecture,
        config: &Config,
        layers: Option<Layers>,
        device: &'a Device,
    ) -> Result<Self> {
        let shape = names::shape(config).cloned();
        let shape = shape.expect("the architectures of GGUF are LLaMA's");
        Ok(Self {
            tensors,
            architecture,
            shape,
            layers,
            device,
            taken: HashSet::from([ROPE_FREQS.to_owned()]),
        })
    }

    /// The name of a tensor in the file.
    fn take(&mut self, name: &str) -> String {
        // The blocks of these architectures have no other names.
        let tensor = names::tensor(name).unwrap_or_else(|| name.into());
        self.taken.insert(tensor.clone());
        tensor
    }

    fn frozen<const D: usize>(&self, values: Vec<f32>, dims: [usize; D]) -> Param<Tensor<D>> {
        let values = TensorData::new(values, dims);
        let values = Tensor::from_data(values, (self.device, DType::F32));
        Param::from_tensor(values).set_require_grad(false)
    }

    /// Refuses tensors that the model has not read.
    pub(super) fn check_leftovers(&mut self) -> Result<()> {
        let leftovers = self.tensors.names();
        let mut leftovers: Vec<String> = leftovers
            .filter(|name| !self.taken.contains(*name))
            .cloned()
            .collect();
        leftovers.sort();
        match leftovers.into_iter().next() {
            None => Ok(()),
            Some(tensor) => {
                let path = self.tensors.file(&tensor).path().into();
                Err(CheckpointError::UnexpectedTensor { path, tensor }.into())
            }
        }
    }
}

impl Source for Parameters<'_> {
    type Error = Error;

    fn vector(&mut self, path: &str, kind: Vector, len: usize) -> Result<Param<Tensor<1>>> {
        let name = kind.name(path);
        let tensor = self.take(&name);
        let mut values = self.tensors.file(&tensor).values(&tensor, [len])?;
        if let Some(rows) = names::row_order(self.architecture, &self.shape, &name) {
            values = reordered(&values, 1, &rows);
        }
        Ok(self.frozen(values, [len]))
    }

    fn table(&mut self, path: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let tensor = self.take(&weight_name(path));
        let values = self.tensors.file(&tensor).values(&tensor, dims)?;
        Ok(self.frozen(values, dims))
    }

    fn weight(&mut self, path: &str, dims @ [d_in, d_out]: [usize; 2]) -> Result<Weight> {
        let name = weight_name(path);
        let tensor = self.take(&name);
        let stated = self.layers.as_ref().map(|layers| layers.format(path));
        let file = self.tensors.file(&tensor);
        let format = match (file.block_type(&tensor), stated) {
            (Some(of), None) => natural_format(of),
            (_, Some(stated)) => stated,
            (None, None) => None,
        };
        let Some(format) = format else {
            let mut values = file.values(&tensor, [d_out, d_in])?;
            if let Some(rows) = names::row_order(self.architecture, &self.shape, &name) {
                values = reordered(&values, d_in, &rows);
            }
            let values = self.frozen(transpose(&values, [d_out, d_in]), dims);
            return Ok(Weight::Dense(values));
        };
        let (of, bytes) = file.bytes(&tensor, [d_out, d_in])?;
        let rows = names::row_order(self.architecture, &self.shape, &name);
        let parts = match BlockType::blocks(of, &bytes) {
            Some(blocks) => unpack(&blocks, format, dims, rows.as_deref()),
            None => Err(format!("is {of}, which does not hold {format}")),
        };
        let parts = parts.map_err(|problem| file.refuse(&tensor, problem))?;
        let weight = QuantTensor::from_parts(parts, format, dims, self.device);
        Ok(Weight::Quant(weight.map_err(quant_error(path))?))
    }

    fn head(&mut self, dims: [usize; 2]) -> Result<Weight> {
        self.weight(HEAD, dims)
    }
}
