//! SmolLM2-135M-Instruct, a really trained model, from a GGUF file and to one.
//!
//! `INTEROP_SMOLLM2` names a directory with the file `SmolLM2-135M-Instruct.Q4_1.gguf` and with `reference.json`,
//! which `tests/interop/smollm2.py` makes; `INTEROP_LLAMA_CPP` a Python with llama-cpp-python or cyllama.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{
    CheckpointFormat, Generation, GgufType, Pretrained, load, load_verified, save_as, save_gguf,
};
use peft::{Batch, CausalLm, FitConfig, Linears, Method, Peqa, Tile, Weight, token_nll};
use quant_core::{Quantizer, Rtn};
use serde::Deserialize;
use tensor_files::FloatType;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

#[derive(Deserialize)]
struct Reference {
    prompt: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<(Vec<u32>, Vec<u32>)>,
    lines: Vec<(String, Vec<u32>)>,
    of_transformers: Vec<Vec<u32>>,
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

    for (line, tokens) in &reference.lines {
        assert_eq!(&lm.encode(line).unwrap(), tokens, "{line:?}");
    }
    // Where a space comes before a number that is no digit of ASCII, or several before a digit.
    let others = reference.lines.iter().zip(&reference.of_transformers);
    assert!(others.filter(|((_, a), b)| a != *b).count() <= 5);

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
    let report = save_gguf(&lm, place.path().join("auto"), GgufType::Auto).unwrap();
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

/// The logits of llama.cpp for windows of tokens.
fn llama_cpp(model: &Path, windows: &[&[u32]], scratch: &Path) -> Vec<f32> {
    let (tokens, out) = (scratch.join("tokens.json"), scratch.join("logits"));
    fs::write(&tokens, serde_json::to_vec(windows).unwrap()).unwrap();
    let python = env::var_os("INTEROP_LLAMA_CPP").expect("INTEROP_LLAMA_CPP");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/logits_of_llama_cpp.py");
    let ran = Command::new(python)
        .arg(script)
        .args([model, &tokens, &out])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{errors}");
    let bytes = fs::read(out).unwrap();
    let (floats, _) = bytes.as_chunks::<4>();
    floats
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect()
}

/// The mean loss of the next tokens by these logits, in nats.
fn loss(logits: &[f32], windows: &[&[u32]], vocab: usize) -> f64 {
    let mut rows = logits.chunks_exact(vocab);
    let mut losses = Vec::new();
    for window in windows {
        for at in 0..window.len() {
            let row = rows.next().unwrap();
            let Some(&next) = window.get(at + 1) else {
                continue;
            };
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
            losses.push(sum.ln() - f64::from(row[next as usize] - most));
        }
    }
    losses.iter().sum::<f64>() / losses.len() as f64
}

/// The root mean square of differences, in relation to that of the values.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let (mut error, mut all) = (0.0, 0.0);
    for (&found, &expected) in found.iter().zip(expected) {
        error += f64::from(found - expected).powi(2);
        all += f64::from(expected).powi(2);
    }
    (error / all).sqrt()
}

/// Tuned, merged, written and read by llama.cpp. The files of floats show that its model is ours; the file of blocks,
/// whose products llama.cpp computes with activations of 8 bits, may differ by that rounding, which the file as it
/// was before tuning shows too.
#[test]
#[ignore = "needs the file of SmolLM2, and llama.cpp"]
fn a_tuned_model_runs_in_llama_cpp() {
    let reference: Reference =
        serde_json::from_slice(&fs::read(dir().join("reference.json")).unwrap()).unwrap();
    let base = load(dir().join(FILE), &Device::flex()).unwrap();
    let vocab = base.model.config().vocab_size();
    let tokens = base.encode(&reference.text).unwrap();
    let windows: Vec<&[u32]> = tokens.chunks_exact(128).skip(60).take(4).collect();
    let train = tokens.chunks_exact(64).take(8);
    let train: Vec<Batch> = train.map(|of| Batch::new(tensor(of)).unwrap()).collect();
    let ours = |lm: &Pretrained| -> Vec<f32> {
        let logits = windows.iter().flat_map(|window| {
            let logits = lm.model.forward(tensor(window)).into_data();
            logits.try_into_vec::<f32>().unwrap()
        });
        logits.collect()
    };
    let place = tempfile::tempdir().unwrap();
    let original = ours(&base);
    let of_llama_cpp = llama_cpp(&dir().join(FILE), &windows, place.path());
    let activations = distance(&of_llama_cpp, &original);
    let methods: [(&str, Box<dyn Method>); 2] = [
        ("peqa", Box::new(Peqa::new())),
        ("qa-lora", Box::new(Tile::qa_lora(4))),
    ];
    let mut rows = vec![serde_json::json!({
        "model": "as it was", "loss": loss(&original, &windows, vocab),
        "loss of llama.cpp": loss(&of_llama_cpp, &windows, vocab), "distance": activations,
    })];
    for (name, method) in methods {
        let mut lm = base.clone();
        peft::attach(&mut lm.model, &*method).unwrap();
        let fit = FitConfig::new().with_learning_rate(2e-4).with_steps(8);
        peft::fit(&mut lm.model, &train, &fit, |_, _| {}).unwrap();
        lm.certificate = Some(peft::merge(&mut lm.model).unwrap());
        let tuned = ours(&lm);
        let out = place.path().join(name);
        let report = save_gguf(&lm, &out, GgufType::Auto).unwrap();
        let again = load_verified(&out, &Device::flex()).unwrap();
        assert_eq!(again.certificate.as_ref().unwrap().kind(), "bounded");
        let written = ours(&again);
        let floats = place.path().join(format!("{name}-f32"));
        save_gguf(&again, &floats, GgufType::Dense(FloatType::F32)).unwrap();
        let in_floats = llama_cpp(&floats.join("model.gguf"), &windows, place.path());
        let in_blocks = llama_cpp(&out.join("model.gguf"), &windows, place.path());
        let errors = report.layers.iter().map(|layer| layer.relative_error);
        rows.push(serde_json::json!({
            "model": name,
            "largest relative error of a layer": errors.fold(0.0, f64::max),
            "distance of the tuned model from the base": distance(&tuned, &original),
            "distance of the written model from the tuned one": distance(&written, &tuned),
            "distance of llama.cpp in f32 from the written model": distance(&in_floats, &written),
            "distance of llama.cpp in blocks from the written model": distance(&in_blocks, &written),
            "losses": {
                "tuned": loss(&tuned, &windows, vocab),
                "written": loss(&written, &windows, vocab),
                "llama.cpp in f32": loss(&in_floats, &windows, vocab),
                "llama.cpp in blocks": loss(&in_blocks, &windows, vocab),
            },
        }));
        let json = serde_json::to_vec_pretty(&rows).unwrap();
        fs::write(dir().join("llama-cpp.json"), json).unwrap();
        // It keeps keys and values in f16.
        assert!(distance(&in_floats, &written) < 2e-3, "{name}");
        assert!(distance(&in_blocks, &written) < 1.5 * activations, "{name}");
        assert!(
            distance(&written, &tuned) < 0.2 * distance(&tuned, &original),
            "{name}"
        );
    }
}
