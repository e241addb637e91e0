//! Zero-points, packed along the outputs.

use super::super::kind::GptqVersion;
use super::super::packing::{pack, transpose, unpack};

/// The representation of zero-points in `qzeros`.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Zeros {
    pub(in super::super) bits: usize,
    pub(in super::super) version: GptqVersion,
    pub(in super::super) wrapping: Wrapping,
}

/// The result of storing a zero-point of 0 minus one.
///
/// GPTQModel subtracts a word of ones from a packed word, so that the field borrows from the next;
/// 3-bit codes, which cross words, it subtracts one by one. AutoGPTQ subtracts first and packs the
/// wrapped integers with OR, which sets all higher fields of the word. Others mask each field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum Wrapping {
    /// The field borrows from the next one of its word, which has so many bytes.
    Words(usize),
    /// The field wraps to the highest code.
    Fields,
    /// The program that wrote the checkpoint is not known.
    Unknown,
}

impl Zeros {
    /// Unpacks the zero-points in `qzeros`, `[n_groups, d_out]`.
    ///
    /// Fails with the group and the output of a zero-point that is ambiguous.
    pub(in super::super) fn unpack(
        self,
        qzeros: &[u32],
        n_groups: usize,
    ) -> Result<Vec<u8>, (usize, usize)> {
        if self.version == GptqVersion::V2 {
            return Ok(self.stored(qzeros, n_groups));
        }
        if let Wrapping::Words(n_bytes) = self.wrapping {
            return Ok(self.stored(&plus_ones(qzeros, self.bits, n_bytes), n_groups));
        }
        let (bits, highest) = (self.bits, u8::MAX >> (8 - self.bits));
        let stored = self.stored(qzeros, n_groups);
        if self.wrapping == Wrapping::Unknown {
            // A zero-point of 0 is stored as the highest code, whoever wrote it, unless the field
            // before it borrowed, of which the first in a word is again the highest code. So
            // without that code nothing wrapped; and at the end of a word there is nothing that it
            // could have changed. Anywhere else the fields after it depend on the writer.
            let d_out = stored.len() / n_groups;
            let ends_word = |o: usize| o * bits % 32 + bits >= 32;
            let mut all = stored.iter().enumerate();
            if let Some((at, _)) =
                all.find(|&(at, &code)| code == highest && !ends_word(at % d_out))
            {
                return Err((at / d_out, at % d_out));
            }
        }
        let zeros = stored.iter().map(|code| code.wrapping_add(1) & highest);
        Ok(zeros.collect())
    }

    /// Packs `zeros`, `[n_groups, d_out]`, into `qzeros`.
    pub(super) fn pack(self, zeros: &[u8], [n_groups, d_out]: [usize; 2]) -> Vec<u32> {
        let less = u8::from(self.version == GptqVersion::V1);
        let stored: Vec<u8> = zeros.iter().map(|zero| zero - less).collect();
        let words = pack(&transpose(&stored, [n_groups, d_out]), n_groups, self.bits);
        transpose(&words, [words.len() / n_groups, n_groups])
    }

    /// The fields of `qzeros`, `[n_groups, d_out]`.
    fn stored(self, qzeros: &[u32], n_groups: usize) -> Vec<u8> {
        fields(qzeros, n_groups, self.bits)
    }
}

/// The version of a checkpoint whose zero-points are all in the middle of the codes, which these `qzeros`
/// are, if they are such.
pub(super) fn version_of_middles(
    qzeros: &[u32],
    n_groups: usize,
    bits: usize,
) -> Option<GptqVersion> {
    let middle = 1 << (bits - 1);
    let stored = fields(qzeros, n_groups, bits);
    let (first, _) = stored.split_first()?;
    if stored.iter().any(|code| code != first) {
        return None;
    }
    match *first {
        code if code == middle => Some(GptqVersion::V2),
        code if code + 1 == middle => Some(GptqVersion::V1),
        _ => None,
    }
}

fn fields(qzeros: &[u32], n_groups: usize, bits: usize) -> Vec<u8> {
    let n_words = qzeros.len() / n_groups;
    let fields = unpack(&transpose(qzeros, [n_groups, n_words]), n_groups, bits);
    transpose(&fields, [fields.len() / n_groups, n_groups])
}

/// Adds a word of ones to each word of `n_bytes`.
fn plus_ones(words: &[u32], bits: usize, n_bytes: usize) -> Vec<u32> {
    let ones = u64::MAX / ((1 << bits) - 1);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let sums = bytes.chunks(n_bytes).flat_map(|word| {
        let mut wide = [0; 8];
        wide[..word.len()].copy_from_slice(word);
        let sum = u64::from_le_bytes(wide).wrapping_add(ones).to_le_bytes();
        sum.into_iter().take(word.len())
    });
    let sums: Vec<u8> = sums.collect();
    let (words, _) = sums.as_chunks::<4>();
    words.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middles_have_one_reading() {
        for bits in [2, 3, 4, 8] {
            let middle = 1u8 << (bits - 1);
            let of = |code: u8, other: u8| {
                let mut codes = vec![code; 2 * 32];
                codes[40] = other;
                let words = pack(&transpose(&codes, [2, 32]), 2, bits);
                let qzeros = transpose(&words, [words.len() / 2, 2]);
                version_of_middles(&qzeros, 2, bits)
            };
            let (v1, v2) = (Some(GptqVersion::V1), Some(GptqVersion::V2));
            assert_eq!(of(middle, middle), v2);
            assert_eq!(of(middle - 1, middle - 1), v1);
            assert_eq!(of(middle, middle - 1), None);
            assert_eq!(of(0, 0), None);
        }
    }

    #[test]
    fn words_of_any_width_borrow_within_themselves() {
        // A zero-point of 0 at the start of a word of 16 bits, and of one of 32.
        let of = |n_bytes, word: u32| {
            let zeros = Zeros {
                bits: 4,
                version: GptqVersion::V1,
                wrapping: Wrapping::Words(n_bytes),
            };
            zeros.unpack(&[word, 0x7777_7777], 1).unwrap()[..8].to_vec()
        };
        assert_eq!(of(4, 0x7777_7776_u32), [7, 8, 8, 8, 8, 8, 8, 8]);
        // 0x8880 - 0x1111 within 16 bits, twice.
        assert_eq!(of(2, 0x776F_776F), [0, 8, 8, 8, 0, 8, 8, 8]);
        // The last field of a word borrows from nothing: 0x0888 - 0x1111.
        assert_eq!(of(2, 0xF777_F777), [8, 8, 8, 0, 8, 8, 8, 0]);
        assert_eq!(of(1, 0xF7F7_F7F7), [8, 0, 8, 0, 8, 0, 8, 0]);
        assert_eq!(of(8, 0x7777_776F), [0, 8, 8, 8, 8, 8, 8, 8]);
    }
}
