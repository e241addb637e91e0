//! The hidden place beside an output in which it is written before it gets its name.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use crate::directory::{parent, sync, sync_directory};
use crate::error::io as io_error;
use crate::{Error, Result};

/// How often a hidden place is tried for that other processes make and remove at the same time.
const ATTEMPTS: usize = 64;

const SUFFIX: &str = ".tensor-files.tmp";

/// The hidden name of a file or directory that is being written.
pub(crate) fn staging_name(name: &OsStr) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(SUFFIX);
    hidden
}

/// A path as the caller asked for it, who knows nothing of hidden names.
pub(crate) fn published(path: &Path) -> PathBuf {
    let hidden = |part: &Component| {
        let name = part.as_os_str().to_str()?;
        Some(OsString::from(
            name.strip_prefix('.')?.strip_suffix(SUFFIX)?,
        ))
    };
    if path.components().all(|part| hidden(&part).is_none()) {
        return path.into();
    }
    let asked = |part: Component| hidden(&part).unwrap_or_else(|| part.as_os_str().into());
    path.components().map(asked).collect()
}

/// A directory beside an output, in which it is written. It is removed with all that is in it unless it is
/// published or kept.
///
/// It is locked while this lives, where the file system has locks: one that can be locked belongs to
/// a process that is dead.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(crate) path: PathBuf,
    /// The directory that the output will be in, opened before there is something to lose.
    parent: Option<File>,
    /// The directories that were made for the output, outermost first.
    made: Vec<PathBuf>,
    is_published: bool,
    is_kept: bool,
    /// Released last.
    _lock: Option<File>,
}

impl Staging {
    /// Makes the hidden directory of the output `dir`.
    pub(crate) fn new(dir: &Path, name: &OsStr) -> Result<Self> {
        Self::open(dir, &staging_name(name), false)
    }

    /// Opens or makes the directory of the name `place` beside the output `dir`, which is kept.
    pub(crate) fn kept(dir: &Path, place: &OsStr) -> Result<Self> {
        Self::open(dir, place, true)
    }

    fn open(dir: &Path, place: &OsStr, is_kept: bool) -> Result<Self> {
        let parent = parent(dir);
        let mut staging = Self {
            path: PathBuf::new(),
            parent: None,
            made: Vec::new(),
            is_published: true,
            is_kept,
            _lock: None,
        };
        staging.open_parent(parent)?;
        let path = dir.with_file_name(place);
        for _ in 0..ATTEMPTS {
            let is_new = match fs::create_dir(&path) {
                Ok(()) => true,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
                // Another reservation made the directories above, and has just removed them.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    staging.open_parent(parent)?;
                    continue;
                }
                Err(cause) => return Err(io_error(dir, cause)),
            };
            let locked = lock(&path).inspect_err(|_| {
                if is_new {
                    let _ = fs::remove_dir(&path);
                }
            });
            match locked? {
                Lock::Taken(lock) if is_new || is_kept => {
                    staging._lock = lock;
                    staging.path = path;
                    staging.is_published = false;
                    return Ok(staging);
                }
                Lock::Taken(Some(_lock)) => {
                    // Its process is dead. The lock keeps others out until it is gone.
                    fs::remove_dir_all(&path).map_err(|cause| hidden_io(&path, cause))?;
                }
                Lock::Taken(None) => {
                    let problem = "is of a process that was killed, or that still writes, which this file system does not tell; remove it if none writes";
                    return Err(refuse_hidden(path, problem));
                }
                Lock::Held => break,
                Lock::Gone => {}
            }
        }
        Err(Error::OutputBusy { path: dir.into() })
    }

    /// Makes the directory that the output will be in, and those above it.
    fn open_parent(&mut self, parent: &Path) -> Result<()> {
        // Those that are made before one fails are removed when this is dropped.
        make_parents(parent, &mut self.made)?;
        if cfg!(unix) {
            let opened = File::open(parent).map_err(|cause| io_error(parent, cause))?;
            self.parent = Some(opened);
        }
        Ok(())
    }

    /// Gives the directory its name, `dir`, once all that is in it is on the disk.
    pub(crate) fn publish(mut self, dir: &Path) -> Result<()> {
        let published = self.publish_from(&self.path, dir);
        if matches!(published, Ok(()) | Err(Error::NotFlushed { .. })) {
            self.is_published = true;
            self.made.clear();
        }
        published
    }

    /// Gives a directory, this one or one in it, the name `dir`, once all that is in it is on the disk.
    pub(crate) fn publish_from(&self, from: &Path, dir: &Path) -> Result<()> {
        sync(from)?;
        for made in &self.made {
            sync_directory(parent(made))?;
        }
        fs::rename(from, dir).map_err(|cause| match cause.kind() {
            // It was free when it was reserved.
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                Error::OutputExists { path: dir.into() }
            }
            _ => io_error(dir, cause),
        })?;
        let flushed = self.parent.as_ref().map_or(Ok(()), File::sync_all);
        flushed.map_err(|cause| Error::NotFlushed {
            path: dir.into(),
            cause,
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Whatever ends a save is already its error; what cannot be removed is hidden, and the next
        // save at this place removes it.
        if !self.is_published && !self.is_kept {
            let _ = fs::remove_dir_all(&self.path);
        }
        for made in self.made.iter().rev() {
            // Unless somebody else uses it.
            let _ = fs::remove_dir(made);
        }
    }
}

/// Makes the missing ones of a directory and those above it, and adds them to `made`.
fn make_parents(dir: &Path, made: &mut Vec<PathBuf>) -> Result<()> {
    let is_missing =
        |dir: &&Path| fs::metadata(dir).is_err_and(|e| e.kind() == ErrorKind::NotFound);
    let missing: Vec<&Path> = dir.ancestors().take_while(is_missing).collect();
    for dir in missing
        .into_iter()
        .rev()
        .filter(|dir| *dir != Path::new(""))
    {
        match fs::create_dir(dir) {
            Ok(()) => made.push(dir.into()),
            // By another process, in between.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(cause) => return Err(io_error(dir, cause)),
        }
    }
    Ok(())
}

/// The lock of a hidden directory.
#[cfg_attr(
    not(unix),
    expect(dead_code, reason = "directories are locked on Unix alone")
)]
enum Lock {
    /// This process has it; `None` where there are no locks.
    Taken(Option<File>),
    /// A living process has it.
    Held,
    /// The directory was removed or renamed by its process.
    Gone,
}

#[cfg(unix)]
fn lock(path: &Path) -> Result<Lock> {
    let named = match fs::symlink_metadata(path) {
        Ok(named) => named,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Lock::Gone),
        Err(cause) => return Err(hidden_io(path, cause)),
    };
    if !named.is_dir() {
        let problem = "is in the place of a directory that is being written; remove it";
        return Err(refuse_hidden(path.into(), problem));
    }
    let dir = match File::open(path) {
        Ok(dir) => dir,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Lock::Gone),
        Err(cause) => return Err(hidden_io(path, cause)),
    };
    match dir.try_lock() {
        Ok(()) if is_at(&dir, path) => Ok(Lock::Taken(Some(dir))),
        Ok(()) => Ok(Lock::Gone),
        Err(fs::TryLockError::WouldBlock) => Ok(Lock::Held),
        Err(fs::TryLockError::Error(_)) => Ok(Lock::Taken(None)),
    }
}

#[cfg(not(unix))]
fn lock(_: &Path) -> Result<Lock> {
    Ok(Lock::Taken(None))
}

/// Whether `path` still names the open file or directory.
#[cfg(unix)]
fn is_at(open: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    let (open, named) = (open.metadata(), fs::symlink_metadata(path));
    let place = |of: io::Result<fs::Metadata>| of.map(|of| (of.dev(), of.ino())).ok();
    place(open).is_some_and(|open| Some(open) == place(named))
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// An error about the hidden directory itself.
fn hidden_io(path: &Path, cause: io::Error) -> Error {
    Error::Io {
        path: path.into(),
        cause,
    }
}

fn refuse_hidden(path: PathBuf, problem: &str) -> Error {
    Error::File {
        path,
        problem: problem.into(),
    }
}

/// Opens the hidden file `path`, empty, and waits until no other process writes it.
pub(crate) fn staging_file(path: &Path) -> io::Result<File> {
    for _ in 0..ATTEMPTS {
        let mut options = File::options();
        let file = options
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        // Without locks, two processes that replace one file at the same time are not kept apart.
        let _ = file.lock();
        if is_at(&file, path) {
            file.set_len(0)?;
            return Ok(file);
        }
    }
    Err(ErrorKind::ResourceBusy.into())
}
