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
use crate::at_rest::{AtRest, at_rest};
use crate::dense::product;
use crate::host::{all_native, contiguous, floats, integers, rounded, tensor, widened};
use crate::isa::{Isa, by_instruction_set};
use crate::math;
use crate::matrix::Matrix;
use crate::memory::zeroed;

/// The largest number of rows of a slab, for which the head is read once.
const ROWS: usize = 1024;
/// The width of a slab is a multiple of this number of columns.
const COLUMNS: usize = 256;

impl LossOps for Flex {
    fn linear_cross_entropy_forward(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&x, &head]) {
            let (nll, lse, _) = composed::forward::<Self>(x, head, targets, false);
            return (nll, lse);
        }
        let (x, head) = (widened(x), at_rest(head));
        let call = Call::new(&x, &head, targets);
        let (nll, lse) = call.forward(None);
        (tensor(nll, [call.rows]), tensor(lse, [call.rows]))
    }

    fn linear_cross_entropy_with_dx(
        x: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !all_native([&x, &head]) {
            let (nll, lse, dx) = composed::forward::<Self>(x, head, targets, true);
            return (nll, lse, dx.expect("the gradient is requested"));
        }
        let dtype = x.dtype();
        let (x, head) = (widened(x), at_rest(head));
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
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        lse: FloatTensor<Self>,
        dnll: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if !all_native([&x, &head, &lse, &dnll]) {
            return composed::dhead::<Self>(x, head, targets, lse, dnll);
        }
        let (x, lse, dnll) = (widened(x), contiguous(lse), contiguous(dnll));
        let dtype = head.dtype();
        let head = at_rest(head);
        let call = Call::new(&x, &head, targets);
        rounded(call.dhead(floats(&lse), floats(&dnll)), dtype)
    }
}

/// The arguments of a call.
struct Call<'a> {
    x: &'a [f32],
    /// `[hidden, vocab]`.
    head: AtRest<'a>,
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
    fn new(x: &'a FlexTensor, head: &'a FlexTensor, targets: FlexTensor) -> Self {
        let [hidden, vocab] = head.shape().dims();
        let targets = integers(targets);
        if let Some(target) = targets.iter().find(|&&target| target >= vocab) {
            panic!("target {target} is not in the vocabulary of {vocab} tokens");
        }
        Self {
            x: floats(x),
            head: AtRest::of(head),
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

    /// The columns of a slab in parts, for each of which the head is in `f32`: 16 MiB at most, or
    /// [`COLUMNS`] columns.
    fn panels(&self, columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let width = (SLICE / self.hidden.max(1) / COLUMNS).max(1) * COLUMNS;
        let starts = columns.clone().step_by(width);
        starts.map(move |start| start..columns.end.min(start + width))
    }

    /// Writes `x · head` in a slab, row by row.
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
            let logits = &mut logits[columns.start - first..];
            let head = self.head.panel(columns, panel);
            // SAFETY: the rows lie within `x` and the columns within the head.
            unsafe { product(dims, x, head, logits, width, false) }
        }
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
                    .for_each(|(logits, row)| exponentials(logits, slab.columns.start, row));
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
                        let head = self.head.panel(columns, &mut panel).transpose();
                        // SAFETY: the columns lie within the slab and within the head.
                        unsafe { product(dims, exponentials, head, dx, self.hidden, add) }
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

    /// Turns the sum of the columns of the head, weighted by exponentials, into the gradient of a loss.
    fn finish(&self, dx: &mut [f32], row: &Row) {
        for (i, dx) in dx.iter_mut().enumerate() {
            *dx = *dx / row.sum - self.head.at(i, row.target);
        }
    }

    /// The gradient for the head, in the memory order of the head.
    fn dhead(&self, lse: &[f32], dnll: &[f32]) -> FlexTensor {
        assert!(lse.len() == self.rows && dnll.len() == self.rows);
        let transposed = self.head.is_by_columns();
        let mut dhead = zeroed(self.hidden * self.vocab);
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
                        gradient(logits, lse[row], dnll[row]);
                        if slab.columns.contains(&self.targets[row]) {
                            logits[self.targets[row] - first] -= dnll[row];
                        }
                    });
                let dlogits = Matrix::new(logits.as_ptr(), width, 1);
                let add = rows.start > 0;
                // SAFETY: `x` has these rows, and the logits are `[rows, width]`.
                unsafe {
                    if transposed {
                        let dims = [width, rows.len(), self.hidden];
                        let dhead = &mut dhead[first * self.hidden..];
                        product(dims, dlogits.transpose(), x, dhead, self.hidden, add);
                    } else {
                        let dims = [self.hidden, rows.len(), width];
                        let dhead = &mut dhead[first..];
                        product(dims, x.transpose(), dlogits, dhead, self.vocab, add);
                    }
                }
            }
        }
        if transposed {
            tensor(dhead, [self.vocab, self.hidden]).transpose(0, 1)
        } else {
            tensor(dhead, [self.hidden, self.vocab])
        }
    }
}

by_instruction_set! {
    /// Turns the logits from token `first` on into exponentials relative to the largest logit so far.
    fn exponentials(logits: &mut [f32], first: usize, row: &mut Row) = exponentials_body
}

#[inline(always)]
fn exponentials_body<I: Isa>(logits: &mut [f32], first: usize, row: &mut Row) {
    if let Some(&logit) = row.target.checked_sub(first).and_then(|at| logits.get(at)) {
        row.of_target = logit;
    }
    let before = row.most;
    let largest = math::scale_max(logits, 1.0);
    row.most = if largest > before { largest } else { before };
    let added = math::exp_sum(logits, row.most);
    row.shrink = if row.most == before {
        1.0
    } else {
        math::exp(before - row.most)
    };
    row.sum = row.sum * row.shrink + added;
}

by_instruction_set! {
    /// Turns logits into probabilities times the gradient of the loss.
    fn gradient(logits: &mut [f32], lse: f32, dnll: f32) = gradient_body
}

#[inline(always)]
fn gradient_body<I: Isa>(logits: &mut [f32], lse: f32, dnll: f32) {
    for logit in logits {
        *logit = math::exp(*logit - lse) * dnll;
    }
}
