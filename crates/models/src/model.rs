use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use peft::{Batch, Blocks, CausalLm, Head, Linear, Linears, Spans, Stages, Weight};

use crate::Config;
use crate::attention::Attention;
use crate::generate::Past;
use crate::llama::{self, LlamaBlock};
use crate::norm::Norm;
use crate::opt::{self, OptBlock};
use crate::positions::{FIRST_ROW, Positions};
use crate::source::{HEAD, Random, Source};

#[cfg(test)]
mod golden;

/// A causal language model of one of the architectures of [`Config`].
///
/// An embedding, blocks one after the other, a norm and a head; the blocks are what architectures
/// differ in.
#[derive(Module, Debug)]
pub struct Model {
    /// `[vocab, width]`.
    pub(crate) embed_tokens: Param<Tensor<2>>,
    /// Rows for the places of tokens, where a model has learned them.
    pub(crate) embed_positions: Option<Param<Tensor<2>>>,
    /// `[width, hidden]`, if the embedding has another width than the blocks.
    pub(crate) project_in: Option<Weight>,
    layers: Vec<Block>,
    norm: Option<Norm>,
    /// `[hidden, width]`.
    pub(crate) project_out: Option<Weight>,
    /// `[width, vocab]`; the embedding if there is none.
    pub(crate) lm_head: Option<Weight>,
    #[module(skip)]
    pub(crate) config: Config,
}

/// One of the blocks of a model.
///
/// It is run in stages, each of which begins with projections that read the same input. The first is
/// the attention, [`Attention::mix`].
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "all blocks of a model are of one variant"
)]
pub(crate) enum Block {
    Llama(LlamaBlock),
    Opt(OptBlock),
}

/// The same of the block of any architecture.
macro_rules! of_block {
    ($block:expr, $of:ident => $value:expr) => {
        match $block {
            Block::Llama($of) => $value,
            Block::Opt($of) => $value,
        }
    };
}

impl Block {
    fn stages(&self) -> &'static [Range<usize>] {
        match self {
            Self::Llama(_) => &llama::STAGES,
            Self::Opt(_) => &opt::STAGES,
        }
    }

    /// The projections, with their paths in the block.
    fn linears(&self) -> Vec<(&'static str, &Linear)> {
        of_block!(self, block => block.linears())
    }

    fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        of_block!(self, block => block.linears_mut())
    }

    fn norms(&self) -> [(&'static str, &Norm); 2] {
        of_block!(self, block => block.norms())
    }

    fn attention(&self) -> &Attention {
        of_block!(self, block => block.attention())
    }

    /// What the first stage reads of the residual stream.
    fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        of_block!(self, block => block.enter(x))
    }

    /// A stage after the first: from the residual stream and what the stage's projections read to the
    /// same for the next one. After the last, both are the residual stream.
    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        of_block!(self, block => block.advance(stage, residual, input))
    }

    /// All stages. With a `past`, the tokens come after those in it and join them.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        past: Option<&mut Past>,
    ) -> Tensor<3> {
        let mut input = self.attention().mix(self.enter(x.clone()), positions, past);
        let mut residual = x;
        for stage in 1..self.stages().len() {
            (residual, input) = self.advance(stage, residual, input);
        }
        residual
    }
}

impl Model {
    pub(crate) fn build<S: Source>(config: Config, source: &mut S) -> Result<Self, S::Error> {
        let (prefix, hidden, vocab) = (config.prefix(), config.hidden_size(), config.vocab_size());
        let (width, n_positions) = match &config {
            Config::Llama(_) => (hidden, None),
            Config::Opt(config) => {
                let n_positions = config.max_position_embeddings + FIRST_ROW;
                (config.word_embed_proj_dim, Some(n_positions))
            }
        };
        let embed_tokens =
            source.table(&format!("{prefix}.embed_tokens.weight"), [vocab, width])?;
        let embed_positions = match n_positions {
            Some(n) => {
                Some(source.table(&format!("{prefix}.embed_positions.weight"), [n, hidden])?)
            }
            None => None,
        };
        let mut project = |path: String, dims: [usize; 2]| match width == hidden {
            true => Ok(None),
            false => source.weight(&path, dims).map(Some),
        };
        let project_in = project(format!("{prefix}.project_in"), [width, hidden])?;
        let project_out = project(format!("{prefix}.project_out"), [hidden, width])?;
        let layers = (0..config.num_hidden_layers())
            .map(|layer| {
                let path = config.block_path(layer);
                match &config {
                    Config::Llama(config) => {
                        LlamaBlock::build(config, &path, source).map(Block::Llama)
                    }
                    Config::Opt(config) => OptBlock::build(config, &path, source).map(Block::Opt),
                }
            })
            .collect::<Result<_, _>>()?;
        let norm = match &config {
            Config::Llama(config) => Some(config.norm(&format!("{prefix}.norm"), source)?),
            Config::Opt(config) if config.has_final_norm() => {
                Some(config.norm(&format!("{prefix}.final_layer_norm"), source)?)
            }
            Config::Opt(_) => None,
        };
        let lm_head = match config.tie_word_embeddings() {
            true => None,
            false => Some(source.head([width, vocab])?),
        };
        Ok(Self {
            embed_tokens,
            embed_positions,
            project_in,
            layers,
            norm,
            project_out,
            lm_head,
            config,
        })
    }

    /// A new model that trains whole: weights from a normal distribution of deviation 0.02.
    ///
    /// # Panics
    /// Later, if the heads of `config` do not divide; configurations from files are checked.
    pub fn init(config: impl Into<Config>, seed: u64, device: &Device) -> Self {
        match Self::build(config.into(), &mut Random::new(seed, device)) {
            Ok(model) => model,
        }
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where its parameters are.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device()
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.layers
    }

    /// What is read of the residual stream before block `block`, or before the head.
    fn enter(&self, block: usize, x: Tensor<3>) -> Tensor<3> {
        match self.layers.get(block) {
            Some(block) => block.enter(x),
            None => self.norm(x),
        }
    }

    /// The parameters beside projections and other weights, with their names, as they lie in files.
    pub(crate) fn tables(&self) -> Vec<(String, Table<'_>)> {
        let prefix = self.config.prefix();
        let mut all = vec![(
            format!("{prefix}.embed_tokens.weight"),
            Table::Matrix(&self.embed_tokens),
        )];
        if let Some(positions) = &self.embed_positions {
            let name = format!("{prefix}.embed_positions.weight");
            all.push((name, Table::Matrix(positions)));
        }
        let mut push = |path: String, norm| {
            let vectors = Norm::vectors(norm).into_iter();
            all.extend(
                vectors.map(|(name, value)| (format!("{path}.{name}"), Table::Vector(value))),
            );
        };
        if let Some(norm) = &self.norm {
            let name = match &self.config {
                Config::Llama(_) => "norm",
                Config::Opt(_) => "final_layer_norm",
            };
            push(format!("{prefix}.{name}"), norm);
        }
        for (layer, block) in self.layers.iter().enumerate() {
            for (name, norm) in block.norms() {
                push(format!("{}.{name}", self.config.block_path(layer)), norm);
            }
        }
        all
    }
}

/// A parameter as it lies in files.
pub(crate) enum Table<'a> {
    Vector(&'a Param<Tensor<1>>),
    Matrix(&'a Param<Tensor<2>>),
}

/// What a batch carries from one stage of a [`Model`] to the next.
#[derive(Clone, Debug)]
pub struct State {
    residual: Tensor<3>,
    input: Tensor<3>,
    spans: Spans,
}

impl Stages for Model {
    type State = State;

    fn stages(&self) -> Vec<Range<usize>> {
        let mut all = Vec::new();
        let mut first = 0;
        for block in &self.layers {
            let stages = block.stages();
            all.extend(
                stages
                    .iter()
                    .map(|stage| first + stage.start..first + stage.end),
            );
            first += stages.last().map_or(0, |stage| stage.end);
        }
        all
    }

    fn block_stages(&self, block: usize) -> Range<usize> {
        let n = self.layers[block].stages().len();
        n * block..n * (block + 1)
    }

    fn start(&self, batch: &Batch) -> State {
        let spans = batch.spans().clone();
        let residual = self.embed(batch.tokens(), &self.positions(&spans));
        State {
            input: self.enter(0, residual.clone()),
            residual,
            spans,
        }
    }

    fn input(state: &State) -> Tensor<3> {
        state.input.clone()
    }

    fn advance(&self, stage: usize, state: State) -> State {
        let State {
            residual,
            input,
            spans,
        } = state;
        // All blocks have the same stages.
        let n_stages = self.layers[0].stages().len();
        let (index, stage) = (stage / n_stages, stage % n_stages);
        let block = &self.layers[index];
        let (residual, mut input) = match stage {
            // Positions are made where they are needed: a calibration has many states at a time.
            0 => {
                let mixed = block.attention().mix(input, &self.positions(&spans), None);
                (residual, mixed)
            }
            _ => block.advance(stage, residual, input),
        };
        if stage + 1 == n_stages {
            input = self.enter(index + 1, input);
        }
        State {
            residual,
            input,
            spans,
        }
    }
}

impl Blocks for Model {
    type Positions = Positions;

    fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    fn max_positions(&self) -> Option<usize> {
        match &self.config {
            Config::Llama(config) => config.sliding_window,
            Config::Opt(config) => Some(config.max_position_embeddings),
        }
    }

    fn n_blocks(&self) -> usize {
        self.layers.len()
    }

    fn positions(&self, spans: &Spans) -> Positions {
        Positions::new(&self.config, spans)
    }

    fn embed(&self, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
        let rows = |table: &Param<Tensor<2>>, rows: Tensor<2, Int>| {
            let [batch, seq] = rows.dims();
            let x = table.val().select(0, rows.reshape([batch * seq]));
            let width = x.dims()[1];
            x.reshape([batch, seq, width])
        };
        let x = rows(&self.embed_tokens, tokens);
        let x = match &self.project_in {
            Some(weight) => weight.matmul(x),
            None => x,
        };
        match self.embed_positions.as_ref().zip(positions.rows()) {
            Some((table, places)) => x + rows(table, places),
            None => x,
        }
    }

    fn block(&self, index: usize, x: Tensor<3>, positions: &Positions) -> Tensor<3> {
        self.layers[index].forward(x, positions, None)
    }
}

impl CausalLm for Model {
    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        let x = match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        match &self.project_out {
            Some(weight) => weight.matmul(x),
            None => x,
        }
    }

    fn head(&self) -> Head<'_> {
        match &self.lm_head {
            Some(head) => head.into(),
            None => Head::Dense(self.embed_tokens.val().transpose()),
        }
    }
}

impl Linears for Model {
    fn linears(&self) -> Vec<(String, &Linear)> {
        let mut all = Vec::new();
        for (layer, block) in self.layers.iter().enumerate() {
            let path = self.config.block_path(layer);
            let linears = block.linears().into_iter();
            all.extend(linears.map(|(name, linear)| (format!("{path}.{name}"), linear)));
        }
        all
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let mut all = Vec::new();
        for (layer, block) in self.layers.iter_mut().enumerate() {
            let path = self.config.block_path(layer);
            let linears = block.linears_mut().into_iter();
            all.extend(linears.map(|(name, linear)| (format!("{path}.{name}"), linear)));
        }
        all
    }

    fn other_weights(&self) -> Vec<(String, &Weight)> {
        let prefix = self.config.prefix();
        let others = [
            (format!("{prefix}.project_in"), &self.project_in),
            (format!("{prefix}.project_out"), &self.project_out),
            (HEAD.into(), &self.lm_head),
        ];
        let others = others.into_iter();
        others
            .filter_map(|(path, weight)| Some((path, weight.as_ref()?)))
            .collect()
    }

    fn other_weights_mut(&mut self) -> Vec<&mut Weight> {
        let others = [
            &mut self.project_in,
            &mut self.project_out,
            &mut self.lm_head,
        ];
        others.into_iter().flatten().collect()
    }
}
