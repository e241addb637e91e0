//! Tensors of adapters: drawn from a seed, read from files, and their values.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use sha2::{Digest, Sha256};

use crate::{Exactness, Result, Weight};
use tensor_files::{LazyTensor, TensorFile};

/// The random number generator of a layer, independent of other layers.
pub(super) fn layer_rng(seed: u64, path: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Sha256::digest(format!("{seed} {path}")).into())
}

/// Random values, uniform in `±bound`, for the layer at `path`.
pub(super) fn uniform(
    seed: u64,
    path: &str,
    dims: [usize; 2],
    bound: f32,
    device: &Device,
) -> Tensor<2> {
    let mut rng = layer_rng(seed, path);
    let values = (0..dims[0] * dims[1]).map(|_| rng.random_range(-bound..bound));
    tensor(values.collect(), dims, device)
}

/// A tensor of these values.
pub(crate) fn tensor<const D: usize>(
    values: Vec<f32>,
    dims: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, dims), (device, DType::F32))
}

/// A trained parameter of these values.
pub(crate) fn trained<const D: usize>(
    values: Vec<f32>,
    dims: [usize; D],
    device: &Device,
) -> Param<Tensor<D>> {
    Param::from_tensor(tensor(values, dims, device))
}

/// A trained parameter as a file holds it.
pub(super) fn stored<const D: usize>(param: &Param<Tensor<D>>) -> LazyTensor<'_> {
    LazyTensor::floats(param.val().dims(), || floats(param.val()))
}

/// A frozen tensor that the adapters of several layers share: each has a clone of it.
///
/// A file holds it once, under its digest.
#[derive(Module, Debug)]
pub(crate) struct Shared {
    pub(crate) tensor: Tensor<2>,
    #[module(skip)]
    digest: String,
}

impl Shared {
    pub(super) fn new(tensor: Tensor<2>) -> Self {
        let mut hash = Sha256::new();
        hash.update(format!("{:?}\n", tensor.dims()));
        for value in floats(tensor.clone()) {
            hash.update(value.to_le_bytes());
        }
        let digest = hash.finalize();
        let digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { tensor, digest }
    }

    /// The name of the tensor with this digest in a file.
    fn name(digest: &str) -> String {
        format!("shared.{digest}")
    }

    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }

    /// The tensor with its name, as a file holds it.
    pub(crate) fn stored(&self) -> (String, LazyTensor<'_>) {
        let tensor = LazyTensor::floats(self.tensor.dims(), || floats(self.tensor.clone()));
        (Self::name(&self.digest), tensor)
    }
}

/// A file of adapters, with the device for its tensors.
pub(crate) struct Source {
    pub(crate) file: TensorFile,
    device: Device,
    shared: BTreeMap<String, Shared>,
}

impl Source {
    pub(crate) fn new(file: TensorFile, device: &Device) -> Self {
        Self {
            file,
            device: device.clone(),
            shared: BTreeMap::new(),
        }
    }

    /// The trained parameter of this name.
    pub(super) fn param<const D: usize>(&mut self, name: &str) -> Result<Param<Tensor<D>>> {
        let (values, dims) = self.file.floats::<D>(name)?;
        Ok(trained(values, dims, &self.device))
    }

    /// The factors `PATH.a`, `[_, r]`, and `PATH.b`, `[r, _]`, of a product.
    pub(super) fn factors(&mut self, path: &str) -> Result<[Param<Tensor<2>>; 2]> {
        let [a_name, b_name] = ["a", "b"].map(|factor| format!("{path}.{factor}"));
        let (a, b) = (self.param::<2>(&a_name)?, self.param::<2>(&b_name)?);
        let (rank, b_rank) = (a.val().dims()[1], b.val().dims()[0]);
        if rank > 0 && rank == b_rank {
            return Ok([a, b]);
        }
        let problem = format!("has {b_rank} rows where `{a_name}` has {rank} columns");
        Err(self.file.refuse(&b_name, problem).into())
    }

    /// The shared tensor with this digest, which is read once.
    pub(super) fn shared(&mut self, digest: &str) -> Result<Shared> {
        if let Some(shared) = self.shared.get(digest) {
            return Ok(shared.clone());
        }
        let name = Shared::name(digest);
        let (values, dims) = self.file.floats::<2>(&name)?;
        let shared = Shared::new(tensor(values, dims, &self.device));
        if shared.digest != digest {
            let problem = format!("has the digest {}: it was changed", shared.digest);
            return Err(self.file.refuse(&name, problem).into());
        }
        self.shared.insert(digest.into(), shared.clone());
        Ok(shared)
    }
}

/// The values of a tensor, in `f32`.
pub(crate) fn floats<const D: usize>(values: Tensor<D>) -> Vec<f32> {
    let values = values.into_data().convert::<f32>();
    values.try_into_vec().expect("converted to f32")
}

/// The largest relative error of a term after `n` roundings, `n u / (1 - n u)` with `u = 2⁻²⁴`
/// (Higham 2002, Accuracy and Stability of Numerical Algorithms, §3.1).
pub(super) fn of_roundings(n: usize) -> f64 {
    let n_u = n as f64 * 2f64.powi(-24);
    if n_u < 1.0 {
        n_u / (1.0 - n_u)
    } else {
        f64::INFINITY
    }
}

/// The largest magnitude in a tensor.
pub(super) fn largest<const D: usize>(values: Tensor<D>) -> f64 {
    f64::from(values.abs().max().into_scalar::<f32>())
}

/// `W + A B`, and the same sum of magnitudes.
pub(super) fn low_rank_sum(weight: &Weight, a: Tensor<2>, b: Tensor<2>) -> [Tensor<2>; 2] {
    let weight = weight.to_dense();
    let magnitudes = weight.clone().abs() + a.clone().abs().matmul(b.clone().abs());
    [weight + a.matmul(b), magnitudes]
}

/// A sum whose terms were rounded so many times, with its error: a part of the sum of magnitudes.
pub(super) fn bounded(
    sum: Tensor<2>,
    magnitudes: Tensor<2>,
    roundings: usize,
) -> (Tensor<2>, Exactness) {
    let exactness = Exactness::Bounded {
        max_weight_error: of_roundings(roundings) * largest(magnitudes),
        max_weight: largest(sum.clone()),
    };
    (sum, exactness)
}
