//! Directories of Hugging Face's PEFT, both ways, as its version 0.21.2 writes and reads them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::{Adapters, CONFIG, TENSORS};
use crate::adapter::hf::{HfLayer, HfSource, hf_factor};
use crate::{Adapter, Error, Fingerprint, Linears, Result};
use tensor_files::{IntoOutput, LazyTensor};

mod base;
mod config;
mod lora;
mod names;
mod patterns;
mod read;

use names::SHARED_PREFIX;
use read::read;

impl Adapters {
    /// Reads a directory that PEFT wrote, for `model`: LoRA, rsLoRA, DoRA, QA-LoRA and VeRA.
    ///
    /// The file does not identify its base, which is assumed to be this model. The outputs are those of
    /// PEFT. Further training with dropout differs: here QA-LoRA drops pooled inputs, as in its paper,
    /// and the product of DoRA with the weight drops none. VeRA is read with its random factors
    /// (`save_projection=True`), which only PyTorch could draw again.
    ///
    /// Parameters of the base in the file, such as those of `modules_to_save`, must be those of the model;
    /// [`Adapters::open_with_base`] takes others.
    ///
    /// # Errors
    /// [`Error::OtherDirectory`] for a directory of [`Adapters::save`].
    /// [`tensor_files::Error::File`] for an unknown key, by its name: another type of adapter, a setting
    /// that changes the outputs of an adapter, an initialization that changed the base (PiSSA, OLoRA,
    /// …), a value out of its range, a pattern that Python would not accept. [`Error::UnknownLayer`],
    /// [`tensor_files::Error::MissingTensor`], [`tensor_files::Error::Tensor`] or [`Error::Shape`] if
    /// the tensors do not fit configuration and model, [`Error::Tiles`] if
    /// groups do not divide a layer, [`Error::NoBias`] if a layer has no bias for a trained one,
    /// [`Error::NotF32`] for a dense layer of another dtype, [`Error::OtherParameters`] for parameters
    /// of the base that are not the model's.
    pub fn load_hf(dir: impl AsRef<Path>, model: &impl Linears) -> Result<Self> {
        let (layers, changes) = read(dir.as_ref(), model)?;
        let parameters = changes.names();
        if !parameters.is_empty() {
            let path = dir.as_ref().join(TENSORS);
            return Err(Error::OtherParameters { path, parameters });
        }
        Ok(Self {
            base: Fingerprint::of(model),
            layers,
        })
    }

    /// Reads a directory that PEFT wrote, and gives `model` the parameters of the base in it.
    pub(super) fn load_hf_with_base<M: Linears>(dir: &Path, model: &mut M) -> Result<Self> {
        let (layers, changes) = read(dir, model)?;
        changes.apply(model);
        Ok(Self {
            base: Fingerprint::of(model),
            layers,
        })
    }

    /// Writes a new directory for PEFT, whole or not at all. `model` is the base, whose layers the
    /// configuration names.
    ///
    /// Parameters of the base that [`Adapters::open_with_base`] changed are not among the adapters: PEFT
    /// needs the changed base too.
    ///
    /// # Errors
    /// [`Error::OtherBase`]; [`Error::NotForPeft`] if PEFT has no such adapter, or not in one
    /// directory with the others; [`tensor_files::Error::OutputExists`] if `dir` is not empty,
    /// [`tensor_files::Error::Io`] if it cannot be written.
    pub fn save_hf(&self, dir: impl IntoOutput, model: &impl Linears) -> Result<()> {
        self.check_base(model)?;
        let linears = model.linears().into_iter();
        let paths: Vec<String> = linears.map(|(path, _)| path).collect();
        write(&self.layers, &paths, dir)
    }

    /// Writes the adapters of the parts of a model, such as its blocks, as one new directory for PEFT, whole
    /// or not at all. `paths` are those of all layers of the model, which need not be in memory.
    ///
    /// The bases of the parts are not compared with it.
    ///
    /// # Errors
    /// [`Error::NoAdapters`], [`Error::UnknownLayer`], [`Error::AlreadyAdapted`] for a layer of two parts; otherwise as [`Adapters::save_hf`].
    ///
    /// # Examples
    /// ```no_run
    /// # fn run(blocks: Vec<std::path::PathBuf>, layers: &[String]) -> Result<(), peft::Error> {
    /// let device = burn::tensor::Device::flex();
    /// let blocks = blocks.iter().map(|dir| peft::Adapters::load(dir, &device));
    /// let blocks: Vec<_> = blocks.collect::<Result<_, _>>()?;
    /// peft::Adapters::save_hf_parts(blocks, layers, "adapter")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn save_hf_parts(
        parts: impl IntoIterator<Item = Self>,
        paths: &[String],
        dir: impl IntoOutput,
    ) -> Result<()> {
        let mut layers: BTreeMap<String, Adapter> = BTreeMap::new();
        for (path, adapter) in parts.into_iter().flat_map(|part| part.layers) {
            if layers.contains_key(&path) {
                return Err(Error::AlreadyAdapted { path });
            }
            layers.insert(path, adapter);
        }
        if let Some(path) = layers.keys().find(|path| !paths.contains(path)) {
            return Err(Error::UnknownLayer { path: path.clone() });
        }
        write(&layers, paths, dir)
    }
}

/// Writes a directory of adapters of a model whose layers are at `paths`.
fn write(layers: &BTreeMap<String, Adapter>, paths: &[String], dir: impl IntoOutput) -> Result<()> {
    let layers = layers.iter().map(|(path, adapter)| {
        let layer = adapter.ops().to_hf();
        let layer = layer.map_err(|problem| Error::NotForPeft {
            path: path.clone(),
            problem,
        })?;
        Ok((path.as_str(), layer))
    });
    let layers: Vec<_> = layers.collect::<Result<_>>()?;
    let config = config::written(&layers, paths)?;
    Ok(tensor_files::write_directory(dir, |dir| {
        tensor_files::write_tensors(&dir.join(TENSORS), all_tensors(layers))?;
        tensor_files::write_json(&dir.join(CONFIG), &Value::Object(config))
    })?)
}

/// The tensors of a directory under PEFT's names.
fn all_tensors<'a>(layers: Vec<(&str, HfLayer<'a>)>) -> Vec<(String, LazyTensor<'a>)> {
    let shared = layers.iter().flat_map(|(_, layer)| layer.shared.clone());
    let shared: BTreeMap<_, _> = shared.collect();
    let shared = shared.into_iter();
    let mut tensors: Vec<_> = shared
        .map(|(name, shared)| {
            (
                format!("{SHARED_PREFIX}{name}"),
                hf_factor(shared.tensor.clone()),
            )
        })
        .collect();
    for (path, layer) in layers {
        let of_layer = layer.tensors.into_iter();
        tensors.extend(
            of_layer.map(|(name, tensor)| (format!("{}{path}.{name}", HfSource::PREFIX), tensor)),
        );
    }
    tensors
}
