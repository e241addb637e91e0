//! Initializations of adapters, and of packed weights, that compensate for the quantization error.
//!
//! A low-rank adapter usually starts at zero, so that the quantized model starts with all of its
//! rounding error. The methods of this crate choose the packed weight `Q` and the factors `A`, `B`
//! together, so that `Q + σ A B` is near the dense weight `W` from the first step on, or the output of the
//! layer near that of the dense one.
//!
//! | type | minimizes | how | source |
//! |---|---|---|---|
//! | [`peft::Lora`] | the error of `Q` alone | `B = 0`: QLoRA | arXiv:2305.14314 |
//! | [`Loftq`] | `‖W - Q - σ A B‖` | quantizing and factoring in turn | arXiv:2310.08659 |
//! | [`Pissa`] | the same | the largest singular values first | arXiv:2404.02948 |
//! | [`LqLora`] | the same, or weighted by the [`Fisher`](peft::Fisher) information | in turn, the low rank first | arXiv:2311.12023 |
//! | [`Qera`] | `‖X (W - Q - σ A B)‖` | in closed form, from the Gram; CLoQ with [`quant_core::Optq`] | arXiv:2410.06040 |
//! | [`Apiq`] | `‖X' W - X (Q + σ A B)‖` | gradients, ranges of the grid too | arXiv:2402.05147 |
//! | [`ApiqBlock`] | the error of a block's output | the same | arXiv:2402.05147 |
//! | [`BlockAp`] | the error of a block's output, without an adapter | gradients of weights and grids through the rounding: EfficientQAT, with [`peft::Peqa`] on top | arXiv:2407.11062 |
//! | [`Rilq`] | the error of the last hidden state, and the loss | gradients of all adapters together | arXiv:2412.01129 |
//!
//! [`init`] runs each of them over a model, with any quantizer of [`quant_core`], or another for each
//! layer ([`peft::Recipe`]). Some published code leaves out `σ = α / r`, so that a model starts at
//! `Q + σ² A B` of its own factors; here the product that is added is the one that was chosen, for any `α`
//! ([`Lora::init_at`](peft::Lora::init_at)).
//!
//! Methods that look at a layer or a block, which are all but [`Rilq`] and those with the Fisher information,
//! run on one block in memory at a time, too: an [`Initializer`] from files to files.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use loftq::{Layer, LayerMethod, Loftq};
//! use peft::Lora;
//! use quant_core::NormalFloat;
//!
//! // One weight; `init` does it for all of a model.
//! let normal = Distribution::Normal(0.0, 0.02);
//! let weight = Tensor::<2>::random([256, 128], normal, &Device::flex());
//! let layer = Layer {
//!     path: "proj",
//!     weight,
//!     gram: None,
//!     fisher: None,
//! };
//! let quantizer = NormalFloat::new();
//! let qlora = Lora::new(16).start(&layer, &quantizer)?;
//! let loftq = Loftq::new(16).start(&layer, &quantizer)?;
//! assert!(loftq.error < 0.8 * qlora.error);
//! # Ok::<(), loftq::Error>(())
//! ```

#![forbid(unsafe_code)]

mod apiq;
mod block_ap;
mod blocks;
mod error;
mod factoring;
mod fake_quant;
mod init;
mod layer;
mod loftq;
mod lq_lora;
mod method;
pub mod presets;
mod qera;
mod rilq;
mod svd;

pub use apiq::{Apiq, ApiqBlock};
pub use block_ap::BlockAp;
pub use error::{Error, Result};
pub use init::{Initialization, Initializer, init, sensitivities};
pub use layer::{Layer, Start};
pub use loftq::Loftq;
pub use lq_lora::{LqLora, Pissa};
pub use method::LayerMethod;
pub use peft::InitializedLayer;
pub use qera::Qera;
pub use rilq::Rilq;
pub use svd::{LowRank, Truncation};
