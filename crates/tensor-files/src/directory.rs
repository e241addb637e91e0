//! Flushing to the disk.

use std::fs::{self, File};
use std::path::Path;

use crate::Result;
use crate::error::io;

/// Flushes all files and directories in a directory, and the directory.
pub(crate) fn sync(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|cause| io(dir, cause))? {
        let entry = entry.map_err(|cause| io(dir, cause))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|cause| io(&path, cause))?;
        if kind.is_dir() {
            sync(&path)?;
        } else if kind.is_file() {
            sync_file(&path)?;
        }
    }
    sync_directory(dir)
}

/// Flushes a file, errors of earlier writes and of closing it included.
pub(crate) fn sync_file(path: &Path) -> Result<()> {
    // Of the systems, Windows alone flushes only what may be written.
    let file = File::options().read(true).write(cfg!(windows)).open(path);
    file.and_then(|file| file.sync_all())
        .map_err(|cause| io(path, cause))
}

/// Flushes the entries of a directory, where the system can.
pub(crate) fn sync_directory(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        let opened = File::open(dir).map_err(|cause| io(dir, cause))?;
        opened.sync_all().map_err(|cause| io(dir, cause))?;
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
