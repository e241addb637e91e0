//! ApiQ (Liao et al. 2024, arXiv:2402.05147): ranges and adapters learned together, so that a layer or
//! a block, on the inputs that reach it through packed layers, gives the output that the dense one gives
//! on its own inputs.
//!
//! The range of each group is multiplied by `sigmoid(u) / sigmoid(4)` on its upper and
//! `sigmoid(v) / sigmoid(4)` on its lower side. Both are learned, from 4, which is the range of the
//! quantizer, and gradients pass through rounding unchanged. Codes are the nearest ones, whatever the
//! quantizer's were.
//!
//! The layer-wise form needs no inputs but their second moments: with `E = Ŵ - W`, `H = Σ x xᵀ` and the
//! drift `D = Σ (x' - x) xᵀ` of the dense model's inputs `x'`, the squared error `Σ ‖x Ŵ - x' W‖²` is
//! `tr Eᵀ (H E - 2 Dᵀ W)` and a constant. Its steps see all of the calibration at once, and are the same in
//! any order of the tokens.

mod block_wise;
mod layer_wise;
mod learned;
mod learning;

pub use block_wise::ApiqBlock;
pub use layer_wise::Apiq;
