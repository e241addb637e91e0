use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::document::{IMPOSTOR_BYTES, impostor, open};
use crate::error::{io, refuse};
use crate::sums::hash;
use crate::{Error, FloatType, LazyTensor, Result};

/// Headers above this are not read: the limit of the safetensors format.
const MAX_HEADER: u64 = 100_000_000;

/// A safetensors file, read tensor by tensor. Its sizes are checked against the file when opened.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::File`] if it is truncated, too long, or not a
    /// safetensors file at all.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |problem: String| refuse(path, problem);
        let (mut file, n_bytes) = open(path)?;
        let mut start = Vec::new();
        (&mut file)
            .take(IMPOSTOR_BYTES)
            .read_to_end(&mut start)
            .map_err(|cause| io(path, cause))?;
        if let Some(problem) = impostor(&start) {
            return Err(refuse(problem.into()));
        }
        let Some((start, _)) = start.split_first_chunk::<8>() else {
            return Err(refuse(format!(
                "{n_bytes} bytes are not a safetensors file; fetch it again"
            )));
        };
        let n_header = u64::from_le_bytes(*start);
        if n_header.checked_add(8).is_none_or(|end| end > n_bytes) {
            return Err(refuse(format!(
                "claims a header of {n_header} bytes in a file of {n_bytes}: truncated, or not a safetensors file"
            )));
        }
        if n_header > MAX_HEADER {
            return Err(refuse(format!(
                "has a header of {n_header} bytes; the format allows {MAX_HEADER}"
            )));
        }
        let mut header = vec![0; n_header as usize];
        file.seek(SeekFrom::Start(8))
            .and_then(|_| file.read_exact(&mut header))
            .map_err(|cause| io(path, cause))?;
        if !header.starts_with(b"{") {
            return Err(refuse("its header does not begin with `{`".into()));
        }
        let Header(metadata) = serde_json::from_slice(&header)
            .map_err(|error| refuse(format!("its header is not a safetensors header: {error}")))?;
        let data_start = 8 + n_header;
        let claimed = data_start.checked_add(metadata.data_len() as u64);
        if claimed != Some(n_bytes) {
            let claimed = claimed.map_or("more".into(), |n| n.to_string());
            return Err(refuse(format!(
                "its header describes {claimed} bytes, the file has {n_bytes}: truncated or damaged; fetch it again"
            )));
        }
        Ok(Self {
            path: path.into(),
            file,
            metadata,
            data_start,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the tensors, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort();
        names
    }

    /// The bytes of a tensor, from the header.
    pub fn n_bytes_of(&self, name: &str) -> Option<u64> {
        let (start, end) = self.metadata.info(name)?.data_offsets;
        Some((end - start) as u64)
    }

    /// The bytes of all tensors.
    pub fn n_bytes(&self) -> u64 {
        self.metadata.data_len() as u64
    }

    /// Whether the file has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The shape of a tensor, from the header.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.metadata.info(name)?.shape)
    }

    /// The dtype of a tensor as the format names it, such as `BF16`, from the header.
    pub fn dtype(&self, name: &str) -> Option<String> {
        Some(format!("{:?}", self.metadata.info(name)?.dtype))
    }

    /// The bytes and the shape of a tensor as the file has them, whatever its dtype.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for another number of dimensions.
    pub fn stored<const D: usize>(&mut self, name: &str) -> Result<(Vec<u8>, [usize; D])> {
        let (_, shape, bytes) = self.read(name)?;
        Ok((bytes, shape))
    }

    /// The values and the shape of a tensor of `f32`, `f16` or `bf16`, row by row, in `f32`.
    ///
    /// # Errors
    /// As [`TensorFile::typed_floats`].
    pub fn floats<const D: usize>(&mut self, name: &str) -> Result<(Vec<f32>, [usize; D])> {
        let (values, shape) = self.typed_floats(name)?;
        Ok((values.into_f32(), shape))
    }

    /// The values and the shape of a tensor of floats, row by row, in the type that the file has.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for another dtype or number of dimensions, or
    /// if a value is not finite.
    pub fn typed_floats<const D: usize>(&mut self, name: &str) -> Result<(Floats, [usize; D])> {
        let (dtype, shape, bytes) = self.read(name)?;
        let (values, non_finite) = match dtype {
            Dtype::F32 => {
                let values = read_each(&bytes, f32::from_le_bytes);
                let found = non_finite(&values, |value| value);
                (Floats::F32(values), found)
            }
            Dtype::F16 => {
                let values = read_each(&bytes, f16::from_le_bytes);
                let found = non_finite(&values, f16::to_f32);
                (Floats::F16(values), found)
            }
            Dtype::BF16 => {
                let values = read_each(&bytes, bf16::from_le_bytes);
                let found = non_finite(&values, bf16::to_f32);
                (Floats::Bf16(values), found)
            }
            _ => return Err(self.refuse(name, format!("is {dtype:?}, not F32, F16 or BF16"))),
        };
        match non_finite {
            Some(problem) => Err(self.refuse(name, problem)),
            None => Ok((values, shape)),
        }
    }

    /// The values and the shape of a tensor of 32-bit integers, row by row.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for another dtype or number of dimensions.
    pub fn words<const D: usize>(&mut self, name: &str) -> Result<(Vec<u32>, [usize; D])> {
        let (dtype, shape, bytes) = self.read(name)?;
        match dtype {
            Dtype::U32 | Dtype::I32 => Ok((read_each(&bytes, u32::from_le_bytes), shape)),
            _ => Err(self.refuse(name, format!("is {dtype:?}, not I32 or U32"))),
        }
    }

    /// The values and the shape of a tensor of bytes, row by row.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for another dtype or number of dimensions.
    pub fn bytes<const D: usize>(&mut self, name: &str) -> Result<(Vec<u8>, [usize; D])> {
        let (dtype, shape, bytes) = self.read(name)?;
        match dtype {
            Dtype::U8 => Ok((bytes, shape)),
            _ => Err(self.refuse(name, format!("is {dtype:?}, not U8"))),
        }
    }

    /// A tensor of floats to be written as it is, in the shortest of `bf16`, `f16` and `f32` that holds all its
    /// values, without a copy of them in `f32`.
    ///
    /// # Errors
    /// As [`TensorFile::floats`].
    pub fn copy<const D: usize>(
        &mut self,
        name: &str,
    ) -> Result<(LazyTensor<'static>, [usize; D])> {
        let (dtype, shape, bytes) = self.read(name)?;
        let float = match dtype {
            Dtype::F32 => FloatType::F32,
            Dtype::F16 => FloatType::F16,
            Dtype::BF16 => FloatType::Bf16,
            _ => return Err(self.refuse(name, format!("is {dtype:?}, not F32, F16 or BF16"))),
        };
        if !float.all(&bytes, f32::is_finite) {
            // For the message.
            self.floats::<D>(name)?;
        }
        let types = [FloatType::Bf16, FloatType::F16];
        let shorter = types
            .into_iter()
            .find(|&shorter| shorter == float || float.all(&bytes, |value| shorter.holds(value)));
        let to = shorter.unwrap_or(float);
        Ok((
            LazyTensor::stored(to, shape, float.reencode(bytes, to)),
            shape,
        ))
    }

    /// The SHA-256 of the bytes of a tensor, in hexadecimal.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::Io`].
    pub fn sha256(&mut self, name: &str) -> Result<String> {
        let Some(info) = self.metadata.info(name) else {
            return Err(Error::MissingTensor {
                path: self.path.clone(),
                tensor: name.into(),
            });
        };
        let (start, end) = info.data_offsets;
        let hashed = self
            .file
            .seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| hash((&mut self.file).take((end - start) as u64)));
        hashed.map_err(|cause| io(&self.path, cause))
    }

    /// The SHA-256 of the length of the file and of its header, which names all tensors, in hexadecimal.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn header_sha256(&mut self) -> Result<String> {
        let length = self.data_start + self.metadata.data_len() as u64;
        let length = length.to_le_bytes();
        let hashed = self
            .file
            .rewind()
            .and_then(|()| hash(length.chain((&mut self.file).take(self.data_start))));
        hashed.map_err(|cause| io(&self.path, cause))
    }

    fn read<const D: usize>(&mut self, name: &str) -> Result<(Dtype, [usize; D], Vec<u8>)> {
        let Some(info) = self.metadata.info(name) else {
            return Err(Error::MissingTensor {
                path: self.path.clone(),
                tensor: name.into(),
            });
        };
        let (dtype, (start, end)) = (info.dtype, info.data_offsets);
        let Ok(shape) = <[usize; D]>::try_from(info.shape.as_slice()) else {
            let problem = format!("has the shape {:?}, not {D} dimensions", info.shape);
            return Err(self.refuse(name, problem));
        };
        // Checked against the file's length when it was opened.
        let mut bytes = vec![0; end - start];
        self.file
            .seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|cause| io(&self.path, cause))?;
        Ok((dtype, shape, bytes))
    }

    /// Checks that the file has no tensor but those `expected`, which `config` lists.
    ///
    /// # Errors
    /// [`Error::Tensor`] with one that it does not.
    pub fn check_names(&self, expected: &[String], config: &str) -> Result<()> {
        let expected: HashSet<&String> = expected.iter().collect();
        let names = self.names();
        match names.iter().find(|name| !expected.contains(name)) {
            None => Ok(()),
            Some(extra) => Err(self.refuse(extra, format!("belongs to no layer of `{config}`"))),
        }
    }

    /// An error about one tensor of this file.
    pub fn refuse(&self, tensor: &str, problem: String) -> Error {
        Error::Tensor {
            path: self.path.clone(),
            tensor: tensor.into(),
            problem,
        }
    }
}

/// The values of a tensor, in the type that its file has.
#[derive(Clone, Debug, PartialEq)]
pub enum Floats {
    /// [`FloatType::F32`](crate::FloatType::F32).
    F32(Vec<f32>),
    /// [`FloatType::F16`](crate::FloatType::F16).
    F16(Vec<f16>),
    /// [`FloatType::Bf16`](crate::FloatType::Bf16).
    Bf16(Vec<bf16>),
}

impl Floats {
    /// The values in `f32`, which holds each exactly.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::F16(values) => values.into_iter().map(f16::to_f32).collect(),
            Self::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        }
    }
}

/// What is wrong with values of which some are not finite.
fn non_finite<T: Copy>(values: &[T], widen: impl Fn(T) -> f32) -> Option<String> {
    let is_not = |value: &T| !widen(*value).is_finite();
    let at = values.iter().position(is_not)?;
    let count = values.iter().filter(|value| is_not(value)).count();
    let value = widen(values[at]);
    Some(format!(
        "element {at} is {value}; non-finite elements in all: {count}"
    ))
}

fn read_each<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|&chunk| read(chunk)).collect()
}

/// The header of a safetensors file, in which each name comes once.
struct Header(Metadata);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("the tensors of a file")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut names, mut tensors) = (HashSet::new(), Vec::new());
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("`{name}` occurs twice")));
                    }
                    match name.as_str() {
                        "__metadata__" => metadata = map.next_value()?,
                        _ => tensors.push((name, map.next_value::<TensorInfo>()?)),
                    }
                }
                tensors.sort_by_key(|(_, info)| info.data_offsets);
                let metadata = Metadata::new(metadata, tensors);
                metadata.map(Header).map_err(A::Error::custom)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}
