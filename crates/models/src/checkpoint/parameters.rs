//! The parameters of a model as Hugging Face stores them.

use burn::tensor::Tensor;
use peft::{Linear, Linears, Table, Weight};
use quant_core::QuantTensor;
use serde_json::{Map, Value};
use tensor_files::{FloatType, LazyTensor};

use super::packing::transpose;
use crate::source::{Vector, weight_name};
use crate::{Model, Result};

/// A parameter with the name of its tensor.
pub(super) enum Parameter<'a> {
    Vector(String, Tensor<1>),
    /// A table that is stored as it is in memory.
    Table(String, Tensor<2>),
    /// A dense weight `[d_in, d_out]`, stored as `[d_out, d_in]`.
    Dense(String, Tensor<2>),
    Packed {
        path: String,
        weight: &'a QuantTensor,
    },
}

/// Lists the parameters of a model.
pub(super) fn parameters(model: &Model) -> Vec<Parameter<'_>> {
    let others = model.other_weights().into_iter();
    let others = others.map(|(path, weight)| Parameter::of_weight(path, weight));
    let tables = table_parameters(model.tables()).into_iter();
    let linears = linear_parameters(model.linears());
    tables.chain(others).chain(linears).collect()
}

/// The parameters of norms and embeddings.
pub(super) fn table_parameters<'a>(tables: Vec<(String, Table<'a>)>) -> Vec<Parameter<'a>> {
    let tables = tables.into_iter().map(|(name, table)| match table {
        Table::Vector(vector) => Parameter::Vector(name, vector.val()),
        Table::Matrix(table) => Parameter::Table(name, table.val()),
    });
    tables.collect()
}

/// The parameters of projections.
pub(super) fn linear_parameters(linears: Vec<(String, &Linear)>) -> Vec<Parameter<'_>> {
    let linears = linears.into_iter().flat_map(|(path, linear)| {
        let bias = linear.bias();
        let bias = bias.map(|bias| Parameter::Vector(Vector::Bias.name(&path), bias));
        [Parameter::of_weight(path, linear.weight())]
            .into_iter()
            .chain(bias)
    });
    linears.collect()
}

impl<'a> Parameter<'a> {
    pub(super) fn of_weight(path: String, weight: &'a Weight) -> Self {
        match weight {
            Weight::Dense(weight) => Self::Dense(weight_name(&path), weight.val()),
            Weight::Quant(weight) => Self::Packed { path, weight },
        }
    }

    /// The types of float that hold all values exactly, the shortest first.
    ///
    /// The values of packed weights are not looked at.
    pub(super) fn holding(&self) -> Vec<FloatType> {
        match self {
            Self::Vector(_, values) => holding(values),
            Self::Table(_, values) | Self::Dense(_, values) => holding(values),
            Self::Packed { .. } => TYPES.to_vec(),
        }
    }

    /// The tensor of the parameter, dense and in the shortest type of float that holds all values exactly.
    pub(super) fn shortest(self) -> (String, LazyTensor<'a>) {
        let float = self.holding()[0];
        self.tensor(float, |_, _| ())
    }

    /// The tensor of the parameter, dense and in a type of float, with its name.
    ///
    /// `on_values` is called with the values before they are rounded.
    pub(super) fn tensor(
        self,
        float: FloatType,
        on_values: impl Fn(&str, &[f32]) + 'a,
    ) -> (String, LazyTensor<'a>) {
        match self {
            Self::Vector(name, values) => {
                let dims = values.dims();
                lazy(name, float, dims, on_values, move || read(values.clone()))
            }
            Self::Table(name, values) => {
                let dims = values.dims();
                lazy(name, float, dims, on_values, move || read(values.clone()))
            }
            Self::Dense(name, values) => {
                let dims @ [d_in, d_out] = values.dims();
                lazy(name, float, [d_out, d_in], on_values, move || {
                    kernels::with_values(values.clone(), |values| transpose(values, dims))
                })
            }
            Self::Packed { path, weight } => {
                let dims @ [d_in, d_out] = weight.dims();
                lazy(
                    weight_name(&path),
                    float,
                    [d_out, d_in],
                    on_values,
                    move || {
                        kernels::with_values(weight.dequantize(), |values| transpose(values, dims))
                    },
                )
            }
        }
    }
}

fn lazy<'a, const D: usize>(
    name: String,
    float: FloatType,
    dims: [usize; D],
    on_values: impl Fn(&str, &[f32]) + 'a,
    values: impl Fn() -> Vec<f32> + 'a,
) -> (String, LazyTensor<'a>) {
    let of = name.clone();
    let tensor = LazyTensor::floats_as(float, dims, move || {
        let values = values();
        on_values(&of, &values);
        values
    });
    (name, tensor)
}

/// All types, the shortest first.
const TYPES: [FloatType; 3] = [FloatType::Bf16, FloatType::F16, FloatType::F32];

fn holding<const D: usize>(tensor: &Tensor<D>) -> Vec<FloatType> {
    kernels::with_values(tensor.clone(), |values| {
        let holds = |float: &FloatType| values.iter().all(|&value| float.holds(value));
        TYPES.into_iter().filter(holds).collect()
    })
}

/// A tensor of the shortest type of float that holds all values exactly.
pub(super) fn floats<'a, const D: usize>(tensor: Tensor<D>) -> LazyTensor<'a> {
    let float = holding(&tensor)[0];
    LazyTensor::floats_as(float, tensor.dims(), move || read(tensor.clone()))
}

/// Reads the values of a tensor.
pub(super) fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let values = tensor.into_data().convert::<f32>().try_into_vec();
    values.expect("converted to f32")
}

/// Checks that no layer has an adapter.
pub(super) fn check_no_adapters(model: &Model) -> Result<()> {
    let linears = model.linears().into_iter();
    let mut adapted = linears.filter(|(_, linear)| linear.adapter().is_some());
    match adapted.next() {
        Some((path, _)) => Err(peft::Error::AlreadyAdapted { path }.into()),
        None => Ok(()),
    }
}

/// States in a `config.json` whether the model has a head that is not the embedding.
pub(super) fn state_head(config: &mut Map<String, Value>, has_head: bool) {
    if has_head {
        config.insert("tie_word_embeddings".into(), false.into());
    }
}

/// States the type of the floats in a `config.json`, under the name that transformers uses since
/// version 4.56 and under the older one.
pub(super) fn state_float(config: &mut Map<String, Value>, float: FloatType) {
    let name = match float {
        FloatType::F32 => "float32",
        FloatType::F16 => "float16",
        FloatType::Bf16 => "bfloat16",
    };
    for key in ["dtype", "torch_dtype"] {
        config.insert(key.into(), name.into());
    }
}
