use peft::Linears;
use quant_core::{Distortion, Format, Quantizer};

use crate::Result;

/// What quantizing one layer gave.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLayer {
    /// The layer.
    pub path: String,
    /// Its format.
    pub format: Format,
    /// What it cost.
    pub distortion: Distortion,
    /// Bytes of the packed weight.
    pub n_bytes: usize,
}

/// Packs every projection, each as it is reached freeing its dense weight.
///
/// Whether every layer is dense, without an adapter and of a size that the format fits is checked
/// before the first one is changed. Values that the quantizer refuses are met when their layer is
/// reached; the layers before it are packed by then.
///
/// # Errors
/// [`peft::Error::Quant`] with the layer that the quantizer refuses, or an error for a layer that is
/// quantized or adapted already.
pub fn quantize<M: Linears>(
    model: &mut M,
    quantizer: &impl Quantizer,
    mut on_layer: impl FnMut(&QuantizedLayer),
) -> Result<Vec<QuantizedLayer>> {
    let mut layers = Vec::new();
    for (path, linear) in model.linears() {
        linear.check_plain(&path)?;
        let layout = quantizer
            .format()
            .and_then(|format| format.layout(linear.weight().dims()));
        layout.map_err(|source| peft::Error::Quant { path, source })?;
    }
    for (path, linear) in model.linears_mut() {
        let distortion = linear.quantize(&path, quantizer)?;
        let format = linear.weight().format().expect("just quantized");
        let n_bytes = linear.weight().n_bytes();
        let layer = QuantizedLayer {
            path,
            format,
            distortion,
            n_bytes,
        };
        on_layer(&layer);
        layers.push(layer);
    }
    Ok(layers)
}
