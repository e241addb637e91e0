//! Bit allocation: a format for each layer, such that a model of a given size has the smallest error.
//!
//! Each layer has several candidate formats, each with a size and an error. Exactly one is chosen for
//! each layer, the sizes add up to at most a budget, and the sum of the errors is minimized. This is
//! the multiple-choice knapsack problem. [`allocate`] solves it exactly: the linear relaxation (Dyer
//! 1984, Zemel 1984) decides nearly all layers, and dynamic programming over a growing core of the
//! others (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem") the rest.

mod problem;
mod search;

pub use problem::Candidate;
use problem::{Problem, total};
use search::solve;

/// The best choice of one candidate for all layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UniformChoice {
    /// The index of the candidate in every layer.
    pub candidate: usize,
    /// The size of all layers, in bytes.
    pub n_bytes: u64,
    /// The sum of the errors, in the unit of the candidates' errors.
    pub error: f64,
}

/// A choice of one candidate for each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// The index of the chosen candidate of each layer.
    pub choice: Vec<usize>,
    /// The size of all layers, in bytes; at most the budget.
    pub n_bytes: u64,
    /// The sum of the errors, added in the order of the layers.
    pub error: f64,
    /// A lower bound of the error of every choice within the budget. Equal to `error` if the choice
    /// was proven to be optimal, never above it.
    pub lower_bound: f64,
    /// The best uniform choice within the same budget, among the indices that every layer has; `None`
    /// if none fits. Its error is never below `error`.
    pub uniform: Option<UniformChoice>,
}

impl Allocation {
    /// Whether the choice was proven to be optimal.
    pub fn is_optimal(&self) -> bool {
        self.lower_bound >= self.error
    }

    /// The largest possible difference between the error and the optimum, in the unit of the errors.
    pub fn gap(&self) -> f64 {
        self.error - self.lower_bound
    }
}

/// The reason why there is no allocation.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AllocationError {
    /// There is nothing to allocate.
    #[error("there are no layers to allocate")]
    NoLayers,
    /// A layer has no candidates.
    #[error("layer {layer} has no candidates")]
    NoCandidates {
        /// Index of the layer.
        layer: usize,
    },
    /// An error is negative, not finite, or so large that a sum over the layers may not be finite.
    #[error(
        "layer {layer}, candidate {candidate}: the error {value} is not a finite, summable number of at least 0"
    )]
    InvalidError {
        /// Index of the layer.
        layer: usize,
        /// Index of the candidate in the layer.
        candidate: usize,
        /// The error given.
        value: f64,
    },
    /// Even the smallest candidates together exceed the budget.
    #[error("the smallest candidates need {needed} bytes, the budget is {budget} bytes")]
    BudgetTooSmall {
        /// Bytes of the smallest candidates together.
        needed: u64,
        /// The budget given, in bytes.
        budget: u64,
    },
    /// The largest candidates together have more bytes than a `u64` can count.
    #[error("the sum of the bytes exceeds 64 bits")]
    BytesOverflow,
}

/// The number of partial choices after which the search for the smallest error stops. A count, not a
/// time, so that the result is the same on every machine.
const SEARCH_LIMIT: usize = 1 << 23;

/// The limit of the search among choices of equal error. It is smaller because that search cannot
/// lower the error, yet visits very many choices where errors follow from sizes.
const TIE_LIMIT: usize = 1 << 18;

/// Chooses a candidate for each layer, with at most `budget` bytes and the smallest sum of errors.
///
/// Among choices of equal error the one with the fewest bytes is returned, and among these the
/// lexicographically smallest. Errors count as equal if they differ by less than the rounding of
/// an `f64` sum. The result depends on the arguments only. Hard instances end at a fixed limit of
/// work: [`Allocation::lower_bound`] then bounds the optimum, or, if only ties were too many, the
/// choice is one of several optimal ones.
///
/// # Errors
/// [`AllocationError::BudgetTooSmall`] if no choice fits; the other variants for invalid layers or
/// candidates.
///
/// # Examples
/// ```
/// use quant_core::{AllocationError, Candidate, allocate};
///
/// let candidate = |n_bytes, error| Candidate { n_bytes, error };
/// let layers = [
///     vec![candidate(2, 9.0), candidate(4, 1.0)],
///     vec![candidate(2, 3.0), candidate(4, 0.5)],
/// ];
/// let allocation = allocate(&layers, 6)?;
/// assert_eq!(allocation.choice, [1, 0]);
/// assert!(allocation.is_optimal());
///
/// let error = allocate(&layers, 3).unwrap_err();
/// assert_eq!(error, AllocationError::BudgetTooSmall { needed: 4, budget: 3 });
/// # Ok::<(), AllocationError>(())
/// ```
pub fn allocate(layers: &[Vec<Candidate>], budget: u64) -> Result<Allocation, AllocationError> {
    allocate_within(layers, budget, SEARCH_LIMIT, TIE_LIMIT)
}

fn allocate_within(
    layers: &[Vec<Candidate>],
    budget: u64,
    search_limit: usize,
    tie_limit: usize,
) -> Result<Allocation, AllocationError> {
    check_errors(layers)?;
    let smallest = sum_of_bytes(layers, u64::min)?;
    let largest = sum_of_bytes(layers, u64::max)?;
    if smallest > budget {
        return Err(AllocationError::BudgetTooSmall {
            needed: smallest,
            budget,
        });
    }
    let attainable = attainable_bytes(layers, budget.min(largest), smallest);
    let problem = Problem::new(layers, attainable, smallest, largest);
    let (best, lower_bound) = solve(&problem, search_limit, tie_limit);

    let mut choice = problem.choice(&best.positions);
    let (mut n_bytes, mut error) = total(layers, &choice);
    let uniform = best_uniform(layers, budget);
    // A stopped search or the rounding of the sums must not make the uniform choice look better.
    if let Some(uniform) = uniform.filter(|uniform| uniform.error < error) {
        choice = vec![uniform.candidate; layers.len()];
        (n_bytes, error) = (uniform.n_bytes, uniform.error);
    }
    let lower_bound = if lower_bound >= best.error {
        error
    } else {
        // Covers the rounding of the conversion and of every sum of errors in layer order.
        let margin = 1.0 - (layers.len() + 4) as f64 * f64::EPSILON;
        error.min(problem.unit.value(lower_bound) * margin)
    };
    Ok(Allocation {
        choice,
        n_bytes,
        error,
        lower_bound,
        uniform,
    })
}

fn check_errors(layers: &[Vec<Candidate>]) -> Result<(), AllocationError> {
    if layers.is_empty() {
        return Err(AllocationError::NoLayers);
    }
    for (layer, candidates) in layers.iter().enumerate() {
        if candidates.is_empty() {
            return Err(AllocationError::NoCandidates { layer });
        }
        for (candidate, &Candidate { error, .. }) in candidates.iter().enumerate() {
            // Twice, so that rounding cannot make a sum overflow either.
            let summable = (2.0 * error * layers.len() as f64).is_finite();
            if !summable || error < 0.0 {
                return Err(AllocationError::InvalidError {
                    layer,
                    candidate,
                    value: error,
                });
            }
        }
    }
    Ok(())
}

/// The sum over the layers of the bytes that `select` picks; every layer must have a candidate.
fn sum_of_bytes(
    layers: &[Vec<Candidate>],
    select: fn(u64, u64) -> u64,
) -> Result<u64, AllocationError> {
    layers
        .iter()
        .filter_map(|candidates| candidates.iter().map(|c| c.n_bytes).reduce(select))
        .try_fold(0, u64::checked_add)
        .ok_or(AllocationError::BytesOverflow)
}

/// The part of the budget that a choice can use.
///
/// The sizes of formats differ by multiples of a common divisor; a bound that counted the remaining
/// bytes could not be attained.
fn attainable_bytes(layers: &[Vec<Candidate>], budget: u64, smallest: u64) -> u64 {
    let mut divisor = 0;
    for candidates in layers {
        for candidate in candidates {
            let mut remainder = candidate.n_bytes.abs_diff(candidates[0].n_bytes);
            while remainder != 0 {
                (divisor, remainder) = (remainder, divisor % remainder);
            }
        }
    }
    budget - (budget - smallest).checked_rem(divisor).unwrap_or(0)
}

fn best_uniform(layers: &[Vec<Candidate>], budget: u64) -> Option<UniformChoice> {
    let n_common = layers.iter().map(Vec::len).min().unwrap_or(0);
    (0..n_common)
        .map(|candidate| {
            let (n_bytes, error) = total(layers, &vec![candidate; layers.len()]);
            UniformChoice {
                candidate,
                n_bytes,
                error,
            }
        })
        .filter(|uniform| uniform.n_bytes <= budget)
        .min_by(|a, b| a.error.total_cmp(&b.error).then(a.n_bytes.cmp(&b.n_bytes)))
}

#[cfg(test)]
mod tests;
