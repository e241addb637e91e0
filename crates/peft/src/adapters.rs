use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::files::{self, TensorFile};
use crate::{Adapter, Error, Fingerprint, Linears, Result};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The adapters of one task, with the fingerprint of the base that they belong to.
///
/// In a directory: `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Clone, Debug)]
pub struct Adapters {
    pub(crate) base: Fingerprint,
    pub(crate) layers: BTreeMap<String, Adapter>,
}

/// `adapter_config.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// 1; raised when the meaning of a file changes.
    format_version: u32,
    /// The base that the adapters were trained on.
    base: Fingerprint,
    /// The method of each layer's adapter.
    layers: BTreeMap<String, String>,
}

const FORMAT_VERSION: u32 = 1;

impl Adapters {
    /// The adapters that a model wears.
    ///
    /// # Errors
    /// [`Error::NoAdapters`] if it wears none.
    pub fn of(model: &impl Linears) -> Result<Self> {
        let adapter =
            |(path, linear): (String, &crate::Linear)| Some((path, linear.adapter.clone()?));
        let layers: BTreeMap<_, _> = model.linears().into_iter().filter_map(adapter).collect();
        if layers.is_empty() {
            return Err(Error::NoAdapters);
        }
        Ok(Self {
            base: Fingerprint::of(model),
            layers,
        })
    }

    /// The adapters with the paths of their layers.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        self.layers
            .iter()
            .map(|(path, adapter)| (path.as_str(), adapter))
    }

    /// The base that the adapters belong to.
    pub fn base(&self) -> &Fingerprint {
        &self.base
    }

    /// Writes a new directory, whole or not at all.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if `dir` holds something, [`Error::Io`] if it cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let config = Config {
            format_version: FORMAT_VERSION,
            base: self.base.clone(),
            layers: self
                .layers
                .iter()
                .map(|(path, adapter)| (path.clone(), adapter.method().into()))
                .collect(),
        };
        files::write_directory(dir.as_ref(), |dir| {
            let tensors = self.layers.iter().flat_map(|(path, adapter)| {
                let tensors = adapter.tensors().into_iter();
                tensors.map(move |(name, tensor)| (format!("{path}.{name}"), tensor))
            });
            files::write_tensors(&dir.join(TENSORS), tensors)?;
            files::write_json(&dir.join(CONFIG), &config)
        })
    }

    /// Reads a directory onto `device`.
    ///
    /// # Errors
    /// If a file is missing or not what it should be, or the tensors are not those that the
    /// configuration lists.
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let config_path = dir.as_ref().join(CONFIG);
        let config: Config = files::read_json(&config_path)?;
        if config.format_version != FORMAT_VERSION {
            return Err(Error::File {
                path: config_path,
                problem: format!(
                    "format_version is {}, this program reads {FORMAT_VERSION}",
                    config.format_version
                ),
            });
        }
        let mut file = TensorFile::open(&dir.as_ref().join(TENSORS))?;
        let mut layers = BTreeMap::new();
        for (path, method) in config.layers {
            let adapter = Adapter::read(&method, &path, &mut file, device)?;
            layers.insert(path, adapter);
        }
        let expected: Vec<String> = layers
            .iter()
            .flat_map(|(path, adapter)| {
                let names = adapter.tensors().into_iter();
                names.map(move |(name, _)| format!("{path}.{name}"))
            })
            .collect();
        if let Some(extra) = file
            .names()
            .into_iter()
            .find(|name| !expected.contains(name))
        {
            return Err(Error::Tensor {
                path: file.path().into(),
                tensor: extra,
                problem: format!("belongs to no layer of `{CONFIG}`"),
            });
        }
        Ok(Self {
            base: config.base,
            layers,
        })
    }
}
