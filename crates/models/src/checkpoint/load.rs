use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft::{Certificate, Linears, Weight};
use serde_json::{Map, Value};
use tensor_files::{FloatType, Floats};

use super::directory::{CERTIFICATE, CONFIG, carried, stop_tokens, tokenizer_digest};
use super::format::LayerFormat;
use super::formats::{Weights, open};
use super::gguf;
use super::names::is_buffer;
use super::packing::transpose;
use super::tensors::Tensors;
use crate::architecture::Shape;
use crate::model::check_compute;
use crate::source::{HEAD, Source, Vector, weight_name};
use crate::{CheckpointError, Config, Error, Model, Pretrained, Result, Tokenizer};

/// Loads a model from a directory with `config.json` and weights, and `tokenizer.json` if it has one; or from
/// a GGUF file of llama.cpp, or the first of a set of them.
///
/// Packed layers may be in any [`CheckpointFormat`](crate::CheckpointFormat) and stay packed. The
/// input order of GPTQ (`desc_act`) and the double quantization of bitsandbytes are kept. A
/// bitsandbytes layer whose blocks straddle rows gets groups of the greatest common divisor of a row
/// and a block.
///
/// GGUF files are those of the architectures `llama` and `qwen2`. Layers in Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0
/// stay packed, in groups of 32; K-quants, and the embedding, become `f32`. The shape, the tokenizer and the
/// chat template are those of the metadata; a pre-tokenizer that is not known is refused.
///
/// The model computes in `f32`: see [`load_as`]. All parameters are frozen. Dense weights and embeddings
/// are in memory in the type of their file, such as `bf16`, where the device has it; norms, biases, scales
/// and zeros are `f32`. To train a dense weight, cast it to `f32` first. A `certificate.json` is read and
/// not checked against the model: see [`load_verified`](crate::load_verified).
///
/// # Errors
/// If a file is missing, damaged or does not fit the configuration.
/// [`CheckpointError::StaleQuantization`] if a quantization is stated and all weights are dense,
/// [`CheckpointError::UnstatedQuantization`] for packed weights without a configuration. Errors of GPTQ's
/// format are [`CheckpointError::GptqVersion`] if neither the configuration nor the zero-points tell the
/// representation of zero-points, [`ConfigError::Disagreement`](crate::ConfigError::Disagreement) if
/// `config.json` and `quantize_config.json` differ, and [`CheckpointError::WrappedZeros`].
///
/// # Examples
/// ```no_run
/// let lm = models::load("Llama-2-7b-hf", &burn::tensor::Device::flex())?;
/// println!("{} tokens", lm.model.config().vocab_size());
/// # Ok::<(), models::Error>(())
/// ```
/// ```
/// let error = models::load("no-such-directory", &burn::tensor::Device::flex()).unwrap_err();
/// assert!(error.to_string().starts_with("`no-such-directory/config.json`: "));
/// ```
pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Pretrained> {
    load_as(dir, device, FloatType::F32)
}

/// Loads a model that computes in a type of float; otherwise as [`load`].
///
/// Activations are of this type. Norms, softmax and losses are computed in `f32`, and what adapters train
/// stays `f32`: certificates and merges are those of a model that computes in `f32`.
///
/// # Errors
/// [`ConfigError::Compute`](crate::ConfigError::Compute) if the device does not compute in this type;
/// otherwise as [`load`].
///
/// # Examples
/// ```no_run
/// let device = burn::tensor::Device::flex();
/// let lm = models::load_as("Llama-2-7b-hf", &device, models::FloatType::Bf16)?;
/// # Ok::<(), models::Error>(())
/// ```
pub fn load_as(dir: impl AsRef<Path>, device: &Device, compute: FloatType) -> Result<Pretrained> {
    check_compute(compute, device)?;
    let dir = dir.as_ref();
    if dir.is_file() {
        let mut lm = gguf::file(dir, device)?;
        lm.model.compute = compute;
        return Ok(lm);
    }
    let config_path = dir.join(CONFIG);
    let mut config: Map<String, Value> = tensor_files::read_json(&config_path)?;
    let quantization = config.shift_remove("quantization_config");
    let shape = Config::from_json(&config, &config_path)?;
    let tokenizer = Tokenizer::read(dir)?;
    let stated = (&config, config_path.as_path());
    let mut model = match gguf::load(dir, quantization.as_ref(), stated, &shape, device)? {
        Some(model) => model,
        None => safetensors(dir, quantization, shape, device)?,
    };
    let carried = carried(dir)?;
    let stop_tokens = stop_tokens(dir, &config, &carried, model.config().vocab_size())?;
    model.tokenizer = tokenizer_digest(&carried);
    model.compute = compute;
    let certificate = dir.join(CERTIFICATE);
    let certificate = if tensor_files::is_there(&certificate) {
        Some(Certificate::load(&certificate)?)
    } else {
        None
    };
    Ok(Pretrained {
        model,
        tokenizer,
        certificate,
        dir: dir.into(),
        config,
        carried,
        stop_tokens,
        special: OnceLock::new(),
    })
}

/// Builds the model of a directory with safetensors files.
fn safetensors(
    dir: &Path,
    quantization: Option<Value>,
    shape: Config,
    device: &Device,
) -> Result<Model> {
    let mut checkpoint = Checkpoint::new(open(dir, quantization, &shape)?, device);
    let model = Model::build(shape, &mut checkpoint)?;
    let linears = model.linears().into_iter().map(|(path, _)| path);
    let others = model.other_weights().into_iter().map(|(path, _)| path);
    let layers: Vec<String> = linears.chain(others).collect();
    checkpoint.check_paths(&layers, &dir.join(CONFIG))?;
    let leftovers = checkpoint.tensors.leftovers();
    checkpoint.check_leftovers(model.config(), leftovers)?;
    Ok(model)
}

/// A source of the parameters of a directory, which are frozen.
pub(super) struct Checkpoint {
    pub(super) tensors: Tensors,
    format: Option<Box<dyn LayerFormat>>,
    device: Device,
}

impl Checkpoint {
    pub(super) fn new(weights: Weights, device: &Device) -> Self {
        Self {
            tensors: weights.tensors,
            format: weights.format,
            device: device.clone(),
        }
    }

    /// Checks the layers of the format's configuration, in the file `config`, against those of a model.
    pub(super) fn check_paths(&self, layers: &[String], config: &Path) -> Result<()> {
        let mut format = self.format.iter();
        format.try_for_each(|format| format.check_paths(layers, config))
    }

    /// The name of a tensor of the layer at `path`, if it is packed.
    pub(super) fn packed_tensor(&self, path: &str) -> Option<String> {
        let format = self.format.as_ref()?;
        format.packed_tensor(&self.tensors, path)
    }

    /// A parameter of the type of the values, or of `f32` where the device does not have that.
    fn frozen<const D: usize>(&self, values: Floats, dims: [usize; D]) -> Param<Tensor<D>> {
        let (data, dtype) = match values {
            Floats::F32(values) => (TensorData::new(values, dims), DType::F32),
            Floats::F16(values) => (TensorData::new(values, dims), DType::F16),
            Floats::Bf16(values) => (TensorData::new(values, dims), DType::BF16),
        };
        let dtype = if self.device.supports_dtype(dtype) {
            dtype
        } else {
            DType::F32
        };
        let values = Tensor::from_data(data.convert_dtype(dtype), (&self.device, dtype));
        Param::from_tensor(values).set_require_grad(false)
    }

    fn plain(&mut self, path: &str, dims @ [d_in, d_out]: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let stored = [d_out, d_in];
        let values = self.tensors.typed_floats(&weight_name(path), stored)?;
        let values = match values {
            Floats::F32(values) => Floats::F32(transpose(&values, stored)),
            Floats::F16(values) => Floats::F16(transpose(&values, stored)),
            Floats::Bf16(values) => Floats::Bf16(transpose(&values, stored)),
        };
        Ok(self.frozen(values, dims))
    }

    /// Refuses tensors that a model of this shape does not read, except those without information.
    pub(super) fn check_leftovers(
        &mut self,
        config: &Config,
        leftovers: Vec<String>,
    ) -> Result<()> {
        let shape = config.shape();
        let modules = config.block_modules().map(|(path, _)| path);
        let norm = shape.has_final_norm.then(|| shape.norm_path());
        let modules = modules.chain(norm).chain([HEAD.to_string()]);
        let biases: HashSet<String> = modules.map(|path| Vector::Bias.name(&path)).collect();
        let of_head = format!("{HEAD}.");
        for name in leftovers {
            if is_buffer(&name) {
                continue;
            }
            // AutoGPTQ writes a bias of zeros for layers without a bias.
            if biases.contains(&name) && self.tensors.vector(&name)?.iter().all(|&b| b == 0.0) {
                continue;
            }
            if name.starts_with(&of_head) && shape.tie_word_embeddings {
                if name == weight_name(HEAD) && self.is_embedding(&name, &shape)? {
                    continue;
                }
                let problem = "is another matrix than the embedding, but `tie_word_embeddings` is true: correct the one that is wrong";
                return Err(self.tensors.refuse(&name, problem.into()));
            }
            let path = self.tensors.path(&name);
            let tensor = self.tensors.name_in_file(&name);
            return Err(CheckpointError::UnexpectedTensor { path, tensor }.into());
        }
        Ok(())
    }

    /// Whether a tensor has the values of the embedding, in the same type or in another.
    fn is_embedding(&mut self, name: &str, shape: &Shape) -> Result<bool> {
        let embedding = weight_name(&shape.embedding_path());
        if self.tensors.sha256(name)? == self.tensors.sha256(&embedding)? {
            return Ok(true);
        }
        let dims = [shape.vocab_size, shape.embedding_width];
        let values = self.tensors.floats(name, dims)?;
        Ok(values == self.tensors.floats(&embedding, dims)?)
    }
}

impl Source for Checkpoint {
    type Error = Error;

    fn vector(&mut self, path: &str, kind: Vector, len: usize) -> Result<Param<Tensor<1>>> {
        // In `f32`: there are few, and a bias may be trained.
        let values = self.tensors.floats(&kind.name(path), [len])?;
        Ok(self.frozen(Floats::F32(values), [len]))
    }

    fn table(&mut self, path: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let values = self.tensors.typed_floats(&weight_name(path), dims)?;
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
        self.weight(HEAD, dims)
    }
}
