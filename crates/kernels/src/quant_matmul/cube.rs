//! CUDA, ROCm, wgpu.
//!
//! A cube owns the columns of one tile of words. Its units lie in rows of [`TILE`] columns, several
//! to a unit, so that neighbours read neighbouring words, scales and results in loads of 16 bytes.
//! In all kernels a unit takes whole [`Run`]s of codes and shifts them out of its words.
//!
//! A product with a few rows is bound by reading the words, and reads them once, with no dense
//! weight in between. With more rows the weight is unpacked for the device's own product, which has
//! its matrix units.

use burn::backend::{DType, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::Shape;
use burn_cubecl::{
    CubeBackend, kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};
use cubecl::prelude::*;

use super::{Packed, QuantOps, Zeros, composed};
use crate::{Layout, Levels, TABLE, TILE};

/// The most rows of `x` for which the words are read without a dense weight in between.
const FEW_ROWS: usize = 16;
/// Rows whose sums a unit keeps. Other cubes have the rest, and read the words from the cache.
const ROWS: usize = 8;
/// Units in a cube, which every device has.
const UNITS: usize = 256;
/// Runs that a unit takes at least before the inputs of a product are split over cubes.
const RUNS: usize = 4;
/// Cubes that fill a large device; more only add partial sums.
const CUBES: usize = 1024;
/// What the dimension of a grid of cubes holds on every device.
const MAX_CUBES: usize = u16::MAX as usize;

/// The codes between one word boundary and the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Run {
    bits: u32,
    words: usize,
    codes: usize,
    /// Whether every run lies in one group, as most weights have it: nothing is asked at each code.
    in_group: bool,
}

impl Run {
    fn new(layout: &Layout) -> Self {
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

/// The sizes of a packed weight; what counts columns counts vectors of them.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Sizes {
    d_in: usize,
    columns: usize,
    word_rows: usize,
    group_size: usize,
    /// What is subtracted from a code whose bits are the lowest of a float of 2^23.
    bias: f32,
}

/// The float 2^23: its lowest bits count ones.
const ONES: u32 = 0x4B00_0000;

/// The words of a run of codes in the columns of a unit; the last run of a column may be cut short.
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
        // A conversion of integers runs at a fraction of the rate of these two.
        ComptimeOption::None => {
            Vector::<f32, C>::reinterpret(codes | Vector::new(ONES)) - Vector::new(sizes.bias)
        }
    }
}

/// The scales or zeros of a group, zero if there are none.
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

/// The dense weight, `[d_in, d_out]`; a unit writes a run of inputs.
#[cube(launch_unchecked, address_type = "dynamic")]
fn unpack_kernel<F: Float, C: Size>(
    words: &[Vector<u32, C>],
    scales: &[Vector<F, C>],
    zeros: ComptimeOption<&[Vector<F, C>]>,
    table: ComptimeOption<&[f32]>,
    weight: &mut [Vector<F, C>],
    sizes: Sizes,
    #[comptime] of: Run,
    #[define(F)] _dtype: ElemType,
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

/// `x · w` over the inputs of one split, `[n_splits, rows, d_out]`, with `capacity` rows to a cube.
///
/// The units of a column take the runs of a split in turn; their sums meet in shared memory.
#[cube(launch_unchecked, address_type = "dynamic")]
fn few_rows_kernel<F: Float, O: Float, C: Size>(
    x: &[F],
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
    #[define(F, O)] _dtypes: [ElemType; 2],
) {
    let own = (CUBE_POS_X * CUBE_DIM_X + UNIT_POS_X) as usize;
    // The columns that pad the last tile repeat the last one, and are not written.
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

/// The sum over the units of a column, always in the same order.
#[cube]
fn sum_of_column<C: Size>(shared: &Shared<[Vector<f32, C>]>) -> Vector<f32, C> {
    let mut total = shared[UNIT_POS_X as usize];
    for k in 1..CUBE_DIM_Y {
        total += shared[(k * CUBE_DIM_X + UNIT_POS_X) as usize];
    }
    total
}

/// The sum of `n_splits` partial results.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_splits_kernel<O: Float>(
    splits: &[f32],
    y: &mut [O],
    n_splits: usize,
    #[define(O)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= y.len() {
        terminate!();
    }
    let mut total = splits[at];
    for k in 1..n_splits {
        total += splits[k * y.len() + at];
    }
    y[at] = O::cast_from(total);
}

/// The gradients of scales and zeros from `p = xᵀ · dy`; a cube owns a group.
#[cube(launch_unchecked, address_type = "dynamic")]
fn dgrid_kernel<F: Float, C: Size>(
    p: &[Vector<F, C>],
    words: &[Vector<u32, C>],
    scales: &[Vector<F, C>],
    zeros: ComptimeOption<&[Vector<F, C>]>,
    table: ComptimeOption<&[f32]>,
    dscales: &mut [Vector<F, C>],
    dzeros: &mut [Vector<F, C>],
    sizes: Sizes,
    #[comptime] of: Run,
    #[define(F)] _dtype: ElemType,
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
    // A run that two groups share is read by both.
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

/// A packed weight as the kernels take it.
struct Native {
    words: CubeTensor,
    scales: CubeTensor,
    zeros: Option<CubeTensor>,
    table: Option<CubeTensor>,
    layout: Layout,
    /// Columns of a unit.
    width: usize,
}

impl Native {
    /// None if the composed operations must do: dtypes that the kernels do not compute in, `others`
    /// too, or more groups or columns than a grid of cubes holds.
    fn new(w: &Packed<CubeBackend>, others: &[&CubeTensor]) -> Option<Self> {
        let dtype = w.scales.dtype;
        let zeros = match &w.zeros {
            Zeros::Each(zeros) => Some(zeros),
            Zeros::Absent => None,
        };
        let layout = w.layout;
        let runs_of_cube = (UNITS / TILE) * Run::new(&layout).codes;
        let largest = [
            layout.n_tiles(),
            layout.n_groups(),
            layout.d_in().div_ceil(runs_of_cube),
        ];
        let fits = matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
            && w.words.dtype == DType::U32
            && zeros.is_none_or(|zeros| zeros.dtype == dtype)
            && others.iter().all(|other| other.dtype == dtype)
            && largest.into_iter().all(|n| n <= MAX_CUBES);
        if !fits {
            return None;
        }
        let table = match layout.levels() {
            Levels::Table(table) => {
                let (client, device) = (w.scales.client.clone(), w.scales.device.clone());
                let bytes = client.create_from_slice(f32::as_bytes(&table));
                let shape = Shape::new([TABLE]);
                Some(CubeTensor::new_contiguous(
                    client,
                    device,
                    shape,
                    bytes,
                    DType::F32,
                ))
            }
            Levels::Unsigned | Levels::Centered => None,
        };
        Some(Self {
            words: into_contiguous(w.words.clone()),
            scales: into_contiguous(w.scales.clone()),
            zeros: zeros.map(|zeros| into_contiguous(zeros.clone())),
            table,
            layout,
            width: if layout.d_out().is_multiple_of(4) {
                4
            } else {
                1
            },
        })
    }

    fn run(&self) -> Run {
        Run::new(&self.layout)
    }

    fn dtype(&self) -> DType {
        self.scales.dtype
    }

    /// Units that share the columns of a tile: no more than there are runs for them.
    fn cube_dim(&self, n_runs: usize) -> CubeDim {
        let lanes = TILE / self.width;
        let units = (UNITS / lanes).min(n_runs.next_power_of_two());
        CubeDim::new_2d(lanes as u32, units as u32)
    }

    fn sizes(&self) -> SizesLaunch {
        let layout = &self.layout;
        SizesLaunch::new(
            layout.d_in(),
            layout.d_out() / self.width,
            layout.word_rows(),
            layout.group_size().min(layout.d_in()),
            (1 << 23) as f32 + layout.center(),
        )
    }

    fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
        let (client, device) = (self.scales.client.clone(), self.scales.device.clone());
        empty_device_contiguous_dtype(client, device, shape.into(), dtype)
    }

    fn address_type(&self, others: &[&CubeTensor]) -> AddressType {
        let tensors = [&self.words, &self.scales];
        let types = tensors.iter().chain(others);
        let types = types.map(|t| t.required_address_type());
        types.max().unwrap_or_default()
    }

    /// See [`QuantOps::quant_unpack`].
    fn unpack(self) -> CubeTensor {
        let layout = self.layout;
        let weight = self.empty([layout.d_in(), layout.d_out()], self.dtype());
        let n_runs = layout.d_in().div_ceil(self.run().codes);
        let dim = self.cube_dim(n_runs);
        let n_cubes = n_runs.div_ceil(dim.y as usize) as u32;
        // SAFETY: the kernel compares the input and the column of what it reads and writes with the
        // sizes, which are those of the tensors.
        unsafe {
            unpack_kernel::launch_unchecked(
                &weight.client,
                CubeCount::Static(n_cubes, layout.n_tiles() as u32, 1),
                dim,
                self.address_type(&[&weight]),
                self.width,
                self.words.clone().into_buffer_arg(),
                self.scales.clone().into_buffer_arg(),
                buffer(&self.zeros).into(),
                buffer(&self.table).into(),
                weight.clone().into_buffer_arg(),
                self.sizes(),
                self.run(),
                elem(self.dtype()),
            );
        }
        weight
    }

    /// See [`QuantOps::quant_matmul`]; `x` has at least one row and at most [`FEW_ROWS`].
    fn few_rows(self, x: CubeTensor) -> CubeTensor {
        let layout = self.layout;
        let rows = x.meta.shape()[0];
        let n_runs = layout.d_in().div_ceil(self.run().codes);
        let dim = self.cube_dim(n_runs);
        let n_splits = n_runs.div_ceil(RUNS * dim.y as usize);
        let n_splits = n_splits.min((CUBES / layout.n_tiles()).max(1));
        let runs_per_split = n_runs.div_ceil(n_splits);
        let n_splits = n_runs.div_ceil(runs_per_split);

        let sums = if n_splits == 1 {
            self.dtype()
        } else {
            DType::F32
        };
        let splits = self.empty([n_splits * rows, layout.d_out()], sums);
        let capacity = rows.next_power_of_two().min(ROWS);
        let n_cubes = [layout.n_tiles(), n_splits, rows.div_ceil(capacity)].map(|n| n as u32);
        // SAFETY: as above; the row of `x` is within `rows`, and a cube has at most `UNITS` units.
        unsafe {
            few_rows_kernel::launch_unchecked(
                &x.client,
                CubeCount::Static(n_cubes[0], n_cubes[1], n_cubes[2]),
                dim,
                self.address_type(&[&x, &splits]),
                self.width,
                x.clone().into_buffer_arg(),
                self.words.clone().into_buffer_arg(),
                self.scales.clone().into_buffer_arg(),
                buffer(&self.zeros).into(),
                buffer(&self.table).into(),
                splits.clone().into_buffer_arg(),
                self.sizes(),
                rows,
                runs_per_split,
                capacity,
                self.run(),
                [elem(self.dtype()), elem(sums)],
            );
        }
        if n_splits == 1 {
            return splits;
        }
        let y = self.empty([rows, layout.d_out()], self.dtype());
        let n = rows * layout.d_out();
        // SAFETY: the kernel compares its position with the length of `y`, and `splits` is
        // `n_splits` times as long.
        unsafe {
            sum_splits_kernel::launch_unchecked(
                &y.client,
                CubeCount::Static(n.div_ceil(UNITS) as u32, 1, 1),
                CubeDim::new_1d(UNITS as u32),
                self.address_type(&[&splits]),
                splits.into_buffer_arg(),
                y.clone().into_buffer_arg(),
                n_splits,
                elem(self.dtype()),
            );
        }
        y
    }

    /// See [`QuantOps::quant_matmul_dgrid`]; `p` is `xᵀ · dy`, `[d_in, d_out]`.
    fn dgrid(self, p: CubeTensor) -> (CubeTensor, CubeTensor) {
        let layout = self.layout;
        let grid = || self.empty(layout.grid_shape(), self.dtype());
        let (dscales, dzeros) = (grid(), grid());
        // A group that is not aligned touches one run more.
        let n_runs = layout.group_size().min(layout.d_in()) / self.run().codes + 1;
        // SAFETY: as above; the group is within the number of them, which is that of the cubes.
        unsafe {
            dgrid_kernel::launch_unchecked(
                &p.client,
                CubeCount::Static(layout.n_groups() as u32, layout.n_tiles() as u32, 1),
                self.cube_dim(n_runs),
                self.address_type(&[&p]),
                self.width,
                p.clone().into_buffer_arg(),
                self.words.clone().into_buffer_arg(),
                self.scales.clone().into_buffer_arg(),
                buffer(&self.zeros).into(),
                buffer(&self.table).into(),
                dscales.clone().into_buffer_arg(),
                dzeros.clone().into_buffer_arg(),
                self.sizes(),
                self.run(),
                elem(self.dtype()),
            );
        }
        (dscales, dzeros)
    }
}

fn buffer(tensor: &Option<CubeTensor>) -> Option<BufferArg> {
    Some(tensor.clone()?.into_buffer_arg())
}

fn elem(dtype: DType) -> ElemType {
    burn::backend::cubecl::dtype_to_elem_type(dtype)
}

impl QuantOps for CubeBackend {
    fn quant_unpack(w: Packed<Self>) -> FloatTensor<Self> {
        match Native::new(&w, &[]) {
            Some(native) => native.unpack(),
            None => composed::unpack(w),
        }
    }

    fn quant_matmul(x: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        if (1..=FEW_ROWS).contains(&x.shape()[0])
            && let Some(native) = Native::new(&w, &[&x])
        {
            return native.few_rows(into_contiguous(x));
        }
        Self::float_matmul(x, Self::quant_unpack(w))
    }

    fn quant_matmul_dgrid(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: Packed<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match Native::new(&w, &[&dy, &x]) {
            Some(native) => {
                let p = Self::float_matmul(Self::float_transpose(x), dy);
                native.dgrid(into_contiguous(p))
            }
            None => composed::dgrid(dy, x, w),
        }
    }
}
