//! Differentiable products with packed low-bit weights, and the other operations of a transformer's
//! step, for every burn backend.
//!
//! A packed weight is a tensor of integer codes in `u32` words beside one scale, and at will one
//! zero-point, for each group of inputs and each output:
//!
//! ```text
//! w[i, o] = scales[g, o] * (level(code[i, o]) - zeros[g, o]),   g = i / group_size
//! ```
//!
//! | item | what it is |
//! |---|---|
//! | [`Layout`] | the shape of a packed weight, and where each code lies in the words |
//! | [`Levels`] | what number a code stands for |
//! | [`quant_matmul`] | `y = x · w`, differentiable in `x`, `scales` and `zeros` |
//! | [`Precision`] | how accurate that product is |
//! | [`dequantize`] | the dense `w` |
//! | [`silu_mul`], [`rms_norm`], [`rotate_half`] | gate, norm and positions of a LLaMA's block |
//! | [`causal_attention`] | attention without a matrix of scores, grouped queries, keys of a cache |
//! | [`linear_cross_entropy`] | the loss from hidden states, without the logits of all rows |
//! | [`encode`] | the codes nearest to a weight on a grid |
//! | [`group_ranges`], [`clip_search`] | what a grid is made from |
//! | [`round_with_feedback`] | codes whose errors are fed back into the weights to come: OPTQ's loop |
//!
//! The operations run on every backend through default bodies composed from burn's primitive
//! operations; native versions override them where this crate has them: all on the CPU backend
//! `flex`, the packed product on the devices of CubeCL (CUDA, ROCm, wgpu).
//! Backward unpacks the weight again: no dense copy of a weight outlives the product that needed it.
//! Nor do scores of attention and logits: they are computed again, or not needed.
//!
//! Enable a backend through the feature of its name on this crate or on one that forwards it.
//! The operations panic on a backend that burn has and this crate was not told of.
//!
//! ```
//! use burn::tensor::{DType, Device, Int, Tensor, TensorData};
//! use kernels::{Layout, Levels, Precision, pack, quant_matmul};
//!
//! let device = Device::flex();
//! let layout = Layout::new(4, 1, 4, 2, Levels::Unsigned);
//! let words = TensorData::new(pack(&[1, 2, 3, 4], &layout), layout.words_shape());
//! let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
//! let scales = Tensor::<2>::from_data([[1.0], [10.0]], &device);
//! let zeros = Tensor::<2>::from_data([[0.0], [3.0]], &device);
//! let x = Tensor::<2>::ones([1, 4], &device);
//! let y = quant_matmul(x, words, scales, Some(zeros), layout, Precision::Full);
//! assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [1.0 + 2.0 + 0.0 + 10.0]);
//! ```

#![allow(
    unsafe_code,
    reason = "the one crate of raw pointers and instruction sets"
)]

mod activation;
mod attention;
#[cfg(feature = "flex")]
mod dense;
mod encode;
#[cfg(all(feature = "flex", target_arch = "x86_64"))]
mod fixed;
#[cfg(feature = "flex")]
mod host;
mod isa;
mod layout;
mod loss;
mod low_rank;
#[cfg(feature = "flex")]
mod math;
#[cfg(feature = "flex")]
mod matrix;
mod memory;
mod norm;
mod pack;
mod quant_matmul;
mod rope;
mod shared;
#[cfg(all(test, feature = "flex"))]
mod testing;
mod threads;

pub use activation::silu_mul;
pub use attention::causal_attention;
pub use encode::{
    ClipLoss, Feedback, Influence, clip_search, encode, grid_of_range, group_ranges,
    round_with_feedback, with_values,
};
pub use layout::{Layout, Levels, TABLE, TILE};
pub use loss::linear_cross_entropy;
pub use low_rank::add_low_rank;
pub use norm::rms_norm;
pub use pack::{columns_to_tiles, pack, tiles_to_columns, unpack};
pub use quant_matmul::{Precision, dequantize, quant_matmul};
pub use rope::rotate_half;
pub use threads::among_threads;
