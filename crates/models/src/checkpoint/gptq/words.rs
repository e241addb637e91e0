//! Packed tensors of integers of any width, as words of 32 bits: int32 is what all programs write, and GPTQModel
//! has others (`pack_dtype`).

use super::super::tensors::Stored;
use crate::Result;

/// The bytes of the integers of a packed tensor.
pub(super) fn word_bytes(stored: &Stored) -> Result<usize, String> {
    match stored.dtype.as_str() {
        "I8" | "U8" => Ok(1),
        "I16" | "U16" => Ok(2),
        "I32" | "U32" => Ok(4),
        "I64" | "U64" => Ok(8),
        other => Err(format!("is {other}, not of integers")),
    }
}

/// The words of 32 bits of a tensor that is packed along its rows.
pub(super) fn row_words(stored: &Stored) -> Result<Vec<u32>, String> {
    word_bytes(stored)?;
    let row = stored.bytes.len() / stored.shape[0].max(1);
    let (words, _) = stored.bytes.as_chunks::<4>();
    match row.is_multiple_of(4) {
        true => Ok(words.iter().map(|&word| u32::from_le_bytes(word)).collect()),
        false => Err(format!(
            "has rows of {row} bytes, which are no words of 32 bits"
        )),
    }
}

/// The words of 32 bits of a tensor that is packed along its columns: each is one stream of bits, whatever
/// the integers.
pub(super) fn column_words(stored: &Stored) -> Result<Vec<u32>, String> {
    let (size, n_columns) = (word_bytes(stored)?, stored.shape[1]);
    let mut words = vec![0; stored.bytes.len() / 4];
    for (at, &byte) in stored.bytes.iter().enumerate() {
        let (element, in_element) = (at / size, at % size);
        let (row, column) = (element / n_columns, element % n_columns);
        let byte_row = row * size + in_element;
        words[byte_row / 4 * n_columns + column] |= u32::from(byte) << (byte_row % 4 * 8);
    }
    Ok(words)
}

/// Checks the shape of a packed tensor whose words of 32 bits have the shape `[rows, columns]`, and that are
/// packed along one of the two.
pub(super) fn check_shape(
    stored: &Stored,
    expected: [usize; 2],
    along: usize,
) -> Result<(), String> {
    let size = word_bytes(stored)?;
    let mut bytes = expected;
    bytes[along] = expected[along] * 4;
    let mut found = stored.shape;
    found[along] = found[along].saturating_mul(size);
    if found == bytes {
        return Ok(());
    }
    let mut expected = bytes;
    expected[along] /= size;
    let found = stored.shape;
    Err(format!(
        "has the shape {found:?}, the configuration asks for {expected:?}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same bits in integers of each width, packed along the rows of `[2, 2]` words and along the columns.
    #[test]
    fn integers_of_any_width_hold_the_same_words() {
        let words = [0x0403_0201_u32, 0x1413_1211, 0x2423_2221, 0x3433_3231];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let stored = |dtype: &str, shape, bytes: &[u8]| Stored {
            bytes: bytes.into(),
            shape,
            dtype: dtype.into(),
        };
        for (dtype, size) in [("I8", 1), ("U16", 2), ("I32", 4), ("I64", 8)] {
            let rows = stored(dtype, [2, 8 / size], &bytes);
            check_shape(&rows, [2, 2], 1).unwrap();
            assert_eq!(row_words(&rows).unwrap(), words);
            // Column after column: the bytes of a column are those of words 0 and 2, and of 1 and 3.
            let mut by_columns = Vec::new();
            let column = |at: usize| [words[at], words[at + 2]].map(u32::to_le_bytes).concat();
            let columns = [column(0), column(1)];
            for row in 0..8 / size {
                for column in &columns {
                    by_columns.extend(&column[row * size..][..size]);
                }
            }
            let columns = stored(dtype, [8 / size, 2], &by_columns);
            check_shape(&columns, [2, 2], 0).unwrap();
            assert_eq!(column_words(&columns).unwrap(), words);
        }
        let found = check_shape(&stored("I16", [4, 3], &[0; 24]), [2, 2], 0);
        let problem = "has the shape [4, 3], the configuration asks for [4, 2]";
        assert_eq!(found.unwrap_err(), problem);
        let found = word_bytes(&stored("F16", [2, 2], &bytes[..8]));
        assert_eq!(found.unwrap_err(), "is F16, not of integers");
    }
}
