//! Checkpoints of other programs: read, written back byte for byte, and refused.

mod bitsandbytes;
mod golden;
mod gptq;
mod names;
mod round_trips;
mod rules;
mod variants;

use std::fs;
use std::path::Path;

use burn::module::Param;
use burn::tensor::Device;
use models::{
    CheckpointError, CheckpointFormat, Error, LlamaConfig, Model, Pretrained, load, save_as,
};
use peft::{Fingerprint, Linear, Linears, Weight};
use quant_core::{Format, Parts, QuantTensor, Quantizer, Scales};
use serde_json::Value;
use tempfile::TempDir;

use super::fixtures::{self, Tensors, assert_says, golden, read_tensors, write_tensors};

const GPTQ: &str = "llama_gptq_w4_g32_sym";
const NF4: &str = "llama_nf4_dq";

fn tensors(dir: &Path) -> Tensors {
    read_tensors(&dir.join("model.safetensors"))
}

fn write(dir: &Path, tensors: &Tensors) {
    write_tensors(&dir.join("model.safetensors"), tensors);
}

fn parts(model: &Model) -> Vec<(String, Option<(Format, Parts)>)> {
    let linears = model.linears().into_iter();
    linears
        .map(|(path, linear)| match linear.weight() {
            Weight::Quant(weight) => (path, Some((weight.format(), weight.to_parts()))),
            Weight::Dense(_) => (path, None),
        })
        .collect()
}

/// A directory whose files may be changed.
fn copy(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "quantize_config.json", "model.safetensors"] {
        if dir.join(name).exists() {
            // Not `copy`, which would take the permissions along.
            fs::write(copy.path().join(name), fs::read(dir.join(name)).unwrap()).unwrap();
        }
    }
    copy
}

fn config(hidden: usize, inner: usize) -> LlamaConfig {
    fixtures::llama()
        .with_hidden_size(hidden)
        .with_intermediate_size(inner)
        .with_num_hidden_layers(1)
        .with_num_key_value_heads(4)
        .with_attention_bias(true)
        .with_attention_output_bias(true)
}

fn pretrained(config: &LlamaConfig) -> (TempDir, Pretrained) {
    fixtures::pretrained(config, 3)
}

fn quantized(config: &LlamaConfig, quantizer: &dyn Quantizer) -> (TempDir, Pretrained) {
    let (dir, mut lm) = pretrained(config);
    for (path, linear) in lm.model.linears_mut() {
        linear.quantize(&path, quantizer, None).unwrap();
    }
    (dir, lm)
}

/// Puts other numbers in the place of a packed weight's.
fn change(linear: &mut Linear, change: impl FnOnce(&mut Parts, Format) -> Format) {
    let Weight::Quant(weight) = linear.weight() else {
        panic!("the weight is dense");
    };
    let mut parts = weight.to_parts();
    let format = change(&mut parts, weight.format());
    let dims = weight.dims();
    let weight = QuantTensor::from_parts(parts, format, dims, &Device::flex()).unwrap();
    let bias = linear
        .bias()
        .map(|bias| Param::from_tensor(bias).set_require_grad(false));
    *linear = Linear::new(Weight::Quant(weight), bias);
}

/// Scales that `f16` holds, and zeros that GPTQ v1 does.
fn round_to_gptq(model: &mut Model) {
    for (_, linear) in model.linears_mut() {
        change(linear, |parts, format| {
            if let Scales::Float(scales) = &mut parts.scales {
                for scale in scales {
                    *scale = half::f16::from_f32(*scale).to_f32();
                }
            }
            if let Some(zeros) = &mut parts.zeros {
                zeros.iter_mut().for_each(|zero| *zero = zero.max(1.0));
            }
            format
        });
    }
}

/// Scales that `f16` holds, of the head.
fn round_head(model: &mut Model) {
    let mut others = model.other_weights_mut().into_iter();
    let head = others.next().expect("a head");
    let Weight::Quant(weight) = &*head else {
        panic!("the head is dense");
    };
    let mut parts = weight.to_parts();
    if let Scales::Float(scales) = &mut parts.scales {
        for scale in scales {
            *scale = half::f16::from_f32(*scale).to_f32();
        }
    }
    let (format, dims) = (weight.format(), weight.dims());
    let rounded = QuantTensor::from_parts(parts, format, dims, &Device::flex()).unwrap();
    *head = Weight::Quant(rounded);
}

/// The inputs backwards, in pairs.
fn reorder(model: &mut Model) {
    for (_, linear) in model.linears_mut() {
        let [d_in, _] = linear.weight().dims();
        change(linear, |parts, format| {
            parts.input_order = Some((0..d_in as u32).rev().map(|input| input ^ 1).collect());
            format
        });
    }
}

fn reads_back(dir: &TempDir, lm: &Pretrained, format: CheckpointFormat) -> Pretrained {
    let path = dir.path().join(format.to_string());
    save_as(lm, &path, format).unwrap();
    let again = load(&path, &Device::flex()).unwrap();
    let (found, expected) = (parts(&again.model), parts(&lm.model));
    for ((path, found), (_, expected)) in found.iter().zip(&expected) {
        assert_eq!(
            found.as_ref().map(|(format, _)| format),
            expected.as_ref().map(|(format, _)| format)
        );
        assert!(found == expected, "{path} differs");
    }
    assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    again
}

/// The message of a golden directory after a change to its files.
fn refusal(name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> Error {
    let dir = copy(&golden(name));
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut all = tensors(dir.path());
    change(&mut config, &mut all);
    fs::write(&path, config.to_string()).unwrap();
    write(dir.path(), &all);
    if name == GPTQ {
        // One configuration, unless the change is to both.
        fs::remove_file(dir.path().join("quantize_config.json")).unwrap();
    }
    load(dir.path(), &Device::flex()).unwrap_err()
}

const LAYER: &str = "model.layers.0.mlp.down_proj";

/// Puts a 32-bit integer into a tensor of the layer.
fn put(all: &mut Tensors, part: &str, at: usize, value: u32) {
    let bytes = &mut all.get_mut(&format!("{LAYER}.{part}")).unwrap().2;
    bytes[4 * at..][..4].copy_from_slice(&value.to_le_bytes());
}

/// Why a format does not hold a model, layer by layer.
fn cannot_hold(lm: &Pretrained, format: CheckpointFormat) -> (Vec<(String, String)>, String) {
    let dir = tempfile::tempdir().unwrap();
    let error = save_as(lm, dir.path().join("out"), format).unwrap_err();
    assert!(!dir.path().join("out").exists());
    let message = error.to_string();
    let Error::Checkpoint(CheckpointError::CannotHold {
        layers, instead, ..
    }) = error
    else {
        panic!("{error}");
    };
    for (at, (path, reason)) in layers.iter().enumerate() {
        assert_says(&message, &[reason, &instead.to_string()]);
        // Layers of one reason are counted after the first of them.
        if layers[..at].iter().all(|(_, before)| before != reason) {
            assert_says(&message, &[path]);
        }
    }
    (layers, instead.to_string())
}
