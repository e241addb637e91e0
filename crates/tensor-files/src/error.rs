use std::path::{Path, PathBuf};

use crate::staging::published;

/// An error about a file or a directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a directory that could not be read or written.
    #[error("`{path}`: {cause}")]
    Io {
        /// The file or the directory.
        path: PathBuf,
        /// The error of the operating system. It is a part of the message, and no
        /// [`source`](std::error::Error::source).
        cause: std::io::Error,
    },
    /// A file whose content is not of the expected form.
    #[error("`{path}`: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// The problem, and the remedy.
        problem: String,
    },
    /// A tensor that a file does not have.
    #[error("`{path}` has no tensor `{tensor}`")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of another type, shape or content than expected.
    #[error("tensor `{tensor}` in `{path}`: {problem}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The problem.
        problem: String,
    },
    /// An output directory that is not empty.
    #[error("`{path}` exists and is not an empty directory; choose another name or remove it")]
    OutputExists {
        /// The directory.
        path: PathBuf,
    },
    /// An output directory that is reserved by another [`Output`](crate::Output), of this process or of
    /// another.
    #[error("another process is writing `{path}`; choose another name, or wait until it ends")]
    OutputBusy {
        /// The directory.
        path: PathBuf,
    },
    /// An output that is larger than the free space of its file system.
    #[error(
        "`{path}` takes {needed} bytes, and {free} are free on its file system; make room, or choose another place"
    )]
    NoRoom {
        /// The directory.
        path: PathBuf,
        /// The bytes that the output takes.
        needed: u64,
        /// The bytes that are free.
        free: u64,
    },
    /// An output that was canceled before it was written.
    #[error("`{path}` was canceled; it is not written")]
    Canceled {
        /// The directory.
        path: PathBuf,
    },
    /// A file or a directory that is complete under its name, but may be lost if the power fails.
    #[error(
        "`{path}` is written and complete, but the disk may not have its name yet: {cause}; run `sync`"
    )]
    NotFlushed {
        /// The file or the directory.
        path: PathBuf,
        /// The error of the operating system.
        cause: std::io::Error,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error about the content of a file.
pub(crate) fn refuse(path: &Path, problem: String) -> Error {
    Error::File {
        path: published(path),
        problem,
    }
}

/// An error of the operating system.
pub(crate) fn io(path: &Path, cause: std::io::Error) -> Error {
    Error::Io {
        path: published(path),
        cause,
    }
}
