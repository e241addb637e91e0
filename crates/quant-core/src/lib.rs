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
//! | type | what it is |
//! |---|---|
//! | [`Format`] | bits, group size and [`Grid`]: all that describes a packed weight but its numbers |
//! | [`QuantTensor`] | a packed weight; its [`matmul`](QuantTensor::matmul) is differentiable |
//! | [`Quantizer`] | what turns a dense weight into a [`QuantTensor`] |
//! | [`Rtn`] | the quantizer that rounds to the nearest code |
//! | [`Distortion`] | what a quantizer cost |
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use quant_core::{Quantizer, Rtn};
//!
//! let device = Device::flex();
//! let weight = Tensor::<2>::random([256, 64], Distribution::Normal(0.0, 0.02), &device);
//! let errors: Vec<f64> = [8, 4, 3, 2]
//!     .into_iter()
//!     .map(|bits| {
//!         let packed = Rtn::new().with_bits(bits).with_group_size(64).quantize(weight.clone())?;
//!         Ok(packed.distortion(weight.clone()).relative)
//!     })
//!     .collect::<quant_core::Result<_>>()?;
//! assert!(errors.is_sorted());
//! # Ok::<(), quant_core::Error>(())
//! ```

#![forbid(unsafe_code)]

mod distortion;
mod error;
mod format;
mod grid;
mod quant_tensor;
mod quantizer;
mod rtn;

pub use distortion::Distortion;
pub use error::{Error, Result};
pub use format::{Format, Grid};
pub use kernels::Layout;
pub use quant_tensor::{Parts, QuantTensor};
pub use quantizer::Quantizer;
pub use rtn::Rtn;
