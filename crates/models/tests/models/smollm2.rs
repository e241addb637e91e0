//! SmolLM2-135M-Instruct, a really trained model, from a GGUF file.
//!
//! `INTEROP_SMOLLM2` names a directory with the file `SmolLM2-135M-Instruct.Q4_1.gguf` and with
//! `reference.json`, which `tests/interop/smollm2.py` makes.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{CheckpointFormat, Generation, GgufType, Pretrained, load, load_verified, save_as};
use peft::{Batch, CausalLm, Linears, Weight, token_nll};
use quant_core::{Quantizer, Rtn};
use serde::Deserialize;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

#[derive(Deserialize)]
struct Reference {
    prompt: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<(Vec<u32>, Vec<u32>)>,
    lines: Vec<(String, Vec<u32>)>,
    text: String,
    tokens: usize,
    windows: usize,
    perplexity: f64,
}

fn dir() -> PathBuf {
    env::var_os("INTEROP_SMOLLM2")
        .expect("INTEROP_SMOLLM2")
        .into()
}

fn tensor(ids: &[u32]) -> Tensor<2, Int> {
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let n = ids.len();
    Tensor::from_data(TensorData::new(ids, [1, n]), &Device::flex())
}

fn perplexity(lm: &Pretrained, text: &str) -> (f64, usize, usize) {
    let tokens = lm.encode(text).unwrap();
    let windows = tokens.chunks_exact(512);
    let n = windows.len();
    let losses = windows.map(|window| {
        let batch = Batch::new(tensor(window)).unwrap();
        let nll = token_nll(&lm.model, &batch);
        let nll = nll.into_data().try_into_vec::<f32>().unwrap();
        nll.iter().map(|&nll| f64::from(nll)).sum::<f64>() / nll.len() as f64
    });
    ((losses.sum::<f64>() / n as f64).exp(), n, tokens.len())
}

#[test]
#[ignore = "needs the file of SmolLM2 and references of transformers"]
fn smollm2_is_the_model_that_transformers_loads() {
    let dir = dir();
    let reference: Reference =
        serde_json::from_slice(&fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let lm = load(dir.join(FILE), &Device::flex()).unwrap();

    let logits = lm.model.forward(tensor(&reference.prompt)).into_data();
    let logits = logits.try_into_vec::<f32>().unwrap();
    let largest = reference
        .logits
        .iter()
        .fold(0f32, |most, x| most.max(x.abs()));
    let pairs = logits.iter().zip(&reference.logits);
    let most = pairs.fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(
        most <= 1e-4 * largest,
        "logits differ by {most} of {largest}"
    );

    for (prompt, expected) in &reference.greedy {
        let settings = Generation::new(expected.len());
        let found = models::generate(
            &lm.model,
            prompt,
            &settings.with_stop(lm.stop_tokens().iter().copied()),
            |_| std::ops::ControlFlow::Continue(()),
        );
        assert_eq!(&found.unwrap(), expected);
    }

    let differ = reference.lines.iter();
    let differ: Vec<_> = differ
        .filter(|(line, ids)| &lm.encode(line).unwrap() != ids)
        .collect();
    // transformers takes the pre-tokenizer of GPT-2 for that of the file, `smollm`, which splits digits first:
    // spaces before a digit are then one token less or more.
    let explained = |line: &str| line.contains("  ");
    assert!(differ.iter().all(|(line, _)| explained(line)), "{differ:?}");

    let (found, windows, tokens) = perplexity(&lm, &reference.text);
    assert_eq!((windows, tokens), (reference.windows, reference.tokens));
    assert!((found / reference.perplexity - 1.0).abs() < 1e-4, "{found}");
}

/// Rounding the weights of Q4_1 again to 4 bits, in the same groups, gives them back.
#[test]
#[ignore = "needs the file of SmolLM2"]
fn fractional_zeros_give_the_weights_of_q4_1_back() {
    let lm = load(dir().join(FILE), &Device::flex()).unwrap();
    let rtn = Rtn::new()
        .with_group_size(32)
        .with_fractional_zeros(true)
        .with_f16_scales(true);
    for (path, linear) in lm.model.linears() {
        let Weight::Quant(packed) = linear.weight() else {
            panic!("{path} is dense");
        };
        let again = rtn.quantize(packed.dequantize(), None).unwrap().weight;
        assert_eq!(again.to_parts(), packed.to_parts(), "{path}");
    }
}

/// Reading and writing gives the same file back, layer by layer.
#[test]
#[ignore = "needs the file of SmolLM2"]
fn smollm2_is_written_as_it_was_read() {
    let lm = load(dir().join(FILE), &Device::flex()).unwrap();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("gguf");
    save_as(&lm, &out, CheckpointFormat::Gguf).unwrap();
    let again = load_verified(&out, &Device::flex()).unwrap();
    assert_eq!(
        peft::Fingerprint::of(&again.model),
        peft::Fingerprint::of(&lm.model)
    );
    let report = models::save_gguf(&lm, place.path().join("auto"), GgufType::Auto).unwrap();
    let most = report.layers.iter().map(|layer| layer.relative_error);
    // The arithmetic of f32 alone.
    assert!(most.fold(0.0, f64::max) < 1e-6);
    let mut first = tensor_files::gguf::GgufFile::open(&dir().join(FILE)).unwrap();
    let mut second = open(&out);
    let names: Vec<String> = first.names().map(Into::into).collect();
    for name in names.iter().filter(|name| name.starts_with("blk.")) {
        if let &[rows, columns] = first.shape(name).unwrap() {
            let shape = [rows, columns];
            assert_eq!(
                first.bytes(name, shape).unwrap(),
                second.bytes(name, shape).unwrap()
            );
        }
    }
}

fn open(out: &Path) -> tensor_files::gguf::GgufFile {
    tensor_files::gguf::GgufFile::open(&out.join("model.gguf")).unwrap()
}
