//! Packed weights as blocks of 32, both ways.

use quant_core::{Format, Grid, Parts, QuantTensor, Scales};
use tensor_files::gguf::{BlockType, Blocks, Offset};

use super::names::{inverse, reordered};
use crate::checkpoint::packing::transpose;

/// The inputs of a block.
const BLOCK: usize = 32;

/// The highest code of 5 bits.
const FIVE_BITS: u8 = 31;

/// The format of a packed weight whose file states none; `None` for blocks that become dense.
pub(super) fn natural_format(of: BlockType) -> Option<Format> {
    let (bits, grid) = match of {
        BlockType::Q4_0 => (4, Grid::Symmetric),
        BlockType::Q4_1 => (4, Grid::Affine),
        BlockType::Q5_0 | BlockType::Q8_0 => (8, Grid::Symmetric),
        BlockType::Q5_1 => (8, Grid::Affine),
        _ => return None,
    };
    let format = Format::new(bits, Some(BLOCK), grid);
    Some(format.expect("a width of the grid"))
}

/// Why blocks cannot hold a weight `[d_in, d_out]` of a format, whatever its values.
pub(super) fn refusal(format: Format, [d_in, _]: [usize; 2]) -> Option<String> {
    if format.grid().is_codebook() {
        return Some(format!(
            "is {format}, and the blocks of GGUF have uniform grids; quantize to an affine or a symmetric grid"
        ));
    }
    let group = format.group_size().unwrap_or(d_in);
    if !d_in.is_multiple_of(BLOCK) || !(group.is_multiple_of(BLOCK) || group == d_in) {
        return Some(format!(
            "has {d_in} inputs in groups of {group}, which are no multiples of the {BLOCK} of a block; choose groups of 32, 64 or 128"
        ));
    }
    None
}

/// The type of the blocks that hold a weight, or why none does, but for how its floats are rounded.
pub(super) fn block_type(weight: &QuantTensor) -> Result<BlockType, String> {
    let format = weight.format();
    if let Some(refusal) = refusal(format, weight.dims()) {
        return Err(refusal);
    }
    if weight.input_order().is_some() {
        return Err("has an order of its inputs, which GGUF does not hold; quantize in the natural order, or in the default one of OPTQ".into());
    }
    let codes = || weight.codes().into_iter();
    match (format.grid(), format.bits()) {
        (Grid::Affine, 8) if codes().all(|code| code <= FIVE_BITS) => Ok(BlockType::Q5_1),
        (Grid::Affine, 8) => Err(format!(
            "is {format}; blocks of 8 bits are symmetric: quantize to a symmetric grid, or to 2, 3 or 4 bits"
        )),
        (Grid::Affine, _) => Ok(BlockType::Q4_1),
        (_, 8) => {
            let five = codes().all(|code| (112..=143).contains(&code));
            Ok(if five {
                BlockType::Q5_0
            } else {
                BlockType::Q8_0
            })
        }
        _ => Ok(BlockType::Q4_0),
    }
}

/// The code that blocks have for a code of the format.
fn shift(of: &Offset, format: Format) -> i16 {
    match of {
        Offset::Minimums(_) => 0,
        Offset::Center(center) => i16::from(*center) - (1 << (format.bits() - 1)),
    }
}

/// The parts of a packed weight `[d_in, d_out]` from blocks whose rows are in the order of the file.
///
/// # Errors
/// Why the blocks are not those of a weight of this format.
pub(super) fn unpack(
    blocks: &Blocks,
    format: Format,
    dims @ [d_in, d_out]: [usize; 2],
    rows: Option<&[usize]>,
) -> Result<Parts, String> {
    if let Some(refusal) = refusal(format, dims) {
        return Err(refusal);
    }
    let layout = format.layout(dims).map_err(|error| error.to_string())?;
    let minimums = match &blocks.offset {
        Offset::Minimums(minimums) => Some(minimums),
        Offset::Center(_) => None,
    };
    if minimums.is_some() != (format.grid() == Grid::Affine) {
        return Err(format!("has blocks of another grid than {format}"));
    }
    let row = |output: usize| rows.map_or(output, |rows| rows[output]);
    let per_row = d_in / BLOCK;
    let per_group = layout.group_size().div_ceil(BLOCK);
    let n_groups = layout.n_groups();
    let mut codes = blocks.codes.clone();
    let mut scales = vec![0.0; n_groups * d_out];
    let mut zeros = minimums.map(|_| vec![0.0; n_groups * d_out]);
    for output in 0..d_out {
        let start = row(output) * per_row;
        for group in 0..n_groups {
            let first = start + group * per_group;
            let last = start + per_row.min((group + 1) * per_group);
            let scale = blocks.scales[first];
            let minimum = minimums.map_or(0.0, |minimums| minimums[first]);
            if !(scale.is_finite() && minimum.is_finite()) {
                return Err(format!(
                    "block {first} has the scale {scale} and the minimum {minimum}"
                ));
            }
            let differs = |at: usize| {
                let of_block = minimums.map_or(0.0, |minimums| minimums[at]);
                blocks.scales[at].to_bits() != scale.to_bits()
                    || of_block.to_bits() != minimum.to_bits()
            };
            if let Some(at) = (first..last).find(|&at| differs(at)) {
                return Err(format!(
                    "blocks {first} and {at} are of one group of {format}, and have other scales or minimums"
                ));
            }
            let at = group * d_out + output;
            let (scale, zero) = if scale != 0.0 {
                // Without a zero of -0.
                (scale, -minimum / scale + 0.0)
            } else {
                codes[first * BLOCK..last * BLOCK].fill(0);
                (
                    minimum.abs(),
                    if minimum == 0.0 {
                        0.0
                    } else {
                        -minimum.signum()
                    },
                )
            };
            scales[at] = scale;
            if let Some(zeros) = &mut zeros {
                zeros[at] = zero;
            }
        }
    }
    let shift = shift(&blocks.offset, format);
    let highest = (1i16 << format.bits()) - 1;
    for code in &mut codes {
        let shifted = i16::from(*code) - shift;
        if !(0..=highest).contains(&shifted) {
            return Err(format!("has the code {code}, which {format} does not have"));
        }
        *code = shifted as u8;
    }
    if let Some(rows) = rows {
        codes = reordered(&codes, d_in, rows);
    }
    let codes = transpose(&codes, [d_out, d_in]);
    Ok(Parts {
        words: kernels::pack(&codes, &layout),
        scales: Scales::Float(scales),
        zeros,
        input_order: None,
    })
}

/// The blocks of a packed weight, whose rows `rows` puts in the order of the file.
pub(super) fn pack(weight: &QuantTensor, of: BlockType, rows: Option<&[usize]>) -> Vec<u8> {
    let (format, layout) = (weight.format(), weight.layout());
    let [d_in, d_out] = weight.dims();
    let parts = weight.to_parts();
    let Scales::Float(scales) = parts.scales else {
        unreachable!("the scales of uniform grids are floats");
    };
    let in_file = rows.map(inverse);
    let mut codes = transpose(&weight.codes(), [d_in, d_out]);
    if let Some(order) = &in_file {
        codes = reordered(&codes, d_in, order);
    }
    let per_group = layout.group_size().div_ceil(BLOCK);
    let places = (0..d_out).flat_map(|row| {
        let output = in_file.as_ref().map_or(row, |order| order[row]);
        (0..d_in / BLOCK).map(move |block| block / per_group * d_out + output)
    });
    let offset = match &parts.zeros {
        Some(zeros) => {
            let minimum = |at: usize| -zeros[at] * scales[at];
            Offset::Minimums(places.clone().map(minimum).collect())
        }
        None => Offset::Center(of.center().expect("a type without minimums")),
    };
    let shift = shift(&offset, format);
    for code in &mut codes {
        *code = (i16::from(*code) + shift) as u8;
    }
    let blocks = Blocks {
        codes,
        scales: places.map(|at| scales[at]).collect(),
        offset,
    };
    blocks.to_bytes(of)
}
