//! ApiQ (Liao et al. 2024, arXiv:2402.05147): ranges and adapters learned together, so that what a
//! layer, or a block, gives for the inputs that reach it through packed layers is what the dense one
//! gives for its own.
//!
//! The range of each group is multiplied by `sigmoid(u) / sigmoid(4)` on its upper and
//! `sigmoid(v) / sigmoid(4)` on its lower side, both learned from 4 on, which is the range of the quantizer;
//! gradients pass through rounding as if it were none. Codes are of the nearest kind, whatever the
//! quantizer's were.
//!
//! The layer-wise form needs no inputs but their second moments: with `E = Ŵ - W`, `H = Σ x xᵀ` and the
//! drift `D = Σ (x' - x) xᵀ` of the dense model's inputs `x'`, the squared error `Σ ‖x Ŵ - x' W‖²` is
//! `tr Eᵀ (H E - 2 Dᵀ W)` and a constant. Its steps see all of the calibration at once, and are the same in
//! any order of the tokens.

use std::ops::Range;
use std::time::Instant;

use burn::module::{Module, Param, ParamId};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Gradients, Tensor};
use peft::{Adapter, Batch, CausalLm, Linear, Lora, Method, Recipe, Stages, Streams, Weight};
use quant_core::{Format, Grid, Needs, Note, QuantTensor, Quantizer, sum_of_squares};

use crate::method::{Known, dense, init_layer, place, with_weight};
use crate::{Error, Initialization, InitializedLayer, Layer, LayerMethod, Result, Start};

/// Where the logits of the ranges begin.
const START: f32 = 4.0;

/// The settings of both forms.
#[derive(Clone, Debug)]
struct Learning {
    lora: Lora,
    rounds: usize,
    of_ranges: f64,
    of_factors: f64,
    weight_decay: f32,
}

impl Learning {
    fn new(lora: Lora, rounds: usize) -> Self {
        Self {
            lora,
            rounds,
            of_ranges: 5e-3,
            of_factors: 5e-4,
            weight_decay: 0.1,
        }
    }

    fn check(&self) -> Result<()> {
        let refuse = |setting, value: f64, expected| {
            let value = value.to_string();
            Err(Error::Peft(peft::Error::Setting {
                setting,
                value,
                expected,
            }))
        };
        for (setting, rate) in [
            ("of_ranges", self.of_ranges),
            ("of_factors", self.of_factors),
        ] {
            if !(rate.is_finite() && rate > 0.0) {
                return refuse(setting, rate, "a positive number");
            }
        }
        let decay = f64::from(self.weight_decay);
        match decay.is_finite() && decay >= 0.0 {
            true => Ok(()),
            false => refuse("weight_decay", decay, "0 or more"),
        }
    }

    /// Of any number of layers: it keeps its moments by parameter.
    fn optimizer(&self) -> ModuleOptimizer {
        AdamWConfig::new()
            .with_weight_decay(self.weight_decay)
            .init()
    }

    fn step(
        &self,
        learned: &mut Learned,
        optimizer: &mut ModuleOptimizer,
        gradients: &mut Gradients,
    ) {
        let of_ranges = GradientsParams::from_module(gradients, &learned.ranges);
        learned.ranges = optimizer.step(self.of_ranges, learned.ranges.clone(), of_ranges);
        if let Some(found) = learned.factors.take() {
            let of_factors = GradientsParams::from_module(gradients, &found);
            learned.factors = Some(optimizer.step(self.of_factors, found, of_factors));
        }
    }
}

macro_rules! settings {
    ($rounds:literal) => {
        #[doc = $rounds]
        pub fn with_rounds(mut self, rounds: usize) -> Self {
            self.0.rounds = rounds;
            self
        }

        /// The learning rates of the ranges and of the factors; 0.005 and 0.0005 as published.
        pub fn with_learning_rates(mut self, of_ranges: f64, of_factors: f64) -> Self {
            (self.0.of_ranges, self.0.of_factors) = (of_ranges, of_factors);
            self
        }

        /// The weight decay of AdamW; 0.1 as published.
        pub fn with_weight_decay(mut self, weight_decay: f32) -> Self {
            self.0.weight_decay = weight_decay;
            self
        }
    };
}

/// Learns range and adapter of one layer after the other: ApiQ-lw.
#[derive(Clone, Debug)]
pub struct Apiq(Learning);

impl Apiq {
    /// Of this rank, or with these adapters; 200 steps for each layer.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(Learning::new(lora.into(), 200))
    }

    settings!("Steps for each layer, over all of the calibration.");
}

impl LayerMethod for Apiq {
    fn lora(&self) -> &Lora {
        &self.0.lora
    }

    fn needs(&self) -> Needs {
        Needs::Drift
    }

    fn check(&self, path: &str, format: Format) -> Result<()> {
        self.0.check()?;
        check_range(path, format)
    }

    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        layer.output_error(found)
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        self.0.check()?;
        let gram = layer.gram.ok_or(peft::Error::NoCalibration)?;
        gram.check(layer.weight.dims()[0])
            .map_err(Error::quant(layer.path))?;
        let (quantized, _) = layer.quantize(layer.weight.clone(), quantizer)?;
        let linear = Linear::new(Weight::frozen(layer.weight.clone()), None);
        let mut learned = Learned::new(Some(&self.0.lora), layer.path, &linear, &quantized.weight)?;
        let weight = layer.weight.clone();
        // So that learning rates mean the same for all layers.
        let energy = unless_zero(gram.energy(weight.clone()));
        let moment = gram.sum() / energy;
        let drift = gram.drift();
        let drift = drift.map(|drift| drift.transpose().matmul(weight.clone()) * (2.0 / energy));
        let loss = |learned: &Learned| {
            let error = learned.sum() - weight.clone().autodiff();
            let mut force = moment.clone().autodiff().matmul(error.clone());
            if let Some(drift) = &drift {
                force = force - drift.clone().autodiff();
            }
            (error * force).sum()
        };
        let mut optimizer = self.0.optimizer();
        let mut best: Option<(f32, usize, Learned)> = None;
        for round in 0..=self.0.rounds {
            let value = loss(&learned);
            let current = value.clone().inner().into_scalar::<f32>();
            if !current.is_finite() {
                return Err(Error::NonFinite {
                    what: "the error of the output",
                    path: layer.path.into(),
                });
            }
            if best.as_ref().is_none_or(|(least, ..)| current < *least) {
                best = Some((current, round, learned.clone()));
            }
            if round == self.0.rounds {
                break;
            }
            let mut gradients = value.backward();
            self.0.step(&mut learned, &mut optimizer, &mut gradients);
        }
        let (error, round, learned) = best.expect("the start is one");
        let start = learned.finish(layer.path, round)?;
        Ok(Start {
            plain: Some(quantized.weight),
            error: f64::from(error) * f64::from(energy),
            notes: quantized.notes,
            ..start
        })
    }
}

/// Learns the ranges and adapters of all layers of a block together: ApiQ-bw.
///
/// In memory are, for all of the calibration, the inputs of a block through packed and through dense
/// layers, what the dense block makes of them, and the tokens on their way to the report; and the dense
/// and the learned weights of the block. A layer whose range is learned with the others but that is not
/// targeted has no adapter.
#[derive(Clone, Debug)]
pub struct ApiqBlock(Learning);

impl ApiqBlock {
    /// Of this rank, or with these adapters; 20 passes over the calibration for each block, as published.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(Learning::new(lora.into(), 20))
    }

    settings!("Passes over the calibration for each block, a step for each batch.");
}

/// A layer of the block that is learned.
struct Learner {
    /// Among the model's layers.
    at: usize,
    path: String,
    dense: Tensor<2>,
    /// Its weight quantized alone.
    plain: QuantTensor,
    notes: Vec<Note>,
    learned: Learned,
    targeted: bool,
}

impl<M: CausalLm + Stages> Initialization<M> for ApiqBlock {
    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        let first = Apiq(self.0.clone());
        // It looks at the inputs themselves, and takes no drift of its own.
        let known = Known::of(&first, Needs::Gram, model, recipe, calibration)?;
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
        let mut streams = Streams::start(model, calibration, known.needs);
        let mut layers = Vec::new();
        for block in 0..model.n_blocks() {
            let clock = Instant::now();
            let stages = model.block_stages(block);
            let mut learners =
                self.learners(model, recipe, &known, streams.clone(), stages.clone())?;
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
                    let done = match learners.next_if(|learner| learner.at == at) {
                        None => init_layer(&first, &known, model, at, recipe, gram)?,
                        Some(learner) => {
                            let (path, linear) = model.linears_mut().swap_remove(at);
                            let layer = Layer {
                                path: &path,
                                weight: learner.dense,
                                gram,
                                fisher: None,
                            };
                            let start = Start {
                                notes: learner.notes,
                                ..learner.learned.finish(&path, rounds)?
                            };
                            let plain = learner.plain.dequantize();
                            let lora = learner.targeted.then_some(&self.0.lora);
                            Some(place(linear, &layer, start, plain, lora, seconds)?)
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
struct Block<'a, M: CausalLm> {
    calibration: &'a [Batch],
    /// With the block's layers dense, and everything frozen.
    model: M,
    index: usize,
    positions: Vec<M::Positions>,
    /// Its inputs through packed layers.
    inputs: Vec<Tensor<3>>,
    /// What the dense model's block gives for its own inputs.
    targets: Vec<Tensor<3>>,
}

impl<M: CausalLm> Block<'_, M> {
    /// The squared error of the output for one batch.
    fn error(&self, at: usize, learners: &[Learner]) -> Tensor<1> {
        let mut model = self.model.clone();
        for learner in learners {
            let (_, linear) = model.linears_mut().swap_remove(learner.at);
            // Not a leaf of the graph: what is learned is in `learned`.
            let weight = Param::initialized(ParamId::new(), learner.learned.sum());
            *linear = with_weight(linear, Weight::Dense(weight));
        }
        let x = self.inputs[at].clone().autodiff();
        let y = model.block(self.index, x, &self.positions[at]);
        let difference = y - self.targets[at].clone().autodiff();
        self.calibration[at].of_text(difference).square().sum()
    }
}

impl ApiqBlock {
    /// The layers of a block, with grids from the quantizer: it sees the inputs that the dense block
    /// makes of what reaches it.
    fn learners<M: CausalLm + Stages>(
        &self,
        model: &M,
        recipe: &dyn Recipe,
        known: &Known,
        mut streams: Streams<'_, M>,
        mut stages: Range<usize>,
    ) -> Result<Vec<Learner>> {
        let mut learners = Vec::new();
        while let Some(stage) = stages.next().and_then(|_| streams.next_stage(model)) {
            for at in stage.layers {
                let (path, linear) = model.linears().swap_remove(at);
                let Some(quantizer) = recipe.quantizer(&path) else {
                    continue;
                };
                let layer = Layer {
                    path: &path,
                    weight: dense(linear),
                    gram: stage.gram.as_ref(),
                    fisher: None,
                };
                let (quantized, _) = layer.quantize(layer.weight.clone(), quantizer)?;
                let targeted = known.targets.contains(&path);
                let lora = targeted.then_some(&self.0.lora);
                learners.push(Learner {
                    at,
                    dense: layer.weight.clone(),
                    learned: Learned::new(lora, &path, linear, &quantized.weight)?,
                    plain: quantized.weight,
                    notes: quantized.notes,
                    targeted,
                    path,
                });
            }
        }
        Ok(learners)
    }

    /// Learns a block; returns the rounds, 0 if they made it no better.
    fn learn<M: CausalLm>(&self, block: &Block<'_, M>, learners: &mut [Learner]) -> Result<usize> {
        if learners.is_empty() {
            return Ok(0);
        }
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
            let path = learners
                .first()
                .map_or_else(String::new, |one| one.path.clone());
            let what = "the error of the block";
            return Err(Error::NonFinite { what, path });
        }
        // Written so that what is not a number is no better.
        if after < before {
            return Ok(self.0.rounds);
        }
        for (learner, start) in learners.iter_mut().zip(start) {
            learner.learned = start;
        }
        Ok(0)
    }
}

/// What is learned of a layer, and what of it is not.
#[derive(Clone, Debug)]
struct Learned {
    ranges: Ranges,
    /// None for a layer without an adapter.
    factors: Option<Factors>,
    /// `[n_groups, group_size, d_out]`, with zeros in a short last group.
    weight: Tensor<3>,
    /// The upper ends of the quantizer's ranges, `[n_groups, 1, d_out]`; its scales on a symmetric grid.
    high: Tensor<3>,
    /// The lower ends; none on a symmetric grid.
    low: Option<Tensor<3>>,
    format: Format,
    dims: [usize; 2],
    /// `σ`.
    scale: f32,
}

/// The logits of the parts of the ranges that are kept.
#[derive(Module, Debug)]
struct Ranges {
    high: Param<Tensor<3>>,
    low: Option<Param<Tensor<3>>>,
}

#[derive(Module, Debug)]
struct Factors {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
}

impl Learned {
    fn new(
        lora: Option<&Lora>,
        path: &str,
        linear: &Linear,
        quantized: &QuantTensor,
    ) -> Result<Self> {
        let (format, dims) = (quantized.format(), quantized.dims());
        check_range(path, format)?;
        if quantized.input_order().is_some() {
            let path = path.into();
            return Err(Error::NoRange { path, format });
        }
        let layout = quantized.layout();
        let (n_groups, group_size) = (layout.n_groups(), layout.group_size());
        let [d_in, d_out] = dims;
        let weight = dense(linear);
        let missing = n_groups * group_size - d_in;
        let weight = match missing {
            0 => weight,
            _ => {
                let zeros = Tensor::zeros([missing, d_out], &weight.device());
                Tensor::cat(vec![weight, zeros], 0)
            }
        };
        let max_code = max_code(format);
        let scales = quantized.scales();
        let (high, low) = match quantized.zeros() {
            Some(zeros) => (
                scales.clone() * (zeros.clone().neg() + max_code),
                Some(scales * zeros.neg()),
            ),
            None => (scales, None),
        };
        let grouped = |values: Tensor<2>| values.unsqueeze_dim::<3>(1);
        let logits = |of: &Tensor<3>| Param::from_tensor((of.zeros_like() + START).autodiff());
        let (high, low) = (grouped(high), low.map(grouped));
        let mut scale = 1.0;
        let factors = match lora {
            None => None,
            Some(lora) => {
                let Adapter::Lora(adapter) = lora.init(path, linear)? else {
                    unreachable!("LoRA makes LoRA");
                };
                scale = adapter.scale();
                let [a, b] = [adapter.a(), adapter.b()];
                let [a, b] = [a, b].map(|factor| Param::from_tensor(factor.inner().autodiff()));
                Some(Factors { a, b })
            }
        };
        Ok(Self {
            ranges: Ranges {
                high: logits(&high),
                low: low.as_ref().map(logits),
            },
            factors,
            weight: weight.reshape([n_groups, group_size, d_out]),
            high,
            low,
            format,
            dims,
            scale,
        })
    }

    /// Scales and zeros, `[n_groups, 1, d_out]`.
    fn grid(&self) -> (Tensor<3>, Option<Tensor<3>>) {
        let max_code = max_code(self.format);
        let kept = |logits: &Param<Tensor<3>>, end: &Tensor<3>| {
            // Exactly one where they begin.
            let whole = sigmoid(end.zeros_like() + START).autodiff();
            sigmoid(logits.val()) / whole * end.clone().autodiff()
        };
        let high = kept(&self.ranges.high, &self.high);
        match (&self.ranges.low, &self.low) {
            (Some(logits), Some(low)) => {
                let low = kept(logits, low);
                let scales = (high - low.clone()) / max_code;
                let zeros = straight_through(low.neg() / scales.clone(), Tensor::round);
                (scales, Some(zeros.clamp(0.0, max_code)))
            }
            _ => (high, None),
        }
    }

    /// The weight as it is rounded now, and what the adapter adds; differentiable in what is learned.
    fn sum(&self) -> Tensor<2> {
        let (scales, zeros) = self.grid();
        let max_code = max_code(self.format);
        let zeros = zeros.unwrap_or_else(|| scales.ones_like() * ((max_code + 1.0) / 2.0));
        let steps = self.weight.clone().autodiff() / scales.clone();
        let codes = straight_through(steps, Tensor::round) + zeros.clone();
        let weight = (codes.clamp(0.0, max_code) - zeros) * scales;
        let [n_groups, group_size, d_out] = weight.dims();
        let weight = weight.reshape([n_groups * group_size, d_out]);
        let weight = weight.slice([0..self.dims[0], 0..d_out]);
        match &self.factors {
            Some(Factors { a, b }) => weight + (a.val() * self.scale).matmul(b.val()),
            None => weight,
        }
    }

    /// The packed weight and the factors.
    fn finish(self, path: &str, round: usize) -> Result<Start> {
        let (scales, zeros) = self.grid();
        let plain = |values: Tensor<3>| values.inner().squeeze_dim::<2>(1);
        let [n_groups, group_size, d_out] = self.weight.dims();
        let weight = self.weight.reshape([n_groups * group_size, d_out]);
        let weight = weight.slice([0..self.dims[0], 0..d_out]);
        let packed = QuantTensor::on_grid(weight, self.format, plain(scales), zeros.map(plain));
        let packed = packed.map_err(Error::quant(path))?;
        let factors = self.factors.map(|Factors { a, b }| {
            let (a, b) = (a.val().inner(), b.val().inner());
            [a * self.scale, b]
        });
        Ok(Start {
            weight: Weight::Quant(packed),
            factors,
            plain: None,
            round,
            error: 0.0,
            notes: Vec::new(),
        })
    }
}

/// A denominator.
fn unless_zero(energy: f64) -> f32 {
    match energy as f32 {
        energy if energy > 0.0 => energy,
        _ => 1.0,
    }
}

fn check_range(path: &str, format: Format) -> Result<()> {
    match format.grid() {
        Grid::Affine | Grid::Symmetric => Ok(()),
        _ => Err(Error::NoRange {
            path: path.into(),
            format,
        }),
    }
}

fn max_code(format: Format) -> f32 {
    ((1 << format.bits()) - 1) as f32
}

/// `f` of `values`, with the gradient of `values`.
fn straight_through(values: Tensor<3>, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
    let moved = f(values.clone().detach()) - values.clone().detach();
    values + moved
}
