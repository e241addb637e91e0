//! Packing and unpacking of codes, and the order of words in files.

use rayon::prelude::*;

use crate::isa::{Isa, by_instruction_set};
use crate::layout::{Layout, TILE};
use crate::memory::zeroed;

/// Packs codes into words.
///
/// # Shapes
/// - `codes`: `[d_in, d_out]`, row by row
/// - result: [`Layout::words_shape`]
///
/// # Panics
/// If the length of `codes` is not `d_in * d_out`, or a code has more bits than the layout's.
///
/// # Examples
/// ```
/// use kernels::{Layout, Levels, pack, unpack};
///
/// let layout = Layout::new(3, 2, 4, 3, Levels::Unsigned);
/// let codes = [0, 15, 7, 8, 3, 1];
/// assert_eq!(unpack(&pack(&codes, &layout), &layout), codes);
/// ```
pub fn pack(codes: &[u8], layout: &Layout) -> Vec<u32> {
    assert_eq!(
        codes.len(),
        layout.d_in() * layout.d_out(),
        "the number of codes"
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
        layout.bits()
    );
    words
}

/// The number of tiles in a task that reads a row-major matrix: one memory page of floats per row.
pub(crate) const TASK_TILES: usize = 16;

by_instruction_set! {
    /// Writes the words of the tiles from `first` on, and the highest code among them.
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
    for row in codes.chunks_exact(layout.d_out()) {
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

/// Writes the words of one tile from the codes of one input after the other.
pub(crate) struct Writer<'a> {
    words: &'a mut [u32],
    bits: u32,
    row: usize,
    shift: u32,
}

impl<'a> Writer<'a> {
    /// One writer per tile of `words`, which are `[n_tiles, word_rows, TILE]` and zero.
    pub(crate) fn each(words: &'a mut [u32], layout: &Layout) -> Vec<Self> {
        let tiles = words.chunks_exact_mut(layout.word_rows() * TILE);
        let writer = |words| Self {
            words,
            bits: layout.bits() as u32,
            row: 0,
            shift: 0,
        };
        tiles.map(writer).collect()
    }

    /// Appends the codes of the next input, none of which exceeds its bits.
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

/// Unpacks codes from words: the inverse of [`pack`].
///
/// # Shapes
/// - `words`: [`Layout::words_shape`]
/// - result: `[d_in, d_out]`, row by row
///
/// # Panics
/// If the length of `words` is not the layout's.
pub fn unpack(words: &[u32], layout: &Layout) -> Vec<u8> {
    let [n_tiles, word_rows, _] = layout.words_shape();
    assert_eq!(
        words.len(),
        n_tiles * word_rows * TILE,
        "the number of words"
    );
    let mut codes = zeroed(layout.d_in() * layout.d_out());
    let rows = codes.par_chunks_exact_mut(layout.d_out()).enumerate();
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

/// Reorders the words of a GPTQ file into tiles.
///
/// # Shapes
/// - `columns`: `[word_rows, d_out]`, row by row
/// - result: [`Layout::words_shape`]
///
/// # Panics
/// If the length of `columns` is not `word_rows * d_out`.
pub fn columns_to_tiles(columns: &[u32], layout: &Layout) -> Vec<u32> {
    let [n_tiles, word_rows, _] = layout.words_shape();
    assert_eq!(
        columns.len(),
        word_rows * layout.d_out(),
        "the number of words"
    );
    let mut words = zeroed(n_tiles * word_rows * TILE);
    for (tile, words) in words.chunks_exact_mut(word_rows * TILE).enumerate() {
        let range = layout.columns(tile);
        for (row, words) in words.chunks_exact_mut(TILE).enumerate() {
            words[..range.len()].copy_from_slice(&columns[row * layout.d_out()..][range.clone()]);
        }
    }
    words
}

/// Reorders words in tiles into those of a GPTQ file: the inverse of [`columns_to_tiles`].
///
/// # Shapes
/// - `words`: [`Layout::words_shape`]
/// - result: `[word_rows, d_out]`, row by row
///
/// # Panics
/// If the length of `words` is not the layout's.
pub fn tiles_to_columns(words: &[u32], layout: &Layout) -> Vec<u32> {
    let [n_tiles, word_rows, _] = layout.words_shape();
    assert_eq!(
        words.len(),
        n_tiles * word_rows * TILE,
        "the number of words"
    );
    let mut columns = zeroed(word_rows * layout.d_out());
    for (tile, words) in words.chunks_exact(word_rows * TILE).enumerate() {
        let range = layout.columns(tile);
        for (row, words) in words.chunks_exact(TILE).enumerate() {
            columns[row * layout.d_out()..][range.clone()].copy_from_slice(&words[..range.len()]);
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Levels;

    /// The words that GPTQ's packer writes for these codes.
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
