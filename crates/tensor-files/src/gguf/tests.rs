use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::Error;

fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// A file with metadata of several types and a tensor of 64 values in Q4_1.
fn sample() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let metadata = [
        ("general.architecture".into(), Value::String("llama".into())),
        ("a.number".into(), Value::U32(7)),
        (
            "a.list".into(),
            Value::Array(Array::String(vec!["x".into(), "".into()])),
        ),
    ];
    let bytes = (0..40).collect();
    let tensor = GgufTensor::new(BlockType::Q4_1, [2, 32], || bytes);
    write_gguf(&path, &metadata, [("w".into(), tensor)]).unwrap();
    std::fs::read(path).unwrap()
}

fn problem(bytes: &[u8]) -> String {
    let (_dir, path) = file(bytes);
    GgufFile::open(&path).unwrap_err().to_string()
}

#[test]
fn every_prefix_is_refused() {
    let bytes = sample();
    for n in 0..bytes.len() - 1 {
        // The padding after the last tensor is no part of it.
        if n < bytes.len() - 24 {
            problem(&bytes[..n]);
        }
    }
}

#[test]
fn counts_beyond_the_file_are_refused_before_anything_is_reserved() {
    let bytes = sample();
    for at in [8, 16] {
        let mut large = bytes.clone();
        large[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        problem(&large);
    }
    // The length of the first key.
    let mut large = bytes.clone();
    large[24..32].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(problem(&large).contains("ends in its header"));
}

#[test]
fn other_files_are_refused_by_what_they_are() {
    assert!(problem(b"GGML\0\0\0\0").contains("no GGUF file"));
    assert!(problem(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(problem(b"GGUF\0\0\0\x03").contains("big-endian"));
    assert!(problem(b"<!doctype html><html>").contains("web page"));
}

#[test]
fn tensors_of_other_types_and_places_are_refused() {
    let bytes = sample();
    // The tensor's entry ends with its type and its offset, 12 bytes before the padding.
    let name = bytes.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0w");
    let id = name.unwrap() + 9 + 4 + 16;
    let mut other = bytes.clone();
    other[id] = 23;
    assert!(problem(&other).contains("IQ4_XS"));
    other[id] = 99;
    assert!(problem(&other).contains("number 99"));
    // Blocks of 256 in rows of 32.
    other[id] = 12;
    assert!(problem(&other).contains("rows of 32"));
    let mut moved = bytes.clone();
    moved[id + 4] = 32;
    assert!(problem(&moved).contains("truncated"));
    moved[id + 4] = 1;
    let moved = problem(&moved);
    assert!(
        moved.contains("truncated") || moved.contains("multiple of 32"),
        "{moved}"
    );
}

#[test]
fn what_is_not_finite_is_refused() {
    let mut bytes = sample();
    let at = bytes.len() - 64;
    // The scale of the first block.
    bytes[at..at + 2].copy_from_slice(&[0x00, 0x7C]);
    let (_dir, path) = file(&bytes);
    let mut file = GgufFile::open(&path).unwrap();
    let error = file.values("w", [2, 32]).unwrap_err();
    assert!(matches!(error, Error::Tensor { .. }), "{error}");
}

#[test]
fn files_of_another_number_of_bytes_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let tensor = GgufTensor::new(BlockType::F32, [3], || vec![0; 11]);
    assert!(write_gguf(&path, &[], [("w".into(), tensor)]).is_err());
    assert!(!path.exists());
    let tensor = GgufTensor::new(BlockType::Q8_0, [33], || vec![0; 34]);
    assert!(write_gguf(&path, &[], [("w".into(), tensor)]).is_err());
}

fn values() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<bool>().prop_map(Value::Bool),
        (-1e30f32..1e30).prop_map(Value::F32),
        (-1e300f64..1e300).prop_map(Value::F64),
        ".{0,9}".prop_map(Value::String),
        prop::collection::vec(".{0,9}", 0..5).prop_map(|v| Value::Array(Array::String(v))),
        prop::collection::vec(-1e9f32..1e9, 0..5).prop_map(|v| Value::Array(Array::F32(v))),
        prop::collection::vec(any::<i32>(), 0..5).prop_map(|v| Value::Array(Array::I32(v))),
        prop::collection::vec(any::<bool>(), 0..5).prop_map(|v| Value::Array(Array::Bool(v))),
    ]
}

fn types() -> impl Strategy<Value = BlockType> {
    prop::sample::select(BlockType::all().collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn reading_undoes_writing(
        metadata in prop::collection::btree_map("[a-z.]{1,12}", values(), 0..6),
        tensors in prop::collection::btree_map("[a-z.]{1,12}", (types(), 1usize..4, 1usize..3), 0..5),
        seed in any::<u8>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let bytes = |of: BlockType, rows: usize, blocks: usize| -> Vec<u8> {
            let n = of.n_bytes(rows * blocks * of.block_len()).unwrap();
            (0..n).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
        };
        let entries: Vec<_> = metadata.clone().into_iter().collect();
        let written = tensors.iter().map(|(name, &(of, rows, blocks))| {
            let shape = [rows, blocks * of.block_len()];
            (name.clone(), GgufTensor::new(of, shape, move || bytes(of, rows, blocks)))
        });
        write_gguf(&path, &entries, written).unwrap();
        let mut file = GgufFile::open(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.names().count(), tensors.len());
        for (name, (of, rows, blocks)) in tensors {
            let shape = [rows, blocks * of.block_len()];
            let (found, read) = file.bytes(&name, shape).unwrap();
            prop_assert_eq!(found, of);
            prop_assert_eq!(read, bytes(of, rows, blocks));
        }
    }

    #[test]
    fn packing_undoes_unpacking(bytes in prop::collection::vec(any::<u8>(), 34 * 3), of in types()) {
        let n = of.n_bytes(of.block_len()).unwrap();
        let bytes = &bytes[..bytes.len() / n * n];
        if let Some(blocks) = of.blocks(bytes) {
            // A NaN has several bit patterns.
            if blocks.scales.iter().all(|scale| !scale.is_nan()) {
                let again = blocks.to_bytes(of);
                prop_assert_eq!(of.blocks(&again).unwrap().codes, blocks.codes);
                prop_assert_eq!(of.block_len(), 32);
            }
        }
    }

    #[test]
    fn mutated_files_do_not_panic(edits in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
        let mut bytes = sample();
        for (at, value) in edits {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        let (_dir, path) = file(&bytes);
        if let Ok(mut file) = GgufFile::open(&path) {
            let names: Vec<String> = file.names().map(Into::into).collect();
            for name in names {
                let _ = file.values(&name, [2, 32]);
            }
        }
    }
}
