//! The operations in burn's primitives: for every backend, and the reference for the native ones.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Shape, Slice, TensorData};

use super::QuantOps;
use super::packed::{Packed, Zeros};
use crate::dtype::{cast, widened};
use crate::layout::{Layout, Levels, TILE};

/// The dense weight, `[d_in, d_out]`.
pub(super) fn unpack<B: Backend>(w: Packed<B>) -> FloatTensor<B> {
    let group = group_of_input::<B>(&w);
    let scales = B::float_select(w.scales.clone(), 0, group.clone());
    B::float_mul(offsets(w, group), scales)
}

/// `x · w`, `[rows, d_out]`, with the weight rounded to the dtype of `x`.
pub(super) fn matmul<B: QuantOps>(x: FloatTensor<B>, w: Packed<B>) -> FloatTensor<B> {
    let weight = cast::<B>(B::quant_unpack(w), x.dtype());
    B::float_matmul(x, weight)
}

/// The gradient for `x`, `[rows, d_in]`.
pub(super) fn dx<B: QuantOps>(dy: FloatTensor<B>, w: Packed<B>) -> FloatTensor<B> {
    let weight = cast::<B>(B::quant_unpack(w), dy.dtype());
    B::float_matmul(dy, B::float_transpose(weight))
}

/// The gradients of scales and zeros, `[n_groups, d_out]` each.
pub(super) fn dgrid<B: Backend>(
    dy: FloatTensor<B>,
    x: FloatTensor<B>,
    w: Packed<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (layout, dtype) = (w.layout, w.scales.dtype());
    let group = group_of_input::<B>(&w);
    let scales = widened::<B>(w.scales);
    let zeros = match w.zeros {
        Zeros::Each(zeros) => Zeros::Each(widened::<B>(zeros)),
        Zeros::Absent => Zeros::Absent,
    };
    let [dy, x] = [dy, x].map(widened::<B>);
    let p = cast::<B>(B::float_matmul(B::float_transpose(x), dy), scales.dtype());
    let w = Packed {
        scales: scales.clone(),
        zeros,
        ..w
    };
    let dscales = sum_groups::<B>(B::float_mul(p.clone(), offsets(w, group)), &layout);
    let dzeros = B::float_neg(B::float_mul(scales, sum_groups::<B>(p, &layout)));
    (cast::<B>(dscales, dtype), cast::<B>(dzeros, dtype))
}

/// `level - zero`, `[d_in, d_out]`, in the dtype of the scales; `group` has the group of each input.
fn offsets<B: Backend>(w: Packed<B>, group: IntTensor<B>) -> FloatTensor<B> {
    let (layout, dtype) = (w.layout, w.scales.dtype().into());
    let codes = codes::<B>(w.words, &layout);
    let levels = match layout.levels() {
        Levels::Table(table) => {
            let device = codes.device();
            let table = B::float_from_data(TensorData::from(table), &device);
            let flat = B::int_reshape(codes, Shape::new([layout.d_in() * layout.d_out()]));
            let levels = B::float_select(B::float_cast(table, dtype), 0, flat);
            B::float_reshape(levels, Shape::new([layout.d_in(), layout.d_out()]))
        }
        Levels::Unsigned | Levels::Centered => {
            let codes = B::int_into_float(codes, dtype);
            B::float_sub_scalar(codes, layout.center().into())
        }
    };
    match w.zeros {
        Zeros::Each(zeros) => B::float_sub(levels, B::float_select(zeros, 0, group)),
        Zeros::Absent => levels,
    }
}

/// The codes, `[d_in, d_out]`, in the dtype of the words.
fn codes<B: Backend>(words: IntTensor<B>, layout: &Layout) -> IntTensor<B> {
    let device = words.device();
    let [n_tiles, word_rows, _] = layout.words_shape();
    let (d_in, d_out) = (layout.d_in(), layout.d_out());
    let words = B::int_permute(words, &[1, 0, 2]);
    let words = B::int_reshape(words, Shape::new([word_rows, n_tiles * TILE]));
    let words = B::int_slice(words, &[Slice::full(), Slice::from(0..d_out)]);

    let column = |of: &dyn Fn(usize) -> u32| {
        let data = TensorData::new((0..d_in).map(of).collect::<Vec<u32>>(), [d_in, 1]);
        B::int_expand(B::int_from_data(data, &device), Shape::new([d_in, d_out]))
    };
    let rows = |of: &dyn Fn(usize) -> i32| {
        B::int_from_data(
            TensorData::new((0..d_in).map(of).collect::<Vec<i32>>(), [d_in]),
            &device,
        )
    };
    let shift = |i: usize| layout.position(i).1;

    let low = B::int_select(words.clone(), 0, rows(&|i| layout.position(i).0 as i32));
    let mut codes = B::bitwise_right_shift(low, column(&shift));
    if (0..d_in).any(|i| layout.straddles(shift(i))) {
        let next = |i: usize| (layout.position(i).0 + 1).min(word_rows - 1) as i32;
        let high = B::int_select(words, 0, rows(&next));
        let high = B::bitwise_left_shift(high, column(&|i| (32 - shift(i)) % 32));
        let taken = column(&|i| {
            if layout.straddles(shift(i)) {
                layout.mask()
            } else {
                0
            }
        });
        codes = B::bitwise_or(codes, B::bitwise_and(high, taken));
    }
    B::bitwise_and_scalar(codes, layout.mask().into())
}

/// The group of each input, `[d_in]`.
fn group_of_input<B: Backend>(w: &Packed<B>) -> IntTensor<B> {
    let group = |i: usize| (i / w.layout.group_size()) as i32;
    let groups: Vec<i32> = (0..w.layout.d_in()).map(group).collect();
    B::int_from_data(
        TensorData::new(groups, [w.layout.d_in()]),
        &w.words.device(),
    )
}

/// Sums of `[d_in, d_out]` over the inputs of each group, `[n_groups, d_out]`.
fn sum_groups<B: Backend>(t: FloatTensor<B>, layout: &Layout) -> FloatTensor<B> {
    let (n_groups, d_out) = (layout.n_groups(), layout.d_out());
    let padded = n_groups * layout.group_size();
    let zeros = Shape::new([padded, d_out]);
    let zeros = B::float_zeros(zeros, &t.device(), t.dtype().into());
    let t = B::float_slice_assign(zeros, &[Slice::from(0..layout.d_in()), Slice::full()], t);
    let t = B::float_reshape(t, Shape::new([n_groups, layout.group_size(), d_out]));
    B::float_reshape(B::float_sum_dim(t, 1), Shape::new([n_groups, d_out]))
}
