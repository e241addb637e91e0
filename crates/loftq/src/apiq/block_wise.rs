use std::ops::Range;
use std::time::Instant;

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Tensor};
use peft::{Batch, Blocks, CausalLm, Lora, Recipe, Stages, Streams, Weight};
use quant_core::{Needs, Quantized, sum_of_squares};

use super::layer_wise::Apiq;
use super::learned::{Learned, check_range, unless_zero};
use super::learning::{Learning, settings};
use crate::init::Plan;
use crate::{Error, Initialization, InitializedLayer, Layer, Result, Start};

/// Learns the ranges and adapters of all layers of a block together: ApiQ-bw.
///
/// In memory are, for all of the calibration, the inputs of a block through packed and through dense
/// layers, the outputs of the dense block, and the activations for the report; and the dense and the
/// learned weights of the block. A packed layer that is no target has its range learned with the others,
/// and no adapter.
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

impl<M: CausalLm + Stages> Initialization<M> for ApiqBlock {
    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        let layer_wise = Apiq(self.0.clone());
        // It reads the inputs themselves, and needs no drift of its own.
        let plan = Plan::new(&layer_wise, Needs::Gram, model, recipe, calibration)?;
        for (path, _) in model.linears() {
            if let Some(quantizer) = recipe.quantizer(&path) {
                let format = quantizer.format().map_err(Error::quant(&path))?;
                check_range(&path, format)?;
            }
        }
        let positions = |model: &M, batch: &Batch| model.positions(batch.spans());
        // Inputs of the block: through packed blocks, and through dense ones.
        let mut inputs: Vec<[Tensor<3>; 2]> = (calibration.iter())
            .map(|batch| model.embed(batch.tokens(), &positions(model, batch)))
            .map(|x| [x.clone(), x])
            .collect();
        let mut streams = Streams::start(model, calibration, plan.needs);
        let mut layers = Vec::new();
        for block in 0..model.n_blocks() {
            let clock = Instant::now();
            let stages = model.block_stages(block);
            let mut learners =
                self.learners(model, recipe, &plan, streams.clone(), stages.clone())?;
            let mut targets = Vec::new();
            for ([_, dense], batch) in inputs.iter().zip(calibration) {
                targets.push(model.block(block, dense.clone(), &positions(model, batch)));
            }
            let learning = Block {
                calibration,
                model: model.clone().no_grad().train(),
                index: block,
                positions: calibration
                    .iter()
                    .map(|batch| positions(model, batch))
                    .collect(),
                inputs: inputs.iter().map(|[packed, _]| packed.clone()).collect(),
                targets,
            };
            let rounds = self.learn(&learning, &mut learners)?;
            let targets = learning.targets;
            let seconds = clock.elapsed().as_secs_f64() / learners.len().max(1) as f64;

            let mut learners = learners.into_iter().peekable();
            for _ in stages {
                let Some(stage) = streams.next_stage(model) else {
                    break;
                };
                for at in stage.layers {
                    let gram = stage.gram.as_ref();
                    let (path, linear) = model.linears_mut().swap_remove(at);
                    let done = match learners.next_if(|learner| learner.path == path) {
                        None => plan.init_layer(model, at, gram)?,
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
            for (([packed, dense], batch), target) in
                inputs.iter_mut().zip(calibration).zip(targets)
            {
                *packed = model.block(block, packed.clone(), &positions(model, batch));
                *dense = target;
            }
        }
        Ok(layers)
    }
}

/// A block to be learned.
struct Block<'a, M: Blocks> {
    calibration: &'a [Batch],
    /// With the block's layers dense, and everything frozen.
    model: M,
    index: usize,
    positions: Vec<M::Positions>,
    /// Its inputs through packed layers.
    inputs: Vec<Tensor<3>>,
    /// The outputs of the dense model's block for its own inputs.
    targets: Vec<Tensor<3>>,
}

impl<M: Blocks> Block<'_, M> {
    /// The squared error of the output for one batch.
    fn error(&self, at: usize, learners: &[Learner]) -> Tensor<1> {
        let mut model = self.model.clone();
        for (path, linear) in model.linears_mut() {
            if let Some(learner) = learners.iter().find(|learner| learner.path == path) {
                // Not a leaf of the graph: what is learned is in `learned`.
                let weight = Param::initialized(ParamId::new(), learner.learned.sum());
                *linear = linear.with_weight(Weight::Dense(weight));
            }
        }
        let x = self.inputs[at].clone().autodiff();
        let y = model.block(self.index, x, &self.positions[at]);
        let difference = y - self.targets[at].clone().autodiff();
        let difference = self.calibration[at].of_text(difference).cast(DType::F32);
        difference.square().sum()
    }
}

impl ApiqBlock {
    /// The layers of a block, with grids from the quantizer. It sees the inputs that the dense block
    /// gives them from the inputs of the block.
    fn learners<M: Stages>(
        &self,
        model: &M,
        recipe: &dyn Recipe,
        plan: &Plan<'_, Apiq>,
        mut streams: Streams<'_>,
        mut stages: Range<usize>,
    ) -> Result<Vec<Learner>> {
        let mut learners = Vec::new();
        while let Some(stage) = stages.next().and_then(|_| streams.next_stage(model)) {
            for at in stage.layers {
                let (path, linear) = model.linears().swap_remove(at);
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
    fn learn<M: Blocks>(&self, block: &Block<'_, M>, learners: &mut [Learner]) -> Result<usize> {
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
