//! Directories that are written one after the other, each under its number.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::io;
use crate::output::{named, write_directory};
use crate::staging::{Staging, staging_name};
use crate::{Error, Result, is_there};

/// A directory of numbered directories, such as the checkpoints of a training.
///
/// Each of them is called by a prefix and its number, and is written whole or not at all. One process at
/// a time has the series open: it holds a lock on the directory, of which the system knows whether it is
/// alive. Where a file system has no locks, two processes are not kept apart.
///
/// # Examples
///
/// ```
/// use tensor_files::{Error, Series};
///
/// let parent = tempfile::tempdir().expect("a temporary directory");
/// let series = Series::open(parent.path().join("checkpoints"), "step-")?;
/// for number in [5, 10] {
///     series.write(number, |dir| tensor_files::write(&dir.join("state"), b"1"))?;
/// }
/// assert_eq!(series.numbers()?, [5, 10]);
/// assert!(series.path(10).ends_with("checkpoints/step-10"));
/// let again = Series::open(parent.path().join("checkpoints"), "step-");
/// assert!(matches!(again, Err(Error::OutputBusy { .. })));
/// series.remove(5)?;
/// assert_eq!(series.numbers()?, [10]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Series {
    prefix: String,
    /// The directory itself, which is kept.
    staging: Staging,
}

impl Series {
    /// Opens the directory, or makes it and those above it, and removes what a process that was killed
    /// left half-written or half-removed.
    ///
    /// # Errors
    /// [`Error::OutputBusy`] if it is open already, here or in another process, [`Error::File`] if it is
    /// no directory, [`Error::Io`] if it cannot be made or read.
    pub fn open(dir: impl AsRef<Path>, prefix: impl Into<String>) -> Result<Self> {
        let dir = dir.as_ref();
        // A link to a directory elsewhere is followed.
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.into());
        let (dir, name) = named(&dir)?;
        let series = Self {
            prefix: prefix.into(),
            staging: Staging::kept(&dir, &name)?,
        };
        for number in series.entries(|name| series.number_of_hidden(name))? {
            // What cannot be removed is hidden, and in nobody's way.
            let _ = fs::remove_dir_all(series.hidden(number));
        }
        Ok(series)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.staging.path
    }

    /// The directory of a number.
    pub fn path(&self, number: u64) -> PathBuf {
        self.dir().join(format!("{}{number}", self.prefix))
    }

    /// The numbers of the directories that are there, in ascending order.
    ///
    /// # Errors
    /// [`Error::Io`] if the directory cannot be read.
    pub fn numbers(&self) -> Result<Vec<u64>> {
        let number = |name: &str| name.strip_prefix(&self.prefix)?.parse().ok();
        let mut numbers = self.entries(|name| {
            let number = number(name)?;
            // Of several spellings of a number, one.
            (self.path(number).file_name()?.to_str()? == name).then_some(number)
        })?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Gives the directory of a number the files that `write` writes into the one that it is called with,
    /// whole or not at all. One that is there already, a damaged one, is removed before.
    ///
    /// # Errors
    /// As [`Output::write`](crate::Output::write).
    pub fn write<E: From<Error>>(
        &self,
        number: u64,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let path = self.path(number);
        if is_there(&path) {
            self.remove(number)?;
        }
        write_directory(&path, write)?;
        Ok(path)
    }

    /// Removes the directory of a number. A process that is killed meanwhile leaves it whole, or not under
    /// its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, number: u64) -> Result<()> {
        let (path, hidden) = (self.path(number), self.hidden(number));
        let failed = |cause| io(&path, cause);
        if is_there(&hidden) {
            fs::remove_dir_all(&hidden).map_err(failed)?;
        }
        fs::rename(&path, &hidden).map_err(failed)?;
        fs::remove_dir_all(&hidden).map_err(failed)
    }

    /// The hidden name of the directory of a number.
    fn hidden(&self, number: u64) -> PathBuf {
        let name = format!("{}{number}", self.prefix);
        self.dir().join(staging_name(name.as_ref()))
    }

    /// The number of a hidden name.
    fn number_of_hidden(&self, name: &str) -> Option<u64> {
        let rest = name.strip_prefix('.')?.strip_prefix(&self.prefix)?;
        let number = rest.split('.').next()?.parse().ok()?;
        (self.hidden(number).file_name()?.to_str()? == name).then_some(number)
    }

    /// What `find` finds in the names in the directory.
    fn entries<T>(&self, find: impl Fn(&str) -> Option<T>) -> Result<Vec<T>> {
        let dir = self.dir();
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).map_err(|cause| io(dir, cause))? {
            let name = entry.map_err(|cause| io(dir, cause))?.file_name();
            found.extend(name.to_str().and_then(&find));
        }
        Ok(found)
    }
}

impl Drop for Series {
    fn drop(&mut self) {
        // Where nothing was written, nothing is left: only an empty directory can be removed so.
        let _ = fs::remove_dir(self.dir());
    }
}
