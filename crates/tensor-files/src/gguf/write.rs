use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::header::{put_text, put_value};
use super::{ALIGNMENT, BlockType, DEFAULT_ALIGNMENT, MAGIC, Value};
use crate::error::{io, refuse};
use crate::staging::published;
use crate::{Error, Result};

/// The version of the format that is written.
const VERSION: u32 = 3;

/// A tensor to be written, whose bytes are computed once, when it is written.
pub struct GgufTensor<'a> {
    of: BlockType,
    /// The contiguous dimension last.
    shape: Vec<usize>,
    bytes: Box<dyn FnOnce() -> Vec<u8> + 'a>,
}

impl<'a> GgufTensor<'a> {
    /// A tensor of a type and a shape, the contiguous dimension last.
    pub fn new<const D: usize>(
        of: BlockType,
        shape: [usize; D],
        bytes: impl FnOnce() -> Vec<u8> + 'a,
    ) -> Self {
        Self {
            of,
            shape: shape.into(),
            bytes: Box::new(bytes),
        }
    }
}

/// Writes a GGUF file of version 3, one tensor in memory at a time, and flushes it to the disk.
///
/// Tensors begin at multiples of 32 bytes. An existing file is lost on an error;
/// [`write_directory`](crate::write_directory) publishes atomically.
///
/// # Errors
/// [`Error::Tensor`] if a tensor has another number of bytes than its shape takes, or rows that are no
/// whole number of blocks; [`Error::File`] if the metadata state another alignment; [`Error::Io`] if the
/// file cannot be written. No file is left then.
pub fn write_gguf<'a>(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: impl IntoIterator<Item = (String, GgufTensor<'a>)>,
) -> Result<()> {
    let written = write(path, metadata, tensors.into_iter().collect());
    if written.is_err() {
        // What failed is already the error.
        let _ = fs::remove_file(path);
    }
    written
}

fn write(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: Vec<(String, GgufTensor)>,
) -> Result<()> {
    let is_other = |(key, value): &&(String, Value)| {
        key == ALIGNMENT && value.as_u64() != Some(DEFAULT_ALIGNMENT)
    };
    if metadata.iter().any(|entry| is_other(&entry)) {
        let problem = format!("{ALIGNMENT} is not {DEFAULT_ALIGNMENT}");
        return Err(refuse(path, problem));
    }
    let mut header = Vec::from(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut header, key);
        put_value(&mut header, value);
    }
    let mut offset = 0;
    let mut sizes = Vec::with_capacity(tensors.len());
    for (name, tensor) in &tensors {
        let n_bytes = size(tensor).ok_or_else(|| Error::Tensor {
            path: published(path),
            tensor: name.clone(),
            problem: format!("{} cannot have the shape {:?}", tensor.of, tensor.shape),
        })?;
        put_text(&mut header, name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for &dim in tensor.shape.iter().rev() {
            header.extend((dim as u64).to_le_bytes());
        }
        header.extend(tensor.of.id().to_le_bytes());
        header.extend(u64::to_le_bytes(offset));
        sizes.push(n_bytes);
        offset = (offset + n_bytes as u64).next_multiple_of(DEFAULT_ALIGNMENT);
    }
    let failed = |cause| io(path, cause);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    file.write_all(&header).map_err(failed)?;
    pad(&mut file, header.len()).map_err(failed)?;
    for ((name, tensor), n_bytes) in tensors.into_iter().zip(sizes) {
        let bytes = (tensor.bytes)();
        if bytes.len() != n_bytes {
            return Err(Error::Tensor {
                path: published(path),
                tensor: name,
                problem: format!("has {} bytes; its shape takes {n_bytes}", bytes.len()),
            });
        }
        file.write_all(&bytes).map_err(failed)?;
        pad(&mut file, n_bytes).map_err(failed)?;
    }
    let file = file
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)
}

/// The bytes of a tensor, if it can have its shape.
fn size(tensor: &GgufTensor) -> Option<usize> {
    let row = tensor.shape.last().copied().unwrap_or(1);
    let n_values = (tensor.shape.iter()).try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let n_values = n_values.filter(|_| row > 0 && row.is_multiple_of(tensor.of.block_len()));
    tensor.of.n_bytes(n_values?)
}

/// Fills up to the alignment after so many bytes.
fn pad(file: &mut impl Write, n_bytes: usize) -> std::io::Result<()> {
    let alignment = DEFAULT_ALIGNMENT as usize;
    let n = n_bytes.next_multiple_of(alignment) - n_bytes;
    file.write_all(&vec![0; n])
}
