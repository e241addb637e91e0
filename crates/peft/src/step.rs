use std::ops::ControlFlow;

use crate::{Linears, set_dropout};

/// One optimizer step of [`fit`](crate::fit()).
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The index of the step, counted from 1.
    pub index: usize,
    /// The number of steps of the training.
    pub n_steps: usize,
    /// The mean loss over the step's targets, before the step and without penalties of adapters; in nats
    /// for the next-token loss.
    pub loss: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The number of targets.
    pub n_targets: usize,
}

/// The model in the course of [`fit`](crate::fit()).
#[derive(Clone, Copy, Debug)]
pub struct Training<'a, M> {
    model: &'a M,
}

impl<'a, M: Linears> Training<'a, M> {
    pub(crate) fn new(model: &'a M) -> Self {
        Self { model }
    }

    /// The model after the step, without dropout, as [`fit`](crate::fit()) would return it: to evaluate or
    /// to save.
    ///
    /// It is made at each call, and shares the values of all parameters with the model that is trained.
    pub fn model(&self) -> M {
        let mut model = self.model.valid();
        set_dropout(&mut model, None);
        model
    }
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
