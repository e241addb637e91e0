use burn::tensor::{Device, Tensor};
use kernels::{Feedback, Influence, Layout};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::grid::{Grids, UniformGrid, finite_ranges};
use crate::linalg::{self, NotPositive, Real};
use crate::rtn::diagonal;
use crate::{
    Error, Format, Gram, GroupRange, Needs, Note, Parts, QuantTensor, Quantized, Quantizer, Result,
    Scales,
};

/// Columns that are rounded before the rest of the weight hears of their errors.
const BLOCK: usize = 128;
/// By what the damping is multiplied while there is no factor.
const DAMPING_STEPS: [f64; 3] = [1.0, 4.0, 16.0];
/// Fractions of the diagonal's largest entry to which smaller ones are raised, before giving up.
const FLOORS: [f64; 4] = [1e-6, 1e-5, 1e-4, 1e-3];

/// The order in which the inputs of a weight are rounded. Inputs are ranked by their mean squares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// As they come.
    #[default]
    Natural,
    /// The largest first, groups as they come, their grids those of the weight before it is changed:
    /// the `desc_act` with `static_groups` of GPTQ's tools. Costs nothing when the weight is used.
    Descending,
    /// The group with the largest input first, within a group the largest input (Gafni et al. 2025,
    /// arXiv:2505.14638). Costs nothing when the weight is used.
    DescendingByGroup,
    /// The largest first, groups of inputs as they are rounded: GPTQ's plain `desc_act`. The weight
    /// takes its inputs in this order, which is a gather for each product.
    DescendingRegrouped,
}

/// OPTQ, published as GPTQ (Frantar et al. 2023, arXiv:2210.17323): each input's weights are rounded
/// in turn, and the error is made up for by the inputs still to come, as far as the layer's inputs
/// are correlated.
///
/// Where the Hessian has no Cholesky factor, more damping is tried, then double precision, then a
/// floor under its diagonal; if all fail, the weight is rounded to nearest. The [`Note`]s say so.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use quant_core::{Gram, Optq, Quantizer};
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::random([64, 32], Distribution::Normal(0.0, 0.02), &device);
/// let x = Tensor::<2>::random([512, 64], Distribution::Normal(0.0, 1.0), &device);
/// let mut gram = Gram::new(64, &device);
/// gram.update(x);
/// let quantized = Optq::new().with_bits(3).quantize(weight, Some(&gram))?;
/// assert!(quantized.notes.is_empty());
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optq {
    grid: UniformGrid,
    order: Order,
    damping: f64,
    stale_groups: bool,
    drift: Option<f64>,
}

impl Default for Optq {
    fn default() -> Self {
        Self::new()
    }
}

impl Optq {
    /// 4 bits, affine, one group per channel, full ranges, inputs as they come, damping 0.01.
    pub fn new() -> Self {
        Self {
            grid: UniformGrid::new(),
            order: Order::Natural,
            damping: 0.01,
            stale_groups: false,
            drift: None,
        }
    }

    /// Bits of a code: 2, 3, 4 or 8.
    pub fn with_bits(mut self, bits: usize) -> Self {
        self.grid.bits = bits;
        self
    }

    /// Inputs that share a scale; `None` for one group per channel.
    pub fn with_group_size(mut self, group_size: impl Into<Option<usize>>) -> Self {
        self.grid.group_size = group_size.into();
        self
    }

    /// Whether the grid is symmetric, without zeros.
    pub fn with_symmetric(mut self, symmetric: bool) -> Self {
        self.grid.symmetric = symmetric;
        self
    }

    /// What part of a range the grid spans.
    pub fn with_range(mut self, range: GroupRange) -> Self {
        self.grid.range = range;
        self
    }

    /// See [`Rtn::with_reference_symmetric`](crate::Rtn::with_reference_symmetric).
    pub fn with_reference_symmetric(mut self, reference: bool) -> Self {
        self.grid.reference_symmetric = reference;
        self
    }

    /// Whether scales are rounded to `f16` first, and the weights to the grids of those: what a GPTQ
    /// checkpoint holds.
    pub fn with_f16_scales(mut self, f16: bool) -> Self {
        self.grid.f16_scales = f16;
        self
    }

    /// The order in which inputs are rounded.
    pub fn with_order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// What is added to the Hessian's diagonal, as a fraction of its mean (GPTQ's `percdamp`).
    pub fn with_damping(mut self, damping: f64) -> Self {
        self.damping = damping;
        self
    }

    /// Whether a group that begins inside of a block of 128 inputs takes its grid from weights that
    /// have not heard of that block's errors, as in the reference code.
    pub fn with_stale_groups(mut self, stale: bool) -> Self {
        self.stale_groups = stale;
        self
    }

    /// How much of the drift between the inputs of the dense and of the quantized model is made up
    /// for: GPTAQ (Li et al. 2025, arXiv:2504.02692), whose code takes 0.25. None by default.
    pub fn with_drift(mut self, fraction: impl Into<Option<f64>>) -> Self {
        self.drift = fraction.into();
        self
    }
}

impl Quantizer for Optq {
    fn format(&self) -> Result<Format> {
        let fractions = [Some(self.damping), self.drift].into_iter().flatten();
        for value in fractions {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::Fraction { value });
            }
        }
        self.grid.format()
    }

    fn needs(&self) -> Needs {
        match self.drift {
            Some(_) => Needs::Drift,
            None => Needs::Gram,
        }
    }

    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> Result<Quantized> {
        let format = self.format()?;
        let dims @ [d_in, _] = weight.dims();
        let layout = format.layout(dims)?;
        let gram = gram.ok_or(Error::NoGram)?;
        gram.check(d_in)?;
        if self.drift.is_some() && gram.drift().is_none() {
            return Err(Error::NoDrift);
        }
        let device = weight.device();
        let rounded = kernels::with_values(weight, |weight| self.round(weight, gram, &layout))?;
        rounded.pack(format, &layout, dims, &device)
    }
}

/// What [`Optq::round`] found.
struct Rounded {
    /// `[d_in, d_out]`, in the order in which they are packed.
    codes: Vec<u8>,
    grids: Grids,
    input_order: Option<Vec<u32>>,
    notes: Vec<Note>,
    /// `½ Σ error² / diagonal²`, the loss that the reference code prints but for its divisor.
    loss: f64,
}

impl Rounded {
    fn pack(
        self,
        format: Format,
        layout: &Layout,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Quantized> {
        let parts = Parts {
            words: kernels::pack(&self.codes, layout),
            scales: Scales::Float(self.grids.scales),
            zeros: self.grids.zeros,
            input_order: self.input_order,
        };
        Ok(Quantized {
            weight: QuantTensor::from_parts(parts, format, dims, device)?,
            notes: self.notes,
        })
    }
}

impl Optq {
    /// Rows are worked on in the reverse of the order in which they are rounded, so that the lower
    /// triangular factor of the reversed Hessian is the one needed, without a second factorization.
    fn round(&self, weight: &[f32], gram: &Gram, layout: &Layout) -> Result<Rounded> {
        let [d_in, d_out] = [layout.d_in(), layout.d_out()];
        let mut notes = Vec::new();
        if gram.n_tokens() < d_in {
            notes.push(Note::FewTokens {
                n_tokens: gram.n_tokens(),
                d_in,
            });
        }
        let diagonal = diagonal(gram);
        let n_dead = diagonal.iter().filter(|&&h| h == 0.0).count();
        if n_dead > 0 {
            notes.push(Note::DeadInputs { n_inputs: n_dead });
        }
        let of_input = match self.grid.range {
            GroupRange::ClippedForOutput => Some(diagonal.as_slice()),
            GroupRange::Full | GroupRange::Clipped => None,
        };
        let mut inputs = self.order.of(&diagonal, layout.group_size());
        inputs.reverse();

        // Ranges of whole channels are those of the weight before dead inputs are cleared.
        let per_channel = match self.grid.group_size {
            None => Some(self.grid.grids(weight, layout, of_input)?),
            Some(_) => {
                finite_ranges(weight, layout)?;
                None
            }
        };
        let influence = self.influence(gram, &diagonal, &inputs, &mut notes);
        let mut work = vec![0.0; d_in * d_out];
        let rows = work.par_chunks_exact_mut(d_out).zip(&inputs);
        rows.for_each(|(row, &input)| {
            if diagonal[input] != 0.0 {
                row.copy_from_slice(&weight[input * d_out..][..d_out]);
            }
        });
        let grids = match (per_channel, self.order) {
            (Some(grids), _) => Some(grids),
            (None, Order::Descending) => {
                let mut cleared = vec![0.0; d_in * d_out];
                for (row, &input) in work.chunks_exact(d_out).zip(&inputs) {
                    cleared[input * d_out..][..d_out].copy_from_slice(row);
                }
                Some(self.grid.grids(&cleared, layout, of_input)?)
            }
            (None, _) => None,
        };
        let Some(Factors { factor, drift }) = influence else {
            notes.push(Note::RoundedToNearest);
            return self.round_to_nearest(weight, layout, &diagonal, notes);
        };

        // The inputs in the order in which they are packed, those of a group as they come: files
        // have the group of each input, not its place there.
        let input_order = (self.order == Order::DescendingRegrouped).then(|| {
            let mut order: Vec<usize> = inputs.iter().rev().copied().collect();
            let groups = order.chunks_mut(layout.group_size());
            groups.for_each(<[usize]>::sort_unstable);
            order
        });
        let input_order = input_order.filter(|order| !order.is_sorted());
        // Where each row is packed.
        let packed: Vec<usize> = match &input_order {
            None => inputs.clone(),
            Some(order) => {
                let mut place = vec![0; d_in];
                for (row, &input) in order.iter().enumerate() {
                    place[input] = row;
                }
                inputs.iter().map(|&input| place[input]).collect()
            }
        };
        let mut run = Run {
            optq: self,
            layout,
            dynamic: grids.is_none(),
            grids: grids.unwrap_or_else(|| Grids {
                scales: vec![1.0; layout.n_groups() * d_out],
                zeros: (!self.grid.symmetric).then(|| vec![0.0; layout.n_groups() * d_out]),
            }),
            of_row: of_input.map(|of_input| inputs.iter().map(|&i| of_input[i]).collect()),
            packed: &packed,
            codes: vec![0; d_in * d_out],
            losses: vec![0.0; d_out],
            rounded: drift.as_ref().map(|_| vec![0.0; d_in.min(BLOCK) * d_out]),
        };
        let ran = run.blocks(&mut work, &factor, drift.as_deref());
        let rounded = Rounded {
            codes: run.codes,
            grids: run.grids,
            input_order: input_order.map(|order| order.into_iter().map(|i| i as u32).collect()),
            notes,
            loss: run.losses.iter().sum::<f64>() / 2.0,
        };
        // Errors that grew beyond what floats hold.
        if ran.is_err() || !rounded.loss.is_finite() {
            let mut notes = rounded.notes;
            notes.push(Note::RoundedToNearest);
            return self.round_to_nearest(weight, layout, &diagonal, notes);
        }
        Ok(rounded)
    }

    fn round_to_nearest(
        &self,
        weight: &[f32],
        layout: &Layout,
        diagonal: &[f32],
        notes: Vec<Note>,
    ) -> Result<Rounded> {
        let mut weight = weight.to_vec();
        for (row, &moment) in weight.chunks_exact_mut(layout.d_out()).zip(diagonal) {
            if moment == 0.0 {
                row.fill(0.0);
            }
        }
        let weight = weight.as_slice();
        let of_input = match self.grid.range {
            GroupRange::ClippedForOutput => Some(diagonal),
            GroupRange::Full | GroupRange::Clipped => None,
        };
        let grids = self.grid.grids(weight, layout, of_input)?;
        let words = kernels::encode(weight, &grids.scales, grids.zeros.as_deref(), layout);
        Ok(Rounded {
            codes: kernels::unpack(&words, layout),
            grids,
            input_order: None,
            notes,
            loss: f64::NAN,
        })
    }

    /// The factor of the first Hessian that has one, for rows of `inputs`.
    fn influence(
        &self,
        gram: &Gram,
        diagonal: &[f32],
        inputs: &[usize],
        notes: &mut Vec<Note>,
    ) -> Option<Factors> {
        let d_in = inputs.len();
        // A dead input counts 1 in the reference's units, `H = 2 G / n_tokens`, but no more than the
        // others do on the average: it must not decide their damping.
        let n_dead = diagonal.iter().filter(|&&h| h == 0.0).count();
        let sum = diagonal.iter().map(|&h| f64::from(h)).sum::<f64>();
        let one = gram.n_tokens() as f64 / 2.0;
        let dead = match d_in - n_dead {
            0 => one,
            n_alive => one.min(sum / n_alive as f64),
        };
        let mean = (sum + dead * n_dead as f64) / d_in as f64;
        let largest = f64::from(diagonal.iter().copied().fold(0.0, f32::max));
        let factor = kernels::with_values(gram.sum(), |sum| {
            let hessian = Hessian {
                sum,
                diagonal,
                inputs,
                dead,
            };
            let mut dampings = DAMPING_STEPS
                .map(|step| (self.damping * step).min(1.0))
                .to_vec();
            dampings.dedup();
            for damping in dampings {
                if let Ok(factor) = hessian.factor::<f32>((damping * mean) as f32, 0.0) {
                    if damping > self.damping {
                        notes.push(Note::Damped { damping });
                    }
                    return Some(factor);
                }
            }
            let narrow = |factor: Vec<f64>| factor.par_iter().map(|&v| v as f32).collect();
            if let Ok(factor) = hessian.factor::<f64>(self.damping * mean, 0.0) {
                notes.push(Note::DoublePrecision);
                return Some(narrow(factor));
            }
            for fraction in FLOORS {
                let floor = fraction * largest;
                if let Ok(factor) = hessian.factor::<f64>(self.damping * mean, floor) {
                    notes.push(Note::DiagonalFloor { fraction });
                    return Some(narrow(factor));
                }
            }
            None
        })?;
        let drift = self.drift.and_then(|fraction| {
            let drift = kernels::with_values(gram.drift()?, |drift| {
                let mut rows = vec![0.0; d_in * d_in];
                fill(&mut rows, d_in, |p, k| match diagonal[inputs[k]] {
                    0.0 => 0.0,
                    _ => drift[inputs[p] * d_in + inputs[k]],
                });
                rows
            });
            let drift = linalg::drift_of_factor(drift, &factor, d_in, fraction as f32);
            Some(drift)
        });
        Some(Factors { factor, drift })
    }
}

/// See [`Influence`].
struct Factors {
    factor: Vec<f32>,
    drift: Option<Vec<f32>>,
}

struct Hessian<'a> {
    /// `[d_in, d_in]`.
    sum: &'a [f32],
    diagonal: &'a [f32],
    /// The input of each row.
    inputs: &'a [usize],
    /// What dead inputs have on the diagonal.
    dead: f64,
}

impl Hessian<'_> {
    fn factor<T: Real>(&self, damping: T, floor: f64) -> Result<Vec<T>, NotPositive> {
        let d_in = self.inputs.len();
        let mut a = vec![T::ZERO; d_in * d_in];
        fill(&mut a, d_in, |p, k| {
            let value = self.sum[self.inputs[p] * d_in + self.inputs[k]];
            if p != k {
                return T::of(value);
            }
            let value = match self.diagonal[self.inputs[p]] {
                0.0 => self.dead as f32,
                value => f64::from(value).max(floor) as f32,
            };
            T::of(value) + damping
        });
        linalg::inverse_cholesky(a, d_in)
    }
}

/// Fills a square matrix row by row.
fn fill<T: Send>(matrix: &mut [T], n: usize, value: impl Fn(usize, usize) -> T + Sync) {
    let rows = matrix.par_chunks_exact_mut(n).enumerate();
    rows.for_each(|(p, row)| {
        for (k, entry) in row.iter_mut().enumerate() {
            *entry = value(p, k);
        }
    });
}

impl Order {
    /// The inputs in the order in which they are rounded.
    fn of(self, diagonal: &[f32], group_size: usize) -> Vec<usize> {
        let mut inputs: Vec<usize> = (0..diagonal.len()).collect();
        let descending = |a: &usize, b: &usize| diagonal[*b].total_cmp(&diagonal[*a]);
        match self {
            Order::Natural => {}
            Order::Descending | Order::DescendingRegrouped => inputs.sort_by(descending),
            Order::DescendingByGroup => {
                let mut groups: Vec<Vec<usize>> =
                    inputs.chunks(group_size).map(<[usize]>::to_vec).collect();
                for group in &mut groups {
                    // A short last group stays as it is, and last.
                    if group.len() == group_size {
                        group.sort_by(descending);
                    }
                }
                let n_whole = diagonal.len() / group_size;
                groups[..n_whole].sort_by(|a, b| descending(&a[0], &b[0]));
                inputs = groups.concat();
            }
        }
        inputs
    }
}

/// One weight on its way. Rows are in the reverse of the order in which they are rounded.
struct Run<'a> {
    optq: &'a Optq,
    layout: &'a Layout,
    /// Whether the grid of a group is made when its turn comes.
    dynamic: bool,
    grids: Grids,
    /// The weight of each row's error, where the search for a range asks for it.
    of_row: Option<Vec<f32>>,
    packed: &'a [usize],
    codes: Vec<u8>,
    losses: Vec<f64>,
    /// The rounded weights of a block.
    rounded: Option<Vec<f32>>,
}

impl Run<'_> {
    fn blocks(&mut self, work: &mut [f32], factor: &[f32], drift: Option<&[f32]>) -> Result<()> {
        let [d_in, d_out] = [self.layout.d_in(), self.layout.d_out()];
        let influence = Influence {
            factor,
            drift,
            inputs: self.packed,
        };
        let mut start = 0;
        while start < d_in {
            let end = self.block_end(start);
            let starts: Vec<usize> = match self.dynamic {
                true => (start..end)
                    .filter(|t| t.is_multiple_of(self.layout.group_size()))
                    .collect(),
                false => Vec::new(),
            };
            if self.optq.stale_groups {
                for &t in &starts {
                    self.set_grid(t, work)?;
                }
            }
            // The steps at which a grid changes cut the block.
            let mut cuts = starts.clone();
            cuts.retain(|&t| t > start);
            cuts.insert(0, start);
            cuts.push(end);
            for segment in cuts.windows(2) {
                if !self.optq.stale_groups && starts.contains(&segment[0]) {
                    self.set_grid(segment[0], work)?;
                }
                let mut state = Feedback {
                    weight: work,
                    codes: &mut self.codes,
                    losses: &mut self.losses,
                    rounded: self.rounded.as_deref_mut(),
                };
                kernels::round_with_feedback(
                    &mut state,
                    influence,
                    &self.grids.scales,
                    self.grids.zeros.as_deref(),
                    self.layout,
                    d_in - segment[1]..d_in - segment[0],
                    d_in - end,
                );
            }
            // The rows still to come.
            let (rest, errors) = work.split_at_mut((d_in - end) * d_out);
            let errors = &errors[..(end - start) * d_out];
            let factor = &factor[(d_in - end) * d_in..(d_in - start) * d_in];
            linalg::add_transposed_product(rest, factor, d_in, errors, d_out, -1.0);
            if let (Some(drift), Some(rounded)) = (drift, &self.rounded) {
                let drift = &drift[(d_in - end) * d_in..(d_in - start) * d_in];
                let rounded = &rounded[..(end - start) * d_out];
                linalg::add_transposed_product(rest, drift, d_in, rounded, d_out, 1.0);
            }
            start = end;
        }
        Ok(())
    }

    /// The step after the block that begins at `start`. A group whose grid is made from fresh
    /// weights lies within a block, or begins with one.
    fn block_end(&self, start: usize) -> usize {
        let (d_in, group) = (self.layout.d_in(), self.layout.group_size());
        let end = start + BLOCK;
        let end = match self.dynamic && !self.optq.stale_groups {
            true if group <= BLOCK => start + BLOCK / group * group,
            true => end.min((start / group + 1).saturating_mul(group)),
            false => end,
        };
        end.min(d_in)
    }

    /// Makes the grid of the group that begins at step `t`.
    fn set_grid(&mut self, t: usize, work: &[f32]) -> Result<()> {
        let [d_in, d_out] = [self.layout.d_in(), self.layout.d_out()];
        let end = d_in.min(t + self.layout.group_size());
        let rows = d_in - end..d_in - t;
        let layout = Layout::new(
            end - t,
            d_out,
            self.layout.bits(),
            end - t,
            self.layout.levels(),
        );
        let of_row = self.of_row.as_ref().map(|of_row| &of_row[rows.clone()]);
        let values = &work[rows.start * d_out..rows.end * d_out];
        let grids = self.optq.grid.grids(values, &layout, of_row)?;
        let group = self.packed[rows.start] / self.layout.group_size();
        let at = group * d_out..(group + 1) * d_out;
        self.grids.scales[at.clone()].copy_from_slice(&grids.scales);
        if let (Some(zeros), Some(found)) = (&mut self.grids.zeros, &grids.zeros) {
            zeros[at].copy_from_slice(found);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
