//! The layers of a block learned together, so that the block, on the inputs that reach it through packed
//! blocks, gives the output that the dense one gives on its own inputs.

use std::ops::Range;
use std::time::Instant;

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Gradients, Tensor};
use peft::{Batch, InitializedLayer, Linear, Linears, Recipe, Stages, State, Streams, Weight};
use quant_core::{Gram, Quantized, sum_of_squares};

use crate::{Error, Layer, Result, Start};

/// A method that learns the layers of a block together.
pub(crate) trait BlockMethod {
    type Learned: LearnedLayer;

    /// Passes over the calibration for each block.
    fn rounds(&self) -> usize;

    /// What is learned of a layer, from its weight quantized alone.
    fn learned(
        &self,
        layer: &Layer<'_>,
        linear: &Linear,
        plain: &Quantized,
    ) -> Result<Self::Learned>;

    /// Initializes the layer at an index, which the recipe leaves dense; none if it stays as it is.
    fn init_dense<M: Linears>(
        &self,
        part: &mut M,
        at: usize,
        gram: Option<&Gram>,
    ) -> Result<Option<InitializedLayer>>;

    /// Puts a start into its layer. `plain` is the weight quantized alone, for the report.
    fn place(
        &self,
        linear: &mut Linear,
        layer: &Layer<'_>,
        start: Start,
        plain: Tensor<2>,
        seconds: f64,
    ) -> Result<InitializedLayer>;
}

/// What is learned of a layer.
pub(crate) trait LearnedLayer {
    /// The weight that the block computes with, differentiable in what is learned.
    fn weight(&self) -> Tensor<2>;

    /// Changes what is learned; `done` is the share of the steps before this one.
    fn step(&mut self, gradients: &mut Gradients, done: f64);

    /// The packed weight.
    fn finish(self, path: &str, round: usize) -> Result<Start>;
}

/// Learns one block after the other.
pub(crate) fn run<M: Stages, B: BlockMethod>(
    method: &B,
    part: &mut M,
    recipe: &dyn Recipe,
    streams: &mut Streams<'_>,
    on_layer: &mut dyn FnMut(&InitializedLayer),
) -> Result<Vec<InitializedLayer>> {
    let mut layers = Vec::new();
    for stages in part.block_stages() {
        let clock = Instant::now();
        let inputs = streams.states(part).to_vec();
        let mut dense = streams.clone();
        let mut learners = learners(method, part, recipe, &mut dense, stages.len())?;
        let block = Block {
            part: part.clone().no_grad().train(),
            stages: stages.clone(),
            calibration: streams.calibration(),
            inputs,
            targets: residuals(dense.dense_states().unwrap_or_default()),
        };
        drop(dense);
        let rounds = learn(&block, &mut learners, method.rounds())?;
        drop(block);
        let seconds = clock.elapsed().as_secs_f64() / learners.len().max(1) as f64;

        let mut learners = learners.into_iter().peekable();
        for _ in stages {
            let Some(stage) = streams.next_stage(part) else {
                break;
            };
            for at in stage.layers {
                let gram = stage.gram.as_ref();
                let (path, linear) = part.linears_mut().swap_remove(at);
                let done = match learners.next_if(|learner| learner.path == path) {
                    None => method.init_dense(part, at, gram)?,
                    Some(learner) => {
                        let layer = Layer {
                            path: &path,
                            weight: learner.dense.clone(),
                            gram,
                            fisher: None,
                        };
                        let plain = learner.plain.weight.dequantize();
                        let start = learner.start(rounds)?;
                        Some(method.place(linear, &layer, start, plain, seconds)?)
                    }
                };
                if let Some(done) = done {
                    on_layer(&done);
                    layers.push(done);
                }
            }
        }
    }
    Ok(layers)
}

/// A layer of the block that is learned.
struct Learner<L> {
    path: String,
    dense: Tensor<2>,
    /// Its weight quantized alone.
    plain: Quantized,
    learned: L,
}

impl<L: LearnedLayer> Learner<L> {
    /// Its weight quantized alone after no rounds.
    fn start(self, rounds: usize) -> Result<Start> {
        if rounds == 0 {
            return Ok(Start::packed(self.plain, None, 0, 0.0));
        }
        Ok(Start {
            notes: self.plain.notes,
            ..self.learned.finish(&self.path, rounds)?
        })
    }
}

/// The layers of the next block, of so many stages, with grids from the quantizer. It sees the inputs that
/// the dense block gives them from the inputs of the block.
fn learners<M: Stages, B: BlockMethod>(
    method: &B,
    part: &M,
    recipe: &dyn Recipe,
    streams: &mut Streams<'_>,
    n_stages: usize,
) -> Result<Vec<Learner<B::Learned>>> {
    let mut learners = Vec::new();
    for _ in 0..n_stages {
        let Some(stage) = streams.next_stage(part) else {
            break;
        };
        for at in stage.layers {
            let (path, linear) = part.linears().swap_remove(at);
            let Some(quantizer) = recipe.quantizer(&path) else {
                continue;
            };
            let layer = Layer::of(&path, linear, stage.gram.as_ref());
            let (plain, _) = layer.quantize(layer.weight.clone(), quantizer)?;
            learners.push(Learner {
                learned: method.learned(&layer, linear, &plain)?,
                dense: layer.weight.clone(),
                plain,
                path,
            });
        }
    }
    Ok(learners)
}

/// The residual streams of states, `[batch, seq, hidden]`.
fn residuals(states: &[State]) -> Vec<Tensor<3>> {
    let states = states.iter();
    states.map(|state| state.residual.clone()).collect()
}

/// A block to be learned.
struct Block<'a, M> {
    /// The part of the model that it is in, with its layers dense, and everything frozen.
    part: M,
    stages: Range<usize>,
    calibration: &'a [Batch],
    /// The states before it, through packed layers.
    inputs: Vec<State>,
    /// The outputs of the dense model's block for its own inputs.
    targets: Vec<Tensor<3>>,
}

impl<M: Stages> Block<'_, M> {
    /// How far the output for one batch is from the target, with this weight of each layer that is learned.
    fn difference<L>(
        &self,
        at: usize,
        learners: &[Learner<L>],
        weight: impl Fn(&Learner<L>) -> Tensor<2>,
    ) -> Tensor<2> {
        let mut part = self.part.clone();
        for (path, linear) in part.linears_mut() {
            if let Some(learner) = learners.iter().find(|learner| learner.path == path) {
                // Not a leaf of the graph: what is learned is in `learned`.
                let weight = Param::initialized(ParamId::new(), weight(learner));
                *linear = linear.with_weight(Weight::Dense(weight));
            }
        }
        let input = self.inputs[at].clone();
        let input = State {
            residual: input.residual.autodiff(),
            ..input
        };
        let through = |state, stage| part.advance(stage, state);
        let output = self.stages.clone().fold(input, through);
        let difference = output.residual - self.targets[at].clone().autodiff();
        self.calibration[at].of_text(difference).cast(DType::F32)
    }

    /// The squared error for all batches.
    fn total<L>(&self, learners: &[Learner<L>], weight: impl Fn(&Learner<L>) -> Tensor<2>) -> f64 {
        let differences = (0..self.inputs.len()).map(|at| self.difference(at, learners, &weight));
        let errors = differences.map(|difference| sum_of_squares(difference.inner()));
        errors.sum()
    }
}

/// Learns a block; returns the number of rounds, 0 if they did not lower the error of the weights quantized
/// alone.
fn learn<M: Stages, L: LearnedLayer>(
    block: &Block<'_, M>,
    learners: &mut [Learner<L>],
    rounds: usize,
) -> Result<usize> {
    let Some(first) = learners.first() else {
        return Ok(0);
    };
    let path = first.path.clone();
    let n_batches = block.inputs.len();
    let power =
        |(batch, target): (&Batch, &Tensor<3>)| sum_of_squares(batch.of_text(target.clone()));
    let targets = block.calibration.iter().zip(&block.targets);
    let scale = n_batches as f32 / unless_zero(targets.map(power).sum::<f64>());
    let before = block.total(learners, |of| of.plain.weight.dequantize().autodiff());
    if !before.is_finite() {
        let what = "the error of the block";
        return Err(Error::NonFinite { what, path });
    }
    let n_steps = rounds * n_batches;
    for step in 0..n_steps {
        let difference = block.difference(step % n_batches, learners, |of| of.learned.weight());
        let mut gradients = (difference.square().sum() * scale).backward();
        for learner in learners.iter_mut() {
            let done = step as f64 / n_steps as f64;
            learner.learned.step(&mut gradients, done);
        }
    }
    // NaN is no improvement.
    let after = block.total(learners, |of| of.learned.weight());
    Ok(if after < before { rounds } else { 0 })
}

/// A denominator: the energy, or 1 for 0.
pub(crate) fn unless_zero(energy: f64) -> f32 {
    match energy as f32 {
        energy if energy > 0.0 => energy,
        _ => 1.0,
    }
}
