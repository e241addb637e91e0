//! Tensors as values on the host and as frozen parameters, and checks of both.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::{Error, Result};

/// The values of a tensor, in `f32`.
pub(crate) fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let values = tensor.into_data().convert::<f32>().try_into_vec::<f32>();
    values.expect("converted to f32")
}

/// The values of an integer tensor, in `u32`.
pub(crate) fn words<const D: usize>(tensor: Tensor<D, Int>) -> Vec<u32> {
    let values = tensor.into_data().convert::<u32>().try_into_vec::<u32>();
    values.expect("converted to u32")
}

/// A parameter without a gradient.
pub(crate) fn frozen<const D: usize>(values: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(values).set_require_grad(false)
}

/// A parameter of `f32` without a gradient.
pub(crate) fn frozen_floats<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Param<Tensor<D>> {
    // Uploaded as one row: CubeCL pads rows on CUDA, and kernels would copy a padded grid for each product.
    let values = TensorData::new(values, [shape.iter().product::<usize>()]);
    let values = Tensor::<1>::from_data(values, (device, DType::F32));
    frozen(values.reshape(shape))
}

/// A parameter of `u32`.
pub(crate) fn frozen_words<const D: usize>(
    values: Vec<u32>,
    shape: [usize; D],
    device: &Device,
) -> Param<Tensor<D, Int>> {
    let values = TensorData::new(values, shape);
    let values = Tensor::from_data(values, (device, DType::U32));
    Param::initialized(ParamId::new(), values)
}

/// Checks that `values`, rows of `d_out`, are finite; `what` names them in the error.
///
/// # Errors
/// [`Error::NonFinite`] if there is a NaN or an infinity.
pub fn check_finite(what: &'static str, values: &[f32], d_out: usize) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::NonFinite {
            what,
            value: values[at],
            row: at / d_out,
            column: at % d_out,
            count: values.iter().filter(|v| !v.is_finite()).count(),
        }),
    }
}

/// # Errors
/// [`Error::Length`] if the lengths differ.
pub(crate) fn check_length(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            found,
        })
    }
}
