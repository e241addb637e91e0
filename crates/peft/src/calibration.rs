use std::ops::Range;

use burn::tensor::Tensor;
use quant_core::{Gram, Needs};

use crate::{Batch, Blocks};

/// A model whose projections can be run, and so calibrated, a few at a time.
///
/// A stage is a set of projections that read the same input. Stages follow each other from the
/// embedding to the head; the forward pass of the model is [`start`](Stages::start), every
/// [`advance`](Stages::advance) in turn, and the head.
pub trait Stages: Blocks {
    /// The activations of a batch between two stages.
    type State: Clone;

    /// The projections of each stage, as indices into [`Linears::linears`](crate::Linears::linears).
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

/// The activations of a calibration on their way through a model, stage by stage.
///
/// Between two calls of [`next_stage`](Streams::next_stage) the caller may change the layers of the
/// stage. The next stage reads inputs computed with the changed layers.
///
/// ```no_run
/// # use peft::{Batch, Stages, Streams};
/// # use quant_core::{Needs, Quantizer};
/// # fn run<M: Stages>(model: &mut M, rtn: &impl Quantizer, calibration: &[Batch]) -> peft::Result<()> {
/// let mut streams = Streams::start(model, calibration, Needs::Gram);
/// while let Some(stage) = streams.next_stage(model) {
///     for at in stage.layers {
///         let (path, linear) = model.linears_mut().swap_remove(at);
///         linear.quantize(&path, rtn, stage.gram.as_ref())?;
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Streams<'a, M: Stages> {
    calibration: &'a [Batch],
    stages: Vec<Range<usize>>,
    /// The stage that [`Streams::next_stage`] returns next.
    next: usize,
    /// Through the layers as they are, up to the input of stage `next - 1`.
    states: Vec<M::State>,
    /// Through the dense layers, up to the input of stage `next`; for quantizers that need the drift.
    dense: Option<Vec<M::State>>,
}

/// A stage that a calibration has reached.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its layers, as indices into [`Linears::linears`](crate::Linears::linears).
    pub layers: Range<usize>,
    /// The Gram of their inputs, without those of padding; none without a calibration.
    pub gram: Option<Gram>,
}

impl<'a, M: Stages> Streams<'a, M> {
    /// The calibration before the first stage. For [`Needs::Drift`] it runs through the dense layers too.
    pub fn start(model: &M, calibration: &'a [Batch], needs: Needs) -> Self {
        let states = calibration.iter().map(|batch| model.start(batch));
        let states: Vec<_> = states.collect();
        Self {
            calibration,
            stages: model.stages(),
            next: 0,
            dense: (needs == Needs::Drift).then(|| states.clone()),
            states,
        }
    }

    /// Runs the calibration through the layers of the last stage, as they are now, and returns the next
    /// stage, whose layers must still be dense; `None` after the last one.
    pub fn next_stage(&mut self, model: &M) -> Option<Stage> {
        let stage = self.next;
        let layers = self.stages.get(stage)?.clone();
        if stage > 0 {
            advance(&mut self.states, model, stage - 1);
        }
        let gram = self.gram(model, layers.start);
        if let Some(dense) = &mut self.dense {
            advance(dense, model, stage);
        }
        self.next += 1;
        Some(Stage { layers, gram })
    }

    /// The Gram of the inputs of `layer`; none without a calibration.
    fn gram(&self, model: &M, layer: usize) -> Option<Gram> {
        let first = M::input(self.states.first()?);
        let [d_in, _] = model.linears()[layer].1.weight().dims();
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
}

fn advance<M: Stages>(states: &mut [M::State], model: &M, stage: usize) {
    for state in states {
        *state = model.advance(stage, state.clone());
    }
}
