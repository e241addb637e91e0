use burn::module::Module;
use quant_core::Precision;

use crate::{Linear, Weight};

/// A model that says where its projections are: all it takes to be quantized, adapted and merged.
///
/// [`linears`](Linears::linears) and [`linears_mut`](Linears::linears_mut) list the same layers in
/// the same order, under the paths that the model's files use (`model.layers.0.self_attn.q_proj`).
pub trait Linears: Module {
    /// The projections with their paths.
    fn linears(&self) -> Vec<(String, &Linear)>;

    /// The projections with their paths, to be changed.
    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)>;

    /// How accurate the products with packed weights are from now on, in training and out of it.
    ///
    /// Compare a model with what was made from it at one precision: that of a model from a file is
    /// [`Precision::Full`].
    fn set_precision(&mut self, precision: Precision) {
        for (_, linear) in self.linears_mut() {
            linear.set_precision(precision);
        }
        for weight in self.other_weights_mut() {
            weight.set_precision(precision);
        }
    }

    /// From now on, adapters with dropout drop inputs, as this seed says: the same ones until the next
    /// call. None with `None`. [`fit`](crate::fit()) calls it for each batch, and with `None` at the
    /// end; it is for other training loops.
    fn set_dropout(&mut self, seed: Option<u64>) {
        for (path, linear) in self.linears_mut() {
            if let Some(adapter) = &mut linear.adapter {
                adapter.ops_mut().seed_dropout(&path, seed);
            }
        }
    }

    /// Weights beside the projections that may be packed, such as that of a head, with their paths.
    /// They wear no adapters; their formats are part of the model's [`Fingerprint`](crate::Fingerprint).
    fn other_weights(&self) -> Vec<(String, &Weight)> {
        Vec::new()
    }

    /// The same weights, to be changed.
    fn other_weights_mut(&mut self) -> Vec<&mut Weight> {
        Vec::new()
    }
}
