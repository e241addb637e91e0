use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Settings, Shared, Source, lora};
use crate::trainable::check_frozen;
use crate::{Adapter, Error, Fingerprint, Linears, Result};
use tensor_files::{IntoOutput, LazyTensor, TensorFile};

mod hf;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// The key of PEFT's configurations that names the type of adapter.
const PEFT_TYPE: &str = "peft_type";
/// The key of configurations of this crate that names the version of their format.
const FORMAT_VERSION: &str = "format_version";

/// The adapters of one task, with the fingerprint of their base.
///
/// A directory of adapters has `adapter_config.json` and `adapter_model.safetensors`.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Adapters, Linear, Linears, Lora, Weight};
///
/// # #[derive(burn::module::Module, Debug)]
/// # struct Layer {
/// #     proj: Linear,
/// # }
/// #
/// # impl Linears for Layer {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("proj".into(), &self.proj)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("proj".into(), &mut self.proj)]
/// #     }
/// # }
///
/// let device = Device::flex();
/// let weight = Weight::frozen(Tensor::ones([4, 4], &device));
/// let mut model = Layer { proj: Linear::new(weight, None) };
/// peft::attach(&mut model, &Lora::new(2))?;
/// let dir = tempfile::tempdir()?;
/// let task = dir.path().join("task");
/// Adapters::of(&model)?.save(&task)?;
/// assert_eq!(Adapters::load(&task, &device)?.layers().count(), 1);
/// // Nothing is overwritten.
/// assert!(Adapters::of(&model)?.save(&task).is_err());
/// assert!(Adapters::load(dir.path().join("missing"), &device).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    /// The base of the adapters.
    base: Fingerprint,
    /// The method and the settings of each layer's adapter.
    layers: BTreeMap<String, Settings>,
}

/// In version 3, a fingerprint covers the parameters only; in 4, it does not tell them apart.
const FORMAT_VERSIONS: [u32; 3] = [3, 4, 5];

impl Adapters {
    /// The adapters of a model.
    ///
    /// # Errors
    /// [`Error::NoAdapters`] if it has none, [`Error::TrainableOutside`] if other parameters are trainable,
    /// which the adapters do not hold.
    pub fn of(model: &impl Linears) -> Result<Self> {
        let adapter = |(path, linear): (String, &crate::Linear)| {
            let mut adapter = linear.adapter.clone()?;
            adapter.ops_mut().seed_dropout(&path, None);
            Some((path, adapter))
        };
        let layers: BTreeMap<_, _> = model.linears().into_iter().filter_map(adapter).collect();
        if layers.is_empty() {
            return Err(Error::NoAdapters);
        }
        check_frozen(model)?;
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

    /// The fingerprint of the base.
    pub fn base(&self) -> &Fingerprint {
        &self.base
    }

    /// Checks that `model` is the base of the adapters.
    pub(crate) fn check_base(&self, model: &impl Linears) -> Result<()> {
        self.base.check_base(&Fingerprint::of(model))
    }

    /// The sum of LoRAs of one base, each times its weight: PEFT's combination `cat`.
    ///
    /// The sum is one LoRA whose rank is the sum of their ranks and whose `σ` is 1. Nothing is
    /// approximated.
    ///
    /// # Errors
    /// [`Error::NoAdapters`] if there are none, [`Error::OtherBase`] if their bases differ,
    /// [`Error::NotCombined`] for an adapter that is not LoRA or has DoRA's norms or a bias,
    /// [`Error::Setting`] for a weight that is not finite, [`Error::Shape`] if the dimensions of a layer
    /// differ.
    pub fn combined(parts: &[(&Adapters, f32)]) -> Result<Self> {
        let Some((first, _)) = parts.first() else {
            return Err(Error::NoAdapters);
        };
        let mut base = &first.base;
        let mut layers: BTreeMap<&String, Vec<(&Adapter, f32)>> = BTreeMap::new();
        for &(adapters, weight) in parts {
            if !weight.is_finite() {
                return Err(Error::Setting {
                    setting: "the weight of an adapter",
                    value: weight.to_string(),
                    expected: "a finite number",
                });
            }
            // Those of an older file cover less.
            let covers_more = adapters.base.not_covered().len() < base.not_covered().len();
            if covers_more {
                base.check_base(&adapters.base)?;
                base = &adapters.base;
            } else {
                adapters.base.check_base(base)?;
            }
            for (path, adapter) in &adapters.layers {
                layers.entry(path).or_default().push((adapter, weight));
            }
        }
        let layers = layers.into_iter().map(|(path, parts)| {
            let sum = lora::combined(path, &parts)?;
            Ok((path.clone(), Adapter::Lora(sum)))
        });
        Ok(Self {
            base: base.clone(),
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Writes a new directory, whole or not at all.
    ///
    /// # Errors
    /// [`tensor_files::Error::OutputExists`] if `dir` is not empty, [`tensor_files::Error::Io`] if it
    /// cannot be written.
    pub fn save(&self, dir: impl IntoOutput) -> Result<()> {
        let config = Config {
            format_version: self.base.version(FORMAT_VERSIONS),
            base: self.base.clone(),
            layers: self
                .layers
                .iter()
                .map(|(path, adapter)| (path.clone(), adapter.ops().settings()))
                .collect(),
        };
        Ok(tensor_files::write_directory(dir, |dir| {
            tensor_files::write_tensors(&dir.join(TENSORS), tensors(&self.layers))?;
            tensor_files::write_json(&dir.join(CONFIG), &config)
        })?)
    }

    /// Reads a directory of this crate or of PEFT for `model`, told apart by their configurations.
    ///
    /// # Errors
    /// [`tensor_files::Error::File`] if the configuration is of neither; as [`Adapters::load`] and
    /// [`Adapters::load_hf`].
    ///
    /// # Examples
    /// ```no_run
    /// # fn tuned(model: &mut impl peft::Linears) -> Result<(), peft::Error> {
    /// let task = peft::Adapters::open("Llama-2-7b-4bit-task/adapters", model)?;
    /// peft::activate(model, &task)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(dir: impl AsRef<Path>, model: &impl Linears) -> Result<Self> {
        match Kind::of(dir.as_ref())? {
            Kind::Peft => Self::load_hf(dir, model),
            Kind::Own => Self::load(dir, &device_of(model)),
        }
    }

    /// Reads a directory as [`Adapters::open`] does, and gives `model` the parameters of its base that
    /// a directory of PEFT holds.
    ///
    /// They are those of `modules_to_save` and of embeddings that were saved, biases (`bias` = `all`),
    /// and trained tokens, in the dtype of the model. LoRA on the embedding, on the head and on others
    /// of [`Linears::other_weights`] and [`Linears::tables`] is added to their weights, in `f32`; a packed
    /// one becomes dense. Where PEFT trained a head apart from the embedding that it was, it becomes a
    /// weight of its own. The adapters are those of the changed base, which is to be saved with them.
    ///
    /// # Errors
    /// As [`Adapters::open`], but for [`Error::OtherParameters`]. The model is unchanged then.
    ///
    /// # Examples
    /// ```no_run
    /// # fn tuned(model: &mut impl peft::Linears) -> Result<(), peft::Error> {
    /// let task = peft::Adapters::open_with_base("Llama-2-7b-lora-with-head", model)?;
    /// peft::activate(model, &task)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn open_with_base<M: Linears>(dir: impl AsRef<Path>, model: &mut M) -> Result<Self> {
        match Kind::of(dir.as_ref())? {
            Kind::Peft => Self::load_hf_with_base(dir.as_ref(), model),
            Kind::Own => Self::load(dir, &device_of(model)),
        }
    }

    /// Reads a directory onto `device`.
    ///
    /// # Errors
    /// [`Error::OtherDirectory`] for a directory of PEFT; [`Error::File`] if a file is missing or
    /// damaged, or the tensors are not those that the configuration lists; [`Error::Setting`] for a
    /// setting out of its range.
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let config_path = dir.as_ref().join(CONFIG);
        Kind::Own.check(&config_path, &tensor_files::read_json(&config_path)?)?;
        let config: Config = tensor_files::read_json(&config_path)?;
        let version = (config.base).check_version(FORMAT_VERSIONS, config.format_version);
        version.map_err(|problem| {
            let path = config_path.clone();
            tensor_files::Error::File { path, problem }
        })?;
        if config.layers.is_empty() {
            return Err(tensor_files::Error::File {
                path: config_path,
                problem: "lists no layers".into(),
            }
            .into());
        }
        let file = TensorFile::open(&dir.as_ref().join(TENSORS))?;
        let mut source = Source::new(file, device);
        let mut layers = BTreeMap::new();
        for (path, settings) in config.layers {
            let adapter = Adapter::read(settings, &path, &mut source)?;
            layers.insert(path, adapter);
        }
        let expected: Vec<String> = tensors(&layers).into_keys().collect();
        source.file.check_names(&expected, CONFIG)?;
        Ok(Self {
            base: config.base,
            layers,
        })
    }
}

/// Whose format a directory has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Own,
    Peft,
}

impl Kind {
    fn of(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        Self::of_config(&path, &tensor_files::read_json(&path)?)
    }

    fn of_config(path: &Path, config: &Map<String, Value>) -> Result<Self> {
        if config.contains_key(PEFT_TYPE) {
            return Ok(Self::Peft);
        }
        if config.contains_key(FORMAT_VERSION) {
            return Ok(Self::Own);
        }
        let path = path.to_path_buf();
        let problem = format!(
            "is no configuration of adapters: it has neither `{FORMAT_VERSION}`, as those of this program, nor `{PEFT_TYPE}`, as PEFT's"
        );
        Err(tensor_files::Error::File { path, problem }.into())
    }

    /// Checks that a configuration is of this kind.
    fn check(self, path: &Path, config: &Map<String, Value>) -> Result<()> {
        let found = Self::of_config(path, config)?;
        if found == self {
            return Ok(());
        }
        let path = path.to_path_buf();
        Err(match found {
            Self::Own => Error::OtherDirectory {
                path,
                format: "this program",
                function: "Adapters::load",
            },
            Self::Peft => Error::OtherDirectory {
                path,
                format: "PEFT",
                function: "Adapters::load_hf",
            },
        })
    }
}

/// The device of a model.
fn device_of(model: &impl Linears) -> Device {
    let device = model.linears().first().map(|(_, of)| of.weight.device());
    device.unwrap_or_default()
}

/// The tensors of a directory by their names; shared tensors occur once.
fn tensors(layers: &BTreeMap<String, Adapter>) -> BTreeMap<String, LazyTensor<'_>> {
    let each = layers.iter().flat_map(|(path, adapter)| {
        let of_layer = adapter.ops().tensors().into_iter();
        let of_layer = of_layer.map(move |(name, tensor)| (format!("{path}.{name}"), tensor));
        let shared = adapter.ops().shared().into_iter();
        of_layer.chain(shared.map(Shared::stored))
    });
    each.collect()
}
