//! Safetensors and GGUF files, JSON files and directories, read with checks.
//!
//! Directories and JSON files are written atomically.
//!
//! | item | use |
//! |---|---|
//! | [`TensorFile`] | reads a safetensors file tensor by tensor |
//! | [`write_tensors`], [`LazyTensor`] | write one, with one tensor in memory at a time |
//! | [`gguf`] | reads and writes the files of llama.cpp |
//! | [`read`], [`read_config`], [`read_json`], [`write()`], [`write_json`] | read and write small files |
//! | [`write_sums`], [`check_sums`], [`sha256`] | list the SHA-256 of a directory's files, and check them |
//! | [`Output`] | reserves a directory, which is then complete under its name, or does not exist |
//! | [`write_directory`] | reserves and writes it at once |
//! | [`Partial`] | a directory that is written over several runs, and then gets its name |
//! | [`Series`] | numbered directories that are written one after the other |
//!
//! # Examples
//!
//! ```
//! use tensor_files::{LazyTensor, TensorFile, write_directory, write_tensors};
//!
//! let parent = tempfile::tempdir().expect("a temporary directory");
//! let dir = parent.path().join("model");
//! write_directory(&dir, |dir| {
//!     let weight = LazyTensor::floats([2, 2], || vec![0.5, -1.0, 2.0, 0.25]);
//!     write_tensors(&dir.join("model.safetensors"), [("weight".into(), weight)])
//! })?;
//! let mut file = TensorFile::open(&dir.join("model.safetensors"))?;
//! let (values, shape) = file.floats::<2>("weight")?;
//! assert_eq!((values[1], shape), (-1.0, [2, 2]));
//! assert!(file.floats::<2>("bias").is_err());
//! // Nothing is overwritten.
//! assert!(write_directory(&dir, |_| Ok::<(), tensor_files::Error>(())).is_err());
//! # Ok::<(), tensor_files::Error>(())
//! ```

#![forbid(unsafe_code)]

mod directory;
mod document;
mod error;
mod file;
pub mod gguf;
mod output;
mod partial;
mod series;
mod staging;
mod sums;
mod write;

pub use document::{is_there, read, read_config, read_json, write, write_json};
pub use error::{Error, Result};
pub use file::{Floats, TensorFile};
pub use output::{Canceler, IntoOutput, Output, write_directory};
pub use partial::Partial;
pub use series::Series;
pub use sums::{SUMS, check_sums, digest, sha256, write_sums};
pub use write::{FloatType, LazyTensor, write_tensors};
