use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::{Error, RecordError, Result};

mod csv;
mod json;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(test)]
mod tests;

/// The largest size of a record in bytes.
pub const MAX_RECORD_BYTES: usize = 16 << 20;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// First bytes of files that are not JSON, the kind of each, and what to do about it.
const SIGNATURES: [(&[u8], &str, &str); 9] = [
    (
        b"version https://git-lfs",
        "a Git LFS pointer",
        "run `git lfs pull`",
    ),
    (
        b"/annex/objects/",
        "a git-annex pointer",
        "run `git annex get`",
    ),
    (b"<!doctype", "an HTML page", FETCH),
    (b"<html", "an HTML page", FETCH),
    (b"\x1f\x8b", "compressed with gzip", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
];
const FETCH: &str = "download the file itself: its address on Hugging Face and GitHub has `resolve` or `raw` in it, and may need a login";

const PARQUET: &[u8] = b"PAR1";

/// A JSON object, or a row of a table, with its place in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The fields of the object, in the order of the file.
    pub fields: Map<String, Value>,
    /// The file.
    pub path: Arc<Path>,
    /// The line on which it begins, or its row in a Parquet file, counted from 1.
    pub line: usize,
}

impl Record {
    pub(crate) fn refuse(&self, problem: RecordError) -> Error {
        refuse(&self.path, self.line, problem)
    }

    /// Refuses a field for its value.
    pub(crate) fn refuse_field(&self, field: impl Into<String>, problem: String) -> Error {
        let field = field.into();
        self.refuse(RecordError::Field { field, problem })
    }

    /// Refuses a record that lacks a field.
    pub(crate) fn refuse_without(&self, field: impl Into<String>) -> Error {
        self.refuse(RecordError::MissingField {
            field: field.into(),
            found: self.fields.keys().cloned().collect(),
        })
    }
}

/// Reads the records of a file: one JSON object per line, a JSON array of objects, a table of texts
/// (`.csv`, `.tsv`) whose first line names its columns, or, with the feature `parquet`, a Parquet file.
///
/// A byte order mark, carriage returns before line feeds, and blank lines are accepted. At most
/// [`MAX_RECORD_BYTES`] of a record are read.
///
/// # Errors
/// [`Error::NotRecords`] for a path that is not a file, and for a file in another format;
/// [`Error::NoRecords`]; [`Error::Record`] with the first record that is not a JSON object or not a row
/// of the table, or is too large; [`Error::File`] if the file cannot be read.
///
/// # Examples
/// ```
/// use instruct::{Error, RecordError, read_records};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("train.jsonl");
/// std::fs::write(&path, "{\"question\": \"1 + 1?\"}\n[2]\n")?;
/// let error = read_records(&path).unwrap_err();
/// assert!(matches!(
///     error,
///     Error::Record { line: 2, problem: RecordError::NotObject { found: "an array" }, .. }
/// ));
///
/// std::fs::write(&path, "{\"question\": \"1 + 1?\"}\n")?;
/// let records = read_records(&path)?;
/// assert_eq!(records[0].fields["question"], "1 + 1?");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    read_up_to(path, MAX_RECORD_BYTES)
}

/// Reads records of at most `max` bytes each.
fn read_up_to(path: &Path, max: usize) -> Result<Vec<Record>> {
    let mut file = open(path)?;
    let head = file.fill_buf().map_err(|source| unread(path, source))?;
    let start = if head.starts_with(BOM) { BOM.len() } else { 0 };
    file.consume(start);
    let head = file.fill_buf().map_err(|source| unread(path, source))?;
    let head = head.trim_ascii_start();
    let begins = |(start, _, _): &&(&[u8], _, _)| {
        let found = head.get(..start.len());
        found.is_some_and(|found| found.eq_ignore_ascii_case(start))
    };
    if let Some(&(_, found, advice)) = SIGNATURES.iter().find(begins) {
        return Err(not_records(path, found, advice));
    }
    let delimiter = path.extension().and_then(csv::delimiter);
    let values = if head.starts_with(PARQUET) {
        of_parquet(path, max)?
    } else if let Some(delimiter) = delimiter {
        csv::rows(file, path, delimiter, max)?
    } else if head.starts_with(b"[") {
        json::array(file, path, start, max)?
    } else {
        json::lines(file, path, start, max)?
    };
    if values.is_empty() {
        return Err(Error::NoRecords { path: path.into() });
    }
    let shared: Arc<Path> = path.into();
    let record = |(line, value)| match value {
        Value::Object(fields) => Ok(Record {
            fields,
            path: Arc::clone(&shared),
            line,
        }),
        other => {
            let found = kind(&other);
            Err(refuse(path, line, RecordError::NotObject { found }))
        }
    };
    values.into_iter().map(record).collect()
}

#[cfg(feature = "parquet")]
use self::parquet::rows as of_parquet;

#[cfg(not(feature = "parquet"))]
fn of_parquet(path: &Path, _: usize) -> Result<Vec<(usize, Value)>> {
    let advice = "build with the feature `parquet`, or convert it to one JSON object per line";
    Err(not_records(path, "a Parquet file", advice))
}

/// The kind of a value, with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "a null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn open(path: &Path) -> Result<BufReader<File>> {
    // Checked first: opening a pipe blocks until another process writes to it.
    let metadata = std::fs::metadata(path).map_err(|source| unread(path, source))?;
    if metadata.is_dir() {
        return Err(not_records(path, "a directory", "name a file in it"));
    }
    if !metadata.is_file() {
        let found = "a pipe or a device";
        return Err(not_records(path, found, "write the records to a file"));
    }
    let file = File::open(path).map_err(|source| unread(path, source))?;
    Ok(BufReader::new(file))
}

fn unread(path: &Path, cause: io::Error) -> Error {
    let path = path.into();
    tensor_files::Error::Io { path, cause }.into()
}

fn not_records(path: &Path, found: &'static str, advice: &'static str) -> Error {
    let path = path.into();
    Error::NotRecords {
        path,
        found,
        advice,
    }
}

fn refuse(path: &Path, line: usize, problem: RecordError) -> Error {
    let path = path.into();
    Error::Record {
        path,
        line,
        problem,
    }
}
