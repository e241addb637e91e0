//! Rounding of a weight block by block, with the errors of each fed back to the rest.

use kernels::{Feedback, Influence, Layout};

use super::factor::Factors;
use crate::Result;
use crate::linalg;
use crate::uniform::{Grids, UniformGrid};

/// Rows that are rounded before the rest of the weight is updated by their errors.
pub(super) const BLOCK: usize = 128;

/// A weight while it is rounded. Rows are in the reverse of the order in which they are rounded.
pub(super) struct Run<'a> {
    pub(super) grid: &'a UniformGrid,
    pub(super) layout: &'a Layout,
    /// Whether the grid of a group is made when its first row is rounded.
    pub(super) dynamic: bool,
    /// Whether it is made when the block of that row begins.
    pub(super) stale_groups: bool,
    pub(super) grids: Grids,
    /// The mean square of the input of each row.
    pub(super) moments: Vec<f32>,
    /// The place of each row in the packed weight.
    pub(super) packed: &'a [usize],
    pub(super) codes: Vec<u8>,
    pub(super) losses: Vec<f64>,
    /// The rounded weights of a block, for the drift.
    pub(super) rounded: Option<Vec<f32>>,
}

impl Run<'_> {
    pub(super) fn blocks(&mut self, work: &mut [f32], factors: &Factors) -> Result<()> {
        let [d_in, d_out] = [self.layout.d_in(), self.layout.d_out()];
        let Factors { factor, drift } = factors;
        let influence = Influence {
            factor,
            drift: drift.as_deref(),
            inputs: self.packed,
        };
        let mut start = 0;
        while start < d_in {
            let end = self.block_end(start);
            let mut starts = Vec::new();
            if self.dynamic {
                let group_size = self.layout.group_size();
                starts.extend((start..end).filter(|t| t.is_multiple_of(group_size)));
            }
            if self.stale_groups {
                for &t in &starts {
                    self.set_grid(t, work)?;
                }
            }
            // The block is cut where a grid changes.
            let mut cuts = starts.clone();
            cuts.retain(|&t| t > start);
            cuts.insert(0, start);
            cuts.push(end);
            for segment in cuts.windows(2) {
                if !self.stale_groups && starts.contains(&segment[0]) {
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
            // The rows of the later blocks.
            let (rest, errors) = work.split_at_mut((d_in - end) * d_out);
            let errors = &errors[..(end - start) * d_out];
            let rows = (d_in - end) * d_in..(d_in - start) * d_in;
            let of_block = &factor[rows.clone()];
            linalg::add_transposed_product(rest, of_block, d_in, errors, d_out, -1.0);
            if let (Some(drift), Some(rounded)) = (drift, &self.rounded) {
                let rounded = &rounded[..(end - start) * d_out];
                linalg::add_transposed_product(rest, &drift[rows], d_in, rounded, d_out, 1.0);
            }
            start = end;
        }
        Ok(())
    }

    /// The end of the block that begins at step `start`. A group whose grid is not stale lies within
    /// a block, or begins with one.
    fn block_end(&self, start: usize) -> usize {
        let (d_in, group) = (self.layout.d_in(), self.layout.group_size());
        let end = if !self.dynamic || self.stale_groups {
            start + BLOCK
        } else if group <= BLOCK {
            start + BLOCK / group * group
        } else {
            (start + BLOCK).min((start / group + 1).saturating_mul(group))
        };
        end.min(d_in)
    }

    /// Makes the grid of the group that begins at step `t`.
    fn set_grid(&mut self, t: usize, work: &[f32]) -> Result<()> {
        let [d_in, d_out] = [self.layout.d_in(), self.layout.d_out()];
        let end = d_in.min(t + self.layout.group_size());
        let rows = d_in - end..d_in - t;
        let (bits, levels) = (self.layout.bits(), self.layout.levels());
        let layout = Layout::new(rows.len(), d_out, bits, rows.len(), levels);
        let moments = Some(&self.moments[rows.clone()]);
        let values = &work[rows.start * d_out..rows.end * d_out];
        let grids = self.grid.grids(values, &layout, moments)?;
        let group = self.packed[rows.start] / self.layout.group_size();
        let at = group * d_out..(group + 1) * d_out;
        self.grids.scales[at.clone()].copy_from_slice(&grids.scales);
        if let (Some(zeros), Some(found)) = (&mut self.grids.zeros, &grids.zeros) {
            zeros[at].copy_from_slice(found);
        }
        Ok(())
    }
}
