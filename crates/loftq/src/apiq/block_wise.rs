use burn::optim::ModuleOptimizer;
use burn::tensor::{Gradients, Tensor};
use peft::{
    Batch, CausalLm, InitializedLayer, LayerShape, Linear, Linears, Lora, Recipe, Stages, Streams,
};
use quant_core::{Gram, Needs, Quantized};

use super::layer_wise::Apiq;
use super::learned::Learned;
use super::learning::{Learning, settings};
use crate::blocks::{self, BlockMethod, LearnedLayer};
use crate::fake_quant::check_ranges;
use crate::init::{Layers, check_layers};
use crate::{Initialization, Layer, Result, Start};

/// Learns the ranges and adapters of all layers of a block together: ApiQ-bw.
///
/// In memory are, for all of the calibration, the activations before and in a block through packed and
/// through dense layers, and the outputs of the dense block; and the dense and the learned weights of the
/// block. A packed layer that is no target has its range learned with the others, and no adapter. A block
/// that the learning makes no better has the weights of the quantizer, and adapters that add nothing.
#[derive(Clone, Debug)]
pub struct ApiqBlock(Learning);

impl ApiqBlock {
    /// ApiQ of this rank, or with these adapters; 20 passes over the calibration for each block, as
    /// published.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(Learning::new(lora.into(), 20))
    }

    settings!("Passes over the calibration for each block, with a step for each batch.");

    /// The same settings for one layer at a time.
    fn layer_wise(&self) -> Apiq {
        Apiq(self.0.clone())
    }
}

impl<M: Stages> Initialization<M> for ApiqBlock {
    fn check_parts(&self, layers: &[LayerShape], recipe: &dyn Recipe) -> Result<Needs> {
        check_ranges(layers, recipe)?;
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
        let method = Adapted {
            learning: &self.0,
            layers: Layers::new(&layer_wise, recipe),
        };
        blocks::run(&method, part, recipe, streams, on_layer)
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

/// Layers with the adapters of their targets.
struct Adapted<'a> {
    learning: &'a Learning,
    layers: Layers<'a, Apiq>,
}

impl<'a> BlockMethod for Adapted<'a> {
    type Learned = Adapting<'a>;

    fn rounds(&self) -> usize {
        self.learning.rounds
    }

    fn learned(
        &self,
        layer: &Layer<'_>,
        linear: &Linear,
        plain: &Quantized,
    ) -> Result<Self::Learned> {
        let is_target = self.layers.is_target(layer.path);
        let lora = is_target.then_some(&self.learning.lora);
        Ok(Adapting {
            learning: self.learning,
            learned: Learned::new(lora, layer, linear, &plain.weight)?,
            optimizer: self.learning.optimizer(),
        })
    }

    fn init_dense<M: Linears>(
        &self,
        part: &mut M,
        at: usize,
        gram: Option<&Gram>,
    ) -> Result<Option<InitializedLayer>> {
        self.layers.init_layer(part, at, gram)
    }

    fn place(
        &self,
        linear: &mut Linear,
        layer: &Layer<'_>,
        start: Start,
        plain: Tensor<2>,
        seconds: f64,
    ) -> Result<InitializedLayer> {
        self.layers.place(linear, layer, start, plain, seconds)
    }
}

/// The range and the adapter of a layer, as they are learned.
struct Adapting<'a> {
    learning: &'a Learning,
    learned: Learned,
    optimizer: ModuleOptimizer,
}

impl LearnedLayer for Adapting<'_> {
    fn weight(&self) -> Tensor<2> {
        self.learned.sum()
    }

    fn step(&mut self, gradients: &mut Gradients, _done: f64) {
        let (learned, optimizer) = (&mut self.learned, &mut self.optimizer);
        self.learning.step(learned, optimizer, gradients);
    }

    fn finish(self, path: &str, round: usize) -> Result<Start> {
        self.learned.finish(path, round)
    }
}
