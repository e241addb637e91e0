//! Directories without packed layers, all floats in one type.

use std::fmt;
use std::path::Path;

use burn::module::Param;
use burn::tensor::Tensor;
use peft::{Linears, Weight};
use serde_json::{Map, Value};
use tensor_files::{FloatType, LazyTensor};

use super::{Files, check_no_adapters, state_head, transpose, values, write};
use crate::model::Table;
use crate::{Error, Model, Pretrained, Result};

/// What writing floats in another type changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// All values.
    pub n_values: usize,
    /// Those that were rounded.
    pub n_rounded: usize,
    /// The largest change of a value, relative to it.
    pub largest: f64,
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            n_values,
            n_rounded,
            largest,
        } = self;
        match n_rounded {
            0 => write!(f, "{n_values} values, all of them exact"),
            _ => write!(
                f,
                "{n_rounded} of {n_values} values rounded, by up to {largest:.1e} of each"
            ),
        }
    }
}

/// Writes a new directory in which all weights are dense and in one type of float, as other programs
/// load any model. Packed weights are unpacked. Adapters are not written: merge them first.
///
/// # Errors
/// [`Error::Overflow`] with the first tensor that has values beyond the range of the type; otherwise
/// as [`save`](crate::save).
pub fn save_dense(lm: &Pretrained, dir: impl AsRef<Path>, float: FloatType) -> Result<Rounding> {
    check_no_adapters(&lm.model)?;
    let mut rounding = Rounding {
        n_values: 0,
        n_rounded: 0,
        largest: 0.0,
    };
    for (name, parameter) in parameters(&lm.model) {
        rounding.count(&name, &(parameter.values)(), float)?;
    }
    let tensors = parameters(&lm.model).into_iter().map(|(name, parameter)| {
        let Parameter { dims, values } = parameter;
        let tensor = match dims[..] {
            [rows, columns] => LazyTensor::floats_as(float, [rows, columns], values),
            _ => LazyTensor::floats_as(float, [dims[0]], values),
        };
        (name, tensor)
    });
    let mut config = lm.config.clone();
    state_float(&mut config, float);
    state_head(&mut config, &lm.model);
    let files = Files {
        config: &config,
        carried: &lm.carried,
        beside: None,
    };
    write(dir.as_ref(), tensors, &files)?;
    Ok(rounding)
}

/// A type of 16 bits that holds all values of a model exactly.
pub(super) fn common_float(model: &Model) -> Option<FloatType> {
    let mut held = vec![FloatType::Bf16, FloatType::F16];
    for (_, parameter) in parameters(model) {
        let values = (parameter.values)();
        held.retain(|float| values.iter().all(|&value| float.holds(value)));
    }
    held.first().copied()
}

/// Says in a `config.json` what type the floats are of: under the name that transformers has since
/// version 4.56, and under the older one.
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

impl Rounding {
    fn count(&mut self, tensor: &str, values: &[f32], float: FloatType) -> Result<()> {
        self.n_values += values.len();
        let beyond = values
            .iter()
            .filter(|&&value| float.round(value).is_infinite());
        let n = beyond.clone().count();
        if let Some(&value) = beyond.clone().next() {
            return Err(Error::Overflow {
                tensor: tensor.into(),
                float,
                value,
                n,
            });
        }
        for &value in values.iter().filter(|&&value| !float.holds(value)) {
            self.n_rounded += 1;
            let change = f64::from(float.round(value)) - f64::from(value);
            self.largest = self.largest.max((change / f64::from(value)).abs());
        }
        Ok(())
    }
}

/// A parameter as Hugging Face has it, made when it is needed.
struct Parameter<'a> {
    dims: Vec<usize>,
    values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

fn parameters(model: &Model) -> Vec<(String, Parameter<'_>)> {
    fn plain<const D: usize>(param: &Param<Tensor<D>>) -> Parameter<'_> {
        Parameter {
            dims: param.val().dims().into(),
            values: Box::new(|| values(param.val())),
        }
    }
    fn turned(weight: &Weight) -> Parameter<'_> {
        let [d_in, d_out] = weight.dims();
        Parameter {
            dims: vec![d_out, d_in],
            values: Box::new(move || transpose(&values(weight.to_dense()), [d_in, d_out])),
        }
    }
    let mut all = Vec::new();
    for (name, table) in model.tables() {
        let parameter = match table {
            Table::Vector(table) => plain(table),
            Table::Matrix(table) => plain(table),
        };
        all.push((name, parameter));
    }
    for (path, weight) in model.other_weights() {
        all.push((format!("{path}.weight"), turned(weight)));
    }
    for (path, linear) in model.linears() {
        all.push((format!("{path}.weight"), turned(linear.weight())));
        if let Some(bias) = linear.bias() {
            let parameter = Parameter {
                dims: bias.dims().into(),
                values: Box::new(move || values(bias.clone())),
            };
            all.push((format!("{path}.bias"), parameter));
        }
    }
    all
}
