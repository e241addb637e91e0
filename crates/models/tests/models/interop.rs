//! Directories written here compute the same logits when transformers loads them.
//!
//! Needs Python with torch, transformers and safetensors, and bitsandbytes for its directories: the
//! one that `INTEROP_PYTHON` names, or `python3`. `INTEROP_MODELS` names further directories to compare,
//! separated as those of `PATH`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use models::CheckpointFormat::{Bitsandbytes, Gptq};
use models::GptqVersion::{V1, V2};
use models::{
    CheckpointFormat, Config, LlamaConfig, Model, Pretrained, Streaming, load, quantize_to, save,
    save_as, save_dense,
};
use peft::{Batch, CausalLm, FitConfig, Linears, MergeConfig, Method, Peqa, PerLayer, Tile};
use quant_core::{NormalFloat, Optq, Quantizer, Rtn};
use tensor_files::{FloatType, LazyTensor, write_tensors};

use super::fixtures::{self, Sizes, architectures, write_tokenizer};

const VOCAB: usize = 64;

/// 24 words and signs, three of which the vocabulary lacks.
const TEXT: &str =
    "w3 w1 w4 w15 w9 w2 w6 w53 w58 pi, w9 w7 w9 w32 w38 w46 w26 w43 w38 w32 tau w7 w63";

/// Writes a model, which it may change before, into a new directory.
type Write = fn(&mut Pretrained, &Path);

/// The models; each is written in each of the [`WAYS`]. The base of the rotary embedding of the first ones
/// is not the usual one.
fn shapes() -> Vec<(String, Config)> {
    let llama = llama().with_rope_theta(5_000.0);
    let mut all = vec![
        ("llama".to_string(), llama.clone().into()),
        (
            "llama_tied".to_string(),
            llama.with_tie_word_embeddings(true).into(),
        ),
    ];
    for (number, config) in architectures(SIZES).into_iter().enumerate() {
        let json = config.to_json();
        let model_type = json["model_type"].as_str().unwrap();
        all.push((format!("{model_type}_{number}"), config));
    }
    all
}

const WAYS: [(&str, Write); 14] = [
    ("saved", |lm, dir| save(lm, dir).unwrap()),
    ("f32", |lm, dir| dense(lm, dir, FloatType::F32)),
    ("f16", |lm, dir| dense(lm, dir, FloatType::F16)),
    ("bf16", |lm, dir| dense(lm, dir, FloatType::Bf16)),
    ("gptq_v1", |lm, dir| {
        packed(lm, dir, &rtn().with_symmetric(true), Gptq(V1));
    }),
    ("gptq_v2", |lm, dir| packed(lm, dir, &rtn(), Gptq(V2))),
    ("nf4", |lm, dir| packed(lm, dir, &nf4(), Bitsandbytes)),
    ("gptq_v2_tuned", |lm, dir| {
        let peqa = Peqa::new().with_f16_scales(true);
        tuned(lm, dir, &rtn(), &peqa, Gptq(V2));
        assert!(lm.certificate.as_ref().unwrap().is_exact());
    }),
    ("gptq_v2_rounded", |lm, dir| {
        tuned(lm, dir, &rtn(), &Tile::qa_hira(), Gptq(V2));
        assert_eq!(lm.certificate.as_ref().unwrap().kind(), "rounded");
    }),
    ("nf4_tuned", |lm, dir| {
        tuned(lm, dir, &nf4(), &Peqa::new(), Bitsandbytes);
        assert!(lm.certificate.as_ref().unwrap().is_exact());
    }),
    ("gptq_v2_streamed", |lm, dir| {
        let optq = Optq::new().with_group_size(32).with_f16_scales(true);
        let settings = Streaming::new(&Device::flex()).with_format(Gptq(V2));
        let calibration = [Batch::new(tokens(lm)).unwrap()];
        quantize_to(lm.dir(), dir, &optq, &calibration, &settings, |_| {}).unwrap();
    }),
    ("gptq_v2_by_layer", |lm, dir| {
        let widths = |(at, path): (usize, &String)| {
            let bits = [2, 4, 8][at % 3];
            let rtn = rtn().with_bits(bits).with_symmetric(bits == 8);
            (path.clone(), Box::new(rtn) as Box<dyn Quantizer>)
        };
        let paths: Vec<String> = lm
            .model
            .linears()
            .into_iter()
            .map(|(path, _)| path)
            .collect();
        // The last projection stays dense.
        let quantized = paths.iter().enumerate().take(paths.len() - 1);
        let recipe = PerLayer(quantized.map(widths).collect());
        models::quantize(&mut lm.model, &recipe, &[], |_| {}).unwrap();
        models::quantize_head(&mut lm.model, &rtn().with_bits(8)).unwrap();
        save_as(lm, dir, Gptq(V2)).unwrap();
    }),
    ("nf4_head", |lm, dir| {
        models::quantize(&mut lm.model, &nf4(), &[], |_| {}).unwrap();
        // The embedding of an OPT may be narrower.
        let head = models::quantize_head(&mut lm.model, &nf4());
        head.or_else(|_| models::quantize_head(&mut lm.model, &nf4().with_block_size(32)))
            .unwrap();
        save_as(lm, dir, Bitsandbytes).unwrap();
    }),
    ("unpacked", |lm, dir| {
        models::quantize(&mut lm.model, &nf4(), &[], |_| {}).unwrap();
        dense(lm, dir, FloatType::F32);
    }),
];

/// Widths that fill GPTQ's words and bitsandbytes' blocks, whose scales its CPU kernels mistake where they
/// straddle rows. The heads together are wider than the residual stream, where a model type has that.
const SIZES: Sizes = Sizes {
    vocab: VOCAB,
    positions: 32,
    hidden: 64,
    inner: 128,
    head_dim: 32,
};

fn llama() -> LlamaConfig {
    fixtures::llama()
        .with_vocab_size(VOCAB)
        .with_hidden_size(64)
        .with_intermediate_size(128)
        .with_head_dim(32)
}

/// GPTQ's scales are of 16 bits.
fn rtn() -> Rtn {
    Rtn::new().with_group_size(32).with_f16_scales(true)
}

fn nf4() -> NormalFloat {
    NormalFloat::new().with_block_size(64)
}

fn dense(lm: &Pretrained, dir: &Path, float: FloatType) {
    save_dense(lm, dir, float).unwrap();
}

fn packed(lm: &mut Pretrained, dir: &Path, quantizer: &impl Quantizer, format: CheckpointFormat) {
    models::quantize(&mut lm.model, quantizer, &[], |_| {}).unwrap();
    save_as(lm, dir, format).unwrap();
}

/// Quantizes, tunes and merges into scales and zeros that the format holds.
fn tuned(
    lm: &mut Pretrained,
    dir: &Path,
    quantizer: &impl Quantizer,
    method: &dyn Method,
    format: CheckpointFormat,
) {
    models::quantize(&mut lm.model, quantizer, &[], |_| {}).unwrap();
    peft::attach(&mut lm.model, method).unwrap();
    let batch = Batch::new(tokens(lm)).unwrap();
    let config = FitConfig::new().with_learning_rate(0.02).with_steps(3);
    peft::fit(&mut lm.model, &[batch], &config, |_, _| {}).unwrap();
    let config = MergeConfig::new().with_stored_grid(format.stored_grid());
    lm.certificate = Some(peft::merge_with(&mut lm.model, config).unwrap());
    save_as(lm, dir, format).unwrap();
}

/// Weights large enough for attention to matter, biases that are not zero, norms that are not one;
/// none is a round number.
struct Louder;

impl ModuleMapper for Louder {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|values| {
            if D > 1 {
                return values * 8.0;
            }
            let shape = values.shape();
            let at = Tensor::<1, Int>::arange(1..shape.num_elements() as i64 + 1, &Device::flex());
            values + at.float().sin().reshape(shape) * 0.2
        })
    }
}

/// A new model as it is loaded from a directory with all files that go along.
fn pretrained(config: &Config, dir: &Path) -> Pretrained {
    fs::create_dir(dir).unwrap();
    let path = dir.join("tokenizer.json");
    write_tokenizer(&path, VOCAB);
    let model = Model::init(config, 1, &Device::flex()).map(&mut Louder);
    let new = Pretrained::new(model, &path).unwrap();
    let saved = dir.join("saved");
    save(&new, &saved).unwrap();
    // Without this name transformers takes the tokenizer of any OPT for GPT-2's.
    let tokenizer = r#"{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}"#;
    fs::write(saved.join("tokenizer_config.json"), tokenizer).unwrap();
    let generation = r#"{"bos_token_id": 1, "eos_token_id": [2, 7]}"#;
    fs::write(saved.join("generation_config.json"), generation).unwrap();
    load(&saved, &Device::flex()).unwrap()
}

/// The tokens of [`TEXT`], in two rows if their number is even.
fn tokens(lm: &Pretrained) -> Tensor<2, Int> {
    let ids = lm.encode(TEXT).unwrap();
    let rows = if ids.len().is_multiple_of(2) { 2 } else { 1 };
    let dims = [rows, ids.len() / rows];
    let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
    Tensor::from_data(TensorData::new(ids, dims), &Device::flex())
}

/// Writes the logits of a directory beside it, computed with the weights that were written.
fn write_probe(dir: &Path) {
    let lm = load(dir, &Device::flex()).unwrap();
    let ids = lm.encode(TEXT).unwrap();
    let tokens = tokens(&lm);
    let (dims @ [rows, columns], vocab) = (tokens.dims(), lm.model.config().vocab_size());
    let logits = lm.model.forward(tokens).into_data().try_into_vec::<f32>();
    let logits = logits.unwrap();
    let stop = lm.stop_tokens();
    let tensors = [
        ("input_ids", LazyTensor::words(dims, || ids.clone())),
        (
            "logits",
            LazyTensor::floats_as(FloatType::F32, [rows, columns, vocab], || logits.clone()),
        ),
        ("stop", LazyTensor::words([stop.len()], || stop.to_vec())),
        ("text", LazyTensor::bytes([TEXT.len()], || TEXT.into())),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_string(), tensor));
    let mut path = dir.to_path_buf();
    path.as_mut_os_string().push(".probe.safetensors");
    write_tensors(&path, tensors).unwrap();
}

#[test]
#[ignore = "needs Python with transformers"]
fn transformers_computes_the_same_logits() {
    let python = env::var("INTEROP_PYTHON").unwrap_or("python3".into());
    let out = tempfile::tempdir().unwrap();
    let mut dirs: Vec<PathBuf> = Vec::new();
    for (shape, config) in shapes() {
        let lm = pretrained(&config, &out.path().join(&shape));
        for (way, write) in WAYS {
            let dir = out.path().join(format!("{shape}-{way}"));
            write(&mut lm.clone(), &dir);
            assert_eq!(load(&dir, &Device::flex()).unwrap().stop_tokens(), [2, 7]);
            dirs.push(dir);
        }
    }
    let others = env::var_os("INTEROP_MODELS").unwrap_or_default();
    dirs.extend(env::split_paths(&others).filter(|dir| dir.is_dir()));
    dirs.iter().for_each(|dir| write_probe(dir));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/logits.py");
    let output = Command::new(&python).arg(script).args(&dirs).output();
    let output = output.unwrap();
    let differences = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{differences}\n{errors}");
    eprint!("{differences}");
    assert_eq!(differences.lines().count(), dirs.len());
}
