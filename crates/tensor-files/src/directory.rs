use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::io;
use crate::{Error, Result};

/// Makes a directory with the files that `write` writes, atomically.
///
/// The files are written into a hidden directory beside it and flushed to the disk; then that
/// directory is given its name. A process that is killed before leaves `.NAME.PID.N.tmp` behind,
/// which nothing reads.
///
/// # Errors
/// [`Error::OutputExists`] if `dir` is there and is not an empty directory, [`Error::Io`] if it
/// cannot be written, or what `write` returns.
pub fn write_directory<E: From<Error>>(
    dir: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    check_output(dir)?;
    let dir = std::path::absolute(dir).map_err(|source| io(dir, source))?;
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(Error::OutputExists { path: dir }.into());
    };
    fs::create_dir_all(parent).map_err(|source| io(parent, source))?;
    let staging = create_staging(parent, name)?;

    let written = write(&staging)
        .and_then(|()| Ok(sync(&staging)?))
        .and_then(|()| Ok(fs::rename(&staging, &dir).map_err(|source| io(&dir, source))?));
    if written.is_err() {
        // What failed is already the error; the leftover is hidden and harmless.
        let _ = fs::remove_dir_all(&staging);
        return written;
    }
    Ok(sync_directory(parent)?)
}

/// Makes a new directory under a hidden name; a killed process may have left some behind.
fn create_staging(parent: &Path, name: &OsStr) -> Result<PathBuf> {
    let mut attempt = 0;
    loop {
        let staging = parent.join(staging_name(name, attempt));
        match fs::create_dir(&staging) {
            Ok(()) => return Ok(staging),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => attempt += 1,
            Err(source) => return Err(io(&staging, source)),
        }
    }
}

/// Checks that [`write_directory`] can write `dir`: it does not exist, or is empty.
///
/// # Errors
/// [`Error::OutputExists`], or [`Error::Io`] if it cannot be looked at.
pub fn check_output(dir: &Path) -> Result<()> {
    let exists = || Error::OutputExists { path: dir.into() };
    match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().map_or(Ok(()), |_| Err(exists())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Err(exists()),
        Err(source) => Err(io(dir, source)),
    }
}

/// Flushes the files of a directory, and the directory.
fn sync(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|source| io(dir, source))? {
        let path = entry.map_err(|source| io(dir, source))?.path();
        let file = File::options().append(true).open(&path);
        file.and_then(|file| file.sync_all())
            .map_err(|source| io(&path, source))?;
    }
    sync_directory(dir)
}

/// Flushes the entries of a directory, where the system can.
pub(crate) fn sync_directory(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        let dir_file = File::open(dir).map_err(|source| io(dir, source))?;
        dir_file.sync_all().map_err(|source| io(dir, source))?;
    }
    Ok(())
}

/// The directory of a file.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// The hidden name of a file or directory that is being written.
pub(crate) fn staging_name(name: &OsStr, attempt: usize) -> String {
    format!(
        ".{}.{}.{attempt}.tmp",
        name.to_string_lossy(),
        std::process::id()
    )
}
