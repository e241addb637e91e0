//! Safetensors files, JSON files and directories, read with checks and written atomically.
//!
//! | item | what it does |
//! |---|---|
//! | [`TensorFile`] | reads a safetensors file tensor by tensor |
//! | [`LazyTensor`], [`write_tensors`] | write one, with one tensor in memory at a time |
//! | [`read`], [`read_json`], [`write_json`] | the same for small files |
//! | [`write_directory`] | makes a directory that is complete under its name, or not there |

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo, View};
use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

mod error;

pub use error::{Error, Result};

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
    /// [`Error::Io`] if it cannot be read; [`Error::File`] if it is truncated, too long, or no
    /// safetensors file at all.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |problem: String| refuse(path, problem);
        let (mut file, n_bytes) = open(path)?;
        let mut start = Vec::new();
        (&mut file)
            .take(IMPOSTOR_BYTES)
            .read_to_end(&mut start)
            .map_err(|source| io(path, source))?;
        if let Some(problem) = impostor(&start) {
            return Err(refuse(problem.into()));
        }
        let Some((start, _)) = start.split_first_chunk::<8>() else {
            return Err(refuse(format!(
                "{n_bytes} bytes are no safetensors file; fetch it again"
            )));
        };
        let n_header = u64::from_le_bytes(*start);
        if n_header.checked_add(8).is_none_or(|end| end > n_bytes) {
            return Err(refuse(format!(
                "claims a header of {n_header} bytes in a file of {n_bytes}: truncated, or no safetensors file"
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
            .map_err(|source| io(path, source))?;
        if !header.starts_with(b"{") {
            return Err(refuse("its header does not begin with `{`".into()));
        }
        let Header(metadata) = serde_json::from_slice(&header)
            .map_err(|error| refuse(format!("its header is no safetensors header: {error}")))?;
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

    /// Whether the file has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The shape of a tensor, from the header.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.metadata.info(name)?.shape)
    }

    /// The values and the shape of a tensor of `f32`, `f16` or `bf16`, row by row.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Tensor`] for another dtype or number of dimensions, or
    /// if a value is not finite.
    pub fn floats<const D: usize>(&mut self, name: &str) -> Result<(Vec<f32>, [usize; D])> {
        let (dtype, shape, bytes) = self.read(name)?;
        let values: Vec<f32> = match dtype {
            Dtype::F32 => read_each(&bytes, f32::from_le_bytes),
            Dtype::F16 => read_each(&bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => read_each(&bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            _ => return Err(self.refuse(name, format!("is {dtype:?}, not F32, F16 or BF16"))),
        };
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let count = values.iter().filter(|value| !value.is_finite()).count();
            let value = values[at];
            let problem = format!("element {at} is {value}; non-finite elements in all: {count}");
            return Err(self.refuse(name, problem));
        }
        Ok((values, shape))
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
            .map_err(|source| io(&self.path, source))?;
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
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
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

/// Opens a regular file, and says how many bytes it has.
fn open(path: &Path) -> Result<(File, u64)> {
    // Before it is opened: opening a pipe waits for its other end.
    let info = fs::metadata(path).map_err(|source| io(path, source))?;
    if !info.is_file() {
        return Err(refuse(path, "is not a regular file".into()));
    }
    let file = File::open(path).map_err(|source| io(path, source))?;
    Ok((file, info.len()))
}

/// Bytes by which [`impostor`] knows a file.
const IMPOSTOR_BYTES: u64 = 512;

/// What stands in the place of a file, by its first bytes.
fn impostor(start: &[u8]) -> Option<&'static str> {
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
    let text = text.trim_ascii_start();
    let begins = |what: &[u8]| {
        let head = text.get(..what.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(what))
    };
    let has = |what: &[u8]| start.windows(what.len()).any(|part| part == what);
    if begins(b"version https://git-lfs") {
        Some("is a Git-LFS pointer, not the file itself; run `git lfs pull`")
    } else if begins(b"<!doctype html") || begins(b"<html") {
        Some("is a web page, not the file itself: fetch it again, with a login if it takes one")
    } else if has(b"/annex/objects/") {
        Some("is a git-annex link, not the file itself; run `git annex get`")
    } else if start.starts_with(b"PK\x03\x04") {
        Some("is a zip archive, as pickled weights are; convert it to safetensors")
    } else {
        None
    }
}

/// Whether there is something of this name, be it a link that leads nowhere: opening it says what is
/// wrong.
pub fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Reads a file that is held in memory whole.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] if it is no regular file, larger than a
/// configuration or a tokenizer can be, or a Git-LFS pointer, a web page or the like in place of it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    const MAX: u64 = 1 << 30;
    let (file, n_bytes) = open(path)?;
    let mut bytes = Vec::new();
    let most = file.take(MAX + 1).read_to_end(&mut bytes);
    most.map_err(|source| io(path, source))?;
    if bytes.len() as u64 > MAX {
        let problem = format!("has {n_bytes} bytes; files of this kind have at most {MAX}");
        return Err(refuse(path, problem));
    }
    match impostor(&bytes[..bytes.len().min(IMPOSTOR_BYTES as usize)]) {
        Some(problem) => Err(refuse(path, problem.into())),
        None => Ok(bytes),
    }
}

/// A tensor to be written, whose values are made when their turn comes.
pub struct LazyTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Box<dyn Fn() -> Vec<u8> + 'a>,
}

impl<'a> LazyTensor<'a> {
    /// Floats in the shortest of `bf16`, `f16` and `f32` that holds every one of them exactly.
    pub fn floats<const D: usize>(shape: [usize; D], values: impl Fn() -> Vec<f32> + 'a) -> Self {
        Self::floats_as(FloatType::shortest(&values()), shape, values)
    }

    /// Floats of one type, rounded where it does not hold them.
    pub fn floats_as<const D: usize>(
        float: FloatType,
        shape: [usize; D],
        values: impl Fn() -> Vec<f32> + 'a,
    ) -> Self {
        Self {
            dtype: match float {
                FloatType::F32 => Dtype::F32,
                FloatType::F16 => Dtype::F16,
                FloatType::Bf16 => Dtype::BF16,
            },
            shape: shape.into(),
            bytes: Box::new(move || {
                let values = values();
                let values = values.iter();
                match float {
                    FloatType::Bf16 => values
                        .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
                        .collect(),
                    FloatType::F16 => values
                        .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                        .collect(),
                    FloatType::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
                }
            }),
        }
    }

    /// The type of its values, if they are floats.
    pub fn float_type(&self) -> Option<FloatType> {
        match self.dtype {
            Dtype::F32 => Some(FloatType::F32),
            Dtype::F16 => Some(FloatType::F16),
            Dtype::BF16 => Some(FloatType::Bf16),
            _ => None,
        }
    }

    /// Bytes, as `U8`.
    pub fn bytes<const D: usize>(shape: [usize; D], values: impl Fn() -> Vec<u8> + 'a) -> Self {
        Self {
            dtype: Dtype::U8,
            shape: shape.into(),
            bytes: Box::new(values),
        }
    }

    /// Words of 32 bits, as `I32`, the type of GPTQ's `qweight`.
    pub fn words<const D: usize>(shape: [usize; D], values: impl Fn() -> Vec<u32> + 'a) -> Self {
        Self {
            dtype: Dtype::I32,
            shape: shape.into(),
            bytes: Box::new(move || {
                values()
                    .iter()
                    .flat_map(|word| word.to_le_bytes())
                    .collect()
            }),
        }
    }
}

/// The floats of a file.
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
    /// The nearest value that it has; infinite beyond its range.
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
}

impl View for LazyTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (self.bytes)().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a safetensors file, one tensor in memory at a time.
///
/// # Errors
/// [`Error::File`] if it cannot be written.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, LazyTensor<'a>)>,
) -> Result<()> {
    // It goes through a temporary file, which none but its owner may read; others may read this one
    // as they may any new file.
    let permissions = File::create(path).and_then(|file| file.metadata());
    let permissions = permissions
        .map_err(|source| io(path, source))?
        .permissions();
    // transformers asks for this entry.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| refuse(path, error.to_string()))?;
    fs::set_permissions(path, permissions).map_err(|source| io(path, source))
}

/// Writes a JSON file, whole or not at all, in the place of one that is there.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let refuse = |problem: String| Error::File {
        path: path.into(),
        problem,
    };
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| refuse(error.to_string()))?;
    text.push('\n');
    let Some(name) = path.file_name() else {
        return Err(refuse("is not the name of a file".into()));
    };
    let staging = path.with_file_name(staging_name(name, 0));
    let written = File::create(&staging)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&staging, path));
    if let Err(source) = written {
        // What failed is already the error; the leftover is hidden and harmless.
        let _ = fs::remove_file(&staging);
        return Err(io(path, source));
    }
    match path.parent() {
        Some(parent) if parent != Path::new("") => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// The hidden name under which something is written before it is given its own.
fn staging_name(name: &OsStr, attempt: usize) -> String {
    format!(
        ".{}.{}.{attempt}.tmp",
        name.to_string_lossy(),
        std::process::id()
    )
}

/// Reads a JSON file.
///
/// # Errors
/// As [`read`]; [`Error::File`] if it is not JSON of the expected form.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = read(path)?;
    serde_json::from_slice(&bytes).map_err(|error| refuse(path, error.to_string()))
}

/// Checks the version of the format that the file at `path` states.
///
/// # Errors
/// [`Error::File`] if it is another one than that which is read.
pub fn check_version(path: &Path, read: u32, found: u32) -> Result<()> {
    if read == found {
        return Ok(());
    }
    Err(Error::File {
        path: path.into(),
        problem: format!("format_version is {found}, this program reads {read}"),
    })
}

/// Makes a directory whose files `write` writes: whole under its name, or not at all.
///
/// The files are written into a hidden directory beside it and flushed to the disk; then that
/// directory is given its name. A process that is killed before leaves `.NAME.PID.N.tmp` behind,
/// which nothing reads.
///
/// # Errors
/// [`Error::OutputExists`] if `dir` is there and is not an empty directory, [`Error::Io`] if it
/// cannot be written, or what `write` returns.
pub fn write_directory<E: From<Error>>(
    dir: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    check_output(dir)?;
    let dir = std::path::absolute(dir).map_err(|source| io(dir, source))?;
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(Error::OutputExists { path: dir }.into());
    };
    fs::create_dir_all(parent).map_err(|source| io(parent, source))?;
    let staging = create_staging(parent, name)?;

    let written = write(&staging)
        .and_then(|()| Ok(sync(&staging)?))
        .and_then(|()| Ok(fs::rename(&staging, &dir).map_err(|source| io(&dir, source))?));
    if written.is_err() {
        // What failed is already the error; the leftover is hidden and harmless.
        let _ = fs::remove_dir_all(&staging);
        return written;
    }
    Ok(sync_directory(parent)?)
}

/// Makes a new directory under a hidden name; a killed process may have left some behind.
fn create_staging(parent: &Path, name: &OsStr) -> Result<PathBuf> {
    let mut attempt = 0;
    loop {
        let staging = parent.join(staging_name(name, attempt));
        match fs::create_dir(&staging) {
            Ok(()) => return Ok(staging),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => attempt += 1,
            Err(source) => return Err(io(&staging, source)),
        }
    }
}

/// Checks that `dir` can be written by [`write_directory`]: that it is not there, or empty.
///
/// # Errors
/// [`Error::OutputExists`], or [`Error::Io`] if it cannot be looked at.
pub fn check_output(dir: &Path) -> Result<()> {
    let exists = || Error::OutputExists { path: dir.into() };
    match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().map_or(Ok(()), |_| Err(exists())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Err(exists()),
        Err(source) => Err(io(dir, source)),
    }
}

/// Flushes the files of a directory, and the directory.
fn sync(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|source| io(dir, source))? {
        let path = entry.map_err(|source| io(dir, source))?.path();
        let file = File::options().append(true).open(&path);
        file.and_then(|file| file.sync_all())
            .map_err(|source| io(&path, source))?;
    }
    sync_directory(dir)
}

/// Flushes the entries of a directory, where the system can.
fn sync_directory(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        let dir_file = File::open(dir).map_err(|source| io(dir, source))?;
        dir_file.sync_all().map_err(|source| io(dir, source))?;
    }
    Ok(())
}

fn refuse(path: &Path, problem: String) -> Error {
    Error::File {
        path: path.into(),
        problem,
    }
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        path: path.into(),
        source,
    }
}
