//! Files that are held in memory whole.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::directory::{parent, sync_directory};
use crate::error::{io, refuse};
use crate::staging::{published, staging_file, staging_name};
use crate::{Error, Result};

/// Opens a regular file, and returns its length in bytes.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    // Before it is opened: opening a pipe waits for its other end.
    let info = fs::metadata(path).map_err(|cause| io(path, cause))?;
    if !info.is_file() {
        return Err(refuse(path, "is not a regular file".into()));
    }
    let file = File::open(path).map_err(|cause| io(path, cause))?;
    Ok((file, info.len()))
}

/// The number of bytes that [`impostor`] looks at.
pub(crate) const IMPOSTOR_BYTES: u64 = 512;

/// The problem with a file that is not the expected one, by its first bytes.
pub(crate) fn impostor(start: &[u8]) -> Option<&'static str> {
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
    let text = text.trim_ascii_start();
    let begins = |what: &[u8]| {
        let head = text.get(..what.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(what))
    };
    let has = |what: &[u8]| start.windows(what.len()).any(|part| part == what);
    if begins(b"version https://git-lfs") {
        Some("is a Git-LFS pointer, not the file itself; run `git lfs pull`")
    } else if begins(b"<!doctype html") || begins(b"<html") {
        Some("is a web page, not the file itself: fetch it again, with a login if it takes one")
    } else if has(b"/annex/objects/") {
        Some("is a git-annex link, not the file itself; run `git annex get`")
    } else if start.starts_with(b"PK\x03\x04") {
        Some("is a zip archive, as pickled weights are; convert it to safetensors")
    } else {
        None
    }
}

/// Whether a file of this name exists, dangling links included: opening it reports the problem.
pub fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Reads a file that is held in memory whole.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] if it is not a regular file, larger than a
/// configuration or a tokenizer can be, or a Git-LFS pointer, a web page or the like in place of it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, 1 << 30)
}

/// Reads a configuration, as [`read`] does: parsed, a JSON value takes up to 32 times its text.
///
/// # Errors
/// As [`read`]; [`Error::File`] for more than 4 MiB.
pub fn read_config(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, 4 << 20)
}

fn read_at_most(path: &Path, max: u64) -> Result<Vec<u8>> {
    let (file, n_bytes) = open(path)?;
    let mut bytes = Vec::new();
    let most = file.take(max + 1).read_to_end(&mut bytes);
    most.map_err(|cause| io(path, cause))?;
    if bytes.len() as u64 > max {
        let problem = format!("has {n_bytes} bytes; files of this kind have at most {max}");
        return Err(refuse(path, problem));
    }
    match impostor(&bytes[..bytes.len().min(IMPOSTOR_BYTES as usize)]) {
        Some(problem) => Err(refuse(path, problem.into())),
        None => Ok(bytes),
    }
}

/// Reads a configuration in JSON.
///
/// # Errors
/// As [`read_config`]; [`Error::File`] if it is not JSON of the expected form.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = read_config(path)?;
    serde_json::from_slice(&bytes).map_err(|error| refuse(path, error.to_string()))
}

/// Writes a file that is held in memory whole, and flushes it to the disk.
///
/// # Errors
/// [`Error::Io`] if it cannot be written. A part of it may be left then.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|cause| io(path, cause))
}

/// Writes a JSON file atomically, and replaces an existing one.
///
/// It is written under the hidden name `.NAME.tensor-files.tmp`, for which processes that write the same
/// file wait for each other.
///
/// # Errors
/// [`Error::Io`] if it cannot be written; the existing file is as it was then. [`Error::NotFlushed`]: it
/// is written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| refuse(path, error.to_string()))?;
    text.push('\n');
    let Some(name) = path.file_name() else {
        return Err(refuse(path, "is not the name of a file".into()));
    };
    let staging = path.with_file_name(staging_name(name));
    let mut file = staging_file(&staging).map_err(|cause| io(path, cause))?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&staging, path));
    if let Err(cause) = written {
        // What failed is already the error; the next one that is written here takes what is left.
        let _ = fs::remove_file(&staging);
        return Err(io(path, cause));
    }
    sync_directory(parent(path)).map_err(|error| match error {
        // In a directory that is being written, nothing is there yet.
        Error::Io { cause, .. } if published(path) == path => Error::NotFlushed {
            path: path.into(),
            cause,
        },
        other => other,
    })
}
