//! PEQA: the scales of a quantized weight are the trainable parameters.
//!
//! Kim et al. 2023, arXiv:2305.14152: `y = x · (s₀ + Δs)(q - z)`, with codes and zeros frozen. Here
//! the trained parameter is the factor `f` of `s₀ + Δs = s₀ f`, from 1 on: scales differ by orders of
//! magnitude between layers and bit widths, and with factors one learning rate serves them all.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use quant_core::QuantTensor;

use super::{Adapter, Method, check_shape, quantized, read_param, stored};
use crate::files::{LazyTensor, TensorFile};
use crate::{Error, Exactness, Result, Targets, Weight};

/// Trains the scales of quantized layers: per channel or by group, as the layers are quantized.
///
/// Merging is exact: the trained scales become the weight's, and codes and zeros stay.
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
        let weight = quantized(METHOD, path, weight)?;
        Ok(Adapter::Peqa(PeqaAdapter {
            factors: Param::from_tensor(weight.scales().ones_like()),
        }))
    }
}

/// The trained factors of one layer's scales.
#[derive(Module, Debug)]
pub struct PeqaAdapter {
    factors: Param<Tensor<2>>,
}

const METHOD: &str = "PEQA";

impl PeqaAdapter {
    pub(super) const NAME: &'static str = "peqa";

    /// What each scale is multiplied by, `[n_groups, d_out]`.
    pub fn factors(&self) -> Tensor<2> {
        self.factors.val()
    }

    /// The weight's scales with the factors, `[n_groups, d_out]`.
    fn scales(&self, weight: &QuantTensor) -> Tensor<2> {
        weight.scales() * self.factors()
    }

    /// # Panics
    /// If the weight is dense, which [`PeqaAdapter::check`] refuses beforehand.
    pub(super) fn forward<const D: usize>(&self, weight: &Weight, x: Tensor<D>) -> Tensor<D> {
        match weight {
            Weight::Quant(weight) => weight.matmul_scaled(x, self.scales(weight)),
            Weight::Dense(_) => panic!("PEQA on a dense weight"),
        }
    }

    pub(super) fn check(&self, path: &str, weight: &Weight) -> Result<()> {
        let expected = quantized(METHOD, path, weight)?.layout().grid_shape();
        check_shape(path, expected, self.factors().dims())
    }

    pub(super) fn merge(&self, path: &str, weight: &Weight) -> Result<(Weight, Exactness)> {
        self.check(path, weight)?;
        let weight = quantized(METHOD, path, weight)?;
        let scales = self.scales(weight);
        let merged = weight.clone().with_scales(scales);
        let merged = merged.map_err(|source| Error::Quant {
            path: path.into(),
            source,
        })?;
        Ok((Weight::Quant(merged), Exactness::Exact))
    }

    pub(super) fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        vec![("factors", stored(&self.factors))]
    }

    pub(super) fn read(path: &str, file: &mut TensorFile, device: &Device) -> Result<Self> {
        let factors = read_param(&format!("{path}.factors"), file, device)?;
        Ok(Self { factors })
    }
}
