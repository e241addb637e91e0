//! PEQA: the scales of a quantized weight are the trainable parameters.
//!
//! Kim et al. 2023, arXiv:2305.14152: `y = x · (s₀ + Δs)(q - z)`, with the codes frozen. Here the
//! trained parameter is the logarithm `φ` of a factor, `s₀ + Δs = s₀ exp(φ)`, initialized to 0: scales
//! differ by orders of magnitude between layers and bit widths; with factors one learning rate serves
//! all of them, and a scale keeps its sign. The zeros may train too, `z = z₀ + δ` in units of a code.
//!
//! For formats that hold scales in `f16`, scales are rounded to it wherever the layer is used, and the
//! gradient of rounding is the identity (straight-through, Bengio et al. 2013, arXiv:1308.3432): the
//! tuned model is then one that such a file holds.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};
use quant_core::{Grid, QuantTensor, StoredGrid};
use serde::{Deserialize, Serialize};

use super::checks::{check_shape, quantized};
use super::tensors::{Source, stored};
use super::{Adapter, AdapterOps, Method, Settings};
use crate::{Error, Exactness, Linear, Result, Targets, Weight, learning_rate};
use tensor_files::LazyTensor;

/// Trains the scales of quantized layers, one per channel or per group.
///
/// Merging is exact: the trained scales replace those of the weight, and the codes stay.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Error, Linear, Method, Peqa, Weight};
/// use quant_core::Rtn;
///
/// let weight = Tensor::<1>::from_floats([-0.5, 1.0, 2.0, 0.25], &Device::flex());
/// let mut linear = Linear::new(Weight::frozen(weight.reshape([2, 2])), None);
/// let error = Peqa::new().init("proj", &linear).unwrap_err();
/// assert!(matches!(error, Error::NeedsQuantized { .. }));
/// linear.quantize("proj", &Rtn::new().with_bits(4), None)?;
/// let adapter = Peqa::new().init("proj", &linear)?;
/// assert_eq!(burn::module::Module::num_params(&adapter), 2);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peqa {
    targets: Targets,
    zeros: bool,
    f16_scales: bool,
}

impl Default for Peqa {
    fn default() -> Self {
        Self::new()
    }
}

impl Peqa {
    /// PEQA on every linear layer, with frozen zeros.
    pub fn new() -> Self {
        Self {
            targets: Targets::All,
            zeros: false,
            f16_scales: false,
        }
    }

    /// Sets the layers to adapt.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.targets = targets.into();
        self
    }

    /// Sets whether the zeros of affine grids train too.
    pub fn with_zeros(mut self, zeros: bool) -> Self {
        self.zeros = zeros;
        self
    }

    /// Sets whether scales are rounded to `f16`, with straight-through gradients; false by default.
    ///
    /// The scales of the base must be `f16`. The merged model can then be saved where scales are `f16`,
    /// as in GPTQ's files.
    pub fn with_f16_scales(mut self, f16_scales: bool) -> Self {
        self.f16_scales = f16_scales;
        self
    }
}

impl Method for Peqa {
    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter> {
        let weight = linear.weight();
        let weight = quantized(METHOD, path, weight)?;
        if self.zeros {
            check_zeros(path, weight)?;
        }
        if self.f16_scales {
            check_scales(path, weight)?;
        }
        let zeros = || Param::from_tensor(weight.scales().zeros_like());
        Ok(Adapter::Peqa(PeqaAdapter {
            log_factors: zeros(),
            zero_shifts: self.zeros.then(zeros),
            f16_scales: self.f16_scales,
        }))
    }

    fn learning_rate(&self, _: usize) -> f64 {
        learning_rate::of_scales()
    }
}

/// The trained factors of one layer's scales, and the shifts of its zeros.
#[derive(Module, Debug)]
pub struct PeqaAdapter {
    log_factors: Param<Tensor<2>>,
    zero_shifts: Option<Param<Tensor<2>>>,
    #[module(skip)]
    f16_scales: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PeqaSettings {
    zeros: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    f16_scales: bool,
}

const METHOD: &str = "PEQA";

impl PeqaAdapter {
    /// The factors of the scales before they are rounded, `[n_groups, d_out]`.
    pub fn factors(&self) -> Tensor<2> {
        self.log_factors.val().exp()
    }

    /// The shifts of the zeros in units of a code, `[n_groups, d_out]`, if zeros are trained.
    pub fn zero_shifts(&self) -> Option<Tensor<2>> {
        self.zero_shifts.as_ref().map(|shifts| shifts.val())
    }

    /// Whether scales are rounded to `f16`.
    pub fn f16_scales(&self) -> bool {
        self.f16_scales
    }

    /// The trained scales and zeros, `[n_groups, d_out]` each.
    fn grid(&self, weight: &QuantTensor) -> (Tensor<2>, Option<Tensor<2>>) {
        let zeros = match (weight.zeros(), self.zero_shifts()) {
            (Some(zeros), Some(shifts)) => Some(zeros + shifts),
            (zeros, _) => zeros,
        };
        let scales = weight.scales() * self.factors();
        if !self.f16_scales {
            return (scales, zeros);
        }
        let detached = scales.clone().detach();
        let rounded = detached.clone().cast(FloatDType::F16).cast(FloatDType::F32);
        // Without a factor, a scale keeps its sign: it does not become 0.
        let vanished = rounded
            .clone()
            .equal_elem(0.0)
            .bool_and(detached.clone().not_equal_elem(0.0));
        let least = detached.clone().sign() * 2f32.powi(-24);
        let rounded = rounded.mask_where(vanished, least);
        // The difference is zero, and has the gradient of the scales.
        (rounded + (scales - detached), zeros)
    }

    pub(super) fn read(settings: PeqaSettings, path: &str, source: &mut Source) -> Result<Self> {
        let mut read = |name: &str| source.param(&format!("{path}.{name}"));
        Ok(Self {
            log_factors: read("log_factors")?,
            zero_shifts: settings.zeros.then(|| read("zero_shifts")).transpose()?,
            f16_scales: settings.f16_scales,
        })
    }
}

impl AdapterOps for PeqaAdapter {
    fn name(&self) -> &'static str {
        METHOD
    }

    /// # Panics
    /// If the weight is dense, which [`AdapterOps::check`] refuses beforehand.
    fn forward(&self, weight: &Weight, x: Tensor<2>) -> Tensor<2> {
        let weight = packed(weight);
        let (scales, zeros) = self.grid(weight);
        weight.matmul_on_grid(x, scales, zeros)
    }

    fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        let weight = quantized(METHOD, path, linear.weight())?;
        let expected = weight.layout().grid_shape();
        check_shape(path, expected, self.log_factors.val().dims())?;
        if let Some(shifts) = &self.zero_shifts {
            check_zeros(path, weight)?;
            check_shape(path, expected, shifts.val().dims())?;
        }
        if self.f16_scales {
            check_scales(path, weight)?;
        }
        Ok(())
    }

    /// Factors whose scales are beyond `f32` are refused before the layer is used.
    fn check_values(&self, path: &str, weight: &Weight) -> Result<()> {
        self.on_codes(path, packed(weight)).map(drop)
    }

    fn on_codes(&self, path: &str, weight: &QuantTensor) -> Result<(QuantTensor, Exactness)> {
        let (scales, zeros) = self.grid(weight);
        let merged = weight
            .clone()
            .with_grid(scales.detach(), zeros.map(Tensor::detach));
        let merged = merged.map_err(|source| Error::Quant {
            path: path.into(),
            source,
        })?;
        Ok((merged, Exactness::Exact))
    }

    /// # Panics
    /// If the weight is dense, or the trained grid is not finite.
    fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness) {
        let (merged, exactness) = self.on_codes("", packed(weight)).expect("a finite grid");
        (merged.dequantize(), exactness)
    }

    fn settings(&self) -> Settings {
        Settings::Peqa(PeqaSettings {
            zeros: self.zero_shifts.is_some(),
            f16_scales: self.f16_scales,
        })
    }

    fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        let mut tensors = vec![("log_factors", stored(&self.log_factors))];
        if let Some(shifts) = &self.zero_shifts {
            tensors.push(("zero_shifts", stored(shifts)));
        }
        tensors
    }
}

fn packed(weight: &Weight) -> &QuantTensor {
    match weight {
        Weight::Quant(weight) => weight,
        Weight::Dense(_) => panic!("PEQA on a dense weight"),
    }
}

fn check_zeros(path: &str, weight: &QuantTensor) -> Result<()> {
    let format = weight.format();
    if format.grid() == Grid::Affine {
        return Ok(());
    }
    Err(Error::Zeros {
        path: path.into(),
        format,
    })
}

fn check_scales(path: &str, weight: &QuantTensor) -> Result<()> {
    let is_f16 = StoredGrid::new().with_f16_scales(true).holds(weight);
    // Those that are codes become floats where they are trained.
    if is_f16 && weight.double_scales().is_none() {
        return Ok(());
    }
    Err(Error::ScalesNotF16 { path: path.into() })
}
