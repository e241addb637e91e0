//! CUDA, ROCm and wgpu: products of matrices of scores, which one kernel turns into probabilities in their
//! place, and another into gradients.

use burn::backend::DType;
use burn::backend::{
    ops::{FloatTensorOps, IntTensorOps},
    tensor::FloatTensor,
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::composed::{self, Sizes};
#[cfg(feature = "cuda")]
use super::cuda::Inputs;
use super::mask::{Bound, KeyRanges};
use super::{AttentionOps, Scores};
use crate::cube::{
    UNITS, address_type, buffer, contiguous, cube_for_each, elem, empty, is_supported,
    max_of_units, row_of_cube, sum_of_lanes, sum_of_units, units_for, width_of_rows,
};
use crate::matmul::device_product;

/// Whether the kernels support the dtype, and there is something to compute.
fn is_native(q: &CubeTensor, sizes: &Sizes) -> bool {
    is_supported(q.dtype) && sizes.batch * sizes.seq_q > 0
}

/// The rows of the scores of a call.
struct Rows {
    sizes: Sizes,
    is_causal: bool,
    starts: Option<CubeTensor>,
    ends: Option<CubeTensor>,
    scores: Scores,
}

/// The bounds of the keys of queries in `i32`. What is outside of the keys means the same as their ends.
pub(super) fn bounds(bound: Bound<CubeBackend>, seq_k: usize) -> Option<CubeTensor> {
    let Bound::Each(bounds) = bound else {
        return None;
    };
    let bounds = match bounds.dtype {
        DType::I64 | DType::U32 | DType::U64 => {
            CubeBackend::int_clamp(bounds, 0.into(), (seq_k as i64).into())
        }
        _ => bounds,
    };
    let bounds = CubeBackend::int_cast(bounds, DType::I32.into());
    Some(contiguous(bounds))
}

impl Rows {
    fn new(sizes: Sizes, mask: KeyRanges<CubeBackend>, scores: Scores) -> Self {
        Self {
            is_causal: mask.causal,
            starts: bounds(mask.starts, sizes.seq_k),
            ends: bounds(mask.ends, sizes.seq_k),
            scores,
            sizes,
        }
    }

    fn len(&self) -> usize {
        self.sizes.batch * self.sizes.heads * self.sizes.seq_q
    }

    fn width(&self) -> usize {
        width_of_rows(self.sizes.seq_k)
    }

    fn units(&self) -> CubeDim {
        units_for(self.sizes.seq_k / self.width())
    }

    fn mask(&self) -> MaskLaunch {
        let sizes = &self.sizes;
        MaskLaunch::new(
            self.len(),
            sizes.heads * sizes.seq_q,
            sizes.seq_q,
            sizes.seq_k,
            self.scores.scale as f32,
            self.scores.softcap.map_or(1.0, |cap| cap.value() as f32),
        )
    }

    /// Turns products of queries and keys into probabilities, and returns the log-sum-exps.
    fn probabilities(&self, scores: &CubeTensor) -> CubeTensor {
        let sizes = &self.sizes;
        let lse = empty(scores, [sizes.batch, sizes.heads, sizes.seq_q], DType::F32);
        // SAFETY: the kernel checks rows and keys against the sizes, which are those of the tensors.
        unsafe {
            probabilities_kernel::launch_unchecked(
                &scores.client,
                cube_for_each(self.len()),
                self.units(),
                address_type(&[scores]),
                self.width(),
                buffer(scores),
                self.starts.as_ref().map(buffer).into(),
                self.ends.as_ref().map(buffer).into(),
                buffer(&lse),
                self.mask(),
                self.is_causal,
                self.scores.softcap.is_some(),
                elem(scores.dtype),
            );
        }
        lse
    }

    /// Turns products of queries and keys into probabilities, and the gradients of these into those of the
    /// products.
    fn gradients(
        &self,
        scores: &CubeTensor,
        dp: &CubeTensor,
        lse: &CubeTensor,
        delta: &CubeTensor,
    ) {
        // SAFETY: as for the probabilities.
        unsafe {
            gradients_kernel::launch_unchecked(
                &scores.client,
                cube_for_each(self.len()),
                self.units(),
                address_type(&[scores]),
                self.width(),
                buffer(scores),
                buffer(dp),
                self.starts.as_ref().map(buffer).into(),
                self.ends.as_ref().map(buffer).into(),
                buffer(lse),
                buffer(delta),
                self.mask(),
                self.is_causal,
                self.scores.softcap.is_some(),
                elem(scores.dtype),
            );
        }
    }

    /// `Σ dy y` of each query and head, from what [`Sizes::stack`] returns.
    fn delta(&self, dy: &CubeTensor, y: &CubeTensor) -> CubeTensor {
        let (rows, dim) = (self.len(), self.sizes.dim);
        let delta = empty(dy, [rows], DType::F32);
        let width = width_of_rows(dim);
        // SAFETY: the kernel checks rows and columns against the sizes, which are those of the tensors.
        unsafe {
            delta_kernel::launch_unchecked(
                &dy.client,
                cube_for_each(rows),
                units_for(dim / width),
                address_type(&[dy]),
                width,
                buffer(dy),
                buffer(y),
                buffer(&delta),
                rows,
                dim / width,
                elem(dy.dtype),
            );
        }
        delta
    }
}

impl AttentionOps for CubeBackend {
    fn masked_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: KeyRanges<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[cfg(feature = "cuda")]
        if let Some(inputs) = Inputs::new(&q, &k, &v, &mask, scores) {
            return inputs.forward();
        }
        let sizes = Sizes::of::<Self>(&q, &k);
        if !is_native(&q, &sizes) {
            return composed::forward::<Self>(q, k, v, mask, scores);
        }
        let rows = Rows::new(sizes, mask, scores);
        let sizes = &rows.sizes;
        let (q, k) = (sizes.stack::<Self>(q), sizes.by_head::<Self>(k));
        let p = device_product(q, Self::float_transpose(k));
        let lse = rows.probabilities(&p);
        let y = device_product(p, sizes.by_head::<Self>(v));
        (sizes.unstack::<Self>(y), lse)
    }

    fn masked_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: KeyRanges<Self>,
        y: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        #[cfg(feature = "cuda")]
        if let Some(inputs) = Inputs::new(&q, &k, &v, &mask, scores) {
            return inputs.backward(y, lse, dy);
        }
        let sizes = Sizes::of::<Self>(&q, &k);
        if !is_native(&q, &sizes) {
            return composed::backward::<Self>(q, k, v, mask, y, lse, dy, scores);
        }
        let rows = Rows::new(sizes, mask, scores);
        let sizes = &rows.sizes;
        let [q, y, dy] = [q, y, dy].map(|t| contiguous(sizes.stack::<Self>(t)));
        let (k, v) = (sizes.by_head::<Self>(k), sizes.by_head::<Self>(v));
        let delta = rows.delta(&dy, &y);
        let p = device_product(q.clone(), Self::float_transpose(k.clone()));
        let ds = device_product(dy.clone(), Self::float_transpose(v));
        rows.gradients(&p, &ds, &contiguous(lse), &delta);
        let dk = device_product(Self::float_transpose(ds.clone()), q);
        let dv = device_product(Self::float_transpose(p), dy);
        (
            sizes.unstack::<Self>(device_product(ds, k)),
            sizes.by_position::<Self>(dk),
            sizes.by_position::<Self>(dv),
        )
    }
}

/// The sizes of the scores, and how they are computed.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Mask {
    /// The queries of all heads and texts.
    rows: usize,
    /// The queries of all heads of a text.
    rows_of_text: usize,
    queries: usize,
    keys: usize,
    scale: f32,
    cap: f32,
}

/// The first and the last key of a row.
#[cube]
fn range_of_keys(
    starts: ComptimeOption<&[i32]>,
    ends: ComptimeOption<&[i32]>,
    row: usize,
    mask: &Mask,
    #[comptime] is_causal: bool,
) -> (usize, usize) {
    let query = row % mask.queries;
    let bound = row / mask.rows_of_text * mask.queries + query;
    let mut last = mask.keys - 1;
    if is_causal {
        last = mask.keys - mask.queries + query;
    }
    #[comptime]
    match ends {
        ComptimeOption::Some(ends) => {
            let end = ends[bound];
            let of_end = select(end > 0i32, usize::cast_from(end), 1) - 1;
            last = select(of_end < last, of_end, last);
        }
        ComptimeOption::None => {}
    }
    let mut first = usize::new(0);
    #[comptime]
    match starts {
        // A query always attends to its last key.
        ComptimeOption::Some(starts) => {
            let start = starts[bound];
            let start = select(start > 0i32, usize::cast_from(start), 0);
            first = select(start < last, start, last);
        }
        ComptimeOption::None => {}
    }
    (first, last)
}

/// The scores at a vector of keys, before the mask.
#[cube]
fn scores_of<S: Float, C: Size>(
    products: Vector<S, C>,
    mask: &Mask,
    #[comptime] is_capped: bool,
) -> Vector<f32, C> {
    let mut scores = Vector::<f32, C>::cast_from(products) * Vector::<f32, C>::new(mask.scale);
    if is_capped {
        let cap = Vector::<f32, C>::new(mask.cap);
        scores = cap * (scores / cap).tanh();
    }
    scores
}

/// The values at keys within a range, and another one at the others.
#[cube]
fn within<C: Size>(
    values: Vector<f32, C>,
    at: usize,
    first: usize,
    last: usize,
    other: f32,
) -> Vector<f32, C> {
    let mut out = Vector::<f32, C>::empty();
    #[unroll]
    for lane in 0..C::value() {
        let key = at * C::value() + lane;
        let is_within = key >= first && key <= last;
        out.insert(lane, select(is_within, values.extract(lane), other));
    }
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn probabilities_kernel<S: Float, C: Size>(
    scores: &mut [Vector<S, C>],
    starts: ComptimeOption<&[i32]>,
    ends: ComptimeOption<&[i32]>,
    lse: &mut [f32],
    mask: Mask,
    #[comptime] is_causal: bool,
    #[comptime] is_capped: bool,
    #[define(S)] _dtype: ElemType,
) {
    let row = row_of_cube();
    if row >= mask.rows {
        terminate!();
    }
    let (first, last) = range_of_keys(starts, ends, row, &mask, is_causal);
    let columns = mask.keys / C::value();
    let begin = row * columns;
    // The largest score of a unit, and the sum of the exponentials of what is below it.
    let mut most = f32::min_value();
    let mut sum = f32::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < columns {
        let of_keys = scores_of::<S, C>(scores[begin + at], &mask, is_capped);
        let of_keys = within::<C>(of_keys, at, first, last, f32::min_value());
        let mut next = most;
        #[unroll]
        for lane in 0..C::value() {
            next = max(next, of_keys.extract(lane));
        }
        let exp = (of_keys - Vector::<f32, C>::new(next)).exp();
        let exp = within::<C>(exp, at, first, last, 0.0);
        sum = sum * (most - next).exp() + sum_of_lanes::<C>(exp);
        most = next;
        at += CUBE_DIM_X as usize;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let most_of_row = max_of_units(&mut shared, most);
    let sum = sum_of_units(&mut shared, sum * (most - most_of_row).exp());
    let of_row = sum.ln() + most_of_row;
    if UNIT_POS == 0 {
        lse[row] = of_row;
    }
    let mut at = UNIT_POS as usize;
    while at < columns {
        let of_keys = scores_of::<S, C>(scores[begin + at], &mask, is_capped);
        let p = (of_keys - Vector::<f32, C>::new(of_row)).exp();
        scores[begin + at] = Vector::cast_from(within::<C>(p, at, first, last, 0.0));
        at += CUBE_DIM_X as usize;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gradients_kernel<S: Float, C: Size>(
    scores: &mut [Vector<S, C>],
    dp: &mut [Vector<S, C>],
    starts: ComptimeOption<&[i32]>,
    ends: ComptimeOption<&[i32]>,
    lse: &[f32],
    delta: &[f32],
    mask: Mask,
    #[comptime] is_causal: bool,
    #[comptime] is_capped: bool,
    #[define(S)] _dtype: ElemType,
) {
    let row = row_of_cube();
    if row >= mask.rows {
        terminate!();
    }
    let (first, last) = range_of_keys(starts, ends, row, &mask, is_causal);
    let columns = mask.keys / C::value();
    let begin = row * columns;
    let of_row = Vector::<f32, C>::new(lse[row]);
    let delta = Vector::<f32, C>::new(delta[row]);
    let scale = Vector::<f32, C>::new(mask.scale);
    let mut at = UNIT_POS as usize;
    while at < columns {
        let of_keys = scores_of::<S, C>(scores[begin + at], &mask, is_capped);
        let p = within::<C>((of_keys - of_row).exp(), at, first, last, 0.0);
        let mut ds = p * (Vector::<f32, C>::cast_from(dp[begin + at]) - delta) * scale;
        if is_capped {
            let share = of_keys / Vector::<f32, C>::new(mask.cap);
            ds *= Vector::<f32, C>::new(1.0) - share * share;
        }
        scores[begin + at] = Vector::cast_from(p);
        dp[begin + at] = Vector::cast_from(ds);
        at += CUBE_DIM_X as usize;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn delta_kernel<S: Float, C: Size>(
    dy: &[Vector<S, C>],
    y: &[Vector<S, C>],
    delta: &mut [f32],
    rows: usize,
    columns: usize,
    #[define(S)] _dtype: ElemType,
) {
    let row = row_of_cube();
    if row >= rows {
        terminate!();
    }
    let first = row * columns;
    let mut products = Vector::<f32, C>::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < columns {
        let dy = Vector::<f32, C>::cast_from(dy[first + at]);
        products = fma(dy, Vector::<f32, C>::cast_from(y[first + at]), products);
        at += CUBE_DIM_X as usize;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let sum = sum_of_units(&mut shared, sum_of_lanes::<C>(products));
    if UNIT_POS == 0 {
        delta[row] = sum;
    }
}
