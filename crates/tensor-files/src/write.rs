use std::borrow::Cow;
use std::cell::{Cell, OnceCell};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use half::{bf16, f16};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, View};

use crate::directory::{parent, sync_file};
use crate::error::{io as io_error, refuse};
use crate::staging::published;
use crate::{Error, Result};

/// A tensor to be written, whose values are computed once, when it is written.
pub struct LazyTensor<'a> {
    shape: Vec<usize>,
    values: Values<'a>,
}

type Compute<'a, T> = Box<dyn FnOnce() -> Vec<T> + 'a>;

enum Values<'a> {
    /// Floats whose type depends on their values.
    Shortest(Compute<'a, f32>),
    Bytes(Dtype, Compute<'a, u8>),
}

impl<'a> LazyTensor<'a> {
    /// Floats in the shortest of `bf16`, `f16` and `f32` that holds every one of them exactly.
    pub fn floats<const D: usize>(
        shape: [usize; D],
        values: impl FnOnce() -> Vec<f32> + 'a,
    ) -> Self {
        Self {
            shape: shape.into(),
            values: Values::Shortest(Box::new(values)),
        }
    }

    /// Floats of one type, rounded where it does not hold them.
    pub fn floats_as<const D: usize>(
        float: FloatType,
        shape: [usize; D],
        values: impl FnOnce() -> Vec<f32> + 'a,
    ) -> Self {
        Self::of(float.dtype(), shape, move || float.to_bytes(&values()))
    }

    /// Bytes, as `U8`.
    pub fn bytes<const D: usize>(shape: [usize; D], values: impl FnOnce() -> Vec<u8> + 'a) -> Self {
        Self::of(Dtype::U8, shape, values)
    }

    /// Words of 32 bits, as `I32`, the type of GPTQ's `qweight`.
    pub fn words<const D: usize>(
        shape: [usize; D],
        values: impl FnOnce() -> Vec<u32> + 'a,
    ) -> Self {
        Self::of(Dtype::I32, shape, move || {
            let words = values().into_iter();
            words.flat_map(u32::to_le_bytes).collect()
        })
    }

    /// Floats that are stored already.
    pub(crate) fn stored<const D: usize>(
        float: FloatType,
        shape: [usize; D],
        bytes: Vec<u8>,
    ) -> Self {
        Self::of(float.dtype(), shape, move || bytes)
    }

    fn of<const D: usize>(
        dtype: Dtype,
        shape: [usize; D],
        bytes: impl FnOnce() -> Vec<u8> + 'a,
    ) -> Self {
        Self {
            shape: shape.into(),
            values: Values::Bytes(dtype, Box::new(bytes)),
        }
    }
}

/// A type of float in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// 8 bits of exponent, 23 of fraction.
    F32,
    /// 5 bits of exponent, 10 of fraction.
    F16,
    /// 8 bits of exponent, 7 of fraction.
    Bf16,
}

impl FloatType {
    /// The nearest value of this type; infinite beyond its range.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Whether it holds a value exactly.
    pub fn holds(self, value: f32) -> bool {
        self.round(value).to_bits() == value.to_bits()
    }

    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Whether all of the stored values are so; it looks at them in order, up to the first that is not.
    pub(crate) fn all(self, bytes: &[u8], mut is: impl FnMut(f32) -> bool) -> bool {
        match self {
            Self::F32 => {
                let (values, _) = bytes.as_chunks();
                values.iter().all(|&value| is(f32::from_le_bytes(value)))
            }
            Self::F16 => {
                let (values, _) = bytes.as_chunks();
                let mut values = values.iter().map(|&value| f16::from_le_bytes(value));
                values.all(|value| is(value.to_f32()))
            }
            Self::Bf16 => {
                let (values, _) = bytes.as_chunks();
                let mut values = values.iter().map(|&value| bf16::from_le_bytes(value));
                values.all(|value| is(value.to_f32()))
            }
        }
    }

    /// Stored values in another type, which holds them.
    pub(crate) fn reencode(self, bytes: Vec<u8>, to: Self) -> Vec<u8> {
        if self == to {
            return bytes;
        }
        let mut stored = Vec::with_capacity(bytes.len() / self.size() * to.size());
        // A part at a time: all values in `f32` would take twice the bytes.
        for part in bytes.chunks(self.size() << 16) {
            let mut values = Vec::with_capacity(1 << 16);
            self.all(part, |value| {
                values.push(value);
                true
            });
            stored.extend(to.to_bytes(&values));
        }
        stored
    }

    fn shortest(values: &[f32]) -> Self {
        let holds_all = |float: &Self| values.iter().all(|&value| float.holds(value));
        let short = [Self::Bf16, Self::F16].into_iter().find(holds_all);
        short.unwrap_or(Self::F32)
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    fn to_bytes(self, values: &[f32]) -> Vec<u8> {
        let values = values.iter();
        match self {
            Self::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values
                .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
                .collect(),
        }
    }
}

/// Writes a safetensors file, one tensor in memory at a time, and flushes it to the disk.
///
/// Tensors are ordered by type, and the header states all types. Floats whose type depends on their
/// values are therefore computed first and kept in a temporary file. Those floats take their size on
/// the disk twice while the file is written.
///
/// An existing file is lost on an error; [`write_directory`](crate::write_directory) publishes
/// atomically.
///
/// # Errors
/// [`Error::Tensor`] if a tensor has another number of values than its shape takes, [`Error::File`]
/// or [`Error::Io`] if the file cannot be written. No file is left then.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, LazyTensor<'a>)>,
) -> Result<()> {
    // safetensors replaces the file by a temporary one, which only its owner may read; others may
    // read this one as they may any new file.
    let permissions = File::create(path).and_then(|file| file.metadata());
    let permissions = permissions
        .map_err(|cause| io_error(path, cause))?
        .permissions();
    let written = write(path, tensors).and_then(|()| {
        let set = fs::set_permissions(path, permissions);
        set.map_err(|cause| io_error(path, cause))?;
        sync_file(path)
    });
    if written.is_err() {
        // What failed is already the error.
        let _ = fs::remove_file(path);
    }
    written
}

fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, LazyTensor<'a>)>,
) -> Result<()> {
    let mut kept = Kept::default();
    let mut typed = Vec::new();
    for (name, LazyTensor { shape, values }) in tensors {
        let (dtype, bytes) = match values {
            Values::Bytes(dtype, bytes) => (dtype, Bytes::Made(Cell::new(Some(bytes)))),
            Values::Shortest(values) => {
                let values = values();
                let dtype = FloatType::shortest(&values);
                let bytes = dtype.to_bytes(&values);
                let dtype = dtype.dtype();
                check_len(path, &name, &bytes, n_bytes(&shape, dtype))?;
                let start = kept.append(path, &bytes);
                let start = start.map_err(|cause| io_error(path, cause))?;
                (dtype, Bytes::Kept(start))
            }
        };
        typed.push((name, dtype, shape, bytes));
    }
    let failed = OnceCell::new();
    let views = typed.into_iter().map(|(name, dtype, shape, bytes)| {
        let view = Typed {
            path,
            name: name.clone(),
            dtype,
            shape,
            bytes,
            kept: &kept,
            failed: &failed,
        };
        (name, view)
    });
    // transformers asks for this entry.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let written = safetensors::serialize_to_file(views, Some(metadata), path);
    written.map_err(|error| match error {
        SafeTensorError::IoError(cause) => io_error(path, cause),
        other => refuse(path, other.to_string()),
    })?;
    failed.into_inner().map_or(Ok(()), Err)
}

fn n_bytes(shape: &[usize], dtype: Dtype) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

fn check_len(path: &Path, tensor: &str, bytes: &[u8], expected: usize) -> Result<()> {
    if bytes.len() == expected {
        return Ok(());
    }
    Err(Error::Tensor {
        path: published(path),
        tensor: tensor.into(),
        problem: format!(
            "has {} bytes of values, but its shape takes {expected}",
            bytes.len()
        ),
    })
}

/// Tensors whose type is known, in a temporary file without a name.
#[derive(Default)]
struct Kept {
    file: Option<File>,
    n_bytes: u64,
}

impl Kept {
    /// Appends a tensor of the file at `path`, and returns where it starts.
    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<u64> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(parent(path))?),
        };
        file.write_all(bytes)?;
        let start = self.n_bytes;
        self.n_bytes += bytes.len() as u64;
        Ok(start)
    }

    fn read(&self, start: u64, n_bytes: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; n_bytes];
        if let Some(mut file) = self.file.as_ref() {
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(&mut bytes)?;
        }
        Ok(bytes)
    }
}

/// A tensor whose type is known.
struct Typed<'a> {
    path: &'a Path,
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes<'a>,
    kept: &'a Kept,
    /// The first error of all tensors.
    failed: &'a OnceCell<Error>,
}

enum Bytes<'a> {
    Made(Cell<Option<Compute<'a, u8>>>),
    /// From this byte of [`Kept`] on.
    Kept(u64),
}

impl Typed<'_> {
    fn bytes(&self) -> Result<Vec<u8>> {
        match &self.bytes {
            Bytes::Made(bytes) => {
                let bytes = bytes.take().map(|bytes| bytes()).unwrap_or_default();
                check_len(self.path, &self.name, &bytes, self.data_len())?;
                Ok(bytes)
            }
            Bytes::Kept(start) => {
                let bytes = self.kept.read(*start, self.data_len());
                bytes.map_err(|cause| io_error(self.path, cause))
            }
        }
    }
}

impl View for Typed<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// safetensors calls this once per tensor.
    fn data(&self) -> Cow<'_, [u8]> {
        if self.failed.get().is_some() {
            return Cow::default();
        }
        let bytes = self.bytes().unwrap_or_else(|error| {
            // The file is removed in the end: it may be incomplete.
            self.failed.get_or_init(|| error);
            Vec::new()
        });
        bytes.into()
    }

    fn data_len(&self) -> usize {
        n_bytes(&self.shape, self.dtype)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::TensorFile;

    #[test]
    fn values_are_computed_once_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tensors.safetensors");
        let all = [
            ("bf16", vec![0.5, -2.0]),
            ("f32", vec![0.1, 1.0]),
            ("f16", vec![1.0, 1025.0 / 1024.0]),
            ("rounded", vec![0.1, 1.0]),
        ];
        let counts: Vec<Cell<usize>> = all.iter().map(|_| Cell::new(0)).collect();
        let tensors = all.iter().zip(&counts).map(|((name, values), count)| {
            let values = || {
                count.set(count.get() + 1);
                values.clone()
            };
            let tensor = match *name {
                "rounded" => LazyTensor::floats_as(FloatType::Bf16, [2], values),
                _ => LazyTensor::floats([2], values),
            };
            (name.to_string(), tensor)
        });
        write_tensors(&path, tensors).unwrap();
        assert!(counts.iter().all(|count| count.get() == 1));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        let mut file = TensorFile::open(&path).unwrap();
        for (name, values) in &all[..3] {
            assert_eq!(&file.floats::<1>(name).unwrap().0, values, "{name}");
        }
        let (rounded, _) = file.floats::<1>("rounded").unwrap();
        assert_eq!(rounded[0], FloatType::Bf16.round(0.1));
        let bytes = fs::read(&path).unwrap();
        let header = safetensors::SafeTensors::read_metadata(&bytes).unwrap().1;
        let types: BTreeMap<String, Dtype> = header
            .tensors()
            .into_iter()
            .map(|(name, info)| (name, info.dtype))
            .collect();
        let expected = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::BF16];
        assert_eq!(types.into_values().collect::<Vec<_>>(), expected);
    }
}
