//! The stages of models, and of single blocks of them.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use peft::{Linear, Linears, Stages, State};

use crate::config::{Block, Config};
use crate::source::Source;
use crate::{Model, Result};

impl Block {
    fn stage_input(&self, state: &State) -> Tensor<3> {
        match &state.input {
            Some(input) => input.clone(),
            None => self.enter(state.residual.clone()),
        }
    }

    fn run_stage(&self, config: &Config, stage: usize, state: State) -> State {
        let input = self.stage_input(&state);
        let State {
            residual, spans, ..
        } = state;
        let (residual, input) = match stage {
            // Positions are computed here, because a calibration has many states at a time.
            0 => {
                let positions = config.positions(&spans);
                (residual, self.attend(input, &positions, None))
            }
            _ => self.advance(stage, residual, input),
        };
        let is_last = stage + 1 == self.stages().len();
        State {
            residual,
            input: (!is_last).then_some(input),
            spans,
        }
    }
}

impl Stages for Model {
    fn stages(&self) -> Vec<Range<usize>> {
        let mut all = Vec::new();
        let mut first = 0;
        for block in &self.layers {
            let stages = block.stages();
            let of_model = |stage: &Range<usize>| first + stage.start..first + stage.end;
            all.extend(stages.iter().map(of_model));
            first += stages.last().map_or(0, |stage| stage.end);
        }
        all
    }

    fn block_stages(&self) -> Vec<Range<usize>> {
        let mut first = 0;
        let of_block = |block: &Block| {
            let start = first;
            first += block.stages().len();
            start..first
        };
        self.layers.iter().map(of_block).collect()
    }

    fn input(&self, stage: usize, state: &State) -> Tensor<3> {
        self.at(stage).0.stage_input(state)
    }

    fn advance(&self, stage: usize, state: State) -> State {
        let (block, stage) = self.at(stage);
        block.run_stage(&self.config, stage, state)
    }
}

impl Model {
    /// The block of a stage, and the stage in it.
    fn at(&self, stage: usize) -> (&Block, usize) {
        // All blocks have the same stages.
        let n_stages = self.layers[0].stages().len();
        (&self.layers[stage / n_stages], stage % n_stages)
    }
}

/// One block of a model whose others are not in memory: the part that [`initialize_to`](crate::initialize_to())
/// runs a method on.
#[derive(Module, Debug)]
pub struct Window {
    block: Block,
    #[module(skip)]
    config: Config,
    #[module(skip)]
    index: usize,
}

impl Window {
    /// Builds the block of this index.
    pub(crate) fn build<S: Source<Error = crate::Error>>(
        config: &Config,
        index: usize,
        source: &mut S,
    ) -> Result<Self> {
        Ok(Self {
            block: Block::build(config, index, source)?,
            config: config.clone(),
            index,
        })
    }

    pub(crate) fn block(&self) -> &Block {
        &self.block
    }

    /// The path of the block.
    pub(crate) fn path(&self) -> String {
        self.config.block_path(self.index)
    }
}

impl Linears for Window {
    fn linears(&self) -> Vec<(String, &Linear)> {
        let path = self.path();
        let linears = self.block.linears().into_iter();
        let linears = linears.map(|(name, linear)| (format!("{path}.{name}"), linear));
        linears.collect()
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let path = self.path();
        let linears = self.block.linears_mut().into_iter();
        let linears = linears.map(|(name, linear)| (format!("{path}.{name}"), linear));
        linears.collect()
    }
}

impl Stages for Window {
    fn stages(&self) -> Vec<Range<usize>> {
        self.block.stages()
    }

    fn block_stages(&self) -> Vec<Range<usize>> {
        let all = 0..self.block.stages().len();
        vec![all]
    }

    fn input(&self, _: usize, state: &State) -> Tensor<3> {
        self.block.stage_input(state)
    }

    fn advance(&self, stage: usize, state: State) -> State {
        self.block.run_stage(&self.config, stage, state)
    }
}
