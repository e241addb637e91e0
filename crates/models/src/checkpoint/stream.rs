//! Models that are quantized and initialized from files to files, with one block in memory at a time.

mod ends;
mod inputs;
mod journal;
mod place;
mod run;

use std::path::Path;

use burn::tensor::Device;
use peft::{Batch, InitializedLayer, LayerReport, Recipe, StageMethod};
use quant_core::Quantizer;
use tensor_files::FloatType;

use self::journal::{Journal, Layer};
use self::place::Place;
use self::run::Run;
use super::kind::CheckpointFormat;
use crate::Result;
use crate::quantize::Quantization;
use crate::stages::Window;

/// The settings of [`quantize_to`] and [`initialize_to`].
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

/// A step of [`quantize_to`] or [`initialize_to`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum StreamStep<'a> {
    /// A run that was stopped goes on; the layers of so many blocks are done.
    Resumed {
        /// The blocks that are done.
        n_blocks: usize,
    },
    /// A layer, or the head, is quantized.
    Quantized(&'a LayerReport),
    /// A layer is quantized, and has its adapter.
    Initialized(&'a InitializedLayer),
    /// A block is on the disk.
    Block {
        /// Its index, from 0.
        index: usize,
    },
    /// All is on the disk, and gets its name next.
    Written {
        /// The directory for now. A file that is added to it is part of the result.
        dir: &'a Path,
        /// All layers, those of the runs before too.
        layers: &'a [InitializedLayer],
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
/// Before a weight is read: as [`plan`](crate::plan()) and [`Plan::check`](crate::Plan::check); as
/// [`Batch::check`], [`peft::Error::NoCalibration`], [`peft::Error::RepeatedCalibration`];
/// [`CheckpointError::UnexpectedTensor`](crate::CheckpointError::UnexpectedTensor);
/// [`tensor_files::Error::OutputExists`] and [`tensor_files::Error::OutputBusy`];
/// [`StreamError`](crate::StreamError).
///
/// Later: [`peft::Error::Quant`] with the layer that its quantizer refuses,
/// [`CheckpointError::CannotHold`](crate::CheckpointError::CannotHold) with the layers of a block whose
/// values the format does not hold, [`tensor_files::Error::Io`] if a file
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
    let method = Quantization(recipe);
    let on_step = |step: StreamStep| {
        on_step(match step {
            StreamStep::Initialized(layer) => StreamStep::Quantized(&layer.report),
            step => step,
        });
    };
    let layers = initialize_to(dir, out, &method, calibration, settings, on_step)?;
    Ok(layers.into_iter().map(|layer| layer.report).collect())
}

/// Runs a method that chooses packed weights and adapters on the model of a directory, one block in memory
/// at a time, and writes a new directory with the model in `base` and the adapters, for PEFT, in `adapter`; or
/// with the model alone, as [`quantize_to`] does, if the method attaches no adapters
/// ([`StageMethod::has_adapters`]).
///
/// The methods are those of `loftq`, as a `loftq::Initializer`. The result is that of [`load`](crate::load),
/// `loftq::init`, [`peft::detach`], [`save_as`](crate::save_as) and [`peft::Adapters::save_hf`], bit for bit,
/// but that the tensors of the base are in several files, as those of [`quantize_to`].
///
/// In memory is what [`quantize_to`] has there and what the method takes: a decomposition is of about the size
/// of its layer in `f32`. At the end the adapters of all blocks are.
///
/// If the process is killed, the same call with [`Streaming::with_resume`] goes on after the last whole block,
/// with the same result, as [`quantize_to`] does; the method and all of its settings must be the same, too.
/// The adapters of the blocks that are done are kept beside the journal until then.
///
/// # Errors
/// Before a weight is read: the error of [`StageMethod::check`], such as [`peft::Error::NoTarget`],
/// [`peft::Error::Rank`], or [`peft::Error::Method`] with that of a method which needs all of the model at
/// once, or has no such format; otherwise as [`quantize_to`].
///
/// # Examples
/// ```no_run
/// use models::{StreamStep, Streaming, Window};
///
/// # fn run(initializer: &impl peft::StageMethod<Window>) -> Result<(), models::Error> {
/// let device = burn::tensor::Device::flex();
/// let settings = Streaming::new(&device).with_resume(true);
/// models::initialize_to("Llama-2-70b-hf", "Llama-2-70b-loftq", initializer, &[], &settings, |step| {
///     if let StreamStep::Initialized(layer) = step {
///         println!("{}: {}", layer.report.path, layer.report.error);
///     }
/// })?;
/// let mut lm = models::load("Llama-2-70b-loftq/base", &device)?;
/// let adapters = peft::Adapters::open("Llama-2-70b-loftq/adapter", &lm.model)?;
/// peft::activate(&mut lm.model, &adapters)?;
/// # Ok(())
/// # }
/// ```
pub fn initialize_to(
    dir: impl AsRef<Path>,
    out: impl AsRef<Path>,
    method: &(impl StageMethod<Window> + ?Sized),
    calibration: &[Batch],
    settings: &Streaming,
    mut on_step: impl FnMut(StreamStep),
) -> Result<Vec<InitializedLayer>> {
    let place = Place::open(out, method.has_adapters())?;
    let run = Run::new(dir.as_ref(), method, calibration, settings)?;
    stream(&run, place, &mut on_step)
}

/// Does what is not done, and gives the result its name.
fn stream<T: StageMethod<Window> + ?Sized>(
    run: &Run<T>,
    place: Place,
    on_step: &mut dyn FnMut(StreamStep),
) -> Result<Vec<InitializedLayer>> {
    let mut journal = Journal::open(&place, run.settings()?, &run.files(), run.resumes())?;
    if let Err(error) = run.parts(&place, &mut journal, on_step) {
        if journal.parts().len() <= 1 {
            // No block is done: there is nothing to go on with.
            let _ = place.remove();
        }
        return Err(error);
    }
    run.finish(&place, journal.parts())?;
    let all = journal.parts().iter().flat_map(|part| &part.layers);
    let layers: Vec<InitializedLayer> = all.filter_map(Layer::report).collect();
    on_step(StreamStep::Written {
        dir: &place.files(),
        layers: &layers,
    });
    place.publish()?;
    Ok(layers)
}
