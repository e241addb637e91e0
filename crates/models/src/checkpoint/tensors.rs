use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tensor_files::{Floats, LazyTensor, TensorFile};

use super::names::names;
use super::shards::Shards;
use crate::{Config, Error, Result};

/// The tensors of a directory, under the names that the model has for them, with those that were read.
pub(super) struct Tensors {
    shards: Shards,
    /// The name of each tensor in its file.
    stored: BTreeMap<String, String>,
    taken: BTreeSet<String>,
}

/// The values of a tensor as the file has them, two-dimensional.
pub(super) struct Stored {
    pub(super) bytes: Vec<u8>,
    pub(super) shape: [usize; 2],
    /// The name of the dtype in safetensors, such as `BF16`.
    pub(super) dtype: String,
}

impl Tensors {
    /// Opens the weights of a directory of a model of this shape. See [`Shards::open`].
    pub(super) fn open(
        dir: &Path,
        first: &[String],
        last: &[String],
        shape: &Config,
    ) -> Result<Self> {
        let mut shards = Shards::open(dir, first, last)?;
        let stored = match names(shards.names(), shape) {
            Ok(stored) => stored,
            Err((tensor, problem)) => {
                return Err(shards.file(&tensor)?.refuse(&tensor, problem).into());
            }
        };
        Ok(Self {
            shards,
            stored,
            taken: BTreeSet::new(),
        })
    }

    /// The tensors of one file of a directory that was written here.
    pub(super) fn of_file(path: &Path) -> Result<Self> {
        let shards = Shards::of_file(path)?;
        let names = shards.names().into_iter();
        Ok(Self {
            stored: names.map(|name| (name.clone(), name)).collect(),
            shards,
            taken: BTreeSet::new(),
        })
    }

    /// The files of weights.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.shards.files()
    }

    /// Checks that there is a tensor of this shape, by the header of its file.
    pub(super) fn check(&mut self, name: &str, expected: &[usize]) -> Result<()> {
        let found = self.shape(name)?;
        if found == expected {
            return Ok(());
        }
        let problem = format!("has the shape {found:?}, the configuration asks for {expected:?}");
        Err(self.refuse(name, problem))
    }

    /// The names of all tensors, in order.
    pub(super) fn names(&self) -> Vec<String> {
        self.stored.keys().cloned().collect()
    }

    /// The names of the tensors that were read, in order.
    pub(super) fn taken(&self) -> Vec<String> {
        self.taken.iter().cloned().collect()
    }

    /// The names of the files of weights, each with the SHA-256 of its length and its header.
    pub(super) fn headers(&mut self) -> Result<BTreeMap<String, String>> {
        self.shards.headers()
    }

    /// The SHA-256 of the bytes of a tensor.
    pub(super) fn sha256(&mut self, name: &str) -> Result<String> {
        let (file, stored) = self.file(name)?;
        Ok(file.sha256(&stored)?)
    }

    /// A tensor of floats of these dimensions, to be written as it is.
    pub(super) fn copy<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<LazyTensor<'static>> {
        let (file, stored) = self.take(name, expected)?;
        Ok(file.copy::<D>(&stored)?.0)
    }

    /// The names of the tensors that were not read.
    pub(super) fn leftovers(&self) -> Vec<String> {
        let names = self.names().into_iter();
        names.filter(|name| !self.taken.contains(name)).collect()
    }

    /// The shape of a tensor, from the header of its file.
    pub(super) fn shape(&mut self, name: &str) -> Result<Vec<usize>> {
        let (file, stored) = self.file(name)?;
        Ok(file.shape(&stored).unwrap_or_default().into())
    }

    /// The dtype of a tensor in safetensors, from the header of its file.
    pub(super) fn dtype(&mut self, name: &str) -> Result<String> {
        let (file, stored) = self.file(name)?;
        Ok(file.dtype(&stored).unwrap_or_default())
    }

    /// The bytes of a tensor, from the header of its file.
    pub(super) fn n_bytes(&mut self, name: &str) -> Result<u64> {
        let (file, stored) = self.file(name)?;
        Ok(file.n_bytes_of(&stored).unwrap_or_default())
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }

    /// The values of a vector of any length.
    pub(super) fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        let (file, stored) = self.file(name)?;
        let (values, [_]) = file.floats(&stored)?;
        Ok(values)
    }

    /// The values of a tensor of these dimensions, in the type that the file has.
    pub(super) fn typed_floats<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Floats> {
        let (file, stored) = self.take(name, expected)?;
        Ok(file.typed_floats::<D>(&stored)?.0)
    }

    /// The values of a tensor of these dimensions.
    pub(super) fn floats<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Vec<f32>> {
        let (file, stored) = self.take(name, expected)?;
        Ok(file.floats::<D>(&stored)?.0)
    }

    pub(super) fn words<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Vec<u32>> {
        let (file, stored) = self.take(name, expected)?;
        Ok(file.words::<D>(&stored)?.0)
    }

    pub(super) fn bytes<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Vec<u8>> {
        let (file, stored) = self.take(name, expected)?;
        Ok(file.bytes::<D>(&stored)?.0)
    }

    /// The values of a matrix of any dtype and size.
    pub(super) fn stored(&mut self, name: &str) -> Result<Stored> {
        self.taken.insert(name.into());
        self.peek(name)
    }

    /// As [`Tensors::stored`], of a matrix that is to be read once more.
    pub(super) fn peek(&mut self, name: &str) -> Result<Stored> {
        let dtype = self.dtype(name)?;
        let (file, stored) = self.file(name)?;
        let (bytes, shape) = file.stored(&stored)?;
        Ok(Stored {
            bytes,
            shape,
            dtype,
        })
    }

    /// The bytes of a text of any length.
    pub(super) fn text(&mut self, name: &str) -> Result<Vec<u8>> {
        let (file, stored) = self.file(name)?;
        let (text, _) = file.bytes::<1>(&stored)?;
        self.taken.insert(name.into());
        Ok(text)
    }

    /// Returns the file of a tensor, and its name there, after checking its dimensions, before it is read.
    fn take<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<(&mut TensorFile, String)> {
        self.taken.insert(name.into());
        let (file, stored) = self.file(name)?;
        match file.shape(&stored) {
            Some(found) if found != expected => {
                let problem =
                    format!("has the shape {found:?}, the configuration asks for {expected:?}");
                Err(file.refuse(&stored, problem).into())
            }
            _ => Ok((file, stored)),
        }
    }

    /// The file of a tensor, and its name there.
    fn file(&mut self, name: &str) -> Result<(&mut TensorFile, String)> {
        let stored = self.name_in_file(name);
        Ok((self.shards.file(&stored)?, stored))
    }

    /// The name of a tensor in its file.
    pub(super) fn name_in_file(&self, name: &str) -> String {
        self.stored.get(name).map_or(name, String::as_str).into()
    }

    /// The file of a tensor.
    pub(super) fn path(&mut self, name: &str) -> PathBuf {
        let file = self.file(name);
        file.map(|(file, _)| file.path().into()).unwrap_or_default()
    }

    /// An error about a tensor.
    pub(super) fn refuse(&mut self, name: &str, problem: String) -> Error {
        match self.file(name) {
            Ok((file, stored)) => file.refuse(&stored, problem).into(),
            Err(error) => error,
        }
    }
}
