//! The consumer of a product's sums.

use std::arch::x86_64::__m512;
use std::ops::Range;

/// A consumer of the sums of each block, row and column.
///
/// [`Finish::center`] is also called only on processors with AVX-512.
pub(crate) trait Finish {
    /// The constants of 16 columns in a block.
    type Columns: Copy;

    /// The constants of columns `16 * part ..` of the panel in block `block`.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn columns(&self, block: usize, part: usize) -> Self::Columns;

    /// The whole numbers, of magnitude at most 255, that are subtracted from unsigned codes before
    /// their sums are rounded.
    ///
    /// Where the zero of a grid is far from its lowest code, the sums would otherwise cancel.
    fn center(columns: Self::Columns) -> __m512;

    /// Prefetches the constants of block `block`, if there is such a block.
    fn prefetch(&self, _block: usize) {}

    /// Prefetches the results to which the sums of these rows will be added.
    fn prefetch_rows(&self, _rows: Range<usize>) {}

    /// Takes the sums of consecutive rows from `row` on in columns `16 * part ..` of a block.
    ///
    /// `values` are the sums of the values of each row in the block.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn take(
        &mut self,
        row: usize,
        part: usize,
        columns: Self::Columns,
        sums: &[__m512],
        values: &[f32],
    );

    /// Called after all sums of these consecutive rows, at most [`ROWS`](super::blocks::ROWS), were
    /// taken.
    fn rows_done(&mut self, rows: Range<usize>);
}
