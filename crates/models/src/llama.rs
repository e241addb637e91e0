//! LLaMA (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use peft::Linear;

use crate::LlamaConfig;
use crate::attention::Attention;
use crate::norm::Norm;
use crate::source::{Source, linear};

#[derive(Module, Debug)]
pub(crate) struct LlamaBlock {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// The projections of a block, in the order in which they are listed.
const NAMES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The projections that read the same input.
pub(crate) const STAGES: [Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

impl LlamaConfig {
    /// The projections of a block with their `[d_in, d_out]`.
    pub(crate) fn projections(&self) -> Vec<(&'static str, [usize; 2])> {
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
        NAMES.into_iter().zip(dims).collect()
    }

    /// Whether a projection has a bias, in the same order.
    fn biases(&self) -> [bool; 7] {
        let (qkv, o, mlp) = (
            self.attention_bias,
            self.attention_output_bias,
            self.mlp_bias,
        );
        [qkv, qkv, qkv, o, mlp, mlp, mlp]
    }

    pub(crate) fn norm<S: Source>(&self, path: &str, source: &mut S) -> Result<Norm, S::Error> {
        Norm::rms(path, self.hidden_size, self.rms_norm_eps, source)
    }
}

impl LlamaBlock {
    pub(crate) fn build<S: Source>(
        config: &LlamaConfig,
        path: &str,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let input_layernorm = config.norm(&format!("{path}.input_layernorm"), source)?;
        let mut projections = config.projections().into_iter().zip(config.biases());
        let mut next = |source: &mut S| {
            let ((name, dims), has_bias) = projections.next().expect("one for each of the fields");
            linear(&format!("{path}.{name}"), dims, has_bias, source)
        };
        let self_attn = Attention {
            q_proj: next(source)?,
            k_proj: next(source)?,
            v_proj: next(source)?,
            o_proj: next(source)?,
            head_dim: config.head_dim,
        };
        let post = format!("{path}.post_attention_layernorm");
        Ok(Self {
            input_layernorm,
            self_attn,
            post_attention_layernorm: config.norm(&post, source)?,
            mlp: Mlp {
                gate_proj: next(source)?,
                up_proj: next(source)?,
                down_proj: next(source)?,
            },
        })
    }

    pub(crate) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        let all = [
            &attention.q_proj,
            &attention.k_proj,
            &attention.v_proj,
            &attention.o_proj,
            &mlp.gate_proj,
            &mlp.up_proj,
            &mlp.down_proj,
        ];
        NAMES.into_iter().zip(all).collect()
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        let all = [
            &mut attention.q_proj,
            &mut attention.k_proj,
            &mut attention.v_proj,
            &mut attention.o_proj,
            &mut mlp.gate_proj,
            &mut mlp.up_proj,
            &mut mlp.down_proj,
        ];
        NAMES.into_iter().zip(all).collect()
    }

    pub(crate) fn norms(&self) -> [(&'static str, &Norm); 2] {
        [
            ("input_layernorm", &self.input_layernorm),
            ("post_attention_layernorm", &self.post_attention_layernorm),
        ]
    }

    pub(crate) fn attention(&self) -> &Attention {
        &self.self_attn
    }

    pub(crate) fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        self.input_layernorm.forward(x)
    }

    pub(crate) fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        let Mlp {
            gate_proj,
            up_proj,
            down_proj,
        } = &self.mlp;
        match stage {
            1 => {
                let x = residual + self.self_attn.o_proj.forward(input);
                (x.clone(), self.post_attention_layernorm.forward(x))
            }
            2 => {
                let gate = gate_proj.forward(input.clone());
                (residual, kernels::silu_mul(gate, up_proj.forward(input)))
            }
            _ => {
                let x = residual + down_proj.forward(input);
                (x.clone(), x)
            }
        }
    }
}
