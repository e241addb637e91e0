use std::fmt;

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// The distance between a quantized weight and the dense one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distortion {
    /// The relative error `‖W - Ŵ‖ / ‖W‖`, in Frobenius norms; zero if both are equal.
    pub relative: f64,
    /// The mean squared error.
    pub mse: f64,
    /// The largest absolute error of an element.
    pub max_abs: f64,
}

impl Distortion {
    /// The distortion of `found` against `expected`, element by element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn between(expected: &[f32], found: &[f32]) -> Self {
        assert_eq!(expected.len(), found.len(), "weights of one size");
        let (mut error, mut power, mut max_abs) = (0.0, 0.0, 0.0f64);
        for (&expected, &found) in expected.iter().zip(found) {
            let difference = f64::from(expected) - f64::from(found);
            error += difference * difference;
            power += f64::from(expected) * f64::from(expected);
            max_abs = max_abs.max(difference.abs());
        }
        Self {
            relative: if error == 0.0 {
                0.0
            } else {
                (error / power).sqrt()
            },
            mse: error / expected.len().max(1) as f64,
            max_abs,
        }
    }

    /// The signal-to-quantization-noise ratio in decibels; infinite for an exact copy.
    pub fn sqnr_db(&self) -> f64 {
        -20.0 * self.relative.log10()
    }
}

/// The sum of the squares of a tensor's elements, in `f64`.
///
/// The result has the same bits for any number of threads.
pub fn sum_of_squares<const D: usize>(tensor: Tensor<D>) -> f64 {
    const PART: usize = 1 << 16;
    kernels::with_values(tensor, |values| {
        let squares = |part: &[f32]| {
            // Independent sums, which the compiler turns into vectors.
            let mut sums = [0.0f64; 16];
            for chunk in part.chunks(sums.len()) {
                for (sum, &value) in sums.iter_mut().zip(chunk) {
                    *sum += f64::from(value) * f64::from(value);
                }
            }
            sums.iter().sum::<f64>()
        };
        let parts: Vec<f64> = values.par_chunks(PART).map(squares).collect();
        parts.iter().sum()
    })
}

impl fmt::Display for Distortion {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            relative, max_abs, ..
        } = self;
        let sqnr = self.sqnr_db();
        write!(
            f,
            "relative error {relative:.4} ({sqnr:.1} dB), largest {max_abs:.2e}"
        )
    }
}
