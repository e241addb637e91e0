use std::path::{Path, PathBuf};

/// An error about a file or a directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that could not be read or written.
    #[error("`{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
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
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error about the content of a file.
pub(crate) fn refuse(path: &Path, problem: String) -> Error {
    Error::File {
        path: path.into(),
        problem,
    }
}

/// An error of the operating system.
pub(crate) fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        path: path.into(),
        source,
    }
}
