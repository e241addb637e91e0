//! The CPU: panels of the weight are unpacked into the cache and multiplied there.
//!
//! A task owns some columns (or, for `dx`, some inputs) of the result and sums over panels in a fixed
//! order, so that the bits of the result do not depend on the number of threads.

use burn::backend::{Flex, TensorMetadata, flex::FlexTensor, tensor::FloatTensor};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::fixed;
use super::host::Host;
use super::packed::{Packed, Zeros};
use super::{QuantOps, composed, simd};
use crate::dense::multiply_add;
use crate::host::{all_native, contiguous, floats, rounded, tensor, widened};
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

/// A packed weight, contiguous and with an `F32` grid.
struct Wide(Packed<Flex>);

impl Wide {
    /// `None` unless the native code computes in the dtypes of the grid and of `others`.
    fn of(w: &Packed<Flex>, others: &[&FlexTensor]) -> Option<Self> {
        let is_native = all_native([&w.scales])
            && match &w.zeros {
                Zeros::Each(zeros) => all_native([zeros]),
                Zeros::Absent => true,
            }
            && others.iter().all(|t| all_native([t]));
        is_native.then(|| {
            Self(Packed {
                words: contiguous(w.words.clone()),
                scales: widened(w.scales.clone()),
                zeros: match &w.zeros {
                    Zeros::Each(zeros) => Zeros::Each(widened(zeros.clone())),
                    Zeros::Absent => Zeros::Absent,
                },
                layout: w.layout,
                precision: w.precision,
            })
        })
    }

    /// The memory of the weight.
    fn host(&self) -> Host<'_> {
        let Self(w) = self;
        Host {
            words: w.words.as_slice().expect("words are contiguous u32"),
            scales: floats(&w.scales),
            zeros: match &w.zeros {
                Zeros::Each(zeros) => Some(floats(zeros)),
                Zeros::Absent => None,
            },
            layout: w.layout,
            precision: w.precision,
        }
    }
}

impl QuantOps for Flex {
    fn quant_unpack(w: Packed<Self>) -> FloatTensor<Self> {
        let Some(wide) = Wide::of(&w, &[]) else {
            return composed::unpack(w);
        };
        let shape = [w.layout.d_in(), w.layout.d_out()];
        rounded(tensor(dense(&wide.host()), shape), w.scales.dtype())
    }

    fn quant_matmul(x: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        let Some(wide) = Wide::of(&w, &[&x]) else {
            return composed::matmul(x, w);
        };
        let (dtype, rows, x) = (x.dtype(), x.shape()[0], widened(x));
        let y = product(floats(&x), rows, &wide.host());
        rounded(tensor(y, [rows, w.layout.d_out()]), dtype)
    }

    fn quant_matmul_dx(dy: FloatTensor<Self>, w: Packed<Self>) -> FloatTensor<Self> {
        let Some(wide) = Wide::of(&w, &[&dy]) else {
            return composed::dx(dy, w);
        };
        let (dtype, rows, dy) = (dy.dtype(), dy.shape()[0], widened(dy));
        let dx = product_dx(floats(&dy), rows, &wide.host());
        rounded(tensor(dx, [rows, w.layout.d_in()]), dtype)
    }

    fn quant_matmul_dgrid(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: Packed<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let Some(wide) = Wide::of(&w, &[&x, &dy]) else {
            return composed::dgrid(dy, x, w);
        };
        let (rows, x, dy) = (x.shape()[0], widened(x), widened(dy));
        let (dscales, dzeros) = product_dgrid(floats(&dy), floats(&x), rows, &wide.host());
        let gradient = |d| rounded(tensor(d, w.layout.grid_shape()), w.scales.dtype());
        (gradient(dscales), gradient(dzeros))
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
