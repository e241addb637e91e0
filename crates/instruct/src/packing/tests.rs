use proptest::prelude::*;

use super::*;

const PADDING: u32 = 0;

/// Examples of these lengths; all tokens are different, and every third is a target.
fn examples(lens: &[usize]) -> Vec<Example> {
    let mut next = 1;
    let example = |&len: &usize| {
        let tokens: Vec<u32> = (next..).take(len).collect();
        next += len as u32;
        let is_target = tokens.iter().map(|token| token % 3 == 0).collect();
        Example::new(tokens, is_target)
    };
    lens.iter().map(example).collect()
}

/// The texts of a row, without its padding.
fn texts(row: &Row) -> Vec<Example> {
    let mut starts = row.starts.clone();
    starts.dedup();
    let ends = starts.iter().skip(1).copied().chain([row.tokens.len()]);
    let text = |(&start, end): (&usize, usize)| {
        let tokens = row.tokens[start..end].to_vec();
        Example::new(tokens, row.is_target[start..end].to_vec())
    };
    let texts = starts.iter().zip(ends).map(text);
    texts.filter(|text| text.tokens()[0] != PADDING).collect()
}

fn check_row(row: &Row, seq_len: usize) {
    assert_eq!(row.tokens.len(), seq_len);
    assert_eq!(row.is_target.len(), seq_len);
    assert_eq!(row.starts.len(), seq_len);
    for (at, &start) in row.starts.iter().enumerate() {
        assert!(start <= at);
        assert!(at == 0 || start == at || start == row.starts[at - 1]);
        assert!(!(row.is_target[at] && (start == at || row.tokens[at] == PADDING)));
        // Padding shares no text with a token.
        assert_eq!(row.tokens[at] == PADDING, row.tokens[start] == PADDING);
    }
}

/// Checks that each example is in one row, with its targets.
fn check_texts<'a>(rows: impl Iterator<Item = &'a Row>, examples: &[Example]) {
    let mut found: Vec<Example> = rows.flat_map(texts).collect();
    found.sort_by_key(|example| example.tokens()[0]);
    assert_eq!(found, examples);
}

#[test]
fn rows_worked_by_hand() {
    let seed = 0;
    let rows = pack(&examples(&[2, 5, 3, 1]), 6, PADDING, seed).unwrap();
    // 5 + 1, 3 + 2 and one token of padding.
    let full = Row {
        tokens: vec![3, 4, 5, 6, 7, 11],
        is_target: vec![false, false, false, true, false, false],
        starts: vec![0, 0, 0, 0, 0, 5],
        n_text: 6,
    };
    let padded = Row {
        tokens: vec![8, 9, 10, 1, 2, PADDING],
        is_target: vec![false, true, false, false, false, false],
        starts: vec![0, 0, 0, 3, 3, 5],
        n_text: 5,
    };
    assert_eq!(rows.len(), 2);
    assert!(rows.contains(&full) && rows.contains(&padded), "{rows:?}");
}

#[test]
fn the_seed_sets_the_order_alone() {
    let examples = examples(&[4; 40]);
    let rows = |seed| pack(&examples, 4, PADDING, seed).unwrap();
    assert_eq!(rows(1), rows(1));
    assert_ne!(rows(1), rows(2));
    let batches = |seed| pad(&examples, 3, None, PADDING, seed).unwrap();
    assert_eq!(batches(1), batches(1));
    assert_ne!(batches(1), batches(2));
}

#[test]
fn an_example_longer_than_a_row() {
    let examples = examples(&[2, 5, 3]);
    let error = pack(&examples, 4, PADDING, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "example 1 has 5 tokens, more than a row of 4; encode with a limit of 4"
    );
    assert!(matches!(
        pad(&examples, 2, Some(4), PADDING, 0),
        Err(Error::LongExample {
            example: 1,
            n_tokens: 5,
            seq_len: 4
        })
    ));
}

#[test]
fn no_examples_make_no_rows() {
    for lens in [&[][..], &[0, 0]] {
        assert_eq!(pack(&examples(lens), 4, PADDING, 0).unwrap(), []);
        assert_eq!(
            pad(&examples(lens), 2, Some(4), PADDING, 0).unwrap(),
            Vec::<Vec<Row>>::new()
        );
    }
}

/// The number of rows by first-fit decreasing with a linear search.
fn first_fit(mut lens: Vec<usize>, seq_len: usize) -> usize {
    lens.sort_by_key(|&len| std::cmp::Reverse(len));
    let mut space = Vec::new();
    for len in lens {
        match space.iter_mut().find(|space| **space >= len) {
            Some(space) => *space -= len,
            None => space.push(seq_len - len),
        }
    }
    space.len()
}

proptest! {
    #[test]
    fn packed_rows_hold_the_examples(
        (seq_len, lens) in (1..40_usize).prop_flat_map(|seq_len| {
            (Just(seq_len), prop::collection::vec(1..=seq_len, 0..60))
        }),
        seed: u64,
    ) {
        let examples = examples(&lens);
        let rows = pack(&examples, seq_len, PADDING, seed).unwrap();
        rows.iter().for_each(|row| check_row(row, seq_len));
        check_texts(rows.iter(), &examples);
        let at_least = lens.iter().sum::<usize>().div_ceil(seq_len);
        prop_assert!(rows.len() <= 2 * at_least);
        prop_assert_eq!(rows.len(), first_fit(lens, seq_len));
    }

    #[test]
    fn padded_rows_hold_the_examples(
        lens in prop::collection::vec(1..30_usize, 1..40),
        batch_size in 1..7_usize,
        more in prop::option::of(0..5_usize),
        seed: u64,
    ) {
        let examples = examples(&lens);
        let longest = lens.iter().max().unwrap();
        let seq_len = more.map(|more| longest + more);
        let batches = pad(&examples, batch_size, seq_len, PADDING, seed).unwrap();
        prop_assert_eq!(batches.len(), lens.len().div_ceil(batch_size));
        for batch in &batches {
            let in_batch = batch.iter().map(|row| texts(row)[0].tokens().len());
            let len = seq_len.or(in_batch.max()).unwrap();
            batch.iter().for_each(|row| check_row(row, len));
            prop_assert!(batch.iter().all(|row| texts(row).len() == 1 && row.starts[0] == 0));
        }
        check_texts(batches.iter().flatten(), &examples);
    }
}

/// A device's integers may have 32 bits.
#[test]
fn a_token_of_no_vocabulary_is_refused() {
    let device = burn::tensor::Device::flex();
    let rows = |token| {
        let example = Example::new(vec![1, token, 2], vec![true; 3]);
        pack(&[example], 3, PADDING, 0).unwrap()
    };
    assert!(batch(&rows(i32::MAX as u32), &device).is_ok());
    for token in [1 << 31, u32::MAX] {
        let error = batch(&rows(token), &device).unwrap_err();
        assert!(
            matches!(error, Error::Token { token: found } if found == token),
            "{error:?}"
        );
    }
}
