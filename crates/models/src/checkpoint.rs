//! Directories of models: Hugging Face's, with layers packed in one of several formats.
//!
//! What is not packed is in the shortest type of float that holds it exactly, so that a saved model
//! is the model, bit for bit. How packed layers lie in files is the matter of one module for each
//! format, behind [`LayerFormat`].

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft::{Linear, Linears, Weight};
use quant_core::{DoubleScaleParams, QuantTensor};
use serde_json::{Map, Value};
use tensor_files::{FloatType, LazyTensor, TensorFile};

use crate::model::Table;
use crate::source::{HEAD, Source, Vector, weight_name};
use crate::{Config, Error, Model, Pretrained, Result, Tokenizer};

mod bitsandbytes;
mod dense;
mod exact;
#[cfg(test)]
mod golden;
mod gptq;
mod packing;
mod plan;
mod shards;

use bitsandbytes::Bitsandbytes;
pub use dense::{Rounding, save_dense};
use exact::Exact;
use gptq::Gptq;
use packing::transpose;
pub use plan::{Plan, PlannedLayer, plan};
use shards::Shards;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const GENERATION: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
/// Files that a saved model takes along, where there are any.
const CARRIED: [&str; 9] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    // What slower tokenizers are made from.
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    GENERATION,
];

/// How packed layers lie in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// The workspace's own, which holds every packed layer exactly.
    QuantCore,
    /// GPTQ's: uniform grids with whole zero-points and scales in `f16` (Frantar et al. 2023,
    /// arXiv:2210.17323).
    Gptq(GptqVersion),
    /// bitsandbytes': NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314).
    Bitsandbytes,
}

/// How a GPTQ checkpoint has its zero-points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GptqVersion {
    /// Minus one, as AutoGPTQ has them: `checkpoint_format` is `gptq`. Does not hold zero-points
    /// of 0.
    V1,
    /// As they are: `checkpoint_format` is `gptq_v2`.
    V2,
}

impl fmt::Display for CheckpointFormat {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            CheckpointFormat::QuantCore => "quant-core",
            CheckpointFormat::Gptq(GptqVersion::V1) => "GPTQ v1",
            CheckpointFormat::Gptq(GptqVersion::V2) => "GPTQ v2",
            CheckpointFormat::Bitsandbytes => "bitsandbytes",
        })
    }
}

/// One way in which packed layers lie in files: read from a configuration, or made for a model
/// whose layers it holds exactly.
trait LayerFormat {
    /// The name of a tensor of a packed head, where the format has none.
    fn stray_head(&self, _tensors: &Tensors) -> Option<String> {
        None
    }

    /// Checks the layers that the configuration lists against those of the model.
    fn check_paths(&self, _layers: &[String], _config: &Path) -> Result<()> {
        Ok(())
    }

    /// The weight `[d_in, d_out]` of the layer at `path`; `None` if it is dense.
    fn read(
        &self,
        tensors: &mut Tensors,
        path: &str,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Option<QuantTensor>>;

    /// The tensors of a packed layer of the model that this was made for.
    fn tensors<'a>(&self, path: &str, weight: &'a QuantTensor) -> Vec<(String, LazyTensor<'a>)>;

    /// `quantization_config` in `config.json`.
    fn config(&self) -> Value;

    /// A file beside `config.json` that says the same, where readers look for one.
    fn config_file(&self) -> Option<&'static str> {
        None
    }
}

/// The weights of a model to be written that may be packed, and its head if it is.
struct Projections<'a> {
    packed: Vec<(String, &'a QuantTensor)>,
    dense: Vec<String>,
    head: Option<&'a QuantTensor>,
}

/// What a format has against layers, by their paths.
type Refusals = Vec<(String, String)>;

impl<'a> Projections<'a> {
    fn of(model: &'a Model) -> Self {
        let (mut packed, mut dense) = (Vec::new(), Vec::new());
        let linears = model.linears().into_iter();
        let linears = linears.map(|(path, linear)| (path, linear.weight()));
        let others = model.other_weights().into_iter();
        for (path, weight) in linears.chain(others.filter(|(path, _)| path != HEAD)) {
            match weight {
                Weight::Quant(weight) => packed.push((path, weight)),
                Weight::Dense(_) => dense.push(path),
            }
        }
        let head = match &model.lm_head {
            Some(Weight::Quant(head)) => Some(head),
            _ => None,
        };
        Self {
            packed,
            dense,
            head,
        }
    }

    /// What formats of other programs have against a packed head.
    fn refuse_head(&self) -> Option<(String, String)> {
        let head = self.head?.format();
        let reason = format!("is {head}, and in such a checkpoint only projections are packed");
        Some((HEAD.into(), reason))
    }
}

impl CheckpointFormat {
    /// The format for the layers of a model, whose `config.json` is `config`.
    fn for_model(
        self,
        model: &Projections,
        config: &Map<String, Value>,
    ) -> Result<Box<dyn LayerFormat>, Refusals> {
        Ok(match self {
            CheckpointFormat::QuantCore => Box::new(Exact::for_model(model)),
            CheckpointFormat::Gptq(version) => Box::new(Gptq::for_model(model, version)?),
            CheckpointFormat::Bitsandbytes => Box::new(Bitsandbytes::for_model(model, config)?),
        })
    }

    /// The format of a directory, if it has packed layers.
    fn open(dir: &Path, json: Option<Value>) -> Result<Option<Box<dyn LayerFormat>>> {
        let config = dir.join(CONFIG);
        let Some(json) = json.filter(|json| !json.is_null()) else {
            return Ok(match tensor_files::is_there(&dir.join(gptq::CONFIG_FILE)) {
                true => Some(Box::new(Gptq::open(dir, None)?)),
                false => None,
            });
        };
        let method = json.get("quant_method").and_then(Value::as_str);
        Ok(Some(match method.unwrap_or_default() {
            exact::METHOD => Box::new(Exact::open(json, &config)?),
            gptq::METHOD => Box::new(Gptq::open(dir, Some(json))?),
            bitsandbytes::METHOD => Box::new(Bitsandbytes::open(&json, &config)?),
            other => {
                let supported = [exact::METHOD, gptq::METHOD, bitsandbytes::METHOD].join(", ");
                let problem = format!("has the method `{other}`; supported: {supported}");
                return Err(refuse_config(&config, problem));
            }
        }))
    }
}

/// Reads a directory: `config.json`, `tokenizer.json` and the weights, one tensor at a time.
///
/// Packed layers may be in any [`CheckpointFormat`]; they stay packed. GPTQ's inputs in another
/// order (`desc_act`) and bitsandbytes' double quantization are kept. A bitsandbytes layer whose
/// blocks straddle rows has groups of the greatest common divisor of a row and a block.
///
/// Everything is frozen. Dense weights are `f32` in memory.
///
/// # Errors
/// If a file is missing, damaged or not what the configuration asks for. Of GPTQ's,
/// [`Error::GptqVersion`] if it does not say how zero-points are stored, [`Error::Disagreement`] if
/// `config.json` and `quantize_config.json` differ, [`Error::GroupIndex`] and
/// [`Error::WrappedZeros`].
pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Pretrained> {
    let dir = dir.as_ref();
    let config_path = dir.join(CONFIG);
    let mut config: Map<String, Value> = tensor_files::read_json(&config_path)?;
    let format = CheckpointFormat::open(dir, config.remove("quantization_config"))?;
    let shape = Config::from_json(&config, &config_path)?;
    let tokenizer = match tensor_files::is_there(&dir.join(TOKENIZER)) {
        true => Some(Tokenizer::open(&dir.join(TOKENIZER))?),
        false => None,
    };
    let mut checkpoint = Checkpoint {
        tensors: Tensors {
            shards: Shards::open(dir)?,
            taken: HashSet::new(),
        },
        format,
        device: device.clone(),
    };
    let model = Model::build(shape, &mut checkpoint)?;
    if let Some(format) = &checkpoint.format {
        let linears = model.linears().into_iter().map(|(path, _)| path);
        let others = model.other_weights().into_iter().map(|(path, _)| path);
        let layers: Vec<String> = linears.chain(others).collect();
        format.check_paths(&layers, &config_path)?;
    }
    checkpoint.check_leftovers(&model)?;
    let carried = carried(dir)?;
    let stop_tokens = stop_tokens(dir, &config, &carried)?;
    Ok(Pretrained {
        model,
        tokenizer,
        dir: dir.into(),
        config,
        carried,
        stop_tokens,
        special: OnceLock::new(),
    })
}

/// `eos_token_id` of `generation_config.json`, or of `config.json`: one, or several.
pub(crate) fn stop_tokens(
    dir: &Path,
    config: &Map<String, Value>,
    carried: &BTreeMap<&'static str, Vec<u8>>,
) -> Result<Vec<u32>> {
    const SETTING: &str = "eos_token_id";
    let refuse = |file: &str, setting: &str, problem: String| Error::Config {
        path: dir.join(file),
        setting: setting.into(),
        problem,
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
        token.ok_or_else(|| refuse(file, SETTING, format!("is {id}, which is no token")))
    };
    match ids {
        Value::Null => Ok(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Ok(vec![id(one)?]),
    }
}

/// The files of a directory that a saved model takes along.
pub(crate) fn carried(dir: &Path) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let mut carried = BTreeMap::new();
    for name in CARRIED {
        if tensor_files::is_there(&dir.join(name)) {
            carried.insert(name, tensor_files::read(&dir.join(name))?);
        }
    }
    Ok(carried)
}

/// Writes a new directory that [`load`] reads back bit for bit, whole or not at all.
///
/// Packed layers are in the workspace's own format; see [`save_as`]. Adapters are not written: merge
/// them, or save them with [`peft::Adapters`].
///
/// # Errors
/// [`tensor_files::Error::OutputExists`] if `dir` holds something, [`peft::Error::AlreadyAdapted`] if a
/// layer has an adapter, [`tensor_files::Error::Io`] if the directory cannot be written.
pub fn save(lm: &Pretrained, dir: impl AsRef<Path>) -> Result<()> {
    save_as(lm, dir, CheckpointFormat::QuantCore)
}

/// [`save`] with the packed layers in a format of other programs.
///
/// Nothing is rounded: what is written reads back bit for bit, or is refused.
///
/// # Errors
/// [`Error::CannotHold`] with all layers that the format does not hold exactly; otherwise as
/// [`save`].
pub fn save_as(lm: &Pretrained, dir: impl AsRef<Path>, format: CheckpointFormat) -> Result<()> {
    let model = &lm.model;
    check_no_adapters(model)?;
    let projections = Projections::of(model);
    let mut config = lm.config.clone();
    let layers = match format.for_model(&projections, &config) {
        Ok(layers) => layers,
        Err(refusals) => {
            let mut others = [
                CheckpointFormat::Gptq(GptqVersion::V2),
                CheckpointFormat::Bitsandbytes,
            ]
            .into_iter();
            let other = others.find(|other| other.for_model(&projections, &config).is_ok());
            return Err(Error::CannotHold {
                format,
                layers: refusals,
                instead: other.unwrap_or(CheckpointFormat::QuantCore),
            });
        }
    };
    let is_packed = !projections.packed.is_empty() || projections.head.is_some();
    let quantization = is_packed.then(|| layers.config());
    if let Some(quantization) = &quantization {
        config.insert("quantization_config".into(), quantization.clone());
    }
    state_head(&mut config, model);

    if !is_packed && let Some(float) = dense::common_float(model) {
        return dense::save_dense(lm, dir, float).map(drop);
    }
    if !is_packed {
        // Readers take all floats for this type.
        dense::state_float(&mut config, FloatType::F32);
    }
    let tensors = tensors(model, layers.as_ref());
    let files = Files {
        config: &config,
        carried: &lm.carried,
        beside: layers.config_file().zip(quantization.as_ref()),
    };
    write(dir.as_ref(), tensors, &files)
}

/// Says in a `config.json` that the head is no longer the embedding, if it was before it was packed.
fn state_head(config: &mut Map<String, Value>, model: &Model) {
    if model.lm_head.is_some() {
        config.insert("tie_word_embeddings".into(), false.into());
    }
}

fn check_no_adapters(model: &Model) -> Result<()> {
    let linears = model.linears();
    match linears
        .iter()
        .find(|(_, linear)| linear.adapter().is_some())
    {
        Some((path, _)) => Err(peft::Error::AlreadyAdapted { path: path.clone() }.into()),
        None => Ok(()),
    }
}

/// The files of a directory beside its tensors.
struct Files<'a> {
    config: &'a Map<String, Value>,
    carried: &'a BTreeMap<&'static str, Vec<u8>>,
    /// One more configuration.
    beside: Option<(&'static str, &'a Value)>,
}

fn write<'a>(
    dir: &Path,
    tensors: impl IntoIterator<Item = (String, LazyTensor<'a>)>,
    files: &Files,
) -> Result<()> {
    tensor_files::write_directory(dir, |dir| {
        tensor_files::write_tensors(&dir.join(WEIGHTS), tensors)?;
        for (name, bytes) in files.carried {
            let path = dir.join(name);
            std::fs::write(&path, bytes)
                .map_err(|source| tensor_files::Error::Io { path, source })?;
        }
        if let Some((name, config)) = files.beside {
            tensor_files::write_json(&dir.join(name), config)?;
        }
        tensor_files::write_json(&dir.join(CONFIG), files.config)
    })?;
    Ok(())
}

/// The tensors of a model under Hugging Face's names.
fn tensors<'a>(model: &'a Model, layers: &dyn LayerFormat) -> Vec<(String, LazyTensor<'a>)> {
    let tables = model.tables().into_iter();
    let mut all: Vec<_> = tables
        .map(|(name, table)| match table {
            Table::Vector(table) => (name, floats(table)),
            Table::Matrix(table) => (name, floats(table)),
        })
        .collect();
    for (path, weight) in model.other_weights() {
        all.extend(weight_tensors(&path, weight, layers));
    }
    for (path, linear) in model.linears() {
        all.extend(linear_tensors(&path, linear, layers));
    }
    all
}

fn weight_tensors<'a>(
    path: &str,
    weight: &'a Weight,
    layers: &dyn LayerFormat,
) -> Vec<(String, LazyTensor<'a>)> {
    match weight {
        Weight::Dense(weight) => vec![(format!("{path}.weight"), transposed(weight))],
        Weight::Quant(weight) => layers.tensors(path, weight),
    }
}

fn linear_tensors<'a>(
    path: &str,
    linear: &'a Linear,
    layers: &dyn LayerFormat,
) -> Vec<(String, LazyTensor<'a>)> {
    let mut all = weight_tensors(path, linear.weight(), layers);
    if let Some(bias) = linear.bias() {
        let dims = bias.dims();
        let values = move || values(bias.clone());
        all.push((format!("{path}.bias"), LazyTensor::floats(dims, values)));
    }
    all
}

fn floats<const D: usize>(param: &Param<Tensor<D>>) -> LazyTensor<'_> {
    LazyTensor::floats(param.val().dims(), || values(param.val()))
}

/// `[d_in, d_out]` as Hugging Face's `[out, in]`.
fn transposed(param: &Param<Tensor<2>>) -> LazyTensor<'_> {
    let [d_in, d_out] = param.val().dims();
    LazyTensor::floats([d_out, d_in], move || {
        transpose(&values(param.val()), [d_in, d_out])
    })
}

fn values<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    let values = t.into_data().convert::<f32>().try_into_vec();
    values.expect("converted to f32")
}

/// The scales of a double-quantized weight.
fn double_scales(weight: &QuantTensor) -> &DoubleScaleParams {
    let scales = weight.double_scales();
    scales.expect("the format has a double quantization")
}

fn quant_error(path: &str) -> impl Fn(quant_core::Error) -> Error {
    move |source| {
        let path = path.into();
        peft::Error::Quant { path, source }.into()
    }
}

fn refuse_config(path: &Path, problem: String) -> Error {
    Error::Config {
        path: path.into(),
        setting: "quantization_config".into(),
        problem,
    }
}

/// The tensors of a directory, with a note of those that were asked for.
struct Tensors {
    shards: Shards,
    taken: HashSet<String>,
}

impl Tensors {
    fn contains(&self, name: &str) -> bool {
        self.shards.contains(name)
    }

    /// The values of a tensor of these dimensions.
    fn floats<const D: usize>(&mut self, name: &str, expected: [usize; D]) -> Result<Vec<f32>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.floats::<D>(&stored)?.0)
    }

    fn words<const D: usize>(&mut self, name: &str, expected: [usize; D]) -> Result<Vec<u32>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.words::<D>(&stored)?.0)
    }

    fn bytes<const D: usize>(&mut self, name: &str, expected: [usize; D]) -> Result<Vec<u8>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.bytes::<D>(&stored)?.0)
    }

    /// A tensor of bytes that hold a text of any length.
    fn text(&mut self, name: &str) -> Result<Vec<u8>> {
        let (text, _) = self.shards.file(name)?.bytes::<1>(name)?;
        self.taken.insert(name.into());
        Ok(text)
    }

    /// The file of a tensor, which has these dimensions: known before any of it is read.
    fn take<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<&mut TensorFile> {
        let stored = self.shards.stored(name).to_string();
        self.taken.insert(stored.clone());
        let file = self.shards.file(name)?;
        match file.shape(&stored) {
            Some(found) if found != expected => {
                let problem =
                    format!("has the shape {found:?}, the configuration asks for {expected:?}");
                Err(file.refuse(name, problem).into())
            }
            _ => Ok(file),
        }
    }

    /// Where a tensor is.
    fn path(&mut self, name: &str) -> PathBuf {
        let file = self.shards.file(name);
        file.map(|file| file.path().into()).unwrap_or_default()
    }

    fn refuse(&mut self, name: &str, problem: String) -> Error {
        match self.shards.file(name) {
            Ok(file) => file.refuse(name, problem).into(),
            Err(error) => error,
        }
    }
}

/// The parameters of a directory, frozen.
struct Checkpoint {
    tensors: Tensors,
    format: Option<Box<dyn LayerFormat>>,
    device: Device,
}

impl Checkpoint {
    fn frozen<const D: usize>(&self, values: Vec<f32>, dims: [usize; D]) -> Param<Tensor<D>> {
        let values = TensorData::new(values, dims);
        let values = Tensor::from_data(values, (&self.device, DType::F32));
        Param::from_tensor(values).set_require_grad(false)
    }

    fn plain(&mut self, path: &str, dims @ [d_in, d_out]: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let name = format!("{path}.weight");
        let values = self.tensors.floats(&name, [d_out, d_in])?;
        Ok(self.frozen(transpose(&values, [d_out, d_in]), dims))
    }

    /// Refuses tensors that the model has not taken, but for those that say nothing new.
    fn check_leftovers(&mut self, model: &Model) -> Result<()> {
        let linears: HashSet<String> = model.linears().into_iter().map(|(path, _)| path).collect();
        for name in self.tensors.shards.names() {
            if self.tensors.taken.contains(&name) || name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            if name == "lm_head.weight" && model.lm_head.is_none() {
                let embedding = model.embed_tokens.val();
                let head = self.tensors.floats(&name, embedding.dims())?;
                if head == values(embedding) {
                    continue;
                }
                let problem = "is another matrix than the embedding, but `tie_word_embeddings` is true: correct the one that is wrong";
                return Err(self.tensors.refuse(&name, problem.into()));
            }
            // AutoGPTQ writes a bias of zeros for layers that have none.
            if name
                .strip_suffix(".bias")
                .is_some_and(|path| linears.contains(path))
            {
                let (bias, [_]) = self.tensors.shards.file(&name)?.floats(&name)?;
                if bias.iter().all(|&value| value == 0.0) {
                    continue;
                }
            }
            let path = self.tensors.path(&name);
            return Err(Error::UnexpectedTensor { path, tensor: name });
        }
        Ok(())
    }
}

impl Source for Checkpoint {
    type Error = Error;

    fn vector(&mut self, path: &str, kind: Vector, len: usize) -> Result<Param<Tensor<1>>> {
        let values = self.tensors.floats(&kind.name(path), [len])?;
        Ok(self.frozen(values, [len]))
    }

    fn table(&mut self, path: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let values = self.tensors.floats(&weight_name(path), dims)?;
        Ok(self.frozen(values, dims))
    }

    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight> {
        let packed = match &self.format {
            Some(format) => format.read(&mut self.tensors, path, dims, &self.device)?,
            None => None,
        };
        match packed {
            Some(weight) => Ok(Weight::Quant(weight)),
            None => self.plain(path, dims).map(Weight::Dense),
        }
    }

    fn head(&mut self, dims: [usize; 2]) -> Result<Weight> {
        let format = self.format.as_ref();
        if let Some(tensor) = format.and_then(|format| format.stray_head(&self.tensors)) {
            return Err(Error::PackedLayer {
                path: self.tensors.path(&tensor),
                tensor,
                layer: HEAD.into(),
            });
        }
        self.weight(HEAD, dims)
    }
}
