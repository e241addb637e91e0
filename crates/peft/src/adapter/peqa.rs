//! PEQA: the scales of a quantized weight are the trainable parameters.
//!
//! Kim et al. 2023, arXiv:2305.14152: `y = x · (s₀ + Δs)(q - z)`, with codes and zeros frozen.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::{Adapter, Method, quantized};
use crate::files::{LazyTensor, TensorFile};
use crate::{Error, Exactness, Result, Targets, Weight};

/// Trains the scales of quantized layers: per channel or by group, as the layers are quantized.
///
/// Merging is exact: the trained scales become the weight's scales, and the codes stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peqa {
    targets: Targets,
}

impl Default for Peqa {
    fn default() -> Self {
        Self::new()
    }
}

impl Peqa {
    /// On every linear layer.
    pub fn new() -> Self {
        Self {
            targets: Targets::All,
        }
    }

    /// On these layers only.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.targets = targets.into();
        self
    }
}

impl Method for Peqa {
    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn init(&self, path: &str, weight: &Weight) -> Result<Adapter> {
        let weight = quantized("PEQA", path, weight)?;
        Ok(Adapter::Peqa(PeqaAdapter {
            scales: Param::from_tensor(weight.scales()),
        }))
    }
}

/// The trained scales of one layer.
#[derive(Module, Debug)]
pub struct PeqaAdapter {
    scales: Param<Tensor<2>>,
}

impl PeqaAdapter {
    pub(super) const METHOD: &'static str = "peqa";

    /// `[n_groups, d_out]`.
    pub fn scales(&self) -> Tensor<2> {
        self.scales.val()
    }

    /// # Panics
    /// If the weight is dense, which [`PeqaAdapter::check`] refuses beforehand.
    pub(super) fn forward<const D: usize>(&self, weight: &Weight, x: Tensor<D>) -> Tensor<D> {
        match weight {
            Weight::Quant(weight) => weight.matmul_scaled(x, self.scales()),
            Weight::Dense(_) => panic!("PEQA on a dense weight"),
        }
    }

    pub(super) fn check(&self, path: &str, weight: &Weight) -> Result<()> {
        let expected = quantized("PEQA", path, weight)?.scales().dims();
        let found = self.scales().dims();
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

    pub(super) fn merge(&self, path: &str, weight: &Weight) -> Result<(Weight, Exactness)> {
        self.check(path, weight)?;
        let weight = quantized("PEQA", path, weight)?.clone();
        let merged = Weight::Quant(weight.with_scales(self.scales()));
        Ok((merged, Exactness::Exact))
    }

    pub(super) fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        let dims = self.scales().dims();
        let scales = || {
            let scales = self.scales().into_data().convert::<f32>();
            scales.try_into_vec().expect("converted to f32")
        };
        vec![("scales", LazyTensor::floats(dims, scales))]
    }

    pub(super) fn read(path: &str, file: &mut TensorFile, device: &Device) -> Result<Self> {
        let (scales, dims) = file.floats::<2>(&format!("{path}.scales"))?;
        let scales = Tensor::from_data(TensorData::new(scales, dims), (device, DType::F32));
        Ok(Self {
            scales: Param::from_tensor(scales),
        })
    }
}
