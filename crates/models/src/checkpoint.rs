//! Directories of models: Hugging Face's, and the workspace's exact format for packed weights.
//!
//! A packed layer is written as `PATH.qweight` (`[word_rows, d_out]`, GPTQ's words), `PATH.scales`
//! and, on an affine grid, `PATH.zeros`, floats of `[n_groups, d_out]`; `quantization_config` in
//! `config.json` has the format of each layer. Floats are in the shortest type that holds them
//! exactly, so that a saved model is the model, bit for bit.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft::files::{self, LazyTensor};
use peft::{Linear, Linears, Weight};
use quant_core::{Format, Parts, QuantTensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::llama::Source;
use crate::{Error, Llama, LlamaConfig, Result, Tokenizer, Windows};

mod shards;

use shards::Shards;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
/// Files that a saved model takes along, where there are any.
const CARRIED: [&str; 4] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
];

/// A model with its tokenizer and the files that go along.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The model.
    pub model: Llama,
    /// Its tokenizer, if the directory has one.
    pub tokenizer: Option<Tokenizer>,
    dir: PathBuf,
    /// `config.json`, without a quantization.
    config: Map<String, Value>,
    carried: BTreeMap<&'static str, Vec<u8>>,
}

/// `quantization_config` in `config.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Quantization {
    quant_method: String,
    format_version: u32,
    layers: BTreeMap<String, Format>,
}

const QUANT_METHOD: &str = "quant-core";
const FORMAT_VERSION: u32 = 1;

impl Pretrained {
    /// A new model with the tokenizer in the file at `tokenizer`.
    ///
    /// # Errors
    /// If the tokenizer cannot be read.
    ///
    /// # Panics
    /// If the model has a rope scaling: see [`LlamaConfig::to_json`].
    pub fn new(model: Llama, tokenizer: &Path) -> Result<Self> {
        let bytes = read(tokenizer)?;
        Ok(Self {
            config: model.config().to_json(),
            model,
            tokenizer: Some(Tokenizer::open(tokenizer)?),
            dir: tokenizer.parent().unwrap_or(tokenizer).into(),
            carried: [(TOKENIZER, bytes)].into(),
        })
    }

    /// The tokens of `text` in windows of `seq_len`.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`]; [`Error::SeqLen`] if the model was not made for such windows;
    /// [`Error::ShortText`] if the text does not fill one; [`Error::Token`] if the tokenizer gives
    /// one that the model lacks.
    pub fn windows(&self, text: &str, seq_len: usize) -> Result<Windows> {
        let config = self.model.config();
        let max = config.max_seq_len();
        if !(2..=max).contains(&seq_len) {
            return Err(Error::SeqLen { seq_len, max });
        }
        let Some(tokenizer) = &self.tokenizer else {
            let dir = self.dir.clone();
            return Err(Error::NoTokenizer { dir });
        };
        let tokens = tokenizer.encode(text)?;
        let vocab_size = config.vocab_size;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(Error::Token { token, vocab_size });
        }
        Windows::new(tokens, seq_len)
    }
}

/// Reads a directory: `config.json`, `tokenizer.json` and the weights, one tensor at a time.
///
/// Everything is frozen. Weights are `f32` in memory.
///
/// # Errors
/// If a file is missing, damaged or not what the configuration asks for.
pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Pretrained> {
    let dir = dir.as_ref();
    let config_path = dir.join(CONFIG);
    let mut config: Map<String, Value> = files::read_json(&config_path)?;
    let quantization = match config.remove("quantization_config") {
        None => BTreeMap::new(),
        Some(json) => quantization(json, &config_path)?,
    };
    let shape = LlamaConfig::from_json(&config, &config_path)?;
    let tokenizer = match dir.join(TOKENIZER).exists() {
        true => Some(Tokenizer::open(&dir.join(TOKENIZER))?),
        false => None,
    };
    let mut carried = BTreeMap::new();
    for name in CARRIED {
        if dir.join(name).exists() {
            carried.insert(name, read(&dir.join(name))?);
        }
    }
    let mut checkpoint = Checkpoint {
        shards: Shards::open(dir)?,
        taken: HashSet::new(),
        quantization,
        device: device.clone(),
    };
    let model = Llama::build(shape, &mut checkpoint)?;
    let linears: Vec<String> = model.linears().into_iter().map(|(path, _)| path).collect();
    if let Some(path) = checkpoint
        .quantization
        .keys()
        .find(|path| !linears.contains(path))
    {
        return Err(Error::Config {
            path: config_path,
            setting: "quantization_config".into(),
            problem: format!("lists `{path}`, which is no projection of the model"),
        });
    }
    checkpoint.check_leftovers(&model)?;
    Ok(Pretrained {
        model,
        tokenizer,
        dir: dir.into(),
        config,
        carried,
    })
}

fn quantization(json: Value, path: &Path) -> Result<BTreeMap<String, Format>> {
    let refuse = |problem: String| Error::Config {
        path: path.into(),
        setting: "quantization_config".into(),
        problem,
    };
    let method = json
        .get("quant_method")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if method != QUANT_METHOD {
        let problem = format!("has the method `{method}`; supported: {QUANT_METHOD}");
        return Err(refuse(problem));
    }
    let found: Quantization =
        serde_json::from_value(json).map_err(|error| refuse(format!("cannot be read: {error}")))?;
    if found.format_version != FORMAT_VERSION {
        let version = found.format_version;
        let problem = format!("has the version {version}; this program reads {FORMAT_VERSION}");
        return Err(refuse(problem));
    }
    Ok(found.layers)
}

/// Writes a new directory that [`load`] reads back bit for bit, whole or not at all.
///
/// Adapters are not written: merge them, or save them with [`peft::Adapters`].
///
/// # Errors
/// [`peft::Error::OutputExists`] if `dir` holds something, [`peft::Error::AlreadyAdapted`] if a
/// layer has an adapter, [`peft::Error::Io`] if the directory cannot be written.
pub fn save(lm: &Pretrained, dir: impl AsRef<Path>) -> Result<()> {
    let model = &lm.model;
    let linears = model.linears();
    if let Some((path, _)) = linears
        .iter()
        .find(|(_, linear)| linear.adapter().is_some())
    {
        return Err(peft::Error::AlreadyAdapted { path: path.clone() }.into());
    }
    let formats = linears.iter().filter_map(|(path, linear)| {
        let format = linear.weight().format()?;
        Some((path.clone(), format))
    });
    let layers: BTreeMap<String, Format> = formats.collect();
    let mut config = lm.config.clone();
    if !layers.is_empty() {
        let quantization = Quantization {
            quant_method: QUANT_METHOD.into(),
            format_version: FORMAT_VERSION,
            layers,
        };
        let quantization = serde_json::to_value(quantization).expect("strings and numbers");
        config.insert("quantization_config".into(), quantization);
    }

    files::write_directory(dir.as_ref(), |dir| {
        files::write_tensors(&dir.join(WEIGHTS), tensors(model))?;
        for (name, bytes) in &lm.carried {
            let path = dir.join(name);
            std::fs::write(&path, bytes).map_err(|source| peft::Error::Io { path, source })?;
        }
        files::write_json(&dir.join(CONFIG), &config)
    })?;
    Ok(())
}

/// The tensors of a model under Hugging Face's names.
fn tensors(model: &Llama) -> Vec<(String, LazyTensor<'_>)> {
    let mut all = vec![
        (
            "model.embed_tokens.weight".into(),
            floats(&model.embed_tokens),
        ),
        ("model.norm.weight".into(), floats(&model.norm.weight)),
    ];
    for (layer, block) in model.layers.iter().enumerate() {
        let path = format!("model.layers.{layer}");
        let name = format!("{path}.input_layernorm.weight");
        all.push((name, floats(&block.input_layernorm.weight)));
        let name = format!("{path}.post_attention_layernorm.weight");
        all.push((name, floats(&block.post_attention_layernorm.weight)));
    }
    if let Some(head) = &model.lm_head {
        all.push(("lm_head.weight".into(), transposed(head)));
    }
    for (path, linear) in model.linears() {
        all.extend(linear_tensors(&path, linear));
    }
    all
}

fn linear_tensors<'a>(path: &str, linear: &'a Linear) -> Vec<(String, LazyTensor<'a>)> {
    let name = |part: &str| format!("{path}.{part}");
    let mut all = match linear.weight() {
        Weight::Dense(weight) => vec![(name("weight"), transposed(weight))],
        Weight::Quant(weight) => {
            let (layout, grid) = (weight.layout(), weight.layout().grid_shape());
            let words = [layout.word_rows(), layout.d_out()];
            let words = LazyTensor::words(words, || weight.columns());
            let scales = LazyTensor::floats(grid, || values(weight.scales()));
            let mut all = vec![(name("qweight"), words), (name("scales"), scales)];
            if let Some(zeros) = weight.zeros() {
                let zeros = LazyTensor::floats(grid, move || values(zeros.clone()));
                all.push((name("zeros"), zeros));
            }
            all
        }
    };
    if let Some(bias) = linear.bias() {
        let dims = bias.dims();
        let values = move || values(bias.clone());
        all.push((name("bias"), LazyTensor::floats(dims, values)));
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

/// The transpose of `rows` by `columns`, block by block.
fn transpose(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    const BLOCK: usize = 32;
    let mut out = vec![0.0; values.len()];
    for first_row in (0..rows).step_by(BLOCK) {
        for first_column in (0..columns).step_by(BLOCK) {
            for row in first_row..rows.min(first_row + BLOCK) {
                for column in first_column..columns.min(first_column + BLOCK) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

/// The parameters of a directory, frozen.
struct Checkpoint {
    shards: Shards,
    /// The tensors that the model has asked for.
    taken: HashSet<String>,
    quantization: BTreeMap<String, Format>,
    device: Device,
}

impl Checkpoint {
    /// The values of a tensor of these dimensions.
    fn floats<const D: usize>(&mut self, name: &str, expected: [usize; D]) -> Result<Vec<f32>> {
        let file = self.shards.file(name)?;
        let (values, found) = file.floats::<D>(name)?;
        check_shape(file, name, expected, found)?;
        self.taken.insert(name.into());
        Ok(values)
    }

    fn words<const D: usize>(&mut self, name: &str, expected: [usize; D]) -> Result<Vec<u32>> {
        let file = self.shards.file(name)?;
        let (values, found) = file.words::<D>(name)?;
        check_shape(file, name, expected, found)?;
        self.taken.insert(name.into());
        Ok(values)
    }

    fn frozen<const D: usize>(&self, values: Vec<f32>, dims: [usize; D]) -> Param<Tensor<D>> {
        let values = TensorData::new(values, dims);
        let values = Tensor::from_data(values, (&self.device, DType::F32));
        Param::from_tensor(values).set_require_grad(false)
    }

    /// Refuses tensors that the model has not taken, but for those that say nothing new.
    fn check_leftovers(&mut self, model: &Llama) -> Result<()> {
        for name in self.shards.names() {
            if self.taken.contains(&name) || name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            if name == "lm_head.weight" {
                let embedding = model.embed_tokens.val();
                let head = self.floats(&name, embedding.dims())?;
                if head == values(embedding) {
                    continue;
                }
            }
            let path = self.shards.file(&name)?.path().into();
            return Err(Error::UnexpectedTensor { path, tensor: name });
        }
        Ok(())
    }
}

impl Source for Checkpoint {
    type Error = Error;

    fn vector(&mut self, name: &str, len: usize) -> Result<Param<Tensor<1>>> {
        let values = self.floats(name, [len])?;
        Ok(self.frozen(values, [len]))
    }

    fn table(&mut self, name: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let values = self.floats(name, dims)?;
        Ok(self.frozen(values, dims))
    }

    fn dense(&mut self, path: &str, dims @ [d_in, d_out]: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let values = self.floats(&format!("{path}.weight"), [d_out, d_in])?;
        Ok(self.frozen(transpose(&values, [d_out, d_in]), dims))
    }

    fn weight(&mut self, path: &str, dims @ [_, d_out]: [usize; 2]) -> Result<Weight> {
        let Some(&format) = self.quantization.get(path) else {
            return self.dense(path, dims).map(Weight::Dense);
        };
        let quant = |source| peft::Error::Quant {
            path: path.into(),
            source,
        };
        let layout = format.layout(dims).map_err(quant)?;
        let columns = self.words(&format!("{path}.qweight"), [layout.word_rows(), d_out])?;
        let grid = layout.grid_shape();
        let scales = self.floats(&format!("{path}.scales"), grid)?;
        let zeros = match format.grid() {
            quant_core::Grid::Affine => Some(self.floats(&format!("{path}.zeros"), grid)?),
            _ => None,
        };
        let parts = Parts::from_columns(&columns, &layout, scales, zeros).map_err(quant)?;
        let weight = QuantTensor::from_parts(parts, format, dims, &self.device).map_err(quant)?;
        Ok(Weight::Quant(weight))
    }
}

fn check_shape<const D: usize>(
    file: &files::TensorFile,
    name: &str,
    expected: [usize; D],
    found: [usize; D],
) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let problem = format!("has the shape {found:?}, the configuration asks for {expected:?}");
    Err(file.refuse(name, problem).into())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|source| peft::Error::Io {
        path: path.into(),
        source,
    });
    Ok(bytes?)
}
