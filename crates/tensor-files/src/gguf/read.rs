use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::header::{Header, Result as Parsed};
use super::{ALIGNMENT, BlockType, DEFAULT_ALIGNMENT, MAGIC, Value};
use crate::document::{IMPOSTOR_BYTES, impostor, open};
use crate::error::{io, refuse};
use crate::{Error, Result};

/// The most dimensions of a tensor: the limit of the format.
const MAX_DIMS: u32 = 4;

/// A GGUF file, read tensor by tensor. Its sizes are checked against the file when opened.
///
/// # Examples
/// ```
/// use tensor_files::gguf::{BlockType, GgufFile, GgufTensor, Value, write_gguf};
///
/// let dir = tempfile::tempdir().expect("a temporary directory");
/// let path = dir.path().join("model.gguf");
/// let metadata = [("general.architecture".into(), Value::String("llama".into()))];
/// let bytes = BlockType::F16.floats(&[0.5, -1.0]).expect("a type of float");
/// let tensor = GgufTensor::new(BlockType::F16, [1, 2], || bytes);
/// write_gguf(&path, &metadata, [("weight".into(), tensor)])?;
///
/// let mut file = GgufFile::open(&path)?;
/// assert_eq!(file.metadata()["general.architecture"].as_str(), Some("llama"));
/// assert_eq!(file.values("weight", [1, 2])?, [0.5, -1.0]);
/// assert!(file.values("bias", [2]).is_err());
/// # Ok::<(), tensor_files::Error>(())
/// ```
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Info>,
    data_start: u64,
}

/// A tensor of a header.
#[derive(Debug)]
struct Info {
    of: BlockType,
    /// The contiguous dimension last.
    shape: Vec<usize>,
    /// From the beginning of the data.
    offset: u64,
    n_bytes: usize,
}

impl GgufFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::File`] if it is truncated, of another version or byte
    /// order, or not a GGUF file at all; [`Error::Tensor`] for a tensor of a type that is not read, or one
    /// that does not lie in the file.
    pub fn open(path: &Path) -> Result<Self> {
        let (mut file, n_bytes) = open(path)?;
        let mut start = Vec::new();
        (&mut file)
            .take(IMPOSTOR_BYTES)
            .read_to_end(&mut start)
            .and_then(|_| file.seek(SeekFrom::Start(0)))
            .map_err(|cause| io(path, cause))?;
        if let Some(problem) = impostor(&start) {
            return Err(refuse(path, problem.into()));
        }
        let mut header = Header::new(BufReader::new(&file), n_bytes);
        let (metadata, infos) = parse(&mut header).map_err(|problem| refuse(path, problem))?;
        let end = header.at();
        let alignment = match metadata.get(ALIGNMENT) {
            None => DEFAULT_ALIGNMENT,
            Some(value) => {
                let stated = value.as_u64().filter(|&n| n > 0 && n.is_multiple_of(8));
                stated.ok_or_else(|| {
                    let problem = format!("{ALIGNMENT} is no positive multiple of 8");
                    refuse(path, problem)
                })?
            }
        };
        let data_start = end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        let mut opened = Self {
            path: path.into(),
            file,
            metadata,
            tensors: BTreeMap::new(),
            data_start,
        };
        opened.place(infos, n_bytes.saturating_sub(data_start), alignment)?;
        Ok(opened)
    }

    /// Checks where tensors lie in `n_bytes` of data.
    fn place(&mut self, infos: Vec<Raw>, n_bytes: u64, alignment: u64) -> Result<()> {
        let mut spans = Vec::with_capacity(infos.len());
        for raw in infos {
            let refuse = |problem| self.refuse(&raw.name, problem);
            let of = BlockType::of_id(raw.id)
                .map_err(|name| refuse(format!("is of the type {name}, which is not read")))?;
            let mut shape = Vec::with_capacity(raw.dims.len());
            let mut n_values = 1usize;
            for &dim in &raw.dims {
                let dim = usize::try_from(dim).ok().filter(|&dim| dim > 0);
                let product = dim.and_then(|dim| n_values.checked_mul(dim));
                let (Some(dim), Some(product)) = (dim, product) else {
                    return Err(refuse(format!("has the dimensions {:?}", raw.dims)));
                };
                n_values = product;
                shape.push(dim);
            }
            // Blocks do not cross rows.
            let row = shape.first().copied().unwrap_or(1);
            if !row.is_multiple_of(of.block_len()) {
                return Err(refuse(format!(
                    "has rows of {row} values in blocks of {}",
                    of.block_len()
                )));
            }
            let tensor_bytes = of.n_bytes(n_values);
            let end = tensor_bytes.and_then(|n| raw.offset.checked_add(n as u64));
            let (Some(tensor_bytes), Some(end)) = (tensor_bytes, end.filter(|&end| end <= n_bytes))
            else {
                return Err(refuse(format!(
                    "begins at {} in {n_bytes} bytes of data, which do not hold {:?} values of {of}: truncated or damaged; fetch it again",
                    raw.offset, raw.dims
                )));
            };
            if !raw.offset.is_multiple_of(alignment) {
                let problem = format!("begins at {}, not at a multiple of {alignment}", raw.offset);
                return Err(refuse(problem));
            }
            shape.reverse();
            spans.push((raw.offset, end, raw.name.clone()));
            let info = Info {
                of,
                shape,
                offset: raw.offset,
                n_bytes: tensor_bytes,
            };
            if self.tensors.insert(raw.name.clone(), info).is_some() {
                return Err(self.refuse(&raw.name, "occurs twice".into()));
            }
        }
        spans.sort_unstable();
        let overlap = spans.windows(2).find(|pair| pair[1].0 < pair[0].1);
        match overlap {
            None => Ok(()),
            Some(pair) => {
                let problem = format!("overlaps with `{}`", pair[0].2);
                Err(self.refuse(&pair[1].2, problem))
            }
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata by their keys.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// Takes the metadata out of the file.
    pub fn take_metadata(&mut self) -> BTreeMap<String, Value> {
        std::mem::take(&mut self.metadata)
    }

    /// The names of the tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The type of a tensor, if the file has it.
    pub fn block_type(&self, name: &str) -> Option<BlockType> {
        Some(self.tensors.get(name)?.of)
    }

    /// The shape of a tensor, the contiguous dimension last.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.tensors.get(name)?.shape)
    }

    /// The bytes of a tensor of these dimensions, row by row.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for other dimensions; [`Error::Io`].
    pub fn bytes<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<(BlockType, Vec<u8>)> {
        let Some(info) = self.tensors.get(name) else {
            return Err(Error::MissingTensor {
                path: self.path.clone(),
                tensor: name.into(),
            });
        };
        if info.shape != expected {
            let problem = format!(
                "has the shape {:?}, the configuration asks for {expected:?}",
                info.shape
            );
            return Err(self.refuse(name, problem));
        }
        // Checked against the file's length when it was opened.
        let mut bytes = vec![0; info.n_bytes];
        let (of, start) = (info.of, self.data_start + info.offset);
        self.file
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|cause| io(&self.path, cause))?;
        Ok((of, bytes))
    }

    /// The values of a tensor of these dimensions, row by row.
    ///
    /// # Errors
    /// As [`GgufFile::bytes`]; [`Error::Tensor`] if a value is not finite.
    pub fn values<const D: usize>(&mut self, name: &str, expected: [usize; D]) -> Result<Vec<f32>> {
        let (of, bytes) = self.bytes(name, expected)?;
        let values = of.values(&bytes);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let count = values.iter().filter(|value| !value.is_finite()).count();
                let problem = format!(
                    "element {at} is {}; non-finite elements in all: {count}",
                    values[at]
                );
                Err(self.refuse(name, problem))
            }
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

/// A tensor as the header states it.
struct Raw {
    name: String,
    /// The contiguous dimension first.
    dims: Vec<u64>,
    id: u32,
    offset: u64,
}

fn parse<R: Read>(header: &mut Header<R>) -> Parsed<(BTreeMap<String, Value>, Vec<Raw>)> {
    if header.array::<4>()? != MAGIC {
        return Err("does not begin with `GGUF`: it is no GGUF file".into());
    }
    match header.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() < 1 << 16 && version > 1 << 16 => {
            return Err("is in big-endian order, which is not read".into());
        }
        version => {
            return Err(format!(
                "is of version {version} of the format; versions 2 and 3 are read"
            ));
        }
    }
    let (n_tensors, n_metadata) = (header.u64()?, header.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..n_metadata {
        let key = header.text()?;
        let value = header
            .value()
            .map_err(|problem| format!("`{key}`: {problem}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("`{key}` occurs twice in its metadata"));
        }
    }
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        let name = header.text()?;
        let n_dims = header.u32()?;
        if n_dims > MAX_DIMS {
            return Err(format!(
                "the tensor `{name}` has {n_dims} dimensions; the format allows {MAX_DIMS}"
            ));
        }
        let dims = (0..n_dims)
            .map(|_| header.u64())
            .collect::<Parsed<Vec<_>>>()?;
        tensors.push(Raw {
            name,
            dims,
            id: header.u32()?,
            offset: header.u64()?,
        });
    }
    Ok((metadata, tensors))
}
