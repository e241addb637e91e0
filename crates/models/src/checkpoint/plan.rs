//! What quantizing a directory will give, from its configuration and the headers of its files.

use std::fmt;
use std::path::Path;

use peft::{Recipe, check_paths};
use quant_core::Format;
use serde_json::{Map, Value};

use super::shards::Shards;
use super::{CONFIG, CheckpointFormat};
use crate::{Config, Error, Result};

/// What [`plan`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The projections, in the order in which they are quantized.
    pub layers: Vec<PlannedLayer>,
}

/// One projection of a [`Plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedLayer {
    /// The layer.
    pub path: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// The format that it will have; none if it stays dense.
    pub format: Option<Format>,
    /// Bytes of its weight in that format, of a dense one in `f32`. An order of inputs, which
    /// [`quant_core::Order::DescendingRegrouped`] gives, is not counted.
    pub n_bytes: u64,
}

impl Plan {
    /// Bytes of all projections.
    pub fn n_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.n_bytes).sum()
    }

    /// Bytes of all projections in `f32`.
    pub fn n_bytes_dense(&self) -> u64 {
        self.layers.iter().map(PlannedLayer::n_bytes_dense).sum()
    }
}

impl PlannedLayer {
    /// Bytes of its weight in `f32`.
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

/// Lists what quantizing the model in `dir` by `recipe` will give, before a tensor is read.
///
/// # Errors
/// [`Error::Plan`] with every layer that cannot be quantized so and the reason; the errors of
/// [`load`](crate::load) that a configuration or a header gives.
pub fn plan(dir: impl AsRef<Path>, recipe: &impl Recipe) -> Result<Plan> {
    let dir = dir.as_ref();
    let config_path = dir.join(CONFIG);
    let mut config: Map<String, Value> = tensor_files::read_json(&config_path)?;
    // A method that is not known here would leave no layer to be quantized.
    CheckpointFormat::open(dir, config.remove("quantization_config"))?;
    let config = Config::from_json(&config, &config_path)?;
    let mut shards = Shards::open(dir)?;
    let paths: Vec<String> = config
        .projections()
        .into_iter()
        .map(|(path, _)| path)
        .collect();
    check_paths(recipe, &paths)?;
    let (mut layers, mut problems) = (Vec::new(), Vec::new());
    for (path, dims) in config.projections() {
        match planned(&path, dims, recipe, &mut shards) {
            Ok(layer) => layers.push(layer),
            Err(problem) => problems.push((path, problem)),
        }
    }
    match problems.is_empty() {
        true => Ok(Plan { layers }),
        false => Err(Error::Plan { layers: problems }),
    }
}

fn planned(
    path: &str,
    dims @ [d_in, d_out]: [usize; 2],
    recipe: &impl Recipe,
    shards: &mut Shards,
) -> Result<PlannedLayer, String> {
    let tensor = format!("{path}.weight");
    let marks = [format!("{path}.qweight"), format!("{path}.weight.absmax")];
    if marks.iter().any(|mark| shards.contains(mark)) {
        return Err("is quantized already".into());
    }
    let stored = shards.stored(&tensor).to_string();
    let file = shards.file(&tensor).map_err(|error| error.to_string())?;
    let found = file.shape(&stored).unwrap_or_default();
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
