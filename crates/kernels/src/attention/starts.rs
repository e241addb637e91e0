//! The beginning of the segment of each query.

use burn::backend::{Backend, ExtensionType, tensor::IntTensor};

/// The first key that each query attends to. (burn's extensions take no `Option` of a tensor.)
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "cubecl"))]
pub(crate) enum Starts<B: Backend> {
    /// The first key of the sequence.
    First,
    /// `[batch, seq_q]`.
    Each(IntTensor<B>),
}
