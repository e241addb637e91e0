use std::time::Instant;

use burn::tensor::Tensor;
use peft::{
    Adapter, Batch, CausalLm, Fisher, LayerError, LayerReport, Linear, Linears, Lora, Method,
    Recipe, Stages, Streams, check_recipe,
};
use quant_core::{Candidate, Gram, Needs, Quantizer};
use serde::Serialize;

use crate::{Error, Layer, LayerMethod, Result, Start};

/// A method that chooses the packed weights and the adapters of a model together.
pub trait Initialization<M: CausalLm + Stages> {
    /// Initializes a model: the body of [`init`].
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

/// Quantizes the layers of a dense model as the recipe says, and attaches adapters to the targets of the
/// method that compensate for the quantization error.
///
/// Methods that look at one layer at a time go through the model stage by stage: a layer's dense weight
/// is freed once it is packed, and the activations of `calibration` reach the next stage
/// through packed weights and adapters, as [`models::quantize`] does it. Without `calibration` nothing is
/// run, for methods that look at weights alone; with it the errors of outputs are reported too.
///
/// A target that the recipe leaves dense gets a fresh adapter, which adds nothing; PiSSA splits its
/// weight. `on_layer` is called after each layer.
///
/// # Errors
/// Those of [`peft::check_recipe`] and of the method's targets, before anything is changed. An error in
/// a layer ([`Error::NoSvd`], or that of its quantizer) leaves the layers before it changed.
///
/// # Examples
/// ```no_run
/// use loftq::Loftq;
/// use quant_core::NormalFloat;
/// # fn run<M: peft::CausalLm + peft::Stages>(model: &mut M) -> loftq::Result<()> {
/// let layers = loftq::init(model, &Loftq::new(16), &NormalFloat::new(), &[], |layer| {
///     println!("{}: {}", layer.report.path, layer.report.error);
/// })?;
/// assert!(layers.iter().all(|layer| layer.rank == Some(16)));
/// // The layers are quantized by now.
/// assert!(loftq::init(model, &Loftq::new(16), &NormalFloat::new(), &[], |_| {}).is_err());
/// # Ok(())
/// # }
/// ```
///
/// [`models::quantize`]: https://docs.rs/quant-models
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

impl<M: CausalLm + Stages, L: LayerMethod> Initialization<M> for L {
    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        let plan = Plan::new(self, self.needs(), model, recipe, calibration)?;
        let mut layers = Vec::new();
        let mut streams = Streams::start(model, calibration, plan.needs);
        while let Some(stage) = streams.next_stage(model) {
            for at in stage.layers {
                if let Some(layer) = plan.init_layer(model, at, stage.gram.as_ref())? {
                    on_layer(&layer);
                    layers.push(layer);
                }
            }
        }
        Ok(layers)
    }
}

/// The cost of each layer with each of several quantizers, for [`quant_core::allocate`]: bytes of the
/// weight, and the squared error that is left in the method's measure ([`LayerMethod::measure`]), with
/// every other layer dense. The model is not changed.
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
    let plan = Plan::new(method, method.needs(), model, first, calibration)?;
    let mut needs = plan.needs;
    for quantizer in quantizers {
        needs = needs.max(check_recipe(model, quantizer, calibration)?);
    }
    let mut all = Vec::new();
    let mut streams = Streams::start(model, calibration, needs);
    while let Some(stage) = streams.next_stage(model) {
        for (path, linear) in &model.linears()[stage.layers] {
            let layer = plan.layer(path, linear, stage.gram.as_ref());
            let candidate = |quantizer: &&dyn Quantizer| {
                let start = plan.start(&layer, Some(quantizer))?;
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

/// A method and a recipe, checked against a model and its calibration.
pub(crate) struct Plan<'a, L> {
    method: &'a L,
    recipe: &'a dyn Recipe,
    pub(crate) needs: Needs,
    targets: Vec<String>,
    fisher: Option<Fisher>,
}

impl<'a, L: LayerMethod> Plan<'a, L> {
    pub(crate) fn new<M: CausalLm>(
        method: &'a L,
        needs: Needs,
        model: &M,
        recipe: &'a dyn Recipe,
        calibration: &[Batch],
    ) -> Result<Self> {
        let lora = method.lora();
        let targets = lora.targets().paths(model)?;
        for (path, linear) in model.linears() {
            if targets.contains(&path) {
                linear.check_plain(&path)?;
                // The adapter's own checks of the layer.
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
        let fisher = method
            .needs_fisher()
            .then(|| Fisher::sum(model, calibration, || ()));
        Ok(Self {
            method,
            recipe,
            needs,
            targets,
            fisher: fisher.transpose()?,
        })
    }

    pub(crate) fn is_target(&self, path: &str) -> bool {
        self.targets.iter().any(|target| target == path)
    }

    fn layer<'b>(&'b self, path: &'b str, linear: &Linear, gram: Option<&'b Gram>) -> Layer<'b> {
        Layer {
            fisher: self.fisher.as_ref().and_then(|fisher| fisher.of(path)),
            ..Layer::of(path, linear, gram)
        }
    }

    fn start(&self, layer: &Layer<'_>, quantizer: Option<&dyn Quantizer>) -> Result<Start> {
        match quantizer {
            None => self.method.start_dense(layer),
            Some(quantizer) if self.is_target(layer.path) => self.method.start(layer, quantizer),
            Some(quantizer) => self.method.lora().start(layer, quantizer),
        }
    }

    /// Initializes the layer at an index of [`Linears::linears`]; none if the recipe leaves it dense and
    /// it is no target.
    pub(crate) fn init_layer<M: Linears>(
        &self,
        model: &mut M,
        at: usize,
        gram: Option<&Gram>,
    ) -> Result<Option<InitializedLayer>> {
        let (path, linear) = model.linears_mut().swap_remove(at);
        let quantizer = self.recipe.quantizer(&path);
        if quantizer.is_none() && !self.is_target(&path) {
            return Ok(None);
        }
        let clock = Instant::now();
        let layer = self.layer(&path, linear, gram);
        let mut start = self.start(&layer, quantizer)?;
        let seconds = clock.elapsed().as_secs_f64();
        let plain = match (start.plain.take(), quantizer) {
            (Some(plain), _) => plain.dequantize(),
            (None, Some(quantizer)) => layer.quantize(layer.weight.clone(), quantizer)?.1,
            (None, None) => layer.weight.clone(),
        };
        self.place(linear, &layer, start, plain, seconds).map(Some)
    }

    /// Puts a start into its layer, with an adapter if it is a target. `plain` is the weight quantized
    /// alone, for the report.
    pub(crate) fn place(
        &self,
        linear: &mut Linear,
        layer: &Layer<'_>,
        start: Start,
        plain: Tensor<2>,
        seconds: f64,
    ) -> Result<InitializedLayer> {
        let path = layer.path;
        let lora = self.is_target(path).then(|| self.method.lora());
        let adapter = match (lora, start.factors) {
            (None, _) => None,
            (Some(lora), factors) => {
                let layer = linear.with_weight(start.weight.clone());
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
            round: lora.map_or(0, |_| start.round),
        })
    }
}
