use std::time::Instant;

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use peft::{
    Adapter, Batch, CausalLm, LayerError, LayerReport, Linear, Linears, Lora, Method, Recipe,
    Stages, Streams, Weight, check_recipe,
};
use quant_core::{
    Candidate, Format, Gram, Needs, Note, QuantTensor, Quantized, Quantizer, sum_of_squares,
};
use serde::Serialize;

use crate::{Error, Fisher, FisherRoots, LowRank, Result, Truncation};

/// A way to choose packed weights and adapters of a model together.
pub trait Initialization<M: CausalLm + Stages> {
    /// As [`init`], which calls it.
    ///
    /// # Errors
    /// As [`init`].
    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>;
}

/// Packs the layers of a dense model as the recipe says, and gives those that the method targets an
/// adapter that makes up for what packing took.
///
/// Methods that look at one layer at a time go through the model stage by stage: a layer's dense weight
/// is freed when its packed one is there, and the tokens of `calibration` reach the next stage through
/// packed weights and adapters, as [`models::quantize`] does it. Without `calibration` nothing is run,
/// for those that look at weights alone; with it the errors of outputs are reported too.
///
/// A targeted layer that the recipe leaves dense gets a fresh adapter, which adds nothing; PiSSA splits
/// its weight. `on_layer` hears of each layer when it is done.
///
/// # Errors
/// Those of [`peft::check_recipe`] and of the method's targets, before anything is changed. What is
/// met in a layer ([`Error::NoSvd`], what its quantizer has against it) leaves the layers before it
/// changed.
///
/// [`models::quantize`]: https://docs.rs/models
pub fn init<M: CausalLm + Stages>(
    model: &mut M,
    method: &(impl Initialization<M> + ?Sized),
    recipe: &dyn Recipe,
    calibration: &[Batch],
    mut on_layer: impl FnMut(&InitializedLayer),
) -> Result<Vec<InitializedLayer>> {
    method.run(model, recipe, calibration, &mut on_layer)
}

/// The report of one layer that was initialized.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InitializedLayer {
    /// The layer, with the weight and the adapter that were chosen.
    #[serde(flatten)]
    pub report: LayerReport,
    /// The rank of its adapter, if it has one.
    pub rank: Option<usize>,
    /// The error of its weight quantized alone.
    pub before: LayerError,
    /// The round of the method that was kept, counted from 1; 0 where none was better than the
    /// weight quantized alone, and for a layer that the method does not target.
    pub round: usize,
}

/// A dense layer before its initialization.
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// Its path.
    pub path: &'a str,
    /// Its weight, `[d_in, d_out]`.
    pub weight: Tensor<2>,
    /// The Gram of its inputs, if there is calibration.
    pub gram: Option<&'a Gram>,
    /// The Fisher information of its weight, if the method asks for it.
    pub fisher: Option<&'a FisherRoots>,
}

impl Layer<'_> {
    /// The weight quantized, and what it is then.
    pub(crate) fn quantize(
        &self,
        weight: Tensor<2>,
        quantizer: &dyn Quantizer,
    ) -> Result<(Quantized, Tensor<2>)> {
        let quantized = quantizer.quantize(weight, self.gram);
        let quantized = quantized.map_err(Error::quant(self.path))?;
        let dense = quantized.weight.dequantize();
        Ok((quantized, dense))
    }

    /// `matrix`, of the layer's size, cut down to a rank that the layer can have.
    pub(crate) fn cut(
        &self,
        truncation: &Truncation,
        matrix: Tensor<2>,
        rank: usize,
        start: Option<Tensor<2>>,
    ) -> Result<LowRank> {
        let (path, dims) = (self.path.to_string(), self.weight.dims());
        if rank == 0 {
            return Err(peft::Error::Setting {
                setting: "rank",
                value: "0".into(),
                expected: "at least 1",
            }
            .into());
        }
        if rank > dims[0].min(dims[1]) {
            return Err(peft::Error::Rank { path, rank, dims }.into());
        }
        let low = truncation.of(matrix, rank, start);
        low.ok_or(Error::NoSvd { path })
    }

    /// `‖X (W - Ŵ)‖²`, or `‖W - Ŵ‖²` without calibration.
    pub(crate) fn output_error(&self, found: Tensor<2>) -> f64 {
        let difference = self.weight.clone() - found;
        match self.gram {
            Some(gram) => gram.energy(difference).max(0.0),
            None => sum_of_squares(difference),
        }
    }
}

/// How a layer starts.
#[derive(Clone, Debug)]
pub struct Start {
    /// Its weight.
    pub weight: Weight,
    /// `[d_in, r]` and `[r, d_out]`, whose product the adapter adds; none for one that adds nothing.
    pub factors: Option<[Tensor<2>; 2]>,
    /// The weight quantized alone, where the method made it.
    pub plain: Option<QuantTensor>,
    /// Which round was kept, counted from 1.
    pub round: usize,
    /// The squared error that the method made small, in what it measures it by; ApiQ's without what no
    /// weight can change.
    pub error: f64,
    /// What the quantizer has to say.
    pub notes: Vec<Note>,
}

impl Start {
    /// The weight with what the adapter adds, `[d_in, d_out]`.
    pub fn sum(&self) -> Tensor<2> {
        let weight = self.weight.to_dense();
        match &self.factors {
            Some([a, b]) => kernels::add_low_rank(weight, a.clone(), b.clone()),
            None => weight,
        }
    }
}

/// An [`Initialization`] that looks at one layer at a time.
pub trait LayerMethod {
    /// The adapters: rank, `α`, targets and the rest.
    fn lora(&self) -> &Lora;

    /// What it must know of a layer's inputs.
    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// Whether it must know the [`Fisher`] information of the weights.
    fn needs_fisher(&self) -> bool {
        false
    }

    /// Whether it has an adapter for a layer of this format.
    ///
    /// # Errors
    /// [`Error::NoRange`] from methods that learn the range of a grid.
    fn check(&self, path: &str, format: Format) -> Result<()> {
        let _ = (path, format);
        Ok(())
    }

    /// The squared error that a layer has with the weight `found`, `[d_in, d_out]`, in what the method
    /// measures it by.
    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        sum_of_squares(layer.weight.clone() - found)
    }

    /// How a layer starts whose weight is packed by `quantizer`.
    ///
    /// # Errors
    /// [`Error::NoSvd`], or what the quantizer has against the weight.
    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start>;

    /// How a layer starts that stays dense.
    ///
    /// # Errors
    /// [`Error::NoSvd`].
    fn start_dense(&self, layer: &Layer<'_>) -> Result<Start> {
        Ok(Start {
            weight: Weight::frozen(layer.weight.clone()),
            factors: None,
            plain: None,
            round: 1,
            error: 0.0,
            notes: Vec::new(),
        })
    }
}

/// What QLoRA does: the weight is quantized, and the adapter adds nothing.
impl LayerMethod for Lora {
    fn lora(&self) -> &Lora {
        self
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let (quantized, dense) = layer.quantize(layer.weight.clone(), quantizer)?;
        Ok(Start {
            error: sum_of_squares(layer.weight.clone() - dense),
            plain: Some(quantized.weight.clone()),
            weight: Weight::Quant(quantized.weight),
            factors: None,
            round: 1,
            notes: quantized.notes,
        })
    }
}

impl<M: CausalLm + Stages, L: LayerMethod> Initialization<M> for L {
    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        let known = Known::of(self, self.needs(), model, recipe, calibration)?;
        let mut layers = Vec::new();
        let mut streams = Streams::start(model, calibration, known.needs);
        while let Some(stage) = streams.next_stage(model) {
            for at in stage.layers {
                let done = init_layer(self, &known, model, at, recipe, stage.gram.as_ref())?;
                if let Some(done) = done {
                    on_layer(&done);
                    layers.push(done);
                }
            }
        }
        Ok(layers)
    }
}

/// Initializes one layer of a model, the one at `at`; none if the recipe leaves it dense and it is no
/// target.
pub(crate) fn init_layer<M: Linears>(
    method: &impl LayerMethod,
    known: &Known,
    model: &mut M,
    at: usize,
    recipe: &dyn Recipe,
    gram: Option<&Gram>,
) -> Result<Option<InitializedLayer>> {
    let (path, linear) = model.linears_mut().swap_remove(at);
    let quantizer = recipe.quantizer(&path);
    let targeted = known.targets.contains(&path);
    if quantizer.is_none() && !targeted {
        return Ok(None);
    }
    let clock = Instant::now();
    let layer = Layer {
        path: &path,
        weight: dense(linear),
        gram,
        fisher: known.fisher.as_ref().and_then(|fisher| fisher.of(&path)),
    };
    let mut start = match (quantizer, targeted) {
        (Some(quantizer), true) => method.start(&layer, quantizer)?,
        (Some(quantizer), false) => method.lora().start(&layer, quantizer)?,
        (None, _) => method.start_dense(&layer)?,
    };
    let seconds = clock.elapsed().as_secs_f64();
    let plain = match (start.plain.take(), quantizer) {
        (Some(plain), _) => plain.dequantize(),
        (None, Some(quantizer)) => layer.quantize(layer.weight.clone(), quantizer)?.1,
        (None, None) => layer.weight.clone(),
    };
    let lora = targeted.then_some(method.lora());
    place(linear, &layer, start, plain, lora, seconds).map(Some)
}

/// What is known before the first layer.
pub(crate) struct Known {
    pub(crate) needs: Needs,
    pub(crate) targets: Vec<String>,
    fisher: Option<Fisher>,
}

impl Known {
    pub(crate) fn of<M: CausalLm + Stages>(
        method: &impl LayerMethod,
        needs: Needs,
        model: &M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
    ) -> Result<Self> {
        let lora = method.lora();
        let targets = lora.targets().paths(model)?;
        for (path, linear) in model.linears() {
            if targets.contains(&path) {
                linear.check_plain(&path)?;
                // What the adapter has against the layer.
                lora.init(&path, linear)?;
            }
        }
        let needs = check_recipe(model, recipe, calibration)?.max(needs);
        for path in &targets {
            if let Some(quantizer) = recipe.quantizer(path) {
                let format = quantizer.format().map_err(Error::quant(path))?;
                method.check(path, format)?;
            }
        }
        let blind = needs > Needs::Nothing || method.needs_fisher();
        if calibration.is_empty() && blind {
            return Err(peft::Error::NoCalibration.into());
        }
        let fisher = match method.needs_fisher() {
            true => Some(Fisher::sum(model, calibration)?),
            false => None,
        };
        Ok(Self {
            needs,
            targets,
            fisher,
        })
    }
}

/// What each layer would cost with each of several quantizers, for [`quant_core::allocate`]: bytes of
/// the weight, and the squared error that is left, as the method measures it
/// ([`LayerMethod::measure`]), every other layer being dense. The model stays as it is.
///
/// For [`LqLora`](crate::LqLora) this is the table of its integer program.
///
/// # Errors
/// As [`init`].
pub fn sensitivities<M: CausalLm + Stages>(
    model: &M,
    method: &impl LayerMethod,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
) -> Result<Vec<(String, Vec<Candidate>)>> {
    let Some(first) = quantizers.first() else {
        return Ok(Vec::new());
    };
    let known = Known::of(method, method.needs(), model, first, calibration)?;
    let mut needs = known.needs;
    for quantizer in quantizers {
        needs = needs.max(check_recipe(model, quantizer, calibration)?);
    }
    let mut all = Vec::new();
    let mut streams = Streams::start(model, calibration, needs);
    while let Some(stage) = streams.next_stage(model) {
        for (path, linear) in &model.linears()[stage.layers] {
            let layer = Layer {
                path,
                weight: dense(linear),
                gram: stage.gram.as_ref(),
                fisher: known.fisher.as_ref().and_then(|fisher| fisher.of(path)),
            };
            let candidate = |quantizer: &&dyn Quantizer| {
                let start = if known.targets.contains(path) {
                    method.start(&layer, *quantizer)?
                } else {
                    method.lora().start(&layer, *quantizer)?
                };
                let n_bytes = start.weight.n_bytes() as u64;
                let error = method.measure(&layer, start.sum());
                Ok(Candidate { n_bytes, error })
            };
            let candidates: Result<_> = quantizers.iter().map(candidate).collect();
            all.push((path.clone(), candidates?));
        }
    }
    Ok(all)
}

/// A frozen layer with another weight and no adapter.
pub(crate) fn with_weight(linear: &Linear, weight: Weight) -> Linear {
    let bias = linear.bias();
    let bias = bias.map(|bias| Param::from_tensor(bias).set_require_grad(false));
    Linear::new(weight, bias)
}

/// The weight of a dense layer, in `f32`.
pub(crate) fn dense(linear: &Linear) -> Tensor<2> {
    linear.weight().to_dense().cast(DType::F32)
}

/// Puts a start into its layer, with an adapter if there is a `lora`, and reports it beside `plain`, the
/// weight quantized alone.
pub(crate) fn place(
    linear: &mut Linear,
    layer: &Layer<'_>,
    start: Start,
    plain: Tensor<2>,
    lora: Option<&Lora>,
    seconds: f64,
) -> Result<InitializedLayer> {
    let path = layer.path;
    let adapter = match (lora, start.factors) {
        (None, _) => None,
        (Some(lora), factors) => {
            let layer = with_weight(linear, start.weight.clone());
            Some(match factors {
                Some([a, b]) => Adapter::Lora(lora.init_at(path, &layer, a, b)?),
                None => lora.init(path, &layer)?,
            })
        }
    };
    linear.replace(path, start.weight, adapter)?;
    let between = |found| LayerError::between(layer.weight.clone(), found, layer.gram);
    Ok(InitializedLayer {
        report: LayerReport {
            path: path.into(),
            format: linear.weight().format(),
            error: between(linear.to_dense()),
            n_bytes: linear.weight().n_bytes(),
            seconds,
            notes: start.notes,
        },
        rank: lora.map(Lora::rank),
        before: between(plain),
        round: if lora.is_some() { start.round } else { 0 },
    })
}
