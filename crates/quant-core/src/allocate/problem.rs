//! The problem in integers, and its linear relaxation.

use std::cmp::Ordering;

/// A format of a layer, by its size and its error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The size of the layer, in bytes.
    pub n_bytes: u64,
    /// The error of the layer: finite, not negative, in any unit in which the errors of different
    /// layers may be added.
    pub error: f64,
}

/// Bytes and error of a choice. The bytes cannot overflow once those of the largest candidates
/// were found not to.
pub(super) fn total(layers: &[Vec<Candidate>], choice: &[usize]) -> (u64, f64) {
    let chosen = layers
        .iter()
        .zip(choice)
        .map(|(layer, &index)| layer[index]);
    chosen.fold((0, 0.0), |(n_bytes, error), candidate| {
        (n_bytes + candidate.n_bytes, error + candidate.error)
    })
}

/// The power of two that turns errors into integers, as two factors because it may itself lie
/// outside the range of `f64`.
///
/// Integers make sums independent of their order and comparisons exact: a floating-point bound
/// would need a tolerance, with which instances full of ties could never be closed. Rounding is
/// downwards, so that bounds on the integers also hold for the errors.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    factors: (f64, f64),
}

impl Unit {
    /// The finest unit with which the errors of `n_layers` layers, each at most `upper`, may be
    /// summed and multiplied by a number of bytes up to `max_bytes` in 127 bits.
    fn new(upper: f64, n_layers: usize, max_bytes: u64) -> Self {
        let bits_of_bytes = (u64::BITS - max_bytes.leading_zeros()).max(1);
        let bits_of_layers = usize::BITS - n_layers.leading_zeros();
        // `upper` is not negative, so this is its exponent, and `upper < 2^exponent`.
        let exponent = (upper.to_bits() >> 52) as i32 - 1022;
        let shift = 125 - bits_of_bytes as i32 - bits_of_layers as i32 - exponent;
        let power_of_two = |power: i32| f64::from_bits(((1023 + power) as u64) << 52);
        Self {
            factors: (power_of_two(shift / 2), power_of_two(shift - shift / 2)),
        }
    }

    fn integer(self, error: f64) -> i128 {
        (error * self.factors.0 * self.factors.1) as i128
    }

    pub(super) fn value(self, integer: i128) -> f64 {
        integer as f64 / self.factors.0 / self.factors.1
    }
}

/// A candidate that can occur in an optimum.
#[derive(Clone, Copy)]
pub(super) struct Item {
    pub(super) candidate: usize,
    pub(super) bytes: u64,
    pub(super) error: i128,
}

/// Error per byte as an exact fraction; `bytes == 0` stands for infinity.
#[derive(Clone, Copy)]
pub(super) struct Slope {
    pub(super) error: i128,
    pub(super) bytes: i128,
}

impl Slope {
    pub(super) const ZERO: Self = Self { error: 0, bytes: 1 };
    pub(super) const INFINITE: Self = Self { error: 1, bytes: 0 };

    /// From an item to a larger one with a smaller error.
    pub(super) fn between(small: &Item, large: &Item) -> Self {
        Self {
            error: small.error - large.error,
            bytes: i128::from(large.bytes) - i128::from(small.bytes),
        }
    }

    pub(super) fn compare(&self, other: &Self) -> Ordering {
        (self.error * other.bytes).cmp(&(other.error * self.bytes))
    }
}

/// One position among the items of each layer.
#[derive(Clone)]
pub(super) struct Solution {
    pub(super) positions: Vec<usize>,
    pub(super) bytes: u64,
    pub(super) error: i128,
}

/// The optimum of the linear relaxation takes the whole of `split` and a part of the hull edge
/// with slope `slope`. Without an edge, nothing is left to improve.
pub(super) struct Relaxation {
    pub(super) split: Solution,
    pub(super) slope: Option<Slope>,
    /// The split solution, improved greedily.
    pub(super) greedy: Solution,
}

pub(super) struct Problem {
    /// By ascending bytes and strictly descending error.
    pub(super) layers: Vec<Vec<Item>>,
    pub(super) budget: u64,
    pub(super) unit: Unit,
    pub(super) relaxation: Relaxation,
}

impl Problem {
    pub(super) fn new(layers: &[Vec<Candidate>], budget: u64, smallest: u64, largest: u64) -> Self {
        let leanest = |candidates: &Vec<Candidate>| {
            let order = |a: &&Candidate, b: &&Candidate| {
                a.n_bytes.cmp(&b.n_bytes).then(a.error.total_cmp(&b.error))
            };
            candidates.iter().min_by(order).map_or(0.0, |c| c.error)
        };
        let mut upper: f64 = layers.iter().map(leanest).sum();
        // A feasible error far below the first one calls for a finer unit, in which candidates
        // above it, which no optimum holds, need not be counted.
        loop {
            let unit = Unit::new(upper, layers.len(), largest);
            let useful = |candidates: &Vec<Candidate>| {
                useful_items(candidates, upper, budget - smallest, unit)
            };
            let items: Vec<_> = layers.iter().map(useful).collect();
            let problem = Self {
                relaxation: relax(&items, budget),
                layers: items,
                budget,
                unit,
            };
            let (_, error) = total(
                layers,
                &problem.choice(&problem.relaxation.greedy.positions),
            );
            if error >= upper / 1024.0 {
                return problem;
            }
            upper = error;
        }
    }

    pub(super) fn choice(&self, positions: &[usize]) -> Vec<usize> {
        let items = self.layers.iter().zip(positions);
        items
            .map(|(layer, &position)| layer[position].candidate)
            .collect()
    }
}

/// The candidates that are not dominated, fit beside the smallest ones of the other layers, and
/// have an error of at most `upper`.
fn useful_items(candidates: &[Candidate], upper: f64, slack: u64, unit: Unit) -> Vec<Item> {
    let smallest = candidates.iter().map(|c| c.n_bytes).min().unwrap_or(0);
    // `upper` is itself a rounded sum.
    let upper = upper * (1.0 + 1e-9);
    let mut items: Vec<_> = candidates
        .iter()
        .enumerate()
        .filter(|(_, c)| c.error <= upper && c.n_bytes - smallest <= slack)
        .map(|(candidate, c)| Item {
            candidate,
            bytes: c.n_bytes,
            error: unit.integer(c.error),
        })
        .collect();
    items.sort_by_key(|item| (item.bytes, item.error, item.candidate));
    let mut least = i128::MAX;
    items.retain(|item| {
        let keep = item.error < least;
        least = least.min(item.error);
        keep
    });
    items
}

/// Positions of the lower convex hull of items by ascending bytes and descending error.
fn lower_hull(items: &[Item]) -> Vec<usize> {
    let mut hull: Vec<usize> = Vec::new();
    for (position, item) in items.iter().enumerate() {
        while let [.., before, last] = hull[..] {
            let edge = Slope::between(&items[before], &items[last]);
            if edge.compare(&Slope::between(&items[last], item)).is_gt() {
                break;
            }
            hull.pop();
        }
        hull.push(position);
    }
    hull
}

/// Solves the linear relaxation by taking the edges of all hulls in the order of their slopes.
fn relax(layers: &[Vec<Item>], budget: u64) -> Relaxation {
    let mut edges = Vec::new();
    for (layer, items) in layers.iter().enumerate() {
        for edge in lower_hull(items).windows(2) {
            let slope = Slope::between(&items[edge[0]], &items[edge[1]]);
            edges.push((slope, layer, edge[0], edge[1]));
        }
    }
    // Stable: edges of equal slope stay in the order of the layers.
    edges.sort_by(|a, b| b.0.compare(&a.0));

    let mut greedy = Solution {
        positions: vec![0; layers.len()],
        bytes: layers.iter().map(|items| items[0].bytes).sum(),
        error: layers.iter().map(|items| items[0].error).sum(),
    };
    let mut split = None;
    for (slope, layer, from, to) in edges {
        // After an edge that was left out, the rest of that layer's hull cannot be reached.
        if greedy.positions[layer] != from {
            continue;
        }
        if layers[layer][to].bytes - layers[layer][from].bytes <= budget - greedy.bytes {
            move_to(&mut greedy, layers, layer, to);
        } else {
            split.get_or_insert_with(|| (greedy.clone(), slope));
        }
    }
    for (layer, items) in layers.iter().enumerate() {
        let available = budget - greedy.bytes + items[greedy.positions[layer]].bytes;
        let n_fitting = items.partition_point(|item| item.bytes <= available);
        move_to(&mut greedy, layers, layer, n_fitting - 1);
    }
    let (split, slope) = split.map_or((greedy.clone(), None), |(s, slope)| (s, Some(slope)));
    Relaxation {
        split,
        slope,
        greedy,
    }
}

fn move_to(solution: &mut Solution, layers: &[Vec<Item>], layer: usize, position: usize) {
    let (old, new) = (
        layers[layer][solution.positions[layer]],
        layers[layer][position],
    );
    solution.bytes = solution.bytes - old.bytes + new.bytes;
    solution.error = solution.error - old.error + new.error;
    solution.positions[layer] = position;
}
