//! The operations in burn's primitives: for every backend, and the reference for the native ones.

#[cfg(feature = "cubecl")]
use std::any::TypeId;
use std::ops::Range;

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{IndexingUpdateOp, Shape, Slice};

use crate::dtype::{cast, widened};

/// The number of logits in memory at a time: 16 MiB of `f32`.
pub(super) const SLICE: usize = 4 << 20;
/// The least number of rows of a slab on a device of CubeCL, unless there are fewer: each slab reads the
/// whole head, which takes as long as the product with a few hundred rows.
#[cfg(feature = "cubecl")]
const ROWS: usize = 1024;

/// The losses, the log-sum-exps and, if `with_dx`, the gradients of the losses for `x`.
pub(super) fn forward<B: Backend>(
    x: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: IntTensor<B>,
    with_dx: bool,
) -> (FloatTensor<B>, FloatTensor<B>, Option<FloatTensor<B>>) {
    let dtype = x.dtype();
    let head = cast::<B>(head, dtype);
    let (mut nll, mut lse, mut dx) = (Vec::new(), Vec::new(), Vec::new());
    for rows in chunks::<B>(&x, &head) {
        let n = rows.len();
        let logits = widened::<B>(B::float_matmul(rows_of::<B>(&x, &rows), head.clone()));
        let targets = targets_of::<B>(&targets, &rows);
        let most = B::float_max_dim(logits.clone(), 1);
        let exp = B::float_exp(B::float_sub(logits.clone(), most.clone()));
        let sum = B::float_sum_dim(exp.clone(), 1);
        let of_rows = B::float_add(B::float_log(sum.clone()), most);
        let of_target = B::float_gather(1, logits, targets.clone());
        let flat = |t| B::float_reshape(t, Shape::new([n]));
        nll.push(flat(B::float_sub(of_rows.clone(), of_target)));
        lse.push(flat(of_rows));
        if with_dx {
            let p = less_target::<B>(B::float_div(exp, sum), targets);
            let p = cast::<B>(p, dtype);
            dx.push(B::float_matmul(p, B::float_transpose(head.clone())));
        }
    }
    let dx = with_dx.then(|| B::float_cat(dx, 0));
    (B::float_cat(nll, 0), B::float_cat(lse, 0), dx)
}

/// The gradient for the head, `[hidden, vocab]`.
pub(super) fn dhead<B: Backend>(
    x: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: IntTensor<B>,
    lse: FloatTensor<B>,
    dnll: FloatTensor<B>,
) -> FloatTensor<B> {
    let dtype = head.dtype();
    let head = cast::<B>(head, x.dtype());
    let mut dhead = B::float_zeros(head.shape(), &head.device(), lse.dtype().into());
    for rows in chunks::<B>(&x, &head) {
        let column = |t: &FloatTensor<B>| {
            let t = B::float_slice(t.clone(), &[Slice::from(rows.clone())]);
            B::float_reshape(t, Shape::new([rows.len(), 1]))
        };
        let x = rows_of::<B>(&x, &rows);
        let logits = widened::<B>(B::float_matmul(x.clone(), head.clone()));
        let p = B::float_exp(B::float_sub(logits, column(&lse)));
        let p = less_target::<B>(p, targets_of::<B>(&targets, &rows));
        let dlogits = B::float_mul(p, column(&dnll));
        let dlogits = cast::<B>(dlogits, x.dtype());
        let part = widened::<B>(B::float_matmul(B::float_transpose(x), dlogits));
        dhead = B::float_add(dhead, part);
    }
    cast::<B>(dhead, dtype)
}

/// The ranges of rows whose logits are computed at a time.
fn chunks<B: Backend>(x: &FloatTensor<B>, head: &FloatTensor<B>) -> Vec<Range<usize>> {
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

fn rows_of<B: Backend>(x: &FloatTensor<B>, rows: &Range<usize>) -> FloatTensor<B> {
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
