use serde::{Deserialize, Serialize};

/// The order in which the inputs of a weight are rounded.
///
/// Act-order ranks inputs by the mean squares of their activations. The inputs with the largest ones
/// are rounded first, while all others can still compensate for their errors. Static act-order is
/// better on trained models, in which few inputs are much larger than the rest; see
/// `docs/results.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The order of the inputs in the weight, as in the OPTQ paper.
    Natural,
    /// Static act-order: the largest input first, groups of consecutive inputs.
    ///
    /// The grids are those of the weight before it is rounded: `desc_act` with `static_groups` in
    /// GPTQ's tools. Products with the weight cost nothing extra.
    #[default]
    Descending,
    /// The group with the largest input first, and the largest input first within a group.
    ///
    /// Gafni et al. 2025, arXiv:2505.14638. Products with the weight cost nothing extra.
    DescendingByGroup,
    /// The largest input first, groups of inputs that are rounded one after the other.
    ///
    /// GPTQ's plain `desc_act`. Each product with the weight gathers its inputs in this order.
    DescendingRegrouped,
}

impl Order {
    /// The inputs in the order in which they are rounded; `moments` holds their mean squares.
    pub(super) fn of(self, moments: &[f32], group_size: usize) -> Vec<usize> {
        let mut inputs: Vec<usize> = (0..moments.len()).collect();
        let descending = |a: &usize, b: &usize| moments[*b].total_cmp(&moments[*a]);
        match self {
            Order::Natural => {}
            Order::Descending | Order::DescendingRegrouped => inputs.sort_by(descending),
            Order::DescendingByGroup => {
                let mut groups: Vec<Vec<usize>> =
                    inputs.chunks(group_size).map(<[usize]>::to_vec).collect();
                for group in &mut groups {
                    // A short last group stays in its order, and last.
                    if group.len() == group_size {
                        group.sort_by(descending);
                    }
                }
                let n_whole = moments.len() / group_size;
                groups[..n_whole].sort_by(|a, b| descending(&a[0], &b[0]));
                inputs = groups.concat();
            }
        }
        inputs
    }
}
