use std::path::Path;

use burn::tensor::Device;
use peft::{Linears, Weight};
use quant_core::{DoubleScaleParams, Format, QuantTensor};
use serde_json::Value;
use tensor_files::LazyTensor;

use super::tensors::Tensors;
use crate::source::HEAD;
use crate::{ConfigError, Error, Model, Result};

/// The format of packed layers in files, read from a configuration or made for a model.
pub(super) trait LayerFormat {
    /// The name of one of the tensors of the layer at `path`, if it is packed.
    fn packed_tensor(&self, tensors: &Tensors, path: &str) -> Option<String>;

    /// Checks the layers of the configuration against those of the model.
    fn check_paths(&self, _layers: &[String], _config: &Path) -> Result<()> {
        Ok(())
    }

    /// The format of the layer at `path`, `[d_in, d_out]`, without its values; `None` if it is dense.
    fn format(&self, tensors: &mut Tensors, path: &str, dims: [usize; 2])
    -> Result<Option<Format>>;

    /// Reads the weight `[d_in, d_out]` of the layer at `path`; `None` if it is dense.
    fn read(
        &self,
        tensors: &mut Tensors,
        path: &str,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Option<QuantTensor>>;

    /// The tensors of a packed layer of the model for which the format was made, which holds its values.
    fn tensors<'a>(&self, path: &str, weight: &'a QuantTensor) -> Vec<(String, LazyTensor<'a>)>;

    /// The `quantization_config` of `config.json`.
    fn config(&self) -> Value;

    /// The name of a file that repeats the configuration, if readers look for one.
    fn config_file(&self) -> Option<&'static str> {
        None
    }
}

/// A packed layer to be written, without its values.
#[derive(Clone, Debug)]
pub(super) struct PackedLayer {
    pub(super) path: String,
    pub(super) format: Format,
    /// `[d_in, d_out]`.
    pub(super) dims: [usize; 2],
    /// Whether its inputs are in another order than those of the model.
    pub(super) has_order: bool,
}

/// The layers of a model to be written, without their values.
#[derive(Clone, Debug, Default)]
pub(super) struct Layers {
    /// The packed projections, in the order of the model.
    pub(super) packed: Vec<PackedLayer>,
    /// The paths of the dense ones.
    pub(super) dense: Vec<String>,
    /// The head, if it is packed.
    pub(super) head: Option<PackedLayer>,
}

/// The layers that a format cannot hold, with the reasons.
pub(super) type Refusals = Vec<(String, String)>;

impl PackedLayer {
    pub(super) fn new(path: &str, weight: &QuantTensor) -> Self {
        Self {
            path: path.into(),
            format: weight.format(),
            dims: weight.dims(),
            has_order: weight.input_order().is_some(),
        }
    }
}

impl Layers {
    pub(super) fn of(model: &Model) -> Self {
        let mut layers = Self::default();
        let linears = model.linears().into_iter();
        let linears = linears.map(|(path, linear)| (path, linear.weight()));
        for (path, weight) in linears.chain(model.other_weights()) {
            layers.push(path, weight);
        }
        layers
    }

    /// Adds a layer of the model. The head counts if it is packed.
    pub(super) fn push(&mut self, path: String, weight: &Weight) {
        match weight {
            Weight::Quant(weight) if path == HEAD => {
                self.head = Some(PackedLayer::new(&path, weight));
            }
            Weight::Quant(weight) => self.packed.push(PackedLayer::new(&path, weight)),
            Weight::Dense(_) if path == HEAD => {}
            Weight::Dense(_) => self.dense.push(path),
        }
    }

    /// Whether a layer is packed.
    pub(super) fn is_packed(&self) -> bool {
        !self.packed.is_empty() || self.head.is_some()
    }
}

/// Adds the path of a layer to an error.
pub(super) fn quant_error(path: &str) -> impl Fn(quant_core::Error) -> Error {
    move |source| {
        let path = path.into();
        peft::Error::Quant { path, source }.into()
    }
}

/// An error about the `quantization_config` in a file.
pub(super) fn refuse_config(path: &Path, problem: String) -> Error {
    ConfigError::setting(path, "quantization_config", problem).into()
}

/// The scales of a double-quantized weight.
pub(super) fn double_scales(weight: &QuantTensor) -> &DoubleScaleParams {
    let scales = weight.double_scales();
    scales.expect("the format has a double quantization")
}
