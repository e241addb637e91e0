//! Dynamic programming over a growing core of layers.

use std::cmp::Ordering;

use super::problem::{Problem, Slope, Solution};

/// The best solution found and a lower bound of the error, which equals its error if it is optimal.
///
/// `search_limit` and `tie_limit` are numbers of partial choices: of the search for the smallest
/// error, and of that among choices of equal error.
pub(super) fn solve(problem: &Problem, search_limit: usize, tie_limit: usize) -> (Solution, i128) {
    let relaxation = &problem.relaxation;
    let Some(slope) = relaxation.slope else {
        return (relaxation.split.clone(), relaxation.split.error);
    };
    let search = |best, limit, keep_ties| {
        Search {
            problem,
            split: &relaxation.split,
            slope,
            nodes: vec![Node::default()],
            best,
            keep_ties,
        }
        .run(limit)
    };
    let (best, lower_bound) = search(relaxation.greedy.clone(), search_limit, false);
    if lower_bound < best.error {
        return (best, lower_bound);
    }
    let (best, _) = search(best, tie_limit, true);
    (best, lower_bound)
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
