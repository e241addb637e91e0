//! The result of quantizing a directory, from its configuration and the headers of its files.
//!
//! With a recipe that quantizes nothing, that is the directory as it is.

mod memory;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use peft::{Linear, Method, Recipe, Weight, check_paths};
use quant_core::{Format, Grid, Parts, QuantTensor};
use serde_json::{Map, Value};

use super::directory::CONFIG;
use super::format::{LayerFormat, Layers, PackedLayer, quant_error};
use super::formats::{Weights, open};
use super::kind::CheckpointFormat;
use super::tensors::Tensors;
use crate::source::{HEAD, weight_name};
use crate::{CheckpointError, Config, Result, TextError, Tokenizer, Windows};

/// The result of quantizing a model, computed by [`plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The projections, in the order in which they are quantized.
    pub layers: Vec<PlannedLayer>,
    /// The shape of the model.
    pub config: Config,
    /// The directory of the model.
    pub dir: PathBuf,
    /// The bytes of the embedding and of the head.
    pub(super) copied: Vec<u64>,
}

/// One projection of a [`Plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedLayer {
    /// The path of the layer.
    pub path: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// The format of the packed weight; `None` if the layer is dense.
    pub format: Option<Format>,
    /// The size of the weight, in bytes; of a dense one in `f32`. The input order that
    /// [`quant_core::Order::DescendingRegrouped`] gives is not counted.
    pub n_bytes: u64,
    /// The size of the weight in the files of the model, in bytes.
    pub n_bytes_stored: u64,
}

impl Plan {
    /// Checks that a checkpoint of this format can hold the planned layers, as far as their formats tell.
    ///
    /// Values decide the rest: [`save_as`](crate::save_as) can refuse scales that are not `f16`, or zeros
    /// that are not whole.
    ///
    /// # Errors
    /// [`CheckpointError::CannotHold`] with all layers that it cannot hold.
    pub fn check(&self, format: CheckpointFormat) -> Result<()> {
        format.check(&self.packed())
    }

    /// The layers as they are to be written. Whether one has an input order is not known.
    pub(super) fn packed(&self) -> Layers {
        let packed = self.layers.iter().filter_map(|layer| {
            Some(PackedLayer {
                path: layer.path.clone(),
                format: layer.format?,
                dims: layer.dims,
                has_order: false,
            })
        });
        Layers {
            packed: packed.collect(),
            ..Layers::default()
        }
    }

    /// Checks that a method can adapt the planned layers, on a weight of ones for each of their shapes.
    ///
    /// Values decide the rest: an adapter that merges into zeros refuses a group whose scale is 0.
    ///
    /// # Errors
    /// [`peft::Error::NoTarget`], or the error of [`Method::init`] for the first layer that it cannot
    /// adapt.
    pub fn check_method(&self, method: &(impl Method + ?Sized), device: &Device) -> Result<()> {
        let paths: Vec<String> = self.layers.iter().map(|layer| layer.path.clone()).collect();
        let targets: HashSet<String> = method.targets().among(&paths)?.into_iter().collect();
        let mut checked = HashSet::new();
        for layer in &self.layers {
            if targets.contains(&layer.path) && checked.insert((layer.dims, layer.format)) {
                let linear = Linear::new(layer.of_ones(device)?, None);
                method.init(&layer.path, &linear)?;
            }
        }
        Ok(())
    }

    /// The tokens of `text` in windows of `seq_len`, as [`Pretrained::windows`](crate::Pretrained::windows)
    /// gives them, without the model.
    ///
    /// # Errors
    /// [`TextError::SeqLen`] for windows that are longer than the model was trained for;
    /// [`TextError::ShortText`] for a text shorter than a window; [`TextError::NoTokenizer`]; as
    /// [`Tokenizer::read`] and [`Tokenizer::encode`].
    pub fn windows(&self, text: &str, seq_len: usize) -> Result<Windows> {
        Windows::new(self.tokenizer(seq_len)?.encode(text)?, seq_len)
    }

    /// Checks that a text fills a window, as [`Plan::windows`] does; no more of it becomes tokens than is
    /// needed.
    ///
    /// # Errors
    /// As [`Plan::windows`].
    pub fn check_text(&self, text: &str, seq_len: usize) -> Result<()> {
        let tokenizer = self.tokenizer(seq_len)?;
        // Tokens are a few bytes long.
        let beginning = text.floor_char_boundary(64 * seq_len);
        if tokenizer.encode(&text[..beginning])?.len() < seq_len {
            Windows::new(tokenizer.encode(text)?, seq_len)?;
        }
        Ok(())
    }

    /// The tokenizer of the directory, for windows that the model can have.
    fn tokenizer(&self, seq_len: usize) -> Result<Tokenizer> {
        let max = self.config.max_seq_len();
        if !(2..=max).contains(&seq_len) {
            return Err(TextError::SeqLen { seq_len, max }.into());
        }
        Tokenizer::read(&self.dir)?.ok_or_else(|| {
            let dir = self.dir.clone();
            TextError::NoTokenizer { dir }.into()
        })
    }

    /// Whether a projection is packed.
    pub fn is_packed(&self) -> bool {
        self.layers.iter().any(|layer| layer.format.is_some())
    }

    /// The size of all projections, in bytes.
    pub fn n_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.n_bytes).sum()
    }

    /// The size of all projections in `f32`, in bytes.
    pub fn n_bytes_dense(&self) -> u64 {
        self.layers.iter().map(PlannedLayer::n_bytes_dense).sum()
    }
}

impl PlannedLayer {
    /// The size of the weight in `f32`, in bytes.
    pub fn n_bytes_dense(&self) -> u64 {
        4 * self.dims[0] as u64 * self.dims[1] as u64
    }

    /// A weight of the planned shape and format whose scales are 1.
    fn of_ones(&self, device: &Device) -> Result<Weight> {
        let Some(format) = self.format else {
            return Ok(Weight::frozen(Tensor::ones(self.dims, device)));
        };
        let quant = quant_error(&self.path);
        let format = format.without_double_quant();
        let layout = format.layout(self.dims).map_err(&quant)?;
        let ones = vec![1.0; layout.grid_shape().iter().product()];
        let zeros = (format.grid() == Grid::Affine).then(|| ones.clone());
        let words = vec![0; layout.words_shape().iter().product()];
        let parts = Parts::new(words, ones, zeros);
        let weight = QuantTensor::from_parts(parts, format, self.dims, device);
        Ok(Weight::Quant(weight.map_err(quant)?))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for layer in &self.layers {
            let [d_in, d_out] = layer.dims;
            write!(f, "{}: {d_in} x {d_out}, ", layer.path)?;
            match layer.format {
                Some(format) => write!(f, "{format}")?,
                None => write!(f, "dense")?,
            }
            writeln!(f, ", {} bytes", layer.n_bytes)?;
        }
        let (n, n_bytes, dense) = (self.layers.len(), self.n_bytes(), self.n_bytes_dense());
        let share = 100.0 * n_bytes as f64 / dense as f64;
        write!(f, "{n} layers: {n_bytes} bytes, {share:.1} % of f32")
    }
}

/// Computes the result of quantizing the model in `dir` by `recipe`, without reading a weight.
///
/// Layers for which the recipe has no quantizer stay as they are, dense or packed: an empty
/// [`PerLayer`](peft::PerLayer) gives the formats of a packed directory. A layer of a GPTQ checkpoint
/// that does not state `sym` counts as affine.
///
/// # Errors
/// [`CheckpointError::Plan`] with every layer that cannot be quantized and the reason; otherwise as
/// [`load`](crate::load) for configurations and headers.
///
/// # Examples
/// ```no_run
/// use quant_core::Rtn;
///
/// let plan = models::plan("Llama-2-7b-hf", &Rtn::new().with_group_size(128))?;
/// println!("{plan}");
/// // A projection has 4096 inputs.
/// assert!(models::plan("Llama-2-7b-hf", &Rtn::new().with_group_size(8192)).is_err());
/// # Ok::<(), models::Error>(())
/// ```
pub fn plan(dir: impl AsRef<Path>, recipe: &(impl Recipe + ?Sized)) -> Result<Plan> {
    let dir = dir.as_ref();
    let config_path = dir.join(CONFIG);
    let mut config: Map<String, Value> = tensor_files::read_json(&config_path)?;
    let quantization = config.shift_remove("quantization_config");
    let config = Config::from_json(&config, &config_path)?;
    let Weights {
        mut tensors,
        format: packed,
    } = open(dir, quantization, &config)?;
    let (paths, dims): (Vec<_>, Vec<_>) = config.projections().into_iter().unzip();
    check_paths(recipe, &paths)?;
    let (mut layers, mut problems) = (Vec::new(), Vec::new());
    for (path, dims) in paths.into_iter().zip(dims) {
        match planned(&path, dims, recipe, packed.as_deref(), &mut tensors) {
            Ok(layer) => layers.push(layer),
            Err(problem) => problems.push((path, problem)),
        }
    }
    if problems.is_empty() {
        Ok(Plan {
            layers,
            copied: copied(&config, &mut tensors),
            config,
            dir: dir.into(),
        })
    } else {
        Err(CheckpointError::Plan { layers: problems }.into())
    }
}

/// The bytes of the tensors beside the projections that are not small.
fn copied(config: &Config, tensors: &mut Tensors) -> Vec<u64> {
    let embedding = config.shape().embedding_path();
    let names = [embedding.as_str(), HEAD].map(weight_name);
    let sizes = names.iter().filter_map(|name| tensors.n_bytes(name).ok());
    sizes.collect()
}

fn planned(
    path: &str,
    dims @ [d_in, d_out]: [usize; 2],
    recipe: &(impl Recipe + ?Sized),
    packed: Option<&dyn LayerFormat>,
    tensors: &mut Tensors,
) -> Result<PlannedLayer, String> {
    let quantizer = recipe.quantizer(path);
    let stored = match packed {
        Some(format) => format.format(tensors, path, dims),
        None => Ok(None),
    };
    let stored = stored.map_err(|error| error.to_string())?;
    if stored.is_some() && quantizer.is_some() {
        return Err("is quantized already".into());
    }
    if let Some(format) = stored {
        let n_bytes = format.n_bytes(dims).map_err(|error| error.to_string())?;
        return Ok(PlannedLayer {
            path: path.into(),
            dims,
            format: Some(format),
            n_bytes,
            n_bytes_stored: n_bytes,
        });
    }
    let tensor = weight_name(path);
    let found = tensors.shape(&tensor).map_err(|error| error.to_string())?;
    if found != [d_out, d_in] {
        return Err(format!(
            "`{tensor}` has the shape {found:?}, the configuration asks for [{d_out}, {d_in}]"
        ));
    }
    let format = match quantizer {
        Some(quantizer) => Some(quantizer.format().map_err(|error| error.to_string())?),
        None => None,
    };
    let mut layer = PlannedLayer {
        path: path.into(),
        dims,
        format,
        n_bytes: 0,
        n_bytes_stored: tensors.n_bytes(&tensor).unwrap_or(0),
    };
    layer.n_bytes = match format {
        Some(format) => format.n_bytes(dims).map_err(|error| error.to_string())?,
        None => layer.n_bytes_dense(),
    };
    Ok(layer)
}
