//! Models that are quantized from files to files, with one block in memory at a time.

mod ends;
mod journal;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use burn::tensor::Device;
use peft::{Batch, LayerReport, Linears, Recipe, State, Streams, Weight, check_calibration};
use quant_core::{Needs, Quantizer};
use serde_json::{Map, Value};
use tensor_files::{LazyTensor, Partial};

use self::ends::End;
use self::journal::{Journal, Layer, Part, Settings, layers};
use super::directory::{CONFIG, Files, carried, stop_tokens};
use super::format::{Layers, PackedLayer};
use super::kind::CheckpointFormat;
use super::load::Checkpoint;
use super::parameters::{Parameter, linear_parameters, state_head, table_parameters};
use super::plan::{Plan, plan};
use super::shards::write_index;
use super::tensors::Tensors;
use crate::quantize::quantize_stages;
use crate::source::{HEAD, weight_name};
use crate::stages::Window;
use crate::{CheckpointError, Config, Model, Result, StreamError};

/// The settings of [`quantize_to`].
#[derive(Clone, Debug)]
pub struct Streaming<'a> {
    device: Device,
    format: CheckpointFormat,
    head: Option<&'a dyn Quantizer>,
    resume: bool,
}

impl<'a> Streaming<'a> {
    /// Blocks on this device, a result in the format of this workspace, a head that stays as it is, and no
    /// run to go on with.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            format: CheckpointFormat::QuantCore,
            head: None,
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
/// stage; twice that for quantizers that need the drift. Without a calibration nothing is run, and each
/// tensor is read once. [`Plan::memory`](crate::Plan::memory) tells how much that is.
///
/// The result is written in `OUT.partial`, with a journal: if the process is killed, the same call with
/// [`Streaming::with_resume`] goes on after the last whole block, to the same result. Only a run of the same
/// files, recipe, calibration, format and program goes on.
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
    let mut journal = Journal::open(&partial, run.settings()?, settings.resume)?;
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
    dir: &'a Path,
    recipe: &'a R,
    calibration: &'a [Batch],
    settings: &'a Streaming<'a>,
    plan: Plan,
    needs: Needs,
    /// `config.json` without `quantization_config`.
    config: Map<String, Value>,
    carried: BTreeMap<&'static str, Vec<u8>>,
    /// See [`Tensors::headers`].
    headers: BTreeMap<String, String>,
}

impl<'a, R: Recipe> Run<'a, R> {
    fn new(
        dir: &'a Path,
        recipe: &'a R,
        calibration: &'a [Batch],
        settings: &'a Streaming<'a>,
    ) -> Result<Self> {
        let plan = plan(dir, recipe)?;
        let quantizers = plan
            .layers
            .iter()
            .map(|layer| recipe.quantizer(&layer.path));
        let quantizers: Vec<_> = quantizers.flatten().collect();
        if quantizers.is_empty() && settings.head.is_none() {
            return Err(StreamError::NothingToDo.into());
        }
        let mut planned = plan.packed();
        if let Some(head) = settings.head {
            let shape = plan.config.shape();
            planned.head = Some(PackedLayer {
                path: HEAD.into(),
                format: head.format().map_err(super::format::quant_error(HEAD))?,
                dims: [shape.embedding_width, shape.vocab_size],
                has_order: false,
            });
        }
        if settings.format == CheckpointFormat::Gguf {
            let format = settings.format;
            return Err(StreamError::Format { format }.into());
        }
        settings.format.check(&planned)?;
        let needs = quantizers.iter().map(|quantizer| quantizer.needs());
        let needs = needs.max().unwrap_or(Needs::Nothing);
        let shape = plan.config.shape();
        for batch in calibration {
            batch.check_within(shape.vocab_size, shape.max_positions)?;
        }
        check_calibration(calibration, needs)?;
        let path = dir.join(CONFIG);
        let mut config: Map<String, Value> = tensor_files::read_json(&path)?;
        config.remove("quantization_config");
        let carried = carried(dir)?;
        stop_tokens(dir, &config, &carried, shape.vocab_size)?;
        let mut run = Self {
            dir,
            recipe,
            calibration,
            settings,
            plan,
            needs,
            config,
            carried,
            headers: BTreeMap::new(),
        };
        let mut checkpoint = run.open()?;
        run.headers = checkpoint.tensors.headers()?;
        run.check_names(&mut checkpoint)?;
        Ok(run)
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
        partial.require(self.plan.n_bytes() * (n_parts - n_done) as u64 / n_parts as u64)?;
        for part in journal.parts() {
            self.check_unchanged(&part.made_of)?;
        }
        let mut streams = None;
        for at in 0..n_parts {
            let Some(block) = self.block(at) else {
                if at >= n_done {
                    journal.push(self.end(at, partial, on_step)?)?;
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
                journal.push(self.quantize(block, partial, streams, on_step)?)?;
                on_step(StreamStep::Block { index: block });
            }
        }
        Ok(())
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

    /// Opens the files of the model: one that vanished or was cut since is found now.
    fn open(&self) -> Result<Checkpoint> {
        let path = self.dir.join(CONFIG);
        let mut config: Map<String, Value> = tensor_files::read_json(&path)?;
        let format = CheckpointFormat::open(self.dir, config.remove("quantization_config"))?;
        let tensors = Tensors::open(self.dir)?;
        Ok(Checkpoint::new(tensors, format, &self.settings.device))
    }

    fn settings(&self) -> Result<Settings> {
        let mut files: BTreeMap<String, String> = BTreeMap::new();
        let carried = self.carried.iter();
        files.extend(carried.map(|(&name, bytes)| {
            (
                name.into(),
                tensor_files::digest([(name, bytes.as_slice())]),
            )
        }));
        files.insert(CONFIG.into(), tensor_files::sha256(&self.dir.join(CONFIG))?);
        let layers = self.plan.layers.iter();
        let layers = layers.filter_map(|layer| {
            let quantizer = self.recipe.quantizer(&layer.path)?;
            Some((layer.path.clone(), format!("{quantizer:?}")))
        });
        let head = self.settings.head;
        let head = head.map(|quantizer| (HEAD.to_string(), format!("{quantizer:?}")));
        Ok(Settings {
            program: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).into(),
            files,
            weights: self.headers.clone(),
            format: self.settings.format.to_string(),
            recipe: layers.chain(head).collect(),
            calibration: self.calibration.iter().map(Batch::sha256).collect(),
            device: format!("{:?}", self.settings.device),
        })
    }

    /// Refuses tensors that the model has no place for.
    fn check_names(&self, checkpoint: &mut Checkpoint) -> Result<()> {
        let mut known: HashSet<String> = HashSet::new();
        let mut packed = Vec::new();
        let config = self.shape();
        let shape = config.shape();
        let prefix = shape.prefix;
        let ends = [
            "embed_tokens",
            "embed_positions",
            "project_in",
            "project_out",
        ];
        let ends = ends.into_iter().map(|name| format!("{prefix}.{name}"));
        let norms = shape.final_norm.map(|name| format!("{prefix}.{name}"));
        let of_blocks = config.block_modules();
        let modules = ends.chain(norms).chain(of_blocks);
        let head = (!shape.tie_word_embeddings).then(|| HEAD.to_string());
        for path in modules.chain(head) {
            if checkpoint.packed_tensor(&path).is_some() {
                packed.push(format!("{path}."));
            }
            known.insert(weight_name(&path));
            known.insert(format!("{path}.bias"));
        }
        let names = checkpoint.tensors.names().into_iter();
        let is_known = |name: &String| {
            let full = [name.clone(), format!("model.{name}")];
            full.iter().any(|name| {
                known.contains(name) || packed.iter().any(|path| name.starts_with(path))
            })
        };
        let leftovers = names.filter(|name| !is_known(name)).collect();
        checkpoint.check_leftovers(config, leftovers)
    }

    /// Checks that the files of weights are those of the beginning, by their lengths and headers.
    fn check_headers(&self) -> Result<()> {
        let mut tensors = Tensors::open(self.dir)?;
        let headers = tensors.headers()?;
        let mut changed = self.headers.iter();
        match changed.find(|(name, sum)| headers.get(*name) != Some(sum)) {
            None => Ok(()),
            Some((name, _)) => {
                let path = self.dir.join(name);
                Err(StreamError::Changed { path, tensor: None }.into())
            }
        }
    }

    /// Checks that the tensors of a part that is done have not changed since.
    fn check_unchanged(&self, made_of: &BTreeMap<String, String>) -> Result<()> {
        let mut tensors = Tensors::open(self.dir)?;
        for (name, sum) in made_of {
            if tensors.sha256(name)? != *sum {
                let path = tensors.path(name);
                let tensor = Some(name.clone());
                return Err(StreamError::Changed { path, tensor }.into());
            }
        }
        Ok(())
    }

    /// The calibration before the first block.
    fn start(&self) -> Result<Streams<'a>> {
        let mut states = Vec::new();
        if !self.calibration.is_empty() {
            let embedding = Model::embedding(self.shape().clone(), &mut self.open()?)?;
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
            .for_layers(&layers([part]), &self.config);
        let mut packed = Checkpoint::new(tensors, Some(format), &self.settings.device);
        let packed = Window::build(self.shape(), block, &mut packed)?;
        let dense = if streams.has_drift() {
            Some(Window::build(self.shape(), block, &mut self.open()?)?)
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
        streams: &mut Streams,
        on_step: &mut impl FnMut(StreamStep),
    ) -> Result<Part> {
        self.check_headers()?;
        let mut checkpoint = self.open()?;
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
        on_step: &mut impl FnMut(StreamStep),
    ) -> Result<Part> {
        self.check_headers()?;
        let mut checkpoint = self.open()?;
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
            parameters.collect(),
            end.copies,
            checkpoint,
        )
    }

    /// Writes the file of a part.
    fn write(
        &self,
        at: usize,
        partial: &Partial,
        layers: Vec<Layer>,
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
        let mut refusals = Vec::new();
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
        let packing = format.for_layers(&self::layers([&part]), &self.config);
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
        Ok(part)
    }

    /// Writes the files beside the tensors.
    fn finish(&self, partial: &Partial, parts: &[Part]) -> Result<()> {
        // Projections of the blocks first, in the order of the model.
        let (ends, blocks): (Vec<_>, Vec<_>) =
            (parts.iter().enumerate()).partition(|(at, _)| self.block(*at).is_none());
        let parts_in_order = blocks.into_iter().chain(ends).map(|(_, part)| part);
        let layers: Layers = layers(parts_in_order);
        let packing = self.settings.format.for_layers(&layers, &self.config);
        let quantization = packing.config();
        let mut config = self.config.clone();
        config.insert("quantization_config".into(), quantization.clone());
        let is_tied = self.shape().tie_word_embeddings();
        state_head(&mut config, !is_tied || layers.head.is_some());
        let files: Vec<String> = parts.iter().map(|part| part.file.clone()).collect();
        write_index(&partial.files(), &files)?;
        let beside = Files {
            config: &config,
            carried: &self.carried,
            second: packing.config_file().map(|name| (name, &quantization)),
            certificate: None,
        };
        beside.write_beside(&partial.files())
    }
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
