use burn::module::{Module, Param};
use burn::tensor::Tensor;
use quant_core::Precision;

use crate::{Identity, Linear, Weight};

/// A parameter of [`Linears::tables`].
#[derive(Clone, Copy, Debug)]
pub enum Table<'a> {
    /// Such as the weight of a norm.
    Vector(&'a Param<Tensor<1>>),
    /// Such as an embedding, `[rows, columns]`.
    Matrix(&'a Param<Tensor<2>>),
}

/// A model that lists its projections, so that they can be quantized, adapted and merged.
///
/// [`linears`](Linears::linears) and [`linears_mut`](Linears::linears_mut) list the same layers in
/// the same order, under the paths that the model's files use (`model.layers.0.self_attn.q_proj`).
pub trait Linears: Module {
    /// The projections with their paths.
    fn linears(&self) -> Vec<(String, &Linear)>;

    /// The projections with their paths, mutably.
    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)>;

    /// Weights beside the projections that may be packed, such as that of a head, with their paths.
    ///
    /// They have no adapters; their formats are part of the model's [`Fingerprint`](crate::Fingerprint).
    fn other_weights(&self) -> Vec<(String, &Weight)> {
        Vec::new()
    }

    /// The same weights, mutably.
    fn other_weights_mut(&mut self) -> Vec<&mut Weight> {
        Vec::new()
    }

    /// Parameters beside the projections and the other weights, such as those of embeddings and norms,
    /// with the names of their tensors in Hugging Face's files.
    ///
    /// A directory of PEFT can replace them: [`Adapters::open_with_base`](crate::Adapters::open_with_base).
    fn tables(&self) -> Vec<(String, Table<'_>)> {
        Vec::new()
    }

    /// The names of the tensors of the embedding and of the head, if these are one parameter.
    fn tied(&self) -> Option<[String; 2]> {
        None
    }

    /// Gives the head a weight of its own, equal to the embedding, if these are one parameter: the last
    /// of the other weights then.
    fn untie(&mut self) {}

    /// What the outputs depend on besides the parameters, such as the number of heads.
    ///
    /// It is part of the model's [`Fingerprint`](crate::Fingerprint). A model that states nothing is
    /// identified by its parameters and its structure.
    fn identity(&self) -> Identity {
        Identity::default()
    }
}

/// Sets how accurate the products with packed weights are, in training and in inference.
///
/// A model from a file has [`Precision::Full`]. Compare a model with its quantized or merged version at
/// the same precision.
pub fn set_precision<M: Linears>(model: &mut M, precision: Precision) {
    for (_, linear) in model.linears_mut() {
        linear.set_precision(precision);
    }
    for weight in model.other_weights_mut() {
        weight.set_precision(precision);
    }
}

/// Seeds the dropout of all adapters, or switches it off with `None`.
///
/// The same inputs are dropped in every forward pass until the next call. [`fit`](crate::fit()) calls
/// it for each batch, and with `None` at the end; other training loops call it themselves.
pub fn set_dropout<M: Linears>(model: &mut M, seed: impl Into<Option<u64>>) {
    let seed = seed.into();
    for (path, linear) in model.linears_mut() {
        if let Some(adapter) = &mut linear.adapter {
            adapter.ops_mut().seed_dropout(&path, seed);
        }
    }
}
