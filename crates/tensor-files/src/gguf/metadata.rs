/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// 8 bits without a sign.
    U8(u8),
    /// 8 bits.
    I8(i8),
    /// 16 bits without a sign.
    U16(u16),
    /// 16 bits.
    I16(i16),
    /// 32 bits without a sign.
    U32(u32),
    /// 32 bits.
    I32(i32),
    /// A float of 32 bits.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// A text.
    String(String),
    /// Several values of one type.
    Array(Array),
    /// 64 bits without a sign.
    U64(u64),
    /// 64 bits.
    I64(i64),
    /// A float of 64 bits.
    F64(f64),
}

/// Several values of one type. Arrays of arrays are not read.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// 8 bits without a sign.
    U8(Vec<u8>),
    /// 8 bits.
    I8(Vec<i8>),
    /// 16 bits without a sign.
    U16(Vec<u16>),
    /// 16 bits.
    I16(Vec<i16>),
    /// 32 bits without a sign.
    U32(Vec<u32>),
    /// 32 bits.
    I32(Vec<i32>),
    /// Floats of 32 bits.
    F32(Vec<f32>),
    /// True or false.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// 64 bits without a sign.
    U64(Vec<u64>),
    /// 64 bits.
    I64(Vec<i64>),
    /// Floats of 64 bits.
    F64(Vec<f64>),
}

impl Value {
    /// A whole number of any width, unless it is negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// A float of any width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }

    /// True or false.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// Texts.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(Array::String(texts)) => Some(texts),
            _ => None,
        }
    }
}

/// The numbers of the types in files.
pub(super) mod id {
    pub(in super::super) const U8: u32 = 0;
    pub(in super::super) const I8: u32 = 1;
    pub(in super::super) const U16: u32 = 2;
    pub(in super::super) const I16: u32 = 3;
    pub(in super::super) const U32: u32 = 4;
    pub(in super::super) const I32: u32 = 5;
    pub(in super::super) const F32: u32 = 6;
    pub(in super::super) const BOOL: u32 = 7;
    pub(in super::super) const STRING: u32 = 8;
    pub(in super::super) const ARRAY: u32 = 9;
    pub(in super::super) const U64: u32 = 10;
    pub(in super::super) const I64: u32 = 11;
    pub(in super::super) const F64: u32 = 12;
}
