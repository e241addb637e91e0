//! Directories without packed layers, with all floats of one type.

use std::cell::RefCell;
use std::fmt;

use tensor_files::{FloatType, IntoOutput};

use super::directory::Files;
use super::parameters::{check_no_adapters, parameters, state_float, state_head};
use crate::{CheckpointError, Pretrained, Result};

/// The effect of rounding the values of a model to another type of float.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounding {
    /// The number of values.
    pub n_values: usize,
    /// The number of values that were rounded.
    pub n_rounded: usize,
    /// The largest relative change of a value.
    pub largest: f64,
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            n_values,
            n_rounded,
            largest,
        } = self;
        match n_rounded {
            0 => write!(f, "{n_values} values, all of them exact"),
            _ => write!(
                f,
                "{n_rounded} of {n_values} values rounded, by up to {largest:.1e} of each"
            ),
        }
    }
}

/// Saves a model to a new directory with dense weights in one type of float, for other programs.
///
/// Packed weights are unpacked. Adapters are not written: merge them first. Neither is a certificate,
/// which is for the weights as they were merged.
///
/// # Errors
/// [`CheckpointError::Overflow`] with a tensor that has values beyond the range of the type; otherwise
/// as [`save`](crate::save).
pub fn save_dense(lm: &Pretrained, dir: impl IntoOutput, float: FloatType) -> Result<Rounding> {
    check_no_adapters(&lm.model)?;
    let mut config = lm.config.clone();
    state_float(&mut config, float);
    state_head(&mut config, lm.model.lm_head.is_some());
    let files = Files {
        config: &config,
        carried: &lm.carried,
        second: None,
        // It is for the packed weights.
        certificate: None,
    };
    // Counted as the values are written, so that they are unpacked once.
    let rounding = RefCell::new(Ok(Rounding::default()));
    let tensors = parameters(&lm.model).into_iter().map(|parameter| {
        parameter.tensor(float, |name, values| {
            let mut rounding = rounding.borrow_mut();
            if let Ok(so_far) = *rounding {
                *rounding = so_far.with(name, values, float);
            }
        })
    });
    let mut found = Rounding::default();
    files.write(dir, |path| {
        tensor_files::write_tensors(path, tensors)?;
        found = rounding.replace(Ok(found))?;
        Ok(())
    })?;
    Ok(found)
}

impl Rounding {
    /// Adds the values of a tensor.
    fn with(mut self, tensor: &str, values: &[f32], float: FloatType) -> Result<Self> {
        self.n_values += values.len();
        let mut beyond = values
            .iter()
            .filter(|&&value| float.round(value).is_infinite());
        if let Some(&value) = beyond.next() {
            let error = CheckpointError::Overflow {
                tensor: tensor.into(),
                float,
                value,
                n: 1 + beyond.count(),
            };
            return Err(error.into());
        }
        for &value in values.iter().filter(|&&value| !float.holds(value)) {
            self.n_rounded += 1;
            let change = f64::from(float.round(value)) - f64::from(value);
            self.largest = self.largest.max((change / f64::from(value)).abs());
        }
        Ok(self)
    }
}
