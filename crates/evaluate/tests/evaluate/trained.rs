//! Trained models against results of transformers, from the READMEs of `../shared/data`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use evaluate::{document_losses, perplexity, window_losses};
use models::{Generation, Pretrained, generate, load};
use quant_core::Rtn;
use serde_json::Value;

fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data")
}

fn packed(lm: &Pretrained, bits: usize, group_size: Option<usize>) -> Pretrained {
    let mut lm = lm.clone();
    let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
    models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
    lm
}

/// Asserts equality in the digits of `expected`.
fn assert_rounds_to(found: f64, expected: &str, what: &str) {
    let digits = expected.split_once('.').map_or(0, |(_, part)| part.len());
    assert_eq!(format!("{found:.digits$}"), expected, "{what}: {found}");
}

/// The protocols `windows` and `documents`, in full precision and by round to nearest in 8, 4, 3 and 2 bits.
#[test]
#[ignore = "needs ../shared"]
fn perplexities_on_stories_are_transformers() {
    let data = shared();
    let text = std::fs::read_to_string(data.join("tinystories/dev_half.txt")).unwrap();
    let stream: String = text.chars().take(100_000).collect();
    let stories: Vec<&str> = text.split("<|endoftext|>").map(str::trim).collect();
    let cases = [
        (
            "stories260K",
            198,
            ["7.3271", "7.3247", "8.3915", "14.796", "521.1"],
            ["3.654", "3.655", "3.968", "6.54", "338"],
        ),
        (
            "babyllama-361",
            390,
            ["2.8753", "2.8752", "2.9592", "3.4754", "9.992"],
            ["1.747", "1.748", "1.789", "2.03", "6.5"],
        ),
    ];
    for (name, n_windows, of_windows, of_documents) in cases {
        let device = Device::flex();
        let lm = load(data.join("models").join(name), &device).unwrap();
        let batches = lm.windows(&stream, 256).unwrap().batches(8, &device);
        let bos = lm.special_tokens().unwrap().bos.unwrap().id;
        let encode = |story: &&str| lm.encode(story).unwrap();
        let documents: Vec<Vec<u32>> = stories[..60].iter().map(encode).collect();
        let max = lm.model.config().max_seq_len();
        for (at, bits) in [None, Some(8), Some(4), Some(3), Some(2)]
            .iter()
            .enumerate()
        {
            let lm = match bits {
                Some(bits) => packed(&lm, *bits, Some(32)),
                None => lm.clone(),
            };
            let what = format!("{name}, {bits:?} bits");
            let found = perplexity(&lm.model, &batches).unwrap();
            assert_eq!(found.n_windows, n_windows);
            assert_rounds_to(found.value(), of_windows[at], &what);
            let losses = document_losses(&lm.model, &documents, bos, max, &device).unwrap();
            let n: usize = losses.iter().map(Vec::len).sum();
            let sum: f64 = losses.iter().flatten().sum();
            assert_rounds_to((sum / n as f64).exp(), of_documents[at], &what);
        }
    }
}

/// Losses of windows, their change by round to nearest, and greedy continuations.
#[test]
#[ignore = "needs ../shared"]
fn figures_of_the_mini_models_are_transformers() {
    let data = shared();
    let reference = std::fs::read(data.join("models/mini/reference.json")).unwrap();
    let reference: Value = serde_json::from_slice(&reference).unwrap();
    let text = std::fs::read_to_string(data.join("models/mini/heldout.txt")).unwrap();
    let device = Device::flex();
    let numbers = |value: &Value| -> Vec<f64> {
        let all = value.as_array().unwrap().iter();
        all.map(|number| number.as_f64().unwrap()).collect()
    };
    for name in ["mini-llama", "mini-opt"] {
        let expected = &reference["models"][name];
        let lm = load(data.join("models").join(name), &device).unwrap();
        let windows = lm.windows(&text, 256).unwrap();
        assert_eq!(windows.len() as u64, expected["heldout"]["windows"]);
        let losses = window_losses(&lm.model, &windows.batches(8, &device)).unwrap();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let nll = expected["heldout"]["nll"].as_f64().unwrap();
        assert!(
            (mean(&losses) - nll).abs() < 2e-6,
            "{}: {nll}",
            mean(&losses)
        );
        let first = numbers(&expected["heldout"]["first_windows_nll"]);
        for (found, expected) in losses.iter().zip(first) {
            assert!((found - expected).abs() < 1e-5, "{found}: {expected}");
        }

        let subset = numbers(&expected["heldout_subset"]["window_indices"]);
        let subset: Vec<usize> = subset.into_iter().map(|at| at as usize).collect();
        let of_subset: Vec<f64> = subset.iter().map(|&at| losses[at]).collect();
        let batches = windows.select(&subset).batches(8, &device);
        for row in expected["rtn"]["table"].as_array().unwrap() {
            let group = row["group"].as_u64().filter(|&group| group > 0);
            let bits = row["bits"].as_u64().unwrap() as usize;
            let packed = packed(&lm, bits, group.map(|group| group as usize));
            let found = window_losses(&packed.model, &batches).unwrap();
            let change = mean(&found) - mean(&of_subset);
            let expected = row["subset_delta_nll"].as_f64().unwrap();
            let off = (change - expected).abs();
            // One code in ten thousand is a tie, and rounds the other way.
            assert!(
                off < 2e-5,
                "{name}, {bits} bits, {group:?}: {change}, {expected}"
            );
        }

        for sample in expected["greedy"].as_array().unwrap() {
            let ids = |key: &str| -> Vec<u32> {
                let ids = numbers(&sample[key]);
                ids.into_iter().map(|id| id as u32).collect()
            };
            let (prompt, expected) = (ids("prompt_ids"), ids("new_ids"));
            let settings = Generation::new(expected.len());
            let go_on = |_| ControlFlow::Continue(());
            let found = generate(&lm.model, &prompt, &settings, go_on).unwrap();
            assert_eq!(found, expected, "{name}: {}", sample["prompt"]);
        }
    }
}
