use burn::tensor::{Device, Tensor, TensorData};
use peft::Batch;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{Error, Example, Result};

#[cfg(test)]
mod tests;

/// A row of tokens: one or more texts, then padding.
///
/// A text does not attend to the text before it: token `i` attends to tokens `starts[i]` to `i`, and
/// its position is `i - starts[i]`. Each token of padding is a text of its own without a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The tokens, padding included.
    pub tokens: Vec<u32>,
    /// Whether each token is a target; the first token of a text is not.
    pub is_target: Vec<bool>,
    /// The index in the row at which the text of each token begins.
    pub starts: Vec<usize>,
    /// The number of tokens before the padding.
    pub n_text: usize,
}

impl Row {
    fn with_capacity(seq_len: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(seq_len),
            is_target: Vec::with_capacity(seq_len),
            starts: Vec::with_capacity(seq_len),
            n_text: 0,
        }
    }

    fn push(&mut self, tokens: &[u32], is_target: &[bool]) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.is_target.extend_from_slice(is_target);
        self.starts.resize(self.tokens.len(), start);
        self.n_text = self.tokens.len();
    }

    fn pad(&mut self, seq_len: usize, padding: u32) {
        self.tokens.resize(seq_len, padding);
        self.is_target.resize(seq_len, false);
        // Each is a text of its own, so that padding is never longer than the model's positions.
        self.starts.extend(self.n_text..seq_len);
    }
}

/// Packs examples into rows of `seq_len` tokens by first-fit decreasing.
///
/// An example is never split. Rows are padded with the token `padding` and shuffled with `seed`.
/// There are at most twice as many rows as the tokens would fill, and at most 11/9 of the optimum plus
/// 6/9 (Dósa 2007).
///
/// # Errors
/// [`Error::LongExample`] if an example is longer than a row.
///
/// # Examples
/// ```
/// use instruct::{Error, Example, pack};
///
/// let example = |len| Example::new(vec![7; len], vec![true; len]);
/// let examples = [example(3), example(2), example(4)];
/// let rows = pack(&examples, 5, 0, 0)?;
/// assert_eq!(rows.len(), 2);
///
/// let error = pack(&examples, 3, 0, 0).unwrap_err();
/// assert!(matches!(error, Error::LongExample { example: 2, n_tokens: 4, seq_len: 3 }));
/// # Ok::<(), instruct::Error>(())
/// ```
pub fn pack(examples: &[Example], seq_len: usize, padding: u32, seed: u64) -> Result<Vec<Row>> {
    check(examples, seq_len)?;
    let mut order: Vec<&Example> = examples.iter().filter(|e| !e.tokens().is_empty()).collect();
    // Stable: examples of one length keep their order.
    order.sort_by_key(|example| std::cmp::Reverse(example.tokens().len()));
    let mut space = Space::new(order.len(), seq_len);
    let mut rows: Vec<Row> = Vec::new();
    for example in order {
        let at = space.take(example.tokens().len());
        if at == rows.len() {
            rows.push(Row::with_capacity(seq_len));
        }
        rows[at].push(example.tokens(), example.is_target());
    }
    for row in &mut rows {
        row.pad(seq_len, padding);
    }
    rows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    Ok(rows)
}

/// Shuffles examples with `seed` into batches of rows with one example each.
///
/// The rows of a batch are padded at their ends with the token `padding`, to `seq_len` tokens or, if it
/// is none, to the longest of them. The last batch may have fewer than `batch_size` rows.
///
/// # Errors
/// [`Error::LongExample`] if an example is longer than `seq_len`.
///
/// # Panics
/// If `batch_size` is 0.
pub fn pad(
    examples: &[Example],
    batch_size: usize,
    seq_len: Option<usize>,
    padding: u32,
    seed: u64,
) -> Result<Vec<Vec<Row>>> {
    check(examples, seq_len.unwrap_or(usize::MAX))?;
    let mut order: Vec<&Example> = examples.iter().filter(|e| !e.tokens().is_empty()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let batch = |examples: &[&Example]| {
        let longest = examples.iter().map(|example| example.tokens().len()).max();
        let seq_len = seq_len.or(longest).unwrap_or(0);
        let row = |example: &&Example| {
            let mut row = Row::with_capacity(seq_len);
            row.push(example.tokens(), example.is_target());
            row.pad(seq_len, padding);
            row
        };
        examples.iter().map(row).collect()
    };
    Ok(order.chunks(batch_size).map(batch).collect())
}

/// Moves rows of one length to a device as a batch.
///
/// # Errors
/// [`peft::Error::EmptyBatch`] unless there is a row of two tokens; [`peft::Error::NoTargets`] if the
/// rows have no target; [`peft::Error::Spans`] if `starts` and `n_text` contradict each other;
/// [`Error::Token`] for a token of no vocabulary.
///
/// # Panics
/// If the rows have different lengths.
pub fn batch(rows: &[Row], device: &Device) -> Result<Batch> {
    let seq = rows.first().map_or(0, |row| row.tokens.len());
    assert!(
        rows.iter().all(|row| row.tokens.len() == seq),
        "rows of one length"
    );
    let tokens = rows.iter().flat_map(|row| &row.tokens);
    // A device's integers may have 32 bits, and a model compares tokens with its vocabulary there.
    let token = |&token: &u32| i32::try_from(token).map_err(|_| Error::Token { token });
    let tokens: Vec<i32> = tokens.map(token).collect::<Result<_>>()?;
    let tokens = TensorData::new(tokens, [rows.len(), seq]);
    let starts: Vec<usize> = rows.iter().flat_map(|row| row.starts.clone()).collect();
    let is_target: Vec<bool> = rows.iter().flat_map(|row| row.is_target.clone()).collect();
    let is_text = rows
        .iter()
        .flat_map(|row| (0..seq).map(|at| at < row.n_text));
    let is_text: Vec<bool> = is_text.collect();
    Ok(Batch::new(Tensor::from_data(tokens, device))?
        .with_starts(&starts)?
        .with_padding(&is_text)?
        .with_targets(&is_target)?)
}

fn check(examples: &[Example], seq_len: usize) -> Result<()> {
    let is_long = |example: &Example| example.tokens().len() > seq_len;
    examples.iter().position(is_long).map_or(Ok(()), |example| {
        Err(Error::LongExample {
            example,
            n_tokens: examples[example].tokens().len(),
            seq_len,
        })
    })
}

/// The space that is left in each row, as a segment tree.
///
/// The leaves are the rows. Node `i` has the children `2 i` and `2 i + 1`, and holds the largest space
/// of the rows below it, so that the first row with enough space is found in logarithmic time.
struct Space {
    most: Vec<usize>,
    n_leaves: usize,
}

impl Space {
    fn new(n_rows: usize, seq_len: usize) -> Self {
        let n_leaves = n_rows.next_power_of_two();
        Self {
            most: vec![seq_len; 2 * n_leaves],
            n_leaves,
        }
    }

    /// Takes `len` from the first row with enough space, of which there must be one.
    fn take(&mut self, len: usize) -> usize {
        let mut node = 1;
        while node < self.n_leaves {
            node *= 2;
            node += usize::from(self.most[node] < len);
        }
        let row = node - self.n_leaves;
        self.most[node] -= len;
        while node > 1 {
            node /= 2;
            self.most[node] = self.most[2 * node].max(self.most[2 * node + 1]);
        }
        row
    }
}
