//! The directories of a run, of which the result gets its name at the end.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use tensor_files::Partial;

use crate::Result;

const BASE: &str = "base";
const ADAPTER: &str = "adapter";
/// The directory in the notes of the adapters of each block.
const ADAPTERS: &str = "adapters";

/// The directories of a run.
pub(super) struct Place {
    partial: Partial,
    /// Whether the result is a base and its adapters, each in a directory of its own.
    has_adapters: bool,
}

impl Place {
    /// The place of a model, or of a base and its adapters.
    pub(super) fn open(out: impl AsRef<Path>, has_adapters: bool) -> Result<Self> {
        Ok(Self {
            partial: Partial::open(out)?,
            has_adapters,
        })
    }

    /// The directory of the journal.
    pub(super) fn notes(&self) -> &Path {
        self.partial.notes()
    }

    /// The directory of the model.
    pub(super) fn base(&self) -> PathBuf {
        let files = self.partial.files();
        if self.has_adapters {
            files.join(BASE)
        } else {
            files
        }
    }

    /// The directory of all adapters, if the result has some.
    pub(super) fn adapter(&self) -> Option<PathBuf> {
        self.has_adapters
            .then(|| self.partial.files().join(ADAPTER))
    }

    /// The directory with those of the adapters of each block.
    pub(super) fn adapters(&self) -> PathBuf {
        self.notes().join(ADAPTERS)
    }

    /// Whether nothing of a result is there.
    pub(super) fn is_empty(&self) -> Result<bool> {
        Ok(entries(&self.partial.files())?.is_empty())
    }

    /// Makes the directories, and removes what is in them but the files of the base and the directories of
    /// adapters of these names: what a process that was killed left of others.
    pub(super) fn keep(&self, files: &[&str], adapters: &[&str]) -> Result<()> {
        let base = self.base();
        if self.has_adapters {
            keep(&self.partial.files(), &[BASE])?;
        }
        for dir in [&base, &self.adapters()] {
            fs::create_dir_all(dir).map_err(|cause| io(dir, cause))?;
        }
        keep(&base, files)?;
        keep(&self.adapters(), adapters)
    }

    /// The directory that becomes the result.
    pub(super) fn files(&self) -> PathBuf {
        self.partial.files()
    }

    /// See [`Partial::require`].
    pub(super) fn require(&self, n_bytes: u64) -> Result<()> {
        Ok(self.partial.require(n_bytes)?)
    }

    /// See [`Partial::remove`].
    pub(super) fn remove(self) -> Result<()> {
        Ok(self.partial.remove()?)
    }

    /// See [`Partial::publish`].
    pub(super) fn publish(self) -> Result<()> {
        Ok(self.partial.publish()?)
    }
}

/// Removes the entries of a directory that have other names.
fn keep(dir: &Path, names: &[&str]) -> Result<()> {
    for path in entries(dir)? {
        let name = path.file_name().and_then(OsStr::to_str);
        if name.is_some_and(|name| names.contains(&name)) {
            continue;
        }
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.map_err(|cause| io(&path, cause))?;
    }
    Ok(())
}

/// The paths in a directory.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(|cause| io(dir, cause))?;
    let paths = entries.map(|entry| Ok(entry.map_err(|cause| io(dir, cause))?.path()));
    paths.collect()
}

fn io(path: &Path, cause: std::io::Error) -> tensor_files::Error {
    let path = path.into();
    tensor_files::Error::Io { path, cause }
}
