use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Map, Value};

use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// Bytes that a record may have.
pub const MAX_RECORD_BYTES: usize = 16 << 20;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// Beginnings of files that are not JSON, what they are and what to do.
const IMPOSTORS: [(&[u8], &str, &str); 10] = [
    (
        b"version https://git-lfs",
        "a Git LFS pointer",
        "fetch what it points to with `git lfs pull`",
    ),
    (
        b"/annex/objects/",
        "a git-annex pointer",
        "fetch what it points to with `git annex get`",
    ),
    (b"<!doctype", "an HTML page", FETCH),
    (b"<html", "an HTML page", FETCH),
    (
        b"PAR1",
        "a Parquet file",
        "convert it to one JSON object a line",
    ),
    (b"\x1f\x8b", "compressed with gzip", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
];
const FETCH: &str = "fetch the file and not the page about it: on Hugging Face and GitHub addresses have `resolve` or `raw` for files, and ask for a login where one is needed";

/// A JSON object, and where it was.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its fields.
    pub fields: Map<String, Value>,
    /// The file.
    pub path: Arc<Path>,
    /// The line on which it begins, counted from 1.
    pub line: usize,
}

/// The records of a file: a JSON object a line, or a JSON array of objects.
///
/// A byte order mark, line ends of Windows and blank lines are accepted. A record may have
/// [`MAX_RECORD_BYTES`]; no more of it is read.
///
/// # Errors
/// [`Error::NotFile`], [`Error::NotRecords`], [`Error::NoRecords`], [`Error::NotJson`],
/// [`Error::NotObject`], [`Error::NotUtf8`], [`Error::LongRecord`], or if the file cannot be read.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    read_up_to(path, MAX_RECORD_BYTES)
}

/// The records of a file, each of which may have `max` bytes.
fn read_up_to(path: &Path, max: usize) -> Result<Vec<Record>> {
    let mut file = open(path)?;
    let head = file.fill_buf().map_err(|source| unread(path, source))?;
    if head.starts_with(BOM) {
        file.consume(BOM.len());
    }
    let head = file.fill_buf().map_err(|source| unread(path, source))?;
    let head = head.trim_ascii_start();
    let is = |(start, _, _): &&(&[u8], _, _)| {
        let found = head.get(..start.len());
        found.is_some_and(|found| found.eq_ignore_ascii_case(start))
    };
    if let Some(&(_, found, advice)) = IMPOSTORS.iter().find(is) {
        let path = path.into();
        return Err(Error::NotRecords {
            path,
            found,
            advice,
        });
    }
    let values = if head.starts_with(b"[") {
        array(file, path, max)?
    } else {
        lines(file, path, max)?
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
        other => Err(Error::NotObject {
            path: path.into(),
            line,
            found: kind(&other),
        }),
    };
    values.into_iter().map(record).collect()
}

/// What a value is, with its article.
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
    // Before it is opened: opening a pipe waits for someone to write to it.
    let metadata = std::fs::metadata(path).map_err(|source| unread(path, source))?;
    if !metadata.is_file() {
        return Err(Error::NotFile {
            path: path.into(),
            found: if metadata.is_dir() {
                "a directory"
            } else {
                "a pipe or a device"
            },
        });
    }
    let file = File::open(path).map_err(|source| unread(path, source))?;
    Ok(BufReader::new(file))
}

/// The values of the lines that are not blank, each with its line.
fn lines(mut file: impl BufRead, path: &Path, max: usize) -> Result<Vec<(usize, Value)>> {
    let mut values = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let mut bounded = file.by_ref().take(max as u64 + 1);
        let n_read = bounded.read_until(b'\n', &mut bytes);
        if n_read.map_err(|source| unread(path, source))? == 0 {
            break;
        }
        if bytes.len() > max && !bytes.ends_with(b"\n") {
            return Err(too_long(path, line, max));
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| Error::NotUtf8 {
            path: path.into(),
            line,
            column: error.valid_up_to() + 1,
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

/// The values of an array, each with the line on which it begins.
fn array(file: impl Read, path: &Path, max: usize) -> Result<Vec<(usize, Value)>> {
    let meter = Meter {
        line: Cell::new(1),
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
        Category::Io if meter.is_exceeded() => too_long(path, meter.record.get(), max),
        Category::Io => unread(path, error.into()),
        _ => not_json(path, error.line(), &error),
    })
}

/// Where a reader is.
struct Meter {
    line: Cell<usize>,
    /// The line on which the last record began.
    record: Cell<usize>,
    /// Bytes since then, or since its end.
    n_bytes: Cell<usize>,
    /// How many they may be.
    max: usize,
}

impl Meter {
    fn is_exceeded(&self) -> bool {
        self.n_bytes.get() > self.max
    }
}

/// A file that ends with an error where a record is too long.
struct Metered<'a, R> {
    file: R,
    meter: &'a Meter,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A byte at a time, as serde_json asks for them, so that the meter knows where it is.
        let n_bytes = buffer.len().min(1);
        let n_read = self.file.read(&mut buffer[..n_bytes])?;
        let n_lines = buffer[..n_read].iter().filter(|&&byte| byte == b'\n');
        self.meter.line.update(|line| line + n_lines.count());
        self.meter.n_bytes.update(|n_bytes| n_bytes + n_read);
        if self.meter.is_exceeded() {
            return Err(io::Error::other("a record is too long"));
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
        // The first byte of the value has been read, and no more.
        let line = self.meter.line.get();
        self.meter.record.set(line);
        self.meter.n_bytes.set(1);
        let value = Value::deserialize(json)?;
        self.meter.n_bytes.set(0);
        Ok((line, value))
    }
}

fn unread(path: &Path, source: io::Error) -> Error {
    let path = path.into();
    tensor_files::Error::Io { path, source }.into()
}

fn too_long(path: &Path, line: usize, max: usize) -> Error {
    Error::LongRecord {
        path: path.into(),
        line,
        max,
    }
}

fn not_json(path: &Path, line: usize, error: &serde_json::Error) -> Error {
    let problem = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    Error::NotJson {
        path: path.into(),
        line,
        // 0 behind the end of a line.
        column: error.column().max(1),
        problem: problem.strip_suffix(&place).unwrap_or(&problem).into(),
    }
}
