use std::cell::Cell;
use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::{Linears, set_dropout};

/// One optimizer step of [`fit`](crate::fit()).
///
/// As JSON, a number that is not finite is a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The index of the step, counted from 1.
    pub index: usize,
    /// The number of steps of the training.
    pub n_steps: usize,
    /// The mean loss over the step's targets, before the step and without penalties of adapters; in nats
    /// for the next-token loss.
    #[serde(with = "number")]
    pub loss: f64,
    /// The norm of all gradients before clipping.
    #[serde(with = "number")]
    pub grad_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The number of targets.
    pub n_targets: usize,
    /// The mean loss over the targets of the held-out batches after the step, if it was evaluated then
    /// ([`Evaluation`](crate::Evaluation)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_loss: Option<f64>,
    /// Whether the step changed nothing, since its loss or a gradient was not finite
    /// ([`FitConfig::with_skip_non_finite`](crate::FitConfig::with_skip_non_finite)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_skipped: bool,
}

/// Numbers in JSON, which has none for infinities and NaN.
mod number {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            to.serialize_f64(*value)
        } else {
            to.collect_str(value)
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Stored {
            Number(f64),
            Text(String),
        }
        match Stored::deserialize(from)? {
            Stored::Number(value) => Ok(value),
            Stored::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// The model in the course of [`fit`](crate::fit()).
#[derive(Clone, Copy, Debug)]
pub struct Training<'a, M> {
    model: &'a M,
    steps: &'a [Step],
    checkpoint: &'a Cell<bool>,
}

impl<'a, M: Linears> Training<'a, M> {
    pub(crate) fn new(model: &'a M, steps: &'a [Step], checkpoint: &'a Cell<bool>) -> Self {
        Self {
            model,
            steps,
            checkpoint,
        }
    }

    /// The model after the step, without dropout, as [`fit`](crate::fit()) would return it: to evaluate or
    /// to save.
    ///
    /// It is made at each call, and shares the values of all parameters with the model that is trained.
    pub fn model(&self) -> M {
        finished(self.model)
    }

    /// All steps so far, this one and those before the training was resumed included.
    pub fn steps(&self) -> &'a [Step] {
        self.steps
    }

    /// Asks for a checkpoint of this step, which is written when the callback has returned.
    ///
    /// Without [`FitConfig::with_checkpoints`](crate::FitConfig::with_checkpoints) there is none.
    pub fn request_checkpoint(&self) {
        self.checkpoint.set(true);
    }
}

/// A trained model without gradients and dropout.
pub(crate) fn finished<M: Linears>(model: &M) -> M {
    let mut model = model.valid();
    set_dropout(&mut model, None);
    model
}

/// What a callback returns: `()`, which always goes on, or a [`ControlFlow`].
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use peft::IntoControlFlow;
///
/// assert_eq!(().into_control_flow(), ControlFlow::Continue(()));
/// assert_eq!(ControlFlow::Break(()).into_control_flow(), ControlFlow::Break(()));
/// ```
pub trait IntoControlFlow {
    /// Whether to go on.
    fn into_control_flow(self) -> ControlFlow<()>;
}

impl IntoControlFlow for () {
    fn into_control_flow(self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl IntoControlFlow for ControlFlow<()> {
    fn into_control_flow(self) -> ControlFlow<()> {
        self
    }
}
