//! Floats as they lie in memory, of 16 or 32 bits, and their conversion to and from `f32`.

use std::ops::Range;

use burn::backend::{DType, TensorMetadata, flex::FlexTensor};
use burn::tensor::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::isa::{Isa, by_instruction_set};
use crate::matrix::Matrix;
use crate::memory::zeroed;

/// The number of values that a task converts.
const TASK: usize = 1 << 16;
/// The largest number of values of a panel of more than [`COLUMNS`] columns: 4 MiB, which stay in the last
/// cache.
const PANEL: usize = 1 << 20;
/// The least number of columns of a panel that is not the whole weight: `gemm` sums the products of fewer
/// columns in another order.
const COLUMNS: usize = 256;

/// The values of a float tensor, from its first one on.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Floats<'a> {
    /// # Panics
    /// If the tensor is of another dtype: see [`crate::host::all_native`].
    pub(crate) fn of(t: &'a FlexTensor) -> Self {
        let start = t.layout().start_offset();
        match t.dtype() {
            DType::F32 => Self::F32(&t.storage()[start..]),
            DType::F16 => Self::F16(&t.storage()[start..]),
            DType::BF16 => Self::Bf16(&t.storage()[start..]),
            dtype => panic!("{dtype:?} is not a float of up to 32 bits"),
        }
    }

    /// Writes the values from element `from` on.
    pub(crate) fn widen(self, from: usize, to: &mut [f32]) {
        let range = from..from + to.len();
        match self {
            Self::F32(values) => to.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f32_slice(to),
            Self::Bf16(values) => widen_bf16(&values[range], to),
        }
    }

    /// The first `n` values.
    pub(crate) fn to_f32(self, n: usize) -> Vec<f32> {
        let mut all = zeroed(n);
        let parts = all.par_chunks_mut(TASK).enumerate();
        parts.for_each(|(part, to)| self.widen(part * TASK, to));
        all
    }

    fn at(self, at: usize) -> f32 {
        match self {
            Self::F32(values) => values[at],
            Self::F16(values) => values[at].to_f32(),
            Self::Bf16(values) => values[at].to_f32(),
        }
    }
}

/// The values as bytes of a dtype, rounded to nearest, ties to even.
///
/// # Panics
/// If the dtype is not `F16` or `BF16`.
pub(crate) fn round(values: &[f32], dtype: DType) -> Bytes {
    match dtype {
        DType::F16 => {
            let mut rounded = vec![f16::ZERO; values.len()];
            let parts = rounded.par_chunks_mut(TASK).zip(values.par_chunks(TASK));
            parts.for_each(|(to, from)| to.convert_from_f32_slice(from));
            Bytes::from_elems(rounded)
        }
        DType::BF16 => {
            let mut rounded = vec![bf16::ZERO; values.len()];
            let parts = rounded.par_chunks_mut(TASK).zip(values.par_chunks(TASK));
            parts.for_each(|(to, from)| round_bf16(from, to));
            Bytes::from_elems(rounded)
        }
        _ => panic!("{dtype:?} is not a float of 16 bits"),
    }
}

by_instruction_set! {
    fn widen_bf16(from: &[bf16], to: &mut [f32]) = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body<I: Isa>(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

by_instruction_set! {
    fn round_bf16(from: &[f32], to: &mut [bf16]) = round_bf16_body
}

#[inline(always)]
fn round_bf16_body<I: Isa>(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        // A NaN stays one: its high bits, quiet.
        let quiet = bits >> 16 | 0x40;
        let is_nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
        *to = bf16::from_bits(if is_nan { quiet } else { nearest } as u16);
    }
}

/// A matrix `[rows, columns]` at rest, whose rows or columns are contiguous.
pub(crate) struct AtRest<'a> {
    values: Floats<'a>,
    dims: [usize; 2],
    by_columns: bool,
    /// The distance of its rows, or of its columns, from one another.
    stride: usize,
}

impl<'a> AtRest<'a> {
    /// The matrix of a tensor that [`at_rest`] has returned.
    pub(crate) fn of(t: &'a FlexTensor) -> Self {
        let dims = t.shape().dims();
        let (by_columns, stride) = lines(t).expect("rows or columns are contiguous");
        let matrix = Self {
            values: Floats::of(t),
            dims,
            by_columns,
            stride,
        };
        let [n_lines, width] = matrix.lines();
        let n_values = match matrix.values {
            Floats::F32(values) => values.len(),
            Floats::F16(values) => values.len(),
            Floats::Bf16(values) => values.len(),
        };
        assert!(n_lines == 0 || width == 0 || (n_lines - 1) * stride + width <= n_values);
        matrix
    }

    /// The number of contiguous rows or columns, and the number of values of each.
    fn lines(&self) -> [usize; 2] {
        let [rows, columns] = self.dims;
        if self.by_columns {
            [columns, rows]
        } else {
            [rows, columns]
        }
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub(crate) fn is_by_columns(&self) -> bool {
        self.by_columns
    }

    /// Values of a contiguous row or column, from `from` on: in place, or as a copy in `buffer`, which
    /// has as many.
    pub(crate) fn line<'b>(&'b self, line: usize, from: usize, buffer: &'b mut [f32]) -> &'b [f32] {
        let at = line * self.stride + from;
        match self.values {
            Floats::F32(values) => &values[at..][..buffer.len()],
            _ => {
                self.values.widen(at, buffer);
                buffer
            }
        }
    }

    /// The value in a row and a column.
    pub(crate) fn at(&self, row: usize, column: usize) -> f32 {
        let (line, along) = if self.by_columns {
            (column, row)
        } else {
            (row, column)
        };
        self.values.at(line * self.stride + along)
    }

    /// Divides the columns into panels of about as many columns each.
    pub(crate) fn panels(&self) -> impl Iterator<Item = Range<usize>> {
        let [rows, columns] = self.dims;
        let n_panels = match self.values {
            Floats::F32(_) => 1,
            _ => (rows * columns)
                .div_ceil(PANEL)
                .min(columns / COLUMNS)
                .max(1),
        };
        (0..n_panels).map(move |panel| columns * panel / n_panels..columns * (panel + 1) / n_panels)
    }

    /// Some columns in `f32`: in place, or as a copy in `buffer` that lies in the same order.
    pub(crate) fn panel(&self, columns: Range<usize>, buffer: &mut Vec<f32>) -> Matrix {
        let (n, stride) = (columns.len(), self.stride);
        if let Floats::F32(values) = self.values {
            let at = columns.start * if self.by_columns { stride } else { 1 };
            return self.matrix(values[at.min(values.len())..].as_ptr(), stride);
        }
        let [rows, _] = self.dims;
        buffer.resize(rows * n, 0.0);
        let width = if self.by_columns { rows } else { n };
        let parts = buffer.par_chunks_exact_mut(width.max(1)).enumerate();
        // A task has enough lines to be worth a thread.
        parts
            .with_min_len((TASK / 8).div_ceil(width.max(1)))
            .for_each(|(line, to)| match self.by_columns {
                true => self.values.widen((columns.start + line) * stride, to),
                false => self.values.widen(line * stride + columns.start, to),
            });
        self.matrix(buffer.as_ptr(), width)
    }

    fn matrix(&self, data: *const f32, stride: usize) -> Matrix {
        match self.by_columns {
            true => Matrix::new(data, 1, stride),
            false => Matrix::new(data, stride, 1),
        }
    }
}

/// Whether the columns of a matrix are contiguous, otherwise its rows, and the distance of one to the
/// next; `None` if neither are.
fn lines(t: &FlexTensor) -> Option<(bool, usize)> {
    let [rows, columns] = t.shape().dims();
    let strides = t.layout().strides();
    let distance = |stride: isize, width: usize| {
        let stride = usize::try_from(stride).ok()?;
        (stride >= width).then_some(stride)
    };
    if strides[1] == 1
        && let Some(stride) = distance(strides[0], columns)
    {
        return Some((false, stride));
    }
    if strides[0] == 1 {
        return Some((true, distance(strides[1], rows)?));
    }
    None
}

/// The matrix with contiguous rows or columns, copied in its dtype if neither are.
pub(crate) fn at_rest(t: FlexTensor) -> FlexTensor {
    match lines(&t) {
        Some(_) => t,
        None => t.to_contiguous(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All values of 16 bits, against the crate `half`.
    #[test]
    fn conversions_are_those_of_half() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let of_bf16: Vec<bf16> = all.iter().map(|&bits| bf16::from_bits(bits)).collect();
        let of_f16: Vec<f16> = all.iter().map(|&bits| f16::from_bits(bits)).collect();
        let n = all.len();
        let same = |found: &[f32], expected: &mut dyn Iterator<Item = f32>| {
            for (found, expected) in found.iter().zip(expected) {
                let is_same = found.to_bits() == expected.to_bits();
                assert!(is_same || found.is_nan() && expected.is_nan());
            }
        };
        let found = Floats::Bf16(&of_bf16).to_f32(n);
        same(&found, &mut of_bf16.iter().map(|value| value.to_f32()));
        let found = Floats::F16(&of_f16).to_f32(n);
        same(&found, &mut of_f16.iter().map(|value| value.to_f32()));
    }

    #[test]
    fn values_are_rounded_to_nearest_and_to_even() {
        let high = 0..=u32::from(u16::MAX);
        // Each value of bf16, what lies between it and the next, and next to the ties.
        let bits = high
            .flat_map(|high| [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| high << 16 | low));
        let values: Vec<f32> = bits.map(f32::from_bits).collect();
        let bytes = round(&values, DType::BF16);
        let (found, _) = bytes.as_chunks::<2>();
        for (value, found) in values.iter().zip(found) {
            let found = bf16::from_le_bytes(*found);
            let expected = bf16::from_f32(*value);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && value.is_nan());
        }
        let bytes = round(&values, DType::F16);
        let (found, _) = bytes.as_chunks::<2>();
        for (value, found) in values.iter().zip(found) {
            let found = f16::from_le_bytes(*found);
            let expected = f16::from_f32(*value);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && value.is_nan());
        }
    }
}
