use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::adapter::Settings;
use crate::{Adapter, Error, Fingerprint, Linears, LoraAdapter, Result};
use tensor_files::TensorFile;

mod hf;

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
    /// Raised when the meaning of a file changes.
    format_version: u32,
    /// The base that the adapters were trained on.
    base: Fingerprint,
    /// The method and the settings of each layer's adapter.
    layers: BTreeMap<String, Settings>,
}

const FORMAT_VERSION: u32 = 3;

impl Adapters {
    /// The adapters that a model wears.
    ///
    /// # Errors
    /// [`Error::NoAdapters`] if it wears none.
    pub fn of(model: &impl Linears) -> Result<Self> {
        let adapter = |(path, linear): (String, &crate::Linear)| {
            let mut adapter = linear.adapter.clone()?;
            adapter.seed_dropout(&path, None);
            Some((path, adapter))
        };
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

    /// Checks that `model` is the base that the adapters were made for.
    pub(crate) fn check_base(&self, model: &impl Linears) -> Result<()> {
        let found = Fingerprint::of(model);
        if found == self.base {
            return Ok(());
        }
        let expected = self.base.clone();
        Err(Error::OtherBase { expected, found })
    }

    /// The sum of LoRAs of one base, each times its weight, as one LoRA whose rank is the sum of
    /// theirs and whose `σ` is 1: PEFT's combination `cat`. Nothing is approximated.
    ///
    /// # Errors
    /// [`Error::NoAdapters`] if there are none, [`Error::OtherBase`] if they are not of one base,
    /// [`Error::NotCombined`] for an adapter that is not LoRA or has DoRA's norms or a bias, [`Error::Setting`]
    /// for a weight that is not finite, [`Error::Shape`] if they are of layers of other dimensions.
    pub fn combined(parts: &[(&Adapters, f32)]) -> Result<Self> {
        let Some((first, _)) = parts.first() else {
            return Err(Error::NoAdapters);
        };
        let mut factors: BTreeMap<&String, [Vec<Tensor<2>>; 2]> = BTreeMap::new();
        for (adapters, weight) in parts {
            if !weight.is_finite() {
                return Err(Error::Setting {
                    setting: "the weight of an adapter",
                    value: weight.to_string(),
                    expected: "a finite number",
                });
            }
            if adapters.base != first.base {
                return Err(Error::OtherBase {
                    expected: first.base.clone(),
                    found: adapters.base.clone(),
                });
            }
            for (path, adapter) in &adapters.layers {
                let lora = match adapter {
                    Adapter::Lora(lora)
                        if lora.magnitude().is_none() && adapter.bias().is_none() =>
                    {
                        lora
                    }
                    other => {
                        return Err(Error::NotCombined {
                            path: path.clone(),
                            method: other.method(),
                        });
                    }
                };
                let [a, b] = factors.entry(path).or_default();
                let dims = |a: &Tensor<2>, b: &Tensor<2>| [a.dims()[0], b.dims()[1]];
                let found = dims(&lora.a(), &lora.b());
                if let (Some(a), Some(b)) = (a.first(), b.first())
                    && dims(a, b) != found
                {
                    return Err(Error::Shape {
                        path: path.clone(),
                        expected: dims(a, b).into(),
                        found: found.into(),
                    });
                }
                a.push((lora.a() * (lora.scale() * weight)).detach());
                b.push(lora.b().detach());
            }
        }
        let mut layers = BTreeMap::new();
        for (path, [a, b]) in factors {
            let lora = LoraAdapter::from_factors(Tensor::cat(a, 1), Tensor::cat(b, 0), 1.0)?;
            layers.insert(path.clone(), Adapter::Lora(lora));
        }
        Ok(Self {
            base: first.base.clone(),
            layers,
        })
    }

    /// Writes a new directory, whole or not at all.
    ///
    /// # Errors
    /// [`tensor_files::Error::OutputExists`] if `dir` holds something, [`tensor_files::Error::Io`] if it cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let config = Config {
            format_version: FORMAT_VERSION,
            base: self.base.clone(),
            layers: self
                .layers
                .iter()
                .map(|(path, adapter)| (path.clone(), adapter.settings()))
                .collect(),
        };
        Ok(tensor_files::write_directory(dir.as_ref(), |dir| {
            let tensors = self.layers.iter().flat_map(|(path, adapter)| {
                let tensors = adapter.tensors().into_iter();
                tensors.map(move |(name, tensor)| (format!("{path}.{name}"), tensor))
            });
            tensor_files::write_tensors(&dir.join(TENSORS), tensors)?;
            tensor_files::write_json(&dir.join(CONFIG), &config)
        })?)
    }

    /// Reads a directory onto `device`.
    ///
    /// # Errors
    /// If a file is missing or not what it should be, or the tensors are not those that the
    /// configuration lists.
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let config_path = dir.as_ref().join(CONFIG);
        let config: Config = tensor_files::read_json(&config_path)?;
        tensor_files::check_version(&config_path, FORMAT_VERSION, config.format_version)?;
        if config.layers.is_empty() {
            return Err(tensor_files::Error::File {
                path: config_path,
                problem: "lists no layers".into(),
            }
            .into());
        }
        let mut file = TensorFile::open(&dir.as_ref().join(TENSORS))?;
        let mut layers = BTreeMap::new();
        for (path, settings) in config.layers {
            let adapter = Adapter::read(settings, &path, &mut file, device)?;
            layers.insert(path, adapter);
        }
        let expected: Vec<String> = layers
            .iter()
            .flat_map(|(path, adapter)| {
                let names = adapter.tensors().into_iter();
                names.map(move |(name, _)| format!("{path}.{name}"))
            })
            .collect();
        file.check_names(&expected, CONFIG)?;
        Ok(Self {
            base: config.base,
            layers,
        })
    }
}
