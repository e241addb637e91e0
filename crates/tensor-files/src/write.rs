use std::borrow::Cow;
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, View};

use crate::Result;
use crate::directory::staging_name;
use crate::error::{io as io_error, refuse};

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

/// Writes a safetensors file, one tensor in memory at a time.
///
/// The header comes first in the file, and tensors in the order of their types. Floats whose type
/// depends on their values are therefore computed first and kept in a hidden file beside it until
/// their turn comes.
///
/// # Errors
/// [`Error::File`](crate::Error::File) or [`Error::Io`](crate::Error::Io) if it cannot be written.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, LazyTensor<'a>)>,
) -> Result<()> {
    // It goes through a temporary file, which none but its owner may read; others may read this one
    // as they may any new file.
    let permissions = File::create(path).and_then(|file| file.metadata());
    let permissions = permissions
        .map_err(|source| io_error(path, source))?
        .permissions();
    let mut kept = Kept::new(path);
    let mut typed = Vec::new();
    for (name, LazyTensor { shape, values }) in tensors {
        let (dtype, bytes) = match values {
            Values::Bytes(dtype, bytes) => (dtype, Bytes::Made(Cell::new(Some(bytes)))),
            Values::Shortest(values) => {
                let values = values();
                let float = FloatType::shortest(&values);
                let bytes = float.to_bytes(&values);
                let start = kept.append(&bytes);
                let start = start.map_err(|source| io_error(&kept.path, source))?;
                (float.dtype(), Bytes::Kept(start))
            }
        };
        typed.push((name, dtype, shape, bytes));
    }
    let failed = Cell::new(None);
    let views = typed.into_iter().map(|(name, dtype, shape, bytes)| {
        let view = Typed {
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
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|error| refuse(path, error.to_string()))?;
    if let Some(source) = failed.take() {
        return Err(io_error(&kept.path, source));
    }
    fs::set_permissions(path, permissions).map_err(|source| io_error(path, source))
}

/// Tensors whose type is known, in a file that is removed in the end.
struct Kept {
    path: PathBuf,
    file: Option<File>,
    n_bytes: u64,
}

impl Kept {
    fn new(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default();
        Self {
            path: path.with_file_name(staging_name(name, 1)),
            file: None,
            n_bytes: 0,
        }
    }

    /// Appends a tensor, and returns where it starts.
    fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let new = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(&self.path)?;
                none.insert(new)
            }
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

impl Drop for Kept {
    fn drop(&mut self) {
        if self.file.is_some() {
            // A leftover is hidden and harmless.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A tensor whose type is known.
struct Typed<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes<'a>,
    kept: &'a Kept,
    failed: &'a Cell<Option<io::Error>>,
}

enum Bytes<'a> {
    Made(Cell<Option<Compute<'a, u8>>>),
    /// From this byte of [`Kept`] on.
    Kept(u64),
}

impl View for Typed<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// It is asked for once.
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = match &self.bytes {
            Bytes::Made(bytes) => bytes.take().map(|bytes| bytes()).unwrap_or_default(),
            Bytes::Kept(start) => {
                let bytes = self.kept.read(*start, self.data_len());
                bytes.unwrap_or_else(|error| {
                    self.failed.set(Some(error));
                    vec![0; self.data_len()]
                })
            }
        };
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
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
