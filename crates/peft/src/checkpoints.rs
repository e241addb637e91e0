use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Where [`fit`](crate::fit()) saves the state of a training, so that it can be resumed.
///
/// A checkpoint is a directory `step-N` with all that the steps after step `N` depend on: the trained
/// parameters and the state of the optimizer with their exact bits, the random states, the order of the
/// batches and the place in it, the best evaluation, and the [`Step`](crate::Step)s so far. On one machine, a
/// training that was stopped and resumed gives the bits of one that was not, on the CPU with any number of
/// threads.
///
/// Checkpoints are written atomically; older ones are removed once a new one is whole. They have no
/// adapters that another program reads: [`Adapters::save`](crate::Adapters::save) writes those.
///
/// # Examples
/// ```
/// use peft::{Checkpoints, FitConfig};
///
/// let checkpoints = Checkpoints::new("run/checkpoints").with_every(50).with_resume(true);
/// let config = FitConfig::new().with_checkpoints(checkpoints);
/// assert!(config.check().is_ok());
/// let none = Checkpoints::new("run/checkpoints").with_keep(0);
/// assert!(config.with_checkpoints(none).check().is_err());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoints {
    dir: PathBuf,
    pub(crate) every: usize,
    pub(crate) keep: usize,
    pub(crate) resume: bool,
}

impl Checkpoints {
    /// Checkpoints in a directory, which is made if need be: after every 100 steps, and after the last one
    /// or the one at which a callback ends the training; the last two are kept.
    ///
    /// One training at a time uses the directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            every: 100,
            keep: 2,
            resume: false,
        }
    }

    /// Sets the number of steps after which there is a checkpoint; 100 by default.
    pub fn with_every(mut self, every: usize) -> Self {
        self.every = every;
        self
    }

    /// Sets how many checkpoints are kept; 2 by default. That of the step with the best evaluation, if there
    /// is one, is kept beside them.
    pub fn with_keep(mut self, keep: usize) -> Self {
        self.keep = keep;
        self
    }

    /// Sets whether the training goes on after the newest checkpoint; false by default, which refuses a
    /// directory with checkpoints.
    ///
    /// The model must be as it was when the training began, with adapters attached in the same way. A
    /// directory without checkpoints begins the training. A checkpoint that is damaged is skipped for the one
    /// before, and reported ([`FitWarning::Damaged`](crate::FitWarning::Damaged)).
    pub fn with_resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn check(&self) -> Result<()> {
        let settings = [
            ("the steps between checkpoints", self.every),
            ("the number of kept checkpoints", self.keep),
        ];
        match settings.into_iter().find(|(_, value)| *value == 0) {
            None => Ok(()),
            Some((setting, _)) => Err(Error::Setting {
                setting,
                value: "0".into(),
                expected: "at least 1",
            }),
        }
    }
}
