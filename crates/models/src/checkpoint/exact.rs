//! The format of this workspace, which holds every packed weight exactly: projections and the head.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `PATH.qweight` | `[word_rows, d_out]` | GPTQ's words, rows as they are packed |
//! | `PATH.scales` | `[n_groups, d_out]` | if they are floats |
//! | `PATH.scale_codes` | `[d_out, n_groups]` | if they are double-quantized |
//! | `PATH.scale_absmax` | `[n_blocks]` | one for each block of codes |
//! | `PATH.scale_offset` | `[1]` | |
//! | `PATH.zeros` | `[n_groups, d_out]` | on an affine grid |
//! | `PATH.input_order` | `[d_in]` | the input of each packed row, if the layer has an order |
//!
//! `quantization_config` has the format of each layer. Floats are in the shortest type that holds
//! them exactly.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use quant_core::{DoubleScales, Format, Grid, Parts, QuantTensor, Scales};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tensor_files::LazyTensor;

use super::format::{LayerFormat, Layers, double_scales, quant_error, refuse_config};
use super::parameters::floats;
use super::tensors::Tensors;
use crate::Result;
use crate::settings::Settings;

pub(super) const METHOD: &str = "quant-core";
const VERSION: u32 = 1;

/// `quantization_config` in `config.json`.
#[derive(Serialize)]
pub(super) struct Exact {
    quant_method: String,
    format_version: u32,
    layers: BTreeMap<String, Layer>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Layer {
    #[serde(flatten)]
    format: Format,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    input_order: bool,
}

impl Exact {
    pub(super) fn open(json: &Value, config: &Path) -> Result<Self> {
        let settings = Settings::within(json, config, "quantization_config")?;
        settings.check_known(&["quant_method", "format_version", "layers"])?;
        match settings.optional_whole("format_version")? {
            Some(version) if version == i64::from(VERSION) => {}
            Some(version) => {
                let problem = format!("is {version}; this program reads {VERSION}");
                return Err(settings.refuse("format_version", problem));
            }
            None => return Err(settings.refuse("format_version", "is missing")),
        }
        let Some(Value::Object(layers)) = settings.value("layers") else {
            return Err(settings.refuse("layers", "is no object with the format of each layer"));
        };
        let layers = layers.iter().map(|(path, json)| {
            let layer = serde_json::from_value(json.clone()).map_err(|error| {
                settings.refuse(
                    &format!("layers.`{path}`"),
                    format!("cannot be read: {error}"),
                )
            });
            Ok((path.clone(), layer?))
        });
        Ok(Self {
            quant_method: METHOD.into(),
            format_version: VERSION,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    pub(super) fn for_layers(layers: &Layers) -> Self {
        let layers = layers.packed.iter().chain(&layers.head);
        let layers = layers.map(|layer| {
            let stated = Layer {
                format: layer.format,
                input_order: layer.has_order,
            };
            (layer.path.clone(), stated)
        });
        Self {
            quant_method: METHOD.into(),
            format_version: VERSION,
            layers: layers.collect(),
        }
    }
}

impl LayerFormat for Exact {
    fn packed_tensor(&self, _: &Tensors, path: &str) -> Option<String> {
        let is_packed = self.layers.contains_key(path);
        is_packed.then(|| format!("{path}.qweight"))
    }

    fn check_paths(&self, layers: &[String], config: &Path) -> Result<()> {
        match self.layers.keys().find(|path| !layers.contains(path)) {
            None => Ok(()),
            Some(path) => {
                let problem =
                    format!("lists `{path}`, which is no projection of the model and no head");
                Err(refuse_config(config, problem))
            }
        }
    }

    fn format(&self, _: &mut Tensors, path: &str, _: [usize; 2]) -> Result<Option<Format>> {
        Ok(self.layers.get(path).map(|layer| layer.format))
    }

    fn read(
        &self,
        tensors: &mut Tensors,
        path: &str,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Option<QuantTensor>> {
        let Some(&Layer {
            format,
            input_order,
        }) = self.layers.get(path)
        else {
            return Ok(None);
        };
        let quant = quant_error(path);
        let name = |part: &str| format!("{path}.{part}");
        let [d_in, d_out] = dims;
        let layout = format.layout(dims).map_err(&quant)?;
        let grid @ [n_groups, _] = layout.grid_shape();
        let columns = tensors.words(&name("qweight"), [layout.word_rows(), d_out])?;
        let scales = match format.double_quant() {
            None => Scales::Float(tensors.floats(&name("scales"), grid)?),
            Some(double) => {
                let n_blocks = (d_out * n_groups).div_ceil(double.block_size);
                let [offset] = tensors.floats(&name("scale_offset"), [1])?[..] else {
                    unreachable!("the shape was checked");
                };
                Scales::Double(DoubleScales {
                    codes: tensors.bytes(&name("scale_codes"), [d_out, n_groups])?,
                    absmax: tensors.floats(&name("scale_absmax"), [n_blocks])?,
                    offset,
                })
            }
        };
        let zeros = match format.grid() {
            Grid::Affine => Some(tensors.floats(&name("zeros"), grid)?),
            _ => None,
        };
        let input_order = if input_order {
            Some(tensors.words(&name("input_order"), [d_in])?)
        } else {
            None
        };
        let words = Parts::from_columns(&columns, &layout, Vec::new(), None).map_err(&quant)?;
        let parts = Parts {
            scales,
            zeros,
            input_order,
            ..words
        };
        let weight = QuantTensor::from_parts(parts, format, dims, device);
        Ok(Some(weight.map_err(quant)?))
    }

    fn tensors<'a>(&self, path: &str, weight: &'a QuantTensor) -> Vec<(String, LazyTensor<'a>)> {
        let name = |part: &str| format!("{path}.{part}");
        let (layout, grid) = (weight.layout(), weight.layout().grid_shape());
        let words = [layout.word_rows(), layout.d_out()];
        let words = LazyTensor::words(words, || weight.columns());
        let mut all = vec![(name("qweight"), words)];
        match weight.format().double_quant() {
            None => {
                all.push((name("scales"), floats(weight.scales())));
            }
            Some(double) => {
                let [n_groups, d_out] = grid;
                let n_blocks = (d_out * n_groups).div_ceil(double.block_size);
                let codes = LazyTensor::bytes([d_out, n_groups], || double_scales(weight).codes());
                let absmax = LazyTensor::floats([n_blocks], || double_scales(weight).absmax());
                let offset = LazyTensor::floats([1], || vec![double_scales(weight).offset()]);
                all.push((name("scale_codes"), codes));
                all.push((name("scale_absmax"), absmax));
                all.push((name("scale_offset"), offset));
            }
        }
        if let Some(zeros) = weight.zeros() {
            all.push((name("zeros"), floats(zeros)));
        }
        if let Some(order) = weight.input_order() {
            let order = LazyTensor::words([order.len()], move || order.clone());
            all.push((name("input_order"), order));
        }
        all
    }

    fn config(&self) -> Value {
        serde_json::to_value(self).expect("strings and numbers")
    }
}
