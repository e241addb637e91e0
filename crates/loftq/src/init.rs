use std::fmt;
use std::time::Instant;

use burn::tensor::Tensor;
use peft::{
    Adapter, Batch, CausalLm, Fisher, InitializedLayer, LayerError, LayerReport, LayerShape,
    Linear, Linears, Lora, Method, Recipe, StageMethod, Stages, Streams, Weight, check_calibration,
    check_recipe,
};
use quant_core::{Candidate, Gram, Needs, Quantizer};

use crate::{Error, Layer, LayerMethod, Result, Start};

/// A method that chooses the packed weights and the adapters of a model together, or the packed weights alone.
///
/// Most are run on one part of a model after the other ([`Initializer`]); the others on a whole model alone.
/// The `Debug` form has all settings.
pub trait Initialization<M: Stages>: fmt::Debug {
    /// Checks that it can be run on the parts of a model of these layers, by their shapes alone, and returns
    /// what it needs to know of their inputs.
    ///
    /// # Errors
    /// [`Error::WholeModel`] from a method that needs the whole model; otherwise as [`init`].
    fn check_parts(&self, layers: &[LayerShape], recipe: &dyn Recipe) -> Result<Needs>;

    /// Whether it attaches adapters: true unless it says otherwise.
    fn has_adapters(&self) -> bool {
        true
    }

    /// Initializes a part of a model that a calibration has reached.
    ///
    /// # Errors
    /// As [`init`], for a layer.
    fn run_part(
        &self,
        part: &mut M,
        recipe: &dyn Recipe,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>;

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
    ) -> Result<Vec<InitializedLayer>>
    where
        M: CausalLm;
}

/// An initialization with the recipe of its base, to be run on one part of a model after the other.
///
/// [`models::initialize_to`] runs it on the blocks of a model that is larger than the memory.
///
/// # Examples
/// ```no_run
/// use loftq::{Initializer, Loftq};
/// use models::Streaming;
/// use quant_core::NormalFloat;
///
/// let device = burn::tensor::Device::flex();
/// let (method, nf4) = (Loftq::new(16), NormalFloat::new());
/// let initializer = Initializer::new(&method, &nf4);
/// let settings = Streaming::new(&device).with_resume(true);
/// models::initialize_to("Llama-2-70b-hf", "Llama-2-70b-loftq", &initializer, &[], &settings, |_| {})?;
/// let mut lm = models::load("Llama-2-70b-loftq/base", &device)?;
/// let adapters = peft::Adapters::open("Llama-2-70b-loftq/adapter", &lm.model)?;
/// peft::activate(&mut lm.model, &adapters)?;
/// # Ok::<(), models::Error>(())
/// ```
///
/// [`models::initialize_to`]: https://docs.rs/quant-models
#[derive(Clone, Copy)]
pub struct Initializer<'a, I: ?Sized> {
    method: &'a I,
    recipe: &'a dyn Recipe,
}

impl<'a, I: ?Sized> Initializer<'a, I> {
    /// The initialization `method` of a base that is quantized by `recipe`.
    pub fn new(method: &'a I, recipe: &'a dyn Recipe) -> Self {
        Self { method, recipe }
    }
}

impl<M: Stages, I: Initialization<M> + ?Sized> StageMethod<M> for Initializer<'_, I> {
    fn recipe(&self) -> &dyn Recipe {
        self.recipe
    }

    fn settings(&self) -> String {
        format!("{:?}", self.method)
    }

    fn check(&self, layers: &[LayerShape]) -> peft::Result<Needs> {
        Ok(self.method.check_parts(layers, self.recipe)?)
    }

    fn has_adapters(&self) -> bool {
        self.method.has_adapters()
    }

    fn run(
        &self,
        part: &mut M,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> peft::Result<Vec<InitializedLayer>> {
        Ok(self.method.run_part(part, self.recipe, streams, on_layer)?)
    }
}

/// Quantizes the layers of a dense model as the recipe says, and attaches adapters to the targets of the
/// method that compensate for the quantization error.
///
/// Methods that look at one layer at a time go through the model stage by stage: a layer's dense weight
/// is freed once it is packed, and the activations of `calibration` reach the next stage
/// through packed weights and adapters, as [`models::quantize`] does it. Without `calibration` nothing is
/// run, for methods that look at weights alone; with it the errors of outputs are reported too.
///
/// A method without adapters, such as [`BlockAp`](crate::BlockAp), packs alone, and leaves dense what the recipe
/// leaves dense. Otherwise a target that the recipe leaves dense gets a fresh adapter, which adds nothing; PiSSA splits its
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

impl<M: Stages, L: LayerMethod> Initialization<M> for L {
    fn check_parts(&self, layers: &[LayerShape], recipe: &dyn Recipe) -> Result<Needs> {
        if self.needs_fisher() {
            let method = "a method that weights errors by the Fisher information";
            return Err(Error::WholeModel { method });
        }
        check_layers(self, layers, recipe)
    }

    fn run_part(
        &self,
        part: &mut M,
        recipe: &dyn Recipe,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        Layers::new(self, recipe).run(part, streams, on_layer)
    }

    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>
    where
        M: CausalLm,
    {
        let (layers, needs) = Layers::checked(self, model, recipe, calibration)?;
        let mut streams = Streams::start(model, calibration, needs);
        layers.run(model, &mut streams, on_layer)
    }
}

/// Checks a method against the layers of a model, and returns the needs of method and recipe.
pub(crate) fn check_layers(
    method: &impl LayerMethod,
    layers: &[LayerShape],
    recipe: &dyn Recipe,
) -> Result<Needs> {
    let lora = method.lora();
    let paths: Vec<String> = layers.iter().map(|layer| layer.path.clone()).collect();
    lora.targets().among(&paths)?;
    let mut needs = method.needs();
    for LayerShape {
        path,
        dims,
        is_packed,
    } in layers
    {
        let quantizer = recipe.quantizer(path);
        needs = needs.max(quantizer.map_or(Needs::Nothing, Quantizer::needs));
        if !lora.targets().contains(path) {
            continue;
        }
        if *is_packed {
            let path = path.clone();
            return Err(peft::Error::AlreadyQuantized { path }.into());
        }
        lora.check(path, *dims)?;
        if let Some(quantizer) = quantizer {
            let format = quantizer.format().map_err(Error::quant(path))?;
            method.check(path, format)?;
        }
    }
    Ok(needs)
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
    let (layers, mut needs) = Layers::checked(method, model, first, calibration)?;
    for quantizer in quantizers {
        needs = needs.max(check_recipe(model, quantizer, calibration)?);
    }
    let mut all = Vec::new();
    let mut streams = Streams::start(model, calibration, needs);
    while let Some(stage) = streams.next_stage(model) {
        for (path, linear) in &model.linears()[stage.layers] {
            let layer = layers.layer(path, linear, stage.gram.as_ref());
            let candidate = |quantizer: &&dyn Quantizer| {
                let start = layers.start(&layer, Some(quantizer))?;
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

/// The layers of a model, or of a part of one, to be initialized by a method over a recipe.
pub(crate) struct Layers<'a, L> {
    method: &'a L,
    recipe: &'a dyn Recipe,
    fisher: Option<Fisher>,
}

impl<'a, L: LayerMethod> Layers<'a, L> {
    pub(crate) fn new(method: &'a L, recipe: &'a dyn Recipe) -> Self {
        Self {
            method,
            recipe,
            fisher: None,
        }
    }

    /// Checks the layers of a whole model and its calibration, and sums the Fisher information that the method
    /// needs. Returns the needs of method and recipe, too.
    pub(crate) fn checked<M: CausalLm>(
        method: &'a L,
        model: &M,
        recipe: &'a dyn Recipe,
        calibration: &[Batch],
    ) -> Result<(Self, Needs)> {
        let mut layers = Self::new(method, recipe);
        let mut targets = model.linears();
        targets.retain(|(path, _)| layers.is_target(path));
        for (path, linear) in &targets {
            linear.check_plain(path)?;
        }
        let needs = check_layers(method, &LayerShape::of(model), recipe)?;
        for (path, linear) in &targets {
            // The adapter's own checks of the weight.
            method.lora().init(path, linear)?;
        }
        let needs = check_recipe(model, recipe, calibration)?.max(needs);
        check_calibration(calibration, needs)?;
        if method.needs_fisher() && calibration.is_empty() {
            return Err(peft::Error::NoCalibration.into());
        }
        if method.needs_fisher() {
            layers.fisher = Some(Fisher::sum(model, calibration, || ())?);
        }
        Ok((layers, needs))
    }

    pub(crate) fn is_target(&self, path: &str) -> bool {
        self.method.lora().targets().contains(path)
    }

    /// Initializes layer after layer.
    fn run<M: Stages>(
        &self,
        part: &mut M,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        let mut layers = Vec::new();
        while let Some(stage) = streams.next_stage(part) {
            for at in stage.layers {
                if let Some(layer) = self.init_layer(part, at, stage.gram.as_ref())? {
                    on_layer(&layer);
                    layers.push(layer);
                }
            }
        }
        Ok(layers)
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
        if let (None, None, Weight::Dense(weight)) = (quantizer, &start.factors, linear.weight()) {
            // As it is, in its own type of float.
            start.weight = Weight::frozen(weight.val());
        }
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
        let lora = self.is_target(layer.path).then(|| self.method.lora());
        let start = Start {
            round: lora.map_or(0, |_| start.round),
            ..start
        };
        place(linear, lora, layer, start, plain, seconds)
    }
}

/// Puts a start into its layer, with an adapter if there is a LoRA. `plain` is the weight quantized alone, for
/// the report.
pub(crate) fn place(
    linear: &mut Linear,
    lora: Option<&Lora>,
    layer: &Layer<'_>,
    start: Start,
    plain: Tensor<2>,
    seconds: f64,
) -> Result<InitializedLayer> {
    let path = layer.path;
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
        round: start.round,
    })
}
