//! The interface of an architecture: the shape of a model, and the parts and stages of a block.
//!
//! An architecture is a configuration that implements [`Architecture`] and a block that implements
//! [`DecoderBlock`], in one file of `architectures/`. `architectures.rs` lists them.

use std::ops::Range;

use burn::tensor::Tensor;
use peft::{Identity, Linear};

use crate::Result;
use crate::kv_cache::KvCache;
use crate::norm::{Norm, NormKind};
use crate::positions::{Positions, Reach};
use crate::settings::Settings;
use crate::source::{Shapes, Source, Vector, linear, weight_name};

/// A value of `model_type` in `config.json`, and the reader of the other settings.
pub(crate) struct ModelType<C> {
    pub(crate) name: &'static str,
    pub(crate) read: fn(&Settings) -> Result<C>,
}

/// The configuration of an architecture.
pub(crate) trait Architecture: Sized + 'static {
    type Block: DecoderBlock<Config = Self>;

    /// The model types whose models are of this architecture.
    const MODEL_TYPES: &'static [ModelType<Self>];

    fn shape(&self) -> Shape;

    /// The settings that the outputs depend on and that parameters and their shapes do not show, with
    /// each default stated. [`Reach::state`] adds those of the positions.
    fn identity(&self) -> Identity;

    /// Gives the model a head that is not the embedding.
    fn untie(&mut self);

    /// The tokens that those of a layer attend to, and their positions.
    fn reach(&self, layer: usize) -> Reach;

    /// The projections of a block.
    fn projections(&self) -> Vec<Projection> {
        Self::Block::projections(self)
    }

    /// The projections and the norms of the block at `block`, each with the names and shapes of the tensors
    /// that a file of a dense model has.
    fn modules(&self, block: &str) -> Vec<(String, Shapes)> {
        let projections = self.projections().into_iter().map(|of| {
            let path = format!("{block}.{}", of.name);
            let [d_in, d_out] = of.dims;
            let mut tensors = vec![(weight_name(&path), vec![d_out, d_in])];
            if of.has_bias {
                tensors.push((Vector::Bias.name(&path), vec![d_out]));
            }
            (path, tensors)
        });
        let kinds = Norm::kinds(self.shape().norm);
        let norms = Self::Block::norm_lens(self).into_iter().map(|(name, len)| {
            let path = format!("{block}.{name}");
            let kinds = kinds.iter();
            let tensors = kinds.map(|kind| (kind.name(&path), vec![len])).collect();
            (path, tensors)
        });
        projections.chain(norms).collect()
    }

    /// The different [`Architecture::reach`] of the layers, in the order of their first layers.
    fn reaches(&self) -> Vec<Reach> {
        let mut all = Vec::new();
        for layer in 0..self.shape().n_layers {
            let reach = self.reach(layer);
            if !all.contains(&reach) {
                all.push(reach);
            }
        }
        all
    }

    /// Builds a block.
    fn build_block<S: Source>(
        &self,
        layer: usize,
        source: &mut S,
    ) -> Result<Self::Block, S::Error> {
        let reach = self.reach(layer);
        let is_its = |other: &Reach| *other == reach;
        let reach = self.reaches().iter().position(is_its);
        Self::Block::build(Parts {
            config: self,
            path: self.shape().block_path(layer),
            reach: reach.expect("that of a layer"),
            source,
        })
    }
}

/// The parts of a model around its blocks.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) names: Names,
    pub(crate) vocab_size: usize,
    /// The width of the residual stream.
    pub(crate) hidden_size: usize,
    /// The width of the embedding and of the head, which are projected if it is not `hidden_size`.
    pub(crate) embedding_width: usize,
    /// The factor of embeddings.
    pub(crate) embedding_scale: Option<f64>,
    pub(crate) n_layers: usize,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) norm: NormKind,
    /// Whether there is a norm before the head.
    pub(crate) has_final_norm: bool,
    /// Whether the head has a bias.
    pub(crate) has_head_bias: bool,
    /// The soft cap of the logits.
    pub(crate) logit_softcap: Option<f64>,
    pub(crate) learned_positions: Option<LearnedPositions>,
    /// The longest text that the model can compute, in tokens.
    pub(crate) max_positions: Option<usize>,
    /// The longest text that a KV cache can hold, in tokens, if longer ones would change the keys.
    pub(crate) max_cached: Option<usize>,
    /// The longest text that the model was trained for, in tokens.
    pub(crate) max_seq_len: usize,
}

/// The names of the parts around the blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    /// The first part of the names of all tensors but the head's.
    pub(crate) prefix: &'static str,
    pub(crate) embedding: &'static str,
    /// The embedding of learned positions.
    pub(crate) positions: &'static str,
    pub(crate) layers: &'static str,
    /// The norm before the head.
    pub(crate) norm: &'static str,
}

/// A table of embeddings of positions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LearnedPositions {
    pub(crate) n_rows: usize,
    /// The row of the first token of a text.
    pub(crate) first_row: usize,
}

impl Shape {
    /// A shape of the sizes, without what only some architectures have: no factor of embeddings, no learned
    /// positions, no bias or soft cap of the logits.
    pub(crate) fn new(
        names: Names,
        vocab_size: usize,
        hidden_size: usize,
        n_layers: usize,
        max_seq_len: usize,
        norm: NormKind,
    ) -> Self {
        Self {
            names,
            vocab_size,
            hidden_size,
            embedding_width: hidden_size,
            embedding_scale: None,
            n_layers,
            tie_word_embeddings: false,
            norm,
            has_final_norm: true,
            has_head_bias: false,
            logit_softcap: None,
            learned_positions: None,
            max_positions: None,
            max_cached: None,
            max_seq_len,
        }
    }

    fn path(&self, name: &str) -> String {
        format!("{}.{name}", self.names.prefix)
    }

    /// The path of the embedding.
    pub(crate) fn embedding_path(&self) -> String {
        self.path(self.names.embedding)
    }

    /// The path of the embedding of learned positions.
    pub(crate) fn positions_path(&self) -> String {
        self.path(self.names.positions)
    }

    /// The path of the projection from the embedding to the width of the blocks.
    pub(crate) fn project_in_path(&self) -> String {
        self.path("project_in")
    }

    /// The path of the projection to the width of the head.
    pub(crate) fn project_out_path(&self) -> String {
        self.path("project_out")
    }

    /// The path of the norm before the head.
    pub(crate) fn norm_path(&self) -> String {
        self.path(self.names.norm)
    }

    /// The path of a block.
    pub(crate) fn block_path(&self, layer: usize) -> String {
        format!("{}.{}.{layer}", self.names.prefix, self.names.layers)
    }
}

/// A projection of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Projection {
    /// The path in the block.
    pub(crate) name: &'static str,
    /// `[d_in, d_out]`.
    pub(crate) dims: [usize; 2],
    pub(crate) has_bias: bool,
}

/// A block of an architecture, which is run in stages.
///
/// Each stage begins with projections that read the same input, so that a calibration can run one
/// after the other. The first stage is the attention.
///
/// The macro [`parts`] implements the methods that list projections and norms.
pub(crate) trait DecoderBlock: Sized {
    type Config: Architecture;

    /// The stage of each projection, in ascending order.
    const STAGES: &'static [usize];

    /// The projections of a block.
    fn projections(config: &Self::Config) -> Vec<Projection>;

    fn linears(&self) -> Vec<(&'static str, &Linear)>;

    fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)>;

    /// The paths of the norms in the block, with the lengths of their vectors.
    fn norm_lens(config: &Self::Config) -> Vec<(&'static str, usize)>;

    fn norms(&self) -> Vec<(&'static str, &Norm)>;

    /// Builds a block of its norms and projections, both in the order of the lists.
    fn build<S: Source>(parts: Parts<Self, S>) -> Result<Self, S::Error>;

    /// The input of the first stage, from the residual stream.
    fn enter(&self, x: Tensor<3>) -> Tensor<3>;

    /// Runs the first stage: the attention of all heads, from its input to that of the output projection.
    ///
    /// With a `cache`, the tokens follow those in it and are appended to it.
    fn attend(
        &self,
        input: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3>;

    /// Runs a stage after the first.
    ///
    /// Takes the residual stream and the input of the stage, and returns those of the next one.
    /// After the last stage both are the residual stream.
    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>);

    /// The projections of each stage, as ranges of the list.
    fn stages(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let stages = Self::STAGES.chunk_by(|a, b| a == b).map(|stage| {
            end += stage.len();
            end - stage.len()..end
        });
        stages.collect()
    }

    /// Runs all stages. With a `cache`, the tokens follow those in it and are appended to it.
    fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let mut input = self.attend(self.enter(x.clone()), positions, cache);
        let mut residual = x;
        for stage in 1..self.stages().len() {
            (residual, input) = self.advance(stage, residual, input);
        }
        residual
    }
}

/// Lists the norms and the projections of a block, each with its field.
///
/// A norm has a name and a length; a projection a stage, a name, its `[d_in, d_out]` and whether it
/// has a bias.
macro_rules! parts {
    (
        $config:ident =>
        norms: $($norm:literal $($norm_field:ident).+ [$len:expr],)+
        projections: $(
            $stage:literal $name:literal $($field:ident).+ $dims:expr, bias $has_bias:expr,
        )+
    ) => {
        const STAGES: &'static [usize] = &[$($stage),+];

        fn projections($config: &Self::Config) -> Vec<$crate::architecture::Projection> {
            vec![$($crate::architecture::Projection {
                name: $name,
                dims: $dims,
                has_bias: $has_bias,
            }),+]
        }

        fn linears(&self) -> Vec<(&'static str, &peft::Linear)> {
            vec![$(($name, &self.$($field).+)),+]
        }

        fn linears_mut(&mut self) -> Vec<(&'static str, &mut peft::Linear)> {
            vec![$(($name, &mut self.$($field).+)),+]
        }

        fn norm_lens($config: &Self::Config) -> Vec<(&'static str, usize)> {
            vec![$(($norm, $len)),+]
        }

        fn norms(&self) -> Vec<(&'static str, &$crate::norm::Norm)> {
            vec![$(($norm, &self.$($norm_field).+)),+]
        }
    };
}

pub(crate) use parts;

/// The parts of the block at a path, built from a source of parameters.
pub(crate) struct Parts<'a, B: DecoderBlock, S> {
    pub(crate) config: &'a B::Config,
    path: String,
    /// The index of the layer's reach among all of the architecture.
    pub(crate) reach: usize,
    source: &'a mut S,
}

impl<B: DecoderBlock, S: Source> Parts<'_, B, S> {
    /// All norms.
    ///
    /// # Panics
    /// If the number of norms is not `N`.
    pub(crate) fn norms<const N: usize>(&mut self) -> Result<[Norm; N], S::Error> {
        let kind = self.config.shape().norm;
        let norms = B::norm_lens(self.config).into_iter().map(|(name, len)| {
            let path = format!("{}.{name}", self.path);
            Norm::build(kind, &path, len, self.source)
        });
        let norms = norms.collect::<Result<Vec<_>, _>>()?;
        Ok(norms.try_into().expect("the norms of the list"))
    }

    /// All projections.
    ///
    /// # Panics
    /// If the number of projections is not `N`.
    pub(crate) fn linears<const N: usize>(&mut self) -> Result<[Linear; N], S::Error> {
        let linears = B::projections(self.config).into_iter().map(|projection| {
            let path = format!("{}.{}", self.path, projection.name);
            let Projection { dims, has_bias, .. } = projection;
            linear(&path, dims, has_bias, self.source)
        });
        let linears = linears.collect::<Result<Vec<_>, _>>()?;
        Ok(linears.try_into().expect("the projections of the list"))
    }
}
