use burn::module::Module;
use burn::tensor::Tensor;
use peft::Linear;

use crate::kv_cache::KvCache;
use crate::positions::Positions;

/// Causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).
#[derive(Module, Debug)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) head_dim: usize,
}

impl Attention {
    /// The attention of all heads, which is the input of the output projection.
    ///
    /// With a `cache`, the tokens follow those in it and are appended to it.
    ///
    /// # Shapes
    /// - `x`: `[batch, seq, hidden]`
    /// - result: `[batch, seq, heads * head_dim]`
    pub(crate) fn attend(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let dim = self.head_dim;
        let heads = |y: Tensor<3>| {
            let n = y.dims()[2] / dim;
            y.reshape([batch, seq, n, dim])
        };
        let q = heads(self.q_proj.forward(x.clone()));
        let k = heads(self.k_proj.forward(x.clone()));
        let v = heads(self.v_proj.forward(x));
        attend(q, k, v, positions, cache)
    }
}

/// The attention of all heads, whose queries and keys are not yet rotated.
///
/// # Shapes
/// - `q`: `[batch, seq, heads, head_dim]`; `k`, `v`: `[batch, seq, kv_heads, head_dim]`
/// - result: `[batch, seq, heads * head_dim]`
pub(crate) fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    positions: &Positions,
    cache: Option<&mut KvCache>,
) -> Tensor<3> {
    let [batch, seq, heads, dim] = q.dims();
    let (q, k) = (positions.rotate(q), positions.rotate(k));
    let (k, v) = match cache {
        Some(cache) => cache.append(k, v),
        None => (k, v),
    };
    let scale = 1.0 / (dim as f64).sqrt();
    let attended = kernels::causal_attention(q, k, v, positions.starts(), scale);
    attended.reshape([batch, seq, heads * dim])
}
