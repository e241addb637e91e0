//! The checkpoints of a training: one directory for each, of which the last ones are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tensor_files::{LazyTensor, Series, TensorFile};

use super::identity::Identity;
use super::optimizer::Optimizer;
use super::parameters::{Parameters, Values};
use super::progress::{Progress, Stored};
use crate::{Checkpoints, Error, FitWarning, Result, Step};

const PREFIX: &str = "step-";
const STATE: &str = "state.json";
const STEPS: &str = "steps.jsonl";
const TENSORS: &str = "state.safetensors";
const FILES: [&str; 3] = [STATE, STEPS, TENSORS];
const FORMAT_VERSION: u32 = 1;
/// The names of the tensors of trained parameters begin with it.
const PARAMETERS: &str = "parameters";
const BEST: &str = "best";
const ORDER: &str = "order";

/// `state.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State<I> {
    /// Raised when the meaning of a file changes.
    format_version: u32,
    training: I,
    progress: Stored,
    /// The steps that the optimizer has seen of each parameter.
    optimizer: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

/// The checkpoints of one training, whose directory no other training uses meanwhile.
pub(super) struct Saver<'a> {
    config: &'a Checkpoints,
    training: Identity,
    series: Series,
    /// The step of the newest whole checkpoint.
    newest: Option<u64>,
    damaged: BTreeSet<u64>,
}

impl<'a> Saver<'a> {
    /// # Errors
    /// [`Error::File`] if the directory cannot be used, another training uses it, or it has checkpoints
    /// that this one does not resume; [`Error::NotSaved`].
    pub(super) fn open(
        config: &'a Checkpoints,
        training: Identity,
        parameters: &Parameters,
    ) -> Result<Self> {
        let is_held = |dtype| dtype == burn::tensor::DType::F32;
        if let Some((path, trained)) = parameters.0.iter().find(|(_, of)| !is_held(of.dtype)) {
            return Err(Error::NotSaved {
                path: path.clone(),
                found: trained.dtype,
            });
        }
        let series = Series::open(config.dir(), PREFIX)?;
        if !config.resume && !series.numbers()?.is_empty() {
            return Err(tensor_files::Error::File {
                path: config.dir().into(),
                problem: "has checkpoints of a training; resume it, or choose another directory"
                    .into(),
            }
            .into());
        }
        Ok(Self {
            config,
            training,
            series,
            newest: None,
            damaged: BTreeSet::new(),
        })
    }

    /// The newest whole checkpoint.
    pub(super) fn newest(&self) -> Option<PathBuf> {
        self.newest.map(|number| self.series.path(number))
    }

    /// Goes to the newest whole checkpoint, whose parameters it returns; warns of those that are damaged.
    ///
    /// # Errors
    /// [`Error::OtherTraining`] if it is of another training, [`Error::File`] if all are damaged, one cannot
    /// be read, or the format is not known.
    pub(super) fn resume(
        &mut self,
        parameters: &Parameters,
        progress: &mut Progress,
        optimizer: &mut Optimizer,
        warnings: &mut Vec<FitWarning>,
    ) -> Result<Option<Values>> {
        let mut failed = None;
        for number in self.series.numbers()?.into_iter().rev() {
            let dir = self.series.path(number);
            if let Err(error) = check_whole(&dir) {
                if !is_damage(&error) {
                    // It may be whole.
                    return Err(error.into());
                }
                warnings.push(FitWarning::Damaged {
                    path: dir,
                    problem: error.to_string(),
                });
                self.damaged.insert(number);
                failed.get_or_insert(error);
                continue;
            }
            let to = (parameters, &mut *progress, &mut *optimizer);
            let values = read(&dir, number, &self.training, to)?;
            self.newest = Some(number);
            return Ok(Some(values));
        }
        failed.map_or(Ok(None), |error| Err(error.into()))
    }

    /// Writes the checkpoint of the last step, if there is none, and removes those that are not kept.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written: the others are as they were.
    pub(super) fn save(
        &mut self,
        values: &Values,
        progress: &Progress,
        optimizer: &Optimizer,
    ) -> Result<()> {
        let number = progress.steps.len() as u64;
        if self.newest == Some(number) {
            return Ok(());
        }
        let state = State {
            format_version: FORMAT_VERSION,
            training: &self.training,
            progress: progress.stored(),
            optimizer: optimizer.times(),
        };
        let order = || progress.order.iter().map(|&at| at as u32).collect();
        let order = LazyTensor::words([progress.order.len()], order);
        let tensors = values.tensors(PARAMETERS).into_iter();
        let tensors = tensors
            .chain(progress.best.tensors(BEST))
            .chain(optimizer.tensors())
            .chain([(ORDER.into(), order)]);
        self.series.write(number, |dir| {
            tensor_files::write_tensors(&dir.join(TENSORS), tensors)?;
            tensor_files::write(&dir.join(STEPS), &lines(&progress.steps))?;
            tensor_files::write_json(&dir.join(STATE), &state)?;
            tensor_files::write_sums(dir)
        })?;
        self.newest = Some(number);
        self.damaged.remove(&number);
        self.remove_old(progress.notes.best.map(|best| best.step as u64));
        Ok(())
    }

    /// Removes all but the last whole ones and the one of the step `best`. What cannot be removed stays, and
    /// is tried again after the next one.
    fn remove_old(&mut self, best: Option<u64>) {
        let mut whole = self.series.numbers().unwrap_or_default();
        whole.retain(|number| !self.damaged.contains(number));
        let n_old = whole.len().saturating_sub(self.config.keep);
        let old = whole.into_iter().take(n_old);
        let old = old.filter(|number| Some(*number) != best);
        for number in old.chain(self.damaged.iter().copied()) {
            let _ = self.series.remove(number);
        }
        self.damaged
            .retain(|&number| self.series.path(number).exists());
    }
}

/// Checks the files of a checkpoint against their sums.
fn check_whole(dir: &Path) -> Result<(), tensor_files::Error> {
    let unlisted = tensor_files::check_sums(dir)?;
    match unlisted.iter().find(|name| FILES.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(tensor_files::Error::File {
            path: dir.join(name),
            problem: "has no sum".into(),
        }),
    }
}

/// Whether the error is of what a checkpoint holds, and not of reading it.
fn is_damage(error: &tensor_files::Error) -> bool {
    match error {
        tensor_files::Error::Io { cause, .. } => cause.kind() == ErrorKind::NotFound,
        _ => true,
    }
}

/// The directory of the checkpoint of a step.
pub(super) fn place(config: &Checkpoints, number: u64) -> PathBuf {
    config.dir().join(format!("{PREFIX}{number}"))
}

/// Reads a checkpoint whose files have their sums: its parameters, and where the training is.
///
/// # Errors
/// [`Error::OtherTraining`] if it is of another training than `training`, [`Error::File`] if it is damaged.
pub(super) fn read(
    dir: &Path,
    number: u64,
    training: &Identity,
    (parameters, progress, optimizer): (&Parameters, &mut Progress, &mut Optimizer),
) -> Result<Values> {
    let refuse = |file: &str, problem: String| tensor_files::Error::File {
        path: dir.join(file),
        problem,
    };
    let text = tensor_files::read(&dir.join(STATE))?;
    let damaged = |error: serde_json::Error| refuse(STATE, error.to_string());
    // Before the rest, which another version may have otherwise.
    let Version { format_version } = serde_json::from_slice(&text).map_err(damaged)?;
    if format_version != FORMAT_VERSION {
        let problem =
            format!("has the format version {format_version}; this program reads {FORMAT_VERSION}");
        return Err(refuse(STATE, problem).into());
    }
    let state: State<Identity> = serde_json::from_slice(&text).map_err(damaged)?;
    let differences = state.training.differences(training);
    if !differences.is_empty() {
        return Err(Error::OtherTraining {
            path: dir.into(),
            differences,
        });
    }
    let text = tensor_files::read(&dir.join(STEPS))?;
    let lines = text.split(|&byte| byte == b'\n');
    let steps = lines
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).map_err(|error| refuse(STEPS, error.to_string())));
    let steps: Vec<Step> = steps.collect::<Result<_, _>>()?;
    if steps.len() as u64 != number {
        let problem = format!("has {} steps, not {number}", steps.len());
        return Err(refuse(STEPS, problem).into());
    }
    let mut file = TensorFile::open(&dir.join(TENSORS))?;
    let (order, _) = file.words::<1>(ORDER)?;
    let restored = progress.restore(steps, order, state.progress);
    restored.map_err(|problem| refuse(TENSORS, problem))?;
    optimizer.read(&mut file, &state.optimizer, parameters)?;
    if progress.notes.has_best {
        progress.best = Values::read(&mut file, BEST, parameters)?;
    }
    Ok(Values::read(&mut file, PARAMETERS, parameters)?)
}

/// One line of JSON for each step.
fn lines(steps: &[Step]) -> Vec<u8> {
    let lines = steps.iter().map(|step| {
        let line = serde_json::to_string(step).expect("numbers and text");
        line + "\n"
    });
    lines.collect::<String>().into_bytes()
}
