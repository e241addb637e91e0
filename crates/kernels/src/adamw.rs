//! A step of AdamW: an extension of burn's backends.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;

use crate::dtype::assert_same;

#[cfg(feature = "cubecl")]
mod cube;

/// The settings of a step of [`adamw`].
#[derive(Clone, Copy, Debug)]
pub struct AdamwStep {
    /// The learning rate.
    pub learning_rate: f64,
    /// The part of the parameter that the decay leaves: `1 - learning_rate · weight_decay`.
    pub kept: f64,
    /// The decay of the mean of gradients.
    pub beta_1: f32,
    /// The decay of the mean of their squares.
    pub beta_2: f32,
    /// What is added to the root of the mean of squares.
    pub epsilon: f32,
    /// The number of steps, this one included.
    pub time: i32,
}

impl AdamwStep {
    /// What the means are divided by, because they began at 0.
    fn corrections(&self) -> [f32; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powi(self.time))
    }
}

/// A step of AdamW on vectors of one length, composed from burn's primitive operations unless overridden.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait AdamwOps: Backend {
    /// The parameter, the mean of gradients and the mean of their squares after the step.
    #[fusion(meta = |value, _gradient, moment_1, moment_2, _step| (value.clone(), moment_1.clone(), moment_2.clone()))]
    fn adamw(
        value: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        moment_1: FloatTensor<Self>,
        moment_2: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::adamw::<Self>(value, gradient, moment_1, moment_2, step)
    }
}

#[cfg(feature = "flex")]
impl AdamwOps for burn::backend::Flex {}

#[cfg(feature = "ndarray")]
impl AdamwOps for burn::backend::NdArray {}

impl<B: AdamwOps, C: CheckpointStrategy> AdamwOps for Autodiff<B, C> {}

/// A step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): the parameter, the mean of gradients and
/// the mean of their squares after it.
///
/// On a device of CubeCL it is one kernel in `F32`.
///
/// # Shapes
/// All are `[n]`, of one dtype. The means are 0 before the first step.
///
/// # Panics
/// If the lengths or the dtypes differ.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::{AdamwStep, adamw};
///
/// let device = Device::flex();
/// let zeros = || Tensor::<1>::zeros([2], &device);
/// let step = AdamwStep {
///     learning_rate: 0.1,
///     kept: 1.0,
///     beta_1: 0.9,
///     beta_2: 0.999,
///     epsilon: 1e-8,
///     time: 1,
/// };
/// let gradient = Tensor::from_data([4.0, -0.5], &device);
/// let (value, ..) = adamw(zeros(), gradient, [zeros(), zeros()], step);
/// // The first step is as large as the rate.
/// for (value, expected) in value.into_data().try_to_vec::<f32>().unwrap().iter().zip([-0.1, 0.1]) {
///     assert!((value - expected).abs() < 1e-6);
/// }
/// ```
pub fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    moments: [Tensor<1>; 2],
    step: AdamwStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [moment_1, moment_2] = moments;
    for (name, tensor) in [
        ("the gradient", &gradient),
        ("the mean of gradients", &moment_1),
        ("the mean of squares", &moment_2),
    ] {
        assert_eq!(tensor.dims(), value.dims(), "the length of {name}");
        assert_same(name, tensor.dtype(), "the parameter", value.dtype());
    }
    let [value, gradient, moment_1, moment_2] =
        [value, gradient, moment_1, moment_2].map(Tensor::into_dispatch);
    let (value, moment_1, moment_2) = Dispatch::adamw(value, gradient, moment_1, moment_2, step);
    let [value, moment_1, moment_2] = [value, moment_1, moment_2].map(Tensor::from_dispatch);
    (value, [moment_1, moment_2])
}

mod composed {
    use super::*;

    pub(super) fn adamw<B: Backend>(
        value: FloatTensor<B>,
        gradient: FloatTensor<B>,
        moment_1: FloatTensor<B>,
        moment_2: FloatTensor<B>,
        step: AdamwStep,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let times = |t, factor: f32| B::float_mul_scalar(t, factor.into());
        let mean = |old, new, beta: f32| B::float_add(times(old, beta), times(new, 1.0 - beta));
        let square = B::float_mul(gradient.clone(), gradient.clone());
        let moment_1 = mean(moment_1, gradient, step.beta_1);
        let moment_2 = mean(moment_2, square, step.beta_2);
        let [of_mean, of_squares] = step.corrections();
        let corrected = B::float_div_scalar(moment_1.clone(), of_mean.into());
        let squares = B::float_div_scalar(moment_2.clone(), of_squares.into());
        let root = B::float_add_scalar(B::float_sqrt(squares), step.epsilon.into());
        let delta = B::float_mul_scalar(B::float_div(corrected, root), step.learning_rate.into());
        let kept = match step.kept == 1.0 {
            true => value,
            false => B::float_mul_scalar(value, step.kept.into()),
        };
        (B::float_sub(kept, delta), moment_1, moment_2)
    }
}
