use std::time::Instant;

use peft::{Batch, CausalLm, Cost, Recipe, Stages, Streams, Weight, check_recipe};
use quant_core::{Candidate, Format, Needs, Quantizer};

use crate::source::HEAD;
use crate::{Model, Result};

/// What quantizing one layer gave.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLayer {
    /// The layer.
    pub path: String,
    /// Its format.
    pub format: Format,
    /// What it cost.
    pub cost: Cost,
    /// Bytes of the packed weight.
    pub n_bytes: usize,
    /// Seconds that its quantizer took.
    pub seconds: f64,
}

/// Packs the projections of a model, stage by stage: the tokens of `calibration` run through the
/// stages that are packed already, and what they bring to the next one is what its quantizer knows of
/// its inputs (the `true-sequential` order of OPTQ's reference code). Each layer's dense weight is
/// freed when it is packed.
///
/// Without `calibration` nothing is run: quantizers that look at the weight alone need none, and with
/// it they report the error of each layer's output too.
///
/// Whether every layer is dense, without an adapter and of a size that its format fits is checked
/// before the first one is changed. Values that a quantizer refuses are met when their layer is
/// reached; the layers before it are packed by then.
///
/// # Errors
/// [`peft::Error::Quant`] with the layer that its quantizer refuses, an error for a layer that is
/// quantized or adapted already, [`peft::Error::NoLayer`] if the recipe names one that the model lacks,
/// [`peft::Error::NoCalibration`] for a quantizer that needs what is not there, or [`peft::Error::Token`]
/// for a token that the model lacks.
pub fn quantize<M: Stages + CausalLm>(
    model: &mut M,
    recipe: &impl Recipe,
    calibration: &[Batch],
    mut on_layer: impl FnMut(&QuantizedLayer),
) -> Result<Vec<QuantizedLayer>> {
    let needs = check_recipe(model, recipe, calibration)?;
    let mut layers = Vec::new();
    let mut streams = Streams::start(model, calibration, needs == Needs::Drift);
    for (stage, range) in model.stages().into_iter().enumerate() {
        let gram = streams.gram(model, &range);
        streams.advance_dense(model, stage);
        let linears = model.linears_mut();
        for (path, linear) in linears.into_iter().skip(range.start).take(range.len()) {
            let Some(quantizer) = recipe.quantizer(&path) else {
                continue;
            };
            let clock = Instant::now();
            let cost = linear.quantize(&path, quantizer, gram.as_ref())?;
            let layer = QuantizedLayer {
                path,
                format: linear.weight().format().expect("just quantized"),
                cost,
                n_bytes: linear.weight().n_bytes(),
                seconds: clock.elapsed().as_secs_f64(),
            };
            on_layer(&layer);
            layers.push(layer);
        }
        streams.advance(model, stage);
    }
    Ok(layers)
}

/// Packs the head, `[hidden, vocab]`, by its weight alone, and says what that cost. A token decoded
/// reads all of it.
///
/// The head of a model whose head is its embedding becomes a packed copy of it: the embedding stays
/// dense for the tokens to be looked up, and the model's `tie_word_embeddings` becomes false.
///
/// # Errors
/// [`peft::Error::AlreadyQuantized`], or [`peft::Error::Quant`] with what the quantizer has against
/// the head, or that it needs inputs. Then the model is as it was.
pub fn quantize_head(model: &mut Model, quantizer: &dyn Quantizer) -> Result<Cost> {
    if let Some(head) = &mut model.lm_head {
        return Ok(head.quantize(HEAD, quantizer, None)?);
    }
    let embedding = model.embed_tokens.val().without_autodiff();
    let mut head = Weight::frozen(embedding.transpose());
    let cost = head.quantize(HEAD, quantizer, None)?;
    model.lm_head = Some(head);
    model.config.untie();
    Ok(cost)
}

/// What each layer would cost with each of several quantizers, for [`quant_core::allocate`]: bytes,
/// and the squared error of the layer's output over the calibration, `‖X (W - Ŵ)‖²`, every other
/// layer being dense. The model stays as it is.
///
/// # Errors
/// As [`quantize`]; [`peft::Error::NoCalibration`] without any.
pub fn sensitivities<M: Stages + CausalLm>(
    model: &M,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
) -> Result<Vec<(String, Vec<Candidate>)>> {
    if calibration.is_empty() {
        return Err(peft::Error::NoCalibration.into());
    }
    for (path, linear) in model.linears() {
        linear.check_plain(&path)?;
    }
    let mut needs = Needs::Gram;
    for quantizer in quantizers {
        needs = needs.max(check_recipe(model, quantizer, calibration)?);
    }
    for batch in calibration {
        batch.check(model)?;
    }
    let mut all = Vec::new();
    let mut streams = Streams::start(model, calibration, needs == Needs::Drift);
    for (stage, range) in model.stages().into_iter().enumerate() {
        let gram = streams.gram(model, &range).expect("there is calibration");
        for (path, linear) in &model.linears()[range] {
            let Weight::Dense(weight) = linear.weight() else {
                unreachable!("checked to be dense");
            };
            let named = |source| peft::Error::Quant {
                path: path.clone(),
                source,
            };
            gram.check(weight.val().dims()[0]).map_err(named)?;
            let candidate = |quantizer: &&dyn Quantizer| {
                let quantized = quantizer.quantize(weight.val(), Some(&gram));
                let packed = quantized.map_err(named)?.weight;
                let error = gram.energy(packed.dequantize() - weight.val()).max(0.0);
                let n_bytes = packed.n_bytes() as u64;
                Ok(Candidate { n_bytes, error })
            };
            let candidates = quantizers.iter().map(candidate).collect::<Result<_>>()?;
            all.push((path.clone(), candidates));
        }
        streams.advance_dense(model, stage);
        streams.advance(model, stage);
    }
    Ok(all)
}
