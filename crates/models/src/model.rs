use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor};
use peft::{Blocks, CausalLm, Head, Identity, Linear, Linears, Spans, Table, Weight};
use tensor_files::FloatType;

use crate::config::{Block, Config};
use crate::norm::Norm;
use crate::positions::Positions;
use crate::source::{HEAD, Random, Source, Vector, weight_name};
use crate::{ConfigError, Result};

#[cfg(test)]
mod bidirectional;
#[cfg(test)]
mod golden;

/// A causal language model of one of the architectures of [`Config`].
///
/// It has an embedding, blocks one after the other, a norm and a head.
///
/// # Examples
/// ```
/// use models::{Model, OptConfig};
/// use peft::CausalLm;
///
/// let device = burn::tensor::Device::flex();
/// let config = OptConfig::default().with_num_hidden_layers(1).with_vocab_size(16);
/// let model = Model::init(config, 0, &device);
/// let tokens = burn::tensor::Tensor::from_data([[3, 1, 4]], &device);
/// assert_eq!(model.forward(tokens).dims(), [1, 3, 16]);
/// // OPT-125M has embeddings for 2048 positions.
/// assert!(model.cache(4096).is_err());
/// ```
#[derive(Module, Debug)]
pub struct Model {
    /// `[vocab, width]`.
    pub(crate) embed_tokens: Param<Tensor<2>>,
    /// `[positions, hidden]`, if the model has learned positions.
    pub(crate) embed_positions: Option<Param<Tensor<2>>>,
    /// `[width, hidden]`, if the embedding has another width than the blocks.
    pub(crate) project_in: Option<Weight>,
    pub(crate) layers: Vec<Block>,
    norm: Option<Norm>,
    /// `[hidden, width]`.
    pub(crate) project_out: Option<Weight>,
    /// `[width, vocab]`; the embedding if there is none.
    pub(crate) lm_head: Option<Weight>,
    /// `[vocab]`, if the head has a bias.
    pub(crate) head_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(crate) config: Config,
    /// The type of the activations, which is read where tokens are embedded.
    #[module(skip)]
    pub(crate) compute: FloatType,
    /// The digest of the tokenizer's files, if the model came with some.
    #[module(skip)]
    pub(crate) tokenizer: Option<String>,
}

impl Model {
    pub(crate) fn build<S: Source>(config: Config, source: &mut S) -> Result<Self, S::Error> {
        let shape = config.shape();
        let (hidden, width) = (shape.hidden_size, shape.embedding_width);
        let mut model = Self::embedding(config, source)?;
        // Before the blocks: the largest of matrices is in memory twice while it is read.
        if !shape.tie_word_embeddings {
            model.lm_head = Some(source.head([width, shape.vocab_size])?);
        }
        if shape.has_head_bias {
            model.head_bias = Some(source.vector(HEAD, Vector::Bias, shape.vocab_size)?);
        }
        if width != hidden {
            let path = shape.project_out_path();
            model.project_out = Some(source.weight(&path, [hidden, width])?);
        }
        model.layers = (0..shape.n_layers)
            .map(|layer| Block::build(&model.config, layer, source))
            .collect::<Result<_, _>>()?;
        if shape.has_final_norm {
            let path = shape.norm_path();
            model.norm = Some(Norm::build(shape.norm, &path, hidden, source)?);
        }
        Ok(model)
    }

    /// A new model, all of whose parameters train, with normal weights of deviation 0.02.
    ///
    /// # Panics
    /// If the sizes of `config` do not fit each other, when the model is first run. Configurations that
    /// are read from files are checked.
    pub fn init(config: impl Into<Config>, seed: u64, device: &Device) -> Self {
        match Self::build(config.into(), &mut Random::new(seed, device)) {
            Ok(model) => model,
        }
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The type of float that the model computes in.
    pub fn compute(&self) -> FloatType {
        self.compute
    }

    /// Sets the type of float that the model computes in, which is that of its activations. Parameters
    /// stay as they are.
    ///
    /// # Errors
    /// [`ConfigError::Compute`] if the device of the parameters does not compute in it.
    pub fn with_compute(mut self, compute: FloatType) -> Result<Self> {
        check_compute(compute, &self.device())?;
        self.compute = compute;
        Ok(self)
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device()
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.layers
    }

    /// The parameters besides projections and other weights, with the names of their tensors.
    pub(crate) fn tables(&self) -> Vec<(String, Table<'_>)> {
        let shape = self.config.shape();
        let embeddings = [
            (shape.embedding_path(), Some(&self.embed_tokens)),
            (shape.positions_path(), self.embed_positions.as_ref()),
        ];
        let embeddings = embeddings
            .into_iter()
            .filter_map(|(path, table)| Some((weight_name(&path), Table::Matrix(table?))));
        let bias = self.head_bias.iter();
        let bias = bias.map(|bias| (Vector::Bias.name(HEAD), Table::Vector(bias)));
        let norm = self.norm.iter();
        let norm = norm.flat_map(|norm| norm_tables(shape.norm_path(), norm));
        let blocks = self.layers.iter().enumerate();
        let of_blocks = blocks.flat_map(|(layer, block)| block.tables(&shape.block_path(layer)));
        embeddings
            .chain(bias)
            .chain(norm)
            .chain(of_blocks)
            .collect()
    }

    /// A model of this configuration that can embed tokens, and do nothing else.
    pub(crate) fn embedding<S: Source>(config: Config, source: &mut S) -> Result<Self, S::Error> {
        let shape = config.shape();
        let (hidden, width) = (shape.hidden_size, shape.embedding_width);
        Ok(Self {
            embed_tokens: source.table(&shape.embedding_path(), [shape.vocab_size, width])?,
            embed_positions: match shape.learned_positions {
                Some(learned) => {
                    Some(source.table(&shape.positions_path(), [learned.n_rows, hidden])?)
                }
                None => None,
            },
            project_in: if width == hidden {
                None
            } else {
                Some(source.weight(&shape.project_in_path(), [width, hidden])?)
            },
            layers: Vec::new(),
            norm: None,
            project_out: None,
            lm_head: None,
            head_bias: None,
            config,
            compute: FloatType::F32,
            tokenizer: None,
        })
    }
}

impl Block {
    /// The parameters besides projections of the block at `path`, with the names of their tensors.
    pub(crate) fn tables(&self, path: &str) -> Vec<(String, Table<'_>)> {
        let norms = self.norms().into_iter();
        let norms = norms.flat_map(|(name, norm)| norm_tables(format!("{path}.{name}"), norm));
        norms.collect()
    }
}

fn norm_tables(path: String, norm: &Norm) -> Vec<(String, Table<'_>)> {
    let vectors = norm.vectors().into_iter();
    let vectors = vectors.map(|(kind, vector)| (kind.name(&path), Table::Vector(vector)));
    vectors.collect()
}

/// # Errors
/// [`ConfigError::Compute`] if the device does not compute in a type of float.
pub(crate) fn check_compute(compute: FloatType, device: &Device) -> Result<()> {
    if device.supports_dtype(dtype(compute)) {
        return Ok(());
    }
    let device = format!("{device:?}");
    Err(ConfigError::Compute { compute, device }.into())
}

/// A type of float as a dtype of burn's.
fn dtype(float: FloatType) -> DType {
    match float {
        FloatType::F32 => DType::F32,
        FloatType::F16 => DType::F16,
        FloatType::Bf16 => DType::BF16,
    }
}

impl Blocks for Model {
    type Positions = Positions;

    fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    fn max_positions(&self) -> Option<usize> {
        self.config.shape().max_positions
    }

    fn n_blocks(&self) -> usize {
        self.layers.len()
    }

    fn positions(&self, spans: &Spans) -> Positions {
        self.config.positions(spans)
    }

    fn embed(&self, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
        let rows = |table: &Param<Tensor<2>>, rows: Tensor<2, Int>| {
            let [batch, seq] = rows.dims();
            let x = table.val().select(0, rows.reshape([batch * seq]));
            let x = x.cast(dtype(self.compute));
            let width = x.dims()[1];
            x.reshape([batch, seq, width])
        };
        let x = rows(&self.embed_tokens, tokens);
        let x = match self.config.shape().embedding_scale {
            Some(scale) => x * scale,
            None => x,
        };
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
        let head: Head<'_> = match &self.lm_head {
            Some(head) => head.into(),
            None => self.embed_tokens.val().transpose().into(),
        };
        let bias = self.head_bias.as_ref().map(|bias| bias.val());
        head.with_bias(bias)
            .with_softcap(self.config.shape().logit_softcap)
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
        let shape = self.config.shape();
        let others = [
            (shape.project_in_path(), &self.project_in),
            (shape.project_out_path(), &self.project_out),
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

    fn tables(&self) -> Vec<(String, Table<'_>)> {
        self.tables()
    }

    fn tied(&self) -> Option<[String; 2]> {
        let embedding = self.config.shape().embedding_path();
        let is_tied = self.lm_head.is_none();
        is_tied.then(|| [weight_name(&embedding), weight_name(HEAD)])
    }

    fn untie(&mut self) {
        if self.lm_head.is_none() {
            let embedding = self.embed_tokens.val().without_autodiff();
            self.lm_head = Some(Weight::frozen(embedding.transpose()));
            self.config.untie();
        }
    }

    fn identity(&self) -> Identity {
        let tokenizer = self.tokenizer.clone();
        self.config.identity().with_tokenizer(tokenizer)
    }
}
