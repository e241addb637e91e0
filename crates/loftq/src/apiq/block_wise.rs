use std::ops::Range;
use std::time::Instant;

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Tensor};
use peft::{Batch, CausalLm, LayerShape, Lora, Recipe, Stages, State, Streams, Weight};
use quant_core::{Needs, Quantized, sum_of_squares};

use super::layer_wise::Apiq;
use super::learned::{Learned, check_range, unless_zero};
use super::learning::{Learning, settings};
use crate::init::{Layers, check_layers};
use crate::{Error, Initialization, InitializedLayer, Layer, Result, Start};

/// Learns the ranges and adapters of all layers of a block together: ApiQ-bw.
///
/// In memory are, for all of the calibration, the activations before and in a block through packed and
/// through dense layers, and the outputs of the dense block; and the dense and the learned weights of the
/// block. A packed layer that is no target has its range learned with the others, and no adapter.
#[derive(Clone, Debug)]
pub struct ApiqBlock(Learning);

impl ApiqBlock {
    /// ApiQ of this rank, or with these adapters; 20 passes over the calibration for each block, as
    /// published.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(Learning::new(lora.into(), 20))
    }

    settings!("Passes over the calibration for each block, with a step for each batch.");
}

/// A layer of the block that is learned.
struct Learner {
    path: String,
    dense: Tensor<2>,
    /// Its weight quantized alone.
    plain: Quantized,
    learned: Learned,
}

impl<M: Stages> Initialization<M> for ApiqBlock {
    fn check_parts(&self, layers: &[LayerShape], recipe: &dyn Recipe) -> Result<Needs> {
        for LayerShape { path, .. } in layers {
            if let Some(quantizer) = recipe.quantizer(path) {
                let format = quantizer.format().map_err(Error::quant(path))?;
                check_range(path, format)?;
            }
        }
        check_layers(&self.layer_wise(), layers, recipe)
    }

    fn run_part(
        &self,
        part: &mut M,
        recipe: &dyn Recipe,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        let layer_wise = self.layer_wise();
        let plan = Layers::new(&layer_wise, recipe);
        let mut layers = Vec::new();
        for stages in part.block_stages() {
            let clock = Instant::now();
            let inputs = streams.states(part).to_vec();
            let mut dense = streams.clone();
            let mut learners = self.learners(part, recipe, &plan, &mut dense, stages.len())?;
            let block = Block {
                part: part.clone().no_grad().train(),
                stages: stages.clone(),
                calibration: streams.calibration(),
                inputs,
                targets: residuals(dense.dense_states().unwrap_or_default()),
            };
            drop(dense);
            let rounds = self.learn(&block, &mut learners)?;
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
                        None => plan.init_layer(part, at, gram)?,
                        Some(learner) => {
                            let layer = Layer {
                                path: &path,
                                weight: learner.dense,
                                gram,
                                fisher: None,
                            };
                            let start = Start {
                                notes: learner.plain.notes,
                                ..learner.learned.finish(&path, rounds)?
                            };
                            let plain = learner.plain.weight.dequantize();
                            Some(plan.place(linear, &layer, start, plain, seconds)?)
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

    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>
    where
        M: CausalLm,
    {
        let layer_wise = self.layer_wise();
        let (_, needs) = Layers::checked(&layer_wise, model, recipe, calibration)?;
        Initialization::<M>::check_parts(self, &LayerShape::of(model), recipe)?;
        let mut streams = Streams::start(model, calibration, needs);
        self.run_part(model, recipe, &mut streams, on_layer)
    }
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
    /// The squared error of the output for one batch.
    fn error(&self, at: usize, learners: &[Learner]) -> Tensor<1> {
        let mut part = self.part.clone();
        for (path, linear) in part.linears_mut() {
            if let Some(learner) = learners.iter().find(|learner| learner.path == path) {
                // Not a leaf of the graph: what is learned is in `learned`.
                let weight = Param::initialized(ParamId::new(), learner.learned.sum());
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
        let difference = self.calibration[at].of_text(difference).cast(DType::F32);
        difference.square().sum()
    }
}

impl ApiqBlock {
    /// The same settings for one layer at a time.
    fn layer_wise(&self) -> Apiq {
        Apiq(self.0.clone())
    }

    /// The layers of the next block, of so many stages, with grids from the quantizer. It sees the inputs that
    /// the dense block gives them from the inputs of the block.
    fn learners<M: Stages>(
        &self,
        part: &M,
        recipe: &dyn Recipe,
        plan: &Layers<'_, Apiq>,
        streams: &mut Streams<'_>,
        n_stages: usize,
    ) -> Result<Vec<Learner>> {
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
                let lora = plan.is_target(&path).then_some(&self.0.lora);
                learners.push(Learner {
                    learned: Learned::new(lora, &layer, linear, &plain.weight)?,
                    dense: layer.weight.clone(),
                    plain,
                    path,
                });
            }
        }
        Ok(learners)
    }

    /// Learns a block; returns the number of rounds, 0 if they did not lower the error.
    fn learn<M: Stages>(&self, block: &Block<'_, M>, learners: &mut [Learner]) -> Result<usize> {
        let Some(first) = learners.first() else {
            return Ok(0);
        };
        let path = first.path.clone();
        let power =
            |(batch, target): (&Batch, &Tensor<3>)| sum_of_squares(batch.of_text(target.clone()));
        let targets = block.calibration.iter().zip(&block.targets);
        let scale = 1.0 / unless_zero(targets.map(power).sum::<f64>());
        let total = |learners: &[Learner]| {
            (0..block.inputs.len())
                .map(|at| block.error(at, learners).inner().into_scalar::<f32>())
                .map(f64::from)
                .sum::<f64>()
        };
        let before = total(learners);
        let start: Vec<Learned> = learners.iter().map(|one| one.learned.clone()).collect();
        let mut optimizer = self.0.optimizer();
        for _ in 0..self.0.rounds {
            for at in 0..block.inputs.len() {
                let error = block.error(at, learners) * (scale * block.inputs.len() as f32);
                let mut gradients = error.backward();
                for learner in learners.iter_mut() {
                    self.0
                        .step(&mut learner.learned, &mut optimizer, &mut gradients);
                }
            }
        }
        let after = total(learners);
        if !before.is_finite() {
            let what = "the error of the block";
            return Err(Error::NonFinite { what, path });
        }
        // Written so that NaN is no improvement.
        if after < before {
            return Ok(self.0.rounds);
        }
        for (learner, start) in learners.iter_mut().zip(start) {
            learner.learned = start;
        }
        Ok(0)
    }
}
