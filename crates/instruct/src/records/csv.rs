//! Records as tables of texts, separated by commas or tabs (RFC 4180).

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::Path;

use csv::{ByteRecord, ErrorKind, Position, ReaderBuilder};
use serde_json::{Map, Value};

use super::{refuse, unread};
use crate::{Error, RecordError, Result};

/// What separates the fields of a file with this extension; none if it is no table.
pub(super) fn delimiter(extension: &OsStr) -> Option<u8> {
    let is = |name: &str| extension.eq_ignore_ascii_case(name);
    if is("csv") {
        Some(b',')
    } else {
        is("tsv").then_some(b'\t')
    }
}

/// Reads the rows behind the first, each with the line on which it begins; all values are strings.
pub(super) fn rows(
    file: impl Read,
    path: &Path,
    delimiter: u8,
    max: usize,
) -> Result<Vec<(usize, Value)>> {
    let recent = RefCell::new(Recent::default());
    let bounded = Bounded {
        file,
        recent: &recent,
        max,
    };
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .from_reader(bounded);
    let refused = |error: csv::Error, line: usize| refusal(path, line, max, error);
    let names = reader
        .byte_headers()
        .map_err(|error| refused(error, 1))?
        .clone();
    let names = texts(path, 1, &names, |at| {
        format!("the name of column {}", at + 1)
    })?;
    let mut known = HashSet::new();
    if let Some(name) = names.iter().find(|&name| !known.insert(name)) {
        let problem = format!("two columns are named `{name}`");
        return Err(refuse(path, 1, RecordError::Row { problem }));
    }
    let mut rows = Vec::new();
    let mut row = ByteRecord::new();
    loop {
        let at = reader.position().clone();
        let line = recent.borrow_mut().line(&at);
        if !reader
            .read_byte_record(&mut row)
            .map_err(|error| refused(error, line))?
        {
            return Ok(rows);
        }
        let line = recent.borrow_mut().line(&at);
        if row.as_slice().len() > max {
            return Err(refuse(path, line, RecordError::TooLarge { max }));
        }
        let values = texts(path, line, &row, |at| format!("`{}`", names[at]))?;
        let values = values.into_iter().map(Value::String);
        let fields: Map<String, Value> = names.iter().cloned().zip(values).collect();
        rows.push((line, Value::Object(fields)));
    }
}

/// The fields of a row, each of which has a name for errors.
fn texts(
    path: &Path,
    line: usize,
    row: &ByteRecord,
    name: impl Fn(usize) -> String,
) -> Result<Vec<String>> {
    let text = |(at, bytes): (usize, &[u8])| {
        String::from_utf8(bytes.to_vec()).map_err(|_| {
            let problem = format!("{} is not UTF-8; save the file as UTF-8", name(at));
            refuse(path, line, RecordError::Row { problem })
        })
    };
    row.iter().enumerate().map(text).collect()
}

fn refusal(path: &Path, line: usize, max: usize, error: csv::Error) -> Error {
    match error.into_kind() {
        ErrorKind::Io(cause) if cause.get_ref().is_some_and(|cause| cause.is::<TooLarge>()) => {
            refuse(path, line, RecordError::TooLarge { max })
        }
        ErrorKind::Io(cause) => unread(path, cause),
        ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            let problem = format!("{len} fields, but the first line names {expected_len} columns");
            refuse(path, line, RecordError::Row { problem })
        }
        other => {
            let problem = format!("{other:?}");
            refuse(path, line, RecordError::Row { problem })
        }
    }
}

/// The bytes that were read since a row began, with the place of the first.
#[derive(Default)]
struct Recent {
    bytes: Vec<u8>,
    start: u64,
}

impl Recent {
    /// The line of a row that begins behind a place, and behind the line ends there; what is before it is
    /// forgotten.
    fn line(&mut self, at: &Position) -> usize {
        let n_done = usize::try_from(at.byte().saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.bytes.drain(..n_done.min(self.bytes.len()));
        self.start = at.byte();
        let ends = self
            .bytes
            .iter()
            .take_while(|&byte| matches!(byte, b'\r' | b'\n'));
        let n_lines = ends.filter(|&&byte| byte == b'\n').count();
        usize::try_from(at.line())
            .unwrap_or(usize::MAX)
            .saturating_add(n_lines)
    }
}

/// A reader that fails where a row goes on for too long.
struct Bounded<'a, R> {
    file: R,
    recent: &'a RefCell<Recent>,
    max: usize,
}

#[derive(Debug, thiserror::Error)]
#[error("the row is too large")]
struct TooLarge;

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut recent = self.recent.borrow_mut();
        // A row has at most two bytes for one of its texts, and its quotes and separators.
        if recent.bytes.len() > self.max.saturating_mul(4) {
            return Err(io::Error::other(TooLarge));
        }
        let n_read = self.file.read(buffer)?;
        recent.bytes.extend_from_slice(&buffer[..n_read]);
        Ok(n_read)
    }
}
