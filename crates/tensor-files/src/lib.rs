//! Safetensors files, JSON files and directories, read with checks and written atomically.
//!
//! | item | what it does |
//! |---|---|
//! | [`TensorFile`] | reads a safetensors file tensor by tensor |
//! | [`LazyTensor`], [`write_tensors`] | write one, with one tensor in memory at a time |
//! | [`read`], [`read_json`], [`write_json`] | the same for small files |
//! | [`write_directory`] | makes a directory that is complete under its name, or not there |

#![forbid(unsafe_code)]

mod directory;
mod document;
mod error;
mod file;
mod write;

pub use directory::{check_output, write_directory};
pub use document::{check_version, is_there, read, read_json, write_json};
pub use error::{Error, Result};
pub use file::TensorFile;
pub use write::{FloatType, LazyTensor, write_tensors};
