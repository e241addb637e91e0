//! GGUF: files of other programs, and what is written for them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{
    CheckpointError, CheckpointFormat, Error, GgufType, Pretrained, check_format, load,
    load_verified, save, save_as, save_dense, save_gguf,
};
use peft::{
    Batch, CausalLm, Exactness, Fingerprint, FitConfig, Linears, MergeConfig, Method, Peqa, Tile,
};
use quant_core::{Format, Grid, NormalFloat, Optq, Order, Quantizer, Rtn};
use serde::Deserialize;
use tempfile::TempDir;
use tensor_files::FloatType;
use tensor_files::gguf::{Array, BlockType, GgufFile, GgufTensor, Value, write_gguf};

use super::fixtures::bits;

const NAMES: [&str; 2] = ["llama", "qwen2"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/gguf")
        .join(name)
}

fn json<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    serde_json::from_slice(&fs::read(golden(name)).unwrap()).unwrap()
}

fn model(name: &str) -> Pretrained {
    load(golden(&format!("{name}.gguf")), &Device::flex()).unwrap()
}

/// A model of golden files in dense weights.
fn dense(name: &str) -> (TempDir, Pretrained) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("dense");
    save_dense(&model(name), &out, FloatType::F32).unwrap();
    let lm = load(&out, &Device::flex()).unwrap();
    (dir, lm)
}

fn tokens() -> Tensor<2, Int> {
    let tokens: Vec<i32> = (3..13).collect();
    Tensor::from_data(TensorData::new(tokens, [1, 10]), &Device::flex())
}

fn logits(lm: &Pretrained) -> Vec<f32> {
    let logits = lm.model.forward(tokens());
    logits.into_data().try_into_vec().unwrap()
}

#[derive(Deserialize)]
struct Expected {
    logits: Vec<f32>,
    texts: Vec<(String, Vec<u32>)>,
}

/// Values of every block type, as the Python package `gguf` computes them.
#[test]
fn blocks_have_the_values_of_the_reference() {
    let mut file = GgufFile::open(&golden("blocks.gguf")).unwrap();
    assert_eq!(file.metadata()["test.number"].as_u64(), Some(7));
    let texts = ["a", "", "ü"].map(String::from);
    let texts = Value::Array(Array::String(texts.into()));
    assert_eq!(file.metadata()["test.texts"], texts);
    let expected: BTreeMap<String, Vec<f32>> = json("blocks.json");
    assert_eq!(expected.len(), BlockType::all().count());
    for (name, expected) in expected {
        assert_eq!(file.block_type(&name).unwrap().to_string(), name);
        let found = file.values(&name, [2, expected.len() / 2]).unwrap();
        let differ = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(differ, None, "{name}");
    }
}

#[test]
fn models_compute_the_logits_of_transformers() {
    let expected: BTreeMap<String, Expected> = json("logits.json");
    for name in NAMES {
        let found = logits(&model(name));
        let expected = &expected[name].logits;
        assert_eq!(found.len(), expected.len());
        let largest = expected
            .iter()
            .fold(0f32, |most, value| most.max(value.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5 * largest, "{name}");
        }
    }
}

/// Those of sentencepiece itself for `llama`, and of the tokenizer that was trained for `qwen2`.
#[test]
fn texts_have_the_tokens_of_the_references() {
    let expected: BTreeMap<String, Expected> = json("logits.json");
    for name in NAMES {
        let lm = model(name);
        for (text, tokens) in &expected[name].texts {
            assert_eq!(&lm.encode(text).unwrap(), tokens, "{name}: {text:?}");
            let tokenizer = lm.tokenizer().unwrap();
            assert_eq!(&tokenizer.decode(tokens).unwrap(), text, "{name}");
        }
        let special = lm.special_tokens().unwrap();
        assert_eq!(special.add_bos, name == "llama");
        assert_eq!(special.eos.unwrap().id, 2);
        assert_eq!(lm.stop_tokens(), [2]);
        assert_eq!(lm.chat_template().is_some(), name == "qwen2");
    }
}

#[test]
fn blocks_with_one_scale_stay_packed() {
    let format = |bits, grid| Some(Format::new(bits, Some(32), grid).unwrap());
    let mut found = Vec::new();
    for name in NAMES {
        let lm = model(name);
        found.extend((lm.model.linears().iter()).map(|(_, linear)| linear.weight().format()));
    }
    for expected in [
        format(4, Grid::Affine),
        format(4, Grid::Symmetric),
        format(8, Grid::Affine),
        format(8, Grid::Symmetric),
        None,
    ] {
        assert!(found.contains(&expected), "{expected:?}");
    }
}

#[test]
fn a_loaded_file_is_saved_as_any_model() {
    for name in NAMES {
        let lm = model(name);
        let dir = tempfile::tempdir().unwrap();
        save(&lm, dir.path().join("saved")).unwrap();
        let again = load_verified(dir.path().join("saved"), &Device::flex()).unwrap();
        assert_eq!(bits(logits(&again)), bits(logits(&lm)));
        assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
        let text = "it's 12 boxes";
        assert_eq!(again.encode(text).unwrap(), lm.encode(text).unwrap());
        assert_eq!(
            again.special_tokens().unwrap(),
            lm.special_tokens().unwrap()
        );
        assert_eq!(again.stop_tokens(), lm.stop_tokens());
    }
}

/// What was read is written with the same bytes, and read again.
#[test]
fn reading_and_writing_a_model_changes_no_byte_of_a_layer() {
    for name in NAMES {
        let lm = model(name);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("gguf");
        save_as(&lm, &out, CheckpointFormat::Gguf).unwrap();
        let directory = load_verified(&out, &Device::flex()).unwrap();
        assert_eq!(
            Fingerprint::of(&directory.model),
            Fingerprint::of(&lm.model)
        );
        let alone = load(out.join("model.gguf"), &Device::flex()).unwrap();
        assert_eq!(bits(logits(&alone)), bits(logits(&lm)));
        let text = "naïve  it's 123\n";
        assert_eq!(alone.encode(text).unwrap(), lm.encode(text).unwrap());
        assert_eq!(alone.stop_tokens(), lm.stop_tokens());
        assert_eq!(alone.chat_template(), lm.chat_template());
        let special = |lm: &Pretrained| {
            let special = lm.special_tokens().unwrap();
            (special.bos, special.eos, special.add_bos)
        };
        assert_eq!(special(&alone), special(&lm));

        let mut first = GgufFile::open(&golden(&format!("{name}.gguf"))).unwrap();
        let mut second = GgufFile::open(&out.join("model.gguf")).unwrap();
        let names: Vec<String> = first.names().map(Into::into).collect();
        assert_eq!(names, second.names().collect::<Vec<_>>());
        for tensor in names.iter().filter(|name| name.starts_with("blk.")) {
            match *first.shape(tensor).unwrap() {
                [rows, columns] => assert_eq!(
                    first.bytes(tensor, [rows, columns]).unwrap(),
                    second.bytes(tensor, [rows, columns]).unwrap(),
                    "{tensor}"
                ),
                [n] => assert_eq!(
                    first.values(tensor, [n]).unwrap(),
                    second.values(tensor, [n]).unwrap()
                ),
                _ => unreachable!("tensors have one or two dimensions"),
            }
        }
    }
}

/// Every format that blocks hold comes back bit for bit, with its bits and groups.
#[test]
fn quantized_models_are_held_exactly() {
    let (dir, lm) = dense("llama");
    let mut at = 0;
    for bits_of in [2, 3, 4, 8] {
        for group_size in [Some(32), None] {
            for symmetric in [false, true] {
                if bits_of == 8 && !symmetric {
                    continue;
                }
                let rtn = Rtn::new()
                    .with_bits(bits_of)
                    .with_group_size(group_size)
                    .with_symmetric(symmetric)
                    .with_f16_scales(true)
                    .with_fractional_zeros(true);
                let mut lm = lm.clone();
                models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
                check_format(&lm, CheckpointFormat::Gguf).unwrap();
                at += 1;
                let out = dir.path().join(format!("{at}"));
                save_as(&lm, &out, CheckpointFormat::Gguf).unwrap();
                let again = load(&out, &Device::flex()).unwrap();
                let same = Fingerprint::of(&again.model) == Fingerprint::of(&lm.model);
                assert!(same, "{rtn:?}");
                let alone = load(out.join("model.gguf"), &Device::flex()).unwrap();
                for ((path, a), (_, b)) in alone.model.linears().iter().zip(lm.model.linears()) {
                    let values = |of: &peft::Linear| {
                        let values = of.to_dense().into_data();
                        values.try_into_vec::<f32>().unwrap()
                    };
                    assert_eq!(bits(values(a)), bits(values(b)), "{path}");
                }
            }
        }
    }
}

/// Tuned, merged on the grid of the format, written: the certificate is that of the file.
#[test]
fn tuned_models_are_proved_on_the_file() {
    let methods: [(&str, Box<dyn Method>); 3] = [
        ("peqa", Box::new(Peqa::new())),
        ("peqa-zeros", Box::new(Peqa::new().with_zeros(true))),
        ("qa-lora", Box::new(Tile::qa_lora(2))),
    ];
    let batch = Batch::new(tokens()).unwrap();
    for (name, method) in &methods {
        let (dir, mut lm) = dense("llama");
        let rtn = Rtn::new().with_bits(4).with_group_size(32);
        models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        peft::attach(&mut lm.model, &**method).unwrap();
        let fit = FitConfig::new()
            .with_learning_rate(5e-3)
            .with_steps(Some(3));
        let batches = std::slice::from_ref(&batch);
        peft::fit(&mut lm.model, batches, &fit, |_, _| {}).unwrap();

        let mut rounded = lm.clone();
        let grid = CheckpointFormat::Gguf.stored_grid();
        let merge = MergeConfig::new().with_stored_grid(grid);
        let certificate = peft::merge_with(&mut rounded.model, merge).unwrap();
        assert_eq!(certificate.kind(), "rounded", "{name}");
        rounded.certificate = Some(certificate);
        let out = dir.path().join("rounded");
        save_as(&rounded, &out, CheckpointFormat::Gguf).unwrap();
        let again = load_verified(&out, &Device::flex()).unwrap();
        assert_eq!(bits(logits(&again)), bits(logits(&rounded)), "{name}");

        // Rounded when it is written.
        lm.certificate = Some(peft::merge(&mut lm.model).unwrap());
        let refused = save_as(&lm, dir.path().join("no"), CheckpointFormat::Gguf).unwrap_err();
        assert!(refused.to_string().contains("f16"), "{refused}");
        let out = dir.path().join("written");
        let report = save_gguf(&lm, &out, GgufType::Auto).unwrap();
        let again = load_verified(&out, &Device::flex()).unwrap();
        let certificate = again.certificate.as_ref().unwrap();
        assert_eq!(certificate.kind(), "bounded");
        // And the head, which is no table.
        assert_eq!(report.layers.len(), lm.model.linears().len() + 1);
        for (layer, (path, linear)) in report.layers.iter().zip(lm.model.linears()) {
            assert_eq!(
                (layer.path.as_str(), layer.block_type),
                (path.as_str(), BlockType::Q4_1)
            );
            // Half an f16 ulp of the scale and of the minimum of each block, in relation to all weights.
            assert!(
                layer.relative_error > 1e-6 && layer.relative_error < 2e-3,
                "{layer:?}"
            );
            let certified = certificate
                .layers
                .iter()
                .find(|of| of.path == path)
                .unwrap();
            let Exactness::Bounded {
                max_weight_error, ..
            } = certified.exactness
            else {
                panic!("{certified:?}");
            };
            let values =
                |of: &peft::Linear| of.to_dense().into_data().try_into_vec::<f32>().unwrap();
            let linears = again.model.linears();
            let (_, written) = linears.iter().find(|(of, _)| *of == path).unwrap();
            let errors = values(written).into_iter().zip(values(linear));
            let most = errors.fold(0f64, |most, (a, b)| most.max(f64::from((a - b).abs())));
            assert!(
                most <= max_weight_error * (1.0 + 1e-4),
                "{most} {max_weight_error}"
            );
        }
    }
}

#[test]
fn dense_weights_are_written_in_one_type() {
    let (dir, lm) = dense("qwen2");
    for (float, block) in [
        (FloatType::F32, BlockType::F32),
        (FloatType::F16, BlockType::F16),
        (FloatType::Bf16, BlockType::BF16),
    ] {
        let out = dir.path().join(format!("{float:?}"));
        let report = save_gguf(&lm, &out, GgufType::Dense(float)).unwrap();
        assert!(report.layers.iter().all(|layer| layer.block_type == block));
        let again = load(out.join("model.gguf"), &Device::flex()).unwrap();
        let exact = bits(logits(&again)) == bits(logits(&lm));
        assert_eq!(exact, float == FloatType::F32);
    }
}

fn refusals(lm: &Pretrained) -> Vec<(String, String)> {
    match check_format(lm, CheckpointFormat::Gguf) {
        Err(Error::Checkpoint(CheckpointError::CannotHold { layers, .. })) => layers,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_blocks_do_not_hold_is_refused_by_layer() {
    let (dir, lm) = dense("llama");
    let gram = Batch::new(tokens()).unwrap();
    let cases: [(Box<dyn Quantizer>, &str); 4] = [
        (Box::new(NormalFloat::new()), "uniform grids"),
        (Box::new(Rtn::new().with_bits(8)), "8 bits are symmetric"),
        (
            Box::new(Rtn::new().with_group_size(16)),
            "multiples of the 32",
        ),
        (
            Box::new(
                Optq::new()
                    .with_group_size(32)
                    .with_order(Order::DescendingRegrouped),
            ),
            "an order of its inputs",
        ),
    ];
    for (quantizer, reason) in cases {
        let mut lm = lm.clone();
        let batches = std::slice::from_ref(&gram);
        models::quantize(&mut lm.model, &quantizer, batches, |_| {}).unwrap();
        let refused = refusals(&lm);
        assert!(!refused.is_empty());
        assert!(
            refused.iter().all(|(_, of)| of.contains(reason)),
            "{refused:?}"
        );
        let out = dir.path().join("refused");
        assert!(save_gguf(&lm, &out, GgufType::Auto).is_err());
        assert!(!out.exists());
    }
}

/// A tensor of a file, to be written to another.
fn copied(file: &mut GgufFile, name: &str) -> GgufTensor<'static> {
    match *file.shape(name).unwrap() {
        [rows, columns] => {
            let (of, bytes) = file.bytes(name, [rows, columns]).unwrap();
            GgufTensor::new(of, [rows, columns], || bytes)
        }
        [n] => {
            let (of, bytes) = file.bytes(name, [n]).unwrap();
            GgufTensor::new(of, [n], || bytes)
        }
        _ => unreachable!("tensors have one or two dimensions"),
    }
}

/// Writes a golden file with other metadata.
fn with_metadata(name: &str, change: impl Fn(&mut BTreeMap<String, Value>)) -> (TempDir, PathBuf) {
    let mut file = GgufFile::open(&golden(&format!("{name}.gguf"))).unwrap();
    let mut metadata = file.take_metadata();
    change(&mut metadata);
    let names: Vec<String> = file.names().map(Into::into).collect();
    let tensors = names.into_iter().map(|name| {
        let tensor = copied(&mut file, &name);
        (name, tensor)
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.gguf");
    let metadata: Vec<_> = metadata.into_iter().collect();
    let tensors: Vec<_> = tensors.collect();
    write_gguf(&path, &metadata, tensors).unwrap();
    (dir, path)
}

#[test]
fn metadata_that_cannot_be_honored_are_refused_by_name() {
    let text = |text: &str| Value::String(text.into());
    let cases: [(&str, Value, &str); 10] = [
        (
            "general.architecture",
            text("gemma"),
            "unsupported model type `gemma`",
        ),
        (
            "tokenizer.ggml.pre",
            text("dbrx"),
            "is `dbrx`, which is not known",
        ),
        ("tokenizer.ggml.model", text("bert"), "is `bert`"),
        ("qwen2.expert_count", Value::U32(8), "mixture of experts"),
        ("qwen2.rope.dimension_count", Value::U32(8), "16"),
        ("qwen2.rope.scaling.type", text("yarn"), "yarn"),
        ("qwen2.block_count", Value::U32(1), "no place"),
        ("qwen2.attention.head_count", Value::U32(3), "dimensions"),
        ("tokenizer.ggml.eos_token_id", Value::U32(9999), "9999"),
        ("qwen2.embedding_length", Value::U64(u64::MAX), ""),
    ];
    for (key, value, problem) in cases {
        let (_dir, path) = with_metadata("qwen2", |metadata| {
            metadata.insert(key.into(), value.clone());
        });
        let error = load(&path, &Device::flex()).unwrap_err().to_string();
        assert!(error.contains(problem), "{key}: {error}");
    }
    for key in [
        "general.architecture",
        "qwen2.block_count",
        "tokenizer.ggml.pre",
    ] {
        let (_dir, path) = with_metadata("qwen2", |metadata| {
            metadata.remove(key);
        });
        let error = load(&path, &Device::flex()).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("missing"), "{error}");
    }
}

/// A set of two files, the second without a tokenizer.
#[test]
fn a_split_set_is_one_model() {
    let mut file = GgufFile::open(&golden("qwen2.gguf")).unwrap();
    let mut metadata = file.take_metadata();
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<String> = file.names().map(Into::into).collect();
    for part in 0..2u16 {
        metadata.insert("split.no".into(), Value::U16(part));
        metadata.insert("split.count".into(), Value::U16(2));
        let of_part = names.iter().skip(part.into()).step_by(2);
        let mut tensors = Vec::new();
        for name in of_part {
            tensors.push((name.clone(), copied(&mut file, name)));
        }
        let path = dir.path().join(format!("m-{:05}-of-00002.gguf", part + 1));
        let entries: Vec<_> = metadata.clone().into_iter().collect();
        write_gguf(&path, &entries, tensors).unwrap();
    }
    let first = dir.path().join("m-00001-of-00002.gguf");
    let second = dir.path().join("m-00002-of-00002.gguf");
    let lm = load(&first, &Device::flex()).unwrap();
    assert_eq!(bits(logits(&lm)), bits(logits(&model("qwen2"))));
    let error = load(&second, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("give the first"), "{error}");
    fs::remove_file(second).unwrap();
    let error = load(&first, &Device::flex()).unwrap_err();
    let missing = matches!(
        error,
        Error::Checkpoint(CheckpointError::MissingShard { .. })
    );
    assert!(missing, "{error}");
}

mod interop {
    use super::*;

    /// Every type, written here and read by the Python package `gguf` of `INTEROP_PYTHON`.
    #[test]
    #[ignore = "needs Python with gguf"]
    fn python_reads_the_values_that_are_written() {
        let place = tempfile::tempdir().unwrap();
        let mut files = Vec::new();
        let blocks = place.path().join("blocks.gguf");
        let mut golden_blocks = GgufFile::open(&golden("blocks.gguf")).unwrap();
        let names: Vec<String> = golden_blocks.names().map(Into::into).collect();
        let tensors = names.into_iter().map(|name| {
            let tensor = copied(&mut golden_blocks, &name);
            (name, tensor)
        });
        let tensors: Vec<_> = tensors.collect();
        assert_eq!(tensors.len(), BlockType::all().count());
        write_gguf(&blocks, &[], tensors).unwrap();
        files.push(blocks);
        for name in NAMES {
            let out = place.path().join(name);
            save_as(&model(name), &out, CheckpointFormat::Gguf).unwrap();
            files.push(out.join("model.gguf"));
            let (_dir, mut lm) = dense(name);
            let rtn = Rtn::new().with_bits(3).with_group_size(32);
            models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
            let out = place.path().join(format!("{name}-3"));
            save_gguf(&lm, &out, GgufType::Auto).unwrap();
            files.push(out.join("model.gguf"));
        }
        let python = std::env::var_os("INTEROP_PYTHON").unwrap_or("python3".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/gguf_values.py");
        for path in files {
            let out = place.path().join("values");
            let ran = Command::new(&python)
                .arg(&script)
                .args([&path, &out])
                .output()
                .unwrap();
            let errors = String::from_utf8_lossy(&ran.stderr);
            assert!(ran.status.success(), "{errors}");
            let found = fs::read(&out).unwrap();
            let (found, _) = found.as_chunks::<4>();
            let found: Vec<f32> = found
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect();
            let mut file = GgufFile::open(&path).unwrap();
            let names: Vec<String> = file.names().map(Into::into).collect();
            let mut expected = Vec::new();
            for name in names {
                expected.extend(match *file.shape(&name).unwrap() {
                    [n] => file.values(&name, [n]).unwrap(),
                    [rows, columns] => file.values(&name, [rows, columns]).unwrap(),
                    _ => unreachable!("tensors have one or two dimensions"),
                });
            }
            assert_eq!(found.len(), expected.len());
            let differ = found.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{}", path.display());
        }
    }
}

/// A model of one block, with a tokenizer of four tokens.
fn tiny() -> Vec<u8> {
    let text = |text: &str| Value::String(text.into());
    let texts = |texts: &[&str]| {
        let texts = texts.iter().map(|text| text.to_string());
        Value::Array(Array::String(texts.collect()))
    };
    let number = Value::U32;
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", number(1)),
        ("llama.context_length", number(16)),
        ("llama.embedding_length", number(32)),
        ("llama.feed_forward_length", number(32)),
        ("llama.attention.head_count", number(2)),
        ("llama.attention.head_count_kv", number(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<s>"])),
        (
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(vec![1, 1, 1, 3])),
        ),
        ("tokenizer.ggml.merges", texts(&["a b"])),
        ("tokenizer.ggml.bos_token_id", number(3)),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
    let mut tensors = Vec::new();
    let mut add = |name: &str, of: BlockType, rows: usize| {
        let n = of.n_bytes(rows * 32).unwrap();
        // Bytes whose scales are finite.
        let bytes: Vec<u8> = (0..n).map(|at| (at * 37 % 60) as u8).collect();
        tensors.push((name.to_owned(), GgufTensor::new(of, [rows, 32], || bytes)));
    };
    add("token_embd.weight", BlockType::Q8_0, 4);
    for (name, of, rows) in [
        ("attn_q", BlockType::Q4_1, 32),
        ("attn_k", BlockType::Q4_0, 16),
        ("attn_v", BlockType::Q5_0, 16),
        ("attn_output", BlockType::Q5_1, 32),
        ("ffn_gate", BlockType::F16, 32),
        ("ffn_up", BlockType::Q8_0, 32),
        ("ffn_down", BlockType::BF16, 32),
    ] {
        add(&format!("blk.0.{name}.weight"), of, rows);
    }
    for name in [
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
    ] {
        let ones = BlockType::F32.floats(&[1.0; 32]).unwrap();
        let tensor = GgufTensor::new(BlockType::F32, [32], || ones);
        tensors.push((name.to_owned(), tensor));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    write_gguf(&path, &metadata, tensors).unwrap();
    fs::read(path).unwrap()
}

/// Loads mutations of a file, and returns how many were models.
fn mutations(n: u64) -> u64 {
    let file = tiny();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mutated.gguf");
    let mut out = File::create(&path).unwrap();
    out.write_all(&file).unwrap();
    load(&path, &Device::flex()).unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    // The header, where sizes are.
    let header = file
        .windows(15)
        .rposition(|part| part == b"ffn_norm.weight");
    let header = header.unwrap() + 40;
    let mut n_models = 0;
    for _ in 0..n {
        let mut bytes = file.clone();
        for _ in 0..1 + random(3) {
            let within = if random(8) == 0 { file.len() } else { header };
            let at = random(within);
            match random(4) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF][random(5)],
                2 => {
                    let end = bytes.len().min(at + 8);
                    let large = [u64::MAX, 1 << 63, 1 << 40, 1 << 32, 0][random(5)];
                    bytes[at..end].copy_from_slice(&large.to_le_bytes()[..end - at]);
                }
                _ => bytes[at] = random(256) as u8,
            }
        }
        if random(16) == 0 {
            bytes.truncate(random(file.len()));
        }
        // In its place: a file system may flush one that is truncated and written again.
        out.rewind().unwrap();
        out.write_all(&bytes).unwrap();
        out.set_len(bytes.len() as u64).unwrap();
        n_models += u64::from(load(&path, &Device::flex()).is_ok());
    }
    n_models
}

#[test]
fn mutated_files_are_read_or_refused() {
    let n = mutations(500);
    assert!(n > 0 && n < 500);
}

/// With a limit on memory: `(ulimit -v 4000000; cargo nextest run .. --run-ignored only -E 'test(a_million)')`.
#[test]
#[ignore = "takes minutes"]
fn a_million_mutated_files_are_read_or_refused() {
    let n = mutations(1_000_000);
    assert!(n > 0 && n < 1_000_000);
}
