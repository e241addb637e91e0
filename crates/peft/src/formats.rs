use std::collections::BTreeMap;
use std::path::Path;

use burn::store::ModuleRecord;
use burn::tensor::Device;
use quant_core::{DoubleScales, Format, Grid, Parts, QuantTensor, Scales};
use serde::{Deserialize, Serialize};

use crate::{Error, Linears, Result, Weight};

const FORMAT_VERSION: u32 = 1;

/// The formats of a model's packed weights, which a record of burn's does not hold.
///
/// A record (`Module::into_record`) has the parameters of a model and not its form: a model as it was
/// first built is dense, and lacks the parameters of packed weights.
/// [`load_record`](Formats::load_record) packs it first.
///
/// Adapters have directories of their own ([`Adapters::save`](crate::Adapters::save)): merge or detach
/// them before the record is taken. Models of the crate `quant-models` have directories with all that
/// belongs to them (`models::save`).
///
/// # Examples
/// ```
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use burn::store::ModuleRecord;
/// use burn::tensor::Device;
/// use peft::{Error, Fingerprint, Formats, Linear, Linears};
/// use quant_core::Rtn;
///
/// #[derive(Module, Debug)]
/// struct Mlp {
///     up: Linear,
/// }
///
/// impl Mlp {
///     fn new(device: &Device) -> Self {
///         let up = Linear::from_burn(LinearConfig::new(8, 32).init(device));
///         Self { up }
///     }
/// }
///
/// # impl Linears for Mlp {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("up".into(), &self.up)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("up".into(), &mut self.up)]
/// #     }
/// # }
/// #
/// let device = Device::flex();
/// let mut mlp = Mlp::new(&device);
/// mlp.up.quantize("up", &Rtn::new().with_bits(4), None)?;
///
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// Formats::of(&mlp).save(dir.join("mlp.json"))?;
/// mlp.clone().save_file(dir.join("mlp.bpk"))?;
///
/// let formats = Formats::load(dir.join("mlp.json"))?;
/// let record = ModuleRecord::load(dir.join("mlp.bpk"))?;
/// let loaded = formats.load_record(Mlp::new(&device), record.clone())?;
/// assert_eq!(Fingerprint::of(&loaded), Fingerprint::of(&mlp));
///
/// // Without its formats, the record does not fit.
/// let error = Formats::default().load_record(Mlp::new(&device), record).unwrap_err();
/// assert!(matches!(error, Error::Record { .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Formats {
    weights: BTreeMap<String, Form>,
}

/// The form of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Form {
    #[serde(flatten)]
    format: Format,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    input_order: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// Raised when the meaning of a file changes.
    format_version: u32,
    weights: BTreeMap<String, Form>,
}

impl From<Formats> for Stored {
    fn from(formats: Formats) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            weights: formats.weights,
        }
    }
}

impl TryFrom<Stored> for Formats {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        match stored.format_version {
            FORMAT_VERSION => Ok(Self {
                weights: stored.weights,
            }),
            found => Err(format!(
                "format_version is {found}, this program reads {FORMAT_VERSION}"
            )),
        }
    }
}

impl Formats {
    /// The formats of the packed weights of a model: projections and
    /// [`other_weights`](Linears::other_weights).
    pub fn of(model: &impl Linears) -> Self {
        let linears = model.linears().into_iter();
        let weights = linears.map(|(path, linear)| (path, &linear.weight));
        let packed = weights.chain(model.other_weights());
        let packed = packed.filter_map(|(path, weight)| match weight {
            Weight::Dense(_) => None,
            Weight::Quant(weight) => {
                let form = Form {
                    format: weight.format(),
                    input_order: weight.input_order().is_some(),
                };
                Some((path, form))
            }
        });
        Self {
            weights: packed.collect(),
        }
    }

    /// Loads a record into a model that was built as the recorded one was, whose weights may be dense.
    ///
    /// Trainable parameters stay trainable, and frozen ones frozen. The values of packed weights are
    /// checked.
    ///
    /// # Errors
    /// [`Error::Record`] if the record, or these formats, are those of another model;
    /// [`Error::AlreadyAdapted`] if the model has adapters; [`Error::Quant`] if a packed weight is damaged.
    ///
    /// # Panics
    /// If [`Linears::other_weights`] and [`Linears::other_weights_mut`] differ in their lengths.
    pub fn load_record<M: Linears>(&self, mut model: M, record: ModuleRecord) -> Result<M> {
        if let Some((path, _)) = (model.linears().into_iter()).find(|(_, of)| of.adapter.is_some())
        {
            return Err(Error::AlreadyAdapted { path });
        }
        let mut left = self.weights.clone();
        let mut devices = BTreeMap::new();
        for_each_weight(&mut model, |path, weight| {
            if let Some(form) = left.remove(path) {
                let device = weight.device();
                *weight = Weight::Quant(form.zeros(path, weight.dims(), &device)?);
                devices.insert(path.to_string(), device);
            }
            Ok(())
        })?;
        if let Some(path) = left.keys().next() {
            return Err(Error::Record {
                problem: format!("its formats list `{path}`, which is no weight of the model"),
            });
        }
        // The zeros must not be taken for values that a record lacks.
        let loaded = model.try_load_record(record.allow_partial(false));
        let mut model = loaded.map_err(|error| Error::Record {
            problem: error.to_string(),
        })?;
        for_each_weight(&mut model, |path, weight| {
            if let (Weight::Quant(packed), Some(device)) = (&*weight, devices.get(path)) {
                let (parts, format) = (packed.to_parts(), packed.format());
                let checked = QuantTensor::from_parts(parts, format, packed.dims(), device);
                *weight = Weight::Quant(checked.map_err(|source| quant_error(path, source))?);
            }
            Ok(())
        })?;
        Ok(model)
    }

    /// Writes a JSON file atomically, and replaces an existing one.
    ///
    /// # Errors
    /// [`tensor_files::Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(tensor_files::write_json(path.as_ref(), self)?)
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// [`tensor_files::Error::File`] if it does not list formats, [`tensor_files::Error::Io`] if it cannot
    /// be read.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Ok(tensor_files::read_json(path.as_ref())?)
    }
}

impl Form {
    /// A packed weight of this form whose codes and scales are all 0.
    fn zeros(&self, path: &str, dims: [usize; 2], device: &Device) -> Result<QuantTensor> {
        let refuse = |source| quant_error(path, source);
        let layout = self.format.layout(dims).map_err(refuse)?;
        let n_grid = layout.n_groups() * layout.d_out();
        let is_affine = self.format.grid() == Grid::Affine;
        let parts = Parts {
            words: vec![0; layout.words_shape().iter().product()],
            scales: match self.format.double_quant() {
                None => Scales::Float(vec![0.0; n_grid]),
                Some(double) => Scales::Double(DoubleScales {
                    codes: vec![0; n_grid],
                    absmax: vec![0.0; n_grid.div_ceil(double.block_size)],
                    offset: 0.0,
                }),
            },
            zeros: is_affine.then(|| vec![0.0; n_grid]),
            input_order: self.input_order.then(|| (0..dims[0] as u32).collect()),
        };
        QuantTensor::from_parts(parts, self.format, dims, device).map_err(refuse)
    }
}

/// Calls `change` with each projection's weight and each other weight of a model.
fn for_each_weight<M: Linears>(
    model: &mut M,
    mut change: impl FnMut(&str, &mut Weight) -> Result<()>,
) -> Result<()> {
    for (path, linear) in model.linears_mut() {
        change(&path, &mut linear.weight)?;
    }
    let others = model.other_weights().into_iter();
    let paths: Vec<String> = others.map(|(path, _)| path).collect();
    let others = model.other_weights_mut();
    assert_eq!(paths.len(), others.len(), "other weights and their paths");
    let mut others = paths.iter().zip(others);
    others.try_for_each(|(path, weight)| change(path, weight))
}

fn quant_error(path: &str, source: quant_core::Error) -> Error {
    let path = path.into();
    Error::Quant { path, source }
}
