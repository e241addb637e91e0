//! The inverse Cholesky factor of a layer's Hessian, with fallbacks where there is none.

use rayon::prelude::*;

use crate::linalg::{self, NotPositive, Real};
use crate::{Gram, Note};

/// Factors by which the damping is multiplied, in turn, until there is a factor.
const DAMPING_STEPS: [f64; 3] = [1.0, 4.0, 16.0];
/// Fractions of the diagonal's largest entry to which smaller ones are raised, in turn.
const FLOORS: [f64; 4] = [1e-6, 1e-5, 1e-4, 1e-3];

/// See [`kernels::Influence`].
pub(super) struct Factors {
    pub(super) factor: Vec<f32>,
    pub(super) drift: Option<Vec<f32>>,
}

impl Factors {
    /// The factor of the first Hessian that has one, with the input of each row in `inputs`.
    ///
    /// `damping` is a fraction of the mean of the diagonal, `moments`; `drift` is the fraction of the
    /// Gram's drift that is compensated.
    pub(super) fn of(
        gram: &Gram,
        moments: &[f32],
        inputs: &[usize],
        damping: f64,
        drift: Option<f64>,
        notes: &mut Vec<Note>,
    ) -> Option<Self> {
        let hessian = Hessian::new(gram, moments, inputs);
        let factor = kernels::with_values(gram.sum(), |sum| {
            hessian.factor_with_fallbacks(sum, damping, notes)
        })?;
        let drift = drift.and_then(|fraction| {
            let d_in = inputs.len();
            let drift = kernels::with_values(gram.drift()?, |drift| {
                square(d_in, |p, k| {
                    if moments[inputs[k]] == 0.0 {
                        0.0
                    } else {
                        drift[inputs[p] * d_in + inputs[k]]
                    }
                })
            });
            let drift = linalg::drift_of_factor(drift, &factor, d_in, fraction as f32);
            Some(drift)
        });
        Some(Self { factor, drift })
    }
}

struct Hessian<'a> {
    /// The diagonal, input by input.
    moments: &'a [f32],
    /// The input of each row.
    inputs: &'a [usize],
    /// The entry of a dead input on the diagonal.
    dead: f64,
    /// The mean and the maximum of the diagonal.
    mean: f64,
    largest: f64,
}

impl<'a> Hessian<'a> {
    fn new(gram: &Gram, moments: &'a [f32], inputs: &'a [usize]) -> Self {
        let d_in = inputs.len();
        // A dead input counts 1 in the reference's units, `H = 2 G / n_tokens`, but at most the mean
        // of the others: it must not decide their damping.
        let n_dead = moments.iter().filter(|&&h| h == 0.0).count();
        let sum = moments.iter().map(|&h| f64::from(h)).sum::<f64>();
        let one = gram.n_tokens() as f64 / 2.0;
        let dead = match d_in - n_dead {
            0 => one,
            n_alive => one.min(sum / n_alive as f64),
        };
        Self {
            moments,
            inputs,
            dead,
            mean: (sum + dead * n_dead as f64) / d_in as f64,
            largest: f64::from(moments.iter().copied().fold(0.0, f32::max)),
        }
    }

    fn factor_with_fallbacks(
        &self,
        sum: &[f32],
        damping: f64,
        notes: &mut Vec<Note>,
    ) -> Option<Vec<f32>> {
        let mut dampings = DAMPING_STEPS.map(|step| (damping * step).min(1.0)).to_vec();
        dampings.dedup();
        for raised in dampings {
            if let Ok(factor) = self.factor::<f32>(sum, (raised * self.mean) as f32, 0.0) {
                if raised > damping {
                    notes.push(Note::Damped { damping: raised });
                }
                return Some(factor);
            }
        }
        let narrow = |factor: Vec<f64>| factor.par_iter().map(|&v| v as f32).collect();
        let damping = damping * self.mean;
        if let Ok(factor) = self.factor::<f64>(sum, damping, 0.0) {
            notes.push(Note::DoublePrecision);
            return Some(narrow(factor));
        }
        for fraction in FLOORS {
            if let Ok(factor) = self.factor::<f64>(sum, damping, fraction * self.largest) {
                notes.push(Note::DiagonalFloor { fraction });
                return Some(narrow(factor));
            }
        }
        None
    }

    /// `sum` is the Gram matrix, `[d_in, d_in]`.
    fn factor<T: Real>(&self, sum: &[f32], damping: T, floor: f64) -> Result<Vec<T>, NotPositive> {
        let d_in = self.inputs.len();
        let a = square(d_in, |p, k| {
            let value = sum[self.inputs[p] * d_in + self.inputs[k]];
            if p != k {
                return T::of(value);
            }
            let value = match self.moments[self.inputs[p]] {
                0.0 => self.dead as f32,
                value => f64::from(value).max(floor) as f32,
            };
            T::of(value) + damping
        });
        linalg::inverse_cholesky(a, d_in)
    }
}

/// A matrix `[n, n]` of `value(row, column)`.
fn square<T: Real>(n: usize, value: impl Fn(usize, usize) -> T + Sync) -> Vec<T> {
    let mut matrix = vec![T::ZERO; n * n];
    let rows = matrix.par_chunks_exact_mut(n).enumerate();
    rows.for_each(|(p, row)| {
        for (k, entry) in row.iter_mut().enumerate() {
            *entry = value(p, k);
        }
    });
    matrix
}
