use std::fmt;

use half::{bf16, f16};

use super::blocks::Blocks;
use super::k_quants;

/// The type of a tensor: floats, or blocks of codes with their scales.
///
/// # Examples
/// ```
/// use tensor_files::gguf::BlockType;
///
/// assert_eq!(BlockType::Q4_1.n_bytes(64), Some(2 * 20));
/// assert_eq!(BlockType::Q4_1.n_bytes(65), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, reason = "the names of llama.cpp")]
pub enum BlockType {
    /// Floats of 32 bits.
    F32,
    /// Floats of 16 bits.
    F16,
    /// Floats of 16 bits, 8 of them of exponent.
    BF16,
    /// `d (q - 8)`, 4 bits, blocks of 32.
    Q4_0,
    /// `d q + m`, 4 bits, blocks of 32.
    Q4_1,
    /// `d (q - 16)`, 5 bits, blocks of 32.
    Q5_0,
    /// `d q + m`, 5 bits, blocks of 32.
    Q5_1,
    /// `d q`, signed 8 bits, blocks of 32.
    Q8_0,
    /// 2 bits in 16 groups of 16, scales and minimums of 4 bits, blocks of 256.
    Q2_K,
    /// 3 bits in 16 groups of 16, scales of 6 bits, blocks of 256.
    Q3_K,
    /// 4 bits in 8 groups of 32, scales and minimums of 6 bits, blocks of 256.
    Q4_K,
    /// 5 bits in 8 groups of 32, scales and minimums of 6 bits, blocks of 256.
    Q5_K,
    /// 6 bits in 16 groups of 16, scales of 8 bits, blocks of 256.
    Q6_K,
}

use BlockType::*;

/// A row for each type: its number in files, its name, the values and the bytes of a block.
const TYPES: [(BlockType, u32, &str, usize, usize); 13] = [
    (F32, 0, "F32", 1, 4),
    (F16, 1, "F16", 1, 2),
    (Q4_0, 2, "Q4_0", 32, 18),
    (Q4_1, 3, "Q4_1", 32, 20),
    (Q5_0, 6, "Q5_0", 32, 22),
    (Q5_1, 7, "Q5_1", 32, 24),
    (Q8_0, 8, "Q8_0", 32, 34),
    (Q2_K, 10, "Q2_K", k_quants::BLOCK, 84),
    (Q3_K, 11, "Q3_K", k_quants::BLOCK, 110),
    (Q4_K, 12, "Q4_K", k_quants::BLOCK, 144),
    (Q5_K, 13, "Q5_K", k_quants::BLOCK, 176),
    (Q6_K, 14, "Q6_K", k_quants::BLOCK, 210),
    (BF16, 30, "BF16", 1, 2),
];

/// Types that are not read, by their numbers.
const OTHERS: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl BlockType {
    /// All types.
    pub fn all() -> impl Iterator<Item = Self> {
        TYPES.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (BlockType, u32, &'static str, usize, usize) {
        let row = TYPES.iter().find(|row| row.0 == self);
        row.expect("each type has a row")
    }

    /// The type of a number in a file.
    ///
    /// # Errors
    /// The name of a type that is not read.
    pub(super) fn of_id(id: u32) -> Result<Self, String> {
        match TYPES.iter().find(|row| row.1 == id) {
            Some(row) => Ok(row.0),
            None => Err(match OTHERS.iter().find(|(other, _)| *other == id) {
                Some((_, name)) => (*name).into(),
                None => format!("number {id}"),
            }),
        }
    }

    /// The number in files, `ggml_type` of ggml.
    pub(super) fn id(self) -> u32 {
        self.row().1
    }

    /// The number of values of a block, which lie in one row.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// The bytes of so many values; `None` if they are no whole number of blocks, or too many.
    pub fn n_bytes(self, n_values: usize) -> Option<usize> {
        let &(_, _, _, len, bytes) = self.row();
        let n_blocks = n_values.is_multiple_of(len).then_some(n_values / len)?;
        n_blocks.checked_mul(bytes)
    }

    /// The codes, scales and minimums of blocks, where each block has one of them; `None` for other types.
    ///
    /// # Panics
    /// If `bytes` are no whole number of blocks.
    pub fn blocks(self, bytes: &[u8]) -> Option<Blocks> {
        self.check(bytes);
        Blocks::read(self, bytes)
    }

    /// The values, in the arithmetic of the Python package `gguf`.
    ///
    /// # Panics
    /// If `bytes` are no whole number of blocks.
    pub fn values(self, bytes: &[u8]) -> Vec<f32> {
        self.check(bytes);
        match self {
            F32 => read_each(bytes, f32::from_le_bytes),
            F16 => read_each(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
            BF16 => read_each(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => {
                let blocks = Blocks::read(self, bytes);
                blocks.expect("a type with one scale a block").values()
            }
            Q2_K => k_quants::values(bytes, k_quants::q2),
            Q3_K => k_quants::values(bytes, k_quants::q3),
            Q4_K => k_quants::values(bytes, k_quants::q4),
            Q5_K => k_quants::values(bytes, k_quants::q5),
            Q6_K => k_quants::values(bytes, k_quants::q6),
        }
    }

    /// The bytes of floats, rounded to nearest; `None` for types of blocks.
    pub fn floats(self, values: &[f32]) -> Option<Vec<u8>> {
        let values = values.iter();
        Some(match self {
            F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            F16 => values
                .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                .collect(),
            BF16 => values
                .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
                .collect(),
            _ => return None,
        })
    }

    fn check(self, bytes: &[u8]) {
        let &(_, _, _, _, n) = self.row();
        assert!(
            bytes.len().is_multiple_of(n),
            "{} bytes are no whole number of blocks of {n}",
            bytes.len()
        );
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.row().2)
    }
}

fn read_each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|&chunk| read(chunk)).collect()
}
