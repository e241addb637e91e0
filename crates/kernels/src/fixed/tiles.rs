//! Products of all rows with one tile of columns at a time.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::blocks::ROWS;
use super::finish::Finish;
use super::multiply;
use super::panel::Panel;
use super::split::Rows;
use super::unit::Unit;
use crate::layout::TILE;
use crate::shared::Shared;

/// Multiplies the rows by each tile of columns, on all threads.
///
/// `fill` writes the panel of a tile for a range of values, and `finish` makes the consumer of the sums
/// of a tile.
pub(crate) fn each_tile<F: Finish>(
    (unit, rows): (Unit, &Rows),
    n_tiles: usize,
    fill: impl Fn(&mut Panel, usize, Range<usize>) + Sync,
    finish: impl Fn(usize) -> F + Sync,
) {
    for (strips, slab) in rows.slabs() {
        (0..n_tiles)
            .into_par_iter()
            .for_each_init(Panel::default, |panel, tile| {
                let mut finish = finish(tile);
                for blocks in rows.panels(slab.clone()) {
                    fill(panel, tile, rows.values(blocks.clone()));
                    multiply(unit, rows, (strips.clone(), blocks), panel, &mut finish);
                }
            });
    }
}

/// At most [`TILE`] columns of a matrix with rows `stride` values apart.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    first: usize,
    n: usize,
    stride: usize,
}

impl Columns {
    /// The columns from `first` on of a matrix with `stride` columns.
    pub(crate) fn new(first: usize, stride: usize) -> Self {
        Self::of(first, stride, stride)
    }

    /// The columns from `first` on of a matrix with `n` columns and rows `stride` values apart.
    pub(crate) fn of(first: usize, n: usize, stride: usize) -> Self {
        let n = (n - first).min(TILE);
        Self { first, n, stride }
    }

    /// The index of column `16 * part` of a row, and the mask of the 16 columns that exist.
    #[inline(always)]
    pub(crate) fn part(&self, row: usize, part: usize) -> (usize, __mmask16) {
        let n = self.n.saturating_sub(part * 16).min(16);
        let at = row * self.stride + self.first + part * 16;
        (at, ((1u32 << n) - 1) as __mmask16)
    }

    /// Columns `16 * part ..` of a row of `matrix`; 0 for columns that do not exist.
    ///
    /// # Safety
    /// The processor has AVX-512, and the row lies within `matrix`.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, matrix: &[f32], row: usize, part: usize) -> __m512 {
        let (at, mask) = self.part(row, part);
        // SAFETY: the caller's promise; the columns in the mask lie within the row.
        unsafe { _mm512_maskz_loadu_ps(mask, matrix.as_ptr().wrapping_add(at)) }
    }
}

/// Accumulates the sums of up to [`ROWS`] rows in a tile of columns, and adds them to the result.
pub(crate) struct Sums<'a> {
    rows: Box<[f32; ROWS * TILE]>,
    columns: Columns,
    out: &'a Shared,
}

impl<'a> Sums<'a> {
    /// # Safety
    /// `out` is a matrix with rows `columns.stride` values apart that has all rows of the product, and
    /// nothing else uses these columns.
    pub(crate) unsafe fn new(columns: Columns, out: &'a Shared) -> Self {
        Self {
            rows: Box::new([0.0; ROWS * TILE]),
            columns,
            out,
        }
    }

    /// Adds `value` to the sums of columns `16 * part ..` of a row.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn add(&mut self, row: usize, part: usize, value: __m512) {
        let sums = &mut self.rows[row % ROWS * TILE + part * 16..][..16];
        // SAFETY: the caller's promise; 16 sums.
        unsafe {
            let sum = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), value);
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }

    /// Adds `a b` to the sums of columns `16 * part ..` of a row.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    pub(crate) unsafe fn add_product(&mut self, row: usize, part: usize, a: __m512, b: __m512) {
        let sums = &mut self.rows[row % ROWS * TILE + part * 16..][..16];
        // SAFETY: the caller's promise; 16 sums.
        unsafe {
            let sum = _mm512_fmadd_ps(a, b, _mm512_loadu_ps(sums.as_ptr()));
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }
}

impl Finish for Sums<'_> {
    type Columns = ();

    /// # Safety
    /// None is needed.
    unsafe fn columns(&self, _: usize, _: usize) {}

    fn center((): ()) -> __m512 {
        unreachable!("nothing is subtracted from limbs")
    }

    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, part: usize, (): (), sums: &[__m512], _: &[f32]) {
        for (row, sums) in (row..).zip(sums) {
            // SAFETY: the caller's promise.
            unsafe { self.add(row, part, *sums) }
        }
    }

    fn prefetch_rows(&self, rows: Range<usize>) {
        for row in rows {
            let at = row * self.columns.stride + self.columns.first;
            for line in (0..self.columns.n).step_by(16) {
                // SAFETY: the columns of the row lie within the result; nothing is read.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.out.offset(at + line).cast()) };
            }
        }
    }

    /// Adds the sums to the result.
    fn rows_done(&mut self, rows: Range<usize>) {
        let n = self.columns.n;
        for row in rows {
            let sums = &mut self.rows[row % ROWS * TILE..][..TILE];
            let at = row * self.columns.stride + self.columns.first;
            // SAFETY: the promise of `new`.
            let out = unsafe { self.out.slice(at, n) };
            for (out, sum) in out.iter_mut().zip(sums.iter()) {
                *out += sum;
            }
            sums.fill(0.0);
        }
    }
}
