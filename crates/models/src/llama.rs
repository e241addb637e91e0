//! LLaMA (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft::{CausalLm, Linear, Linears, Stages, Weight};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, Normal};

use crate::LlamaConfig;
use crate::generate::Past;
use crate::rope::Rope;

#[cfg(test)]
mod golden;

/// A LLaMA for causal language modelling.
#[derive(Module, Debug)]
pub struct Llama {
    pub(crate) embed_tokens: Param<Tensor<2>>,
    pub(crate) layers: Vec<Block>,
    pub(crate) norm: RmsNorm,
    /// `[hidden, vocab]`; the embedding if there is none.
    pub(crate) lm_head: Option<Weight>,
    #[module(skip)]
    pub(crate) config: LlamaConfig,
}

#[derive(Module, Debug)]
pub(crate) struct Block {
    pub(crate) input_layernorm: RmsNorm,
    pub(crate) self_attn: Attention,
    pub(crate) post_attention_layernorm: RmsNorm,
    pub(crate) mlp: Mlp,
}

#[derive(Module, Debug)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    head_dim: usize,
}

#[derive(Module, Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

#[derive(Module, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Param<Tensor<1>>,
    eps: f64,
}

/// Where a model's parameters come from, under their names in Hugging Face's files.
pub(crate) trait Source {
    type Error;

    /// A vector of `len`.
    fn vector(&mut self, name: &str, len: usize) -> Result<Param<Tensor<1>>, Self::Error>;

    /// A table of `rows` by `columns`, as it lies in the file.
    fn table(&mut self, name: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;

    /// The weight `[d_in, d_out]` of the projection at `path`, dense or packed.
    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Self::Error>;

    /// The weight `[hidden, vocab]` of the head, which is at [`HEAD`].
    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Self::Error>;
}

/// The path of the head.
pub(crate) const HEAD: &str = "lm_head";

impl Llama {
    pub(crate) fn build<S: Source>(config: LlamaConfig, source: &mut S) -> Result<Self, S::Error> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embed_tokens = source.table("model.embed_tokens.weight", [vocab, hidden])?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| Block::build(&config, &format!("model.layers.{layer}"), source))
            .collect::<Result<_, _>>()?;
        let norm = RmsNorm::build(&config, "model.norm", source)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(source.head([hidden, vocab])?),
        };
        Ok(Self {
            embed_tokens,
            layers,
            norm,
            lm_head,
            config,
        })
    }

    /// A new model that trains whole: weights from a normal distribution of deviation 0.02.
    ///
    /// # Panics
    /// Later, if the heads of `config` do not divide; configurations from files are checked.
    pub fn init(config: &LlamaConfig, seed: u64, device: &Device) -> Self {
        let mut random = Random {
            rng: ChaCha8Rng::seed_from_u64(seed),
            device: device.clone(),
        };
        match Self::build(config.clone(), &mut random) {
            Ok(model) => model,
        }
    }

    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The norm before block `block`, or before the head.
    fn norm_before(&self, block: usize) -> &RmsNorm {
        match self.layers.get(block) {
            Some(block) => &block.input_layernorm,
            None => &self.norm,
        }
    }
}

/// What a batch carries from one stage of a [`Llama`] to the next.
#[derive(Clone, Debug)]
pub struct State {
    residual: Tensor<3>,
    input: Tensor<3>,
}

/// The projections of a block that read the same input, as [`Llama`] lists them.
const STAGES: [Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

impl Stages for Llama {
    type State = State;

    fn stages(&self) -> Vec<Range<usize>> {
        let n_linears = STAGES[STAGES.len() - 1].end;
        let of_block = |block: usize| {
            STAGES.map(|stage| stage.start + n_linears * block..stage.end + n_linears * block)
        };
        (0..self.layers.len()).flat_map(of_block).collect()
    }

    fn block_stages(&self, block: usize) -> Range<usize> {
        STAGES.len() * block..STAGES.len() * (block + 1)
    }

    fn start(&self, tokens: Tensor<2, Int>) -> State {
        let residual = self.embed(tokens);
        State {
            input: self.norm_before(0).forward(residual.clone()),
            residual,
        }
    }

    fn input(state: &State) -> Tensor<3> {
        state.input.clone()
    }

    fn advance(&self, stage: usize, state: State) -> State {
        let State { residual, input } = state;
        let (block, stage) = (stage / STAGES.len(), stage % STAGES.len());
        let layer = &self.layers[block];
        let (residual, mut input) = match stage {
            0 => {
                // Made where it is needed: a calibration has many states at a time.
                let rope = self.positions(input.dims()[1], &input.device());
                (residual, layer.self_attn.mix(input, &rope, None))
            }
            _ => layer.advance(stage, residual, input),
        };
        if stage + 1 == STAGES.len() {
            input = self.norm_before(block + 1).forward(input);
        }
        State { residual, input }
    }
}

impl CausalLm for Llama {
    type Positions = Rope;

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn n_blocks(&self) -> usize {
        self.layers.len()
    }

    fn positions(&self, seq: usize, device: &Device) -> Rope {
        Rope::new(&self.config, seq, device)
    }

    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = tokens.dims();
        let tokens = tokens.reshape([batch * seq]);
        let x = self.embed_tokens.val().select(0, tokens);
        x.reshape([batch, seq, self.config.hidden_size])
    }

    fn block(&self, index: usize, x: Tensor<3>, rope: &Rope) -> Tensor<3> {
        self.layers[index].forward(x, rope, None)
    }

    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.norm.forward(x)
    }

    fn head(&self) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.to_dense(),
            None => self.embed_tokens.val().transpose(),
        }
    }

    fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.matmul(x),
            None => x.matmul(self.head()),
        }
    }
}

impl Linears for Llama {
    fn linears(&self) -> Vec<(String, &Linear)> {
        let mut all = Vec::new();
        for (layer, block) in self.layers.iter().enumerate() {
            let Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                ..
            } = &block.self_attn;
            let Mlp {
                gate_proj,
                up_proj,
                down_proj,
            } = &block.mlp;
            let linears = [
                q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,
            ];
            all.extend(paths(layer).zip(linears));
        }
        all
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let mut all = Vec::new();
        for (layer, block) in self.layers.iter_mut().enumerate() {
            let Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                ..
            } = &mut block.self_attn;
            let Mlp {
                gate_proj,
                up_proj,
                down_proj,
            } = &mut block.mlp;
            let linears = [
                q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,
            ];
            all.extend(paths(layer).zip(linears));
        }
        all
    }

    fn other_weights(&self) -> Vec<(String, &Weight)> {
        let head = self.lm_head.iter();
        head.map(|head| (HEAD.into(), head)).collect()
    }

    fn other_weights_mut(&mut self) -> Vec<&mut Weight> {
        self.lm_head.iter_mut().collect()
    }
}

impl LlamaConfig {
    /// The projections of a model of this shape with their `[d_in, d_out]`, in the order in which
    /// [`Llama`] lists them.
    pub fn projections(&self) -> Vec<(String, [usize; 2])> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let dims = [
            [hidden, queries],
            [hidden, keys],
            [hidden, keys],
            [queries, hidden],
            [hidden, inner],
            [hidden, inner],
            [inner, hidden],
        ];
        let of_block = |layer| paths(layer).zip(dims);
        (0..self.num_hidden_layers).flat_map(of_block).collect()
    }
}

/// The paths of a block's projections, in the order in which [`Llama`] lists them.
fn paths(layer: usize) -> impl Iterator<Item = String> {
    let names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    names
        .into_iter()
        .map(move |name| format!("model.layers.{layer}.{name}"))
}

impl Block {
    fn build<S: Source>(
        config: &LlamaConfig,
        path: &str,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        Ok(Self {
            input_layernorm: RmsNorm::build(config, &format!("{path}.input_layernorm"), source)?,
            self_attn: Attention::build(config, &format!("{path}.self_attn"), source)?,
            post_attention_layernorm: RmsNorm::build(
                config,
                &format!("{path}.post_attention_layernorm"),
                source,
            )?,
            mlp: Mlp::build(config, &format!("{path}.mlp"), source)?,
        })
    }

    /// One of the [`STAGES`] after the first, which is [`Attention::mix`]: from the residual stream
    /// and what the stage's projections read to the same for the next stage. After the last, a norm
    /// is to read the residual stream.
    fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        match stage {
            1 => {
                let x = residual + self.self_attn.o_proj.forward(input);
                (x.clone(), self.post_attention_layernorm.forward(x))
            }
            2 => (residual, self.mlp.gate(input)),
            _ => {
                let x = residual + self.mlp.down_proj.forward(input);
                (x.clone(), x)
            }
        }
    }

    /// All stages. With a `past`, the tokens come after those in it and join them.
    pub(crate) fn forward(&self, x: Tensor<3>, rope: &Rope, past: Option<&mut Past>) -> Tensor<3> {
        let input = self.input_layernorm.forward(x.clone());
        let mut input = self.self_attn.mix(input, rope, past);
        let mut residual = x;
        for stage in 1..STAGES.len() {
            (residual, input) = self.advance(stage, residual, input);
        }
        residual
    }
}

impl Attention {
    fn build<S: Source>(
        config: &LlamaConfig,
        path: &str,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let mut project = |name: &str, dims| {
            linear(
                &format!("{path}.{name}"),
                dims,
                config.attention_bias,
                source,
            )
        };
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            q_proj: project("q_proj", [hidden, queries])?,
            k_proj: project("k_proj", [hidden, keys])?,
            v_proj: project("v_proj", [hidden, keys])?,
            o_proj: project("o_proj", [queries, hidden])?,
            head_dim: config.head_dim,
        })
    }

    /// The values of each head mixed by its attention, the input of the last projection.
    fn mix(&self, x: Tensor<3>, rope: &Rope, past: Option<&mut Past>) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let dim = self.head_dim;
        let heads = |y: Tensor<3>| {
            let n = y.dims()[2] / dim;
            y.reshape([batch, seq, n, dim])
        };
        let q = rope.apply(heads(self.q_proj.forward(x.clone())));
        let k = rope.apply(heads(self.k_proj.forward(x.clone())));
        let v = heads(self.v_proj.forward(x));
        let (k, v) = match past {
            Some(past) => past.append(k, v),
            None => (k, v),
        };
        let mixed = kernels::causal_attention(q, k, v, 1.0 / (dim as f64).sqrt());
        let width = mixed.dims()[2] * dim;
        mixed.reshape([batch, seq, width])
    }
}

impl Mlp {
    fn build<S: Source>(
        config: &LlamaConfig,
        path: &str,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let mut project =
            |name: &str, dims| linear(&format!("{path}.{name}"), dims, config.mlp_bias, source);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: project("gate_proj", [hidden, inner])?,
            up_proj: project("up_proj", [hidden, inner])?,
            down_proj: project("down_proj", [inner, hidden])?,
        })
    }

    /// The gated values, the input of the last projection.
    fn gate(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        kernels::silu_mul(gate, self.up_proj.forward(x))
    }
}

impl RmsNorm {
    fn build<S: Source>(
        config: &LlamaConfig,
        path: &str,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        Ok(Self {
            weight: source.vector(&format!("{path}.weight"), config.hidden_size)?,
            eps: config.rms_norm_eps,
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        kernels::rms_norm(x, self.weight.val(), self.eps)
    }
}

fn linear<S: Source>(
    path: &str,
    dims: [usize; 2],
    has_bias: bool,
    source: &mut S,
) -> Result<Linear, S::Error> {
    let weight = source.weight(path, dims)?;
    let bias = match has_bias {
        true => Some(source.vector(&format!("{path}.bias"), dims[1])?),
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

/// Fresh parameters: norms of one, biases of zero, and normal weights.
struct Random {
    rng: ChaCha8Rng,
    device: Device,
}

impl Source for Random {
    type Error = std::convert::Infallible;

    fn vector(&mut self, name: &str, len: usize) -> Result<Param<Tensor<1>>, Self::Error> {
        let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
        Ok(Param::from_tensor(Tensor::full([len], value, &self.device)))
    }

    fn table(&mut self, _: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error> {
        let normal = Normal::new(0.0f32, 0.02).expect("a deviation above zero");
        let values: Vec<f32> = (0..dims[0] * dims[1])
            .map(|_| normal.sample(&mut self.rng))
            .collect();
        let values = TensorData::new(values, dims);
        Ok(Param::from_tensor(Tensor::from_data(values, &self.device)))
    }

    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Self::Error> {
        self.table(path, dims).map(Weight::Dense)
    }

    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Self::Error> {
        self.weight(HEAD, dims)
    }
}
