use burn::module::Module;

use crate::Linear;

/// A model that says where its projections are: all it takes to be quantized, adapted and merged.
///
/// Both methods list the same layers in the same order, under the paths that the model's files use
/// (`model.layers.0.self_attn.q_proj`).
pub trait Linears: Module {
    /// The projections with their paths.
    fn linears(&self) -> Vec<(String, &Linear)>;

    /// The projections with their paths, to be changed.
    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)>;
}
