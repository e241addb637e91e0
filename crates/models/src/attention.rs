use burn::module::Module;
use burn::tensor::Tensor;
use peft::Linear;

use crate::generate::Past;
use crate::positions::Positions;

/// Queries, keys and values of each head, and what reads the heads' mixed values.
#[derive(Module, Debug)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) head_dim: usize,
}

impl Attention {
    /// The values of each head mixed by its attention, the input of the last projection. With a
    /// `past`, the tokens come after those in it and join them.
    pub(crate) fn mix(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        past: Option<&mut Past>,
    ) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let dim = self.head_dim;
        let heads = |y: Tensor<3>| {
            let n = y.dims()[2] / dim;
            y.reshape([batch, seq, n, dim])
        };
        let q = positions.turn(heads(self.q_proj.forward(x.clone())));
        let k = positions.turn(heads(self.k_proj.forward(x.clone())));
        let v = heads(self.v_proj.forward(x));
        let (k, v) = match past {
            Some(past) => past.append(k, v),
            None => (k, v),
        };
        let scale = 1.0 / (dim as f64).sqrt();
        let mixed = kernels::causal_attention(q, k, v, positions.starts(), scale);
        let width = mixed.dims()[2] * dim;
        mixed.reshape([batch, seq, width])
    }
}
