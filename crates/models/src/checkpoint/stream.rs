//! Models that are quantized from files to files, with one block in memory at a time.

mod ends;
mod inputs;
mod journal;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use peft::{Batch, LayerReport, Linears, Recipe, State, Streams, Weight, check_calibration};
use quant_core::{Needs, Quantizer};
use tensor_files::{FloatType, LazyTensor, Partial};

use self::ends::End;
use self::inputs::Inputs;
use self::journal::{Journal, Layer, Part, Settings, layers};
use super::directory::Files;
use super::format::{Layers, PackedLayer, quant_error};
use super::kind::CheckpointFormat;
use super::load::Checkpoint;
use super::parameters::{Parameter, linear_parameters, state_head, table_parameters};
use super::plan::{Plan, plan};
use super::shards::write_index;
use super::tensors::Tensors;
use crate::quantize::quantize_stages;
use crate::source::HEAD;
use crate::stages::Window;
use crate::{CheckpointError, Config, Result, StreamError};

/// The settings of [`quantize_to`].
#[derive(Clone, Debug)]
pub struct Streaming<'a> {
    device: Device,
    format: CheckpointFormat,
    head: Option<&'a dyn Quantizer>,
    compute: FloatType,
    resume: bool,
}

impl<'a> Streaming<'a> {
    /// Blocks on this device, activations in `f32`, a result in the format of this workspace, a head that stays
    /// as it is, and no run to go on with.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            format: CheckpointFormat::QuantCore,
            head: None,
            compute: FloatType::F32,
            resume: false,
        }
    }

    /// The format of the packed layers of the result.
    pub fn with_format(mut self, format: CheckpointFormat) -> Self {
        self.format = format;
        self
    }

    /// Quantizes the head too, by its weight alone, as [`quantize_head`](crate::quantize_head()) does. It is
    /// in memory in `f32` then.
    pub fn with_head(mut self, quantizer: &'a dyn Quantizer) -> Self {
        self.head = Some(quantizer);
        self
    }

    /// The type of float of the calibration's activations, as of [`load_as`](crate::load_as).
    pub fn with_compute(mut self, compute: FloatType) -> Self {
        self.compute = compute;
        self
    }

    /// Whether to go on after the last whole block of a run of the same settings that was stopped, if there
    /// is one.
    pub fn with_resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }
}

/// A step of [`quantize_to`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum StreamStep<'a> {
    /// A run that was stopped goes on; the layers of so many blocks are done.
    Resumed {
        /// The blocks that are done.
        n_blocks: usize,
    },
    /// A layer is quantized.
    Quantized(&'a LayerReport),
    /// A block is on the disk.
    Block {
        /// Its index, from 0.
        index: usize,
    },
}

/// Quantizes the model of a directory into a new directory, one block in memory at a time.
///
/// The result is that of [`load`](crate::load), [`quantize`](crate::quantize()) and
/// [`save_as`](crate::save_as), bit for bit, but that its tensors are in several files: one for each block,
/// and one for each of the ends. A certificate of the model is not copied.
///
/// Beside one dense block, its Grams and what its quantizer takes, the activations of the calibration before
/// and within a block are in memory: the residual stream, `4 · tokens · hidden` bytes, and the inputs of a
/// stage; twice that for quantizers that need the drift. Without a calibration nothing is run.
/// [`Plan::memory`](crate::Plan::memory) tells how much that is.
///
/// The result is written in `OUT.partial`, with a journal: if the process is killed, the same call with
/// [`Streaming::with_resume`] goes on after the last whole block, with the same result. Only a run of the same
/// files, recipe, calibration, format and program goes on. On another kind of processor the result may differ
/// in the last bits.
///
/// # Errors
/// Before a weight is read: as [`plan`](crate::plan()) and [`Plan::check`](crate::Plan::check);
/// [`StreamError::NothingToDo`]; as [`Batch::check`], [`peft::Error::NoCalibration`],
/// [`peft::Error::RepeatedCalibration`]; [`CheckpointError::UnexpectedTensor`];
/// [`tensor_files::Error::OutputExists`] and [`tensor_files::Error::OutputBusy`]; the other [`StreamError`]s.
///
/// Later: [`peft::Error::Quant`] with the layer that its quantizer refuses, [`CheckpointError::CannotHold`]
/// with the layers of a block whose values the format does not hold, [`tensor_files::Error::Io`] if a file
/// cannot be read or written. The blocks before are kept.
///
/// # Examples
/// ```no_run
/// use models::{Streaming, StreamStep};
/// use quant_core::Rtn;
///
/// let device = burn::tensor::Device::flex();
/// let rtn = Rtn::new().with_group_size(128);
/// let settings = Streaming::new(&device).with_resume(true);
/// models::quantize_to("Llama-2-70b-hf", "Llama-2-70b-4bit", &rtn, &[], &settings, |step| {
///     if let StreamStep::Block { index } = step {
///         println!("block {index}");
///     }
/// })?;
/// let lm = models::load("Llama-2-70b-4bit", &device)?;
/// # Ok::<(), models::Error>(())
/// ```
pub fn quantize_to(
    dir: impl AsRef<Path>,
    out: impl AsRef<Path>,
    recipe: &impl Recipe,
    calibration: &[Batch],
    settings: &Streaming,
    mut on_step: impl FnMut(StreamStep),
) -> Result<Vec<LayerReport>> {
    let dir = dir.as_ref();
    let run = Run::new(dir, recipe, calibration, settings)?;
    let partial = Partial::open(out)?;
    let files: Vec<String> = (0..run.n_parts()).map(|part| run.file(part)).collect();
    let mut journal = Journal::open(&partial, run.settings()?, &files, settings.resume)?;
    if let Err(error) = run.parts(&partial, &mut journal, &mut on_step) {
        if journal.parts().len() <= 1 {
            // No block is done: there is nothing to go on with.
            let _ = partial.remove();
        }
        return Err(error);
    }
    run.finish(&partial, journal.parts())?;
    let all = journal.parts().iter().flat_map(|part| &part.layers);
    let reports = all.filter_map(Layer::report).collect();
    partial.publish()?;
    Ok(reports)
}

/// What is to be done, checked.
struct Run<'a, R> {
    recipe: &'a R,
    calibration: &'a [Batch],
    settings: &'a Streaming<'a>,
    inputs: Inputs<'a>,
    plan: Plan,
    needs: Needs,
}

impl<'a, R: Recipe> Run<'a, R> {
    fn new(
        dir: &'a Path,
        recipe: &'a R,
        calibration: &'a [Batch],
        settings: &'a Streaming<'a>,
    ) -> Result<Self> {
        let plan = plan(dir, recipe)?;
        let layers = plan.layers.iter();
        let quantizers: Vec<_> = layers.filter_map(|of| recipe.quantizer(&of.path)).collect();
        if quantizers.is_empty() && settings.head.is_none() {
            return Err(StreamError::NothingToDo.into());
        }
        if settings.format == CheckpointFormat::Gguf {
            let format = settings.format;
            return Err(StreamError::Format { format }.into());
        }
        let inputs = Inputs::open(dir, &plan.config, &settings.device, settings.compute)?;
        let mut planned = plan.packed();
        if let Some(quantizer) = settings.head {
            planned.head = Some(planned_head(quantizer, &plan.config, &inputs)?);
        }
        settings.format.check(&planned)?;
        let needs = quantizers.iter().map(|quantizer| quantizer.needs());
        let needs = needs.max().unwrap_or(Needs::Nothing);
        let shape = plan.config.shape();
        for batch in calibration {
            batch.check_within(shape.vocab_size, shape.max_positions)?;
        }
        check_calibration(calibration, needs)?;
        Ok(Self {
            recipe,
            calibration,
            settings,
            inputs,
            plan,
            needs,
        })
    }

    /// Does all parts that are not done.
    fn parts(
        &self,
        partial: &Partial,
        journal: &mut Journal,
        on_step: &mut impl FnMut(StreamStep),
    ) -> Result<()> {
        let (n_done, n_parts) = (journal.parts().len(), self.n_parts());
        if n_done > 0 {
            let n_blocks = (n_done - 1).min(self.n_blocks());
            on_step(StreamStep::Resumed { n_blocks });
        }
        let copied = self.plan.copied.iter().sum::<u64>();
        let n_bytes = self.plan.n_bytes().saturating_add(copied) / n_parts as u64;
        partial.require(n_bytes.saturating_mul((n_parts - n_done) as u64))?;
        for part in journal.parts() {
            self.inputs.check_sums(&part.made_of)?;
        }
        let mut streams = None;
        for at in 0..n_parts {
            let Some(block) = self.block(at) else {
                if at >= n_done {
                    let part = self.end(at, partial, journal.parts(), on_step)?;
                    journal.push(part)?;
                }
                continue;
            };
            if at < n_done && (self.calibration.is_empty() || n_done > self.n_blocks()) {
                continue;
            }
            let streams = match &mut streams {
                Some(streams) => streams,
                none => none.insert(self.start()?),
            };
            if at < n_done {
                self.pass(block, partial, &journal.parts()[at], streams)?;
            } else {
                let part = self.quantize(block, partial, journal.parts(), streams, on_step)?;
                journal.push(part)?;
                on_step(StreamStep::Block { index: block });
            }
        }
        self.inputs.check_same()
    }

    fn shape(&self) -> &Config {
        &self.plan.config
    }

    fn n_blocks(&self) -> usize {
        self.shape().num_hidden_layers()
    }

    /// The ends and the blocks.
    fn n_parts(&self) -> usize {
        self.n_blocks() + 2
    }

    /// The block of a part, unless it is an end.
    fn block(&self, part: usize) -> Option<usize> {
        part.checked_sub(1).filter(|&block| block < self.n_blocks())
    }

    /// The name of the file of a part.
    fn file(&self, part: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", part + 1, self.n_parts())
    }

    fn settings(&self) -> Result<Settings> {
        let layers = self.plan.layers.iter();
        let layers = layers.filter_map(|layer| {
            let quantizer = self.recipe.quantizer(&layer.path)?;
            Some((layer.path.clone(), format!("{quantizer:?}")))
        });
        let head = self.settings.head;
        let head = head.map(|quantizer| (HEAD.to_string(), format!("{quantizer:?}")));
        Ok(Settings {
            program: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).into(),
            files: self.inputs.sums()?,
            weights: self.inputs.headers.clone(),
            format: self.settings.format.to_string(),
            recipe: layers.chain(head).collect(),
            calibration: self.calibration.iter().map(Batch::sha256).collect(),
            compute: format!("{:?}", self.settings.compute),
            device: format!("{:?}", self.settings.device),
        })
    }

    /// The calibration before the first block.
    fn start(&self) -> Result<Streams<'a>> {
        let mut states = Vec::new();
        if !self.calibration.is_empty() {
            let embedding = self.inputs.embedding()?;
            let batches = self.calibration.iter();
            states.extend(batches.map(|batch| State::start(&embedding, batch)));
        }
        Ok(Streams::of(states, self.calibration, self.needs))
    }

    /// Runs the calibration through a block that is done.
    fn pass(
        &self,
        block: usize,
        partial: &Partial,
        part: &Part,
        streams: &mut Streams,
    ) -> Result<()> {
        let tensors = Tensors::of_file(&partial.files().join(&part.file))?;
        let format = self
            .settings
            .format
            .for_layers(&layers([part]), &self.inputs.config);
        let mut packed = Checkpoint::new(tensors, Some(format), &self.settings.device);
        let packed = Window::build(self.shape(), block, &mut packed)?;
        let dense = if streams.has_drift() {
            Some(Window::build(
                self.shape(),
                block,
                &mut self.inputs.checkpoint()?,
            )?)
        } else {
            None
        };
        streams.pass(&packed, dense.as_ref());
        Ok(())
    }

    /// Quantizes a block, and writes its file.
    fn quantize(
        &self,
        block: usize,
        partial: &Partial,
        done: &[Part],
        streams: &mut Streams,
        on_step: &mut impl FnMut(StreamStep),
    ) -> Result<Part> {
        self.inputs.check_same()?;
        let mut checkpoint = self.inputs.checkpoint()?;
        let mut window = Window::build(self.shape(), block, &mut checkpoint)?;
        let reports = quantize_stages(&mut window, self.recipe, streams, |layer| {
            on_step(StreamStep::Quantized(layer));
        })?;
        streams.leave(&window);
        let layers: Vec<Layer> = window
            .linears()
            .into_iter()
            .map(|(path, linear)| {
                let report = reports.iter().find(|report| report.path == path);
                layer(path, linear.weight(), report)
            })
            .collect();
        let path = window.path();
        let tables = table_parameters(window.block().tables(&path));
        let parameters = tables
            .into_iter()
            .chain(linear_parameters(window.linears()));
        self.write(
            block + 1,
            partial,
            layers,
            done,
            parameters.collect(),
            Vec::new(),
            checkpoint,
        )
    }

    /// Writes the file of an end.
    fn end(
        &self,
        part: usize,
        partial: &Partial,
        done: &[Part],
        on_step: &mut impl FnMut(StreamStep),
    ) -> Result<Part> {
        self.inputs.check_same()?;
        let mut checkpoint = self.inputs.checkpoint()?;
        let end = match part {
            0 => End::first(self.shape(), &mut checkpoint)?,
            _ => End::last(self.shape(), &mut checkpoint, self.settings.head)?,
        };
        if let Some(report) = &end.head {
            on_step(StreamStep::Quantized(report));
        }
        let packed = end.packed.iter();
        let mut layers: Vec<Layer> = packed
            .map(|(path, weight)| {
                let report = end.head.as_ref().filter(|_| path == HEAD);
                layer(path.clone(), weight, report)
            })
            .collect();
        layers.extend(end.dense.into_iter().map(|(path, dims)| Layer {
            path,
            dims,
            format: None,
            has_order: false,
            report: None,
        }));
        let packed = end.packed.iter();
        let parameters = packed.map(|(path, weight)| Parameter::of_weight(path.clone(), weight));
        self.write(
            part,
            partial,
            layers,
            done,
            parameters.collect(),
            end.copies,
            checkpoint,
        )
    }

    /// Writes the file of a part, after those that are done.
    #[expect(clippy::too_many_arguments, reason = "what a part is made of")]
    fn write(
        &self,
        at: usize,
        partial: &Partial,
        layers: Vec<Layer>,
        done: &[Part],
        parameters: Vec<Parameter>,
        copies: Vec<(String, LazyTensor)>,
        mut checkpoint: Checkpoint,
    ) -> Result<Part> {
        let format = self.settings.format;
        let mut part = Part {
            file: self.file(at),
            sha256: String::new(),
            made_of: BTreeMap::new(),
            layers,
        };
        // Layers that were packed before are of formats that no recipe tells.
        let mut refusals = format.refusals(&self::layers(done.iter().chain([&part])));
        for parameter in &parameters {
            if let Parameter::Packed { path, weight } = parameter {
                let reasons = format.reasons_against_values(weight);
                if !reasons.is_empty() {
                    refusals.push((path.clone(), reasons.join("; ")));
                }
            }
        }
        if !refusals.is_empty() {
            let error = CheckpointError::CannotHold {
                format,
                layers: refusals,
                instead: CheckpointFormat::QuantCore,
            };
            return Err(error.into());
        }
        let packing = format.for_layers(&self::layers([&part]), &self.inputs.config);
        let tensors = parameters
            .into_iter()
            .flat_map(|parameter| match parameter {
                Parameter::Packed { path, weight } => packing.tensors(&path, weight),
                parameter => vec![parameter.shortest()],
            });
        let path = partial.files().join(&part.file);
        tensor_files::write_tensors(&path, tensors.chain(copies))?;
        part.sha256 = tensor_files::sha256(&path)?;
        for name in checkpoint.tensors.taken() {
            let sum = checkpoint.tensors.sha256(&name)?;
            part.made_of.insert(name, sum);
        }
        // The values were read before they were hashed.
        self.inputs.check_same()?;
        Ok(part)
    }

    /// Writes the files beside the tensors.
    fn finish(&self, partial: &Partial, parts: &[Part]) -> Result<()> {
        // Projections of the blocks first, in the order of the model.
        let (ends, blocks): (Vec<_>, Vec<_>) =
            (parts.iter().enumerate()).partition(|(at, _)| self.block(*at).is_none());
        let parts_in_order = blocks.into_iter().chain(ends).map(|(_, part)| part);
        let layers: Layers = layers(parts_in_order);
        let packing = self
            .settings
            .format
            .for_layers(&layers, &self.inputs.config);
        let quantization = packing.config();
        let mut config = self.inputs.config.clone();
        config.insert("quantization_config".into(), quantization.clone());
        let is_tied = self.shape().tie_word_embeddings();
        state_head(&mut config, !is_tied || layers.head.is_some());
        let files: Vec<String> = parts.iter().map(|part| part.file.clone()).collect();
        write_index(&partial.files(), &files)?;
        let beside = Files {
            config: &config,
            carried: &self.inputs.carried,
            second: packing.config_file().map(|name| (name, &quantization)),
            certificate: None,
        };
        beside.write_beside(&partial.files())
    }
}

/// The head as its quantizer packs it, checked before anything is read.
fn planned_head(
    quantizer: &dyn Quantizer,
    config: &Config,
    inputs: &Inputs,
) -> Result<PackedLayer> {
    let shape = config.shape();
    let (path, dims) = (HEAD.to_string(), [shape.embedding_width, shape.vocab_size]);
    if inputs.checkpoint()?.packed_tensor(HEAD).is_some() {
        return Err(peft::Error::AlreadyQuantized { path }.into());
    }
    if quantizer.needs() > Needs::Nothing {
        return Err(peft::Error::NoCalibration.into());
    }
    let format = quantizer.format().map_err(quant_error(HEAD))?;
    format.layout(dims).map_err(quant_error(HEAD))?;
    Ok(PackedLayer {
        path,
        format,
        dims,
        has_order: false,
    })
}

/// The entry of a layer, with the report of its quantization if there is one.
fn layer(path: String, weight: &Weight, report: Option<&LayerReport>) -> Layer {
    let has_order = match weight {
        Weight::Quant(weight) => weight.input_order().is_some(),
        Weight::Dense(_) => false,
    };
    Layer {
        dims: weight.dims(),
        format: weight.format(),
        has_order,
        report: report.map(Into::into),
        path,
    }
}
