//! The result of quantizing a directory, from its configuration and the headers of its files.

use std::fmt;
use std::path::Path;

use peft::{Recipe, check_paths};
use quant_core::Format;
use serde_json::{Map, Value};

use super::directory::CONFIG;
use super::format::LayerFormat;
use super::formats::undeclared_tensor;
use super::kind::CheckpointFormat;
use super::tensors::Tensors;
use crate::source::weight_name;
use crate::{CheckpointError, Config, Result};

/// The result of quantizing a model, computed by [`plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The projections, in the order in which they are quantized.
    pub layers: Vec<PlannedLayer>,
}

/// One projection of a [`Plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedLayer {
    /// The path of the layer.
    pub path: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// The format of the packed weight; `None` if the layer stays dense.
    pub format: Option<Format>,
    /// The size of the weight, in bytes; of a dense one in `f32`. The input order that
    /// [`quant_core::Order::DescendingRegrouped`] gives is not counted.
    pub n_bytes: u64,
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
        let layers = self.layers.iter();
        let layers: Vec<_> = layers
            .filter_map(|layer| Some((layer.path.as_str(), layer.format?, layer.dims)))
            .collect();
        let refusals = format.refusals(&layers);
        if refusals.is_empty() {
            return Ok(());
        }
        let error = CheckpointError::CannotHold {
            format,
            layers: refusals,
            instead: CheckpointFormat::instead(|other| other.refusals(&layers).is_empty()),
        };
        Err(error.into())
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

/// Computes the result of quantizing the model in `dir` by `recipe`, without reading a tensor.
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
pub fn plan(dir: impl AsRef<Path>, recipe: &impl Recipe) -> Result<Plan> {
    let dir = dir.as_ref();
    let config_path = dir.join(CONFIG);
    let mut config: Map<String, Value> = tensor_files::read_json(&config_path)?;
    let packed = CheckpointFormat::open(dir, config.remove("quantization_config"))?;
    let config = Config::from_json(&config, &config_path)?;
    let mut tensors = Tensors::open(dir)?;
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
        Ok(Plan { layers })
    } else {
        Err(CheckpointError::Plan { layers: problems }.into())
    }
}

fn planned(
    path: &str,
    dims @ [d_in, d_out]: [usize; 2],
    recipe: &impl Recipe,
    packed: Option<&dyn LayerFormat>,
    tensors: &mut Tensors,
) -> Result<PlannedLayer, String> {
    let packed_tensor = match packed {
        Some(format) => format.packed_tensor(tensors, path),
        None => undeclared_tensor(tensors, path),
    };
    if packed_tensor.is_some() {
        return Err("is quantized already".into());
    }
    let tensor = weight_name(path);
    let found = tensors.shape(&tensor).map_err(|error| error.to_string())?;
    if found != [d_out, d_in] {
        return Err(format!(
            "`{tensor}` has the shape {found:?}, the configuration asks for [{d_out}, {d_in}]"
        ));
    }
    let format = match recipe.quantizer(path) {
        Some(quantizer) => Some(quantizer.format().map_err(|error| error.to_string())?),
        None => None,
    };
    let mut layer = PlannedLayer {
        path: path.into(),
        dims,
        format,
        n_bytes: 0,
    };
    layer.n_bytes = match format {
        Some(format) => format.n_bytes(dims).map_err(|error| error.to_string())?,
        None => layer.n_bytes_dense(),
    };
    Ok(layer)
}
