//! The description of an adapter in the files of Hugging Face's PEFT, to write and to read it.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Shared, floats, trained};
use crate::{Adapter, Error, Linear, Result};
use tensor_files::{FloatType, LazyTensor, TensorFile};

/// The keys and values of `adapter_config.json`.
pub(crate) type HfConfig = Map<String, Value>;

/// Reads the adapter of one layer.
pub(crate) type HfReader = Box<dyn Fn(&mut HfSource) -> Result<Adapter>>;

/// A type of adapter in PEFT's files.
pub(crate) struct HfFormat {
    /// The `peft_type` of its configuration.
    pub(crate) peft_type: &'static str,
    /// The key of `α`, where patterns may give a layer its own rank and `α`.
    pub(crate) alpha_key: Option<&'static str>,
    /// The keys of its configurations, beside those of every type.
    pub(crate) keys: &'static [HfKey],
    /// Names of the tensors of a layer, after its path.
    pub(crate) tensors: &'static [&'static str],
    /// Other names of some of them, those of embeddings, with the first.
    pub(crate) aliases: &'static [(&'static str, &'static str)],
    /// Names of the tensors of the whole model, after `base_model.`.
    pub(crate) shared: &'static [&'static str],
    /// The configuration that PEFT writes, beside the keys of every type.
    pub(crate) config: fn() -> Value,
    /// Checks a configuration, reads the tensors of the whole model onto a device, and returns the
    /// reader of its layers.
    pub(crate) reader: fn(&HfConfig, &mut TensorFile, &Device) -> Result<HfReader, HfError>,
}

/// A key of a configuration.
pub(crate) struct HfKey {
    pub(crate) name: &'static str,
    pub(crate) role: HfRole,
}

/// What is done with a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum HfRole {
    /// The outputs depend on it.
    Read,
    /// The outputs do not depend on it, for this reason.
    Ignored(&'static str),
    /// Any value but the default is refused, for this reason.
    Refused(&'static str),
}

impl HfKey {
    pub(crate) const fn read(name: &'static str) -> Self {
        let role = HfRole::Read;
        Self { name, role }
    }

    pub(crate) const fn ignored(name: &'static str, reason: &'static str) -> Self {
        let role = HfRole::Ignored(reason);
        Self { name, role }
    }

    pub(crate) const fn refused(name: &'static str, reason: &'static str) -> Self {
        let role = HfRole::Refused(reason);
        Self { name, role }
    }
}

/// Why a directory cannot be read.
pub(crate) enum HfError {
    /// A configuration with this problem.
    Config(String),
    /// Another file with this error.
    Other(Error),
}

impl From<String> for HfError {
    fn from(problem: String) -> Self {
        Self::Config(problem)
    }
}

impl From<tensor_files::Error> for HfError {
    fn from(error: tensor_files::Error) -> Self {
        Self::Other(error.into())
    }
}

/// The keys of a configuration that `T` has. An error names its key.
pub(crate) fn read_config<T: DeserializeOwned>(config: &HfConfig) -> Result<T, String> {
    for (key, value) in config {
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        if let Err(error) = serde_json::from_value::<T>(Value::Object(alone)) {
            return Err(format!("`{key}` is {value}: {error}"));
        }
    }
    serde_json::from_value(Value::Object(config.clone())).map_err(|error| error.to_string())
}

/// An adapter to be written.
pub(crate) struct HfLayer<'a> {
    /// Its type: [`HfFormat::peft_type`].
    pub(crate) peft_type: &'static str,
    pub(crate) rank: usize,
    pub(crate) alpha: f32,
    /// Keys of the configuration, the same for all layers of a directory.
    pub(crate) settings: Vec<(&'static str, Value)>,
    /// Keys of the configuration that one layer sets for all.
    pub(crate) any: Vec<(&'static str, Value)>,
    /// Tensors of the layer: some of [`HfFormat::tensors`].
    pub(crate) tensors: Vec<(&'static str, LazyTensor<'a>)>,
    /// Tensors of the whole model: those of [`HfFormat::shared`].
    pub(crate) shared: Vec<(&'static str, &'a Shared)>,
}

/// A factor `[d_in, d_out]` as PEFT holds it, `[d_out, d_in]` in `f32`.
pub(crate) fn hf_factor<'a>(factor: Tensor<2>) -> LazyTensor<'a> {
    let [d_in, d_out] = factor.dims();
    LazyTensor::floats_as(FloatType::F32, [d_out, d_in], move || {
        floats(factor.transpose())
    })
}

/// A vector in `f32`.
pub(super) fn hf_vector<'a>(vector: Tensor<1>) -> LazyTensor<'a> {
    LazyTensor::floats_as(FloatType::F32, vector.dims(), move || floats(vector))
}

/// A whole number without a point, as Python writes it, and `f32` in its own digits.
pub(crate) fn hf_number(value: f32) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e9 && value != 0.0 {
        return json!(value as i64);
    }
    let shortest = value.to_string().parse::<f64>();
    json!(shortest.unwrap_or(f64::from(value)))
}

/// One layer of a directory that is read.
pub(crate) struct HfSource<'a> {
    pub(crate) path: &'a str,
    pub(crate) linear: &'a Linear,
    /// The rank and the `α` that patterns give this layer.
    pub(crate) rank: Option<usize>,
    pub(crate) alpha: Option<f32>,
    /// The tensors that the file has for it, some of [`HfFormat::tensors`], with their names there.
    pub(crate) tensors: BTreeMap<&'static str, String>,
    pub(crate) file: &'a mut TensorFile,
}

impl HfSource<'_> {
    /// The prefix of the paths of layers.
    pub(crate) const PREFIX: &'static str = "base_model.model.";

    fn name(&self, tensor: &str) -> String {
        let name = self.tensors.get(tensor).cloned();
        name.unwrap_or_else(|| format!("{}{}.{tensor}", Self::PREFIX, self.path))
    }

    /// The factor of this name, transposed to `[d_in, d_out]`.
    pub(crate) fn factor(&mut self, tensor: &str) -> Result<Tensor<2>> {
        let (values, dims) = self.file.floats::<2>(&self.name(tensor))?;
        let factor = trained(values, dims, &self.linear.weight().device());
        Ok(factor.val().detach().transpose())
    }

    /// The vector of this name.
    pub(crate) fn vector(&mut self, tensor: &str) -> Result<Param<Tensor<1>>> {
        let (values, dims) = self.file.floats::<1>(&self.name(tensor))?;
        Ok(trained(values, dims, &self.linear.weight().device()))
    }

    /// An error about one tensor of the layer.
    pub(crate) fn refuse(&self, tensor: &str, problem: String) -> Error {
        self.file.refuse(&self.name(tensor), problem).into()
    }
}
