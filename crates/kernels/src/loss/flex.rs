//! The CPU: slabs of logits, some rows by some columns of the vocabulary.
//!
//! The maxima and sums of rows are updated slab by slab; the sums so far are rescaled when a maximum
//! grows (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867). Products and rows are divided
//! into tasks of fixed sizes, so that the bits of the result do not depend on the number of threads.

use std::ops::Range;

use burn::backend::{
    Flex, TensorMetadata,
    flex::FlexTensor,
    tensor::{FloatTensor, IntTensor},
};
use rayon::prelude::*;

use super::LossOps;
use super::composed::{self, SLICE};
use super::head::{Bias, Head};
use crate::at_rest::{AtRest, at_rest};
use crate::dense::product;
use crate::host::{all_native, contiguous, floats, integers, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math;
use crate::matrix::Matrix;
use crate::memory::zeroed;
use crate::softcap::{Softcap, cap_each};

/// The largest number of rows of a slab, for which the head is read once.
const ROWS: usize = 1024;
/// The width of a slab is a multiple of this number of columns.
const COLUMNS: usize = 256;

impl LossOps for Flex {
    fn linear_cross_entropy_forward(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&x]) || !head.is_native() {
            let (nll, lse, _) = composed::forward::<Self>(x, head, targets, false);
            return (nll, lse);
        }
        let (x, head) = (widened(x), Native::of(head));
        let call = Call::new(&x, &head, targets);
        let (nll, lse) = call.forward(None);
        (tensor(nll, [call.rows]), tensor(lse, [call.rows]))
    }

    fn linear_cross_entropy_with_dx(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&x]) || !head.is_native() {
            let (nll, lse, dx) = composed::forward::<Self>(x, head, targets, true);
            return (nll, lse, dx.expect("the gradient is requested"));
        }
        let dtype = x.dtype();
        let (x, head) = (widened(x), Native::of(head));
        let call = Call::new(&x, &head, targets);
        let mut dx = zeroed(call.rows * call.hidden);
        let (nll, lse) = call.forward(Some(&mut dx));
        (
            tensor(nll, [call.rows]),
            tensor(lse, [call.rows]),
            rounded(tensor(dx, x.shape()), dtype),
        )
    }

    fn linear_cross_entropy_dhead(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
        lse: FloatTensor<Self>,
        dnll: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, Bias<Self>) {
        if !all_native([&x, &lse, &dnll]) || !head.is_native() {
            return composed::dhead::<Self>(x, head, targets, lse, dnll);
        }
        let (x, lse, dnll) = (widened(x), contiguous(lse), contiguous(dnll));
        let dtype = head.weight.dtype();
        let of_bias = match &head.bias {
            Bias::Each(bias) => Some(bias.dtype()),
            Bias::Absent => None,
        };
        let head = Native::of(head);
        let call = Call::new(&x, &head, targets);
        let (dweight, dbias) = call.dhead(floats(&lse), floats(&dnll));
        let dbias = match of_bias {
            Some(dtype) => Bias::Each(rounded(tensor(dbias, [call.vocab]), dtype)),
            None => Bias::Absent,
        };
        (rounded(dweight, dtype), dbias)
    }
}

impl Head<Flex> {
    /// Whether the weight and the bias are of dtypes in which native code computes.
    fn is_native(&self) -> bool {
        let bias_is_native = match &self.bias {
            Bias::Each(bias) => all_native([bias]),
            Bias::Absent => true,
        };
        all_native([&self.weight]) && bias_is_native
    }
}

/// A head whose values native code reads.
struct Native {
    weight: FlexTensor,
    /// In `F32`.
    bias: Option<FlexTensor>,
    softcap: Option<Softcap>,
}

impl Native {
    fn of(head: Head<Flex>) -> Self {
        Self {
            weight: at_rest(head.weight),
            bias: match head.bias {
                Bias::Each(bias) => Some(widened(bias)),
                Bias::Absent => None,
            },
            softcap: head.softcap,
        }
    }
}

/// The arguments of a call.
struct Call<'a> {
    x: &'a [f32],
    /// `[hidden, vocab]`.
    weight: AtRest<'a>,
    bias: Option<&'a [f32]>,
    softcap: Option<Softcap>,
    targets: Vec<usize>,
    rows: usize,
    hidden: usize,
    vocab: usize,
}

/// Some rows and some columns of the logits.
struct Slab {
    rows: Range<usize>,
    columns: Range<usize>,
}

/// The state of a row after some slabs.
#[derive(Clone, Copy)]
struct Row {
    target: usize,
    /// The largest logit.
    most: f32,
    /// The sum of the exponentials relative to `most`.
    sum: f32,
    /// The factor of earlier sums in this slab.
    shrink: f32,
    /// The logit of the target.
    of_target: f32,
}

impl<'a> Call<'a> {
    fn new(x: &'a FlexTensor, head: &'a Native, targets: FlexTensor) -> Self {
        let [hidden, vocab] = head.weight.shape().dims();
        let targets = integers(targets);
        if let Some(target) = targets.iter().find(|&&target| target >= vocab) {
            panic!("target {target} is not in the vocabulary of {vocab} tokens");
        }
        Self {
            x: floats(x),
            weight: AtRest::of(&head.weight),
            bias: head.bias.as_ref().map(floats),
            softcap: head.softcap,
            targets,
            rows: x.shape()[0],
            hidden,
            vocab,
        }
    }

    /// The slabs of some rows.
    fn slabs(&self, rows: Range<usize>) -> impl Iterator<Item = Slab> {
        let width = SLICE / rows.len() / COLUMNS * COLUMNS;
        let starts = (0..self.vocab).step_by(width);
        starts.map(move |start| Slab {
            rows: rows.clone(),
            columns: start..self.vocab.min(start + width),
        })
    }

    /// The ranges of rows of a slab.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = (0..self.rows).step_by(ROWS);
        starts.map(|start| start..self.rows.min(start + ROWS))
    }

    /// The columns of a slab in parts, for each of which the weight is in `f32`: 16 MiB at most, or
    /// [`COLUMNS`] columns.
    fn panels(&self, columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let width = (SLICE / self.hidden.max(1) / COLUMNS).max(1) * COLUMNS;
        let starts = columns.clone().step_by(width);
        starts.map(move |start| start..columns.end.min(start + width))
    }

    /// Writes the logits of a slab, row by row.
    fn logits(&self, slab: &Slab, panel: &mut Vec<f32>, logits: &mut [f32]) {
        let x = Matrix::new(
            self.x[slab.rows.start * self.hidden..].as_ptr(),
            self.hidden,
            1,
        );
        let (first, width) = (slab.columns.start, slab.columns.len());
        assert!(slab.rows.end * self.hidden <= self.x.len());
        assert!(slab.columns.end <= self.vocab);
        for columns in self.panels(slab.columns.clone()) {
            let dims = [slab.rows.len(), self.hidden, columns.len()];
            let products = &mut logits[columns.start - first..];
            let weight = self.weight.panel(columns, panel);
            // SAFETY: the rows lie within `x` and the columns within the weight.
            unsafe { product(dims, x, weight, products, width, false) }
        }
        let bias = self.bias.map(|bias| &bias[slab.columns.clone()]);
        if bias.is_none() && self.softcap.is_none() {
            return;
        }
        logits.par_chunks_exact_mut(width).for_each(|logits| {
            if let Some(bias) = bias {
                math::add_scaled(logits, 1.0, bias);
            }
            if let Some(cap) = self.softcap {
                cap_each(logits, cap);
            }
        });
    }

    /// The losses and the log-sum-exps; the gradients of the losses are written into `dx`.
    fn forward(&self, mut dx: Option<&mut [f32]>) -> (Vec<f32>, Vec<f32>) {
        let (mut nll, mut lse) = (vec![0.0; self.rows], vec![0.0; self.rows]);
        let (mut logits, mut panel) = (Vec::new(), Vec::new());
        for rows in self.chunks() {
            let mut known: Vec<Row> = self.targets[rows.clone()]
                .iter()
                .map(|&target| Row {
                    target,
                    most: f32::NEG_INFINITY,
                    sum: 0.0,
                    shrink: 0.0,
                    of_target: 0.0,
                })
                .collect();
            let mut dx = dx
                .as_deref_mut()
                .map(|dx| &mut dx[rows.start * self.hidden..rows.end * self.hidden]);
            for slab in self.slabs(rows.clone()) {
                let width = slab.columns.len();
                logits.resize(rows.len() * width, 0.0);
                self.logits(&slab, &mut panel, &mut logits);
                logits
                    .par_chunks_exact_mut(width)
                    .zip(&mut known)
                    .for_each(|(logits, row)| {
                        exponentials(logits, slab.columns.start, self.softcap, row);
                    });
                if let Some(dx) = dx.as_deref_mut() {
                    let first = slab.columns.start == 0;
                    if !first {
                        dx.par_chunks_exact_mut(self.hidden.max(1))
                            .zip(&known)
                            .filter(|(_, row)| row.shrink != 1.0)
                            .for_each(|(dx, row)| math::scale(dx, row.shrink));
                    }
                    for columns in self.panels(slab.columns.clone()) {
                        let at = columns.start - slab.columns.start;
                        let add = columns.start > 0;
                        let exponentials = Matrix::new(logits[at..].as_ptr(), width, 1);
                        let dims = [rows.len(), columns.len(), self.hidden];
                        let weight = self.weight.panel(columns, &mut panel).transpose();
                        // SAFETY: the columns lie within the slab and within the weight.
                        unsafe { product(dims, exponentials, weight, dx, self.hidden, add) }
                    }
                }
            }
            if let Some(dx) = dx {
                dx.par_chunks_exact_mut(self.hidden.max(1))
                    .zip(&known)
                    .for_each(|(dx, row)| self.finish(dx, row));
            }
            for (row, known) in rows.zip(known) {
                let log_sum = known.sum.ln();
                lse[row] = known.most + log_sum;
                nll[row] = known.most - known.of_target + log_sum;
            }
        }
        (nll, lse)
    }

    /// Turns the sum of the columns of the weight, weighted by exponentials and slopes of the cap, into the
    /// gradient of a loss.
    fn finish(&self, dx: &mut [f32], row: &Row) {
        let slope = self.softcap.map_or(1.0, |cap| cap.slope_at(row.of_target));
        for (i, dx) in dx.iter_mut().enumerate() {
            *dx = *dx / row.sum - slope * self.weight.at(i, row.target);
        }
    }

    /// The gradients for the weight, in its memory order, and for the bias, empty if there is none.
    fn dhead(&self, lse: &[f32], dnll: &[f32]) -> (FlexTensor, Vec<f32>) {
        assert!(lse.len() == self.rows && dnll.len() == self.rows);
        let transposed = self.weight.is_by_columns();
        let mut dweight = zeroed(self.hidden * self.vocab);
        let mut dbias = zeroed(self.bias.map_or(0, <[f32]>::len));
        let (mut logits, mut panel) = (Vec::new(), Vec::new());
        for rows in self.chunks() {
            let x = Matrix::new(self.x[rows.start * self.hidden..].as_ptr(), self.hidden, 1);
            for slab in self.slabs(rows.clone()) {
                let (width, first) = (slab.columns.len(), slab.columns.start);
                logits.resize(rows.len() * width, 0.0);
                self.logits(&slab, &mut panel, &mut logits);
                logits
                    .par_chunks_exact_mut(width)
                    .zip(rows.clone().into_par_iter())
                    .for_each(|(logits, row)| {
                        let target = self.targets[row].checked_sub(first);
                        let target = target.filter(|&at| at < width);
                        gradient(logits, target, self.softcap, lse[row], dnll[row]);
                    });
                if self.bias.is_some() {
                    add_rows(&logits, width, &mut dbias[slab.columns.clone()]);
                }
                let dlogits = Matrix::new(logits.as_ptr(), width, 1);
                let add = rows.start > 0;
                // SAFETY: `x` has these rows, and the logits are `[rows, width]`.
                unsafe {
                    if transposed {
                        let dims = [width, rows.len(), self.hidden];
                        let dweight = &mut dweight[first * self.hidden..];
                        product(dims, dlogits.transpose(), x, dweight, self.hidden, add);
                    } else {
                        let dims = [self.hidden, rows.len(), width];
                        let dweight = &mut dweight[first..];
                        product(dims, x.transpose(), dlogits, dweight, self.vocab, add);
                    }
                }
            }
        }
        let dweight = if transposed {
            tensor(dweight, [self.vocab, self.hidden]).transpose(0, 1)
        } else {
            tensor(dweight, [self.hidden, self.vocab])
        };
        (dweight, dbias)
    }
}

/// Adds the rows of a matrix of `width` columns to `sums`, each column in the order of the rows.
fn add_rows(rows: &[f32], width: usize, sums: &mut [f32]) {
    let tasks = sums.par_chunks_mut(COLUMNS).enumerate();
    tasks.for_each(|(task, sums)| {
        for row in rows.chunks_exact(width) {
            math::add_scaled(sums, 1.0, &row[task * COLUMNS..]);
        }
    });
}

by_instruction_set! {
    /// Turns the logits from token `first` on into exponentials relative to the largest logit so far, times
    /// the slopes of the cap.
    fn exponentials(
        logits: &mut [f32],
        first: usize,
        softcap: Option<Softcap>,
        row: &mut Row,
    ) = exponentials_body
}

#[inline(always)]
fn exponentials_body<I: Isa>(
    logits: &mut [f32],
    first: usize,
    softcap: Option<Softcap>,
    row: &mut Row,
) {
    if let Some(&logit) = row.target.checked_sub(first).and_then(|at| logits.get(at)) {
        row.of_target = logit;
    }
    let before = row.most;
    let largest = math::scale_max(logits, 1.0);
    row.most = if largest > before { largest } else { before };
    let added = match softcap {
        Some(cap) => math::exp_sum_times(logits, row.most, |logit| cap.slope_at(logit)),
        None => math::exp_sum(logits, row.most),
    };
    row.shrink = if row.most == before {
        1.0
    } else {
        math::exp(before - row.most)
    };
    row.sum = row.sum * row.shrink + added;
}

by_instruction_set! {
    /// Turns logits, of which the one at `target` is the target's, into the gradient of what is capped.
    fn gradient(
        logits: &mut [f32],
        target: Option<usize>,
        softcap: Option<Softcap>,
        lse: f32,
        dnll: f32,
    ) = gradient_body
}

#[inline(always)]
fn gradient_body<I: Isa>(
    logits: &mut [f32],
    target: Option<usize>,
    softcap: Option<Softcap>,
    lse: f32,
    dnll: f32,
) {
    match softcap {
        Some(cap) => gradient_by(logits, target, |logit| cap.slope_at(logit), lse, dnll),
        None => gradient_by(logits, target, |_| 1.0, lse, dnll),
    }
}

/// [`gradient`], where `slope` is the derivative of a logit for what is capped.
#[inline(always)]
fn gradient_by(
    logits: &mut [f32],
    target: Option<usize>,
    slope: impl Fn(f32) -> f32,
    lse: f32,
    dnll: f32,
) {
    let of_target = target.map(|at| (at, slope(logits[at])));
    for logit in logits.iter_mut() {
        *logit = math::exp(*logit - lse) * dnll * slope(*logit);
    }
    if let Some((at, slope)) = of_target {
        logits[at] -= dnll * slope;
    }
}
