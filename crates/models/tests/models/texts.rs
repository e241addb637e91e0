//! Tokenizers and windows of texts.

use std::fs;

use burn::tensor::Device;
use models::{Error, Pretrained, Windows};
use peft::Batch;

use super::fixtures::*;

#[test]
fn windows_do_not_overlap_and_leave_out_the_rest() {
    let windows = Windows::new((0..11).collect(), 3).unwrap();
    assert_eq!(windows.len(), 3);
    let batches = windows.batches(2, &Device::flex());
    let ids = |batch: &Batch| {
        batch
            .tokens()
            .into_data()
            .convert::<i32>()
            .try_into_vec::<i32>()
            .unwrap()
    };
    assert_eq!(ids(&batches[0]), [0, 1, 2, 3, 4, 5]);
    assert_eq!(ids(&batches[1]), [6, 7, 8]);
    assert_eq!(windows.clone().take(2).len(), 2);
    let mut shuffled: Vec<i32> = windows
        .shuffled(1)
        .batches(3, &Device::flex())
        .iter()
        .flat_map(ids)
        .collect();
    assert!(shuffled.chunks(3).all(|window| window[0] + 2 == window[2]));
    shuffled.sort_unstable();
    assert_eq!(shuffled, (0..9).collect::<Vec<_>>());
}

#[test]
fn texts_that_do_not_fit_are_refused() {
    let (dir, lm) = pretrained(llama().with_tie_word_embeddings(true), 1);
    let short = lm.windows("w1 w2 w3", 8).unwrap_err();
    assert!(matches!(
        short,
        Error::Text(models::TextError::ShortText {
            n_tokens: 3,
            seq_len: 8
        })
    ));
    for seq_len in [0, 1, 33] {
        let error = lm.windows(&text(), seq_len).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Text(models::TextError::SeqLen { max: 32, .. })
            ),
            "{error}"
        );
    }
    // A tokenizer with more words than the model has rows.
    let tokenizer = dir.path().join("larger.json");
    write_tokenizer(&tokenizer, 20);
    let larger = Pretrained::new(lm.model, &tokenizer).unwrap();
    assert!(larger.windows(&text(), 8).is_ok());
    let error = larger.windows("w1 w17 w1 w1", 2).unwrap_err();
    assert!(matches!(
        error,
        Error::Peft(peft::Error::Token {
            token: 17,
            vocab_size: 16
        })
    ));
}

/// Truncation and padding of a tokenizer's file are ignored.
#[test]
fn texts_are_neither_cut_nor_filled_up() {
    let (dir, lm) = pretrained(llama().with_tie_word_embeddings(true), 1);
    let path = dir.path().join("cutting.json");
    let json = fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    let json = json
        .replace(
            "\"truncation\":null",
            r#""truncation":{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}"#,
        )
        .replace(
            "\"padding\":null",
            r#""padding":{"strategy":{"Fixed":900},"direction":"Right","pad_to_multiple_of":null,
            "pad_id":0,"pad_type_id":0,"pad_token":"w0"}"#,
        );
    fs::write(&path, json).unwrap();
    let cutting = Pretrained::new(lm.model, &path).unwrap();
    assert_eq!(cutting.windows(&text(), 8).unwrap().len(), 50);
}
