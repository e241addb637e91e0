//! The keys that queries attend to.

use burn::backend::{Backend, ExtensionType, tensor::IntTensor};
use burn::tensor::{Int, Tensor};

/// The keys that each query attends to: a range of them.
///
/// Query `i` attends to the keys `starts[i] .. ends[i]`, from the first key and to the last one by
/// default. Under a causal mask, queries are the last `seq_q` of `seq_k` positions, and no range goes
/// beyond the query's own position, `seq_k - seq_q + i`, which is the last that it may have.
///
/// Packed documents and padding are separated by both bounds, or under a causal mask by `starts` alone.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use kernels::{Mask, attention};
///
/// let device = Device::flex();
/// // Two documents of two tokens. All scores are 0.
/// let zeros = Tensor::<4>::zeros([1, 4, 1, 1], &device);
/// let v = Tensor::<4>::from_data([[[[1.0]], [[3.0]], [[5.0]], [[9.0]]]], &device);
/// let starts = Tensor::<2, Int>::from_data([[0, 0, 2, 2]], &device);
/// let ends = Tensor::<2, Int>::from_data([[2, 2, 4, 4]], &device);
/// let values = |mask| {
///     let y = attention(zeros.clone(), zeros.clone(), v.clone(), mask, 1.0);
///     y.into_data().try_to_vec::<f32>().unwrap()
/// };
/// assert_eq!(values(Mask::causal().with_starts(starts.clone())), [1.0, 2.0, 5.0, 7.0]);
/// assert_eq!(values(Mask::full().with_starts(starts).with_ends(ends)), [2.0, 2.0, 7.0, 7.0]);
/// assert_eq!(values(Mask::full()), [4.5; 4]);
/// ```
#[derive(Clone, Debug)]
pub struct Mask {
    pub(super) causal: bool,
    pub(super) starts: Option<Tensor<2, Int>>,
    pub(super) ends: Option<Tensor<2, Int>>,
}

impl Mask {
    /// Queries attend to the keys up to their own position, as in a decoder.
    pub fn causal() -> Self {
        Self {
            causal: true,
            ..Self::full()
        }
    }

    /// Queries attend to all keys, of which there may be fewer: as in an encoder, or from one sequence to
    /// another.
    pub fn full() -> Self {
        Self {
            causal: false,
            starts: None,
            ends: None,
        }
    }

    /// Sets the first key that each query attends to, `[batch, seq_q]`, not negative.
    ///
    /// A start after the last key that the query may attend to counts as that key.
    pub fn with_starts(mut self, starts: impl Into<Option<Tensor<2, Int>>>) -> Self {
        self.starts = starts.into();
        self
    }

    /// Sets the key after the last one that each query attends to, `[batch, seq_q]`, not negative.
    ///
    /// An end of 0 counts as 1, and an end after all keys as their number.
    pub fn with_ends(mut self, ends: impl Into<Option<Tensor<2, Int>>>) -> Self {
        self.ends = ends.into();
        self
    }
}

/// A [`Mask`] of a backend.
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub(crate) struct KeyRanges<B: Backend> {
    pub(super) causal: bool,
    #[extension_type]
    pub(super) starts: Bound<B>,
    #[extension_type]
    pub(super) ends: Bound<B>,
}

/// The bounds of ranges of keys on one side. (burn's extensions take no `Option` of a tensor.)
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub(crate) enum Bound<B: Backend> {
    /// Those of all keys.
    Absent,
    /// `[batch, seq_q]`.
    Each(IntTensor<B>),
}
