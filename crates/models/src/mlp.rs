use burn::module::Module;
use burn::tensor::Tensor;
use peft::Linear;

use crate::activation::Activation;
use crate::norm::Norm;

/// The gated MLP (Shazeer 2020, arXiv:2002.05202).
#[derive(Module, Debug)]
pub(crate) struct GatedMlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
    #[module(skip)]
    pub(crate) activation: Activation,
}

impl GatedMlp {
    /// The input of the last projection, from that of the first ones.
    pub(crate) fn gate(&self, input: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(input.clone());
        self.activation.gate(gate, self.up_proj.forward(input))
    }

    /// Runs a stage after the attention of a block that has `norm` before its MLP and none behind it: the
    /// output projection of the attention, the first projections of the MLP, and the last one.
    pub(crate) fn advance(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
        o_proj: &Linear,
        norm: &Norm,
    ) -> (Tensor<3>, Tensor<3>) {
        match stage {
            1 => {
                let x = residual + o_proj.forward(input);
                (x.clone(), norm.forward(x))
            }
            2 => (residual, self.gate(input)),
            _ => {
                let x = residual + self.down_proj.forward(input);
                (x.clone(), x)
            }
        }
    }

    /// As [`GatedMlp::advance`], of a block that has a norm behind its attention and its MLP too: `norms` are
    /// the one behind the attention, the one before the MLP and the one behind it.
    pub(crate) fn advance_between_norms(
        &self,
        stage: usize,
        residual: Tensor<3>,
        input: Tensor<3>,
        o_proj: &Linear,
        norms: [&Norm; 3],
    ) -> (Tensor<3>, Tensor<3>) {
        let [after_attention, before, after] = norms;
        match stage {
            1 => {
                let x = residual + after_attention.forward(o_proj.forward(input));
                (x.clone(), before.forward(x))
            }
            2 => (residual, self.gate(input)),
            _ => {
                let x = residual + after.forward(self.down_proj.forward(input));
                (x.clone(), x)
            }
        }
    }
}
