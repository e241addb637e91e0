use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Batch, Error, Result};

/// The evaluation of a model on held-out batches in the course of [`fit`](crate::fit()).
///
/// The loss is the mean over the targets of all batches, without dropout and without penalties of adapters
/// ([`Step::held_out_loss`](crate::Step::held_out_loss)).
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use peft::{Batch, Evaluation, FitConfig};
///
/// let tokens = Tensor::<2, Int>::from_data([[0, 1, 2, 3]], &Device::flex());
/// let held_out = vec![Batch::new(tokens)?];
/// let evaluation = Evaluation::new(held_out)
///     .with_every(20)
///     .with_patience(3)
///     .with_restore_best(true);
/// let config = FitConfig::new().with_evaluation(evaluation.clone());
/// assert!(config.check().is_ok());
/// assert!(config.with_evaluation(evaluation.with_patience(0)).check().is_err());
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Evaluation {
    batches: Arc<[Batch]>,
    pub(crate) schedule: EvaluationSchedule,
}

/// When there is an evaluation, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct EvaluationSchedule {
    pub(crate) every: usize,
    pub(crate) patience: Option<usize>,
    pub(crate) restore_best: bool,
}

/// The step after which the loss on the held-out batches was lowest, the first of several.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// The step, counted from 1.
    pub step: usize,
    /// The loss.
    pub loss: f64,
}

impl Evaluation {
    /// An evaluation on these batches, after every 100 steps and after the last one.
    pub fn new(batches: impl Into<Arc<[Batch]>>) -> Self {
        Self {
            batches: batches.into(),
            schedule: EvaluationSchedule {
                every: 100,
                patience: None,
                restore_best: false,
            },
        }
    }

    /// Sets the number of steps after which there is an evaluation; 100 by default.
    pub fn with_every(mut self, every: usize) -> Self {
        self.schedule.every = every;
        self
    }

    /// Sets how many evaluations in a row may be no better than the best one before the training ends;
    /// `None` by default, for all steps.
    pub fn with_patience(mut self, patience: impl Into<Option<usize>>) -> Self {
        self.schedule.patience = patience.into();
        self
    }

    /// Sets whether the model gets the parameters of the best evaluation in the end, however the training
    /// ends; false by default. They are kept in memory, and in checkpoints.
    pub fn with_restore_best(mut self, restore_best: bool) -> Self {
        self.schedule.restore_best = restore_best;
        self
    }

    /// The held-out batches.
    pub fn batches(&self) -> &[Batch] {
        &self.batches
    }

    pub(crate) fn check(&self) -> Result<()> {
        let settings = [
            ("the number of held-out batches", self.batches.len()),
            ("the steps between evaluations", self.schedule.every),
            ("patience", self.schedule.patience.unwrap_or(1)),
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

    /// The number of held-out documents that are among those of the training, and of all of them.
    pub(crate) fn shared_with(&self, training: &[Batch]) -> [usize; 2] {
        let mut held_out: HashMap<Vec<i64>, usize> = HashMap::new();
        for document in self.batches.iter().flat_map(Batch::documents) {
            *held_out.entry(document).or_default() += 1;
        }
        let n_held_out = held_out.values().sum();
        let trained = training.iter().flat_map(Batch::documents);
        let shared = trained.filter_map(|document| held_out.remove(&document));
        [shared.sum(), n_held_out]
    }
}

/// By the content of the batches.
impl PartialEq for Evaluation {
    fn eq(&self, other: &Self) -> bool {
        let sums = |of: &Self| of.batches.iter().map(Batch::sha256).collect::<Vec<_>>();
        self.schedule == other.schedule && sums(self) == sums(other)
    }
}
