use peft::{
    Batch, Blocks, InitializedLayer, LayerReport, LayerShape, Recipe, StageMethod, Stages, Streams,
    Weight, check_recipe,
};
use quant_core::{Needs, Quantizer};

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
    mut on_layer: impl FnMut(&LayerReport),
) -> Result<Vec<LayerReport>> {
    let needs = check_recipe(model, recipe, calibration)?;
    let mut streams = Streams::start(model, calibration, needs);
    let layers = Quantization(recipe).run(model, &mut streams, &mut |of| on_layer(&of.report))?;
    Ok(layers.into_iter().map(|layer| layer.report).collect())
}

/// The method that quantizes each layer as its recipe says, and attaches no adapters.
pub(crate) struct Quantization<'a, R>(pub(crate) &'a R);

impl<M: Stages, R: Recipe> StageMethod<M> for Quantization<'_, R> {
    fn recipe(&self) -> &dyn Recipe {
        self.0
    }

    fn settings(&self) -> String {
        "quantization".into()
    }

    fn check(&self, layers: &[LayerShape]) -> peft::Result<Needs> {
        let quantizers = layers
            .iter()
            .filter_map(|layer| self.0.quantizer(&layer.path));
        let needs = quantizers.map(|quantizer| quantizer.needs()).max();
        Ok(needs.unwrap_or(Needs::Nothing))
    }

    fn has_adapters(&self) -> bool {
        false
    }

    fn run(
        &self,
        part: &mut M,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> peft::Result<Vec<InitializedLayer>> {
        let mut layers = Vec::new();
        while let Some(stage) = streams.next_stage(part) {
            let linears = part.linears_mut().into_iter();
            for (path, linear) in linears.skip(stage.layers.start).take(stage.layers.len()) {
                if let Some(quantizer) = self.0.quantizer(&path) {
                    let report = linear.quantize(&path, quantizer, stage.gram.as_ref())?;
                    let layer = InitializedLayer::from(report);
                    on_layer(&layer);
                    layers.push(layer);
                }
            }
        }
        Ok(layers)
    }
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
