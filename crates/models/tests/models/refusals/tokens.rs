//! Tokens outside of the vocabulary, texts longer than the positions of a model, and empty batches.

use std::fs;
use std::ops::ControlFlow;
use std::slice;

use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{Error, Generation, Model, TextError, generate, load, quantize, sensitivities};
use peft::{Batch, FitConfig};
use quant_core::Rtn;

use super::{LLAMA, TOKENIZER, copy, refusal};
use crate::fixtures;

const VOCAB: usize = 16;
/// The positions of the OPT.
const POSITIONS: usize = 8;

fn llama() -> Model {
    let config = fixtures::llama().with_tie_word_embeddings(true);
    Model::init(config, 1, &Device::flex())
}

fn opt() -> Model {
    let config = fixtures::opt().with_max_position_embeddings(POSITIONS);
    Model::init(config, 1, &Device::flex())
}

fn batch(tokens: &[i64], n: usize) -> Batch {
    let values = TensorData::new(tokens.to_vec(), [n, tokens.len() / n]);
    Batch::new(Tensor::<2, Int>::from_data(values, &Device::flex())).unwrap()
}

/// The errors of all functions that take batches.
fn errors(model: &Model, batch: &Batch) -> Vec<(&'static str, Option<Error>)> {
    let batches = slice::from_ref(batch);
    let rtn = Rtn::new().with_group_size(8);
    let (mut trained, mut packed) = (model.clone(), model.clone());
    let fit = peft::fit(&mut trained, batches, &FitConfig::new(), |_, _| {});
    let packed = quantize(&mut packed, &rtn, batches, |_| {});
    vec![
        ("fit", fit.err().map(Error::from)),
        ("quantize", packed.err()),
        (
            "sensitivities",
            sensitivities(model, &[&rtn], batches, |_| {}).err(),
        ),
    ]
}

#[track_caller]
fn assert_all_taken(model: &Model, batch: &Batch) {
    for (what, error) in errors(model, batch) {
        assert!(error.is_none(), "{what}: {error:?}");
    }
}

#[test]
fn a_token_that_the_model_lacks_is_refused_by_all() {
    for model in [llama(), opt()] {
        assert_all_taken(&model, &batch(&[1, 15, 0, 3], 2));
        for bad in [16, -1, i64::from(i32::MAX)] {
            for (what, error) in errors(&model, &batch(&[1, 2, bad, 3], 2)) {
                let is_named = matches!(
                    &error,
                    Some(Error::Peft(peft::Error::Token { token, vocab_size: VOCAB }))
                        if *token == bad
                );
                assert!(is_named, "{what}, {bad}: {error:?}");
            }
        }
        for bad in [16, u32::MAX] {
            let error = continued(&model, &[1, bad], 2).unwrap_err();
            let is_named = matches!(
                error,
                Error::Peft(peft::Error::Token { token, .. }) if token == i64::from(bad)
            );
            assert!(is_named, "{bad}: {error}");
        }
    }
}

fn continued(model: &Model, prompt: &[u32], n_new: usize) -> Result<Vec<u32>, Error> {
    generate(model, prompt, &Generation::new(n_new), |_| {
        ControlFlow::Continue(())
    })
}

#[track_caller]
fn assert_too_long(error: Option<Error>, found: usize) {
    let is_said = matches!(
        &error,
        Some(Error::Peft(peft::Error::TooLong { len, max: POSITIONS })) if *len == found
    );
    assert!(is_said, "{found}: {error:?}");
}

/// A model with learned positions has no more of them.
#[test]
fn a_text_beyond_the_positions_of_a_model_is_refused_by_all() {
    let model = opt();
    assert_all_taken(&model, &batch(&[1; POSITIONS], 1));
    for (_, error) in errors(&model, &batch(&[1; POSITIONS + 1], 1)) {
        assert_too_long(error, POSITIONS + 1);
    }
    for (_, error) in errors(&model, &batch(&[1; 200], 2)) {
        assert_too_long(error, 100);
    }

    assert_eq!(
        continued(&model, &[1; 4], POSITIONS - 3).unwrap().len(),
        POSITIONS - 3
    );
    assert_too_long(
        continued(&model, &[1; 4], POSITIONS - 2).err(),
        POSITIONS + 1,
    );
    assert_too_long(
        continued(&model, &[1; POSITIONS + 1], 1).err(),
        POSITIONS + 1,
    );
    assert_too_long(continued(&model, &[1], usize::MAX).err(), usize::MAX);
}

#[test]
fn rows_of_several_texts_may_be_longer_than_each_may_be() {
    let model = opt();
    let row = |n_first: usize| {
        let starts: Vec<usize> = (0..12)
            .map(|at| if at < n_first { 0 } else { n_first })
            .collect();
        batch(&[1; 12], 1).with_starts(&starts).unwrap()
    };
    for n_first in [4, 6, 8] {
        assert_all_taken(&model, &row(n_first));
    }
    for n_first in [3, 9] {
        for (_, error) in errors(&model, &row(n_first)) {
            assert_too_long(error, 9);
        }
    }
}

#[test]
fn texts_that_are_not_cut_as_a_batch_needs_it_are_refused() {
    let two = || batch(&[1; 8], 2);
    let first = |starts: [usize; 4]| two().with_starts(&[&starts[..], &[0; 4]].concat());
    let interrupted = [true, false, true, true, true, true, true, true];
    let apart = || two().with_starts(&[0, 0, 2, 2, 0, 0, 0, 0]).unwrap();
    let rows = [
        (
            two().with_starts(&[0; 7]),
            "7 starts for 2 sequences of 4 tokens",
        ),
        (two().with_starts(&[]), "0 starts"),
        (first([1, 1, 1, 1]), "token 0 of sequence 0 has the start 1"),
        (first([0, 0, 1, 1]), "token 2 of sequence 0 has the start 1"),
        (first([0, 1, 0, 0]), "token 2 of sequence 0 has the start 0"),
        (first([0, 3, 3, 3]), "token 1 of sequence 0 has the start 3"),
        (first([0, 0, 0, usize::MAX]), "token 3 of sequence 0"),
        (
            two().with_starts(&[0, 0, 0, 0, 0, 0, 0, 7]),
            "token 3 of sequence 1",
        ),
        (two().with_padding(&[true; 9]), "9 marks for 2 sequences"),
        (
            two().with_padding(&interrupted),
            "there is padding within the document of sequence 0",
        ),
        (
            apart().with_padding(&interrupted),
            "the document of token 1 of sequence 0 is padding in part",
        ),
        (two().with_targets(&[true; 4]), "4 marks for 2 sequences"),
    ];
    for (found, part) in rows {
        let error = found.unwrap_err();
        let is_said = matches!(&error, peft::Error::Spans { problem } if problem.contains(part));
        assert!(is_said, "{part}: {error}");
    }
}

#[test]
fn a_batch_without_a_token_to_predict_is_refused() {
    let two = || batch(&[1; 8], 2);
    let firsts = [true, false, false, false, true, false, false, false];
    for found in [
        two().with_padding(&[false; 8]),
        // One token is left of each text.
        two().with_padding(&firsts),
        two().with_targets(&[false; 8]),
        two().with_targets(&firsts),
        two().with_starts(&[0, 1, 2, 3, 0, 1, 2, 3]),
    ] {
        let error = found.unwrap_err();
        assert!(
            matches!(error, peft::Error::NoTargets { batch: 2, seq: 4 }),
            "{error}"
        );
    }
    // A sequence of padding beside one of text.
    let half = [false, false, false, false, true, true, true, true];
    let batch = two().with_padding(&half).unwrap();
    assert_eq!(batch.n_targets(), 3);
    assert!(batch.sequence(1).is_ok());
    assert!(matches!(
        batch.sequence(0),
        Err(peft::Error::NoTargets { batch: 1, seq: 4 })
    ));

    let one_each = Tensor::<2, Int>::ones([4, 1], &Device::flex());
    assert!(matches!(
        Batch::new(one_each),
        Err(peft::Error::EmptyBatch { batch: 4, seq: 1 })
    ));
}

#[test]
fn a_tokenizer_that_is_none_is_refused() {
    let dir = copy(LLAMA);
    let path = dir.path().join(TOKENIZER);
    let fine = fs::read_to_string(&path).unwrap();
    let texts: [Vec<u8>; 9] = [
        Vec::new(),
        b"\xff\xfe{}".to_vec(),
        fine.replace("w3", "\u{1}").into_bytes(),
        fine.as_bytes()[..fine.len() - 2].to_vec(),
        format!("{fine}{{}}").into_bytes(),
        format!("\u{feff}{fine}").into_bytes(),
        b"[]".to_vec(),
        fine.replace("\"1.0\"", "\"2.0\"").into_bytes(),
        format!("{{\"normalizer\": {}", "[".repeat(100_000)).into_bytes(),
    ];
    for text in texts {
        fs::write(&path, &text).unwrap();
        let error = refusal(dir.path());
        let is_named = matches!(&error, Error::Text(TextError::Tokenizer { path, .. }) if path.ends_with(TOKENIZER));
        let start = String::from_utf8_lossy(&text[..text.len().min(40)]).into_owned();
        assert!(is_named, "{start:?}: {error:?}");
    }
    // Valid JSON, but not in UTF-8.
    let at = fine.find("w3").unwrap();
    let mut bytes = fine.into_bytes();
    bytes[at] = 0xff;
    fs::write(&path, bytes).unwrap();
    let error = refusal(dir.path());
    assert!(
        matches!(error, Error::Text(TextError::Tokenizer { .. })),
        "{error:?}"
    );
}

/// A word of the vocabulary begins texts and ends them, if the files say so.
#[test]
fn special_tokens_that_are_needed_must_be_stated_and_known() {
    let dir = copy(LLAMA);
    // They are read once.
    let lm = || load(dir.path(), &Device::flex()).unwrap();
    let error = lm().first_token().unwrap_err();
    assert!(
        matches!(
            error,
            Error::Text(TextError::MissingSpecial {
                name: "bos_token",
                ..
            })
        ),
        "{error}"
    );

    let config = dir.path().join("tokenizer_config.json");
    let state = |json: &str| fs::write(&config, json).unwrap();
    state("{\"eos_token\": \"w3\"}");
    assert_eq!(lm().first_token().unwrap(), 3);
    state("{\"eos_token\": \"</s>\"}");
    let error = lm().first_token().unwrap_err();
    let is_named = matches!(
        &error,
        Error::Text(TextError::UnknownSpecial { name: "eos_token", token, .. }) if token == "</s>"
    );
    assert!(is_named, "{error}");
}

/// As many sequences as there are, they say what one says.
#[test]
fn a_calibration_that_repeats_itself_is_refused() {
    let rtn = Rtn::new().with_group_size(8);
    let refused = |batches: &[Batch]| quantize(&mut llama(), &rtn, batches, |_| {}).err();
    let one = batch(&[1, 2, 3, 4], 1);
    let same = refused(&[batch(&[1, 2, 3, 4, 1, 2, 3, 4], 2), one.clone()]);
    let is_named = matches!(
        &same,
        Some(Error::Peft(peft::Error::RepeatedCalibration { n: 3 }))
    );
    assert!(is_named, "{same:?}");
    assert!(refused(std::slice::from_ref(&one)).is_none());
    assert!(refused(&[one, batch(&[1, 2, 3, 5], 1)]).is_none());
}

/// A model cannot end a text with a token that it lacks.
#[test]
fn stop_tokens_that_the_model_lacks_are_refused() {
    let dir = copy(LLAMA);
    let state = |name: &str, ids: &str| {
        let path = dir.path().join(name);
        let mut json: serde_json::Value = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
            Err(_) => serde_json::json!({}),
        };
        json["eos_token_id"] = serde_json::from_str(ids).unwrap();
        fs::write(&path, json.to_string()).unwrap();
    };
    let stop = || {
        let lm = load(dir.path(), &Device::flex()).unwrap();
        lm.stop_tokens().to_vec()
    };
    let refused = |name: &str, part: &str| {
        let error = refusal(dir.path());
        let Error::Config(models::ConfigError::Setting {
            path,
            setting,
            problem,
        }) = &error
        else {
            panic!("{error:?}");
        };
        let is_said = path.ends_with(name)
            && setting == "eos_token_id"
            && problem.contains(part)
            && problem.contains("has 256 tokens");
        assert!(is_said, "{error}");
    };
    state(super::CONFIG, "255");
    assert_eq!(stop(), [255]);
    state(super::CONFIG, "256");
    refused(super::CONFIG, "is 256,");
    // This one goes before the other.
    state("generation_config.json", "[3, 255]");
    assert_eq!(stop(), [3, 255]);
    state("generation_config.json", "[3, 4000000000]");
    refused("generation_config.json", "is 4000000000,");
}
