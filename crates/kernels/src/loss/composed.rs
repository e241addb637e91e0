//! The operations in burn's primitives: for every backend, and the reference for the native ones.

#[cfg(feature = "cubecl")]
use std::any::TypeId;
use std::ops::Range;

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{IndexingUpdateOp, Shape, Slice};

use super::head::{Bias, Head};
use crate::dtype::{cast, widened};
use crate::softcap::times_slope;

/// The number of logits in memory at a time: 16 MiB of `f32`.
pub(super) const SLICE: usize = 4 << 20;
/// The least number of rows of a slab on a device of CubeCL, unless there are fewer: each slab reads the
/// whole head, which takes as long as the product with a few hundred rows.
#[cfg(feature = "cubecl")]
const ROWS: usize = 1024;

/// The losses, the log-sum-exps and, if `with_dx`, the gradients of the losses for `x`.
pub(super) fn forward<B: Backend>(
    x: FloatTensor<B>,
    head: Head<B>,
    targets: IntTensor<B>,
    with_dx: bool,
) -> (FloatTensor<B>, FloatTensor<B>, Option<FloatTensor<B>>) {
    let dtype = x.dtype();
    let head = head.cast(dtype);
    let (mut nll, mut lse, mut dx) = (Vec::new(), Vec::new(), Vec::new());
    for rows in chunks::<B>(&x, &head.weight) {
        let n = rows.len();
        let logits = head.logits(rows_of::<B>(&x, &rows));
        let targets = targets_of::<B>(&targets, &rows);
        let most = B::float_max_dim(logits.clone(), 1);
        let exp = B::float_exp(B::float_sub(logits.clone(), most.clone()));
        let sum = B::float_sum_dim(exp.clone(), 1);
        let of_rows = B::float_add(B::float_log(sum.clone()), most);
        let slope = head.slope(&logits).filter(|_| with_dx);
        let of_target = B::float_gather(1, logits, targets.clone());
        let flat = |t| B::float_reshape(t, Shape::new([n]));
        nll.push(flat(B::float_sub(of_rows.clone(), of_target)));
        lse.push(flat(of_rows));
        if with_dx {
            let d = less_target::<B>(B::float_div(exp, sum), targets);
            let d = cast::<B>(times_slope::<B>(d, slope), dtype);
            dx.push(B::float_matmul(d, B::float_transpose(head.weight.clone())));
        }
    }
    let dx = with_dx.then(|| B::float_cat(dx, 0));
    (B::float_cat(nll, 0), B::float_cat(lse, 0), dx)
}

/// The gradients for the weight of the head, `[hidden, vocab]`, and for its bias.
pub(super) fn dhead<B: Backend>(
    x: FloatTensor<B>,
    head: Head<B>,
    targets: IntTensor<B>,
    lse: FloatTensor<B>,
    dnll: FloatTensor<B>,
) -> (FloatTensor<B>, Bias<B>) {
    let dtype = head.weight.dtype();
    let head = head.cast(x.dtype());
    let zeros = |shape| B::float_zeros(shape, &x.device(), lse.dtype().into());
    let mut dweight = zeros(head.weight.shape());
    let mut dbias = match &head.bias {
        Bias::Each(bias) => Some(zeros(bias.shape())),
        Bias::Absent => None,
    };
    for rows in chunks::<B>(&x, &head.weight) {
        let column = |t: &FloatTensor<B>| {
            let t = B::float_slice(t.clone(), &[Slice::from(rows.clone())]);
            B::float_reshape(t, Shape::new([rows.len(), 1]))
        };
        let x = rows_of::<B>(&x, &rows);
        let logits = head.logits(x.clone());
        let slope = head.slope(&logits);
        let p = B::float_exp(B::float_sub(logits, column(&lse)));
        let d = less_target::<B>(p, targets_of::<B>(&targets, &rows));
        let d = B::float_mul(times_slope::<B>(d, slope), column(&dnll));
        if let Some(sum) = dbias {
            let part = B::float_reshape(B::float_sum_dim(d.clone(), 0), sum.shape());
            dbias = Some(B::float_add(sum, part));
        }
        let d = cast::<B>(d, x.dtype());
        let part = widened::<B>(B::float_matmul(B::float_transpose(x), d));
        dweight = B::float_add(dweight, part);
    }
    let dbias = match (dbias, head.bias) {
        (Some(dbias), Bias::Each(bias)) => Bias::Each(cast::<B>(dbias, bias.dtype())),
        _ => Bias::Absent,
    };
    (cast::<B>(dweight, dtype), dbias)
}

/// The ranges of rows whose logits are computed at a time.
pub(super) fn chunks<B: Backend>(x: &FloatTensor<B>, head: &FloatTensor<B>) -> Vec<Range<usize>> {
    let (rows, vocab) = (x.shape()[0], head.shape()[1]);
    let size = (SLICE / vocab.max(1)).max(least_rows::<B>());
    let starts = (0..rows).step_by(size);
    starts.map(|start| start..rows.min(start + size)).collect()
}

/// The least number of rows of a slab on the devices of a backend.
fn least_rows<B: Backend>() -> usize {
    #[cfg(feature = "cubecl")]
    if TypeId::of::<B::Device>() == TypeId::of::<burn_cubecl::CubeDevice>() {
        return ROWS;
    }
    1
}

pub(super) fn rows_of<B: Backend>(x: &FloatTensor<B>, rows: &Range<usize>) -> FloatTensor<B> {
    B::float_slice(x.clone(), &[Slice::from(rows.clone()), Slice::full()])
}

/// The targets of some rows, `[rows, 1]`.
fn targets_of<B: Backend>(targets: &IntTensor<B>, rows: &Range<usize>) -> IntTensor<B> {
    let targets = B::int_slice(targets.clone(), &[Slice::from(rows.clone())]);
    B::int_reshape(targets, Shape::new([rows.len(), 1]))
}

/// `p - onehot(target)`.
fn less_target<B: Backend>(p: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let ones = B::float_ones(targets.shape(), &p.device(), p.dtype().into());
    B::float_scatter(1, p, targets, B::float_neg(ones), IndexingUpdateOp::Add)
}
