use std::fmt;

use burn::tensor::Tensor;
use quant_core::{Distortion, Format, Gram, Note};
use serde::{Serialize, Serializer};

/// The report of one layer that was quantized.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// The path of the layer.
    pub path: String,
    /// The format of its weight; none if it is dense.
    pub format: Option<Format>,
    /// How far it is from the dense layer; `after` in JSON, beside the `before` of an initialization.
    #[serde(rename = "after")]
    pub error: LayerError,
    /// Bytes of the weight.
    pub n_bytes: usize,
    /// Seconds that it took.
    pub seconds: f64,
    /// Notes of the quantizer.
    pub notes: Vec<Note>,
}

/// The report of one layer that was quantized and perhaps got an adapter, which were chosen together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InitializedLayer {
    /// The layer with the weight and the adapter that were chosen.
    #[serde(flatten)]
    pub report: LayerReport,
    /// The rank of its adapter, if it has one.
    pub rank: Option<usize>,
    /// The error of its weight quantized alone.
    pub before: LayerError,
    /// The round of the method that was kept, counted from 1; 0 where none was better than the
    /// weight quantized alone, and for a layer that is no target.
    pub round: usize,
}

impl From<LayerReport> for InitializedLayer {
    /// The report of a layer that was quantized alone.
    fn from(report: LayerReport) -> Self {
        Self {
            rank: None,
            before: report.error,
            round: 0,
            report,
        }
    }
}

/// The distance of a layer from the dense one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerError {
    /// The distance of the weights; in JSON, the relative one alone.
    #[serde(serialize_with = "relative")]
    pub weight: Distortion,
    /// The relative error of the output over a calibration, `‖X (W - Ŵ)‖ / ‖X W‖`; 0 if `X W` is 0.
    pub output: Option<f64>,
}

impl LayerError {
    /// The distance of the weight `found` from `dense`, and of their outputs over the inputs of `gram`.
    ///
    /// # Panics
    /// If the weights are of different sizes, or the Gram is that of another layer.
    pub fn between(dense: Tensor<2>, found: Tensor<2>, gram: Option<&Gram>) -> Self {
        let output = gram.map(|gram| {
            let energy = gram.energy(dense.clone());
            let error = gram.energy(found.clone() - dense.clone());
            // Rounding can leave a little less than nothing.
            if energy > 0.0 {
                (error.max(0.0) / energy).sqrt()
            } else {
                0.0
            }
        });
        let weight = kernels::with_values(dense, |dense| {
            kernels::with_values(found, |found| Distortion::between(dense, found))
        });
        Self { weight, output }
    }
}

fn relative<S: Serializer>(weight: &Distortion, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(weight.relative)
}

impl fmt::Display for LayerError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.weight.fmt(f)?;
        match self.output {
            Some(output) => write!(f, ", of the output {output:.4}"),
            None => Ok(()),
        }
    }
}
