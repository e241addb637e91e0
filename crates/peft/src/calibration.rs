use std::ops::Range;

use burn::tensor::Tensor;
use quant_core::Gram;

use crate::{Batch, Linears};

/// A model whose projections can be run, and so calibrated, a few at a time.
///
/// A stage is a set of projections that read the same input. Stages follow each other from the
/// embedding to the head; the forward pass of the model is [`start`](Stages::start), every
/// [`advance`](Stages::advance) in turn, and the head.
pub trait Stages: Linears {
    /// What a batch carries from one stage to the next.
    type State: Clone;

    /// The projections of each stage, as places in [`Linears::linears`].
    fn stages(&self) -> Vec<Range<usize>>;

    /// The stages of one block of the model.
    fn block_stages(&self, block: usize) -> Range<usize>;

    /// The state of a batch before the first stage.
    fn start(&self, batch: &Batch) -> Self::State;

    /// The input of the projections of the next stage, `[batch, seq, d_in]`.
    fn input(state: &Self::State) -> Tensor<3>;

    /// The state after `stage`.
    fn advance(&self, stage: usize, state: Self::State) -> Self::State;
}

/// A calibration on its way through a model whose layers change as it passes: each stage brings to
/// the next what its layers, as they are then, make of the tokens.
#[derive(Clone)]
pub struct Streams<'a, M: Stages> {
    calibration: &'a [Batch],
    /// Through the layers as they are now.
    states: Vec<M::State>,
    /// Through the dense layers, for quantizers that ask for the drift.
    dense: Option<Vec<M::State>>,
}

impl<'a, M: Stages> Streams<'a, M> {
    /// Before the first stage; `dense` for a second stream through the dense layers.
    pub fn start(model: &M, calibration: &'a [Batch], dense: bool) -> Self {
        let states = calibration.iter().map(|batch| model.start(batch));
        let states: Vec<_> = states.collect();
        let dense = dense.then(|| states.clone());
        Self {
            calibration,
            states,
            dense,
        }
    }

    /// The Gram of the inputs of a stage's layers, if there is any calibration; what only fills sequences
    /// up is left out.
    pub fn gram(&self, model: &M, range: &Range<usize>) -> Option<Gram> {
        let first = M::input(self.states.first()?);
        let [d_in, _] = model.linears()[range.start].1.weight().dims();
        let mut gram = Gram::new(d_in, &first.device());
        for (at, (batch, state)) in self.calibration.iter().zip(&self.states).enumerate() {
            let input = |state| batch.of_text(M::input(state));
            match &self.dense {
                Some(dense) => gram.update_with_drift(input(state), input(&dense[at])),
                None => gram.update(input(state)),
            }
        }
        Some(gram)
    }

    /// The tokens of the dense stream through `stage`, if there is one. To be called before its layers
    /// are changed.
    pub fn advance_dense(&mut self, model: &M, stage: usize) {
        for state in self.dense.iter_mut().flatten() {
            *state = model.advance(stage, state.clone());
        }
    }

    /// The tokens through `stage`, once its layers are changed.
    pub fn advance(&mut self, model: &M, stage: usize) {
        for state in &mut self.states {
            *state = model.advance(stage, state.clone());
        }
    }
}
