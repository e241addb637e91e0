//! Bit allocation: one format for each layer, so that a model fits a size with the smallest error.
//!
//! Every layer can be held in several formats, each with its size and its error; exactly one is
//! chosen for each layer, the sizes add up to at most a budget, and the sum of the errors is to be
//! minimal. This is the multiple-choice knapsack problem. [`allocate`] solves it exactly: the
//! linear relaxation (Dyer 1984, Zemel 1984) says for nearly every layer what the optimum holds,
//! and dynamic programming over a growing core of the other layers (Pisinger 1995, "A minimal
//! algorithm for the multiple-choice knapsack problem") settles the rest.

use std::cmp::Ordering;

/// One way to hold a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Size of the layer in this format, in bytes.
    pub n_bytes: u64,
    /// Error of the layer in this format: finite, not negative, in any unit in which the errors of
    /// different layers may be added.
    pub error: f64,
}

/// The best single candidate for all layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UniformChoice {
    /// Index of the candidate, the same in every layer.
    pub candidate: usize,
    /// Size of all layers, in bytes.
    pub n_bytes: u64,
    /// Sum of the errors, in the unit of the candidates' errors.
    pub error: f64,
}

/// A choice of one candidate for each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// Index of the chosen candidate of each layer.
    pub choice: Vec<usize>,
    /// Size of all layers, in bytes; at most the budget.
    pub n_bytes: u64,
    /// Sum of the errors, added in the order of the layers.
    pub error: f64,
    /// No choice within the budget has a smaller error than this. Equal to `error` if the choice
    /// was proven to be optimal, never above it.
    pub lower_bound: f64,
    /// The best uniform choice within the same budget, `None` if none fits. Only an index that
    /// every layer has counts. Its error is never below `error`.
    pub uniform: Option<UniformChoice>,
}

impl Allocation {
    /// Whether the choice was proven to be optimal.
    pub fn is_optimal(&self) -> bool {
        self.lower_bound >= self.error
    }

    /// By how much the error can at most exceed the optimum, in the unit of the errors.
    pub fn gap(&self) -> f64 {
        self.error - self.lower_bound
    }
}

/// Why there is no allocation.
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

/// Work after which the search for the smallest error stops: the number of partial choices built.
/// A count, not a time, so that the result is the same on every machine.
const SEARCH_LIMIT: usize = 1 << 23;

/// The same for the search among choices of equal error. It is smaller because that search can
/// only tidy up an optimum, yet has to visit very many choices where errors follow from sizes.
const TIE_LIMIT: usize = 1 << 18;

/// Chooses one candidate for each layer such that the sum of the bytes is at most `budget` and the
/// sum of the errors is minimal.
///
/// Among choices of equal error the one with the fewest bytes is returned, and among these the
/// lexicographically smallest. Errors count as equal if they differ by less than the rounding of
/// an `f64` sum. The result depends on the arguments only. Hard instances end at a fixed limit of
/// work: [`Allocation::lower_bound`] then says how far the optimum can be, or, if only the ties
/// were too many, the choice is one of several optimal ones.
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
    let (best, lower_bound) = problem.solve(search_limit, tie_limit);

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
            // Twice, so that rounding cannot carry a sum over the end either.
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

/// Sum over the layers of the bytes that `select` picks; every layer must have a candidate.
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

/// The budget without the bytes that no choice can use because all sizes differ by multiples of a
/// common divisor, as those of formats do: bounds that count on them would stay out of reach.
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

/// Bytes and error of a choice. The bytes cannot overflow once those of the largest candidates
/// were found not to.
fn total(layers: &[Vec<Candidate>], choice: &[usize]) -> (u64, f64) {
    let chosen = layers
        .iter()
        .zip(choice)
        .map(|(layer, &index)| layer[index]);
    chosen.fold((0, 0.0), |(n_bytes, error), candidate| {
        (n_bytes + candidate.n_bytes, error + candidate.error)
    })
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

/// The power of two that turns errors into integers, as two factors because it may itself lie
/// outside the range of `f64`.
///
/// Integers make sums independent of their order and comparisons exact: a floating-point bound
/// would need a tolerance, with which instances full of ties could never be closed. Rounding is
/// downwards, so that bounds on the integers also hold for the errors.
#[derive(Clone, Copy)]
struct Unit {
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

    fn value(self, integer: i128) -> f64 {
        integer as f64 / self.factors.0 / self.factors.1
    }
}

/// A candidate that can occur in an optimum.
#[derive(Clone, Copy)]
struct Item {
    candidate: usize,
    bytes: u64,
    error: i128,
}

/// Error per byte as an exact fraction; `bytes == 0` stands for infinity.
#[derive(Clone, Copy)]
struct Slope {
    error: i128,
    bytes: i128,
}

impl Slope {
    const ZERO: Self = Self { error: 0, bytes: 1 };
    const INFINITE: Self = Self { error: 1, bytes: 0 };

    /// From an item to a larger one with a smaller error.
    fn between(small: &Item, large: &Item) -> Self {
        Self {
            error: small.error - large.error,
            bytes: i128::from(large.bytes) - i128::from(small.bytes),
        }
    }

    fn compare(&self, other: &Self) -> Ordering {
        (self.error * other.bytes).cmp(&(other.error * self.bytes))
    }
}

/// One position among the items of each layer.
#[derive(Clone)]
struct Solution {
    positions: Vec<usize>,
    bytes: u64,
    error: i128,
}

/// The optimum of the linear relaxation takes the whole of `split` and a part of the hull edge
/// with slope `slope`. Without an edge, nothing is left to improve.
struct Relaxation {
    split: Solution,
    slope: Option<Slope>,
    /// The split solution, improved greedily.
    greedy: Solution,
}

struct Problem {
    /// By ascending bytes and strictly descending error.
    layers: Vec<Vec<Item>>,
    budget: u64,
    unit: Unit,
    relaxation: Relaxation,
}

impl Problem {
    fn new(layers: &[Vec<Candidate>], budget: u64, smallest: u64, largest: u64) -> Self {
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

    fn choice(&self, positions: &[usize]) -> Vec<usize> {
        let items = self.layers.iter().zip(positions);
        items
            .map(|(layer, &position)| layer[position].candidate)
            .collect()
    }

    /// The best solution found and a lower bound of the error, equal to its error if it is optimal.
    fn solve(&self, search_limit: usize, tie_limit: usize) -> (Solution, i128) {
        let Some(slope) = self.relaxation.slope else {
            let split = self.relaxation.split.clone();
            let error = split.error;
            return (split, error);
        };
        let search = |best, limit, keep_ties| {
            Search {
                problem: self,
                split: &self.relaxation.split,
                slope,
                nodes: vec![Node::default()],
                best,
                keep_ties,
            }
            .run(limit)
        };
        let (best, lower_bound) = search(self.relaxation.greedy.clone(), search_limit, false);
        if lower_bound < best.error {
            return (best, lower_bound);
        }
        let (best, _) = search(best, tie_limit, true);
        (best, lower_bound)
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
        // Behind an edge that was left out, the hull of that layer is out of reach.
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

/// A layer in which an optimum may differ from the split solution, with the largest error saved
/// per byte added to it and the smallest error caused per byte taken from it.
struct CoreLayer {
    layer: usize,
    gain: Slope,
    loss: Slope,
}

/// The layers that are still as in the split solution, those with the most promising slopes last.
struct Undecided {
    layers: Vec<CoreLayer>,
    by_gain: Vec<usize>,
    by_loss: Vec<usize>,
    decided: Vec<bool>,
    n_taken: usize,
}

impl Undecided {
    fn new(layers: Vec<CoreLayer>) -> Self {
        let mut by_gain: Vec<_> = (0..layers.len()).collect();
        by_gain.sort_by(|&a, &b| layers[a].gain.compare(&layers[b].gain));
        let mut by_loss: Vec<_> = (0..layers.len()).collect();
        by_loss.sort_by(|&a, &b| layers[b].loss.compare(&layers[a].loss));
        Self {
            decided: vec![false; layers.len()],
            layers,
            by_gain,
            by_loss,
            n_taken: 0,
        }
    }

    /// Takes from both orders in turn: the first to fill bytes left over, the second to free bytes.
    fn take(&mut self) -> Option<usize> {
        let order = if self.n_taken.is_multiple_of(2) {
            &self.by_gain
        } else {
            &self.by_loss
        };
        let index = *order.last()?;
        self.n_taken += 1;
        self.decided[index] = true;
        for order in [&mut self.by_gain, &mut self.by_loss] {
            while order.pop_if(|&mut index| self.decided[index]).is_some() {}
        }
        Some(self.layers[index].layer)
    }

    fn slopes(&self) -> CoreSlopes {
        let gain = self.by_gain.last().map(|&index| self.layers[index].gain);
        let loss = self.by_loss.last().map(|&index| self.layers[index].loss);
        CoreSlopes {
            gain: gain.unwrap_or(Slope::ZERO),
            loss: loss.unwrap_or(Slope::INFINITE),
        }
    }
}

/// The best that the undecided layers can do with a byte left over and for a byte in excess.
struct CoreSlopes {
    gain: Slope,
    loss: Slope,
}

/// A choice for the decided layers, all others being as in the split solution.
#[derive(Clone, Copy)]
struct State {
    error: i128,
    bytes: u64,
    node: u32,
    /// In the layer decided last; older positions are in the nodes.
    position: u32,
}

/// A position that differs from the split solution. Numbers of nodes grow as layers are decided;
/// number 0 is the split solution.
#[derive(Clone, Copy, Default)]
struct Node {
    parent: u32,
    layer: u32,
    position: u32,
}

struct Search<'a> {
    problem: &'a Problem,
    split: &'a Solution,
    slope: Slope,
    nodes: Vec<Node>,
    best: Solution,
    /// Whether to look for solutions as good as the best one, or only for better ones.
    keep_ties: bool,
}

impl Search<'_> {
    /// The best solution and a lower bound of the error; the bound equals its error if the search
    /// ended within `limit` partial choices.
    fn run(mut self, limit: usize) -> (Solution, i128) {
        let mut undecided = Undecided::new(self.core());
        let mut states = vec![State {
            error: self.split.error,
            bytes: self.split.bytes,
            node: 0,
            position: 0,
        }];
        let mut children = Vec::new();
        let mut work = 0;
        loop {
            let slopes = undecided.slopes();
            let Some(layer) = undecided.take() else {
                break;
            };
            let positions = self.useful_positions(layer);
            work += states.len() * positions.len();
            if work > limit {
                let lower_bound = self.lower_bound(&states, &slopes);
                return (self.best, lower_bound);
            }
            self.expand(
                &states,
                layer,
                &positions,
                &undecided.slopes(),
                &mut children,
            );
            self.keep_undominated(&mut children, layer, &mut states);
            self.update_best(&states);
        }
        let error = self.best.error;
        (self.best, error)
    }

    /// Whether all completions of a partial choice are worse than the best solution, if each byte
    /// left over saves at most, or each in excess costs at least, the error `slope`.
    fn is_hopeless(&self, bytes: u64, error: i128, slope: &Slope) -> bool {
        let excess = i128::from(bytes) - i128::from(self.problem.budget);
        let change = excess * slope.error;
        let allowed = (self.best.error - error) * slope.bytes;
        change > allowed || (change == allowed && !self.keep_ties)
    }

    /// Positions of a layer that the relaxation does not rule out.
    fn useful_positions(&self, layer: usize) -> Vec<usize> {
        let items = &self.problem.layers[layer];
        let old = items[self.split.positions[layer]];
        let is_useful = |&position: &usize| {
            let new = items[position];
            let bytes = self.split.bytes - old.bytes + new.bytes;
            let error = self.split.error - old.error + new.error;
            !self.is_hopeless(bytes, error, &self.slope)
        };
        (0..items.len()).filter(is_useful).collect()
    }

    fn core(&self) -> Vec<CoreLayer> {
        let mut core = Vec::new();
        for (layer, items) in self.problem.layers.iter().enumerate() {
            let old = self.split.positions[layer];
            let (mut gain, mut loss) = (Slope::ZERO, Slope::INFINITE);
            let positions = self.useful_positions(layer);
            for &new in &positions {
                if new > old {
                    let slope = Slope::between(&items[old], &items[new]);
                    gain = if slope.compare(&gain).is_gt() {
                        slope
                    } else {
                        gain
                    };
                } else if new < old {
                    let slope = Slope::between(&items[new], &items[old]);
                    loss = if slope.compare(&loss).is_lt() {
                        slope
                    } else {
                        loss
                    };
                }
            }
            if positions != [old] {
                core.push(CoreLayer { layer, gain, loss });
            }
        }
        core
    }

    fn expand(
        &self,
        states: &[State],
        layer: usize,
        positions: &[usize],
        slopes: &CoreSlopes,
        children: &mut Vec<State>,
    ) {
        children.clear();
        let items = &self.problem.layers[layer];
        let old = items[self.split.positions[layer]];
        for &position in positions {
            let new = items[position];
            for state in states {
                let bytes = state.bytes - old.bytes + new.bytes;
                let error = state.error - old.error + new.error;
                let fits = bytes <= self.problem.budget;
                let slope = if fits { &slopes.gain } else { &slopes.loss };
                if !self.is_hopeless(bytes, error, slope) {
                    children.push(State {
                        error,
                        bytes,
                        node: state.node,
                        position: position as u32,
                    });
                }
            }
        }
    }

    /// Sets `front` to the states by ascending bytes and strictly descending error, with a node for
    /// each position in `layer` that differs from the split solution.
    fn keep_undominated(&mut self, states: &mut [State], layer: usize, front: &mut Vec<State>) {
        front.clear();
        // A merge sort, which finds the runs that come from the single positions.
        states.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.error.cmp(&b.error)));
        for &mut state in states {
            match front.last_mut() {
                Some(last) if (state.bytes, state.error) == (last.bytes, last.error) => {
                    if self.keep_ties && self.compare_choices(&state, last, layer).is_lt() {
                        *last = state;
                    }
                }
                Some(last) if state.error >= last.error => {}
                _ => front.push(state),
            }
        }
        for state in front {
            if state.position as usize != self.split.positions[layer] {
                self.nodes.push(Node {
                    parent: state.node,
                    layer: layer as u32,
                    position: state.position,
                });
                state.node = (self.nodes.len() - 1) as u32;
            }
        }
    }

    /// Lexicographic order of two states with the same decided layers, `layer` the last of them.
    /// It does not change when the same choice for the other layers is added to both.
    fn compare_choices(&self, a: &State, b: &State, layer: usize) -> Ordering {
        let compare = |layer: usize, a: u32, b: u32| {
            let items = &self.problem.layers[layer];
            let candidate = |position: u32| items[position as usize].candidate;
            candidate(a).cmp(&candidate(b))
        };
        let mut first_difference = (layer, compare(layer, a.position, b.position));
        let (mut left, mut right) = (a.node, b.node);
        while left != right {
            let layer = self.nodes[left.max(right) as usize].layer;
            // A chain without a node for this layer holds the position of the split solution.
            let step = |node: &mut u32| {
                let Node {
                    parent,
                    layer: at,
                    position,
                } = self.nodes[*node as usize];
                if *node == 0 || at != layer {
                    return self.split.positions[layer as usize] as u32;
                }
                *node = parent;
                position
            };
            let layer = layer as usize;
            let order = compare(layer, step(&mut left), step(&mut right));
            let is_first = first_difference.1.is_eq() || layer < first_difference.0;
            if order.is_ne() && is_first {
                first_difference = (layer, order);
            }
        }
        first_difference.1
    }

    fn update_best(&mut self, states: &[State]) {
        let n_fitting = states.partition_point(|state| state.bytes <= self.problem.budget);
        let Some(state) = states[..n_fitting].last() else {
            return;
        };
        let order = (state.error, state.bytes).cmp(&(self.best.error, self.best.bytes));
        if order.is_gt() || (order.is_eq() && !self.keep_ties) {
            return;
        }
        let mut positions = self.split.positions.clone();
        let mut node = state.node;
        while node != 0 {
            let Node {
                parent,
                layer,
                position,
            } = self.nodes[node as usize];
            positions[layer as usize] = position as usize;
            node = parent;
        }
        let choice = |positions| self.problem.choice(positions);
        if order.is_lt() || choice(&positions) < choice(&self.best.positions) {
            self.best = Solution {
                positions,
                bytes: state.bytes,
                error: state.error,
            };
        }
    }

    /// Lower bound of the error of all completions of `states` and of the best solution.
    fn lower_bound(&self, states: &[State], slopes: &CoreSlopes) -> i128 {
        let bound = |bytes: u64, error: i128, slope: &Slope| {
            let excess = i128::from(bytes) - i128::from(self.problem.budget);
            // An excess that no layer can make good has no completion.
            let change = (excess * slope.error).checked_div_euclid(slope.bytes);
            change.map_or(i128::MAX, |change| error + change)
        };
        let of_state = |state: &State| {
            let fits = state.bytes <= self.problem.budget;
            let slope = if fits { &slopes.gain } else { &slopes.loss };
            bound(state.bytes, state.error, slope)
        };
        let relaxed = bound(self.split.bytes, self.split.error, &self.slope);
        let least = states.iter().map(of_state).min().unwrap_or(i128::MAX);
        least.max(relaxed).min(self.best.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linear congruential generator with the constants of Knuth's MMIX.
    struct Lcg(u64);

    impl Lcg {
        fn below(&mut self, end: u64) -> u64 {
            let (multiplier, increment) = (6364136223846793005, 1442695040888963407);
            self.0 = self.0.wrapping_mul(multiplier).wrapping_add(increment);
            (self.0 >> 33) % end
        }

        fn unit(&mut self) -> f64 {
            self.below(1 << 30) as f64 / (1u64 << 30) as f64
        }
    }

    fn candidate(n_bytes: u64, error: f64) -> Candidate {
        Candidate { n_bytes, error }
    }

    fn random_layers(
        n_layers: usize,
        random: &mut Lcg,
        n_candidates: impl Fn(&mut Lcg) -> u64,
        new: impl Fn(&mut Lcg) -> Candidate,
    ) -> Vec<Vec<Candidate>> {
        let mut layer = || (0..n_candidates(random)).map(|_| new(random)).collect();
        (0..n_layers).map(|_| layer()).collect()
    }

    /// Every choice with its bytes and error, in the order in which [`allocate`] prefers them.
    fn all_choices(layers: &[Vec<Candidate>]) -> Vec<(f64, u64, Vec<usize>)> {
        let mut choices = vec![Vec::new()];
        for layer in layers {
            let extend = |choice: Vec<usize>| {
                (0..layer.len()).map(move |index| [choice.clone(), vec![index]].concat())
            };
            choices = choices.into_iter().flat_map(extend).collect();
        }
        let mut choices: Vec<_> = choices
            .into_iter()
            .map(|choice| {
                let (n_bytes, error) = total(layers, &choice);
                (error, n_bytes, choice)
            })
            .collect();
        choices.sort_by(|a, b| a.partial_cmp(b).expect("errors are finite"));
        choices
    }

    fn assert_same_as_brute_force(layers: &[Vec<Candidate>], budgets: impl Iterator<Item = u64>) {
        let choices = all_choices(layers);
        let smallest = choices
            .iter()
            .map(|c| c.1)
            .min()
            .expect("there are choices");
        for budget in budgets {
            let Some((error, n_bytes, choice)) = choices.iter().find(|c| c.1 <= budget) else {
                let expected = AllocationError::BudgetTooSmall {
                    needed: smallest,
                    budget,
                };
                assert_eq!(allocate(layers, budget), Err(expected));
                continue;
            };
            let found = allocate(layers, budget).expect("the budget is large enough");
            assert_eq!(&found.choice, choice, "{layers:?} within {budget}");
            assert_eq!((found.n_bytes, found.error), (*n_bytes, *error));
            assert_eq!(found.lower_bound, found.error);

            let is_uniform = |choice: &[usize]| choice.iter().all(|&index| index == choice[0]);
            let uniform = choices.iter().find(|c| c.1 <= budget && is_uniform(&c.2));
            let expected = uniform.map(|(error, n_bytes, choice)| UniformChoice {
                candidate: choice[0],
                n_bytes: *n_bytes,
                error: *error,
            });
            assert_eq!(found.uniform, expected);
        }
    }

    #[test]
    fn finds_the_first_optimum_among_ties_at_every_budget() {
        let mut random = Lcg(1);
        for round in 0..3000 {
            let n_layers = 2 + random.below(5) as usize;
            let (max_bytes, max_error) = [(3, 3), (8, 4), (9, 20), (4, 1)][round % 4];
            let layers = random_layers(
                n_layers,
                &mut random,
                |random| 1 + random.below(4),
                |random| candidate(random.below(max_bytes), random.below(max_error) as f64),
            );
            assert_same_as_brute_force(&layers, 0..=max_bytes * n_layers as u64);
        }
    }

    #[test]
    fn finds_the_optimum_of_real_errors_and_large_sizes() {
        let mut random = Lcg(2);
        for round in 0..1000 {
            let n_layers = 2 + random.below(5) as usize;
            let scale = [1.0, 1e-300, 1e300, 1e-9][round % 4];
            let layers = random_layers(
                n_layers,
                &mut random,
                |random| 1 + random.below(4),
                |random| {
                    let n_bytes = 1 << 40 | random.below(1 << 30);
                    candidate(n_bytes, scale * 10f64.powf(3.0 * random.unit()))
                },
            );
            let choices = all_choices(&layers);
            let totals = choices.iter().step_by(1 + choices.len() / 20).map(|c| c.1);
            let budgets = totals.flat_map(|bytes| [bytes - 1, bytes, bytes + 1]);
            assert_same_as_brute_force(&layers, budgets);
        }
    }

    #[test]
    fn finds_the_optimum_when_errors_follow_from_sizes() {
        let mut random = Lcg(3);
        for _ in 0..300 {
            let layers = random_layers(
                5,
                &mut random,
                |_| 4,
                |random| {
                    let n_bytes = random.below(1000);
                    candidate(n_bytes, 1000.0 - n_bytes as f64)
                },
            );
            let budget = random.below(5000);
            assert_same_as_brute_force(&layers, [budget].into_iter());
        }
    }

    /// Least error for every budget up to `budget` by dynamic programming over the bytes.
    fn least_error(layers: &[Vec<Candidate>], budget: usize) -> f64 {
        let mut least = vec![0.0; budget + 1];
        for layer in layers {
            let at = |bytes: usize| {
                layer
                    .iter()
                    .filter(|c| c.n_bytes as usize <= bytes)
                    .map(|c| c.error + least[bytes - c.n_bytes as usize])
                    .fold(f64::INFINITY, f64::min)
            };
            least = (0..=budget).map(at).collect();
        }
        least[budget]
    }

    #[test]
    fn agrees_with_dynamic_programming_over_bytes() {
        let mut random = Lcg(4);
        for round in 0..60 {
            let layers = random_layers(
                40,
                &mut random,
                |random| 1 + random.below(8),
                |random| {
                    let n_bytes = random.below(100);
                    // Uncorrelated, weakly and strongly correlated.
                    let error = match round % 3 {
                        0 => random.below(1000),
                        1 => 200 - n_bytes + random.below(10),
                        _ => 200 - n_bytes,
                    };
                    candidate(n_bytes, error as f64)
                },
            );
            let smallest = sum_of_bytes(&layers, u64::min).expect("small sizes");
            let budget = smallest + random.below(2000);
            let found = allocate(&layers, budget).expect("the budget is large enough");
            assert!(found.is_optimal());
            assert_eq!(found.error, least_error(&layers, budget as usize));
        }
    }

    /// Errors fall by a factor of four per bit; sensitivities span three orders of magnitude.
    fn language_model(n_layers: usize, random: &mut Lcg) -> Vec<Vec<Candidate>> {
        let shapes = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024)];
        let layer = |index: usize| {
            let (n_rows, n_columns): (u64, u64) = shapes[index % shapes.len()];
            let sensitivity = 10f64.powf(3.0 * random.unit());
            let formats = [2, 3, 4, 8]
                .into_iter()
                .flat_map(|bits| [(bits, 32), (bits, 64), (bits, 128)]);
            let new = |(bits, group): (u64, u64)| {
                let n_bytes = n_rows * n_columns * bits / 8 + n_rows * n_columns / group * 2;
                let noise = 1.0 + 0.3 * random.unit() + group as f64 / 256.0;
                candidate(n_bytes, sensitivity * noise * 0.25f64.powi(bits as i32))
            };
            formats.take(10).map(new).collect()
        };
        (0..n_layers).map(layer).collect()
    }

    #[test]
    fn proves_the_optimum_of_300_layers_with_10_candidates() {
        let mut random = Lcg(5);
        let model = language_model(300, &mut random);
        let n_weights = 75 * (4096 * (4096 + 11008 + 11008 + 1024));
        let found = allocate(&model, n_weights * 7 / 16).expect("3.5 bits per weight suffice");
        assert!(found.is_optimal());
        assert_eq!(found.gap(), 0.0);
        assert_eq!(total(&model, &found.choice), (found.n_bytes, found.error));
        let uniform = found.uniform.expect("3 bits fit");
        assert!(found.error < uniform.error);

        let unrelated = random_layers(
            300,
            &mut random,
            |_| 10,
            |random| candidate(random.below(100_000_000), random.unit()),
        );
        let found = allocate(&unrelated, 5_000_000_000).expect("the budget is large enough");
        assert!(found.is_optimal());
    }

    #[test]
    fn is_deterministic() {
        let model = language_model(100, &mut Lcg(6));
        let budget = 1_000_000_000;
        let first = allocate(&model, budget);
        assert!(first.is_ok());
        assert_eq!(allocate(&model, budget), first);
        let stopped = allocate_within(&model, budget, 50, 0);
        assert_eq!(allocate_within(&model, budget, 50, 0), stopped);
    }

    #[test]
    fn bounds_the_optimum_when_the_search_is_stopped() {
        let mut random = Lcg(7);
        let mut n_stopped = 0;
        for round in 0..200 {
            let layers = random_layers(
                30,
                &mut random,
                |_| 6,
                |random| {
                    let n_bytes = 1 + random.below(1_000_000);
                    let noise = [1e6, 1e5][round % 2] * random.unit();
                    candidate(n_bytes, 1e6 - n_bytes as f64 + noise)
                },
            );
            let budget = 8_000_000 + random.below(6_000_000);
            let optimum = allocate(&layers, budget).expect("the budget is large enough");
            assert!(optimum.is_optimal());
            let mut last_bound = 0.0;
            for limit in [0, 1, 10, 100, 1000, 10_000] {
                let found = allocate_within(&layers, budget, limit, 0).expect("the same budget");
                assert!(found.lower_bound <= optimum.error);
                assert!(optimum.error <= found.error);
                assert!(found.n_bytes <= budget);
                assert!(found.lower_bound >= last_bound);
                assert!(found.gap() >= 0.0 && found.gap() < 0.05 * found.error);
                assert!(
                    found
                        .uniform
                        .is_none_or(|uniform| found.error <= uniform.error)
                );
                last_bound = found.lower_bound.min(optimum.error);
                n_stopped += usize::from(!found.is_optimal());
            }
        }
        assert!(n_stopped > 200);
    }

    #[test]
    fn separates_errors_far_below_the_largest() {
        let huge = |small| {
            vec![
                candidate(1, 1e30),
                candidate(2, small),
                candidate(3, small / 2.0),
            ]
        };
        let layers = [huge(1e-9), huge(1.5e-9), huge(1.1e-9)];
        let found = allocate(&layers, 7).expect("the budget is large enough");
        assert_eq!(found.choice, [1, 2, 1]);
        assert!(found.is_optimal());
    }

    #[test]
    fn accepts_zero_errors_and_extreme_budgets() {
        let layers = vec![vec![candidate(5, -0.0), candidate(5, 0.0), candidate(0, 0.0)]; 3];
        let found = allocate(&layers, u64::MAX).expect("the budget is large enough");
        assert_eq!(found.choice, [2, 2, 2]);
        assert_eq!((found.n_bytes, found.error, found.gap()), (0, 0.0, 0.0));
        let wide = vec![vec![candidate(0, 3.0), candidate(u64::MAX / 2, 1.0)]; 2];
        let found = allocate(&wide, u64::MAX - 2).expect("the budget is large enough");
        assert_eq!(found.choice, [0, 1]);
        assert!(found.is_optimal());
        let tiny = f64::from_bits(1);
        let found = allocate(&[vec![candidate(1, tiny), candidate(2, 0.0)]], 1);
        assert_eq!(found.map(|found| found.error), Ok(tiny));
    }

    #[test]
    fn a_uniform_choice_needs_its_candidate_in_every_layer() {
        let layers = [
            vec![candidate(4, 2.0), candidate(6, 1.0)],
            vec![candidate(4, 2.0)],
        ];
        let found = allocate(&layers, 10).expect("the budget is large enough");
        let expected = UniformChoice {
            candidate: 0,
            n_bytes: 8,
            error: 4.0,
        };
        assert_eq!((found.choice, found.uniform), (vec![1, 0], Some(expected)));
        let crossed = [
            vec![candidate(1, 1.0), candidate(9, 0.0)],
            vec![candidate(9, 0.0), candidate(1, 1.0)],
        ];
        let found = allocate(&crossed, 9).expect("the budget is large enough");
        assert_eq!((found.choice, found.uniform), (vec![0, 1], None));
    }

    #[test]
    fn rejects_invalid_input() {
        assert_eq!(allocate(&[], 1), Err(AllocationError::NoLayers));
        let good = vec![candidate(1, 1.0)];
        assert_eq!(
            allocate(&[good.clone(), Vec::new()], 1),
            Err(AllocationError::NoCandidates { layer: 1 })
        );
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, f64::MAX] {
            let layers = [good.clone(), vec![candidate(1, 0.0), candidate(1, value)]];
            match allocate(&layers, 2) {
                Err(AllocationError::InvalidError {
                    layer,
                    candidate,
                    value: reported,
                }) => {
                    assert_eq!((layer, candidate), (1, 1));
                    assert_eq!(reported.to_bits(), value.to_bits());
                }
                other => panic!("{value} gave {other:?}"),
            }
        }
        let wide = vec![candidate(1, 1.0), candidate(u64::MAX, 0.0)];
        let overflow = allocate(&[good.clone(), wide], 2);
        assert_eq!(overflow, Err(AllocationError::BytesOverflow));
        let infeasible = allocate(&[good.clone(), good], 1);
        let expected = AllocationError::BudgetTooSmall {
            needed: 2,
            budget: 1,
        };
        assert_eq!(infeasible, Err(expected.clone()));
        assert!(expected.to_string().contains("need 2 bytes"));
    }
}
