//! Records as the rows of a Parquet file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::{refuse, unread};
use crate::{RecordError, Result};

/// Reads the rows of a file, each with its number.
pub(super) fn rows(path: &Path, max: usize) -> Result<Vec<(usize, Value)>> {
    let refused = |row, problem| refuse(path, row, RecordError::Row { problem });
    let file = File::open(path).map_err(|source| unread(path, source))?;
    // The library panics at some files that are damaged.
    let read = catch_unwind(AssertUnwindSafe(|| -> Result<_> {
        let reader = SerializedFileReader::new(file).map_err(|error| refused(1, said(&error)))?;
        let rows = RowIter::from_file_into(Box::new(reader));
        let mut values = Vec::new();
        for (row, number) in rows.zip(1..) {
            let row = row.map_err(|error| refused(number, said(&error)))?;
            let value = object(&row).map_err(|problem| refused(number, problem))?;
            if size(&value) > max {
                return Err(refuse(path, number, RecordError::TooLarge { max }));
            }
            values.push((number, value));
        }
        Ok(values)
    }));
    read.unwrap_or_else(|_| Err(refused(1, "the Parquet file is damaged".into())))
}

fn said(error: &ParquetError) -> String {
    let problem = error.to_string();
    match problem.contains("Disabled feature") {
        true => format!("{problem}: of the codecs, Snappy is read; write the file with it"),
        false => problem,
    }
}

/// The bytes of the texts of a value.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(size).sum(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| key.len() + size(value))
            .sum(),
        _ => 0,
    }
}

fn object(row: &Row) -> Result<Value, String> {
    let fields = row.get_column_iter().map(|(name, field)| {
        let value = value(field).map_err(|problem| format!("`{name}` {problem}"))?;
        Ok((name.clone(), value))
    });
    fields
        .collect::<Result<Map<_, _>, String>>()
        .map(Value::Object)
}

fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => value.to_f64().into(),
        Field::Float(value) => f64::from(*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(value) => value.as_str().into(),
        Field::Group(row) => object(row)?,
        Field::ListInternal(list) => {
            let values = list.elements().iter().map(value);
            values.collect::<Result<Vec<_>, _>>()?.into()
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, entry)| match key {
                Field::Str(key) => Ok((key.clone(), value(entry)?)),
                _ => Err("has a map whose keys are no strings".to_owned()),
            });
            Value::Object(entries.collect::<Result<_, _>>()?)
        }
        Field::Bytes(_) => return Err("is of bytes, not of text".into()),
        _ => return Err("is of dates, times or decimals; write it as text".into()),
    })
}
