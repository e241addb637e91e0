//! The directories that are written whole or not at all.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::{io, refuse};
use crate::staging::Staging;
use crate::{Error, Result};

/// A directory that is reserved until it is written.
///
/// A long computation reserves the place of its result first: what keeps it from being written there
/// is known before the work begins, and no other process can take the place. The result is written
/// into a hidden directory beside it, `.NAME.tensor-files.tmp`, flushed to the disk, and given its name.
///
/// Dropped without being written, the reservation leaves nothing behind. A process that is killed
/// leaves the hidden directory, which nothing reads, and the next reservation of the same place
/// removes it: the process that writes it holds a lock on it, of which the system knows whether it is
/// alive. Where a file system has no locks, such a directory has to be removed by hand.
///
/// A relative path is one from the working directory, which must not change before it is written.
///
/// # Examples
///
/// ```
/// use tensor_files::{Error, Output};
///
/// let parent = tempfile::tempdir().expect("a temporary directory");
/// let dir = parent.path().join("model");
/// let output = Output::reserve(&dir)?;
/// output.require(1 << 10)?;
/// assert!(matches!(Output::reserve(&dir), Err(Error::OutputBusy { .. })));
///
/// output.write(|dir| tensor_files::write(&dir.join("config.json"), b"{}"))?;
/// assert!(dir.join("config.json").exists());
/// assert!(matches!(Output::reserve(&dir), Err(Error::OutputExists { .. })));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Output {
    dir: PathBuf,
    /// None once it is canceled.
    staging: Arc<Mutex<Option<Staging>>>,
}

impl Output {
    /// Reserves `dir`, and makes the directories above it that are missing.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if `dir` is there and is not an empty directory, [`Error::OutputBusy`] if
    /// another reservation of it lives, [`Error::File`] if it is a mount point, [`Error::Io`] if nothing
    /// can be written beside it.
    pub fn reserve(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        check_free(dir)?;
        let (dir, name) = named(dir)?;
        let staging = Staging::new(&dir, &name)?;
        // Another process may have written it before the staging directory was this one's.
        check_free(&dir)?;
        Ok(Self {
            staging: Arc::new(Mutex::new(Some(staging))),
            dir,
        })
    }

    /// The reserved directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Checks that the file system has room for so many bytes, where the system tells.
    ///
    /// # Errors
    /// [`Error::NoRoom`].
    pub fn require(&self, n_bytes: u64) -> Result<()> {
        match locked(&self.staging).as_ref() {
            Some(staging) => require(&staging.path, &self.dir, n_bytes),
            None => Ok(()),
        }
    }

    /// Gives the directory the files that `write` writes into the one that it is called with.
    ///
    /// # Errors
    /// [`Error::OutputExists`] or [`Error::Io`] if it cannot be written, [`Error::Canceled`], or what
    /// `write` returns: nothing is there then. [`Error::NotFlushed`] with the path of this directory: it is
    /// there, and complete.
    pub fn write<E: From<Error>>(
        self,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        // Locked until the end: it cannot be canceled any more.
        let mut staging = locked(&self.staging);
        let Some(staging) = staging.take() else {
            let path = self.dir.clone();
            return Err(Error::Canceled { path }.into());
        };
        write(&staging.path)?;
        Ok(staging.publish(&self.dir)?)
    }

    /// A handle that cancels the reservation from another thread, such as one that waits for signals.
    pub fn canceler(&self) -> Canceler {
        Canceler(Arc::downgrade(&self.staging))
    }
}

/// Cancels the reservation of an [`Output`].
#[derive(Clone, Debug)]
pub struct Canceler(Weak<Mutex<Option<Staging>>>);

impl Canceler {
    /// Removes the hidden directory of the output; one that is being written is waited for, and stays.
    ///
    /// It must not be called by the closure that writes the output, which would wait for itself.
    pub fn cancel(&self) {
        if let Some(staging) = self.0.upgrade() {
            drop(locked(&staging).take());
        }
    }
}

/// A staging directory; that of a thread that panicked is none the worse.
fn locked(staging: &Mutex<Option<Staging>>) -> MutexGuard<'_, Option<Staging>> {
    staging.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of a new directory: a path, which is then reserved, or an [`Output`].
pub trait IntoOutput {
    /// Returns the reservation.
    ///
    /// # Errors
    /// As [`Output::reserve`].
    fn into_output(self) -> Result<Output>;
}

impl<P: AsRef<Path>> IntoOutput for P {
    fn into_output(self) -> Result<Output> {
        Output::reserve(self)
    }
}

impl IntoOutput for Output {
    fn into_output(self) -> Result<Output> {
        Ok(self)
    }
}

/// Makes a directory with the files that `write` writes, whole or not at all.
///
/// # Errors
/// As [`Output::reserve`] for a path, and as [`Output::write`].
pub fn write_directory<E: From<Error>>(
    dir: impl IntoOutput,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    dir.into_output()?.write(write)
}

/// A directory and its name, which `.` too has.
pub(crate) fn named(dir: &Path) -> Result<(PathBuf, OsString)> {
    let absolute = match dir.file_name() {
        Some(_) => dir.to_path_buf(),
        None => std::path::absolute(dir).map_err(|cause| io(dir, cause))?,
    };
    match absolute.file_name().map(OsString::from) {
        Some(name) => Ok((absolute, name)),
        None => {
            let problem = "is another name of a directory; give its own";
            Err(refuse(dir, problem.into()))
        }
    }
}

/// Checks that a directory does not exist, or is empty and can be replaced.
pub(crate) fn check_free(dir: &Path) -> Result<()> {
    let exists = || Error::OutputExists { path: dir.into() };
    // A link is not followed: it would be what is replaced.
    match fs::symlink_metadata(dir) {
        Ok(found) if !found.is_dir() => return Err(exists()),
        Ok(found) if is_mount_point(dir, &found) => {
            let problem =
                "is a mount point, which cannot be replaced; choose a new directory in it";
            return Err(refuse(dir, problem.into()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(io(dir, cause)),
    }
    let mut entries = fs::read_dir(dir).map_err(|cause| io(dir, cause))?;
    entries.next().map_or(Ok(()), |_| Err(exists()))
}

/// Whether a directory is on another file system than the one that it is in.
#[cfg(unix)]
fn is_mount_point(dir: &Path, found: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;

    let above = fs::metadata(dir.join(".."));
    above.is_ok_and(|above| above.dev() != found.dev())
}

#[cfg(not(unix))]
fn is_mount_point(_: &Path, _: &fs::Metadata) -> bool {
    false
}

/// Checks that there is room for so many bytes where `place` is, in which `dir` is written.
pub(crate) fn require(place: &Path, dir: &Path, n_bytes: u64) -> Result<()> {
    match free(place) {
        Some(free) if free < n_bytes => Err(Error::NoRoom {
            path: dir.into(),
            needed: n_bytes,
            free,
        }),
        _ => Ok(()),
    }
}

/// The bytes that this process may still write where `path` is; `None` if they are not known.
#[cfg(unix)]
fn free(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    // A file system without blocks does not count them.
    let counts = found.f_blocks > 0;
    counts.then(|| found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}
