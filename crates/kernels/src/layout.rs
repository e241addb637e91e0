//! Where the code of input `i` and output `o` lies in a packed weight.

use std::ops::Range;

use rayon::prelude::*;

use crate::isa::{Isa, by_instruction_set};
use crate::memory::zeroed;

/// Columns in one tile of words.
pub const TILE: usize = 64;

/// Levels of a table; a code of fewer bits uses the first ones.
pub const TABLE: usize = 16;

/// The number that a code of `bits` bits stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// The code itself, `0 ..= 2^bits - 1`.
    Unsigned,
    /// The code minus `2^(bits - 1)`: as many negative levels as others.
    Centered,
    /// An entry of a table, for codes of up to 4 bits.
    Table([f32; TABLE]),
}

/// The shape of a packed weight `[d_in, d_out]` and the place of each code.
///
/// Each column is a bit stream of its own along `d_in`, lowest bits first; the last word is padded
/// with zero codes. Word rows are GPTQ's rows of `qweight`, `[d_in * bits / 32, d_out]`; in memory
/// they lie in tiles of [`TILE`] columns, `[n_tiles, word_rows, TILE]`, so that a product streams
/// them. The columns that pad the last tile hold zeros.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    d_in: usize,
    d_out: usize,
    bits: usize,
    group_size: usize,
    levels: Levels,
}

impl Layout {
    /// The layout of a weight `[d_in, d_out]` with `bits`-bit codes in groups of `group_size` inputs.
    ///
    /// The last group is shorter when `group_size` does not divide `d_in`.
    ///
    /// # Panics
    /// If a size is zero, `bits` is not 2, 3, 4 or 8, a table's codes have more than 4 bits, or the
    /// bits of a column overflow `usize`.
    pub fn new(d_in: usize, d_out: usize, bits: usize, group_size: usize, levels: Levels) -> Self {
        assert!(
            d_in > 0 && d_out > 0,
            "a packed weight of {d_in} x {d_out} is empty"
        );
        assert!(
            matches!(bits, 2 | 3 | 4 | 8),
            "codes have 2, 3, 4 or 8 bits, not {bits}"
        );
        assert!(
            bits <= 4 || !matches!(levels, Levels::Table(_)),
            "a table has {TABLE} levels, codes of {bits} bits do not fit"
        );
        assert!(group_size > 0, "a group holds at least one input");
        assert!(
            d_in.checked_mul(bits).is_some(),
            "{d_in} codes of {bits} bits overflow"
        );
        Self {
            d_in,
            d_out,
            bits,
            group_size,
            levels,
        }
    }

    /// Inputs, the rows of the weight.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// Outputs, the columns of the weight.
    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Inputs that share a scale.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// Groups along the inputs, the short last one included.
    pub fn n_groups(&self) -> usize {
        self.d_in.div_ceil(self.group_size)
    }

    /// Words in a column.
    pub fn word_rows(&self) -> usize {
        (self.d_in * self.bits).div_ceil(32)
    }

    /// Tiles of [`TILE`] columns.
    pub fn n_tiles(&self) -> usize {
        self.d_out.div_ceil(TILE)
    }

    /// The shape of the words, `[n_tiles, word_rows, TILE]`.
    pub fn words_shape(&self) -> [usize; 3] {
        [self.n_tiles(), self.word_rows(), TILE]
    }

    /// The shape of scales and zeros, `[n_groups, d_out]`.
    pub fn grid_shape(&self) -> [usize; 2] {
        [self.n_groups(), self.d_out]
    }

    /// What codes stand for.
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// The number that a code stands for.
    ///
    /// # Panics
    /// If the code has more bits than a table's.
    pub fn level(&self, code: u8) -> f32 {
        match self.levels {
            Levels::Table(table) => table[usize::from(code)],
            _ => f32::from(code) - self.center(),
        }
    }

    /// What is subtracted from a code to get its level, where that is how one gets it.
    pub(crate) fn center(&self) -> f32 {
        match self.levels {
            Levels::Centered => (1 << (self.bits - 1)) as f32,
            _ => 0.0,
        }
    }

    /// The largest code.
    pub(crate) fn mask(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// The word and the bit at which the code of input `i` begins.
    pub(crate) fn position(&self, i: usize) -> (usize, u32) {
        let bit = i * self.bits;
        (bit / 32, (bit % 32) as u32)
    }

    /// Whether a code that begins at bit `shift` ends in the next word.
    pub(crate) fn straddles(&self, shift: u32) -> bool {
        shift as usize + self.bits > 32
    }

    /// The columns of the weight that tile `tile` holds.
    pub(crate) fn columns(&self, tile: usize) -> Range<usize> {
        tile * TILE..self.d_out.min((tile + 1) * TILE)
    }

    /// The codes of input `i` in the columns of one tile, `words` being `[word_rows, TILE]`.
    #[inline(always)]
    pub(crate) fn codes(&self, words: &[u32], i: usize) -> [u32; TILE] {
        let (row, shift) = self.position(i);
        let mut codes = [0; TILE];
        let low: &[u32; TILE] = words[row * TILE..][..TILE].try_into().unwrap();
        if self.straddles(shift) {
            let high: &[u32; TILE] = words[(row + 1) * TILE..][..TILE].try_into().unwrap();
            for j in 0..TILE {
                codes[j] = ((low[j] >> shift) | (high[j] << (32 - shift))) & self.mask();
            }
        } else {
            for j in 0..TILE {
                codes[j] = (low[j] >> shift) & self.mask();
            }
        }
        codes
    }
}

/// Packs codes into words.
///
/// # Shapes
/// - `codes`: `[d_in, d_out]`, row by row
/// - result: [`Layout::words_shape`]
///
/// # Panics
/// If `codes` has another length, or a code does not fit into its bits.
pub fn pack(codes: &[u8], layout: &Layout) -> Vec<u32> {
    assert_eq!(
        codes.len(),
        layout.d_in * layout.d_out,
        "one code for each weight"
    );
    let [n_tiles, word_rows, _] = layout.words_shape();
    let mut words = zeroed(n_tiles * word_rows * TILE);
    let tasks = words.par_chunks_mut(TASK_TILES * word_rows * TILE);
    let highest = tasks.enumerate().map(|(task, words)| {
        let mut highest = 0;
        pack_tiles(codes, layout, task * TASK_TILES, words, &mut highest);
        highest
    });
    let highest = highest.max().unwrap_or(0);
    assert!(
        highest <= layout.mask(),
        "code {highest} has more than {} bits",
        layout.bits
    );
    words
}

/// Tiles of a task that reads a row-major matrix: a memory page of floats from each row.
pub(crate) const TASK_TILES: usize = 16;

by_instruction_set! {
    /// The words of the tiles from `first` on, and the highest code among them.
    fn pack_tiles(
        codes: &[u8],
        layout: &Layout,
        first: usize,
        words: &mut [u32],
        highest: &mut u32,
    ) = pack_tiles_body
}

#[inline(always)]
fn pack_tiles_body<I: Isa>(
    codes: &[u8],
    layout: &Layout,
    first: usize,
    words: &mut [u32],
    highest: &mut u32,
) {
    let mut writers = Writer::each(words, layout);
    let mut union = [0; TILE];
    for row in codes.chunks_exact(layout.d_out) {
        for (k, writer) in writers.iter_mut().enumerate() {
            let row = &row[layout.columns(first + k)];
            let mut lanes = [0; TILE];
            match <&[u8; TILE]>::try_from(row) {
                Ok(row) => lanes = row.map(u32::from),
                Err(_) => {
                    for (lane, &code) in lanes.iter_mut().zip(row) {
                        *lane = u32::from(code);
                    }
                }
            }
            for j in 0..TILE {
                union[j] = lanes[j].max(union[j]);
            }
            writer.push(&lanes);
        }
    }
    *highest = union.into_iter().max().unwrap_or(0);
}

/// Writes the codes of one tile, input by input.
pub(crate) struct Writer<'a> {
    words: &'a mut [u32],
    bits: u32,
    row: usize,
    shift: u32,
}

impl<'a> Writer<'a> {
    /// One for each tile of `words`, `[word_rows, TILE]` each, all zero.
    pub(crate) fn each(words: &'a mut [u32], layout: &Layout) -> Vec<Self> {
        let tiles = words.chunks_exact_mut(layout.word_rows() * TILE);
        let writer = |words| Self {
            words,
            bits: layout.bits as u32,
            row: 0,
            shift: 0,
        };
        tiles.map(writer).collect()
    }

    /// Appends the codes of the next input, each within its bits.
    #[inline(always)]
    pub(crate) fn push(&mut self, codes: &[u32; TILE]) {
        let shift = self.shift;
        let row = self.lanes(self.row).iter_mut().zip(codes);
        row.for_each(|(word, code)| *word |= code << shift);
        self.shift += self.bits;
        if self.shift >= 32 {
            self.shift -= 32;
            self.row += 1;
            if self.shift > 0 {
                let taken = self.bits - self.shift;
                let row = self.lanes(self.row).iter_mut().zip(codes);
                row.for_each(|(word, code)| *word = code >> taken);
            }
        }
    }

    #[inline(always)]
    fn lanes(&mut self, row: usize) -> &mut [u32; TILE] {
        let lanes = &mut self.words[row * TILE..][..TILE];
        lanes.try_into().expect("a row of a tile")
    }
}

/// The codes in `words`, row by row: the inverse of [`pack`].
///
/// # Panics
/// If `words` has another length than the layout's.
pub fn unpack(words: &[u32], layout: &Layout) -> Vec<u8> {
    let [n_tiles, word_rows, _] = layout.words_shape();
    assert_eq!(
        words.len(),
        n_tiles * word_rows * TILE,
        "the words of the layout"
    );
    let mut codes = zeroed(layout.d_in * layout.d_out);
    let rows = codes.par_chunks_exact_mut(layout.d_out).enumerate();
    rows.for_each(|(i, row)| {
        for (tile, words) in words.chunks_exact(word_rows * TILE).enumerate() {
            let row = &mut row[layout.columns(tile)];
            for (code, word) in row.iter_mut().zip(layout.codes(words, i)) {
                *code = word as u8;
            }
        }
    });
    codes
}

/// Words in tiles from the row-major `[word_rows, d_out]` of a file.
///
/// # Panics
/// If `columns` has another length.
pub fn columns_to_tiles(columns: &[u32], layout: &Layout) -> Vec<u32> {
    let [n_tiles, word_rows, _] = layout.words_shape();
    assert_eq!(
        columns.len(),
        word_rows * layout.d_out,
        "the words of the layout"
    );
    let mut words = zeroed(n_tiles * word_rows * TILE);
    for (tile, words) in words.chunks_exact_mut(word_rows * TILE).enumerate() {
        let range = layout.columns(tile);
        for (row, words) in words.chunks_exact_mut(TILE).enumerate() {
            words[..range.len()].copy_from_slice(&columns[row * layout.d_out..][range.clone()]);
        }
    }
    words
}

/// The row-major `[word_rows, d_out]` of a file from words in tiles: the inverse of
/// [`columns_to_tiles`].
///
/// # Panics
/// If `words` has another length than the layout's.
pub fn tiles_to_columns(words: &[u32], layout: &Layout) -> Vec<u32> {
    let [n_tiles, word_rows, _] = layout.words_shape();
    assert_eq!(
        words.len(),
        n_tiles * word_rows * TILE,
        "the words of the layout"
    );
    let mut columns = zeroed(word_rows * layout.d_out);
    for (tile, words) in words.chunks_exact(word_rows * TILE).enumerate() {
        let range = layout.columns(tile);
        for (row, words) in words.chunks_exact(TILE).enumerate() {
            columns[row * layout.d_out..][range.clone()].copy_from_slice(&words[..range.len()]);
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of methods.md §1.6, which GPTQ's packer writes.
    #[test]
    fn words_are_gptqs() {
        let four = Layout::new(8, 1, 4, 8, Levels::Unsigned);
        let codes: Vec<u8> = (0..8).collect();
        assert_eq!(tiles_to_columns(&pack(&codes, &four), &four), [0x7654_3210]);
        let three = Layout::new(32, 1, 3, 32, Levels::Unsigned);
        let codes: Vec<u8> = (0..32).map(|i| i % 8).collect();
        let words = [0x88FA_C688, 0xC688_FAC6, 0xFAC6_88FA];
        assert_eq!(tiles_to_columns(&pack(&codes, &three), &three), words);
    }

    #[test]
    #[should_panic(expected = "more than 2 bits")]
    fn a_code_out_of_range_is_refused() {
        pack(&[4], &Layout::new(1, 1, 2, 1, Levels::Unsigned));
    }
}
