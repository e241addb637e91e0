//! Records as JSON: an object on each line, or an array of objects.

use std::cell::{Cell, RefCell};
use std::io::{self, BufRead, Read};
use std::path::Path;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::error::Category;

use super::{refuse, unread};
use crate::{Error, RecordError, Result};

/// Reads the values of lines that are not blank, each with its line number.
///
/// The reader is at the byte `offset` of the file.
pub(super) fn lines(
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
pub(super) fn array(
    file: impl Read,
    path: &Path,
    offset: usize,
    max: usize,
) -> Result<Vec<(usize, Value)>> {
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
