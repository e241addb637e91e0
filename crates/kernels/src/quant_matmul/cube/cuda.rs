//! CUDA: loads and stores of 16 bytes, and few rows of 16 bits on the matrix units.

use burn::backend::DType;
use burn_cubecl::tensor::CubeTensor;

use super::Native;
use crate::cube::sum_of_splits;
use crate::cuda::{Numbers, Program, fits, is_aligned, multiprocessors};
use crate::layout::TILE;

/// The threads of a block of the kernels that read a weight once.
const THREADS: usize = 256;
/// The columns of a block of few rows.
const COLUMNS: usize = 32;
/// The codes of a thread that its multiply-adds take at a time.
const CODES_AT_A_TIME: usize = 32;

/// Whether runs of some codes lie in one group each, and none is incomplete.
fn are_in_groups(w: &Native, codes: usize) -> bool {
    let (d_in, group_size) = (w.layout.d_in(), w.layout.group_size());
    d_in.is_multiple_of(codes) && (group_size >= d_in || group_size.is_multiple_of(codes))
}

/// The number of a dtype in the kernels.
fn kind(dtype: DType) -> usize {
    match dtype {
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    }
}

/// The macros of the format, with floats of a dtype beside those of the grid.
fn macros(w: &Native, dtype: DType, is_in_group: bool) -> Vec<(&'static str, usize)> {
    vec![
        ("BITS", w.layout.bits()),
        ("X", kind(dtype)),
        ("GRID", kind(w.dtype())),
        ("ZEROS", usize::from(w.zeros.is_some())),
        ("TABLE", usize::from(w.table.is_some())),
        ("IN_GROUP", usize::from(is_in_group)),
        ("ALIGNED", usize::from(w.layout.d_out().is_multiple_of(4))),
    ]
}

fn numbers(w: &Native, rows: usize, chunks_per_split: usize) -> Numbers {
    let layout = w.layout;
    Numbers::new()
        .size(layout.d_in())
        .size(layout.d_out())
        .size(layout.word_rows())
        .size(layout.group_size().min(layout.d_in()))
        .size(rows)
        .size(chunks_per_split)
        .float(layout.center())
}

/// The zeros and the table; in the place of one that is absent, the words, which are not read as such.
fn optional(w: &Native) -> [&CubeTensor; 2] {
    [&w.zeros, &w.table].map(|tensor| tensor.as_ref().unwrap_or(&w.words))
}

/// The dense weight in a dtype.
pub(super) fn unpack(w: &Native, dtype: DType) -> Option<CubeTensor> {
    let layout = w.layout;
    if !w.is_aligned() || !fits(&w.words) {
        return None;
    }
    let weight = w.empty([layout.d_in(), layout.d_out()], dtype);
    // The columns of 16 bytes.
    let width = 16 / dtype.size();
    let mut macros = macros(w, dtype, are_in_groups(w, w.run().codes));
    macros.extend([
        ("RUNS", 1),
        ("THREADS", THREADS),
        ("WIDE", usize::from(layout.d_out().is_multiple_of(width))),
    ]);
    let runs_of_block = THREADS / (TILE / width);
    let n_runs = layout.d_in().div_ceil(w.run().codes);
    let program = Program {
        kernel: "unpack",
        source: concat!(
            include_str!("cuda/packed.cu"),
            include_str!("cuda/unpack.cu")
        ),
        macros,
        threads: THREADS as u32,
    };
    let [zeros, table] = optional(w);
    let reads = [&w.words, &w.scales, zeros, table];
    let grid = [n_runs.div_ceil(runs_of_block), layout.n_tiles(), 1];
    // SAFETY: the kernel checks inputs and columns against the sizes, which are those of the tensors.
    unsafe { program.launch(grid, &reads, &[&weight], numbers(w, 0, 0)) }
    Some(weight)
}

/// `x · w`, if the runs of codes lie in groups.
pub(super) fn few_rows(w: &Native, x: &CubeTensor) -> Option<CubeTensor> {
    let layout = w.layout;
    let codes = w.run().codes;
    // The matrix units round levels to 16 bits, which those of a table are not.
    let is_16_bits = x.dtype != DType::F32 && w.table.is_none();
    let of_units = [128, 64, 32, 16].into_iter().map(|n| n / (4 * codes));
    let of_units = of_units.filter(|&runs| runs > 0 && are_in_groups(w, runs * 4 * codes));
    let on_units = of_units.max().filter(|_| is_16_bits);
    let at_a_time = CODES_AT_A_TIME / codes;
    let chunk = match on_units {
        Some(runs) => runs * 4 * codes,
        None => CODES_AT_A_TIME,
    };
    let is_aligned = w.is_aligned() && is_aligned(x, layout.d_in());
    if !is_aligned || !fits(x) || !are_in_groups(w, chunk) {
        return None;
    }
    let (rows, multiprocessors) = (x.meta.shape()[0], multiprocessors(x));
    let blocks = layout.d_out().div_ceil(COLUMNS);
    let n_chunks = layout.d_in() / chunk;
    // Enough chunks for all warps, and for two at a time.
    let n_splits = (multiprocessors / blocks).min(n_chunks / 32).max(1);
    let chunks_per_split = n_chunks.div_ceil(n_splits);
    let n_splits = n_chunks.div_ceil(chunks_per_split);
    let threads = if 2 * blocks * n_splits >= 3 * multiprocessors {
        256
    } else {
        512
    };
    let capacity = match on_units {
        Some(_) => rows.next_multiple_of(8).min(16),
        None => rows.next_power_of_two().min(8),
    };
    let is_split = n_splits > 1;
    let mut macros = macros(w, x.dtype, true);
    // A warp takes the chunks of all its columns, and of its own rows of units one by one.
    let (in_turn, at_once) = match on_units {
        Some(_) => (threads / 32, 2),
        None => (threads / (COLUMNS / 4), if capacity == 1 { 2 } else { 1 }),
    };
    macros.extend([
        ("ROWS", capacity),
        ("RUNS", on_units.unwrap_or(at_a_time)),
        ("BATCH", (chunks_per_split / in_turn).clamp(1, at_once)),
        ("THREADS", threads),
        ("SPLIT", usize::from(is_split)),
    ]);
    let (kernel, source) = match on_units {
        Some(_) => {
            macros.push(("COLUMNS", COLUMNS));
            let source = concat!(
                include_str!("cuda/packed.cu"),
                include_str!("cuda/finish.cu"),
                include_str!("cuda/few_rows_mma.cu")
            );
            ("few_rows_mma", source)
        }
        None => {
            macros.push(("LANES", COLUMNS / 4));
            let source = concat!(
                include_str!("cuda/packed.cu"),
                include_str!("cuda/finish.cu"),
                include_str!("cuda/few_rows.cu")
            );
            ("few_rows", source)
        }
    };
    let y_dtype = if is_split { DType::F32 } else { x.dtype };
    let y = w.empty([n_splits * rows, layout.d_out()], y_dtype);
    let program = Program {
        kernel,
        source,
        macros,
        threads: threads as u32,
    };
    let [zeros, table] = optional(w);
    let reads = [x, &w.words, &w.scales, zeros, table];
    let grid = [blocks, n_splits, rows.div_ceil(capacity)];
    // SAFETY: the kernel checks inputs, columns and rows against the sizes, which are those of the tensors.
    unsafe { program.launch(grid, &reads, &[&y], numbers(w, rows, chunks_per_split)) }
    Some(match is_split {
        true => sum_of_splits(y, [rows, layout.d_out()], x.dtype),
        false => y,
    })
}

/// The gradients of scales and zeros from `p`.
pub(super) fn dgrid(w: &Native, p: &CubeTensor) -> Option<(CubeTensor, CubeTensor)> {
    if !w.is_aligned() || !fits(p) {
        return None;
    }
    let layout = w.layout;
    let grid = || w.empty(layout.grid_shape(), w.dtype());
    let (dscales, dzeros) = (grid(), grid());
    let mut macros = macros(w, p.dtype, are_in_groups(w, w.run().codes));
    macros.push(("THREADS", THREADS));
    let program = Program {
        kernel: "dgrid",
        source: concat!(
            include_str!("cuda/packed.cu"),
            include_str!("cuda/dgrid.cu")
        ),
        macros,
        threads: THREADS as u32,
    };
    let [zeros, table] = optional(w);
    let reads = [p, &w.words, &w.scales, zeros, table];
    let blocks = [layout.n_groups(), layout.n_tiles(), 1];
    // SAFETY: the kernel checks inputs and columns against the sizes, which are those of the tensors.
    unsafe { program.launch(blocks, &reads, &[&dscales, &dzeros], numbers(w, 0, 0)) }
    Some((dscales, dzeros))
}

impl Native {
    /// Whether all that is read begins at a multiple of 16 bytes.
    fn is_aligned(&self) -> bool {
        let tensors = [Some(&self.words), Some(&self.scales), self.zeros.as_ref()];
        let offsets = tensors.into_iter().flatten();
        let mut offsets = offsets.map(|tensor| tensor.handle.offset_start.unwrap_or(0));
        offsets.all(|offset| offset.is_multiple_of(16))
    }
}
