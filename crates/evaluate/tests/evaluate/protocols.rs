//! Protocols against sums over all logits by hand.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use evaluate::{
    AddBos, Bootstrap, ChoiceItem, Error, ScoredWindow, choices, compare, confidences,
    document_losses, gsm8k, llama_cpp_perplexity, perplexity, score, target_loss, window_losses,
    word_losses,
};
use models::{Generation, Pretrained, Tokenizer, generate, load, quantize_head};
use peft::{Batch, CausalLm};
use quant_core::Rtn;

#[path = "../../../models/tests/fixtures/word_level.rs"]
mod word_level;

#[path = "../../../models/tests/fixtures/tokenizer.rs"]
mod byte_level;

#[path = "../../../models/tests/fixtures/scripted.rs"]
mod scripted;

use byte_level::{like_llama_3, write_byte_level};
use scripted::write_scripted;
use word_level::write_tokenizer;

const PROBE: [u32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];

/// A LLaMA and an OPT of transformers, with a tokenizer of words.
fn models() -> Vec<(tempfile::TempDir, Pretrained)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden");
    let model = |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name).join(file), dir.path().join(file)).unwrap();
        }
        write_tokenizer(&dir.path().join("tokenizer.json"), 16);
        let special = r#"{"bos_token": "w1", "eos_token": "w2"}"#;
        std::fs::write(dir.path().join("tokenizer_config.json"), special).unwrap();
        let lm = load(dir.path(), &Device::flex()).unwrap();
        (dir, lm)
    };
    ["llama_gqa", "opt_350m_style"].map(model).into()
}

fn tensor(ids: &[u32], n: usize) -> Tensor<2, Int> {
    let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    let shape = [n, ids.len() / n];
    Tensor::from_data(TensorData::new(ids, shape), &Device::flex())
}

/// The log-probabilities of all tokens after each token.
fn log_probabilities(lm: &Pretrained, ids: &[u32]) -> Vec<Vec<f64>> {
    let logits: Vec<f32> = lm
        .model
        .forward(tensor(ids, 1))
        .into_data()
        .try_into_vec()
        .unwrap();
    let row = |row: &[f32]| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        row.iter()
            .map(|&logit| f64::from(logit) - sum.ln())
            .collect()
    };
    logits.chunks(logits.len() / ids.len()).map(row).collect()
}

/// The loss of each token after the first.
fn losses(lm: &Pretrained, ids: &[u32]) -> Vec<f64> {
    let all = log_probabilities(lm, &ids[..ids.len() - 1]);
    let targets = ids[1..].iter().zip(all);
    targets
        .map(|(&target, row)| -row[target as usize])
        .collect()
}

#[track_caller]
fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
}

#[test]
fn windows_of_any_lengths_are_scored_as_each_alone() {
    for (_dir, lm) in models() {
        let window = |tokens: &[u32], scored| ScoredWindow {
            tokens: tokens.to_vec(),
            scored,
        };
        let windows = [
            window(&PROBE[..5], 1..5),
            window(&PROBE, 7..12),
            window(&PROBE[3..5], 1..2),
            window(&PROBE[..4], 2..2),
            window(&PROBE[6..], 2..5),
        ];
        let found = score(&lm.model, &windows, &Device::flex()).unwrap();
        for (window, found) in windows.iter().zip(&found) {
            let all = losses(&lm, &window.tokens);
            assert_eq!(found.len(), window.scored.len());
            for (found, expected) in found.iter().zip(&all[window.losses()]) {
                assert_near(*found, *expected);
            }
        }
        for scored in [0..3, 2..6, Range { start: 4, end: 3 }] {
            let bad = [window(&PROBE[..5], scored)];
            let error = score(&lm.model, &bad, &Device::flex()).unwrap_err();
            assert!(matches!(error, Error::NoContext), "{error}");
        }
    }
}

#[test]
fn perplexity_is_the_mean_over_windows_of_the_mean_over_targets() {
    for (_dir, mut lm) in models() {
        check_perplexity(&lm);
        quantize_head(&mut lm.model, &Rtn::new().with_group_size(8)).unwrap();
        check_perplexity(&lm);
        assert!(matches!(perplexity(&lm.model, &[]), Err(Error::NoWindows)));
    }
}

fn check_perplexity(lm: &Pretrained) {
    let (first, second) = PROBE.split_at(6);
    let batch = |ids: &[u32]| Batch::new(tensor(ids, 1)).unwrap();
    let found = perplexity(&lm.model, &[batch(first), batch(second)]).unwrap();
    let mean = |ids: &[u32]| losses(lm, ids).iter().sum::<f64>() / 5.0;
    assert_near(found.nll, (mean(first) + mean(second)) / 2.0);
    assert_eq!((found.n_windows, found.seq_len), (2, 6));
}

#[test]
fn perplexities_are_those_of_their_protocols() {
    let bootstrap = Bootstrap::new();
    let device = Device::flex();
    for (_dir, lm) in models() {
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        // Two windows of six.
        let batch = Batch::new(tensor(&PROBE, 2)).unwrap();
        let found = window_losses(&lm.model, std::slice::from_ref(&batch)).unwrap();
        assert_near(found[0], mean(&losses(&lm, &PROBE[..6])));
        assert_near(found[1], mean(&losses(&lm, &PROBE[6..])));
        // Targets alone.
        let marks: Vec<bool> = (0..12).map(|at| at % 4 == 3).collect();
        let masked = batch.clone().with_targets(&marks).unwrap();
        let found = target_loss(&lm.model, &[masked.clone(), batch]).unwrap();
        let (first, second) = (losses(&lm, &PROBE[..6]), losses(&lm, &PROBE[6..]));
        let of_masked = first[2] + second[0] + second[4];
        let of_all: f64 = first.iter().chain(&second).sum();
        assert_near(found, (of_masked + of_all) / 13.0);
        let error = window_losses(&lm.model, &[masked]).unwrap_err();
        assert!(
            matches!(error, Error::PartialWindow { window: 0 }),
            "{error}"
        );
        // The last two of each six tokens, the first of which becomes token 1.
        let found = llama_cpp_perplexity(&lm.model, &PROBE, 6, Some(1), &bootstrap, &device);
        let window = |from: usize| [&[1], &PROBE[from + 1..from + 6]].concat();
        let both = [losses(&lm, &window(0)), losses(&lm, &window(6))];
        let sum: f64 = both.iter().flat_map(|losses| &losses[3..]).sum();
        assert_near(found.unwrap().value.ln(), sum / 4.0);
        // A document after token 1, as `add_bos_token` says.
        let document = "w3 w1  w4\nw1 w5";
        let plain = losses(&lm, &[1, 3, 1, 4, 1, 5]);
        let with_bos = losses(&lm, &[1, 1, 3, 1, 4, 1, 5]);
        for (add_bos, expected) in [
            (AddBos::AsTokenizer, &plain),
            (AddBos::Always, &with_bos),
            (AddBos::Never, &plain),
        ] {
            let found = word_losses(&lm, &[document, "w1 w3"], add_bos).unwrap();
            assert_near(found[0].log_likelihood, -expected.iter().sum::<f64>());
            assert_eq!((found[0].n_words, found[0].n_bytes), (5, 15));
            // The document begins with the token.
            let stated = losses(&lm, &[1, 1, 3]);
            assert_near(found[1].log_likelihood, -stated.iter().sum::<f64>());
        }
        // Longer than the model reads: the windows overlap by a token, and the last reads as many.
        let max_len = lm.model.config().max_seq_len();
        let ids: Vec<u32> = (0..max_len + 3)
            .map(|at| 3 + (at * at % 7) as u32)
            .collect();
        let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
        let found = word_losses(&lm, &[&words.join(" ")], AddBos::AsTokenizer).unwrap();
        let first = losses(&lm, &[&[1], &ids[..max_len]].concat());
        let second = losses(&lm, &ids[2..]);
        let sum: f64 = first.iter().chain(&second[max_len - 3..]).sum();
        let off = found[0].log_likelihood + sum;
        assert!(off.abs() < 1e-6 * sum, "{off} of {sum}");
        let found = document_losses(&lm.model, &[PROBE.to_vec()], 1, 5, &device).unwrap();
        let expected = losses(&lm, &[&[1], &PROBE[..4]].concat());
        assert_eq!(found[0].len(), 4);
        assert_near(found[0].iter().sum(), expected.iter().sum());
    }
}

#[test]
fn predictions_are_compared() {
    let all = models();
    for (_dir, lm) in &all {
        let batch = [Batch::new(tensor(&PROBE, 2)).unwrap()];
        let same = compare(&lm.model, &lm.model, &batch).unwrap();
        assert_eq!(same.divergence, [0.0, 0.0]);
        assert_eq!(same.same_top, [1.0, 1.0]);
        let found = confidences(&lm.model, &batch).unwrap();
        assert_eq!(found.len(), 2);
        for (found, ids) in found.iter().zip(PROBE.chunks(6)) {
            assert_eq!(found.len(), 5);
            let rows = log_probabilities(lm, ids);
            for ((found, row), &target) in found.iter().zip(&rows).zip(&ids[1..]) {
                let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert_near(found.0, most.exp());
                assert_eq!(found.1, row[target as usize] == most);
            }
        }
    }
    // Both have 256 tokens.
    let batch = [Batch::new(tensor(&PROBE, 2)).unwrap()];
    let (llama, opt) = (&all[0].1, &all[1].1);
    let found = compare(&llama.model, &opt.model, &batch).unwrap();
    for (window, ids) in PROBE.chunks(6).enumerate() {
        let (q, p) = (log_probabilities(llama, ids), log_probabilities(opt, ids));
        let of_row = |(q, p): (&Vec<f64>, &Vec<f64>)| -> f64 {
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let sum: f64 = q.iter().zip(&p).map(of_row).sum();
        assert_near(found.divergence[window], sum / 6.0);
    }
}

#[test]
fn choices_and_answers_are_those_of_the_model() {
    for (_dir, lm) in models() {
        let item = ChoiceItem {
            context: "w3 w1".into(),
            choices: vec!["w4 w1".into(), "w5".into(), "w9 w9 w9".into()],
            answer: 1,
        };
        let found = choices(&lm, &[item]).unwrap().remove(0);
        let sum = |ids: &[u32]| {
            -losses(&lm, &[&[3, 1], ids].concat())[1..]
                .iter()
                .sum::<f64>()
        };
        let sums = [sum(&[4, 1]), sum(&[5]), sum(&[9, 9, 9])];
        let total: f64 = sums.iter().map(|sum| sum.exp()).sum();
        for (found, sum) in found.probabilities.iter().zip(&sums) {
            assert_near(*found, sum.exp() / total);
        }
        let problem = gsm8k::Problem {
            question: "w3 w4".into(),
            answer: "#### 5".into(),
        };
        let answers = gsm8k::answers(&lm, &[], std::slice::from_ref(&problem), 4, |_| {}).unwrap();
        // Unknown words of the prompt are token 0.
        let prompt = lm.encode(&gsm8k::prompt("w3 w4")).unwrap();
        assert!(prompt.contains(&0) && prompt.contains(&3));
        let written = generate(&lm.model, &prompt, &Generation::new(4), |_| {
            ControlFlow::Continue(())
        });
        let text = lm.tokenizer().unwrap().decode(&written.unwrap()).unwrap();
        assert_eq!(answers[0].text.trim(), text.trim());
        let flexible = gsm8k::is_correct(gsm8k::flexible(&text), "#### 5");
        assert_eq!((answers[0].strict, answers[0].flexible), (false, flexible));
        // The end of a prompt beyond the positions of the model is kept.
        let shots = vec![problem.clone(); 60];
        assert_eq!(
            gsm8k::answers(&lm, &shots, &[problem], 4, |_| {})
                .unwrap()
                .len(),
            1
        );
    }
}

/// The token that ends a text is that of the tokenizer, neither a stop token of the model nor a string of
/// the protocol, and no part of a text without special tokens.
#[test]
fn an_answer_ends_at_the_end_token_of_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::open(&write_byte_level(dir.path(), like_llama_3())).unwrap();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let tokens = [":", "Ġ", "5", "<|im_start|>", "7", "8"].map(id);
    let script: Vec<(u32, u32)> = tokens.windows(2).map(|pair| (pair[0], pair[1])).collect();
    write_scripted(dir.path(), 269, &script, &[id("</s>")]);
    let problem = gsm8k::Problem {
        question: "2 + 3?".into(),
        answer: "#### 5".into(),
    };
    for (eos, text, is_right) in [("<|im_start|>", " 5", true), ("</s>", " 578", false)] {
        let special = format!(r#"{{"bos_token": "<s>", "eos_token": "{eos}"}}"#);
        std::fs::write(dir.path().join("tokenizer_config.json"), special).unwrap();
        let lm = load(dir.path(), &Device::flex()).unwrap();
        let found = gsm8k::answers(&lm, &[], std::slice::from_ref(&problem), 5, |_| {}).unwrap();
        assert_eq!(
            (found[0].text.as_str(), found[0].flexible),
            (text, is_right)
        );
    }
    // Without one.
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let lm = load(dir.path(), &Device::flex()).unwrap();
    let found = gsm8k::answers(&lm, &[], &[problem], 5, |_| {}).unwrap();
    assert_eq!(found[0].text, " 578");
}

/// Bytes that are no character are no end of an evaluation.
#[test]
fn an_answer_may_have_bytes_that_are_no_character() {
    let dir = tempfile::tempdir().unwrap();
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden/tokenizers/llama");
    for file in ["tokenizer.model", "tokenizer_config.json"] {
        std::fs::copy(golden.join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let tokenizer = Tokenizer::read(dir.path()).unwrap().unwrap();
    let last = *tokenizer.encode("Answer:").unwrap().last().unwrap();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let bytes = ["<0xEC>", "<0x84>", "<0xAC>", "<0xE1>", "▁the", "4", "</s>"].map(id);
    let mut script = vec![(last, bytes[0])];
    script.extend(bytes.windows(2).map(|pair| (pair[0], pair[1])));
    write_scripted(dir.path(), 425, &script, &[id("</s>")]);
    let lm = load(dir.path(), &Device::flex()).unwrap();
    let problem = gsm8k::Problem {
        question: "2 + 2?".into(),
        answer: "#### 4".into(),
    };
    let found = gsm8k::answers(&lm, &[], &[problem.clone(), problem], 20, |_| {}).unwrap();
    for answer in found {
        assert_eq!((answer.text.as_str(), answer.flexible), ("���� the4", true));
    }
}
