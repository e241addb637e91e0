use peft::{Batch, Blocks, LayerReport, Recipe, Stages, Streams, Weight, check_recipe};
use quant_core::Quantizer;

use crate::source::HEAD;
use crate::{Model, Result};

/// Quantizes the projections of a model, stage by stage.
///
/// The activations of `calibration` run through the stages that are packed already, and their quantizer
/// sees the inputs that reach the next one (the `true-sequential` order of OPTQ's reference code). Each
/// layer's dense weight is freed when it is packed. `on_layer` is called after each layer.
///
/// Without `calibration` nothing is run: quantizers that look at the weight alone need none, and with
/// it they report the error of each layer's output too.
///
/// Before the first layer is changed, every layer is checked to be dense, without an adapter and of a
/// size that its format fits. A quantizer may still refuse the values of a layer; the layers before it
/// are then packed already.
///
/// # Errors
/// [`peft::Error::Quant`] with the layer that its quantizer refuses, an error for a layer that is
/// quantized or adapted already, [`peft::Error::NoLayer`] if the recipe names one that the model lacks,
/// [`peft::Error::NoCalibration`] for a quantizer that needs a calibration where there is none, or
/// [`peft::Error::Token`] for a token that the model lacks.
pub fn quantize<M: Blocks + Stages>(
    model: &mut M,
    recipe: &impl Recipe,
    calibration: &[Batch],
    on_layer: impl FnMut(&LayerReport),
) -> Result<Vec<LayerReport>> {
    let needs = check_recipe(model, recipe, calibration)?;
    let mut streams = Streams::start(model, calibration, needs);
    quantize_stages(model, recipe, &mut streams, on_layer)
}

/// Quantizes the projections of a model, or of a part of one, that the calibration has reached.
pub(crate) fn quantize_stages<M: Stages>(
    model: &mut M,
    recipe: &impl Recipe,
    streams: &mut Streams,
    mut on_layer: impl FnMut(&LayerReport),
) -> Result<Vec<LayerReport>> {
    let mut layers = Vec::new();
    while let Some(stage) = streams.next_stage(model) {
        let linears = model.linears_mut().into_iter();
        for (path, linear) in linears.skip(stage.layers.start).take(stage.layers.len()) {
            if let Some(quantizer) = recipe.quantizer(&path) {
                let layer = linear.quantize(&path, quantizer, stage.gram.as_ref())?;
                on_layer(&layer);
                layers.push(layer);
            }
        }
    }
    Ok(layers)
}

/// Quantizes the head, `[hidden, vocab]`, by its weight alone. Each decoded token reads all of it.
///
/// The head of a model whose head is its embedding becomes a packed copy of it: the embedding stays
/// dense, for tokens to be looked up, and the model's `tie_word_embeddings` becomes false.
///
/// # Errors
/// [`peft::Error::AlreadyQuantized`], or [`peft::Error::Quant`] with the error of the quantizer, such as
/// that it needs inputs. Then the model is unchanged.
pub fn quantize_head(model: &mut Model, quantizer: &dyn Quantizer) -> Result<LayerReport> {
    if let Some(head) = &mut model.lm_head {
        return Ok(head.quantize(HEAD, quantizer, None)?);
    }
    let embedding = model.embed_tokens.val().without_autodiff();
    let mut head = Weight::frozen(embedding.transpose());
    let report = head.quantize(HEAD, quantizer, None)?;
    model.lm_head = Some(head);
    model.config.untie();
    Ok(report)
}
