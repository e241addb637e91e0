use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, Tensor, TensorData};
use half::f16;
use quant_core::QuantTensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{floats, quantized};
use crate::trainable::check_frozen;
use crate::{Error, Fingerprint, Linears, Result, Weight};
use tensor_files::{IntoOutput, LazyTensor, TensorFile};

const CONFIG: &str = "task.json";
const TENSORS: &str = "task.safetensors";
/// In version 1, a fingerprint covers the parameters only; in 2, it does not tell them apart.
const FORMAT_VERSIONS: [u32; 3] = [1, 2, 3];
const METHOD: &str = "a task pack";

/// A task as the scales and zeros that it changes in a packed model, on the codes of the base.
///
/// Adapters that merge into codes (PEQA, QA-LoRA, QA-HiRA, QA-BLoRA) can become one. A directory of a
/// task has `task.json` and `task.safetensors`.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskPack {
    base: Fingerprint,
    layers: BTreeMap<String, Grids>,
}

/// The changed scales and zeros of one layer, `[n_groups, d_out]` each.
#[derive(Clone, Debug, Default, PartialEq)]
struct Grids {
    scales: Option<Vec<f32>>,
    zeros: Option<Vec<f32>>,
    dims: [usize; 2],
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    format_version: u32,
    /// The base whose codes the task shares.
    base: Fingerprint,
    /// The changed parts of each layer: `scales`, `zeros`.
    layers: BTreeMap<String, Vec<String>>,
}

impl TaskPack {
    /// The task of the adapters of a packed model.
    ///
    /// # Errors
    /// [`Error::NoAdapters`], [`Error::NeedsQuantized`], [`Error::MergeIntoPacked`] if codes cannot
    /// hold an adapter, or [`Error::TrainableOutside`] if parameters are trainable that are in no adapter.
    pub fn of(model: &impl Linears) -> Result<Self> {
        let mut layers = BTreeMap::new();
        for (path, linear) in model.linears() {
            let Some(adapter) = &linear.adapter else {
                continue;
            };
            let weight = quantized(METHOD, &path, &linear.weight)?;
            let (merged, _) = adapter.ops().on_codes(&path, weight)?;
            let changed = |before: Vec<f32>, after: Vec<f32>| (before != after).then_some(after);
            let scales = floats(merged.scales());
            let grids = Grids {
                // The scales of a merged layer are floats, also where those of the base are codes.
                scales: if merged.format() == weight.format() {
                    changed(floats(weight.scales()), scales)
                } else {
                    Some(scales)
                },
                zeros: match (weight.zeros(), merged.zeros()) {
                    (Some(before), Some(after)) => changed(floats(before), floats(after)),
                    _ => None,
                },
                dims: weight.layout().grid_shape(),
            };
            // An unchanged layer has no shape in a file.
            let grids = match (&grids.scales, &grids.zeros) {
                (None, None) => Grids::default(),
                _ => grids,
            };
            layers.insert(path, grids);
        }
        if layers.is_empty() {
            return Err(Error::NoAdapters);
        }
        check_frozen(model)?;
        Ok(Self {
            base: Fingerprint::of(model),
            layers,
        })
    }

    /// The fingerprint of the base whose codes the task shares.
    pub fn base(&self) -> &Fingerprint {
        &self.base
    }

    /// The number of scales and zeros.
    pub fn n_values(&self) -> usize {
        let values = self.values().map(|values| values.len());
        values.sum()
    }

    fn values(&self) -> impl Iterator<Item = &Vec<f32>> {
        let layers = self.layers.values();
        layers.flat_map(|grids| [&grids.scales, &grids.zeros].into_iter().flatten())
    }

    /// The task rounded to `f16`, half as large in a file, and the largest relative change of a value.
    ///
    /// The change is at most 2⁻¹¹ for values above the subnormal numbers of `f16`.
    ///
    /// # Errors
    /// [`Error::NotF16`] if a value is too large or too small for `f16`.
    pub fn rounded_to_f16(mut self) -> Result<(Self, f64)> {
        let mut most = 0f64;
        for (path, grids) in &mut self.layers {
            let values = [&mut grids.scales, &mut grids.zeros];
            for value in values.into_iter().flatten().flatten() {
                let rounded = f16::from_f32(*value).to_f32();
                if *value == 0.0 {
                    continue;
                }
                if rounded.is_infinite() || rounded == 0.0 {
                    return Err(Error::NotF16 {
                        path: path.clone(),
                        value: *value,
                    });
                }
                most = most.max((f64::from(rounded) / f64::from(*value) - 1.0).abs());
                *value = rounded;
            }
        }
        Ok((self, most))
    }

    /// Writes a new directory, whole or not at all.
    ///
    /// # Errors
    /// [`tensor_files::Error::OutputExists`] if `dir` is not empty, [`tensor_files::Error::Io`] if it
    /// cannot be written.
    pub fn save(&self, dir: impl IntoOutput) -> Result<()> {
        let names = |grids: &Grids| {
            let parts = [("scales", &grids.scales), ("zeros", &grids.zeros)];
            let parts = parts.into_iter().filter(|(_, values)| values.is_some());
            parts.map(|(name, _)| name.to_string()).collect()
        };
        let config = Config {
            format_version: self.base.version(FORMAT_VERSIONS),
            base: self.base.clone(),
            layers: (self.layers.iter())
                .map(|(path, grids)| (path.clone(), names(grids)))
                .collect(),
        };
        Ok(tensor_files::write_directory(dir, |dir| {
            let tensors = self.layers.iter().flat_map(|(path, grids)| {
                let parts = [("scales", &grids.scales), ("zeros", &grids.zeros)];
                parts.into_iter().filter_map(move |(name, values)| {
                    let values = values.as_ref()?;
                    let tensor = LazyTensor::floats(grids.dims, || values.clone());
                    Some((format!("{path}.{name}"), tensor))
                })
            });
            tensor_files::write_tensors(&dir.join(TENSORS), tensors)?;
            tensor_files::write_json(&dir.join(CONFIG), &config)
        })?)
    }

    /// Reads a directory.
    ///
    /// # Errors
    /// [`Error::File`] if a file is missing or damaged, or the tensors are not those that `task.json`
    /// lists.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let config_path = dir.as_ref().join(CONFIG);
        let config: Config = tensor_files::read_json(&config_path)?;
        let version = (config.base).check_version(FORMAT_VERSIONS, config.format_version);
        version.map_err(|problem| {
            let path = config_path.clone();
            tensor_files::Error::File { path, problem }
        })?;
        if config.layers.values().all(|names| names.is_empty()) {
            return Err(tensor_files::Error::File {
                path: config_path,
                problem: "lists no scales and no zeros".into(),
            }
            .into());
        }
        let mut file = TensorFile::open(&dir.as_ref().join(TENSORS))?;
        let mut expected = Vec::new();
        let mut layers = BTreeMap::new();
        for (path, names) in config.layers {
            let mut grids = Grids::default();
            for name in names {
                let place = match name.as_str() {
                    "scales" => &mut grids.scales,
                    "zeros" => &mut grids.zeros,
                    _ => {
                        return Err(tensor_files::Error::File {
                            path: config_path,
                            problem: format!("`{path}` has `{name}`, neither scales nor zeros"),
                        }
                        .into());
                    }
                };
                let tensor = format!("{path}.{name}");
                let (values, dims) = file.floats::<2>(&tensor)?;
                *place = Some(values);
                let both = grids.scales.is_some() && grids.zeros.is_some();
                if both && dims != grids.dims {
                    let problem = format!("is {dims:?}, its layer's scales are {:?}", grids.dims);
                    return Err(file.refuse(&tensor, problem).into());
                }
                grids.dims = dims;
                expected.push(tensor);
            }
            layers.insert(path, grids);
        }
        file.check_names(&expected, CONFIG)?;
        Ok(Self {
            base: config.base,
            layers,
        })
    }
}

/// A packed model and the tasks that it serves, one at a time.
///
/// Activating a task replaces scales and zeros; the codes stay. The model may come with more, such as a
/// tokenizer ([`AsModel`]), which stays with it.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use peft::{Error, Linear, Linears, Peqa, TaskPack, Tasks, Weight};
/// use quant_core::Rtn;
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
/// let weight = Tensor::random([8, 4], Distribution::Default, &Device::flex());
/// let mut base = Layer { proj: Linear::new(Weight::frozen(weight), None) };
/// base.proj.quantize("proj", &Rtn::new().with_bits(4), None)?;
/// let mut tuned = base.clone();
/// peft::attach(&mut tuned, &Peqa::new())?;
/// let task = TaskPack::of(&tuned)?;
///
/// let mut tasks = Tasks::new(base)?;
/// tasks.insert("summaries", task)?;
/// tasks.activate("summaries")?;
/// assert!(matches!(tasks.activate("titles"), Err(Error::UnknownTask { .. })));
/// tasks.activate(None)?;
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Tasks<M> {
    model: M,
    fingerprint: Fingerprint,
    base: BTreeMap<String, Weight>,
    packs: BTreeMap<String, TaskPack>,
}

/// A model, or a value that has one, such as a model with its tokenizer.
pub trait AsModel {
    /// The type of the model.
    type Model: Linears;

    /// The model.
    fn as_model(&self) -> &Self::Model;

    /// The model, to be changed: what is true of its present parameters alone, such as a certificate, is
    /// dropped.
    fn as_model_mut(&mut self) -> &mut Self::Model;
}

impl<M: Linears> AsModel for M {
    type Model = M;

    fn as_model(&self) -> &M {
        self
    }

    fn as_model_mut(&mut self) -> &mut M {
        self
    }
}

impl<M: AsModel> Tasks<M> {
    /// Tasks of this base, without any yet. Its parameters are read once for the fingerprint.
    ///
    /// # Errors
    /// [`Error::AlreadyAdapted`] if it has an adapter.
    pub fn new(model: M) -> Result<Self> {
        let mut base = BTreeMap::new();
        for (path, linear) in model.as_model().linears() {
            if linear.adapter.is_some() {
                return Err(Error::AlreadyAdapted { path });
            }
            base.insert(path, linear.weight.clone());
        }
        Ok(Self {
            fingerprint: Fingerprint::of(model.as_model()),
            model,
            base,
            packs: BTreeMap::new(),
        })
    }

    /// Adds a task, and returns the one of this name that it replaces.
    ///
    /// # Errors
    /// [`Error::OtherBase`], [`Error::UnknownLayer`], [`Error::NeedsQuantized`] or [`Error::Shape`] if
    /// it is for another base.
    pub fn insert(&mut self, name: impl Into<String>, pack: TaskPack) -> Result<Option<TaskPack>> {
        pack.base.check_base(&self.fingerprint)?;
        for (path, grids) in &pack.layers {
            let Some(weight) = self.base.get(path) else {
                return Err(Error::UnknownLayer { path: path.clone() });
            };
            with_grids(path, weight, grids)?;
        }
        Ok(self.packs.insert(name.into(), pack))
    }

    /// The names of the tasks.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.packs.keys().map(String::as_str)
    }

    /// Activates a task, or the base with `None`.
    ///
    /// # Errors
    /// [`Error::UnknownTask`]. The model is then unchanged.
    pub fn activate<'a>(&mut self, name: impl Into<Option<&'a str>>) -> Result<()> {
        let pack = match name.into() {
            None => None,
            Some(name) => match self.packs.get(name) {
                Some(pack) => Some(pack),
                None => {
                    return Err(Error::UnknownTask {
                        name: name.into(),
                        names: self.packs.keys().cloned().collect(),
                    });
                }
            },
        };
        let mut weights = self.base.clone();
        for (path, grids) in pack.iter().flat_map(|pack| &pack.layers) {
            let weight = with_grids(path, &self.base[path], grids)?;
            weights.insert(path.clone(), Weight::Quant(weight));
        }
        for (path, linear) in self.model.as_model_mut().linears_mut() {
            if let Some(weight) = weights.remove(&path) {
                linear.weight = weight;
            }
        }
        Ok(())
    }

    /// The model with the active task.
    pub fn model(&self) -> &M {
        &self.model
    }
}

/// The weight of the layer at `path` with the scales and zeros of a task.
fn with_grids(path: &str, weight: &Weight, grids: &Grids) -> Result<QuantTensor> {
    let weight = quantized(METHOD, path, weight)?;
    let expected = weight.layout().grid_shape();
    let changes = grids.scales.is_some() || grids.zeros.is_some();
    if changes && grids.dims != expected {
        return Err(Error::Shape {
            path: path.into(),
            expected: expected.into(),
            found: grids.dims.into(),
        });
    }
    let device = weight.device();
    let tensor = |values: &Vec<f32>| {
        let values = TensorData::new(values.clone(), expected);
        Tensor::from_data(values, (&device, DType::F32))
    };
    let scales = grids.scales.as_ref().map(tensor);
    let zeros = grids.zeros.as_ref().map(tensor);
    if !changes {
        return Ok(weight.clone());
    }
    let weight = weight.clone();
    let scales = scales.unwrap_or_else(|| weight.scales());
    let zeros = zeros.or_else(|| weight.zeros());
    weight
        .with_grid(scales, zeros)
        .map_err(|source| Error::Quant {
            path: path.into(),
            source,
        })
}
