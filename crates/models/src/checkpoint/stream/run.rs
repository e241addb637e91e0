//! A run through the parts of a model: its first end, its blocks and its last end.

use std::collections::BTreeMap;
use std::path::Path;

use peft::{
    Adapters, Batch, InitializedLayer, LayerShape, Linears, StageMethod, State, Streams, Weight,
    check_calibration,
};
use quant_core::{Needs, Quantizer, arithmetic};
use tensor_files::LazyTensor;

use super::super::directory::Files;
use super::super::format::{Layers, PackedLayer, quant_error};
use super::super::formats::Weights;
use super::super::kind::CheckpointFormat;
use super::super::load::Checkpoint;
use super::super::parameters::{Parameter, linear_parameters, state_head, table_parameters};
use super::super::plan::{Plan, PlannedLayer, plan};
use super::super::shards::write_index;
use super::super::tensors::Tensors;
use super::ends::End;
use super::inputs::Inputs;
use super::journal::{Journal, Layer, Part, Settings, layers};
use super::place::Place;
use super::{StreamStep, Streaming};
use crate::source::HEAD;
use crate::stages::Window;
use crate::{CheckpointError, Config, Result, StreamError};

/// What is to be done, checked.
pub(super) struct Run<'a, T: ?Sized> {
    method: &'a T,
    calibration: &'a [Batch],
    settings: &'a Streaming<'a>,
    inputs: Inputs<'a>,
    plan: Plan,
    needs: Needs,
}

impl<'a, T: StageMethod<Window> + ?Sized> Run<'a, T> {
    pub(super) fn new(
        dir: &'a Path,
        method: &'a T,
        calibration: &'a [Batch],
        settings: &'a Streaming<'a>,
    ) -> Result<Self> {
        let recipe = method.recipe();
        let plan = plan(dir, recipe)?;
        let packs = |layer: &PlannedLayer| recipe.quantizer(&layer.path).is_some();
        if settings.head.is_none() && !plan.layers.iter().any(packs) {
            return Err(StreamError::NothingToDo.into());
        }
        let layers: Vec<LayerShape> = (plan.layers.iter())
            .map(|layer| LayerShape {
                path: layer.path.clone(),
                dims: layer.dims,
                is_packed: layer.format.is_some() && !packs(layer),
            })
            .collect();
        let needs = method.check(&layers)?;
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
        let shape = plan.config.shape();
        for batch in calibration {
            batch.check_within(shape.vocab_size, shape.max_positions)?;
        }
        check_calibration(calibration, needs)?;
        Ok(Self {
            method,
            calibration,
            settings,
            inputs,
            plan,
            needs,
        })
    }

    /// Whether a run that was stopped is to be gone on with.
    pub(super) fn resumes(&self) -> bool {
        self.settings.resume
    }

    /// Does all parts that are not done.
    pub(super) fn parts(
        &self,
        place: &Place,
        journal: &mut Journal,
        on_step: &mut dyn FnMut(StreamStep),
    ) -> Result<()> {
        let (n_done, n_parts) = (journal.parts().len(), self.n_parts());
        if n_done > 0 {
            let n_blocks = (n_done - 1).min(self.n_blocks());
            on_step(StreamStep::Resumed { n_blocks });
        }
        let copied = self.plan.copied.iter().sum::<u64>();
        let n_bytes = self.plan.n_bytes().saturating_add(copied) / n_parts as u64;
        place.require(n_bytes.saturating_mul((n_parts - n_done) as u64))?;
        for part in journal.parts() {
            self.inputs.check_sums(&part.made_of)?;
        }
        let mut streams = None;
        for at in 0..n_parts {
            let Some(block) = self.block_of(at) else {
                if at >= n_done {
                    let part = self.end(at, place, journal.parts(), on_step)?;
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
                self.pass(block, place, &journal.parts()[at], streams)?;
            } else {
                let part = self.block_part(block, place, journal.parts(), streams, on_step)?;
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
    fn block_of(&self, part: usize) -> Option<usize> {
        part.checked_sub(1).filter(|&block| block < self.n_blocks())
    }

    /// The names of the files of all parts.
    pub(super) fn files(&self) -> Vec<String> {
        (0..self.n_parts()).map(|part| self.file(part)).collect()
    }

    /// The name of the file of a part.
    fn file(&self, part: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", part + 1, self.n_parts())
    }

    pub(super) fn settings(&self) -> Result<Settings> {
        let layers = self.plan.layers.iter();
        let layers = layers.filter_map(|layer| {
            let quantizer = self.method.recipe().quantizer(&layer.path)?;
            Some((layer.path.clone(), format!("{quantizer:?}")))
        });
        let head = self.settings.head;
        let head = head.map(|quantizer| (HEAD.to_string(), format!("{quantizer:?}")));
        Ok(Settings {
            program: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).into(),
            files: self.inputs.sums()?,
            weights: self.inputs.headers.clone(),
            format: self.settings.format.to_string(),
            method: self.method.settings(),
            recipe: layers.chain(head).collect(),
            calibration: self.calibration.iter().map(Batch::sha256).collect(),
            compute: format!("{:?}", self.settings.compute),
            device: format!("{:?}", self.settings.device),
            arithmetic: format!("{:?}", arithmetic()),
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
    fn pass(&self, block: usize, place: &Place, part: &Part, streams: &mut Streams) -> Result<()> {
        let tensors = Tensors::of_file(&place.base().join(&part.file))?;
        let format = self
            .settings
            .format
            .for_layers(&layers([part]), &self.inputs.config);
        let weights = Weights {
            tensors,
            format: Some(format),
        };
        let mut packed = Checkpoint::new(weights, &self.settings.device);
        let mut packed = Window::build(self.shape(), block, &mut packed)?;
        if !part.adapters.is_empty() {
            let adapters = Adapters::load(part.adapters_dir(place), &self.settings.device)?;
            peft::activate(&mut packed, &adapters)?;
        }
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

    /// Runs the method on a block, and writes its files.
    fn block_part(
        &self,
        block: usize,
        place: &Place,
        done: &[Part],
        streams: &mut Streams,
        on_step: &mut dyn FnMut(StreamStep),
    ) -> Result<Part> {
        self.inputs.check_same()?;
        let mut checkpoint = self.inputs.checkpoint()?;
        let mut window = Window::build(self.shape(), block, &mut checkpoint)?;
        let reports = self.method.run(&mut window, streams, &mut |layer| {
            on_step(StreamStep::Initialized(layer));
        })?;
        streams.leave(&window);
        let layers: Vec<Layer> = window
            .linears()
            .into_iter()
            .map(|(path, linear)| {
                let report = reports.iter().find(|of| of.report.path == path);
                layer(path, linear.weight(), report)
            })
            .collect();
        let path = window.path();
        let tables = table_parameters(window.block().tables(&path));
        let parameters = tables
            .into_iter()
            .chain(linear_parameters(window.linears()));
        let mut part = self.write(
            block + 1,
            place,
            layers,
            done,
            parameters.collect(),
            Vec::new(),
            checkpoint,
        )?;
        let mut linears = window.linears().into_iter();
        if linears.any(|(_, linear)| linear.adapter().is_some()) {
            part.write_adapters(&Adapters::of(&window)?, place)?;
        }
        Ok(part)
    }

    /// Writes the file of an end.
    fn end(
        &self,
        part: usize,
        place: &Place,
        done: &[Part],
        on_step: &mut dyn FnMut(StreamStep),
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
                let report = end.head.clone().filter(|_| path == HEAD);
                layer(path.clone(), weight, report.map(Into::into).as_ref())
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
            place,
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
        place: &Place,
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
            adapters: BTreeMap::new(),
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
        let path = place.base().join(&part.file);
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

    /// Writes the files beside the tensors, and the adapters of all blocks as one directory.
    pub(super) fn finish(&self, place: &Place, parts: &[Part]) -> Result<()> {
        // Projections of the blocks first, in the order of the model.
        let (ends, blocks): (Vec<_>, Vec<_>) =
            (parts.iter().enumerate()).partition(|(at, _)| self.block_of(*at).is_none());
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
        write_index(&place.base(), &files)?;
        let beside = Files {
            config: &config,
            carried: &self.inputs.carried,
            second: packing.config_file().map(|name| (name, &quantization)),
            certificate: None,
        };
        beside.write_beside(&place.base())?;
        let Some(dir) = place.adapter() else {
            return Ok(());
        };
        let adapted = parts.iter().filter(|part| !part.adapters.is_empty());
        let adapters = adapted
            .map(|part| Adapters::load(part.adapters_dir(place), &self.settings.device))
            .collect::<peft::Result<Vec<_>>>()?;
        let paths = self.plan.layers.iter().map(|layer| layer.path.clone());
        let paths: Vec<String> = paths.collect();
        Ok(Adapters::save_hf_parts(adapters, &paths, dir)?)
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
fn layer(path: String, weight: &Weight, report: Option<&InitializedLayer>) -> Layer {
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
