use std::borrow::Cow;

use burn::tensor::Tensor;
use kernels::Layout;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::uniform::{Grids, UniformGrid, finite_ranges, uniform_grid_settings};
use crate::{
    Error, Format, Gram, Needs, Note, Parts, QuantTensor, Quantized, Quantizer, Result, Scales,
};

mod factor;
mod order;
mod run;

use factor::Factors;
pub use order::Order;
use run::{BLOCK, Run};

/// OPTQ, published as GPTQ (Frantar et al. 2023, arXiv:2210.17323).
///
/// Inputs are rounded one after the other. The rounding error of each is compensated by the inputs
/// that are not yet rounded, as far as the layer's inputs are correlated.
///
/// The default order is static act-order, [`Order::Descending`]. The natural order of the paper is
/// [`with_order(Order::Natural)`](Self::with_order); see [`Order`] for the difference that it makes.
///
/// If the Hessian has no Cholesky factor, the damping is raised, then the factorization is repeated
/// in double precision, then with a floor under the diagonal. If all fail, the weight is rounded to
/// nearest. [`Quantized::notes`] has a [`Note`] for each of these cases.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use quant_core::{Error, Gram, Optq, Quantizer};
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::random([64, 32], Distribution::Normal(0.0, 0.02), &device);
/// let x = Tensor::<2>::random([512, 64], Distribution::Normal(0.0, 1.0), &device);
/// let mut gram = Gram::new(64, &device);
/// gram.update(x);
/// let optq = Optq::new().with_bits(3);
/// let quantized = optq.quantize(weight.clone(), Some(&gram))?;
/// assert!(quantized.notes.is_empty());
///
/// assert_eq!(optq.quantize(weight, None).unwrap_err(), Error::NoGram);
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

uniform_grid_settings!(Optq);

impl Default for Optq {
    fn default() -> Self {
        Self::new()
    }
}

impl Optq {
    /// 4 bits, affine, one group per channel, full ranges, static act-order, damping 0.01.
    pub fn new() -> Self {
        Self {
            grid: UniformGrid::new(),
            order: Order::default(),
            damping: 0.01,
            stale_groups: false,
            drift: None,
        }
    }

    /// Sets the order in which inputs are rounded.
    pub fn with_order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// Sets the damping, a fraction from 0 to 1: GPTQ's `percdamp`.
    ///
    /// The damping times the mean of the Hessian's diagonal is added to the diagonal.
    pub fn with_damping(mut self, damping: f64) -> Self {
        self.damping = damping;
        self
    }

    /// Only for orders other than the default: sets whether groups take their grids when their block
    /// begins, as in the reference code.
    ///
    /// The weights of such a group are not yet updated by the errors of its own block of 128 inputs.
    /// In the default order, [`Order::Descending`], grids are those of the weight before it is rounded.
    pub fn with_stale_groups(mut self, stale: bool) -> Self {
        self.stale_groups = stale;
        self
    }

    /// Sets the fraction of the inputs' drift from those of the dense model that is compensated.
    ///
    /// GPTAQ (Li et al. 2025, arXiv:2504.02692), whose code uses 0.25. `None` is plain OPTQ, the
    /// default.
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
        let parts = Parts {
            words: kernels::pack(&rounded.codes, &layout),
            scales: Scales::Float(rounded.grids.scales),
            zeros: rounded.grids.zeros,
            input_order: rounded.input_order,
        };
        Ok(Quantized {
            weight: QuantTensor::from_parts(parts, format, dims, &device)?,
            notes: rounded.notes,
        })
    }
}

/// The result of [`Optq::round`].
struct Rounded {
    /// `[d_in, d_out]`, in the order in which they are packed.
    codes: Vec<u8>,
    grids: Grids,
    input_order: Option<Vec<u32>>,
    notes: Vec<Note>,
    /// `½ Σ error² / diagonal²`: the loss that the reference code prints, up to its divisor.
    loss: f64,
}

impl Optq {
    /// Rows are kept in the reverse of the order in which they are rounded, so that the lower
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
        let moments = gram.diagonal();
        let n_inputs = moments.iter().filter(|&&h| h == 0.0).count();
        if n_inputs > 0 {
            notes.push(Note::DeadInputs { n_inputs });
        }
        let mut inputs = self.order.of(&moments, layout.group_size());
        inputs.reverse();

        // The grids of channels are those of the weight before dead inputs are cleared.
        let mut grids = None;
        if self.grid.group_size.is_none() {
            grids = Some(self.grid.grids(weight, layout, Some(&moments))?);
        } else {
            finite_ranges(weight, layout)?;
        }
        let weight = cleared(weight, &moments);
        if grids.is_none() && self.order == Order::Descending {
            grids = Some(self.grid.grids(&weight, layout, Some(&moments))?);
        }
        let factors = Factors::of(
            gram,
            &moments,
            &inputs,
            self.damping,
            self.drift,
            &mut notes,
        );
        let Some(factors) = factors else {
            return self.round_to_nearest(&weight, layout, &moments, notes);
        };

        let input_order = self.input_order(&inputs, layout.group_size());
        let packed = match &input_order {
            None => inputs.clone(),
            Some(order) => {
                let mut place = vec![0; d_in];
                for (row, &input) in order.iter().enumerate() {
                    place[input] = row;
                }
                inputs.iter().map(|&input| place[input]).collect()
            }
        };
        let mut work = vec![0.0; d_in * d_out];
        let rows = work.par_chunks_exact_mut(d_out).zip(&inputs);
        rows.for_each(|(row, &input)| row.copy_from_slice(&weight[input * d_out..][..d_out]));
        let mut run = Run {
            grid: &self.grid,
            layout,
            dynamic: grids.is_none(),
            stale_groups: self.stale_groups,
            grids: grids.unwrap_or_else(|| Grids {
                scales: vec![1.0; layout.n_groups() * d_out],
                zeros: (!self.grid.symmetric).then(|| vec![0.0; layout.n_groups() * d_out]),
            }),
            moments: inputs.iter().map(|&input| moments[input]).collect(),
            packed: &packed,
            codes: vec![0; d_in * d_out],
            losses: vec![0.0; d_out],
            rounded: factors
                .drift
                .as_ref()
                .map(|_| vec![0.0; d_in.min(BLOCK) * d_out]),
        };
        let ran = run.blocks(&mut work, &factors);
        let rounded = Rounded {
            codes: run.codes,
            grids: run.grids,
            input_order: input_order.map(|order| order.into_iter().map(|i| i as u32).collect()),
            notes,
            loss: run.losses.iter().sum::<f64>() / 2.0,
        };
        // Errors that grew beyond the range of floats.
        if ran.is_err() || !rounded.loss.is_finite() {
            return self.round_to_nearest(&weight, layout, &moments, rounded.notes);
        }
        Ok(rounded)
    }

    /// The inputs in the order in which they are packed, unless that is the order of the weight.
    ///
    /// `inputs` is the reverse of the order of rounding. The inputs of a group are packed in their
    /// order in the weight: files hold the group of each input, not its place there.
    fn input_order(&self, inputs: &[usize], group_size: usize) -> Option<Vec<usize>> {
        if self.order != Order::DescendingRegrouped {
            return None;
        }
        let mut order: Vec<usize> = inputs.iter().rev().copied().collect();
        let groups = order.chunks_mut(group_size);
        groups.for_each(<[usize]>::sort_unstable);
        (!order.is_sorted()).then_some(order)
    }

    fn round_to_nearest(
        &self,
        weight: &[f32],
        layout: &Layout,
        moments: &[f32],
        mut notes: Vec<Note>,
    ) -> Result<Rounded> {
        notes.push(Note::RoundedToNearest);
        let grids = self.grid.grids(weight, layout, Some(moments))?;
        let words = kernels::encode(weight, &grids.scales, grids.zeros.as_deref(), layout);
        Ok(Rounded {
            codes: kernels::unpack(&words, layout),
            grids,
            input_order: None,
            notes,
            loss: f64::NAN,
        })
    }
}

/// The weight with zeros for dead inputs; a copy only if there are any.
fn cleared<'a>(weight: &'a [f32], moments: &[f32]) -> Cow<'a, [f32]> {
    let d_out = weight.len() / moments.len();
    let mut weight = Cow::Borrowed(weight);
    for (input, &moment) in moments.iter().enumerate() {
        if moment == 0.0 {
            weight.to_mut()[input * d_out..][..d_out].fill(0.0);
        }
    }
    weight
}

#[cfg(test)]
mod tests;
