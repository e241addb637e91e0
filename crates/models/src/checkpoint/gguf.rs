//! GGUF files, the format of llama.cpp, of the architectures `llama` (LLaMA, Mistral) and `qwen2`.
//!
//! A file by itself has everything: shape, tokenizer and chat template are in its metadata. The directory
//! that is saved has `model.gguf` in the place of `model.safetensors`, with the other files of a model
//! beside it, which hold what metadata do not: the format of each layer, and the tokenizer as it was.
//!
//! | blocks | packed weight | |
//! |---|---|---|
//! | Q4_1 | affine, 2 to 4 bits, `s = d`, `z = -m / d` | one block for each 32 inputs of a group |
//! | Q5_1 | affine, 8 bits of which 5 are used | |
//! | Q4_0, Q5_0, Q8_0 | symmetric, `s = d` | 2 to 4 bits, 8 of which 5 are used, 8 |
//!
//! Symmetric weights are the values of the file, bit for bit. Of an affine one, `(q - z) s` and `d q + m`
//! are the same number up to the rounding of `f32`, 2⁻²² of the largest magnitude in a block; `d` and `m`
//! are those of the file, and are written again bit for bit. Where `d` is 0, a block is one value `m`, whose
//! codes become 0 with `s = |m|` and `z = -1` or 1. Other types of blocks become dense weights.

mod adapters;
mod blocks;
mod layers;
mod load;
mod names;
mod save;
mod shape;
mod source;
mod vocabulary;

pub use adapters::save_gguf_adapters;
pub(super) use layers::{reason_against_values, refusals};
pub(super) use load::{file, load};
pub(super) use save::save;
pub use save::{GgufLayer, GgufReport, GgufType, save_gguf};

/// The file of a saved directory.
const FILE: &str = "model.gguf";
