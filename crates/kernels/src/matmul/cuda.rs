//! CUDA: products of 16-bit matrices on the matrix units, with sums in `f32`.

use burn::backend::DType;
use burn_cubecl::tensor::CubeTensor;

use crate::cube::{contiguous, empty, is_supported, sum_of_splits};
use crate::cuda::{Numbers, Program, fits, is_aligned, multiprocessors};

/// The programs, of which the device has one: with the products by groups of warps of compute capability 9.0,
/// which later ones do not have, or those by warps.
const SOURCE: &str = concat!(
    include_str!("cuda/shape.cu"),
    include_str!("cuda/tile.cu"),
    include_str!("cuda/wgmma.cu"),
    include_str!("cuda/product_hopper.cu"),
    include_str!("cuda/product.cu")
);

/// The part of the result that a block computes.
#[derive(Clone, Copy)]
struct Tiling {
    /// The rows and columns of the result, and the inputs at a time.
    tile: [usize; 3],
    threads: usize,
    /// The parts of the inputs in shared memory.
    stages: usize,
}

/// The rows of tiles that blocks go through together: they read the same columns from the cache.
const ROWS_OF_TILES: usize = 8;

/// For large results.
const LARGE: Tiling = Tiling {
    tile: [128, 128, 32],
    threads: 256,
    stages: 3,
};
/// For results of which there would be too few large tiles.
const MEDIUM: Tiling = Tiling {
    tile: [64, 128, 32],
    threads: 128,
    stages: 4,
};
/// For few columns, as those of the factors of adapters.
const NARROW: Tiling = Tiling {
    tile: [64, 16, 64],
    threads: 128,
    stages: 4,
};

impl Tiling {
    /// The tiling of a result on a device with some multiprocessors, each of which holds two large tiles.
    fn of(m: usize, n: usize, multiprocessors: usize) -> Self {
        if n <= 64 {
            NARROW
        } else if 2 * LARGE.tiles(m, n) >= 3 * multiprocessors {
            LARGE
        } else {
            MEDIUM
        }
    }

    fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tile[0]) * n.div_ceil(self.tile[1])
    }

    /// The inputs of each of the splits of a product, without which too few blocks would read them.
    fn inputs_of_split(&self, [m, k, n]: [usize; 3], multiprocessors: usize) -> usize {
        /// The fewest inputs that are worth a partial result.
        const LEAST: usize = 256;
        let splits = 2 * multiprocessors / self.tiles(m, n);
        let splits = splits.min(k / LEAST).clamp(1, 64);
        k.div_ceil(splits).next_multiple_of(self.tile[2])
    }
}

/// A factor as the kernels read it.
struct Factor {
    tensor: CubeTensor,
    is_by_columns: bool,
    stride: usize,
    is_aligned: bool,
}

impl Factor {
    fn new(tensor: &CubeTensor) -> Self {
        let rows = |tensor: &CubeTensor| {
            let [rows, columns] = tensor.meta.shape().dims();
            let strides = tensor.meta.strides();
            // A dimension of size 1 keeps any stride.
            let is_by_rows = strides[1] == 1 || columns == 1 && strides[0] == 1;
            let is_by_columns = strides[0] == 1 || rows == 1 && strides[1] == 1;
            match (is_by_rows, is_by_columns) {
                (true, _) if rows == 1 => Some((false, columns)),
                (true, _) => Some((false, strides[0])),
                (_, true) if columns == 1 => Some((true, rows)),
                (_, true) => Some((true, strides[1])),
                _ => None,
            }
        };
        let (tensor, (is_by_columns, stride)) = match rows(tensor) {
            Some(found) => (tensor.clone(), found),
            None => {
                let columns = tensor.meta.shape()[1];
                (contiguous(tensor.clone()), (false, columns))
            }
        };
        let is_aligned = is_aligned(&tensor, stride);
        Self {
            tensor,
            is_by_columns,
            stride,
            is_aligned,
        }
    }
}

/// The product of two matrices of 16 bits, in their dtype or in `F32`, if a device has the instructions.
pub(super) fn product(a: &CubeTensor, b: &CubeTensor, dtype: DType) -> Option<CubeTensor> {
    let [m, k] = a.meta.shape().dims();
    let n = b.meta.shape()[1];
    let is_16_bits = matches!(a.dtype, DType::BF16 | DType::F16) && b.dtype == a.dtype;
    let is_16_bits = is_16_bits && is_supported(dtype);
    if !is_16_bits || m * k * n == 0 || !fits(a) || !fits(b) {
        return None;
    }
    let multiprocessors = multiprocessors(a);
    let tiling = Tiling::of(m, n, multiprocessors);
    let inputs = tiling.inputs_of_split([m, k, n], multiprocessors);
    let splits = k.div_ceil(inputs);
    // Sums of parts are rounded once, together.
    let is_wide = dtype != a.dtype || splits > 1;
    let c = empty(a, [splits * m, n], if is_wide { DType::F32 } else { dtype });
    let (a, b) = (Factor::new(a), Factor::new(b));
    let element = if a.tensor.dtype == DType::BF16 {
        "BF16"
    } else {
        "F16"
    };
    let mut macros = vec![
        (element, 1),
        ("TILE_M", tiling.tile[0]),
        ("TILE_N", tiling.tile[1]),
        ("TILE_K", tiling.tile[2]),
        ("THREADS", tiling.threads),
        ("STAGES", tiling.stages),
    ];
    let flags = [
        ("OUTPUT_F32", is_wide),
        ("A_BY_COLUMNS", a.is_by_columns),
        ("B_BY_COLUMNS", b.is_by_columns),
        ("A_UNALIGNED", !a.is_aligned),
        ("B_UNALIGNED", !b.is_aligned),
    ];
    macros.extend(
        flags
            .into_iter()
            .filter(|(_, is_set)| *is_set)
            .map(|(flag, _)| (flag, 1)),
    );
    let program = Program {
        kernel: "product",
        source: SOURCE,
        macros,
        threads: tiling.threads as u32,
    };
    let numbers = Numbers::new()
        .size(m)
        .size(n)
        .size(k)
        .size(a.stride)
        .size(b.stride)
        .size(n)
        .size(inputs)
        .size(ROWS_OF_TILES);
    // SAFETY: the sizes and strides are those of the factors and of the result, beyond which nothing is read
    // or written.
    unsafe {
        let grid = [tiling.tiles(m, n), 1, splits];
        program.launch(grid, &[&a.tensor, &b.tensor], &[&c], numbers);
    }
    Some(match c.dtype == dtype && splits == 1 {
        true => c,
        false => sum_of_splits(c, [m, n], dtype),
    })
}
