//! Tokens that a model lacks, and texts that are longer than it has positions for.

use std::path::Path;
use std::slice;

use burn::tensor::{Device, Int, Tensor, TensorData};
use evaluate::{Error, ScoredWindow, compare, confidences, score, target_loss};
use models::{Model, load};
use peft::{Batch, Blocks};

/// A LLaMA, or an OPT, which has learned an embedding for each position.
fn model(name: &str) -> Model {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden");
    load(golden.join(name), &Device::flex()).unwrap().model
}

/// OPTs with norms before and after, with the number of their positions.
fn opts() -> [(Model, usize); 2] {
    ["opt_125m_style", "opt_350m_style"].map(|name| {
        let model = model(name);
        let max = model.max_positions().unwrap();
        (model, max)
    })
}

fn batch(tokens: &[i64], n: usize) -> Batch {
    let values = TensorData::new(tokens.to_vec(), [n, tokens.len() / n]);
    Batch::new(Tensor::<2, Int>::from_data(values, &Device::flex())).unwrap()
}

/// The errors of everything that takes batches.
fn errors(model: &Model, batch: &Batch) -> Vec<(&'static str, Option<Error>)> {
    let batches = slice::from_ref(batch);
    vec![
        ("target_loss", target_loss(model, batches).err()),
        ("compare", compare(model, model, batches).err()),
        ("confidences", confidences(model, batches).err()),
    ]
}

#[track_caller]
fn assert_all_taken(model: &Model, batch: &Batch) {
    for (name, error) in errors(model, batch) {
        assert!(error.is_none(), "{name}: {error:?}");
    }
}

#[track_caller]
fn assert_unknown(error: Option<Error>, expected: i64, n_tokens: usize) {
    let is_named = matches!(
        &error,
        Some(Error::Peft(peft::Error::Token { token, vocab_size }))
            if (*token, *vocab_size) == (expected, n_tokens)
    );
    assert!(is_named, "{expected}: {error:?}");
}

#[track_caller]
fn assert_too_long(error: Option<Error>, found: usize, most: usize) {
    let is_said = matches!(
        &error,
        Some(Error::Peft(peft::Error::TooLong { len, max })) if (*len, *max) == (found, most)
    );
    assert!(is_said, "{found}: {error:?}");
}

#[test]
fn a_token_that_the_model_lacks_is_refused_by_all() {
    let opts = opts().map(|(model, _)| model);
    for model in opts.into_iter().chain([model("llama_gqa")]) {
        let n_tokens = model.vocab_size();
        let vocab_size = n_tokens as i64;
        assert_all_taken(&model, &batch(&[1, vocab_size - 1, 0, 3], 2));
        for bad in [vocab_size, -1, i64::from(i32::MAX)] {
            for (_, error) in errors(&model, &batch(&[1, 2, bad, 3], 2)) {
                assert_unknown(error, bad, n_tokens);
            }
        }
        for bad in [vocab_size as u32, u32::MAX] {
            // The last token is not read, but predicted.
            for tokens in [vec![bad, 1, 2], vec![1, 2, bad]] {
                let scored = 1..3;
                let windows = [ScoredWindow { tokens, scored }];
                let found = score(&model, &windows, &Device::flex());
                assert_unknown(found.err(), bad.into(), n_tokens);
            }
        }
    }
}

#[test]
fn a_text_beyond_the_positions_of_a_model_is_refused_by_all() {
    for (model, max) in opts() {
        assert_all_taken(&model, &batch(&vec![1; max], 1));
        for (_, error) in errors(&model, &batch(&vec![1; max + 1], 1)) {
            assert_too_long(error, max + 1, max);
        }
        for (_, error) in errors(&model, &batch(&vec![1; 4 * max], 2)) {
            assert_too_long(error, 2 * max, max);
        }
        // The last token is not read.
        let score = |n: usize| {
            let (tokens, scored) = (vec![1; n], 1..n);
            score(&model, &[ScoredWindow { tokens, scored }], &Device::flex())
        };
        assert_eq!(score(max + 1).unwrap()[0].len(), max);
        assert_too_long(score(max + 2).err(), max + 1, max);
    }
}

#[test]
fn rows_of_several_texts_may_be_longer_than_each_may_be() {
    for (model, max) in opts() {
        let row = |n_first: usize| {
            let start = |at| if at < n_first { 0 } else { n_first };
            let starts: Vec<usize> = (0..max + 4).map(start).collect();
            batch(&vec![1; max + 4], 1).with_starts(&starts).unwrap()
        };
        for n_first in [4, 6, max] {
            assert_all_taken(&model, &row(n_first));
        }
        for n_first in [3, max + 1] {
            for (_, error) in errors(&model, &row(n_first)) {
                assert_too_long(error, max + 1, max);
            }
        }
    }
}
