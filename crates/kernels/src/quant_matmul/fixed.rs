//! The CPU's products on integer units, for processors that have them.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::Precision;
use super::flex::Host;
use super::simd;
use crate::dense::Shared;
use crate::fixed::{self, BLOCK, Blocks, FEW, Finish, Limbs, Panel, ROWS, Rows, Source, Unit};
use crate::memory::zeroed;
use crate::{Levels, TILE};

/// Inputs for which the rows of `dy` are split once.
const UNIT: usize = 256;

impl From<Precision> for Limbs {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Full => Limbs::Three,
            Precision::Fast => Limbs::Two,
        }
    }
}

/// `x · w`, `[rows, d_out]`. None if floats do better.
pub(super) fn product(x: &[f32], n_rows: usize, w: &Host) -> Option<Vec<f32>> {
    let unit = Unit::get().filter(|_| n_rows > 0)?;
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    let limbs = w.precision.into();
    let source = Source {
        x,
        stride: d_in,
        columns: None,
    };
    let mut y = zeroed(n_rows * d_out);
    let out = Shared::new(&mut y);
    if let Some(blocks) = codes(w) {
        let rows = Rows::split(source, n_rows, blocks, limbs);
        let groups = groups(&blocks, w);
        let finish = |tile| {
            let columns = Columns::new(tile * TILE, d_out);
            let grid = Grid {
                w,
                rows: &rows,
                columns,
                groups: &groups,
            };
            // SAFETY: `y` is `[rows, d_out]`, and a tile is one task's.
            let sums = unsafe { Sums::new(columns, &out) };
            Forward { grid, sums }
        };
        let (bits, n_tiles) = (w.layout.bits(), w.layout.n_tiles());
        if fixed::streams(&rows, bits, w.layout.word_rows()) {
            (0..n_tiles)
                .into_par_iter()
                .for_each(|tile| fixed::stream(&rows, bits, w.tile(tile), &mut finish(tile)));
        } else {
            let fill = |panel: &mut Panel, tile, inputs| {
                panel.codes(&w.layout, w.tile(tile), inputs, &blocks)
            };
            each_tile((unit, &rows), n_tiles, fill, finish);
        }
    } else if unit == Unit::Amx && limbs == Limbs::Two && n_rows > FEW {
        let rows = Rows::split(source, n_rows, Blocks::of(d_in), limbs);
        each_tile(
            (unit, &rows),
            w.layout.n_tiles(),
            |panel, tile, inputs| {
                let fill =
                    |values: &mut [f32]| simd::unpack_panel(w, tile, inputs.clone(), values, TILE);
                panel.split(inputs.len(), fill)
            },
            // SAFETY: as above.
            |tile| unsafe { Sums::new(Columns::new(tile * TILE, d_out), &out) },
        );
    } else {
        return None;
    }
    Some(y)
}

/// `dy · wᵀ`, `[rows, d_in]`. None if floats do better.
///
/// For each group, `dy` is multiplied by the group's scales and then split; the codes stay exact.
pub(super) fn product_dx(dy: &[f32], n_rows: usize, w: &Host) -> Option<Vec<f32>> {
    let unit = Unit::get().filter(|unit| *unit == Unit::Amx && n_rows > FEW)?;
    let (d_in, d_out, size) = (w.layout.d_in(), w.layout.d_out(), w.layout.group_size());
    if codes(w).is_none() || size.min(d_in) < TILE {
        return None;
    }
    let limbs = w.precision.into();
    let mut dx = zeroed(n_rows * d_in);
    let out = Shared::new(&mut dx);
    let units = (0..d_in).step_by(size.min(d_in)).flat_map(|group| {
        let end = d_in.min(group + size.min(d_in));
        (group..end)
            .step_by(UNIT)
            .map(move |first| first..end.min(first + UNIT))
    });
    let units: Vec<Range<usize>> = units.collect();
    let room = || {
        let rows = Rows::room(n_rows, Blocks::of(d_out.min(BLOCK)), limbs);
        (Panel::default(), rows)
    };
    units
        .into_par_iter()
        .for_each_init(room, |(panel, rows), inputs| {
            let grid = |values: &[f32]| values[inputs.start / size * d_out..][..d_out].to_vec();
            let scales = grid(w.scales);
            let mut zeros = w.zeros.map_or_else(|| vec![0.0; d_out], grid);
            // Codes less whole numbers are signed bytes; what the zeros have beside these is left.
            let whole: Vec<u8> = zeros
                .iter_mut()
                .map(|zero| {
                    *zero += w.layout.center();
                    let whole = match w.layout.bits() {
                        8 => 128.0,
                        _ => zero.round_ties_even().clamp(-64.0, 64.0),
                    };
                    *zero -= whole;
                    whole as i16 as u8
                })
                .collect();
            let width = inputs.len();
            let mut part = vec![0.0; n_rows * width];
            let sums = Shared::new(&mut part);
            for first in (0..d_out).step_by(BLOCK) {
                let outputs = first..d_out.min(first + BLOCK);
                let source = Source {
                    x: &dy[first..],
                    stride: d_out,
                    columns: Some([&scales[outputs.clone()], &zeros[outputs.clone()]]),
                };
                rows.refill(source, Blocks::of(outputs.len()));
                for tile in (0..width).step_by(TILE) {
                    let columns = Columns::new(tile, width);
                    let inputs = inputs.start + tile..inputs.end.min(inputs.start + tile + TILE);
                    panel.transposed(outputs.len(), |output, codes| {
                        let tile = (first + output) / TILE;
                        simd::codes(w, tile, inputs.clone(), codes);
                        for codes in codes.iter_mut() {
                            for (code, whole) in codes.iter_mut().zip(&whole[tile * TILE..]) {
                                *code = code.wrapping_sub(*whole);
                            }
                        }
                    });
                    // SAFETY: `part` is `[rows, width]`, and this task's own.
                    let sums = unsafe { Sums::new(columns, &sums) };
                    let mut finish = Uncentered { rows, sums };
                    fixed::multiply(unit, rows, 0..1, panel, &mut finish);
                }
            }
            for (row, part) in part.chunks_exact(width).enumerate() {
                // SAFETY: `dx` is `[rows, d_in]`, and these inputs are one task's.
                let dx = unsafe {
                    std::slice::from_raw_parts_mut(out.offset(row * d_in + inputs.start), width)
                };
                dx.copy_from_slice(part);
            }
        });
    Some(dx)
}

/// The gradients of scales and zeros, `[n_groups, d_out]` each. None if floats do better.
///
/// With `u = Σ x (q - z)` over the inputs of a group, which a forward product makes on its way,
/// `dscales = Σ dy u` over the rows: no product of `x` and `dy` is needed.
pub(super) fn product_dgrid(
    dy: &[f32],
    x: &[f32],
    n_rows: usize,
    w: &Host,
) -> Option<(Vec<f32>, Vec<f32>)> {
    let unit = Unit::get().filter(|_| n_rows > 0)?;
    let blocks = codes(w)?;
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    let limbs = w.precision.into();
    let rows = Rows::split(
        Source {
            x,
            stride: d_in,
            columns: None,
        },
        n_rows,
        blocks,
        limbs,
    );
    let (n_groups, groups) = (w.layout.n_groups(), groups(&blocks, w));
    let tiles: Vec<_> = (0..w.layout.n_tiles())
        .into_par_iter()
        .map_init(Panel::default, |panel, tile| {
            let columns = Columns::new(tile * TILE, d_out);
            let mut finish = Backward {
                grid: Grid {
                    w,
                    rows: &rows,
                    columns,
                    groups: &groups,
                },
                dy,
                dscales: vec![0.0; n_groups * TILE],
                products: vec![0.0; n_groups * TILE],
            };
            for run in rows.slabs() {
                let inputs = rows.values(run.clone());
                panel.codes(&w.layout, w.tile(tile), inputs, &blocks);
                fixed::multiply(unit, &rows, run, panel, &mut finish);
            }
            (finish.dscales, finish.products)
        })
        .collect();
    let n = n_groups * d_out;
    let (mut dscales, mut dzeros) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for g in 0..n_groups {
        for (tile, (of_levels, of_products)) in tiles.iter().enumerate() {
            let n = w.layout.columns(tile).len();
            dscales.extend_from_slice(&of_levels[g * TILE..][..n]);
            dzeros.extend_from_slice(&of_products[g * TILE..][..n]);
        }
    }
    for (dz, s) in dzeros.iter_mut().zip(w.scales) {
        *dz *= -s;
    }
    Some((dscales, dzeros))
}

/// The group of each block.
fn groups(blocks: &Blocks, w: &Host) -> Vec<usize> {
    let group = |block| blocks.range(block).start / w.layout.group_size();
    (0..blocks.n()).map(group).collect()
}

/// How the sums over the inputs are cut if the codes are multiplied as they are.
fn codes(w: &Host) -> Option<Blocks> {
    match w.layout.levels() {
        Levels::Table(_) => None,
        Levels::Unsigned | Levels::Centered => {
            Blocks::of_groups(w.layout.d_in(), w.layout.group_size())
        }
    }
}

/// Multiplies the rows with each tile of columns, whose panels `fill` makes.
fn each_tile<F: Finish>(
    (unit, rows): (Unit, &Rows),
    n_tiles: usize,
    fill: impl Fn(&mut Panel, usize, Range<usize>) + Sync,
    finish: impl Fn(usize) -> F + Sync,
) {
    for slab in rows.slabs() {
        (0..n_tiles)
            .into_par_iter()
            .for_each_init(Panel::default, |panel, tile| {
                let mut finish = finish(tile);
                for blocks in rows.panels(slab.clone()) {
                    fill(panel, tile, rows.values(blocks.clone()));
                    fixed::multiply(unit, rows, blocks, panel, &mut finish);
                }
            });
    }
}

/// At most [`TILE`] columns of a matrix with rows of `stride`.
#[derive(Clone, Copy)]
struct Columns {
    first: usize,
    n: usize,
    stride: usize,
}

impl Columns {
    /// A tile from `first` on, or what there is of it.
    fn new(first: usize, stride: usize) -> Self {
        let n = (stride - first).min(TILE);
        Self { first, n, stride }
    }

    /// Columns `16 * part ..` of a row, and which of them there are.
    #[inline(always)]
    fn part(&self, row: usize, part: usize) -> (usize, __mmask16) {
        let n = self.n.saturating_sub(part * 16).min(16);
        let at = row * self.stride + self.first + part * 16;
        (at, ((1u32 << n) - 1) as __mmask16)
    }

    /// These columns of a row of `matrix`; zero where there are none.
    #[inline(always)]
    unsafe fn read(&self, matrix: &[f32], row: usize, part: usize) -> __m512 {
        let (at, mask) = self.part(row, part);
        // SAFETY: the caller has AVX-512; what the mask has lies in the row.
        unsafe { _mm512_maskz_loadu_ps(mask, matrix.as_ptr().wrapping_add(at)) }
    }
}

/// The sums of some rows in the columns of one tile, on their way to the result.
struct Sums<'a> {
    rows: Box<[f32; ROWS * TILE]>,
    columns: Columns,
    out: &'a Shared,
}

impl<'a> Sums<'a> {
    /// # Safety
    /// `out` is a matrix of `columns.stride` columns, and nobody else writes these.
    unsafe fn new(columns: Columns, out: &'a Shared) -> Self {
        Self {
            rows: Box::new([0.0; ROWS * TILE]),
            columns,
            out,
        }
    }

    #[inline(always)]
    unsafe fn add(&mut self, row: usize, part: usize, value: __m512) {
        let sums = &mut self.rows[row % ROWS * TILE + part * 16..][..16];
        // SAFETY: the caller has AVX-512; 16 sums.
        unsafe {
            let sum = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), value);
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }

    /// Adds the sums of `rows` to the result.
    fn done(&mut self, rows: Range<usize>) {
        let n = self.columns.n;
        for row in rows {
            let sums = &mut self.rows[row % ROWS * TILE..][..TILE];
            // SAFETY: the promise of `new`.
            let out = unsafe {
                let out = self
                    .out
                    .offset(row * self.columns.stride + self.columns.first);
                std::slice::from_raw_parts_mut(out, n)
            };
            for (out, sum) in out.iter_mut().zip(sums.iter()) {
                *out += sum;
            }
            sums.fill(0.0);
        }
    }
}

impl Finish for Sums<'_> {
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, _: usize, part: usize, sums: __m512) {
        // SAFETY: the caller's promise.
        unsafe { self.add(row, part, sums) }
    }

    fn rows_done(&mut self, rows: Range<usize>) {
        self.done(rows);
    }
}

/// The sums without what the zeros take from them.
struct Uncentered<'a> {
    rows: &'a Rows,
    sums: Sums<'a>,
}

impl Finish for Uncentered<'_> {
    #[inline(always)]
    unsafe fn take(&mut self, row: usize, block: usize, part: usize, sums: __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let zeros = _mm512_set1_ps(self.rows.sum(row, block));
            self.sums.add(row, part, _mm512_sub_ps(sums, zeros));
        }
    }

    fn rows_done(&mut self, rows: Range<usize>) {
        self.sums.done(rows);
    }
}

/// `y = s (u - z Σ x)` for each group.
struct Forward<'a> {
    grid: Grid<'a>,
    sums: Sums<'a>,
}

/// The grid of a weight in the columns of one tile.
struct Grid<'a> {
    w: &'a Host<'a>,
    rows: &'a Rows,
    columns: Columns,
    /// The group of each block.
    groups: &'a [usize],
}

impl Grid<'_> {
    /// The zeros as codes, and the nearest whole numbers.
    #[inline(always)]
    unsafe fn zeros(&self, block: usize, part: usize) -> (__m512, __m512) {
        // SAFETY: the caller has AVX-512.
        unsafe {
            let center = _mm512_set1_ps(self.w.layout.center());
            let Some(zeros) = self.w.zeros else {
                return (center, center);
            };
            let zeros = self.columns.read(zeros, self.groups[block], part);
            let zeros = _mm512_add_ps(zeros, center);
            let whole = _mm512_roundscale_ps::<0>(zeros);
            let most = _mm512_set1_ps(255.0);
            let least = _mm512_sub_ps(_mm512_setzero_ps(), most);
            (zeros, _mm512_max_ps(least, _mm512_min_ps(most, whole)))
        }
    }

    /// `Σ x (level - zero)` from `Σ x (code - whole)`.
    #[inline(always)]
    unsafe fn centered(&self, row: usize, block: usize, part: usize, sums: __m512) -> __m512 {
        if self.w.zeros.is_none() {
            return sums;
        }
        // SAFETY: the caller has AVX-512.
        unsafe {
            let (zeros, whole) = self.zeros(block, part);
            let x = _mm512_set1_ps(self.rows.sum(row, block));
            _mm512_sub_ps(sums, _mm512_mul_ps(_mm512_sub_ps(zeros, whole), x))
        }
    }
}

impl Finish for Forward<'_> {
    fn prefetch(&self, block: usize) {
        let grid = &self.grid;
        let Some(&group) = grid.groups.get(block) else {
            return;
        };
        for matrix in [Some(grid.w.scales), grid.w.zeros].into_iter().flatten() {
            for part in 0..TILE / 16 {
                let (at, _) = grid.columns.part(group, part);
                // SAFETY: nothing is read.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(matrix.as_ptr().wrapping_add(at).cast()) };
            }
        }
    }

    #[inline(always)]
    unsafe fn center(&self, block: usize, part: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { self.grid.zeros(block, part).1 }
    }

    #[inline(always)]
    unsafe fn take(&mut self, row: usize, block: usize, part: usize, sums: __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let grid = &self.grid;
            let u = grid.centered(row, block, part, sums);
            let scales = grid.columns.read(grid.w.scales, grid.groups[block], part);
            self.sums.add(row, part, _mm512_mul_ps(scales, u));
        }
    }

    fn rows_done(&mut self, rows: Range<usize>) {
        self.sums.done(rows);
    }
}

/// `dscales = Σ dy u` and `Σ dy Σ x` for each group.
struct Backward<'a> {
    grid: Grid<'a>,
    dy: &'a [f32],
    /// `[n_groups, TILE]` each.
    dscales: Vec<f32>,
    products: Vec<f32>,
}

impl Finish for Backward<'_> {
    #[inline(always)]
    unsafe fn center(&self, block: usize, part: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { self.grid.zeros(block, part).1 }
    }

    #[inline(always)]
    unsafe fn take(&mut self, row: usize, block: usize, part: usize, sums: __m512) {
        // SAFETY: the caller's promise; both have 16 values there.
        unsafe {
            let grid = &self.grid;
            let u = grid.centered(row, block, part, sums);
            let dy = grid.columns.read(self.dy, row, part);
            let at = grid.groups[block] * TILE + part * 16;
            let add = |sums: &mut [f32], value| {
                let sums = &mut sums[at..at + 16];
                let sum = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), value);
                _mm512_storeu_ps(sums.as_mut_ptr(), sum);
            };
            add(&mut self.dscales, _mm512_mul_ps(dy, u));
            let x = _mm512_set1_ps(grid.rows.sum(row, block));
            add(&mut self.products, _mm512_mul_ps(dy, x));
        }
    }

    fn rows_done(&mut self, _: Range<usize>) {}
}
