//! Codes in words of 32 bits, where no [`quant_core::Layout`] applies: each lane a bit stream,
//! lowest bits first.

/// Packs codes `[n, lanes]`, row by row, into words `[n * bits / 32, lanes]`, rounded up.
pub(super) fn pack(codes: &[u8], lanes: usize, bits: usize) -> Vec<u32> {
    let n = codes.len() / lanes;
    let mut words = vec![0; (n * bits).div_ceil(32) * lanes];
    for (i, row) in codes.chunks_exact(lanes).enumerate() {
        let (word, shift) = (i * bits / 32, i * bits % 32);
        for (word, &code) in words[word * lanes..].iter_mut().zip(row) {
            *word |= u32::from(code) << shift;
        }
        if shift + bits > 32 {
            for (word, &code) in words[(word + 1) * lanes..].iter_mut().zip(row) {
                *word |= u32::from(code) >> (32 - shift);
            }
        }
    }
    words
}

/// The codes in words, `[n, lanes]`: the inverse of [`pack`] where the last word is full.
pub(super) fn unpack(words: &[u32], lanes: usize, bits: usize) -> Vec<u8> {
    let n = words.len() / lanes * 32 / bits;
    let mask = (1 << bits) - 1;
    let mut codes = vec![0; n * lanes];
    for (i, row) in codes.chunks_exact_mut(lanes).enumerate() {
        let (word, shift) = (i * bits / 32, i * bits % 32);
        for (code, &word) in row.iter_mut().zip(&words[word * lanes..]) {
            *code = ((word >> shift) & mask) as u8;
        }
        if shift + bits > 32 {
            for (code, &word) in row.iter_mut().zip(&words[(word + 1) * lanes..]) {
                *code |= ((word << (32 - shift)) & mask) as u8;
            }
        }
    }
    codes
}

/// The transpose of `rows` by `columns`, block by block.
pub(super) fn transpose<T: Copy + Default>(values: &[T], [rows, columns]: [usize; 2]) -> Vec<T> {
    const BLOCK: usize = 32;
    let mut out = vec![T::default(); values.len()];
    for first_row in (0..rows).step_by(BLOCK) {
        for first_column in (0..columns).step_by(BLOCK) {
            for row in first_row..rows.min(first_row + BLOCK) {
                for column in first_column..columns.min(first_column + BLOCK) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words that the packer of GPTQ wrote.
    #[test]
    fn words_are_gptqs() {
        let codes: Vec<u8> = (0..8).collect();
        assert_eq!(pack(&codes, 1, 4), [0x7654_3210]);
        let codes: Vec<u8> = (0..32).map(|i| i % 8).collect();
        let words = [0x88FA_C688, 0xC688_FAC6, 0xFAC6_88FA];
        assert_eq!(pack(&codes, 1, 3), words);
        assert_eq!(unpack(&words, 1, 3), codes);
    }

    #[test]
    fn unpacking_undoes_packing_in_every_lane() {
        for bits in [2, 3, 4, 8] {
            let codes: Vec<u8> = (0..64 * 5u32)
                .map(|k| (k * k % 251 % (1 << bits)) as u8)
                .collect();
            assert_eq!(
                unpack(&pack(&codes, 5, bits), 5, bits),
                codes,
                "{bits} bits"
            );
        }
    }
}
