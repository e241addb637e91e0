//! The kernels of a packed weight.
//!
//! A cube owns the columns of one tile of words. Its units form rows of [`TILE`] columns, several
//! columns to a unit, so that neighboring units read neighboring words, scales and results in loads of
//! 16 bytes. A unit takes whole [`Run`]s of codes and shifts them out of its words.

use cubecl::prelude::*;

use crate::cube::UNITS;
use crate::layout::{Layout, TILE};

/// The codes between two boundaries of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Run {
    bits: u32,
    words: usize,
    pub(super) codes: usize,
    /// Whether every run lies in one group, as in most weights: the group is not checked at each code.
    in_group: bool,
}

impl Run {
    pub(super) fn new(layout: &Layout) -> Self {
        let words = if layout.bits() == 3 { 3 } else { 1 };
        let codes = 32 * words / layout.bits();
        let divides = |n: usize| n.is_multiple_of(codes);
        Self {
            bits: layout.bits() as u32,
            words,
            codes,
            in_group: divides(layout.d_in()) && divides(layout.group_size().min(layout.d_in())),
        }
    }
}

/// The sizes of a packed weight; columns are counted in vectors.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
pub(super) struct Sizes {
    d_in: usize,
    columns: usize,
    word_rows: usize,
    group_size: usize,
    /// The number subtracted from the float 2^23 with a code as its lowest bits to get the level.
    bias: f32,
}

/// The bits of the float 2^23, whose lowest bit counts ones.
const ONES: u32 = 0x4B00_0000;

/// The words of a run in the columns of a unit; the last run of a column may be incomplete.
#[cube]
fn words_of_run<C: Size>(
    words: &[Vector<u32, C>],
    column: usize,
    run: usize,
    sizes: &Sizes,
    #[comptime] of: Run,
) -> Array<Vector<u32, C>> {
    let width = C::value();
    let lanes = comptime![TILE / width];
    let tile = column / lanes;
    let lane = column % lanes;
    let mut out = Array::<Vector<u32, C>>::new(of.words);
    #[unroll]
    for k in 0..of.words {
        let row = run * of.words + k;
        let row = select(row < sizes.word_rows, row, sizes.word_rows - 1);
        out[k] = words[(tile * sizes.word_rows + row) * lanes + lane];
    }
    out
}

/// Shifts the next codes of a run out of its words.
#[cube]
fn next_codes<C: Size>(words: &mut Array<Vector<u32, C>>, #[comptime] of: Run) -> Vector<u32, C> {
    let codes = words[0] & Vector::new(comptime![(1u32 << of.bits) - 1]);
    #[unroll]
    for k in 0..of.words {
        let mut rest = words[k] >> Vector::new(of.bits);
        if comptime![k + 1 < of.words] {
            rest |= words[comptime![k + 1]] << Vector::new(comptime![32 - of.bits]);
        }
        words[k] = rest;
    }
    codes
}

/// The levels of codes.
#[cube]
fn levels<C: Size>(
    codes: Vector<u32, C>,
    table: ComptimeOption<&[f32]>,
    sizes: &Sizes,
) -> Vector<f32, C> {
    #[comptime]
    match table {
        ComptimeOption::Some(table) => {
            let mut levels = Vector::<f32, C>::empty();
            #[unroll]
            for lane in 0..C::value() {
                levels.insert(lane, table[codes.extract(lane) as usize]);
            }
            levels
        }
        // A conversion of integers has a fraction of the throughput of these two operations.
        ComptimeOption::None => {
            Vector::<f32, C>::reinterpret(codes | Vector::new(ONES)) - Vector::new(sizes.bias)
        }
    }
}

/// The scales or zeros of a group; 0 if there are none.
#[cube]
fn of_group<F: Float, C: Size>(
    values: ComptimeOption<&[Vector<F, C>]>,
    group: usize,
    column: usize,
    sizes: &Sizes,
) -> Vector<f32, C> {
    #[comptime]
    match values {
        ComptimeOption::Some(values) => {
            Vector::<f32, C>::cast_from(values[group * sizes.columns + column])
        }
        ComptimeOption::None => Vector::<f32, C>::new(0.0),
    }
}

/// Writes the dense weight, `[d_in, d_out]`; a unit writes a run of inputs.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn unpack_kernel<F: Float, O: Float, C: Size>(
    words: &[Vector<u32, C>],
    scales: &[Vector<F, C>],
    zeros: ComptimeOption<&[Vector<F, C>]>,
    table: ComptimeOption<&[f32]>,
    weight: &mut [Vector<O, C>],
    sizes: Sizes,
    #[comptime] of: Run,
    #[define(F, O)] _dtypes: [ElemType; 2],
) {
    let column = (CUBE_POS_Y * CUBE_DIM_X + UNIT_POS_X) as usize;
    let run = (CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y) as usize;
    let first = run * of.codes;
    if column >= sizes.columns || first >= sizes.d_in {
        terminate!();
    }
    let mut words = words_of_run::<C>(words, column, run, &sizes, of);
    let mut group = first / sizes.group_size;
    let mut end = (group + 1) * sizes.group_size;
    let mut scale = Vector::<f32, C>::cast_from(scales[group * sizes.columns + column]);
    let mut zero = of_group::<F, C>(zeros, group, column, &sizes);
    for k in 0..of.codes {
        let i = first + k;
        let level = levels::<C>(next_codes::<C>(&mut words, of), table, &sizes);
        if of.in_group || i < sizes.d_in {
            if !of.in_group && i == end {
                group += 1;
                end += sizes.group_size;
                scale = Vector::cast_from(scales[group * sizes.columns + column]);
                zero = of_group::<F, C>(zeros, group, column, &sizes);
            }
            weight[i * sizes.columns + column] = Vector::cast_from((level - zero) * scale);
        }
    }
}

/// Writes `x · w` over the inputs of each split, `[n_splits, rows, d_out]`, `capacity` rows per cube.
///
/// The units of a column take the runs of a split in turn; their sums are added in shared memory.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn few_rows_kernel<X: Float, F: Float, O: Float, C: Size>(
    x: &[X],
    words: &[Vector<u32, C>],
    scales: &[Vector<F, C>],
    zeros: ComptimeOption<&[Vector<F, C>]>,
    table: ComptimeOption<&[f32]>,
    y: &mut [Vector<O, C>],
    sizes: Sizes,
    rows: usize,
    runs_per_split: usize,
    #[comptime] capacity: usize,
    #[comptime] of: Run,
    #[define(X, F, O)] _dtypes: [ElemType; 3],
) {
    let own = (CUBE_POS_X * CUBE_DIM_X + UNIT_POS_X) as usize;
    // The columns that pad the last tile repeat the last column, and are not written.
    let column = select(own < sizes.columns, own, sizes.columns - 1);
    let split = CUBE_POS_Y as usize;
    let first_row = CUBE_POS_Z as usize * capacity;

    let mut sums = Array::<Vector<f32, C>>::new(capacity);
    #[unroll]
    for row in 0..capacity {
        sums[row] = Vector::new(0.0);
    }
    let n_runs = sizes.d_in.div_ceil(of.codes);
    let last = (split + 1) * runs_per_split;
    let last = select(last < n_runs, last, n_runs);
    let mut run = split * runs_per_split + UNIT_POS_Y as usize;
    while run < last {
        let mut words = words_of_run::<C>(words, column, run, &sizes, of);
        let first = run * of.codes;
        let mut group = first / sizes.group_size;
        let mut end = (group + 1) * sizes.group_size;
        let mut scale = Vector::<f32, C>::cast_from(scales[group * sizes.columns + column]);
        let mut zero = of_group::<F, C>(zeros, group, column, &sizes);
        for k in 0..of.codes {
            let i = first + k;
            let level = levels::<C>(next_codes::<C>(&mut words, of), table, &sizes);
            if of.in_group || i < sizes.d_in {
                if !of.in_group && i == end {
                    group += 1;
                    end += sizes.group_size;
                    scale = Vector::cast_from(scales[group * sizes.columns + column]);
                    zero = of_group::<F, C>(zeros, group, column, &sizes);
                }
                let weight = (level - zero) * scale;
                #[unroll]
                for row in 0..capacity {
                    let row_of_x = first_row + row;
                    let row_of_x = select(row_of_x < rows, row_of_x, rows - 1);
                    let at = row_of_x * sizes.d_in + i;
                    sums[row] = fma(Vector::new(f32::cast_from(x[at])), weight, sums[row]);
                }
            }
        }
        run += CUBE_DIM_Y as usize;
    }

    let mut shared = Shared::<[Vector<f32, C>]>::new_slice(UNITS);
    #[unroll]
    for row in 0..capacity {
        shared[UNIT_POS as usize] = sums[row];
        sync_cube();
        let row = first_row + row;
        if UNIT_POS_Y == 0 && own < sizes.columns && row < rows {
            let total = sum_of_column::<C>(&shared);
            y[(split * rows + row) * sizes.columns + column] = Vector::cast_from(total);
        }
        sync_cube();
    }
}

/// The sum over the units of a column, in a fixed order.
#[cube]
fn sum_of_column<C: Size>(shared: &Shared<[Vector<f32, C>]>) -> Vector<f32, C> {
    let mut total = shared[UNIT_POS_X as usize];
    for k in 1..CUBE_DIM_Y {
        total += shared[(k * CUBE_DIM_X + UNIT_POS_X) as usize];
    }
    total
}

/// Writes the gradients of scales and zeros from `p = xᵀ · dy`; a cube owns a group.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn dgrid_kernel<P: Float, F: Float, C: Size>(
    p: &[Vector<P, C>],
    words: &[Vector<u32, C>],
    scales: &[Vector<F, C>],
    zeros: ComptimeOption<&[Vector<F, C>]>,
    table: ComptimeOption<&[f32]>,
    dscales: &mut [Vector<F, C>],
    dzeros: &mut [Vector<F, C>],
    sizes: Sizes,
    #[comptime] of: Run,
    #[define(P, F)] _dtypes: [ElemType; 2],
) {
    let own = (CUBE_POS_Y * CUBE_DIM_X + UNIT_POS_X) as usize;
    let column = select(own < sizes.columns, own, sizes.columns - 1);
    let group = CUBE_POS_X as usize;
    let start = group * sizes.group_size;
    let end = start + sizes.group_size;
    let end = select(end < sizes.d_in, end, sizes.d_in);

    let zero = of_group::<F, C>(zeros, group, column, &sizes);
    let mut of_levels = Vector::<f32, C>::new(0.0);
    let mut of_products = Vector::<f32, C>::new(0.0);
    // The units of both groups read a run that they share.
    let last = end.div_ceil(of.codes);
    let mut run = start / of.codes + UNIT_POS_Y as usize;
    while run < last {
        let mut words = words_of_run::<C>(words, column, run, &sizes, of);
        for k in 0..of.codes {
            let i = run * of.codes + k;
            let level = levels::<C>(next_codes::<C>(&mut words, of), table, &sizes);
            if of.in_group || (i >= start && i < end) {
                let p = Vector::<f32, C>::cast_from(p[i * sizes.columns + column]);
                of_levels = fma(p, level - zero, of_levels);
                of_products += p;
            }
        }
        run += CUBE_DIM_Y as usize;
    }

    let at = group * sizes.columns + column;
    let writes = UNIT_POS_Y == 0 && own < sizes.columns;
    let mut shared = Shared::<[Vector<f32, C>]>::new_slice(UNITS);
    shared[UNIT_POS as usize] = of_levels;
    sync_cube();
    if writes {
        dscales[at] = Vector::cast_from(sum_of_column::<C>(&shared));
    }
    sync_cube();
    shared[UNIT_POS as usize] = of_products;
    sync_cube();
    if writes {
        let scale = Vector::<f32, C>::cast_from(scales[at]);
        dzeros[at] = Vector::cast_from(-(sum_of_column::<C>(&shared) * scale));
    }
}
