//! CUDA, ROCm and wgpu.
//!
//! A product with few rows is bound by the memory bandwidth of the words: a kernel reads them as few times as
//! it can, and makes no dense weight. With more rows, the weight is unpacked for a product of dense matrices, on the
//! matrix units of the device.

use std::sync::{Mutex, PoisonError};

use burn::backend::{DType, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::Shape;
use burn_cubecl::{CubeBackend, CubeDevice, tensor::CubeTensor};
use cubecl::prelude::*;

use super::packed::{Packed, Zeros};
use super::{QuantOps, composed};
use crate::cube::{
    self, MAX_CUBES, UNITS, address_type, buffer, contiguous, elem, is_supported, sum_of_splits,
    width_of_rows,
};
use crate::dtype::cast;
use crate::layout::{Layout, Levels, TABLE, TILE};
use crate::matmul::product;

#[cfg(feature = "cuda")]
mod cuda;
mod kernels;

use kernels::{Run, SizesLaunch, dgrid_kernel, few_rows_kernel, unpack_kernel};

/// The largest number of rows of `x` that are multiplied without a dense weight.
const FEW_ROWS: usize = 16;
/// The number of rows whose sums a unit keeps; other cubes take the rest, and read the words from the
/// device's cache.
const ROWS: usize = 8;
/// The least number of runs for each unit, below which inputs are not split over more cubes.
const RUNS: usize = 4;
/// The number of cubes that fill a large device; more would only add partial sums.
const CUBES: usize = 1024;

/// A packed weight as the arguments of the kernels.
struct Native {
    words: CubeTensor,
    scales: CubeTensor,
    zeros: Option<CubeTensor>,
    table: Option<CubeTensor>,
    layout: Layout,
    /// The number of columns of a unit.
    width: usize,
}

impl Native {
    /// `None` if the kernels do not support a dtype, or there are more groups or columns than a grid of
    /// cubes holds.
    fn new(w: &Packed<CubeBackend>) -> Option<Self> {
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
        let fits = is_supported(dtype)
            && w.words.dtype == DType::U32
            && zeros.is_none_or(|zeros| zeros.dtype == dtype)
            && largest.into_iter().all(|n| n <= MAX_CUBES);
        if !fits {
            return None;
        }
        let table = match layout.levels() {
            Levels::Table(table) => Some(on_device(&table, &w.scales)),
            Levels::Unsigned | Levels::Centered => None,
        };
        Some(Self {
            words: contiguous(w.words.clone()),
            scales: contiguous(w.scales.clone()),
            zeros: zeros.map(|zeros| contiguous(zeros.clone())),
            table,
            layout,
            width: width_of_rows(layout.d_out()),
        })
    }

    fn run(&self) -> Run {
        Run::new(&self.layout)
    }

    /// The dtype of the grid.
    fn dtype(&self) -> DType {
        self.scales.dtype
    }

    /// The shape of a cube: lanes over the columns of a tile, and units that share them, no more than
    /// there are runs.
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
        cube::empty(&self.scales, shape, dtype)
    }

    fn address_type(&self, others: &[&CubeTensor]) -> AddressType {
        address_type(others).max(address_type(&[&self.words, &self.scales]))
    }

    /// The dense weight, `[d_in, d_out]`, in a dtype.
    fn unpack(self, dtype: DType) -> CubeTensor {
        #[cfg(feature = "cuda")]
        if let Some(weight) = cuda::unpack(&self, dtype) {
            return weight;
        }
        let layout = self.layout;
        let weight = self.empty([layout.d_in(), layout.d_out()], dtype);
        let n_runs = layout.d_in().div_ceil(self.run().codes);
        let dim = self.cube_dim(n_runs);
        let n_cubes = n_runs.div_ceil(dim.y as usize) as u32;
        // SAFETY: the kernel checks the inputs and columns that it reads and writes against the
        // sizes, which are those of the tensors.
        unsafe {
            unpack_kernel::launch_unchecked(
                &weight.client,
                CubeCount::Static(n_cubes, layout.n_tiles() as u32, 1),
                dim,
                self.address_type(&[&weight]),
                self.width,
                buffer(&self.words),
                buffer(&self.scales),
                self.zeros.as_ref().map(buffer).into(),
                self.table.as_ref().map(buffer).into(),
                buffer(&weight),
                self.sizes(),
                self.run(),
                [elem(self.dtype()), elem(dtype)],
            );
        }
        weight
    }

    /// `x · w`, `[rows, d_out]`, for 1 to [`FEW_ROWS`] rows of any dtype that is supported.
    fn few_rows(self, x: CubeTensor) -> CubeTensor {
        #[cfg(feature = "cuda")]
        if let Some(y) = cuda::few_rows(&self, &x) {
            return y;
        }
        let layout = self.layout;
        let rows = x.meta.shape()[0];
        let n_runs = layout.d_in().div_ceil(self.run().codes);
        let dim = self.cube_dim(n_runs);
        let n_splits = n_runs.div_ceil(RUNS * dim.y as usize);
        let n_splits = n_splits.min((CUBES / layout.n_tiles()).max(1));
        let runs_per_split = n_runs.div_ceil(n_splits);
        let n_splits = n_runs.div_ceil(runs_per_split);

        let sums = if n_splits == 1 { x.dtype } else { DType::F32 };
        let splits = self.empty([n_splits * rows, layout.d_out()], sums);
        let capacity = rows.next_power_of_two().min(ROWS);
        let n_cubes = [layout.n_tiles(), n_splits, rows.div_ceil(capacity)].map(|n| n as u32);
        // SAFETY: the kernel checks inputs, columns and rows against the sizes, which are those of the
        // tensors, and a cube has at most `UNITS` units.
        unsafe {
            few_rows_kernel::launch_unchecked(
                &x.client,
                CubeCount::Static(n_cubes[0], n_cubes[1], n_cubes[2]),
                dim,
                self.address_type(&[&x, &splits]),
                self.width,
                buffer(&x),
                buffer(&self.words),
                buffer(&self.scales),
                self.zeros.as_ref().map(buffer).into(),
                self.table.as_ref().map(buffer).into(),
                buffer(&splits),
                self.sizes(),
                rows,
                runs_per_split,
                capacity,
                self.run(),
                [elem(x.dtype), elem(self.dtype()), elem(sums)],
            );
        }
        if n_splits == 1 {
            return splits;
        }
        sum_of_splits(splits, [rows, layout.d_out()], x.dtype)
    }

    /// The gradients of scales and zeros, `[n_groups, d_out]` each, from `p = xᵀ · dy`.
    fn dgrid(self, p: CubeTensor) -> (CubeTensor, CubeTensor) {
        #[cfg(feature = "cuda")]
        if let Some(gradients) = cuda::dgrid(&self, &p) {
            return gradients;
        }
        let layout = self.layout;
        let grid = || self.empty(layout.grid_shape(), self.dtype());
        let (dscales, dzeros) = (grid(), grid());
        // A group that does not begin at a run overlaps one more.
        let n_runs = layout.group_size().min(layout.d_in()) / self.run().codes + 1;
        // SAFETY: the kernel checks inputs and columns against the sizes, which are those of the
        // tensors, and there are as many cubes as groups.
        unsafe {
            dgrid_kernel::launch_unchecked(
                &p.client,
                CubeCount::Static(layout.n_groups() as u32, layout.n_tiles() as u32, 1),
                self.cube_dim(n_runs),
                self.address_type(&[&p]),
                self.width,
                buffer(&p),
                buffer(&self.words),
                buffer(&self.scales),
                self.zeros.as_ref().map(buffer).into(),
                self.table.as_ref().map(buffer).into(),
                buffer(&dscales),
                buffer(&dzeros),
                self.sizes(),
                self.run(),
                [elem(p.dtype), elem(self.dtype())],
            );
        }
        (dscales, dzeros)
    }
}

/// A table of levels on the device of a tensor. It is uploaded once: there are few tables, and many
/// products with each.
fn on_device(table: &[f32; TABLE], like: &CubeTensor) -> CubeTensor {
    type Uploaded = (CubeDevice, [u32; TABLE], CubeTensor);
    static TABLES: Mutex<Vec<Uploaded>> = Mutex::new(Vec::new());

    let (client, device) = (like.client.clone(), like.device.clone());
    let bits = table.map(f32::to_bits);
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let found = tables
        .iter()
        .find(|(on, of, _)| (on, of) == (&device, &bits));
    if let Some((_, _, uploaded)) = found {
        return uploaded.clone();
    }
    let bytes = client.create_from_slice(f32::as_bytes(table));
    let shape = Shape::new([TABLE]);
    let uploaded = CubeTensor::new_contiguous(client, device.clone(), shape, bytes, DType::F32);
    tables.push((device, bits, uploaded.clone()));
    uploaded
}

/// The dense weight in a dtype, without another one in between where the kernels support it.
fn unpack_as(w: Packed<CubeBackend>, dtype: DType) -> CubeTensor {
    match Native::new(&w).filter(|_| is_supported(dtype)) {
        Some(native) => native.unpack(dtype),
        None => cast::<CubeBackend>(composed::unpack(w), dtype),
    }
}

impl QuantOps for CubeBackend {
    fn quant_unpack(w: Packed<Self>) -> FloatTensor<Self> {
        let dtype = w.scales.dtype;
        unpack_as(w, dtype)
    }

    fn quant_matmul(x: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        if (1..=FEW_ROWS).contains(&x.shape()[0])
            && is_supported(x.dtype)
            && let Some(native) = Native::new(&w)
        {
            return native.few_rows(contiguous(x));
        }
        let dtype = x.dtype;
        product(x, unpack_as(w, dtype), dtype)
    }

    fn quant_matmul_dx(dy: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        let dtype = dy.dtype;
        product(dy, Self::float_transpose(unpack_as(w, dtype)), dtype)
    }

    fn quant_matmul_dgrid(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: Packed<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match Native::new(&w) {
            Some(native) => {
                let p = product(Self::float_transpose(x), dy, DType::F32);
                native.dgrid(contiguous(p))
            }
            None => composed::dgrid(dy, x, w),
        }
    }
}
