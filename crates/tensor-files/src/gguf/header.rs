//! The primitives of a header, each bounded by what is left of the file.

use std::io::Read;

use super::metadata::{Array, Value, id};

/// An operation whose error is a message.
pub(super) type Result<T> = std::result::Result<T, String>;

/// The most that is reserved before values are read: what a file claims is not believed.
const RESERVED: usize = 1 << 16;

/// A reader of a header, which counts its bytes.
pub(super) struct Header<R> {
    file: R,
    /// The bytes that were read.
    at: u64,
    /// The bytes of the file.
    n_bytes: u64,
}

impl<R: Read> Header<R> {
    pub(super) fn new(file: R, n_bytes: u64) -> Self {
        Self {
            file,
            at: 0,
            n_bytes,
        }
    }

    /// The bytes that were read.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    fn left(&self) -> u64 {
        self.n_bytes - self.at
    }

    /// Takes so many bytes from those that are left.
    fn take(&mut self, n: u64) -> Result<()> {
        if n > self.left() {
            return Err(format!(
                "ends in its header: byte {} asks for {n} more bytes, the file has {}",
                self.at, self.n_bytes
            ));
        }
        self.at += n;
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact(bytes);
        read.map_err(|error| format!("cannot be read: {error}"))
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.take(N as u64)?;
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn text(&mut self) -> Result<String> {
        let start = self.at;
        let n = self.u64()?;
        self.take(n)?;
        // At most what the file has, which was checked.
        let mut bytes = vec![0; n as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| format!("byte {start}: a text is not UTF-8"))
    }

    fn bool(&mut self) -> Result<bool> {
        let start = self.at;
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("byte {start}: {other} is neither true nor false")),
        }
    }

    /// A value after its type.
    pub(super) fn value(&mut self) -> Result<Value> {
        let start = self.at;
        Ok(match self.u32()? {
            id::U8 => Value::U8(self.array().map(u8::from_le_bytes)?),
            id::I8 => Value::I8(self.array().map(i8::from_le_bytes)?),
            id::U16 => Value::U16(self.array().map(u16::from_le_bytes)?),
            id::I16 => Value::I16(self.array().map(i16::from_le_bytes)?),
            id::U32 => Value::U32(self.u32()?),
            id::I32 => Value::I32(self.array().map(i32::from_le_bytes)?),
            id::F32 => Value::F32(self.array().map(f32::from_le_bytes)?),
            id::BOOL => Value::Bool(self.bool()?),
            id::STRING => Value::String(self.text()?),
            id::ARRAY => Value::Array(self.values()?),
            id::U64 => Value::U64(self.u64()?),
            id::I64 => Value::I64(self.array().map(i64::from_le_bytes)?),
            id::F64 => Value::F64(self.array().map(f64::from_le_bytes)?),
            other => return Err(format!("byte {start}: no type of a value is {other}")),
        })
    }

    /// An array after its type: the type of its elements, their number, and they.
    fn values(&mut self) -> Result<Array> {
        let start = self.at;
        Ok(match self.u32()? {
            id::U8 => Array::U8(self.each(1, |h| h.array().map(u8::from_le_bytes))?),
            id::I8 => Array::I8(self.each(1, |h| h.array().map(i8::from_le_bytes))?),
            id::U16 => Array::U16(self.each(2, |h| h.array().map(u16::from_le_bytes))?),
            id::I16 => Array::I16(self.each(2, |h| h.array().map(i16::from_le_bytes))?),
            id::U32 => Array::U32(self.each(4, Self::u32)?),
            id::I32 => Array::I32(self.each(4, |h| h.array().map(i32::from_le_bytes))?),
            id::F32 => Array::F32(self.each(4, |h| h.array().map(f32::from_le_bytes))?),
            id::BOOL => Array::Bool(self.each(1, Self::bool)?),
            id::STRING => Array::String(self.each(8, Self::text)?),
            id::U64 => Array::U64(self.each(8, Self::u64)?),
            id::I64 => Array::I64(self.each(8, |h| h.array().map(i64::from_le_bytes))?),
            id::F64 => Array::F64(self.each(8, |h| h.array().map(f64::from_le_bytes))?),
            id::ARRAY => return Err(format!("byte {start}: an array of arrays is not read")),
            other => return Err(format!("byte {start}: no type of a value is {other}")),
        })
    }

    /// Elements of at least `least` bytes each after their number.
    fn each<T>(&mut self, least: u64, read: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let start = self.at;
        let n = self.u64()?;
        if n.checked_mul(least).is_none_or(|bytes| bytes > self.left()) {
            return Err(format!(
                "byte {start}: an array claims {n} elements in the {} bytes that are left",
                self.left()
            ));
        }
        let mut values = Vec::with_capacity(RESERVED.min(n as usize));
        for _ in 0..n {
            values.push(read(self)?);
        }
        Ok(values)
    }
}

/// Appends a text.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Appends a value with its type.
pub(super) fn put_value(out: &mut Vec<u8>, value: &Value) {
    fn put(out: &mut Vec<u8>, id: u32, bytes: impl AsRef<[u8]>) {
        out.extend(id.to_le_bytes());
        out.extend(bytes.as_ref());
    }
    match value {
        Value::U8(value) => put(out, id::U8, value.to_le_bytes()),
        Value::I8(value) => put(out, id::I8, value.to_le_bytes()),
        Value::U16(value) => put(out, id::U16, value.to_le_bytes()),
        Value::I16(value) => put(out, id::I16, value.to_le_bytes()),
        Value::U32(value) => put(out, id::U32, value.to_le_bytes()),
        Value::I32(value) => put(out, id::I32, value.to_le_bytes()),
        Value::F32(value) => put(out, id::F32, value.to_le_bytes()),
        Value::Bool(value) => put(out, id::BOOL, [u8::from(*value)]),
        Value::U64(value) => put(out, id::U64, value.to_le_bytes()),
        Value::I64(value) => put(out, id::I64, value.to_le_bytes()),
        Value::F64(value) => put(out, id::F64, value.to_le_bytes()),
        Value::String(text) => {
            put(out, id::STRING, []);
            put_text(out, text);
        }
        Value::Array(values) => {
            put(out, id::ARRAY, []);
            put_values(out, values);
        }
    }
}

fn put_values(out: &mut Vec<u8>, values: &Array) {
    fn put<T, B: AsRef<[u8]>>(out: &mut Vec<u8>, id: u32, values: &[T], bytes: impl Fn(&T) -> B) {
        out.extend(id.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        for value in values {
            out.extend(bytes(value).as_ref());
        }
    }
    match values {
        Array::U8(values) => put(out, id::U8, values, |v| v.to_le_bytes()),
        Array::I8(values) => put(out, id::I8, values, |v| v.to_le_bytes()),
        Array::U16(values) => put(out, id::U16, values, |v| v.to_le_bytes()),
        Array::I16(values) => put(out, id::I16, values, |v| v.to_le_bytes()),
        Array::U32(values) => put(out, id::U32, values, |v| v.to_le_bytes()),
        Array::I32(values) => put(out, id::I32, values, |v| v.to_le_bytes()),
        Array::F32(values) => put(out, id::F32, values, |v| v.to_le_bytes()),
        Array::Bool(values) => put(out, id::BOOL, values, |&v| [u8::from(v)]),
        Array::U64(values) => put(out, id::U64, values, |v| v.to_le_bytes()),
        Array::I64(values) => put(out, id::I64, values, |v| v.to_le_bytes()),
        Array::F64(values) => put(out, id::F64, values, |v| v.to_le_bytes()),
        Array::String(values) => {
            put(out, id::STRING, values, |text| {
                let mut bytes = Vec::with_capacity(8 + text.len());
                put_text(&mut bytes, text);
                bytes
            });
        }
    }
}
