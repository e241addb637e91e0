use std::time::Instant;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};
use quant_core::{Format, Gram, Precision, QuantTensor, Quantized, Quantizer};

use crate::adapter::check_shape;
use crate::{Adapter, Error, LayerError, LayerReport, Result};

/// The weight of a [`Linear`], `[d_in, d_out]`.
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a layer has one; the size is that of its tensors"
)]
pub enum Weight {
    /// Floats of any dtype, which products convert where they use them.
    Dense(Param<Tensor<2>>),
    /// Packed codes, always frozen.
    Quant(QuantTensor),
}

impl Weight {
    pub(crate) fn set_precision(&mut self, precision: Precision) {
        if let Weight::Quant(weight) = self {
            *weight = weight.clone().with_precision(precision);
        }
    }

    /// A dense weight that is not trained.
    pub fn frozen(weight: Tensor<2>) -> Self {
        Self::Dense(Param::from_tensor(weight).set_require_grad(false))
    }

    /// The dimensions, `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Weight::Dense(weight) => weight.val().dims(),
            Weight::Quant(weight) => weight.dims(),
        }
    }

    /// The format of a packed weight.
    pub fn format(&self) -> Option<Format> {
        match self {
            Weight::Dense(_) => None,
            Weight::Quant(weight) => Some(weight.format()),
        }
    }

    /// Bytes in memory, without the padding of a packed weight.
    pub fn n_bytes(&self) -> usize {
        match self {
            Weight::Dense(weight) => {
                let weight = weight.val();
                weight.shape().num_elements() * weight.dtype().size()
            }
            Weight::Quant(weight) => weight.n_bytes(),
        }
    }

    /// Whether training changes it. Packed codes are never trained.
    pub(crate) fn trains(&self) -> bool {
        match self {
            // A parameter on a plain device shows its setting when training begins.
            Weight::Dense(weight) if !weight.val().device().is_autodiff() => {
                weight.clone().train().is_require_grad()
            }
            Weight::Dense(weight) => weight.is_require_grad(),
            Weight::Quant(_) => false,
        }
    }

    pub(crate) fn device(&self) -> Device {
        match self {
            Weight::Dense(weight) => weight.val().device(),
            Weight::Quant(weight) => weight.device(),
        }
    }

    /// The weight in `f32`, `[d_in, d_out]`; a packed one is dequantized.
    pub fn to_dense(&self) -> Tensor<2> {
        match self {
            Weight::Dense(weight) => weight.val().cast(DType::F32),
            Weight::Quant(weight) => weight.dequantize(),
        }
    }

    /// The product `x · W`.
    ///
    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - result: `[.., d_out]`, in the dtype of `x`
    ///
    /// # Panics
    /// If `x` has another width.
    pub fn matmul<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Weight::Dense(weight) => kernels::matmul(x, weight.val()),
            Weight::Quant(weight) => weight.matmul(x),
        }
    }

    /// Quantizes a dense weight. Errors name the layer by `path`.
    ///
    /// `gram` is that of the layer's inputs; without one, quantizers that need it refuse.
    ///
    /// # Errors
    /// [`Error::AlreadyQuantized`], or [`Error::Quant`] with the error of the quantizer. Then the weight
    /// is unchanged.
    pub fn quantize(
        &mut self,
        path: &str,
        quantizer: &dyn Quantizer,
        gram: Option<&Gram>,
    ) -> Result<LayerReport> {
        let clock = Instant::now();
        let dense = match self {
            Weight::Dense(_) => self.to_dense(),
            Weight::Quant(_) => return Err(Error::AlreadyQuantized { path: path.into() }),
        };
        let named = |source| Error::Quant {
            path: path.into(),
            source,
        };
        if let Some(gram) = gram {
            gram.check(dense.dims()[0]).map_err(named)?;
        }
        let Quantized { weight, notes } = quantizer.quantize(dense.clone(), gram).map_err(named)?;
        let error = LayerError::between(dense, weight.dequantize(), gram);
        *self = Weight::Quant(weight);
        Ok(LayerReport {
            path: path.into(),
            format: self.format(),
            error,
            n_bytes: self.n_bytes(),
            seconds: clock.elapsed().as_secs_f64(),
            notes,
        })
    }
}

/// A linear layer, `y = x · W + b`, with at most one adapter.
///
/// The adapter reads the weight and the input; the bias is added last.
///
/// # Examples
/// ```
/// use burn::tensor::{DType, Device, Tensor};
/// use peft::{Linear, Weight};
/// use quant_core::Rtn;
///
/// let device = Device::flex();
/// let mut linear = Linear::new(Weight::frozen(Tensor::eye(8, &device)), None);
/// let report = linear.quantize("up", &Rtn::new().with_bits(4), None)?;
/// assert_eq!(report.format.map(|format| format.bits()), Some(4));
/// let y = linear.forward(Tensor::<3>::ones([2, 5, 8], &device));
/// assert_eq!(y.dims(), [2, 5, 8]);
/// let error = linear.quantize("up", &Rtn::new(), None).unwrap_err();
/// assert_eq!(error.to_string(), "layer `up` is quantized already");
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct Linear {
    pub(crate) weight: Weight,
    bias: Option<Param<Tensor<1>>>,
    pub(crate) adapter: Option<Adapter>,
}

impl Linear {
    /// A layer without an adapter; `bias` is `[d_out]`.
    pub fn new(weight: Weight, bias: Option<Param<Tensor<1>>>) -> Self {
        Self {
            weight,
            bias,
            adapter: None,
        }
    }

    /// A frozen layer of the parameters of one of burn's.
    ///
    /// ```
    /// use burn::nn::LinearConfig;
    /// use burn::tensor::{DType, Device, Tensor};
    /// use peft::Linear;
    ///
    /// let device = Device::flex();
    /// let burns = LinearConfig::new(6, 4).init(&device);
    /// let x = Tensor::<2>::ones([3, 6], &device);
    /// let expected = burns.forward(x.clone()).into_data();
    /// let linear = Linear::from_burn(burns);
    /// expected.assert_eq(&linear.forward(x.clone()).into_data(), true);
    /// let burns = linear.into_burn("up")?;
    /// expected.assert_eq(&burns.forward(x).into_data(), true);
    /// # Ok::<(), peft::Error>(())
    /// ```
    pub fn from_burn(linear: burn::nn::Linear) -> Self {
        let bias = linear.bias.map(|bias| bias.set_require_grad(false));
        Self::new(Weight::frozen(linear.weight.val().detach()), bias)
    }

    /// The layer as one of burn's, frozen; a packed weight is dequantized. Errors name it by `path`.
    ///
    /// # Errors
    /// [`Error::AlreadyAdapted`] if it has an adapter, which burn's cannot have.
    pub fn into_burn(self, path: &str) -> Result<burn::nn::Linear> {
        if self.adapter.is_some() {
            return Err(Error::AlreadyAdapted { path: path.into() });
        }
        let weight = Param::from_tensor(self.weight.to_dense()).set_require_grad(false);
        Ok(burn::nn::Linear {
            weight,
            bias: self.bias,
        })
    }

    /// The output of the layer.
    ///
    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - result: `[.., d_out]`, in the dtype of `x`
    ///
    /// # Panics
    /// If `x` has another width.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let y = match &self.adapter {
            Some(adapter) => adapter.forward(&self.weight, x),
            None => self.weight.matmul(x),
        };
        let tuned = self.adapter.as_ref().and_then(Adapter::bias);
        match tuned.or_else(|| self.bias()) {
            Some(bias) => {
                let bias = bias.cast(y.dtype());
                y + bias.unsqueeze()
            }
            None => y,
        }
    }

    /// A frozen layer with another weight, the same bias and no adapter.
    pub fn with_weight(&self, weight: Weight) -> Self {
        let bias = self.bias();
        let bias = bias.map(|bias| Param::from_tensor(bias).set_require_grad(false));
        Self::new(weight, bias)
    }

    /// Replaces the values of the bias, `[d_out]`, which is trained or frozen as before.
    pub(crate) fn replace_bias(&mut self, values: Tensor<1>) {
        self.bias = self.bias.take().map(|bias| bias.map(|_| values));
    }

    pub(crate) fn set_precision(&mut self, precision: Precision) {
        self.weight.set_precision(precision);
    }

    /// The weight without the adapter.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias without the adapter, `[d_out]`.
    pub fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    /// The adapter, if there is one.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The weight that [`Linear::forward`] multiplies by, adapter included, in `f32`: `[d_in, d_out]`.
    pub fn to_dense(&self) -> Tensor<2> {
        match &self.adapter {
            Some(adapter) => adapter.ops().to_dense(&self.weight).0.detach(),
            None => self.weight.to_dense(),
        }
    }

    /// Checks that the weight is dense and has no adapter, as [`Linear::quantize`] needs it.
    ///
    /// # Errors
    /// [`Error::AlreadyQuantized`] or [`Error::AlreadyAdapted`].
    pub fn check_plain(&self, path: &str) -> Result<()> {
        let path = path.to_string();
        match (&self.weight, &self.adapter) {
            (_, Some(_)) => Err(Error::AlreadyAdapted { path }),
            (Weight::Quant(_), None) => Err(Error::AlreadyQuantized { path }),
            (Weight::Dense(_), None) => Ok(()),
        }
    }

    /// Replaces the dense weight by another one of its shape and an adapter, which an initialization chose
    /// together. Errors name the layer by `path`.
    ///
    /// # Errors
    /// As [`Linear::check_plain`]; [`Error::Shape`] or another error of weight or adapter. Then the layer
    /// is unchanged.
    pub fn replace(&mut self, path: &str, weight: Weight, adapter: Option<Adapter>) -> Result<()> {
        self.check_plain(path)?;
        check_shape(path, self.weight.dims(), weight.dims())?;
        let replaced = Self {
            adapter: None,
            bias: self.bias.clone(),
            weight,
        };
        if let Some(adapter) = &adapter {
            adapter.check(path, &replaced)?;
        }
        let adapter = adapter.map(|adapter| adapter.bound_to(&replaced.weight));
        *self = Self {
            adapter,
            ..replaced
        };
        Ok(())
    }

    /// Quantizes the dense weight. Errors name the layer by `path`.
    ///
    /// `gram` is that of the layer's inputs; without one, quantizers that need it refuse.
    ///
    /// # Errors
    /// [`Error::AlreadyQuantized`], [`Error::AlreadyAdapted`], or [`Error::Quant`] with the error of the
    /// quantizer. Then the layer is unchanged.
    pub fn quantize(
        &mut self,
        path: &str,
        quantizer: &dyn Quantizer,
        gram: Option<&Gram>,
    ) -> Result<LayerReport> {
        self.check_plain(path)?;
        self.weight.quantize(path, quantizer, gram)
    }
}
