use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tensor_files::{Floats, LazyTensor, TensorFile};

use super::shards::Shards;
use crate::{Error, Result};

/// The tensors of a directory, with the names of those that were read.
pub(super) struct Tensors {
    shards: Shards,
    taken: BTreeSet<String>,
}

impl Tensors {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            shards: Shards::open(dir)?,
            taken: BTreeSet::new(),
        })
    }

    /// The tensors of one file of a directory.
    pub(super) fn of_file(path: &Path) -> Result<Self> {
        Ok(Self {
            shards: Shards::of_file(path)?,
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
        self.shards.names()
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
        let stored = self.shards.stored(name).to_string();
        Ok(self.shards.file(name)?.sha256(&stored)?)
    }

    /// A tensor of floats of these dimensions, to be written as it is.
    pub(super) fn copy<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<LazyTensor<'static>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.copy::<D>(&stored)?.0)
    }

    /// The names of the tensors that were not read.
    pub(super) fn leftovers(&self) -> Vec<String> {
        let names = self.shards.names().into_iter();
        names.filter(|name| !self.taken.contains(name)).collect()
    }

    /// The shape of a tensor, from the header of its file.
    pub(super) fn shape(&mut self, name: &str) -> Result<Vec<usize>> {
        let stored = self.shards.stored(name).to_string();
        let shape = self.shards.file(name)?.shape(&stored);
        Ok(shape.unwrap_or_default().into())
    }

    /// The bytes of a tensor, from the header of its file.
    pub(super) fn n_bytes(&mut self, name: &str) -> Result<u64> {
        let stored = self.shards.stored(name).to_string();
        let n_bytes = self.shards.file(name)?.n_bytes_of(&stored);
        Ok(n_bytes.unwrap_or_default())
    }

    /// The values of a vector of any length.
    pub(super) fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        let (values, [_]) = self.shards.file(name)?.floats(name)?;
        Ok(values)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.shards.contains(name)
    }

    /// The values of a tensor of these dimensions, in the type that the file has.
    pub(super) fn typed_floats<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Floats> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.typed_floats::<D>(&stored)?.0)
    }

    /// The values of a tensor of these dimensions.
    pub(super) fn floats<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Vec<f32>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.floats::<D>(&stored)?.0)
    }

    pub(super) fn words<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Vec<u32>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.words::<D>(&stored)?.0)
    }

    pub(super) fn bytes<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<Vec<u8>> {
        let stored = self.shards.stored(name).to_string();
        Ok(self.take(name, expected)?.bytes::<D>(&stored)?.0)
    }

    /// The bytes of a text of any length.
    pub(super) fn text(&mut self, name: &str) -> Result<Vec<u8>> {
        let (text, _) = self.shards.file(name)?.bytes::<1>(name)?;
        self.taken.insert(name.into());
        Ok(text)
    }

    /// Returns the file of a tensor after checking its dimensions, before it is read.
    fn take<const D: usize>(
        &mut self,
        name: &str,
        expected: [usize; D],
    ) -> Result<&mut TensorFile> {
        let stored = self.shards.stored(name).to_string();
        self.taken.insert(stored.clone());
        let file = self.shards.file(name)?;
        match file.shape(&stored) {
            Some(found) if found != expected => {
                let problem =
                    format!("has the shape {found:?}, the configuration asks for {expected:?}");
                Err(file.refuse(name, problem).into())
            }
            _ => Ok(file),
        }
    }

    /// The file of a tensor.
    pub(super) fn path(&mut self, name: &str) -> PathBuf {
        let file = self.shards.file(name);
        file.map(|file| file.path().into()).unwrap_or_default()
    }

    /// An error about a tensor.
    pub(super) fn refuse(&mut self, name: &str, problem: String) -> Error {
        match self.shards.file(name) {
            Ok(file) => file.refuse(name, problem).into(),
            Err(error) => error,
        }
    }
}
