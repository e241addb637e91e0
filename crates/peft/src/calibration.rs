use std::ops::Range;

use burn::tensor::Tensor;
use quant_core::{Gram, Needs};

use crate::{Batch, Blocks, Linears, Spans};

/// A model, or a part of one, whose projections can be run, and so calibrated, a few at a time.
///
/// A stage is a set of projections that read the same input. Stages follow each other from the first
/// block to the last; together they are the forward pass from the embedding to the norm before the head.
pub trait Stages: Linears {
    /// The projections of each stage, as indices into [`Linears::linears`].
    fn stages(&self) -> Vec<Range<usize>>;

    /// The stages of each block, one block after the other.
    fn block_stages(&self) -> Vec<Range<usize>>;

    /// The input of the projections of `stage`, `[batch, seq, d_in]`, from the state before it.
    fn input(&self, stage: usize, state: &State) -> Tensor<3>;

    /// The state after `stage`, from the one before it.
    fn advance(&self, stage: usize, state: State) -> State;
}

/// The activations of a batch between two stages.
#[derive(Clone, Debug)]
pub struct State {
    /// The residual stream, `[batch, seq, hidden]`.
    pub residual: Tensor<3>,
    /// The input of the next stage, `[batch, seq, d_in]`; none between two blocks, where the residual
    /// stream gives it.
    pub input: Option<Tensor<3>>,
    /// The documents of the batch.
    pub spans: Spans,
}

impl State {
    /// The state of a batch before the first stage of a model.
    pub fn start<M: Blocks>(model: &M, batch: &Batch) -> Self {
        let spans = batch.spans();
        let embedded = model.embed(batch.tokens(), &model.positions(spans));
        Self::of(embedded, batch)
    }

    /// The state of a batch before a block, from the residual stream `[batch, seq, hidden]`.
    pub fn of(residual: Tensor<3>, batch: &Batch) -> Self {
        Self {
            residual,
            input: None,
            spans: batch.spans().clone(),
        }
    }
}

/// The activations of a calibration on their way through a model, stage by stage.
///
/// Between two calls of [`next_stage`](Streams::next_stage) the caller may change the layers of the
/// stage. The next stage reads inputs computed with the changed layers.
///
/// ```no_run
/// # use peft::{Batch, Blocks, Stages, Streams};
/// # use quant_core::{Needs, Quantizer};
/// # fn run<M: Blocks + Stages>(model: &mut M, rtn: &impl Quantizer, calibration: &[Batch]) -> peft::Result<()> {
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
pub struct Streams<'a> {
    calibration: &'a [Batch],
    /// The stage that [`Streams::next_stage`] returns next.
    next: usize,
    /// The stage before which `states` are: `next`, or the one before it, whose layers may change.
    at: usize,
    /// Through the layers as they are.
    states: Vec<State>,
    /// Through the dense layers, up to the input of stage `next`; for quantizers that need the drift.
    dense: Option<Vec<State>>,
}

/// A stage that a calibration has reached.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its layers, as indices into [`Linears::linears`](crate::Linears::linears).
    pub layers: Range<usize>,
    /// The Gram of their inputs, without those of padding; none without a calibration.
    pub gram: Option<Gram>,
}

impl<'a> Streams<'a> {
    /// The calibration before the first stage. For [`Needs::Drift`] it runs through the dense layers too.
    pub fn start<M: Blocks>(model: &M, calibration: &'a [Batch], needs: Needs) -> Self {
        let states = calibration.iter().map(|batch| State::start(model, batch));
        Self::of(states.collect(), calibration, needs)
    }

    /// The calibration before the first stage of a model, or of a part of it, from the state of each batch
    /// there.
    pub fn of(states: Vec<State>, calibration: &'a [Batch], needs: Needs) -> Self {
        Self {
            calibration,
            next: 0,
            at: 0,
            dense: (needs == Needs::Drift).then(|| states.clone()),
            states,
        }
    }

    /// Runs the calibration through the layers of the last stage, as they are now, and returns the next
    /// stage, whose layers must still be dense; `None` after the last one.
    pub fn next_stage<M: Stages>(&mut self, model: &M) -> Option<Stage> {
        let stage = self.next;
        let layers = model.stages().get(stage)?.clone();
        self.settle(model);
        let gram = self.gram(model, stage, layers.start);
        if let Some(dense) = &mut self.dense {
            advance(dense, model, stage);
        }
        self.next += 1;
        Some(Stage { layers, gram })
    }

    /// Runs the calibration through the last stage of a part of a model, once
    /// [`next_stage`](Streams::next_stage) has returned them all. The next stage is the first one of the
    /// part that follows.
    pub fn leave<M: Stages>(&mut self, part: &M) {
        self.settle(part);
        (self.at, self.next) = (0, 0);
    }

    /// Runs the calibration through the layers of the last stage, which stay as they are now, and returns
    /// the state of each batch before the next stage.
    pub fn states<M: Stages>(&mut self, model: &M) -> &[State] {
        self.settle(model);
        &self.states
    }

    /// The state of each batch before the next stage, through the dense layers; none unless the drift is
    /// needed.
    pub fn dense_states(&self) -> Option<&[State]> {
        self.dense.as_deref()
    }

    /// The batches of the calibration.
    pub fn calibration(&self) -> &'a [Batch] {
        self.calibration
    }

    fn settle<M: Stages>(&mut self, model: &M) {
        if self.at < self.next {
            advance(&mut self.states, model, self.at);
            self.at = self.next;
        }
    }

    /// Runs the calibration through a part of a model whose layers stay as they are.
    ///
    /// For the drift, `dense` is the part with its dense layers.
    pub fn pass<M: Stages>(&mut self, part: &M, dense: Option<&M>) {
        let n_stages = part.stages().len();
        for stage in 0..n_stages {
            advance(&mut self.states, part, stage);
        }
        if let Some((states, dense)) = self.dense.as_mut().zip(dense) {
            for stage in 0..n_stages {
                advance(states, dense, stage);
            }
        }
    }

    /// Whether the calibration runs through the dense layers too.
    pub fn has_drift(&self) -> bool {
        self.dense.is_some()
    }

    /// The Gram of the inputs of `stage`, those of `layer`; none without a calibration.
    fn gram<M: Stages>(&self, model: &M, stage: usize, layer: usize) -> Option<Gram> {
        let device = self.states.first()?.residual.device();
        let [d_in, _] = model.linears()[layer].1.weight().dims();
        let mut gram = Gram::new(d_in, &device);
        for (at, (batch, state)) in self.calibration.iter().zip(&self.states).enumerate() {
            let input = |state| batch.of_text(model.input(stage, state));
            match &self.dense {
                Some(dense) => gram.update_with_drift(input(state), input(&dense[at])),
                None => gram.update(input(state)),
            }
        }
        Some(gram)
    }
}

fn advance<M: Stages>(states: &mut [State], model: &M, stage: usize) {
    for state in states {
        *state = model.advance(stage, state.clone());
    }
}
