//! The directories that are written over several runs of a program.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{io, refuse};
use crate::output::{check_free, named, require};
use crate::staging::Staging;
use crate::{Error, Result, is_there};

const SUFFIX: &str = ".partial";
const FILES: &str = "files";
/// The file by which a directory is known as one of this program.
const MARK: &str = "PARTIAL";
const MARKED: &[u8] = b"Parts of a directory that is not complete. Remove them to begin again.\n";

/// A directory that is written file by file, over several runs of a program if need be, and gets its name
/// when it is complete.
///
/// It is written in `NAME.partial/files`, and the program may keep its own notes beside that, in
/// `NAME.partial`. What is written stays there when this is dropped or the process is killed, and is what
/// the next [`open`](Partial::open) finds. A process that has it open holds a lock on it; where a file
/// system has no locks, two processes are not kept apart.
///
/// # Examples
///
/// ```
/// use tensor_files::{Error, Partial};
///
/// let parent = tempfile::tempdir().expect("a temporary directory");
/// let dir = parent.path().join("model");
/// let partial = Partial::open(&dir)?;
/// tensor_files::write(&partial.files().join("first"), b"1")?;
/// assert!(matches!(Partial::open(&dir), Err(Error::OutputBusy { .. })));
/// drop(partial);
///
/// let partial = Partial::open(&dir)?;
/// assert!(partial.files().join("first").exists() && !dir.exists());
/// partial.publish()?;
/// assert!(dir.join("first").exists());
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Partial {
    dir: PathBuf,
    /// `NAME.partial`, which is kept.
    staging: Staging,
    is_done: bool,
}

impl Partial {
    /// Opens what was written of `dir` so far, or makes a place for it.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if `dir` is there and is not an empty directory, [`Error::OutputBusy`] if it
    /// is open already, here or in another process, [`Error::File`] if it is a mount point, or if
    /// `NAME.partial` is somebody else's directory, [`Error::Io`] if nothing can be written beside it.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        check_free(dir)?;
        let (dir, mut place) = named(dir)?;
        place.push(SUFFIX);
        let partial = Self {
            staging: Staging::kept(&dir, &place)?,
            dir,
            is_done: false,
        };
        // Another process may have completed it before the place was this one's.
        check_free(&partial.dir)?;
        partial.check_ours()?;
        let files = partial.files();
        fs::create_dir_all(&files).map_err(|cause| io(&files, cause))?;
        crate::write(&partial.notes().join(MARK), MARKED)?;
        Ok(partial)
    }

    /// The directory for the notes on `dir`, of a process that has it open: to read them.
    ///
    /// # Errors
    /// [`Error::File`] if `dir` has no name of its own.
    pub fn notes_of(dir: impl AsRef<Path>) -> Result<PathBuf> {
        let (dir, mut place) = named(dir.as_ref())?;
        place.push(SUFFIX);
        Ok(dir.with_file_name(place))
    }

    /// Refuses a directory that has something in it and that this program did not make.
    fn check_ours(&self) -> Result<()> {
        let path = self.notes();
        let mut entries = fs::read_dir(path).map_err(|cause| io(path, cause))?;
        if entries.next().is_none() || is_there(&path.join(MARK)) {
            return Ok(());
        }
        let problem = "is in the place of the parts of an output; remove it, or choose another name for the output";
        Err(refuse(path, problem.into()))
    }

    /// The directory that it becomes.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory for notes on the work, which is removed when it is complete.
    pub fn notes(&self) -> &Path {
        &self.staging.path
    }

    /// The directory for the files.
    pub fn files(&self) -> PathBuf {
        self.staging.path.join(FILES)
    }

    /// Checks that the file system has room for so many bytes more, where the system tells.
    ///
    /// # Errors
    /// [`Error::NoRoom`].
    pub fn require(&self, n_bytes: u64) -> Result<()> {
        require(self.notes(), &self.dir, n_bytes)
    }

    /// Removes all that was written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(mut self) -> Result<()> {
        self.is_done = true;
        let path = self.notes();
        fs::remove_dir_all(path).map_err(|cause| io(path, cause))
    }

    /// Flushes the files to the disk, gives them the name of the directory, and removes the notes.
    ///
    /// # Errors
    /// [`Error::OutputExists`] or [`Error::Io`]: the directory is not there then, and all is as it was.
    /// [`Error::NotFlushed`] with the path of the directory: it is there, and complete.
    pub fn publish(mut self) -> Result<()> {
        let flushed = self.staging.publish_from(&self.files(), &self.dir);
        if !matches!(flushed, Ok(()) | Err(Error::NotFlushed { .. })) {
            return flushed;
        }
        self.is_done = true;
        // The directory is complete: what is left of the notes is in nobody's way.
        let _ = fs::remove_dir_all(self.notes());
        flushed
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.is_done {
            // The place may be another process's by now.
            return;
        }
        // Where nothing was written, nothing is left: only an empty directory can be removed so.
        if fs::remove_dir(self.files()).is_ok() {
            let _ = fs::remove_file(self.notes().join(MARK));
            let _ = fs::remove_dir(self.notes());
        }
    }
}
