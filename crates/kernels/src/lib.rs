//! Differentiable products with packed low-bit weights and the other operations of a transformer
//! block, for burn's backends flex, ndarray and CubeCL (CUDA, ROCm, wgpu, Vulkan, Metal).
//!
//! A packed weight is a tensor of integer codes in `u32` words with one scale and, optionally, one
//! zero for each group of inputs and each output:
//!
//! ```text
//! w[i, o] = scales[g, o] * (level(code[i, o]) - zeros[g, o]),   g = i / group_size
//! ```
//!
//! | item | purpose |
//! |---|---|
//! | [`Layout`] | the shape of a packed weight, and the position of each code in its words |
//! | [`Levels`] | the number that a code represents |
//! | [`pack`], [`unpack`] | codes to words and back |
//! | [`quant_matmul`] | `y = x · w`, differentiable in `x`, `scales` and `zeros` |
//! | [`Precision`] | the accuracy of that product |
//! | [`dequantize`] | the dense `w` |
//! | [`matmul`] | `y = x · w` with a dense weight of any dtype |
//! | [`silu_mul`], [`rms_norm`], [`rotate_half`] | SwiGLU, RMSNorm and rotary position embeddings |
//! | [`attention`] | attention for grouped queries and a KV cache, on the CPU without a matrix of scores |
//! | [`Mask`] | the keys that each query attends to: causal or all, of packed documents or of padded texts |
//! | [`Scores`] | the scale and the soft cap of its scores |
//! | [`linear_cross_entropy`] | the loss from hidden states, without the logits of all rows |
//! | [`OutputHead`] | the weight, the bias and the soft cap of its logits |
//! | [`softcap`] | `cap · tanh(x / cap)` |
//! | [`adamw`], [`AdamwStep`] | a step of AdamW, and its settings |
//! | [`group_ranges`], [`clip_search`] | the ranges of groups, from which grids are made |
//! | [`encode`] | the codes nearest to a weight on a grid |
//! | [`add_gram`] | `sum + xᵀ · x`, which OPTQ learns from |
//! | [`round_with_feedback`] | codes with feedback of their errors: the inner loop of OPTQ |
//!
//! The operations have default implementations in burn's primitive operations, which run on every
//! backend. Native implementations replace them, on the CPU backend `flex` and on the devices of CubeCL
//! (CUDA, ROCm, wgpu).
//!
//! Backward unpacks the weight again, so no dense weight outlives its product. Scores of attention and
//! logits are computed again too, or not needed.
//!
//! Operands have one dtype, which is that of the results: `F32`, `F16` or `BF16`, and on some devices
//! `F64`. Sums over many terms, norms, probabilities and losses are computed in `f32` at least. What may
//! be of another dtype than `x` is named in each operation: weights at rest, grids, and tables. Other
//! mixed dtypes are a panic.
//!
//! A backend is enabled by the feature of its name on this crate, or on a crate that forwards it. The
//! operations panic on a backend that burn has enabled and this crate has not.
//!
//! burn's fusion of operations on devices of CubeCL is off. Where another package enables it, as burn does
//! by default, enable the feature `fusion` too: with a backend of CubeCL, this crate does not compile without.
//!
//! # Examples
//! A weight is quantized to 4 bits and multiplied:
//! ```
//! use burn::tensor::{DType, Device, Int, Tensor, TensorData};
//! use kernels::{Layout, Levels, Precision, encode, grid_of_range, group_ranges, quant_matmul};
//!
//! let device = Device::flex();
//! let layout = Layout::new(64, 8, 4, 32, Levels::Unsigned);
//! let weight: Vec<f32> = (0..64 * 8).map(|i| (i as f32 * 0.7).sin()).collect();
//! let (low, high) = group_ranges(&weight, &layout);
//! let grids = low.iter().zip(&high).map(|(low, high)| grid_of_range(*low, *high, 15.0));
//! let (scales, zeros): (Vec<f32>, Vec<f32>) = grids.unzip();
//! let words = TensorData::new(encode(&weight, &scales, Some(&zeros), &layout), layout.words_shape());
//! let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
//!
//! let grid = |values| Tensor::<2>::from_data(TensorData::new(values, layout.grid_shape()), &device);
//! let x = Tensor::<2>::ones([1, 64], &device);
//! let y = quant_matmul(x.clone(), words, grid(scales), Some(grid(zeros)), layout, Precision::Full);
//!
//! // Each of 64 weights is rounded by at most half a step of 2 / 15.
//! let exact = x.matmul(Tensor::from_data(TensorData::new(weight, [64, 8]), &device));
//! assert!((y - exact).abs().max().into_scalar::<f32>() < 64.0 / 15.0);
//! ```

#![allow(
    unsafe_code,
    reason = "the only crate with raw pointers and instruction sets"
)]

mod activation;
mod adamw;
mod arithmetic;
#[cfg(feature = "flex")]
mod at_rest;
mod attention;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "flex")]
mod dense;
mod dtype;
mod encode;
#[cfg(all(feature = "flex", target_arch = "x86_64"))]
mod fixed;
mod gram;
#[cfg(feature = "flex")]
mod host;
mod isa;
mod layout;
mod loss;
mod low_rank;
#[cfg(feature = "flex")]
mod math;
mod matmul;
#[cfg(feature = "flex")]
mod matrix;
mod memory;
mod norm;
mod pack;
mod quant_matmul;
mod rope;
mod shared;
mod softcap;
#[cfg(all(test, feature = "flex"))]
mod testing;
mod threads;

pub use activation::silu_mul;
pub use adamw::{AdamwStep, adamw};
pub use arithmetic::{Arithmetic, UnsupportedArithmetic, arithmetic, set_arithmetic};
pub use attention::{Mask, Scores, attention};
pub use encode::{
    ClipLoss, Feedback, Influence, ZeroPoint, clip_search, encode, grid_of_range, group_ranges,
    round_with_feedback, with_values,
};
pub use gram::add_gram;
pub use layout::{Layout, Levels, TABLE, TILE};
pub use loss::{OutputHead, linear_cross_entropy};
pub use low_rank::add_low_rank;
pub use matmul::matmul;
pub use norm::rms_norm;
pub use pack::{columns_to_tiles, pack, tiles_to_columns, unpack};
pub use quant_matmul::{Precision, dequantize, quant_matmul};
pub use rope::rotate_half;
pub use softcap::softcap;
pub use threads::among_threads;
