//! Products of dense matrices.

use std::ops::Range;

use rayon::prelude::*;

use super::blocks::{Blocks, Limbs};
use super::panel::Panel;
use super::split::{Rows, Source};
use super::tiles::{Columns, Sums, each_tile};
use super::unit::{Operand, Unit};
use crate::layout::TILE;
use crate::matrix::{Matrix, Read};
use crate::shared::Shared;

/// Computes `c = a · b`, or `c += a · b` if `add`, unless floating point is faster.
///
/// Returns whether it did; otherwise `c` is unchanged. See [`crate::dense::product`].
///
/// # Safety
/// `a` and `b` lie within their allocations, which nothing writes.
pub(crate) unsafe fn product(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: &mut [f32],
    c_stride: usize,
    add: bool,
) -> bool {
    /// With fewer terms in a sum, or fewer columns, splitting takes as long as multiplying.
    const LEAST: usize = 64;
    let unit = Unit::of(m, Operand::Values);
    let (Some(unit), Ok(stride)) = (unit, usize::try_from(a.row_stride)) else {
        return false;
    };
    if a.column_stride != 1 || k.min(n) < LEAST || b.row_stride != 1 && b.column_stride != 1 {
        return false;
    }
    assert!(n <= c_stride && (m - 1) * c_stride + n <= c.len());
    if !add {
        let rows = c[..(m - 1) * c_stride + n].par_chunks_mut(c_stride);
        rows.for_each(|row| row[..n].fill(0.0));
    }
    // SAFETY: the caller's promise.
    let x = unsafe { std::slice::from_raw_parts(a.data, (m - 1) * stride + k) };
    let rows = Rows::split(Source { x, stride }, m, Blocks::of(k), Limbs::Three);
    let (out, b) = (Shared::new(c), &Read(b));
    let fill = |panel: &mut Panel, tile: usize, inner: Range<usize>| {
        let b = b.0.at(inner.start, tile * TILE);
        let (k, n) = (inner.len(), TILE.min(n - tile * TILE));
        // SAFETY: the caller's promise; the rows and columns lie within `b`.
        let row = |at: Matrix, n| unsafe { std::slice::from_raw_parts(at.data, n) };
        match b.row_stride {
            1 => panel.transposed(Limbs::Three, k, |values, stride| {
                values.fill(0.0);
                for (column, values) in values.chunks_exact_mut(stride).enumerate().take(n) {
                    values[..k].copy_from_slice(row(b.at(0, column), k));
                }
            }),
            _ => panel.split(Limbs::Three, k, |values| {
                for (i, values) in values.chunks_exact_mut(TILE).enumerate() {
                    values[..n].copy_from_slice(row(b.at(i, 0), n));
                    values[n..].fill(0.0);
                }
            }),
        }
    };
    let finish = |tile: usize| {
        let columns = Columns::of(tile * TILE, n, c_stride);
        // SAFETY: the length of `c` was checked, and a tile belongs to one task.
        unsafe { Sums::new(columns, &out) }
    };
    each_tile((unit, &rows), n.div_ceil(TILE), fill, finish);
    true
}
