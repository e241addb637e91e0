//! Products with a packed weight on the integer units of the processor.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::host::Host;
use super::packed::Precision;
use super::simd;
use crate::fixed::tiles::{Columns, Sums, each_tile};
use crate::fixed::{self, Blocks, Finish, Limbs, Operand, Panel, Rows, Source, Unit};
use crate::layout::{Levels, TILE};
use crate::memory::zeroed;
use crate::shared::Shared;

impl From<Precision> for Limbs {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Full => Limbs::Three,
            Precision::Fast => Limbs::Two,
        }
    }
}

/// `x · w`, `[rows, d_out]`; `None` if floating point is faster.
pub(super) fn product(x: &[f32], n_rows: usize, w: &Host) -> Option<Vec<f32>> {
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    let limbs = w.precision.into();
    let source = Source { x, stride: d_in };
    let blocks = codes(w);
    let unit = Unit::of(n_rows, blocks.map_or(Operand::Values, operand))?;
    let mut y = zeroed(n_rows * d_out);
    let out = Shared::new(&mut y);
    if let Some(blocks) = blocks {
        let rows = Rows::split(source, n_rows, blocks, limbs);
        let groups = groups(&blocks, w);
        let finish = |tile| {
            let grid = Grid::new(w, tile, &groups);
            // SAFETY: `y` is `[rows, d_out]`, and a tile belongs to one task.
            let sums = unsafe { Sums::new(grid.columns, &out) };
            Forward { grid, sums }
        };
        let (bits, n_tiles) = (w.layout.bits(), w.layout.n_tiles());
        if fixed::streams(&rows, bits, w.layout.word_rows()) {
            (0..n_tiles)
                .into_par_iter()
                .for_each(|tile| fixed::stream(&rows, bits, w.tile(tile), &mut finish(tile)));
        } else {
            let fill = |panel: &mut Panel, tile, inputs| {
                let grid = Grid::new(w, tile, &groups);
                fill_codes(unit, &grid, panel, tile, inputs, &blocks);
            };
            each_tile((unit, &rows), n_tiles, fill, finish);
        }
    } else {
        let rows = Rows::split(source, n_rows, Blocks::of(d_in), limbs);
        let fill = |panel: &mut Panel, tile, inputs: Range<usize>| {
            panel.split(limbs, inputs.len(), |values| {
                simd::unpack_panel(w, tile, inputs, values, TILE)
            })
        };
        // SAFETY: `y` is `[rows, d_out]`, and a tile belongs to one task.
        let finish = |tile| unsafe { Sums::new(Columns::new(tile * TILE, d_out), &out) };
        each_tile((unit, &rows), w.layout.n_tiles(), fill, finish);
    }
    Some(y)
}

/// `dy · wᵀ`, `[rows, d_in]`; `None` if floating point is faster.
pub(super) fn product_dx(dy: &[f32], n_rows: usize, w: &Host) -> Option<Vec<f32>> {
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    let limbs = w.precision.into();
    let unit = Unit::of(n_rows, Operand::Values)?;
    let source = Source {
        x: dy,
        stride: d_out,
    };
    let rows = Rows::split(source, n_rows, Blocks::of(d_out), limbs);
    let mut dx = zeroed(n_rows * d_in);
    let out = Shared::new(&mut dx);
    let fill = |panel: &mut Panel, tile: usize, outputs: Range<usize>| {
        let inputs = tile * TILE..d_in.min((tile + 1) * TILE);
        panel.transposed(limbs, outputs.len(), |values, stride| {
            values[inputs.len() * stride..].fill(0.0);
            for (at, of) in (outputs.start / TILE..outputs.end.div_ceil(TILE)).enumerate() {
                simd::unpack_panel(w, of, inputs.clone(), &mut values[at * TILE..], stride);
            }
        });
    };
    // SAFETY: `dx` is `[rows, d_in]`, and a tile belongs to one task.
    let finish = |tile| unsafe { Sums::new(Columns::new(tile * TILE, d_in), &out) };
    each_tile((unit, &rows), d_in.div_ceil(TILE), fill, finish);
    Some(dx)
}

/// The gradients of scales and zeros, `[n_groups, d_out]` each; `None` if floating point is faster.
///
/// With `u = Σ x (q - z)` over the inputs of a group, which is an intermediate of the forward product,
/// `dscales = Σ dy u` over the rows: no product of `x` and `dy` is needed.
pub(super) fn product_dgrid(
    dy: &[f32],
    x: &[f32],
    n_rows: usize,
    w: &Host,
) -> Option<(Vec<f32>, Vec<f32>)> {
    let blocks = codes(w)?;
    let d_in = w.layout.d_in();
    let limbs = w.precision.into();
    let unit = Unit::of(n_rows, operand(blocks))?;
    let rows = Rows::split(Source { x, stride: d_in }, n_rows, blocks, limbs);
    let (n_groups, groups) = (w.layout.n_groups(), groups(&blocks, w));
    let tiles: Vec<_> = (0..w.layout.n_tiles())
        .into_par_iter()
        .map_init(Panel::default, |panel, tile| {
            let mut finish = Backward {
                grid: Grid::new(w, tile, &groups),
                dy,
                dscales: vec![0.0; n_groups * TILE],
                products: vec![0.0; n_groups * TILE],
            };
            for (strips, slab) in rows.slabs() {
                for blocks in rows.panels(slab) {
                    let inputs = rows.values(blocks.clone());
                    fill_codes(unit, &finish.grid, panel, tile, inputs, &rows.blocks());
                    fixed::multiply(unit, &rows, (strips.clone(), blocks), panel, &mut finish);
                }
            }
            (finish.dscales, finish.products)
        })
        .collect();
    Some(w.grid_gradients(|tile, g| {
        let (dscales, products) = &tiles[tile];
        [dscales, products].map(|sums| &sums[g * TILE..][..TILE])
    }))
}

/// Fills the panel with the codes of `inputs` in a tile of columns.
fn fill_codes(
    unit: Unit,
    grid: &Grid,
    panel: &mut Panel,
    tile: usize,
    inputs: Range<usize>,
    blocks: &Blocks,
) {
    let (w, first) = (grid.w, blocks.at(inputs.start));
    panel.codes(
        unit,
        &w.layout,
        w.tile(tile),
        inputs,
        blocks,
        |block, whole| {
            for (part, whole) in whole.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                // SAFETY: the processor has a unit, and so AVX-512; 16 bytes.
                unsafe {
                    let center = _mm512_cvtps_epi32(grid.part(first + block, part).center);
                    _mm_storeu_si128(whole.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(center));
                }
            }
        },
    );
}

/// The group of each block.
fn groups(blocks: &Blocks, w: &Host) -> Vec<usize> {
    let group = |block| blocks.range(block).start / w.layout.group_size();
    (0..blocks.n()).map(group).collect()
}

/// The blocks of the sums over inputs; `None` if codes cannot be multiplied as integers.
fn codes(w: &Host) -> Option<Blocks> {
    match w.layout.levels() {
        Levels::Table(_) => None,
        Levels::Unsigned | Levels::Centered => {
            Blocks::of_groups(w.layout.d_in(), w.layout.group_size())
        }
    }
}

fn operand(blocks: Blocks) -> Operand {
    Operand::Codes {
        block: blocks.block(),
    }
}

/// Adds `s (u - z Σ x)` of each group to `y`.
struct Forward<'a> {
    grid: Grid<'a>,
    sums: Sums<'a>,
}

/// The scales and zeros of a weight in a tile of columns.
struct Grid<'a> {
    w: &'a Host<'a>,
    columns: Columns,
    /// The group of each block.
    groups: &'a [usize],
}

/// The scales and zeros of a block in 16 columns.
#[derive(Clone, Copy)]
struct Part {
    group: usize,
    scales: __m512,
    /// The whole numbers that are subtracted from codes, so that a small weight is a small integer.
    center: __m512,
    /// The zeros plus the center of the levels, less `center`.
    zeros: __m512,
}

impl<'a> Grid<'a> {
    fn new(w: &'a Host<'a>, tile: usize, groups: &'a [usize]) -> Self {
        let columns = Columns::new(tile * TILE, w.layout.d_out());
        Self { w, columns, groups }
    }

    /// The scales and zeros of columns `16 * part ..` in a block.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn part(&self, block: usize, part: usize) -> Part {
        let group = self.groups[block];
        // SAFETY: the caller's promise; the group is one of the weight's.
        unsafe {
            let zeros = match self.w.zeros {
                None => _mm512_setzero_ps(),
                Some(zeros) => self.columns.read(zeros, group, part),
            };
            // The fraction of a zero keeps its digits: only whole numbers are added to it.
            let nearest = _mm512_roundscale_ps::<0>(zeros);
            let left = _mm512_sub_ps(zeros, nearest);
            let whole = _mm512_add_ps(nearest, _mm512_set1_ps(self.w.layout.center()));
            // Codes of fewer than 8 bits are signed bytes after subtracting up to 64.
            let most = _mm512_set1_ps(if self.w.layout.bits() == 8 {
                255.0
            } else {
                64.0
            });
            let least = _mm512_sub_ps(_mm512_setzero_ps(), most);
            let center = _mm512_max_ps(least, _mm512_min_ps(most, whole));
            Part {
                group,
                scales: self.columns.read(self.w.scales, group, part),
                center,
                zeros: _mm512_add_ps(_mm512_sub_ps(whole, center), left),
            }
        }
    }
}

impl Part {
    /// `Σ x (level - zero)` from `Σ x (code - center)` and `Σ x`.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn centered(&self, sums: __m512, x: f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fnmadd_ps(self.zeros, _mm512_set1_ps(x), sums) }
    }
}

impl Finish for Forward<'_> {
    type Columns = Part;

    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn columns(&self, block: usize, part: usize) -> Part {
        // SAFETY: the caller's promise.
        unsafe { self.grid.part(block, part) }
    }

    #[inline(always)]
    fn center(columns: Part) -> __m512 {
        columns.center
    }

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

    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn take(
        &mut self,
        row: usize,
        part: usize,
        columns: Part,
        sums: &[__m512],
        values: &[f32],
    ) {
        for ((row, sums), x) in (row..).zip(sums).zip(values) {
            // SAFETY: the caller's promise.
            unsafe {
                let u = columns.centered(*sums, *x);
                self.sums.add_product(row, part, columns.scales, u);
            }
        }
    }

    fn prefetch_rows(&self, rows: Range<usize>) {
        self.sums.prefetch_rows(rows);
    }

    fn rows_done(&mut self, rows: Range<usize>) {
        self.sums.rows_done(rows);
    }
}

/// Accumulates `dscales = Σ dy u` and `Σ dy Σ x` of each group.
struct Backward<'a> {
    grid: Grid<'a>,
    dy: &'a [f32],
    /// `[n_groups, TILE]` each.
    dscales: Vec<f32>,
    products: Vec<f32>,
}

impl Finish for Backward<'_> {
    type Columns = Part;

    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn columns(&self, block: usize, part: usize) -> Part {
        // SAFETY: the caller's promise.
        unsafe { self.grid.part(block, part) }
    }

    #[inline(always)]
    fn center(columns: Part) -> __m512 {
        columns.center
    }

    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn take(
        &mut self,
        row: usize,
        part: usize,
        columns: Part,
        sums: &[__m512],
        values: &[f32],
    ) {
        let at = columns.group * TILE + part * 16;
        let dscales = &mut self.dscales[at..at + 16];
        let products = &mut self.products[at..at + 16];
        // SAFETY: the caller's promise; both slices have 16 values.
        unsafe {
            let mut of_levels = _mm512_loadu_ps(dscales.as_ptr());
            let mut of_products = _mm512_loadu_ps(products.as_ptr());
            for ((row, sums), x) in (row..).zip(sums).zip(values) {
                let dy = self.grid.columns.read(self.dy, row, part);
                let u = columns.centered(*sums, *x);
                of_levels = _mm512_fmadd_ps(dy, u, of_levels);
                of_products = _mm512_fmadd_ps(dy, _mm512_set1_ps(*x), of_products);
            }
            _mm512_storeu_ps(dscales.as_mut_ptr(), of_levels);
            _mm512_storeu_ps(products.as_mut_ptr(), of_products);
        }
    }

    fn rows_done(&mut self, _: Range<usize>) {}
}
