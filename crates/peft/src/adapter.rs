//! What can be attached to a layer.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use quant_core::QuantTensor;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Exactness, Linear, Result, Targets, Weight, learning_rate};
use tensor_files::{LazyTensor, TensorFile};

mod bayesian;
mod dropout;
mod lora;
mod peqa;
#[cfg(test)]
mod testing;
mod tile;

pub use bayesian::{Bayesian, BayesianAdapter};
pub use lora::{Lora, LoraAdapter};
pub use peqa::{Peqa, PeqaAdapter};
pub use tile::{Pooling, Tile, TileAdapter, TileMethod};

use bayesian::BayesianSettings;
use dropout::Dropout;
pub(crate) use lora::LoraSettings;
use peqa::PeqaSettings;
pub(crate) use tile::TileSettings;

/// A way to adapt a model: which layers, and what each is given.
pub trait Method {
    /// The layers to adapt.
    fn targets(&self) -> &Targets;

    /// A fresh adapter for the layer at `path`, which changes no output.
    ///
    /// # Errors
    /// If the method cannot adapt such a layer.
    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter>;

    /// The default learning rate of AdamW for a model of this hidden size.
    fn learning_rate(&self, hidden_size: usize) -> f64 {
        learning_rate::of_factors(hidden_size)
    }
}

/// The trainable part of an adapted layer.
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a layer has one; its tensors are what is large"
)]
pub enum Adapter {
    /// A matrix of low rank beside the weight.
    Lora(LoraAdapter),
    /// The scales, and the zeros, of the layer's grid.
    Peqa(PeqaAdapter),
    /// A matrix that is constant over tiles of the weight.
    Tile(TileAdapter),
    /// A matrix of low rank that learns its rank and its bits.
    Bayesian(BayesianAdapter),
}

/// What an adapter is beside its tensors, as files hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub(crate) enum Settings {
    Lora(LoraSettings),
    Peqa(PeqaSettings),
    Tile(TileSettings),
    Bayesian(BayesianSettings),
}

impl Adapter {
    /// The name of the method in reports.
    pub fn method(&self) -> &'static str {
        match self {
            Adapter::Lora(adapter) => adapter.method(),
            Adapter::Peqa(_) => peqa::METHOD,
            Adapter::Tile(adapter) => adapter.method().name(),
            Adapter::Bayesian(_) => bayesian::METHOD,
        }
    }

    /// `x` through the weight with this adapter.
    pub(crate) fn forward<const D: usize>(&self, weight: &Weight, x: Tensor<D>) -> Tensor<D> {
        match self {
            Adapter::Lora(adapter) => adapter.forward(weight, x),
            Adapter::Peqa(adapter) => adapter.forward(weight, x),
            Adapter::Tile(adapter) => adapter.forward(weight, x),
            Adapter::Bayesian(adapter) => adapter.forward(weight, x),
        }
    }

    /// The bias that is trained in the place of the layer's, `[d_out]`.
    pub fn bias(&self) -> Option<Tensor<1>> {
        match self {
            Adapter::Lora(adapter) => adapter.bias(),
            Adapter::Peqa(_) | Adapter::Tile(_) | Adapter::Bayesian(_) => None,
        }
    }

    /// Whether this adapter fits the layer at `path`.
    pub(crate) fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        match self {
            Adapter::Lora(adapter) => adapter.check(path, linear),
            Adapter::Peqa(adapter) => adapter.check(path, linear.weight()),
            Adapter::Tile(adapter) => adapter.check(path, linear.weight()),
            Adapter::Bayesian(adapter) => adapter.check(path, linear),
        }
    }

    /// This adapter on `weight`, which it fits: with what it computes from the weight once.
    pub(crate) fn bound_to(self, weight: &Weight) -> Self {
        match self {
            Adapter::Lora(adapter) => Adapter::Lora(adapter.bound_to(weight)),
            other => other,
        }
    }

    /// The packed weight with this adapter in it, on the same codes, and how near it is.
    ///
    /// # Errors
    /// [`Error::MergeIntoPacked`] if the codes cannot hold it.
    pub(crate) fn on_codes(
        &self,
        path: &str,
        weight: &QuantTensor,
    ) -> Result<(QuantTensor, Exactness)> {
        match self {
            Adapter::Lora(adapter) => adapter.on_codes(path),
            Adapter::Peqa(adapter) => adapter.on_codes(path, weight),
            Adapter::Tile(adapter) => adapter.on_codes(path, weight),
            Adapter::Bayesian(adapter) => adapter.on_codes(path),
        }
    }

    /// The weight with this adapter in it, in floats, and how far an element can be from the exact
    /// sum.
    pub(crate) fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness) {
        match self {
            Adapter::Lora(adapter) => adapter.to_dense(weight),
            Adapter::Peqa(adapter) => adapter.to_dense(weight),
            Adapter::Tile(adapter) => adapter.to_dense(weight),
            Adapter::Bayesian(adapter) => adapter.to_dense(weight),
        }
    }

    /// Parameters that LoRA+ gives a higher learning rate.
    pub(crate) fn fast_params(&self) -> Vec<ParamId> {
        match self {
            Adapter::Lora(adapter) => adapter.fast_params(),
            Adapter::Peqa(_) => Vec::new(),
            Adapter::Tile(adapter) => adapter.fast_params(),
            Adapter::Bayesian(adapter) => adapter.fast_params(),
        }
    }

    /// What the training loss has for this layer beside that of the tokens, `[1]`.
    pub(crate) fn penalty(&self) -> Option<Tensor<1>> {
        match self {
            Adapter::Bayesian(adapter) => Some(adapter.penalty()),
            Adapter::Lora(_) | Adapter::Peqa(_) | Adapter::Tile(_) => None,
        }
    }

    /// From now on, inputs are dropped, or gates drawn, as this seed says; none with `None`.
    pub(crate) fn seed_dropout(&mut self, path: &str, seed: Option<u64>) {
        match self {
            Adapter::Lora(adapter) => adapter.dropout_mut().seed(path, seed),
            Adapter::Peqa(_) => {}
            Adapter::Tile(adapter) => adapter.dropout_mut().seed(path, seed),
            Adapter::Bayesian(adapter) => adapter.seed_noise(path, seed),
        }
    }

    /// What files hold beside the tensors.
    pub(crate) fn settings(&self) -> Settings {
        match self {
            Adapter::Lora(adapter) => Settings::Lora(adapter.settings()),
            Adapter::Peqa(adapter) => Settings::Peqa(adapter.settings()),
            Adapter::Tile(adapter) => Settings::Tile(adapter.settings()),
            Adapter::Bayesian(adapter) => Settings::Bayesian(adapter.settings()),
        }
    }

    /// The tensors of this adapter, with their names after the layer's path.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        match self {
            Adapter::Lora(adapter) => adapter.tensors(),
            Adapter::Peqa(adapter) => adapter.tensors(),
            Adapter::Tile(adapter) => adapter.tensors(),
            Adapter::Bayesian(adapter) => adapter.tensors(),
        }
    }

    /// The adapter of the layer at `path`, from a file.
    pub(crate) fn read(
        settings: Settings,
        path: &str,
        file: &mut TensorFile,
        device: &Device,
    ) -> Result<Self> {
        Ok(match settings {
            Settings::Lora(settings) => {
                Self::Lora(LoraAdapter::read(settings, path, file, device)?)
            }
            Settings::Peqa(settings) => {
                Self::Peqa(PeqaAdapter::read(settings, path, file, device)?)
            }
            Settings::Tile(settings) => {
                Self::Tile(TileAdapter::read(settings, path, file, device)?)
            }
            Settings::Bayesian(settings) => {
                Self::Bayesian(BayesianAdapter::read(settings, path, file, device)?)
            }
        })
    }
}

/// The packed weight of the layer at `path`, which `method` needs.
pub(crate) fn quantized<'a>(
    method: &'static str,
    path: &str,
    weight: &'a Weight,
) -> Result<&'a QuantTensor> {
    match weight {
        Weight::Quant(weight) => Ok(weight),
        Weight::Dense(_) => Err(Error::NeedsQuantized {
            method,
            path: path.into(),
        }),
    }
}

/// Checks that a tensor of the adapter of the layer at `path` has this shape.
pub(crate) fn check_shape<const D: usize>(
    path: &str,
    expected: [usize; D],
    found: [usize; D],
) -> Result<()> {
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

/// Checks that a dense weight is of the dtype in which adapters are trained.
fn check_dtype(path: &str, weight: &Weight) -> Result<()> {
    match weight {
        Weight::Dense(weight) if weight.val().dtype() != DType::F32 => Err(Error::NotF32 {
            path: path.into(),
            found: weight.val().dtype(),
        }),
        _ => Ok(()),
    }
}

/// Checks a rank against the layer at `path`, of which a factor sees `dims`.
fn check_rank(path: &str, rank: usize, dims: [usize; 2]) -> Result<()> {
    if rank <= dims[0].min(dims[1]) {
        Ok(())
    } else {
        Err(Error::Rank {
            path: path.into(),
            rank,
            dims,
        })
    }
}

/// A number that must be positive and finite.
fn check_positive(setting: &'static str, value: f32) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::Setting {
        setting,
        value: value.to_string(),
        expected: "a positive number",
    })
}

/// A number that must be at least 1.
fn check_count(setting: &'static str, value: usize) -> Result<()> {
    if value > 0 {
        return Ok(());
    }
    Err(Error::Setting {
        setting,
        value: "0".into(),
        expected: "at least 1",
    })
}

/// The random numbers of a layer, which do not depend on what other layers there are.
fn layer_rng(seed: u64, path: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Sha256::digest(format!("{seed} {path}")).into())
}

/// A trained parameter of these values.
pub(crate) fn trained<const D: usize>(
    values: Vec<f32>,
    dims: [usize; D],
    device: &Device,
) -> Param<Tensor<D>> {
    let values = Tensor::from_data(TensorData::new(values, dims), (device, DType::F32));
    Param::from_tensor(values)
}

/// A trained parameter as a file holds it.
fn stored<const D: usize>(param: &Param<Tensor<D>>) -> LazyTensor<'_> {
    LazyTensor::floats(param.val().dims(), || floats(param.val()))
}

/// The trained parameter of this name in a file.
fn read_param<const D: usize>(
    name: &str,
    file: &mut TensorFile,
    device: &Device,
) -> Result<Param<Tensor<D>>> {
    let (values, dims) = file.floats::<D>(name)?;
    Ok(trained(values, dims, device))
}

/// Checks that the factors of a product in a file have one rank.
fn check_inner(
    name: &impl Fn(&str) -> String,
    a: &Param<Tensor<2>>,
    b: &Param<Tensor<2>>,
    file: &TensorFile,
) -> Result<()> {
    let (rank, b_rank) = (a.val().dims()[1], b.val().dims()[0]);
    if rank > 0 && rank == b_rank {
        return Ok(());
    }
    let problem = format!("has {b_rank} rows where `{}` has {rank} columns", name("a"));
    Err(file.refuse(&name("b"), problem).into())
}

/// The values of a tensor, in `f32`.
pub(crate) fn floats<const D: usize>(values: Tensor<D>) -> Vec<f32> {
    let values = values.into_data().convert::<f32>();
    values.try_into_vec().expect("converted to f32")
}

/// What `n` roundings in a row can make of a term, relative to it: `n u / (1 - n u)` with `u = 2⁻²⁴`
/// (Higham 2002, Accuracy and Stability of Numerical Algorithms, §3.1).
fn of_roundings(n: usize) -> f64 {
    let n_u = n as f64 * 2f64.powi(-24);
    if n_u < 1.0 {
        n_u / (1.0 - n_u)
    } else {
        f64::INFINITY
    }
}

/// The largest magnitude in a tensor.
fn largest<const D: usize>(values: Tensor<D>) -> f64 {
    f64::from(values.abs().max().into_scalar::<f32>())
}
