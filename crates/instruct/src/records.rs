use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Map, Value};

use crate::{Error, RecordError, Result};

#[cfg(test)]
mod tests;

/// The largest size of a record in bytes.
pub const MAX_RECORD_BYTES: usize = 16 << 20;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// First bytes of files that are not JSON, the kind of each, and what to do about it.
const SIGNATURES: [(&[u8], &str, &str); 10] = [
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
    (
        b"PAR1",
        "a Parquet file",
        "convert it to one JSON object per line",
    ),
    (b"\x1f\x8b", "compressed with gzip", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
];
const FETCH: &str = "download the file itself: its address on Hugging Face and GitHub has `resolve` or `raw` in it, and may need a login";

/// A JSON object with its place in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The fields of the object.
    pub fields: Map<String, Value>,
    /// The file.
    pub path: Arc<Path>,
    /// The line on which it begins, counted from 1.
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

/// Reads the records of a file: one JSON object per line, or a JSON array of objects.
///
/// A byte order mark, carriage returns before line feeds, and blank lines are accepted. At most
/// [`MAX_RECORD_BYTES`] of a record are read.
///
/// # Errors
/// [`Error::NotRecords`] for a path that is not a file, and for a file in another format;
/// [`Error::NoRecords`]; [`Error::Record`] with the first record that is not a JSON object or is too
/// large; [`Error::File`] if the file cannot be read.
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
    let values = if head.starts_with(b"[") {
        array(file, path, start, max)?
    } else {
        lines(file, path, start, max)?
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

/// Reads the values of lines that are not blank, each with its line number.
///
/// The reader is at the byte `offset` of the file.
fn lines(
    mut file: impl BufRead,
    path: &Path,
    mut offset: usize,
    max: usize,
) -> Result<Vec<(usize, Value)>> {
    let mut values = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        offset += bytes.len();
        bytes.clear();
        let mut bounded = file.by_ref().take(max as u64 + 1);
        let n_read = bounded.read_until(b'\n', &mut bytes);
        if n_read.map_err(|source| unread(path, source))? == 0 {
            break;
        }
        if bytes.len() > max && !bytes.ends_with(b"\n") {
            return Err(refuse(path, line, RecordError::TooLarge { max }));
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            let column = error.valid_up_to() + 1;
            let offset = offset + error.valid_up_to();
            refuse(path, line, RecordError::NotUtf8 { column, offset })
        })?;
        let text = text.trim_ascii_end();
        if text.is_empty() {
            continue;
        }
        let value = serde_json::from_str(text);
        values.push((line, value.map_err(|error| not_json(path, line, &error))?));
    }
    Ok(values)
}

/// Reads the values of an array, each with the line on which it begins.
///
/// The reader is at the byte `offset` of the file.
fn array(file: impl Read, path: &Path, offset: usize, max: usize) -> Result<Vec<(usize, Value)>> {
    let meter = Meter {
        line: Cell::new(1),
        column: Cell::new(0),
        offset: Cell::new(offset),
        char: RefCell::default(),
        record: Cell::new(1),
        n_bytes: Cell::new(0),
        max,
    };
    let metered = Metered {
        file,
        meter: &meter,
    };
    let mut json = serde_json::Deserializer::from_reader(metered);
    let values = (&mut json).deserialize_seq(Items { meter: &meter });
    let values = values.and_then(|values| json.end().map(|()| values));
    values.map_err(|error| match error.classify() {
        Category::Io if meter.is_exceeded() => {
            refuse(path, meter.record.get(), RecordError::TooLarge { max })
        }
        Category::Io if !meter.is_utf8() => {
            let n_bytes = meter.char.borrow().len();
            let column = meter.column.get() + 1 - n_bytes;
            let offset = meter.offset.get() - n_bytes;
            let problem = RecordError::NotUtf8 { column, offset };
            refuse(path, meter.line.get(), problem)
        }
        Category::Io => unread(path, error.into()),
        _ => not_json(path, error.line(), &error),
    })
}

/// The position of a reader.
struct Meter {
    line: Cell<usize>,
    /// Bytes of the line.
    column: Cell<usize>,
    /// Bytes of the file.
    offset: Cell<usize>,
    /// The last bytes, if they are not yet a character, or can never be one.
    char: RefCell<Vec<u8>>,
    /// The line on which the last record begins.
    record: Cell<usize>,
    /// Bytes read since the beginning of that record, or since its end.
    n_bytes: Cell<usize>,
    /// The limit of `n_bytes`.
    max: usize,
}

impl Meter {
    fn is_exceeded(&self) -> bool {
        self.n_bytes.get() > self.max
    }

    fn is_utf8(&self) -> bool {
        match std::str::from_utf8(&self.char.borrow()) {
            Ok(_) => true,
            Err(error) => error.error_len().is_none(),
        }
    }

    fn count(&self, byte: u8) {
        self.n_bytes.update(|n_bytes| n_bytes + 1);
        self.offset.update(|offset| offset + 1);
        self.column.update(|column| column + 1);
        let mut char = self.char.borrow_mut();
        char.push(byte);
        if std::str::from_utf8(&char).is_err() {
            return;
        }
        char.clear();
        if byte == b'\n' {
            self.line.update(|line| line + 1);
            self.column.set(0);
        }
    }
}

/// A reader that fails as soon as a record is larger than the limit, or not UTF-8.
struct Metered<'a, R> {
    file: R,
    meter: &'a Meter,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // One byte at a time, as serde_json requests them, so that the position is exact.
        let n_bytes = buffer.len().min(1);
        let n_read = self.file.read(&mut buffer[..n_bytes])?;
        if let [byte, ..] = buffer[..n_read] {
            self.meter.count(byte);
        }
        if self.meter.is_exceeded() {
            return Err(io::Error::other("the record is too large"));
        }
        if !self.meter.is_utf8() {
            return Err(io::Error::other("not UTF-8"));
        }
        Ok(n_read)
    }
}

struct Items<'a> {
    meter: &'a Meter,
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = Vec<(usize, Value)>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(Item { meter: self.meter })? {
            values.push(value);
        }
        Ok(values)
    }
}

struct Item<'a> {
    meter: &'a Meter,
}

impl<'de> DeserializeSeed<'de> for Item<'_> {
    type Value = (usize, Value);

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        // Exactly the first byte of the value has been read.
        let line = self.meter.line.get();
        self.meter.record.set(line);
        self.meter.n_bytes.set(1);
        let value = Value::deserialize(json)?;
        self.meter.n_bytes.set(0);
        Ok((line, value))
    }
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

fn not_json(path: &Path, line: usize, error: &serde_json::Error) -> Error {
    let problem = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let problem = RecordError::NotJson {
        // serde_json counts 0 after the end of a line.
        column: error.column().max(1),
        problem: problem.strip_suffix(&place).unwrap_or(&problem).into(),
    };
    refuse(path, line, problem)
}
