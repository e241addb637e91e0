//! A packed weight of a backend.

use burn::backend::{
    Backend, ExtensionType,
    tensor::{FloatTensor, IntTensor},
};

use crate::layout::Layout;

/// A packed weight of a backend: `w = scales * (level(code) - zeros)`.
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub(crate) struct Packed<B: Backend> {
    /// [`Layout::words_shape`], dtype `U32`.
    pub(super) words: IntTensor<B>,
    /// [`Layout::grid_shape`].
    pub(super) scales: FloatTensor<B>,
    #[extension_type]
    pub(super) zeros: Zeros<B>,
    pub(super) layout: Layout,
    pub(super) precision: Precision,
}

/// The accuracy of products with a packed weight, forward and backward.
///
/// The CPU computes in fixed point where it has integer units for it (AVX-512 with VNNI, AMX) and they are
/// faster than floats, see [`Arithmetic`](crate::Arithmetic): up to 256 consecutive values of a row are
/// rounded relative to the largest of them. Other products, CPUs and backends compute in floating point
/// with either setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 24 bits, as in `f32`.
    #[default]
    Full,
    /// 16 bits: a relative error of the result of about 1e-4, where `bf16` has 3e-3.
    Fast,
}

/// The zeros of a packed weight. (burn's extensions take no `Option` of a tensor.)
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub(crate) enum Zeros<B: Backend> {
    /// All zeros are 0.
    Absent,
    /// [`Layout::grid_shape`].
    Each(FloatTensor<B>),
}
