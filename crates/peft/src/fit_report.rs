use std::fmt;
use std::path::PathBuf;

use crate::{BestEvaluation, Step};

/// What came of [`fit`](crate::fit()).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct FitReport {
    /// Why it ended.
    pub end: FitEnd,
    /// All steps, those before it was resumed included.
    pub steps: Vec<Step>,
    /// The step of the checkpoint after which it was resumed.
    pub resumed_from: Option<usize>,
    /// The best evaluation, if there was one. With
    /// [`Evaluation::with_restore_best`](crate::Evaluation::with_restore_best), the model has its parameters.
    pub best: Option<BestEvaluation>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// What may be wrong.
    pub warnings: Vec<FitWarning>,
}

/// Why a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FitEnd {
    /// All steps were taken.
    LastStep,
    /// The callback ended it.
    Callback,
    /// The loss on the held-out batches did not fall any more
    /// ([`Evaluation::with_patience`](crate::Evaluation::with_patience)).
    Patience,
}

/// What may be wrong with a training that went through.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FitWarning {
    /// A checkpoint that is not whole: the training went on from one before it.
    Damaged {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Held-out documents on which the model is trained.
    SharedDocuments {
        /// The number of them.
        n_shared: usize,
        /// The number of all held-out documents.
        n_held_out: usize,
    },
    /// Trained parameters that no batch has moved: their gradient was zero in all steps.
    NoGradient {
        /// The parameters.
        paths: Vec<String>,
    },
}

impl fmt::Display for FitWarning {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Damaged { path, problem } => {
                write!(f, "skipped the checkpoint `{}`: {problem}", path.display())
            }
            Self::SharedDocuments {
                n_shared,
                n_held_out,
            } => write!(
                f,
                "{n_shared} of {n_held_out} held-out documents are among those of the training; their loss says nothing about others"
            ),
            Self::NoGradient { paths } => write!(
                f,
                "{} of the trained parameters had no gradient in any step, `{}` first",
                paths.len(),
                paths.first().map_or("", String::as_str)
            ),
        }
    }
}
