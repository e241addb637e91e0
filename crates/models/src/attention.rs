use burn::module::Module;
use burn::tensor::Tensor;
use kernels::Scores;
use peft::Linear;

use crate::kv_cache::KvCache;
use crate::norm::Norm;
use crate::positions::Positions;

/// How the heads of a layer attend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) head_dim: usize,
    /// The factor of the scores, and their soft cap.
    pub(crate) scores: Scores,
    /// The index of the layer's reach among those of the positions.
    pub(crate) reach: usize,
}

impl Heads {
    /// Heads whose scores have a variance of one for normal queries and keys.
    pub(crate) fn new(head_dim: usize, reach: usize) -> Self {
        Self {
            head_dim,
            scores: Scores::new(1.0 / (head_dim as f64).sqrt()),
            reach,
        }
    }

    /// Cuts projected tokens into heads: `[batch, seq, heads * head_dim]` to
    /// `[batch, seq, heads, head_dim]`.
    pub(crate) fn split(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, seq, width] = x.dims();
        x.reshape([batch, seq, width / self.head_dim, self.head_dim])
    }

    /// The attention of all heads, whose queries and keys are not yet rotated.
    ///
    /// With a `cache`, the tokens follow those in it and are appended to it.
    ///
    /// # Shapes
    /// - `q`: `[batch, seq, heads, head_dim]`; `k`, `v`: `[batch, seq, kv_heads, head_dim]`
    /// - result: `[batch, seq, heads * head_dim]`
    ///
    /// # Panics
    /// If there is a cache and the attention is not causal.
    pub(crate) fn attend(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [batch, seq, heads, dim] = q.dims();
        let rotate = |x| positions.rotate(self.reach, x);
        let (q, k) = (rotate(q), rotate(k));
        let (k, v) = match cache {
            Some(cache) => {
                let causal = positions.are_causal(self.reach);
                assert!(causal, "a KV cache, but tokens attend to later ones");
                cache.append(k, v)
            }
            None => (k, v),
        };
        let mask = positions.mask(self.reach, batch);
        let attended = kernels::attention(q, k, v, mask, self.scores);
        attended.reshape([batch, seq, heads * dim])
    }
}

/// Attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).
#[derive(Module, Debug)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    #[module(skip)]
    pub(crate) heads: Heads,
}

impl Attention {
    /// The queries, keys and values of all heads, `[batch, seq, heads or kv_heads, head_dim]`, from
    /// `[batch, seq, hidden]`.
    pub(crate) fn project(&self, x: Tensor<3>) -> [Tensor<4>; 3] {
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj];
        projections.map(|projection| self.heads.split(projection.forward(x.clone())))
    }

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
        let [q, k, v] = self.project(x);
        self.heads.attend(q, k, v, positions, cache)
    }
}

/// Attention whose queries and keys are normed, head by head (Henry et al. 2020, arXiv:2010.04245).
#[derive(Module, Debug)]
pub(crate) struct NormedAttention {
    pub(crate) attention: Attention,
    pub(crate) q_norm: Norm,
    pub(crate) k_norm: Norm,
}

impl NormedAttention {
    /// As [`Attention::attend`].
    pub(crate) fn attend(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [q, k, v] = self.attention.project(x);
        let (q, k) = (self.q_norm.forward(q), self.k_norm.forward(k));
        self.attention.heads.attend(q, k, v, positions, cache)
    }
}
