//! OPT (Zhang et al. 2022, arXiv:2205.01068), with norms before attention and MLP or after them.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Tensor, activation};
use peft::Linear;

use crate::attention::Attention;
use crate::norm::Norm;
use crate::source::{Source, linear};
use crate::{Activation, OptConfig};

#[derive(Module, Debug)]
pub(crate) struct OptBlock {
    self_attn: Attention,
    self_attn_layer_norm: Norm,
    fc1: Linear,
    fc2: Linear,
    final_layer_norm: Norm,
    /// Whether the norms come after what they belong to.
    #[module(skip)]
    norm_after: bool,
    #[module(skip)]
    activation: Activation,
}

/// The projections of a block, in the order in which they are listed.
const NAMES: [&str; 6] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "fc1",
    "fc2",
];

/// The projections that read the same input.
pub(crate) const STAGES: [Range<usize>; 4] = [0..3, 3..4, 4..5, 5..6];

impl OptConfig {
    /// The projections of a block with their `[d_in, d_out]`.
    pub(crate) fn projections(&self) -> Vec<(&'static str, [usize; 2])> {
        let (hidden, inner) = (self.hidden_size, self.ffn_dim);
        let dims = [
            [hidden, hidden],
            [hidden, hidden],
            [hidden, hidden],
            [hidden, hidden],
            [hidden, inner],
            [inner, hidden],
        ];
        NAMES.into_iter().zip(dims).collect()
    }

    pub(crate) fn norm<S: Source>(&self, path: &str, source: &mut S) -> Result<Norm, S::Error> {
        let affine = self.layer_norm_elementwise_affine;
        Norm::layer(path, self.hidden_size, affine, source)
    }

    /// Whether there is a norm before the head.
    pub(crate) fn has_final_norm(&self) -> bool {
        self.do_layer_norm_before && !self.remove_final_layer_norm
    }
}

impl OptBlock {
    pub(crate) fn build<S: Source>(
        config: &OptConfig,
        path: &str,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let mut projections = config.projections().into_iter();
        let mut next = |source: &mut S| {
            let (name, dims) = projections.next().expect("one for each of the fields");
            linear(&format!("{path}.{name}"), dims, config.enable_bias, source)
        };
        let self_attn = Attention {
            q_proj: next(source)?,
            k_proj: next(source)?,
            v_proj: next(source)?,
            o_proj: next(source)?,
            head_dim: config.hidden_size / config.num_attention_heads,
        };
        Ok(Self {
            self_attn,
            fc1: next(source)?,
            fc2: next(source)?,
            self_attn_layer_norm: config.norm(&format!("{path}.self_attn_layer_norm"), source)?,
            final_layer_norm: config.norm(&format!("{path}.final_layer_norm"), source)?,
            norm_after: !config.do_layer_norm_before,
            activation: config.activation,
        })
    }

    pub(crate) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        let attention = &self.self_attn;
        let all = [
            &attention.q_proj,
            &attention.k_proj,
            &attention.v_proj,
            &attention.o_proj,
            &self.fc1,
            &self.fc2,
        ];
        NAMES.into_iter().zip(all).collect()
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let attention = &mut self.self_attn;
        let all = [
            &mut attention.q_proj,
            &mut attention.k_proj,
            &mut attention.v_proj,
            &mut attention.o_proj,
            &mut self.fc1,
            &mut self.fc2,
        ];
        NAMES.into_iter().zip(all).collect()
    }

    pub(crate) fn norms(&self) -> [(&'static str, &Norm); 2] {
        [
            ("self_attn_layer_norm", &self.self_attn_layer_norm),
            ("final_layer_norm", &self.final_layer_norm),
        ]
    }

    pub(crate) fn attention(&self) -> &Attention {
        &self.self_attn
    }

    pub(crate) fn enter(&self, x: Tensor<3>) -> Tensor<3> {
        match self.norm_after {
            true => x,
            false => self.self_attn_layer_norm.forward(x),
        }
    }

    pub(crate) fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        match (stage, self.norm_after) {
            (1, true) => {
                let x = residual + self.self_attn.o_proj.forward(input);
                let x = self.self_attn_layer_norm.forward(x);
                (x.clone(), x)
            }
            (1, false) => {
                let x = residual + self.self_attn.o_proj.forward(input);
                (x.clone(), self.final_layer_norm.forward(x))
            }
            (2, _) => (residual, self.activation.of(self.fc1.forward(input))),
            (_, norm_after) => {
                let x = residual + self.fc2.forward(input);
                let x = match norm_after {
                    true => self.final_layer_norm.forward(x),
                    false => x,
                };
                (x.clone(), x)
            }
        }
    }
}

impl Activation {
    fn of(self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Relu => activation::relu(x),
            Self::Gelu => activation::gelu(x),
            Self::GeluTanh => activation::gelu_approximate(x),
        }
    }
}
