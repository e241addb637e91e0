use burn::tensor::{Device, Tensor, TensorData};
use peft::Batch;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{Error, Example, Result};

#[cfg(test)]
mod tests;

/// One or more texts in a row of tokens, and perhaps padding.
///
/// A text must not attend to the one before it: token `i` sees those from `starts[i]` to itself,
/// and its position is `i - starts[i]`. Each token of padding is one more text, of which nothing is
/// learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Whether each is to be predicted from those before it; never the first of a text.
    pub is_target: Vec<bool>,
    /// For each token, where in the row its text begins.
    pub starts: Vec<usize>,
    /// Tokens before the padding.
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

    fn pad(&mut self, seq_len: usize, filler: u32) {
        self.tokens.resize(seq_len, filler);
        self.is_target.resize(seq_len, false);
        // Each its own text: however many there are, they are no long one.
        self.starts.extend(self.n_text..seq_len);
    }
}

/// Examples in as few rows of `seq_len` tokens as first-fit decreasing finds.
///
/// An example is never cut. Rows are filled up with `filler`, and come in an order drawn with
/// `seed`. There are at most twice as many as their tokens would fill (and 11/9 of the fewest,
/// and 6/9: Dósa 2007).
///
/// # Errors
/// [`Error::LongExample`] if an example does not fit a row.
pub fn pack(examples: &[Example], seq_len: usize, filler: u32, seed: u64) -> Result<Vec<Row>> {
    check(examples, seq_len)?;
    let mut order: Vec<&Example> = examples.iter().filter(|e| !e.tokens().is_empty()).collect();
    // Stable: examples of one length stay in their order.
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
        row.pad(seq_len, filler);
    }
    rows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    Ok(rows)
}

/// Examples in batches of rows with one example each, in an order drawn with `seed`.
///
/// The rows of a batch are filled up at their ends with `filler`, to the longest of them or, if it
/// is given, to `seq_len` tokens. The last batch may have fewer than `batch_size` rows.
///
/// # Errors
/// [`Error::LongExample`] if an example does not fit `seq_len`.
///
/// # Panics
/// If `batch_size` is 0.
pub fn pad(
    examples: &[Example],
    batch_size: usize,
    seq_len: Option<usize>,
    filler: u32,
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
            row.pad(seq_len, filler);
            row
        };
        examples.iter().map(row).collect()
    };
    Ok(order.chunks(batch_size).map(batch).collect())
}

/// Rows of one length as a batch on a device.
///
/// # Errors
/// [`peft::Error::EmptyBatch`] without rows of two tokens, [`peft::Error::NoTargets`] if nothing of
/// them is to be predicted.
///
/// # Panics
/// If the rows have several lengths.
pub fn batch(rows: &[Row], device: &Device) -> Result<Batch> {
    let seq = rows.first().map_or(0, |row| row.tokens.len());
    assert!(rows.iter().all(|row| row.tokens.len() == seq), "one length");
    let tokens = rows.iter().flat_map(|row| &row.tokens);
    let tokens: Vec<i64> = tokens.map(|&token| token.into()).collect();
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

/// The space that is left in each of many rows.
///
/// A tree whose leaves are the rows: node `i` has the most space of any row below it, and
/// `2 i` and `2 i + 1` for children. The first row with enough space is found in its height.
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

    /// Takes `len` from the first row that has as much. There must be one.
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
