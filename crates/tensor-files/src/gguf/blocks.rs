use half::f16;

use super::BlockType;

/// The values of a block.
const BLOCK: usize = 32;

/// Codes in blocks of 32, each block with one scale: `d (q - center)`, or `d q + m` with minimums.
///
/// # Examples
/// ```
/// use tensor_files::gguf::{BlockType, Blocks};
///
/// let blocks = Blocks {
///     codes: (0..32).map(|i| i % 16).collect(),
///     scales: vec![0.5],
///     offset: Offset::Minimums(vec![-1.0]),
/// };
/// # use tensor_files::gguf::Offset;
/// let bytes = blocks.to_bytes(BlockType::Q4_1);
/// assert_eq!(BlockType::Q4_1.blocks(&bytes), Some(blocks));
/// assert_eq!(BlockType::Q4_1.values(&bytes)[..3], [-1.0, -0.5, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// The codes in the order of the values, from 0.
    pub codes: Vec<u8>,
    /// `d` of each block, an `f16` in files.
    pub scales: Vec<f32>,
    /// Where the levels of a block lie.
    pub offset: Offset,
}

/// Where the levels of [`Blocks`] lie.
#[derive(Clone, Debug, PartialEq)]
pub enum Offset {
    /// The code of the level 0.
    Center(u8),
    /// `m` of each block, an `f16` in files.
    Minimums(Vec<f32>),
}

/// The structure of a type with one scale a block: the bits of a code, and the code of the level 0 unless
/// blocks have minimums.
fn structure(of: BlockType) -> Option<(usize, Option<u8>)> {
    match of {
        BlockType::Q4_0 => Some((4, Some(8))),
        BlockType::Q4_1 => Some((4, None)),
        BlockType::Q5_0 => Some((5, Some(16))),
        BlockType::Q5_1 => Some((5, None)),
        BlockType::Q8_0 => Some((8, Some(128))),
        _ => None,
    }
}

impl BlockType {
    /// The code of the level 0 in blocks with one scale and no minimum.
    pub fn center(self) -> Option<u8> {
        structure(self)?.1
    }
}

impl Blocks {
    /// Reads blocks of a type; `None` unless it has one scale a block.
    pub(super) fn read(of: BlockType, bytes: &[u8]) -> Option<Self> {
        let (bits, center) = structure(of)?;
        let n_bytes = of.n_bytes(BLOCK)?;
        let n_blocks = bytes.len() / n_bytes;
        let mut codes = Vec::with_capacity(n_blocks * BLOCK);
        let mut scales = Vec::with_capacity(n_blocks);
        let mut minimums = Vec::new();
        for block in bytes.chunks_exact(n_bytes) {
            let (scale, mut rest) = half(block);
            scales.push(scale);
            if center.is_none() {
                let (minimum, after) = half(rest);
                minimums.push(minimum);
                rest = after;
            }
            let mut fifth = 0;
            if bits == 5 {
                let (of_all, after) = rest.split_at(4);
                fifth = u32::from_le_bytes(of_all.try_into().expect("four bytes"));
                rest = after;
            }
            match bits {
                // Signed bytes.
                8 => codes.extend(rest.iter().map(|&code| code ^ 0x80)),
                // The first half of a block is in the low halves of the bytes.
                _ => {
                    let bit = |at: usize| ((fifth >> at & 1) as u8) << 4;
                    let low = rest.iter().zip(0..);
                    codes.extend(low.map(|(&byte, at)| byte & 0x0F | bit(at)));
                    let high = rest.iter().zip(BLOCK / 2..);
                    codes.extend(high.map(|(&byte, at)| byte >> 4 | bit(at)));
                }
            }
        }
        Some(Self {
            codes,
            scales,
            offset: center.map_or(Offset::Minimums(minimums), Offset::Center),
        })
    }

    /// The bytes of the blocks. Scales and minimums are rounded to the nearest `f16`.
    ///
    /// # Panics
    /// If the type has other blocks, a code has more bits than its codes, or lengths differ.
    pub fn to_bytes(&self, of: BlockType) -> Vec<u8> {
        let (bits, center) = structure(of).expect("a type with one scale a block");
        let minimums = match &self.offset {
            Offset::Center(found) => {
                assert_eq!(Some(*found), center, "the code of the level 0 of {of}");
                None
            }
            Offset::Minimums(minimums) => {
                assert!(center.is_none(), "{of} has no minimums");
                assert_eq!(minimums.len(), self.scales.len(), "the number of minimums");
                Some(minimums)
            }
        };
        let n_blocks = self.scales.len();
        assert_eq!(self.codes.len(), n_blocks * BLOCK, "the number of codes");
        let highest = ((1u32 << bits) - 1) as u8;
        assert!(
            self.codes.iter().all(|&code| code <= highest),
            "a code above {highest}"
        );
        let mut bytes = Vec::with_capacity(of.n_bytes(self.codes.len()).unwrap_or(0));
        for (at, codes) in self.codes.chunks_exact(BLOCK).enumerate() {
            bytes.extend(f16::from_f32(self.scales[at]).to_le_bytes());
            if let Some(minimums) = minimums {
                bytes.extend(f16::from_f32(minimums[at]).to_le_bytes());
            }
            if bits == 5 {
                let fifth = codes.iter().rev();
                let fifth = fifth.fold(0u32, |bits, &code| bits << 1 | u32::from(code >> 4));
                bytes.extend(fifth.to_le_bytes());
            }
            match bits {
                8 => bytes.extend(codes.iter().map(|&code| code ^ 0x80)),
                _ => {
                    let (low, high) = codes.split_at(BLOCK / 2);
                    let pairs = low.iter().zip(high);
                    bytes.extend(pairs.map(|(&low, &high)| low & 0x0F | high << 4));
                }
            }
        }
        bytes
    }

    /// The values.
    pub fn values(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.codes.len());
        for (at, codes) in self.codes.chunks_exact(BLOCK).enumerate() {
            let scale = self.scales[at];
            match &self.offset {
                Offset::Minimums(minimums) => {
                    let minimum = minimums[at];
                    values.extend(codes.iter().map(|&q| scale * f32::from(q) + minimum));
                }
                Offset::Center(center) => {
                    let level = |&q: &u8| f32::from(i16::from(q) - i16::from(*center));
                    values.extend(codes.iter().map(|q| scale * level(q)));
                }
            }
        }
        values
    }
}

fn half(bytes: &[u8]) -> (f32, &[u8]) {
    let (half, rest) = bytes.split_at(2);
    let half = f16::from_le_bytes(half.try_into().expect("two bytes"));
    (half.to_f32(), rest)
}
