//! GGUF, the file format of llama.cpp: metadata, and tensors in blocks with their own scales.
//!
//! The layout is that of `gguf.md` in the repository `ggml-org/ggml`, versions 2 and 3, in little-endian
//! order. Dimensions are given as safetensors and PyTorch do, the contiguous one last; in the file it is
//! the first.

mod block_type;
mod blocks;
mod header;
mod k_quants;
mod metadata;
mod read;
mod write;

#[cfg(test)]
mod tests;

pub use block_type::BlockType;
pub use blocks::{Blocks, Offset};
pub use metadata::{Array, Value};
pub use read::GgufFile;
pub use write::{GgufTensor, write_gguf};

/// The alignment of tensors in a file that states none, in bytes.
const DEFAULT_ALIGNMENT: u64 = 32;

/// The key of the alignment.
const ALIGNMENT: &str = "general.alignment";

/// The first bytes of a file.
const MAGIC: [u8; 4] = *b"GGUF";
