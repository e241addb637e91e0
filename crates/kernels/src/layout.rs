//! The shape of a packed weight and the position of each code in its words.

use std::ops::Range;

/// The number of columns in a tile of words.
pub const TILE: usize = 64;

/// The number of levels in a table; codes of fewer than 4 bits use the first `2^bits`.
pub const TABLE: usize = 16;

/// The number that a code of `bits` bits represents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// The code itself, `0 ..= 2^bits - 1`.
    Unsigned,
    /// The code minus `2^(bits - 1)`: half of the levels are negative.
    Centered,
    /// The entry of a table at the code, for codes of up to 4 bits.
    Table([f32; TABLE]),
}

/// The shape of a packed weight `[d_in, d_out]` and the position of each code in its words.
///
/// Each column is a separate stream of bits along `d_in`, lowest bits first; its last word is padded
/// with zeros. The rows of words are those of GPTQ's `qweight`, `[d_in * bits / 32, d_out]`. In memory
/// they are stored in tiles of [`TILE`] columns, `[n_tiles, word_rows, TILE]`, which a product reads
/// from the first word to the last. The columns that pad the last tile are zero.
///
/// # Examples
/// ```
/// use kernels::{Layout, Levels};
///
/// let layout = Layout::new(100, 3, 4, 32, Levels::Unsigned);
/// assert_eq!(layout.n_groups(), 4);
/// assert_eq!(layout.grid_shape(), [4, 3]);
/// assert_eq!(layout.words_shape(), [1, 13, 64]);
/// ```
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
    /// If a size is zero, `bits` is not 2, 3, 4 or 8, `levels` is a table and `bits` is 8, or
    /// `d_in * bits` overflows `usize`.
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
            "a table has {TABLE} levels, too few for codes of {bits} bits"
        );
        assert!(group_size > 0, "a group size of 0");
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

    /// The number of inputs, the rows of the weight.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// The number of outputs, the columns of the weight.
    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// The number of bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The number of consecutive inputs that share a scale.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// The number of groups along the inputs, including a shorter last one.
    pub fn n_groups(&self) -> usize {
        self.d_in.div_ceil(self.group_size)
    }

    /// The number of words in a column.
    pub fn word_rows(&self) -> usize {
        (self.d_in * self.bits).div_ceil(32)
    }

    /// The number of tiles of [`TILE`] columns, including an incomplete last one.
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

    /// The levels that codes represent.
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// The level of a code.
    ///
    /// # Panics
    /// If the levels are a table and the code is not below [`TABLE`].
    pub fn level(&self, code: u8) -> f32 {
        match self.levels {
            Levels::Table(table) => table[usize::from(code)],
            _ => f32::from(code) - self.center(),
        }
    }

    /// The number subtracted from a code to get its level; 0 for a table.
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

    /// The row of words and the bit at which the code of input `i` begins.
    pub(crate) fn position(&self, i: usize) -> (usize, u32) {
        let bit = i * self.bits;
        (bit / 32, (bit % 32) as u32)
    }

    /// Whether a code that begins at bit `shift` continues in the next word.
    pub(crate) fn straddles(&self, shift: u32) -> bool {
        shift as usize + self.bits > 32
    }

    /// The columns of the weight in tile `tile`.
    pub(crate) fn columns(&self, tile: usize) -> Range<usize> {
        tile * TILE..self.d_out.min((tile + 1) * TILE)
    }

    /// The codes of input `i` in the columns of a tile with the words `[word_rows, TILE]`.
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
