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

    /// Whether the head may be packed, and not only projections.
    fn packs_head(&self) -> bool {
        false
    }

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

    /// The tensors of a packed layer of the model for which the format was made.
    fn tensors<'a>(&self, path: &str, weight: &'a QuantTensor) -> Vec<(String, LazyTensor<'a>)>;

    /// The `quantization_config` of `config.json`.
    fn config(&self) -> Value;

    /// The name of a file that repeats the configuration, if readers look for one.
    fn config_file(&self) -> Option<&'static str> {
        None
    }
}

/// The packed and the dense weights of a model to be written.
pub(super) struct Projections<'a> {
    pub(super) packed: Vec<(String, &'a QuantTensor)>,
    pub(super) dense: Vec<String>,
    /// The head, if it is packed.
    pub(super) head: Option<&'a QuantTensor>,
}

/// The path of a packed layer, its format, and `[d_in, d_out]`.
pub(super) type PackedFormat<'a> = (&'a str, Format, [usize; 2]);

/// The layers that a format cannot hold, with the reasons.
pub(super) type Refusals = Vec<(String, String)>;

impl<'a> Projections<'a> {
    pub(super) fn of(model: &'a Model) -> Self {
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

    /// The formats of the packed projections.
    pub(super) fn formats(&self) -> Vec<PackedFormat<'_>> {
        let packed = self.packed.iter();
        packed
            .map(|(path, weight)| (path.as_str(), weight.format(), weight.dims()))
            .collect()
    }

    /// The refusal of a packed head by a format that only packs projections.
    pub(super) fn refuse_head(&self) -> Option<(String, String)> {
        let head = self.head?.format();
        let reason = format!("is {head}, and in such a checkpoint only projections are packed");
        Some((HEAD.into(), reason))
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
