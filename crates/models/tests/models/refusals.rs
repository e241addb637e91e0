//! Files, configurations, tokens and batches that are refused, each with an error that says what is
//! wrong with which of them; and what only looks like one of them, and is read.

mod configs;
mod directories;
mod headers;
mod positions;
mod tokenizers;
mod tokens;
#[cfg(unix)]
mod unix;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use models::{Error, load, plan};
use quant_core::Rtn;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::fixtures::{Tensors, golden, read_tensors, write_tensors, write_tokenizer};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARDS: [&str; 2] = ["one.safetensors", "two.safetensors"];

/// The files of a directory that are read by their names.
const PLACES: [&str; 8] = [
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    INDEX,
    "quantize_config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Contents of files that stand in for others, and what is to be said of them.
const STAND_INS: [(&[u8], &str); 6] = [
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "git lfs pull",
    ),
    (b"\n<!DOCTYPE html>\n<html></html>\n", "web page"),
    (b"\r\n\t <HtMl lang=\"en\">", "web page"),
    (b"/annex/objects/SHA256E-s12--00\n", "git annex get"),
    (
        b"../.git/annex/objects/0X/w1/SHA256E-s12--00",
        "git annex get",
    ),
    (b"PK\x03\x04\x00\x00", "zip archive"),
];

/// A dense LLaMA.
const LLAMA: &str = "llama_bf16";

/// A golden directory with a tokenizer, whose files may be changed.
fn copy(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in [CONFIG, WEIGHTS] {
        // Not `copy`, which would take the permissions along.
        let bytes = fs::read(golden(name).join(file)).unwrap();
        fs::write(copy.path().join(file), bytes).unwrap();
    }
    write_tokenizer(&copy.path().join(TOKENIZER), 16);
    copy
}

/// A directory in which the file `name` is to be put. An index is not read beside weights in one file.
fn without(name: &str) -> TempDir {
    let dir = copy(LLAMA);
    let path = dir.path().join(if name == INDEX { WEIGHTS } else { name });
    if path.exists() {
        fs::remove_file(path).unwrap();
    }
    dir
}

/// Changes the configuration and the tensors of a directory.
fn change(dir: &Path, change: impl FnOnce(&mut Value, &mut Tensors)) {
    let path = dir.join(CONFIG);
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut all = read_tensors(&dir.join(WEIGHTS));
    change(&mut config, &mut all);
    fs::write(path, config.to_string()).unwrap();
    write_tensors(&dir.join(WEIGHTS), &all);
}

/// A directory of two shards, after a change to them and to their index.
fn sharded(change: impl FnOnce(&mut [Tensors; 2], &mut Value)) -> TempDir {
    let dir = without(INDEX);
    let mut one = read_tensors(&golden(LLAMA).join(WEIGHTS));
    let middle = one.keys().nth(one.len() / 2).unwrap().clone();
    let two = one.split_off(&middle);
    let mut files = [one, two];
    let mut index = json!({"metadata": {"total_size": 0}, "weight_map": {}});
    for (file, shard) in files.iter().zip(SHARDS) {
        for (tensor, (_, _, bytes)) in file {
            index["weight_map"][tensor] = json!(shard);
            let size = index["metadata"]["total_size"].as_u64().unwrap() + bytes.len() as u64;
            index["metadata"]["total_size"] = json!(size);
        }
    }
    change(&mut files, &mut index);
    for (file, shard) in files.iter().zip(SHARDS) {
        write_tensors(&dir.path().join(shard), file);
    }
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    dir
}

fn refusal(dir: &Path) -> Error {
    load(dir, &Device::flex()).unwrap_err()
}

/// Of what is known before a tensor is read.
fn refusal_of_plan(dir: &Path) -> Error {
    plan(dir, &Rtn::new()).unwrap_err()
}

/// Asserts that the file `name` as a whole is refused.
#[track_caller]
fn assert_file(error: &Error, name: &str, part: &str) {
    let (Error::File(file) | Error::Peft(peft::Error::File(file))) = error else {
        panic!("{name}, {part:?}: {error:?}");
    };
    let tensor_files::Error::File { path, problem } = file else {
        panic!("{name}, {part:?}: {error:?}");
    };
    let is_said = path.ends_with(name) && problem.contains(part);
    assert!(is_said, "{name}, {part:?}: {error}");
}

/// Asserts that a tensor is refused.
#[track_caller]
fn assert_tensor(error: &Error, name: &str, part: &str) {
    let Error::File(tensor_files::Error::Tensor {
        tensor, problem, ..
    }) = error
    else {
        panic!("{name}, {part:?}: {error:?}");
    };
    let is_said = tensor == name && problem.contains(part);
    assert!(is_said, "{name}, {part:?}: {error}");
}

#[test]
fn what_the_tests_change_is_read() {
    for dir in [copy(LLAMA), copy("opt_125m_style"), sharded(|_, _| ())] {
        load(dir.path(), &Device::flex()).unwrap();
        plan(dir.path(), &Rtn::new()).unwrap();
    }
}
