//! Layers that GPTQModel and bitsandbytes packed, from the shared golden files.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use peft::Weight;
use quant_core::QuantTensor;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tensor_files::{FloatType, LazyTensor, TensorFile, write_tensors};

use super::bitsandbytes::Bitsandbytes;
use super::directory::WEIGHTS;
use super::format::{LayerFormat, Layers};
use super::gptq::{Gptq, Wrapping, Zeros, config_files, reasons_against_values};
use super::packing::{pack, transpose};
use super::parameters::read as values;
use super::tensors::Tensors;
use crate::{CheckpointError, Error, GptqVersion, Result};

fn shared(file: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("../../../shared/golden").join(file)
}

/// The packed layer at `layer` in a directory of these tensors.
fn read(
    format: &dyn LayerFormat,
    tensors: Vec<(String, LazyTensor)>,
    dims: [usize; 2],
) -> Result<QuantTensor> {
    let dir = tempfile::tempdir().unwrap();
    write_tensors(&dir.path().join(WEIGHTS), tensors).unwrap();
    read_in(format, &dir, dims)
}

fn read_in(format: &dyn LayerFormat, dir: &TempDir, dims: [usize; 2]) -> Result<QuantTensor> {
    let mut tensors = Tensors::of_file(&dir.path().join(WEIGHTS)).unwrap();
    let weight = format.read(&mut tensors, "layer", dims, &Device::flex())?;
    Ok(weight.expect("the layer is packed"))
}

fn gptq(quantizer: &str, bits: usize, group_size: i64, sym: bool, version: &str) -> Gptq {
    let config = json!({
        "bits": bits, "group_size": group_size, "sym": sym, "checkpoint_format": version,
        "quant_method": "gptq", "meta": { "quantizer": [quantizer] },
    });
    let files = config_files(Path::new("nowhere"), Some(&config)).unwrap();
    // The version is stated: no tensor is looked at.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(WEIGHTS);
    write_tensors(&path, []).unwrap();
    Gptq::open(files, &mut Tensors::of_file(&path).unwrap()).unwrap()
}

#[test]
#[ignore = "needs ../shared"]
fn layers_are_gptqmodels() {
    let path = shared("gptq/layers.safetensors");
    let settings = std::fs::read(shared("gptq/layers.json")).unwrap();
    let settings: Map<String, Value> = serde_json::from_slice(&settings).unwrap();
    let mut file = TensorFile::open(&path).unwrap();
    let (mut checked, mut ordered) = (0, 0);
    for (name, settings) in &settings {
        let bits = settings["bits"].as_u64().unwrap() as usize;
        let group_size = settings["group_size"].as_i64().unwrap();
        let sym = settings["sym"].as_bool().unwrap();
        let dims = [128, 64];
        let mut floats = |part: &str| file.floats::<2>(&format!("{name}.{part}")).unwrap().0;
        let dequantized = floats("dequantized");
        let (zeros, scales) = (floats("zero"), floats("scales_f16"));
        let n_groups = zeros.len() / 64;
        let zeros = transpose(&zeros, [64, n_groups]);
        let (g_idx, _) = file.words::<1>(&format!("{name}.g_idx")).unwrap();
        let (qweight, shape) = file.words::<2>(&format!("{name}.qweight")).unwrap();
        for (version, quantizer, parts) in [
            ("gptq", "gptqmodel:7.7.0", "qzeros_v1"),
            ("gptq", "another:1", "qzeros_v1"),
            ("gptq_v2", "another:1", "qzeros_v2"),
        ] {
            let (qzeros, zero_shape) = file.words::<2>(&format!("{name}.{parts}")).unwrap();
            let words = |shape: [usize; 2], words: &Vec<u32>| {
                let words = words.clone();
                LazyTensor::words(shape, move || words.clone())
            };
            let tensors = vec![
                ("layer.qweight".to_string(), words(shape, &qweight)),
                ("layer.qzeros".to_string(), words(zero_shape, &qzeros)),
                (
                    "layer.scales".to_string(),
                    LazyTensor::floats_as(FloatType::F16, [n_groups, 64], || scales.clone()),
                ),
                (
                    "layer.g_idx".to_string(),
                    LazyTensor::words([128], || g_idx.clone()),
                ),
            ];
            let format = gptq(quantizer, bits, group_size, sym, version);
            let weight = match read(&format, tensors, dims) {
                Ok(weight) => weight,
                Err(Error::Checkpoint(CheckpointError::WrappedZeros { group, output, .. })) => {
                    assert_eq!((name.as_str(), quantizer), ("w4_zero_point_0", "another:1"));
                    assert_eq!((group, output), (0, 0));
                    checked += 1;
                    continue;
                }
                Err(error) => panic!("{name}: {error}"),
            };
            assert_eq!(weight.zeros().is_none(), sym, "{name}");
            if let Some(found) = weight.zeros() {
                assert_eq!(values(found), zeros, "{name}, {parts}");
            }
            assert_eq!(weight.input_order().is_some(), !g_idx.is_sorted(), "{name}");
            ordered += usize::from(weight.input_order().is_some());
            // The reference's are rounded to f16.
            let found = transpose(&values(weight.dequantize()), dims);
            let differences = found.iter().zip(&dequantized).map(|(a, b)| (a - b).abs());
            let off = differences.fold(0.0, f32::max);
            assert!(off < 1e-4, "{name}: weights differ by {off}");

            let mut layers = Layers::default();
            layers.push("layer".into(), &Weight::Quant(weight.clone()));
            for to in [GptqVersion::V1, GptqVersion::V2] {
                assert!(reasons_against_values(&weight).is_empty());
                if name == "w4_zero_point_0" && to == GptqVersion::V1 {
                    // Affine layers are not written in this version, which has no 0.
                    continue;
                }
                let written = Gptq::for_layers(&layers, to);
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join(WEIGHTS);
                write_tensors(&path, written.tensors("layer", &weight)).unwrap();
                let mut again = TensorFile::open(&path).unwrap();
                let part = match to {
                    GptqVersion::V1 => "qzeros_v1",
                    GptqVersion::V2 => "qzeros_v2",
                };
                let expected = file.words::<2>(&format!("{name}.{part}")).unwrap();
                assert_eq!(
                    again.words::<2>("layer.qzeros").unwrap(),
                    expected,
                    "{name}"
                );
                let (found, _) = again.words::<2>("layer.qweight").unwrap();
                assert_eq!(found, qweight, "{name}");
                assert_eq!(again.words::<1>("layer.g_idx").unwrap().0, g_idx, "{name}");
                let back = read_in(&written, &dir, dims).unwrap();
                assert_eq!(back.to_parts(), weight.to_parts());
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 3 * settings.len());
    assert!(ordered > 0);
}

#[test]
fn zeros_of_version_1_wrap_as_their_writer_had_it() {
    // Two words of eight 4-bit zero-points, the second row of `w4_zero_point_0`.
    let of = |quantizer: &str, bits: usize, words: &[u32], n_groups: usize| {
        let wrapping = match quantizer {
            "gptqmodel:7.7.0" if bits == 3 => Wrapping::Fields,
            "gptqmodel:7.7.0" => Wrapping::Words(4),
            _ => Wrapping::Unknown,
        };
        let zeros = Zeros {
            bits,
            version: GptqVersion::V1,
            wrapping,
        };
        zeros.unpack(words, n_groups)
    };
    let zeros = |quantizer: &str, words: &[u32]| of(quantizer, 4, words, words.len() / 2);
    let expected = [0, 0, 0, 0, 0, 0, 0, 0, 8, 9, 6, 8, 8, 9, 6, 7];
    let words = [0xEEEE_EEEF, 0x6587_7587];
    assert_eq!(zeros("gptqmodel:7.7.0", &words).unwrap(), expected);
    assert_eq!(zeros("auto_gptq:0.7", &words), Err((0, 0)));
    // What AutoGPTQ's packer makes of a zero-point of 0 among 5, 0, 7.
    assert_eq!(zeros("", &[0x7777_7777, 0xFFFF_FFF4]), Err((0, 9)));
    // At the end of a word there is nothing to change.
    let last = zeros("", &[0xF777_7777, 0x7777_7777]).unwrap();
    assert_eq!(last, [&[8; 7][..], &[0], &[8; 8]].concat());
    assert_eq!(
        zeros("gptqmodel:7.7.0", &[0xF777_7777, 0x7777_7777]).unwrap(),
        last
    );
    // 3-bit fields one by one; those that end a word are the 11th, the 22nd and the 32nd.
    let three = |quantizer: &str, stored: &[u8]| {
        let words = pack(stored, 1, 3);
        of(quantizer, 3, &words, 1)
    };
    for at in 0..32 {
        let mut stored = vec![3; 32];
        stored[at] = 7;
        let mut zeros = vec![4; 32];
        zeros[at] = 0;
        assert_eq!(three("gptqmodel:7.7.0", &stored), Ok(zeros.clone()));
        let told = [10, 21, 31].contains(&at);
        let found = three("", &stored);
        assert_eq!(found, if told { Ok(zeros) } else { Err((0, at)) });
    }
}

fn bitsandbytes() -> Bitsandbytes {
    Bitsandbytes::open(&json!({ "load_in_4bit": true }), Path::new("nowhere")).unwrap()
}

#[test]
#[ignore = "needs ../shared"]
fn blocks_are_bitsandbytes() {
    let path = shared("nf4/blocks.safetensors");
    let settings = std::fs::read(shared("nf4/blocks.json")).unwrap();
    let settings: Map<String, Value> = serde_json::from_slice(&settings).unwrap();
    let mut file = TensorFile::open(&path).unwrap();
    for (name, settings) in &settings {
        let mut state = json!({
            "quant_type": settings["quant_type"], "blocksize": settings["blocksize"],
            "dtype": "float32", "shape": settings["shape"],
        });
        let named = |part: &str| format!("{name}.{part}");
        let quant_type = settings["quant_type"].as_str().unwrap();
        let mut tensors = Vec::new();
        let mut add = |part: &str, tensor| tensors.push((format!("layer.weight{part}"), tensor));
        let (packed, shape) = file.bytes::<2>(&named("packed")).unwrap();
        add("", LazyTensor::bytes(shape, move || packed.clone()));
        let (map, shape) = file.floats::<1>(&named("code")).unwrap();
        add(
            ".quant_map",
            LazyTensor::floats_as(FloatType::F32, shape, move || map.clone()),
        );
        if settings["nested"] == json!(true) {
            let (absmax, shape) = file.bytes::<1>(&named("absmax")).unwrap();
            add(".absmax", LazyTensor::bytes(shape, move || absmax.clone()));
            for (from, to) in [
                ("nested_absmax", ".nested_absmax"),
                ("nested_code", ".nested_quant_map"),
            ] {
                let (values, shape) = file.floats::<1>(&named(from)).unwrap();
                add(
                    to,
                    LazyTensor::floats_as(FloatType::F32, shape, move || values.clone()),
                );
            }
            let (offset, _) = file.floats::<1>(&named("offset")).unwrap();
            state["nested_blocksize"] = settings["nested_blocksize"].clone();
            state["nested_offset"] = f64::from(offset[0]).into();
        } else {
            let (absmax, shape) = file.floats::<1>(&named("absmax")).unwrap();
            add(
                ".absmax",
                LazyTensor::floats_as(FloatType::F32, shape, move || absmax.clone()),
            );
        }
        let state = state.to_string().into_bytes();
        add(
            &format!(".quant_state.bitsandbytes__{quant_type}"),
            LazyTensor::bytes([state.len()], move || state.clone()),
        );
        let weight = read(&bitsandbytes(), tensors, [256, 64]).unwrap();
        let (expected, _) = file.floats::<2>(&named("dequantized")).unwrap();
        let found = transpose(&values(weight.dequantize()), [256, 64]);
        assert!(found == expected, "{name}: the weights differ");
    }
}

#[test]
#[ignore = "needs ../shared"]
fn layers_are_bitsandbytes() {
    for name in ["linear4bit_dq", "linear4bit_flat"] {
        let path = shared(&format!("nf4/{name}.safetensors"));
        let mut file = TensorFile::open(&path).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(&path, dir.path().join(WEIGHTS)).unwrap();
        let weight = read_in(&bitsandbytes(), &dir, [128, 64]).unwrap();
        let (x, shape) = file.floats::<2>("x").unwrap();
        let (y, _) = file.floats::<2>("y").unwrap();
        let (bias, _) = file.floats::<1>("layer.bias").unwrap();
        let x = Tensor::<2>::from_data(TensorData::new(x, shape), &Device::flex());
        let found = values(weight.matmul(x));
        let expected = y.chunks(64).flat_map(|row| row.iter().zip(&bias));
        let differences = found.iter().zip(expected);
        let off = differences.map(|(found, (y, bias))| (found + bias - y).abs());
        let off = off.fold(0.0, f32::max);
        assert!(off < 1e-5, "{name}: outputs differ by {off}");
    }
}
