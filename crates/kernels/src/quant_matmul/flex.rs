//! The CPU: panels of the weight are unpacked into the cache and multiplied there.
//!
//! A task owns some columns (or, for `dx`, some inputs) of the result and sums over panels in a fixed
//! order, so that the bits of the result do not depend on the number of threads.

use burn::backend::{
    DType, Flex, TensorMetadata, flex::FlexTensor, ops::FloatTensorOps, tensor::FloatTensor,
};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::fixed;
use super::host::Host;
use super::packed::{Packed, Zeros};
use super::{QuantOps, composed, simd};
use crate::dense::multiply_add;
use crate::host::{contiguous, floats, tensor};
use crate::layout::TILE;
use crate::matrix::Matrix;
use crate::memory::zeroed;
use crate::shared::Shared;

/// The largest number of rows that are multiplied as codes are unpacked, without a panel.
const WITHOUT_PANEL: usize = 8;
/// The number of inputs in a panel of one tile: 64 KiB of `f32`.
const PANEL_ROWS: usize = 256;
/// The number of tiles in a panel of `dx`.
const PANEL_TILES: usize = 4;

impl Packed<Flex> {
    fn contiguous(self) -> Self {
        Self {
            words: contiguous(self.words),
            scales: contiguous(self.scales),
            zeros: match self.zeros {
                Zeros::Each(zeros) => Zeros::Each(contiguous(zeros)),
                Zeros::Absent => Zeros::Absent,
            },
            layout: self.layout,
            precision: self.precision,
        }
    }

    /// The memory of the contiguous weight; `None` unless its floats and `others` are `F32`.
    fn host(&self, others: &[&FlexTensor]) -> Option<Host<'_>> {
        if others.iter().any(|t| t.dtype() != DType::F32) {
            return None;
        }
        Some(Host {
            words: self.words.as_slice()?,
            scales: self.scales.as_slice()?,
            zeros: match &self.zeros {
                Zeros::Each(zeros) => Some(zeros.as_slice()?),
                Zeros::Absent => None,
            },
            layout: self.layout,
            precision: self.precision,
        })
    }
}

impl QuantOps for Flex {
    fn quant_unpack(w: Packed<Self>) -> FloatTensor<Self> {
        let w = w.contiguous();
        match w.host(&[]) {
            Some(host) => tensor(dense(&host), [w.layout.d_in(), w.layout.d_out()]),
            None => composed::unpack(w),
        }
    }

    fn quant_matmul(x: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        let (x, w) = (contiguous(x), w.contiguous());
        match w.host(&[&x]) {
            Some(host) => {
                let rows = x.shape()[0];
                tensor(product(floats(&x), rows, &host), [rows, w.layout.d_out()])
            }
            None => Self::float_matmul(x, Self::quant_unpack(w)),
        }
    }

    fn quant_matmul_dx(dy: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        let (dy, w) = (contiguous(dy), w.contiguous());
        match w.host(&[&dy]) {
            Some(host) => {
                let rows = dy.shape()[0];
                tensor(
                    product_dx(floats(&dy), rows, &host),
                    [rows, w.layout.d_in()],
                )
            }
            None => Self::float_matmul(dy, Self::float_transpose(Self::quant_unpack(w))),
        }
    }

    fn quant_matmul_dgrid(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: Packed<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (dy, x, w) = (contiguous(dy), contiguous(x), w.contiguous());
        match w.host(&[&x, &dy]) {
            Some(host) => {
                let rows = x.shape()[0];
                let (dscales, dzeros) = product_dgrid(floats(&dy), floats(&x), rows, &host);
                let shape = w.layout.grid_shape();
                (tensor(dscales, shape), tensor(dzeros, shape))
            }
            None => composed::dgrid(dy, x, w),
        }
    }
}

/// `w`, `[d_in, d_out]`.
fn dense(w: &Host) -> Vec<f32> {
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    let mut out = zeroed(d_in * d_out);
    out.par_chunks_mut(TILE * d_out)
        .enumerate()
        .for_each(|(block, out)| {
            let inputs = block * TILE..d_in.min((block + 1) * TILE);
            let mut panel = [0.0; TILE * TILE];
            for tile in 0..w.layout.n_tiles() {
                simd::unpack_panel(w, tile, inputs.clone(), &mut panel, TILE);
                let columns = w.layout.columns(tile);
                for (out, panel) in out.chunks_exact_mut(d_out).zip(panel.chunks_exact(TILE)) {
                    out[columns.clone()].copy_from_slice(&panel[..columns.len()]);
                }
            }
        });
    out
}

/// `x · w`, `[rows, d_out]`.
fn product(x: &[f32], rows: usize, w: &Host) -> Vec<f32> {
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    assert_eq!(x.len(), rows * d_in);
    #[cfg(target_arch = "x86_64")]
    if let Some(y) = fixed::product(x, rows, w) {
        return y;
    }
    let mut y = zeroed(rows * d_out);
    let shared = Shared::new(&mut y);
    if rows <= WITHOUT_PANEL {
        (0..w.layout.n_tiles()).into_par_iter().for_each(|tile| {
            let columns = w.layout.columns(tile);
            let mut sums = [[0.0; TILE]; WITHOUT_PANEL];
            simd::multiply_rows(w, tile, x, &mut sums[..rows]);
            for (row, sums) in sums[..rows].iter().enumerate() {
                // SAFETY: `y` is `[rows, d_out]`, and no other task uses these columns.
                let y = unsafe { shared.slice(row * d_out + columns.start, columns.len()) };
                y.copy_from_slice(&sums[..columns.len()]);
            }
        });
        return y;
    }
    (0..w.layout.n_tiles()).into_par_iter().for_each_init(
        || vec![0.0; PANEL_ROWS * TILE],
        |panel, tile| {
            let columns = w.layout.columns(tile);
            for start in (0..d_in).step_by(PANEL_ROWS) {
                let inputs = start..d_in.min(start + PANEL_ROWS);
                simd::unpack_panel(w, tile, inputs.clone(), panel, TILE);
                // SAFETY: `x` is `[rows, d_in]`, as checked above, and `y` is `[rows, d_out]`;
                // `inputs` and `columns` lie within them, and the panel is `[inputs, TILE]`. No other
                // task uses these columns of `y`.
                unsafe {
                    multiply_add(
                        [rows, inputs.len(), columns.len()],
                        Matrix::new(x.as_ptr().add(start), d_in, 1),
                        Matrix::new(panel.as_ptr(), TILE, 1),
                        shared.offset(columns.start),
                        d_out,
                        start > 0,
                    );
                }
            }
        },
    );
    y
}

/// `dy · wᵀ`, `[rows, d_in]`.
fn product_dx(dy: &[f32], rows: usize, w: &Host) -> Vec<f32> {
    const STRIDE: usize = PANEL_TILES * TILE;
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    assert_eq!(dy.len(), rows * d_out);
    if rows == 0 {
        return Vec::new();
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(dx) = fixed::product_dx(dy, rows, w) {
        return dx;
    }
    let mut dx = zeroed(rows * d_in);
    let shared = Shared::new(&mut dx);
    (0..d_in.div_ceil(TILE)).into_par_iter().for_each_init(
        || vec![0.0; TILE * STRIDE],
        |panel, block| {
            let inputs = block * TILE..d_in.min((block + 1) * TILE);
            for first in (0..w.layout.n_tiles()).step_by(PANEL_TILES) {
                let tiles = first..w.layout.n_tiles().min(first + PANEL_TILES);
                for (k, tile) in tiles.clone().enumerate() {
                    simd::unpack_panel(w, tile, inputs.clone(), &mut panel[k * TILE..], STRIDE);
                }
                let columns = first * TILE..d_out.min(tiles.end * TILE);
                // SAFETY: `dy` is `[rows, d_out]`, as checked above, and `dx` is `[rows, d_in]`;
                // `columns` and `inputs` lie within them, and the panel is `[inputs, columns]` in
                // rows of `STRIDE`, read transposed. No other task uses these columns of `dx`.
                unsafe {
                    multiply_add(
                        [rows, columns.len(), inputs.len()],
                        Matrix::new(dy.as_ptr().add(columns.start), d_out, 1),
                        Matrix::new(panel.as_ptr(), 1, STRIDE),
                        shared.offset(inputs.start),
                        d_in,
                        first > 0,
                    );
                }
            }
        },
    );
    dx
}

/// The gradients of scales and zeros, `[n_groups, d_out]` each.
fn product_dgrid(dy: &[f32], x: &[f32], rows: usize, w: &Host) -> (Vec<f32>, Vec<f32>) {
    let (d_in, d_out) = (w.layout.d_in(), w.layout.d_out());
    assert_eq!(x.len(), rows * d_in);
    assert_eq!(dy.len(), rows * d_out);
    if rows == 0 {
        return [(); 2].map(|()| zeroed(w.scales.len())).into();
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(grads) = fixed::product_dgrid(dy, x, rows, w) {
        return grads;
    }
    let tiles: Vec<_> = (0..w.layout.n_tiles())
        .into_par_iter()
        .map_init(
            || vec![0.0; PANEL_ROWS * TILE],
            |p, tile| {
                let columns = w.layout.columns(tile);
                let mut sums = vec![simd::GroupSums::default(); w.layout.n_groups()];
                for start in (0..d_in).step_by(PANEL_ROWS) {
                    let inputs = start..d_in.min(start + PANEL_ROWS);
                    // SAFETY: `x` is `[rows, d_in]` and `dy` is `[rows, d_out]`, as checked above;
                    // `inputs` and `columns` lie within them. `p` is `[inputs, TILE]` and belongs to
                    // this task.
                    unsafe {
                        multiply_add(
                            [inputs.len(), rows, columns.len()],
                            Matrix::new(x.as_ptr().add(start), 1, d_in),
                            Matrix::new(dy.as_ptr().add(columns.start), d_out, 1),
                            p.as_mut_ptr(),
                            TILE,
                            false,
                        );
                    }
                    simd::add_to_groups(w, tile, inputs, p, &mut sums);
                }
                sums
            },
        )
        .collect();

    w.grid_gradients(|tile, g| {
        let sums = &tiles[tile][g];
        [&sums.of_levels, &sums.of_products]
    })
}
