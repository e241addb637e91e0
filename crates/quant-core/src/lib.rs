//! Low-bit number grids, packed tensors and weight quantizers.
//!
//! A weight is `[d_in, d_out]`, as in `burn::nn::Linear`. Its groups run along `d_in`: the
//! `group_size` inputs of a group share, for each output, one scale and one zero-point.
//!
//! | symbol | identifier | shape |
//! |---|---|---|
//! | `W` | `weight` | `[d_in, d_out]` |
//! | `q` | `codes` | `[d_in, d_out]`, packed into `u32` words |
//! | `s` | `scales` | `[n_groups, d_out]` |
//! | `z` | `zeros`, the zero-points | `[n_groups, d_out]`, in units of a code |
//!
//! | item | purpose |
//! |---|---|
//! | [`Format`] | the bits, group size and [`Grid`] of a packed weight |
//! | [`QuantTensor`] | a packed weight; its [`matmul`](QuantTensor::matmul) is differentiable |
//! | [`Quantizer`] | turns a dense weight into a [`QuantTensor`] |
//! | [`Rtn`] | rounds to the nearest code of a uniform grid |
//! | [`NormalFloat`] | rounds to the nearest level of a codebook: NF2, NF3, NF4, FP4 |
//! | [`Optq`] | rounds input by input and compensates the errors, using the [`Gram`] matrix of the inputs |
//! | [`StoredGrid`] | the scales and zeros that a file format holds |
//! | [`Distortion`] | measures the error of a quantized weight |
//! | [`allocate`] | chooses a format for each layer under a budget of bytes |
//!
//! # Examples
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use quant_core::{Quantizer, Rtn};
//!
//! let device = Device::flex();
//! let weight = Tensor::<2>::random([256, 64], Distribution::Normal(0.0, 0.02), &device);
//! let errors: Vec<f64> = [8, 4, 3, 2]
//!     .into_iter()
//!     .map(|bits| {
//!         let packed = Rtn::new().with_bits(bits).with_group_size(64).quantize(weight.clone(), None)?;
//!         Ok(packed.weight.distortion(weight.clone()).relative)
//!     })
//!     .collect::<quant_core::Result<_>>()?;
//! assert!(errors.is_sorted());
//! # Ok::<(), quant_core::Error>(())
//! ```

#![forbid(unsafe_code)]

mod allocate;
mod block_codes;
mod codebook;
mod distortion;
mod double_quant;
mod error;
mod format;
mod gram;
mod grid;
mod linalg;
mod normal_float;
mod optq;
mod quant_tensor;
mod quantizer;
mod rtn;
mod stored_grid;
mod uniform;
mod values;

pub use allocate::{Allocation, AllocationError, Candidate, UniformChoice, allocate};
pub use block_codes::{BlockCodes, DynamicMap};
pub use distortion::{Distortion, sum_of_squares};
pub use double_quant::{DoubleQuant, DoubleScaleParams, DoubleScales, ScaleLevels, scale_levels};
pub use error::{Error, Result};
pub use format::Format;
pub use gram::Gram;
pub use grid::Grid;
pub use kernels::{
    Arithmetic, Layout, Precision, UnsupportedArithmetic, arithmetic, set_arithmetic,
};
pub use linalg::{full_svd, symmetric_eigen};
pub use normal_float::NormalFloat;
pub use optq::{Optq, Order};
pub use quant_tensor::{Parts, QuantTensor, Scales};
pub use quantizer::{Needs, Note, Quantized, Quantizer};
pub use rtn::Rtn;
pub use stored_grid::StoredGrid;
pub use uniform::GroupRange;
pub use values::check_finite;
