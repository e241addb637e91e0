//! What can be attached to a layer.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use quant_core::QuantTensor;

use crate::files::{LazyTensor, TensorFile};
use crate::{Error, Exactness, Result, Targets, Weight};

mod lora;
mod peqa;

pub use lora::{Lora, LoraAdapter};
pub use peqa::{Peqa, PeqaAdapter};

/// A way to adapt a model: which layers, and what each is given.
pub trait Method {
    /// The layers to adapt.
    fn targets(&self) -> &Targets;

    /// A fresh adapter for the layer at `path`, which changes no output.
    ///
    /// # Errors
    /// If the method cannot adapt such a weight.
    fn init(&self, path: &str, weight: &Weight) -> Result<Adapter>;
}

/// The trainable part of an adapted layer.
#[derive(Module, Debug)]
pub enum Adapter {
    /// A matrix of low rank beside the weight.
    Lora(LoraAdapter),
    /// The scales of the layer's grid.
    Peqa(PeqaAdapter),
}

impl Adapter {
    /// The name of the method in files and reports.
    pub fn method(&self) -> &'static str {
        match self {
            Adapter::Lora(_) => LoraAdapter::NAME,
            Adapter::Peqa(_) => PeqaAdapter::NAME,
        }
    }

    /// `x` through the weight with this adapter.
    pub(crate) fn forward<const D: usize>(&self, weight: &Weight, x: Tensor<D>) -> Tensor<D> {
        match self {
            Adapter::Lora(adapter) => adapter.forward(weight, x),
            Adapter::Peqa(adapter) => adapter.forward(weight, x),
        }
    }

    /// Whether this adapter fits the weight of the layer at `path`.
    pub(crate) fn check(&self, path: &str, weight: &Weight) -> Result<()> {
        match self {
            Adapter::Lora(adapter) => adapter.check(path, weight),
            Adapter::Peqa(adapter) => adapter.check(path, weight),
        }
    }

    /// The weight with this adapter folded in, and how exact that is.
    pub(crate) fn merge(&self, path: &str, weight: &Weight) -> Result<(Weight, Exactness)> {
        match self {
            Adapter::Lora(adapter) => adapter.merge(path, weight),
            Adapter::Peqa(adapter) => adapter.merge(path, weight),
        }
    }

    /// The tensors of this adapter, with their names after the layer's path.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        match self {
            Adapter::Lora(adapter) => adapter.tensors(),
            Adapter::Peqa(adapter) => adapter.tensors(),
        }
    }

    /// The adapter of `method` for the layer at `path`, from a file.
    pub(crate) fn read(
        method: &str,
        path: &str,
        file: &mut TensorFile,
        device: &Device,
    ) -> Result<Self> {
        match method {
            LoraAdapter::NAME => Ok(Self::Lora(LoraAdapter::read(path, file, device)?)),
            PeqaAdapter::NAME => Ok(Self::Peqa(PeqaAdapter::read(path, file, device)?)),
            _ => Err(Error::File {
                path: file.path().into(),
                problem: format!("unknown adapter method `{method}`; known: lora, peqa"),
            }),
        }
    }
}

/// The packed weight of the layer at `path`, which `method` needs.
fn quantized<'a>(method: &'static str, path: &str, weight: &'a Weight) -> Result<&'a QuantTensor> {
    match weight {
        Weight::Quant(weight) => Ok(weight),
        Weight::Dense(_) => Err(Error::NeedsQuantized {
            method,
            path: path.into(),
        }),
    }
}

/// Checks that a tensor of the adapter of the layer at `path` has this shape.
fn check_shape(path: &str, expected: [usize; 2], found: [usize; 2]) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(Error::Shape {
            path: path.into(),
            expected: expected.into(),
            found: found.into(),
        })
    }
}

/// A trained parameter as a file holds it.
fn stored(param: &Param<Tensor<2>>) -> LazyTensor<'_> {
    let values = || {
        let values = param.val().into_data().convert::<f32>();
        values.try_into_vec().expect("converted to f32")
    };
    LazyTensor::floats(param.val().dims(), values)
}

/// The trained parameter of this name in a file.
fn read_param(name: &str, file: &mut TensorFile, device: &Device) -> Result<Param<Tensor<2>>> {
    let (values, dims) = file.floats::<2>(name)?;
    let values = Tensor::from_data(TensorData::new(values, dims), (device, DType::F32));
    Ok(Param::from_tensor(values))
}
