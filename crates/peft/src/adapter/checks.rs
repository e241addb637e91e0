//! Checks of settings, and of layers that are to be adapted.

use burn::tensor::{DType, Tensor};
use quant_core::QuantTensor;

use super::tensors::largest;
use crate::{Error, Result, Weight};

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

/// Checks that the values of a dense weight are those of `f32`, in which adapters are trained.
pub(super) fn check_dtype(path: &str, weight: &Weight) -> Result<()> {
    let found = match weight {
        Weight::Dense(weight) => weight.val().dtype(),
        Weight::Quant(_) => return Ok(()),
    };
    match found {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        _ => Err(Error::NotF32 {
            path: path.into(),
            found,
        }),
    }
}

/// Checks the rank of a product that is added to the weight of the layer at `path`.
pub(super) fn check_rank(path: &str, rank: usize, dims: [usize; 2]) -> Result<()> {
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

/// Checks that no element of `scale` times the product of two factors, `[_, r]` and `[r, _]`, can be
/// beyond the range of `f32`: from their largest elements, without the product.
pub(super) fn check_product(
    method: &'static str,
    path: &str,
    [a, b]: [Tensor<2>; 2],
    scale: f32,
) -> Result<()> {
    let rank = a.dims()[1] as f64;
    let largest = rank * largest(a) * largest(b) * f64::from(scale);
    if largest <= f64::from(f32::MAX) {
        return Ok(());
    }
    Err(Error::Overflow {
        method,
        path: path.into(),
        largest,
    })
}

/// Checks that a setting is positive and finite.
pub(super) fn check_positive(setting: &'static str, value: f32) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::Setting {
        setting,
        value: value.to_string(),
        expected: "a positive number",
    })
}

/// Checks that a setting is at least 1.
pub(super) fn check_count(setting: &'static str, value: usize) -> Result<()> {
    if value > 0 {
        return Ok(());
    }
    Err(Error::Setting {
        setting,
        value: "0".into(),
        expected: "at least 1",
    })
}
