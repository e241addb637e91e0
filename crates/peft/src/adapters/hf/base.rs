//! Parameters of the base that a directory of PEFT holds, beside adapters of its layers.
//!
//! They are modules that were trained in full (`modules_to_save`), biases (`bias` = `all`), rows of
//! trained tokens, and LoRA on the embedding or the head, which have no adapters here: a low-rank
//! matrix is added to their weight.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{ModuleMapper, Param, ParamId};
use burn::tensor::{Tensor, TensorData};

use crate::adapter::{floats, tensor};
use crate::{Adapter, Linears, Result, Table, Weight};
use tensor_files::TensorFile;

/// A parameter of a model, under the name that it has in Hugging Face's files.
#[allow(
    clippy::large_enum_variant,
    reason = "a handle of burn has another size with other backends; there are few"
)]
pub(super) enum Parameter {
    Vector(Tensor<1>),
    /// As it is in files.
    Table(Tensor<2>),
    /// `[d_in, d_out]`.
    Weight(Weight),
}

/// All parameters of a model but those of adapters.
fn parameters(model: &impl Linears) -> BTreeMap<String, Parameter> {
    let mut all = BTreeMap::new();
    for (path, linear) in model.linears() {
        if let Some(bias) = linear.bias() {
            all.insert(bias_name(&path), Parameter::Vector(bias));
        }
        all.insert(weight_name(&path), Parameter::Weight(linear.weight.clone()));
    }
    for (path, weight) in model.other_weights() {
        all.insert(weight_name(&path), Parameter::Weight(weight.clone()));
    }
    all.extend(model.tables().into_iter().map(|(name, table)| match table {
        Table::Vector(vector) => (name, Parameter::Vector(vector.val())),
        Table::Matrix(matrix) => (name, Parameter::Table(matrix.val())),
    }));
    all
}

pub(super) fn weight_name(path: &str) -> String {
    format!("{path}.weight")
}

fn bias_name(path: &str) -> String {
    format!("{path}.bias")
}

impl Parameter {
    /// Reads another value of the parameter, in its dtype, as PEFT does.
    fn read(&self, file: &mut TensorFile, name: &str) -> Result<Self> {
        let shape = match self {
            Self::Vector(vector) => vector.dims().to_vec(),
            Self::Table(table) => table.dims().to_vec(),
            Self::Weight(weight) => weight.dims().iter().rev().copied().collect(),
        };
        if file.shape(name).is_some_and(|found| found != shape) {
            let found = file.shape(name).unwrap_or_default();
            let problem = format!(
                "is {found:?}, where the model has {shape:?}: the adapter is for another base, or for one whose vocabulary was resized"
            );
            return Err(file.refuse(name, problem).into());
        }
        Ok(match self {
            Self::Vector(old) => {
                let (values, dims) = file.floats::<1>(name)?;
                Self::Vector(tensor(values, dims, &old.device()).cast(old.dtype()))
            }
            Self::Table(old) => {
                let (values, dims) = file.floats::<2>(name)?;
                Self::Table(tensor(values, dims, &old.device()).cast(old.dtype()))
            }
            Self::Weight(old) => {
                let (values, dims) = file.floats::<2>(name)?;
                let read = tensor(values, dims, &old.device()).transpose();
                // In the layout of weights that are read from the files of a model.
                let (values, dims) = (floats(read.clone()), read.dims());
                let read = tensor(values, dims, &old.device());
                Self::Weight(Weight::frozen(match old {
                    Weight::Dense(old) => read.cast(old.val().dtype()),
                    Weight::Quant(_) => read,
                }))
            }
        })
    }

    fn values(&self) -> Vec<f32> {
        match self {
            Self::Vector(vector) => floats(vector.clone()),
            Self::Table(table) => floats(table.clone()),
            Self::Weight(weight) => floats(weight.to_dense()),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        self.values() == other.values()
    }
}

/// The values that a directory gives to parameters of a model.
pub(super) struct Changes {
    before: BTreeMap<String, Parameter>,
    after: BTreeMap<String, Parameter>,
    /// Those that PEFT gives a value apart from other parameters, even where they were one.
    apart: BTreeSet<String>,
}

impl Changes {
    pub(super) fn new(model: &impl Linears) -> Self {
        Self {
            before: parameters(model),
            after: BTreeMap::new(),
            apart: BTreeSet::new(),
        }
    }

    /// The value of a parameter with the changes so far.
    pub(super) fn get(&self, name: &str) -> Option<&Parameter> {
        self.after.get(name).or_else(|| self.before.get(name))
    }

    /// The names of all parameters.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.before.keys()
    }

    /// Whether no parameter is given a value.
    pub(super) fn is_empty(&self) -> bool {
        self.after.is_empty()
    }

    /// Marks a parameter as one of its own.
    pub(super) fn set_apart(&mut self, name: &str) {
        self.apart.insert(name.into());
    }

    /// Gives a parameter the value of a tensor of a file.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub(super) fn replace(
        &mut self,
        name: &str,
        file: &mut TensorFile,
        tensor: &str,
    ) -> Result<()> {
        let value = self.before[name].read(file, tensor)?;
        self.after.insert(name.into(), value);
        Ok(())
    }

    /// The paths of parameters that are matrices.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &str> {
        let matrices = self.before.iter();
        let matrices = matrices.filter(|(_, value)| !matches!(value, Parameter::Vector(_)));
        matrices.filter_map(|(name, _)| name.strip_suffix(".weight"))
    }

    /// The matrix at a path as the weight of a layer: an embedding multiplies rows of the identity.
    pub(super) fn weight(&self, path: &str) -> Option<Weight> {
        match self.get(&weight_name(path))? {
            Parameter::Vector(_) => None,
            Parameter::Table(table) => Some(Weight::frozen(table.clone())),
            Parameter::Weight(weight) => Some(weight.clone()),
        }
    }

    /// Adds the adapter of the matrix at a path to it, in `f32`.
    pub(super) fn merge(&mut self, path: &str, adapter: &Adapter) -> Result<(), String> {
        let name = weight_name(path);
        let is_table = matches!(self.get(&name), Some(Parameter::Table(_)));
        if is_table && adapter.low_rank().is_none() {
            let method = adapter.method();
            return Err(format!(
                "`{path}` is an embedding, which can be read with LoRA, not with {method}"
            ));
        }
        if let Some(weight) = self.weight(path) {
            let merged = adapter.ops().to_dense(&weight).0.detach();
            let value = if is_table {
                Parameter::Table(merged)
            } else {
                Parameter::Weight(Weight::frozen(merged))
            };
            self.after.insert(name, value);
        }
        Ok(())
    }

    /// Gives rows of an embedding the values of a tensor of a file.
    pub(super) fn replace_rows(
        &mut self,
        name: &str,
        rows: &[usize],
        file: &mut TensorFile,
        delta: &str,
    ) -> Result<()> {
        let Some(Parameter::Table(table)) = self.get(name) else {
            let problem =
                format!("belongs to an embedding `{name}`, which the model does not have");
            return Err(file.refuse(delta, problem).into());
        };
        let (table, [n_rows, width]) = (table.clone(), table.dims());
        let (values, dims) = file.floats::<2>(delta)?;
        if dims != [rows.len(), width] {
            let problem = format!("is {dims:?}, not {:?}", [rows.len(), width]);
            return Err(file.refuse(delta, problem).into());
        }
        let mut all = floats(table.clone());
        for (&row, values) in rows.iter().zip(values.chunks_exact(width)) {
            let Some(to) = all.chunks_exact_mut(width).nth(row) else {
                let problem = format!("is for token {row} of {n_rows}");
                return Err(file.refuse(delta, problem).into());
            };
            to.copy_from_slice(values);
        }
        let changed = tensor(all, [n_rows, width], &table.device()).cast(table.dtype());
        self.after.insert(name.into(), Parameter::Table(changed));
        Ok(())
    }

    /// Drops the values that a model has already. `tied` are the names of its embedding and its head,
    /// if these are one parameter, and two in `self`.
    pub(super) fn reduced(self, tied: Option<[String; 2]>) -> Reduced {
        let Self {
            before,
            mut after,
            apart,
        } = self;
        let changed = |name: &String| !before[name].is_same(&after[name]);
        let changed: BTreeSet<String> =
            after.keys().filter(|name| changed(name)).cloned().collect();
        let mut untied = false;
        if let Some(both) = &tied {
            let is_apart = |name: &String| changed.contains(name) && apart.contains(name);
            let [embedding, head] = both;
            // A parameter that is both has one value.
            let differ = match (after.get(embedding), after.get(head)) {
                (_, None) => false,
                (Some(Parameter::Table(table)), Some(Parameter::Weight(weight))) => {
                    floats(table.clone()) != floats(weight.to_dense().transpose())
                }
                _ => changed.contains(head),
            };
            untied = differ || both.iter().any(is_apart);
            if !untied {
                after.remove(head);
            }
        }
        after.retain(|name, _| changed.contains(name));
        Reduced {
            values: after,
            untied,
        }
    }
}

/// Values that differ from those of a model.
pub(super) struct Reduced {
    values: BTreeMap<String, Parameter>,
    /// Whether the head must be a parameter of its own.
    untied: bool,
}

impl Reduced {
    /// The names of the parameters.
    pub(super) fn names(&self) -> Vec<String> {
        self.values.keys().cloned().collect()
    }

    /// Changes a model. Weights that are replaced are frozen.
    pub(super) fn apply<M: Linears>(mut self, model: &mut M) {
        if self.values.is_empty() {
            return;
        }
        if self.untied {
            model.untie();
        }
        for (path, linear) in model.linears_mut() {
            if let Some(Parameter::Weight(weight)) = self.values.remove(&weight_name(&path)) {
                linear.weight = weight;
            }
            if let Some(Parameter::Vector(bias)) = self.values.remove(&bias_name(&path)) {
                linear.replace_bias(bias);
            }
        }
        let others = model.other_weights().into_iter();
        let others: Vec<String> = others.map(|(path, _)| weight_name(&path)).collect();
        for (name, weight) in others.iter().zip(model.other_weights_mut()) {
            if let Some(Parameter::Weight(value)) = self.values.remove(name) {
                *weight = value;
            }
        }
        let mut tables = Tables(BTreeMap::new());
        for (name, table) in model.tables() {
            let id = match table {
                Table::Vector(vector) => vector.id,
                Table::Matrix(matrix) => matrix.id,
            };
            let value = match self.values.remove(&name) {
                Some(Parameter::Vector(vector)) => vector.into_data(),
                Some(Parameter::Table(table)) => table.into_data(),
                _ => continue,
            };
            tables.0.insert(id, value);
        }
        if !tables.0.is_empty() {
            *model = model.clone().map(&mut tables);
        }
    }
}

/// Replaces the values of parameters.
struct Tables(BTreeMap<ParamId, TensorData>);

impl ModuleMapper for Tables {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.remove(&param.id) {
            Some(data) => param.map(|old| {
                let dtype = data.dtype();
                Tensor::from_data(data, (&old.device(), dtype))
            }),
            None => param,
        }
    }
}
