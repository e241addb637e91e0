use std::collections::BTreeMap;
use std::time::Instant;

use peft::{Batch, Cost, Weight};
use quant_core::{Candidate, Format, Gram, Needs, Quantizer};

use crate::llama::HEAD;
use crate::{Error, Llama, Result, Stages};

/// Which quantizer each projection gets. A [`Quantizer`] is the recipe that gives itself to all.
pub trait Recipe {
    /// The quantizer of the layer at `path`; none leaves it dense.
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer>;

    /// The layers that it names, which the model must have; none if it takes what there is.
    fn paths(&self) -> Vec<&str> {
        Vec::new()
    }
}

impl<Q: Quantizer> Recipe for Q {
    fn quantizer(&self, _: &str) -> Option<&dyn Quantizer> {
        Some(self)
    }
}

/// A quantizer for each layer by its path, such as [`quant_core::allocate`] chose them. Layers that
/// are not listed stay dense.
#[derive(Default)]
pub struct PerLayer(pub BTreeMap<String, Box<dyn Quantizer>>);

impl Recipe for PerLayer {
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer> {
        self.0.get(path).map(Box::as_ref)
    }

    fn paths(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

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
/// quantized or adapted already, [`Error::NoLayer`] if the recipe names one that the model lacks,
/// [`Error::NoCalibration`] for a quantizer that needs what is not there, or [`peft::Error::Token`]
/// for a token that the model lacks.
pub fn quantize<M: Stages + peft::CausalLm>(
    model: &mut M,
    recipe: &impl Recipe,
    calibration: &[Batch],
    mut on_layer: impl FnMut(&QuantizedLayer),
) -> Result<Vec<QuantizedLayer>> {
    let needs = check(model, recipe, calibration)?;
    let mut layers = Vec::new();
    let mut streams = Streams::start(model, calibration, needs);
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
pub fn quantize_head(model: &mut Llama, quantizer: &dyn Quantizer) -> Result<Cost> {
    if let Some(head) = &mut model.lm_head {
        return Ok(head.quantize(HEAD, quantizer, None)?);
    }
    let embedding = model.embed_tokens.val().without_autodiff();
    let mut head = Weight::frozen(embedding.transpose());
    let cost = head.quantize(HEAD, quantizer, None)?;
    model.lm_head = Some(head);
    model.config.tie_word_embeddings = false;
    Ok(cost)
}

/// What each layer would cost with each of several quantizers, for [`quant_core::allocate`]: bytes,
/// and the squared error of the layer's output over the calibration, `‖X (W - Ŵ)‖²`, every other
/// layer being dense. The model stays as it is.
///
/// # Errors
/// As [`quantize`]; [`Error::NoCalibration`] without any.
pub fn sensitivities<M: Stages + peft::CausalLm>(
    model: &M,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
) -> Result<Vec<(String, Vec<Candidate>)>> {
    if calibration.is_empty() {
        return Err(Error::NoCalibration);
    }
    for (path, linear) in model.linears() {
        linear.check_plain(&path)?;
    }
    let mut needs = Needs::Gram;
    for quantizer in quantizers {
        needs = needs.max(check(model, quantizer, calibration)?);
    }
    for batch in calibration {
        batch.check(model.vocab_size())?;
    }
    let mut all = Vec::new();
    let mut streams = Streams::start(model, calibration, needs);
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

/// Checks layers, formats and calibration, and says what the recipe needs of them.
fn check<M: Stages + peft::CausalLm>(
    model: &M,
    recipe: &impl Recipe,
    calibration: &[Batch],
) -> Result<Needs> {
    let mut needs = Needs::Nothing;
    let layers: Vec<String> = model.linears().into_iter().map(|(path, _)| path).collect();
    check_paths(recipe, &layers)?;
    for (path, linear) in model.linears() {
        let Some(quantizer) = recipe.quantizer(&path) else {
            continue;
        };
        linear.check_plain(&path)?;
        let layout = quantizer
            .format()
            .and_then(|format| format.layout(linear.weight().dims()));
        layout.map_err(|source| peft::Error::Quant { path, source })?;
        needs = needs.max(quantizer.needs());
    }
    if calibration.is_empty() && needs > Needs::Nothing {
        return Err(Error::NoCalibration);
    }
    for batch in calibration {
        batch.check(model.vocab_size())?;
    }
    Ok(needs)
}

/// Checks that a model of these layers has those that the recipe names.
pub(crate) fn check_paths(recipe: &impl Recipe, layers: &[String]) -> Result<()> {
    let named = recipe.paths();
    match named
        .into_iter()
        .find(|path| !layers.iter().any(|layer| layer == path))
    {
        Some(path) => Err(Error::NoLayer { path: path.into() }),
        None => Ok(()),
    }
}

/// The calibration on its way through the model.
struct Streams<M: Stages> {
    /// Through the layers as they are now.
    states: Vec<M::State>,
    /// Through the dense layers, for quantizers that ask for the drift.
    dense: Option<Vec<M::State>>,
}

impl<M: Stages> Streams<M> {
    fn start(model: &M, calibration: &[Batch], needs: Needs) -> Self {
        let states = calibration.iter().map(|batch| model.start(batch.tokens()));
        let states: Vec<_> = states.collect();
        let dense = (needs == Needs::Drift).then(|| states.clone());
        Self { states, dense }
    }

    /// The Gram of the inputs of a stage's layers, if there is any calibration.
    fn gram(&self, model: &M, range: &std::ops::Range<usize>) -> Option<Gram> {
        let first = M::input(self.states.first()?);
        let [d_in, _] = model.linears()[range.start].1.weight().dims();
        let mut gram = Gram::new(d_in, &first.device());
        for (at, state) in self.states.iter().enumerate() {
            match &self.dense {
                Some(dense) => gram.update_with_drift(M::input(state), M::input(&dense[at])),
                None => gram.update(M::input(state)),
            }
        }
        Some(gram)
    }

    /// Before the layers of a stage are packed.
    fn advance_dense(&mut self, model: &M, stage: usize) {
        for state in self.dense.iter_mut().flatten() {
            *state = model.advance(stage, state.clone());
        }
    }

    fn advance(&mut self, model: &M, stage: usize) {
        for state in &mut self.states {
            *state = model.advance(stage, state.clone());
        }
    }
}
