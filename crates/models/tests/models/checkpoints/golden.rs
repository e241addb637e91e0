//! Checkpoints that GPTQModel and bitsandbytes wrote.

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use models::CheckpointFormat::{Bitsandbytes, Gptq};
use models::GptqVersion::V1;
use models::save;
use peft::{Batch, CausalLm, FitConfig, Peqa};
use safetensors::Dtype;
use tensor_files::{FloatType, LazyTensor, TensorFile};

use super::*;
use crate::fixtures::{head_format, reference_tokens, shared, values};

fn floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let (twos, _) = bytes.as_chunks::<2>();
    let (fours, _) = bytes.as_chunks::<4>();
    match dtype {
        Dtype::BF16 => twos
            .iter()
            .map(|&b| half::bf16::from_le_bytes(b).to_f32())
            .collect(),
        Dtype::F16 => twos
            .iter()
            .map(|&b| half::f16::from_le_bytes(b).to_f32())
            .collect(),
        _ => fours.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

/// The weights of the golden GPTQ checkpoint as transformers had them for the reference: in the
/// model's `bf16`, scales and products.
fn round_to_bf16(model: &mut Model) {
    let round = |value: f32| half::bf16::from_f32(value).to_f32();
    for (_, linear) in model.linears_mut() {
        change(linear, |parts, format| {
            if let Scales::Float(scales) = &mut parts.scales {
                scales.iter_mut().for_each(|scale| *scale = round(*scale));
            }
            format
        });
        let Weight::Quant(weight) = linear.weight() else {
            panic!("the weight is dense");
        };
        let dense: Vec<f32> = values(weight.dequantize()).into_iter().map(round).collect();
        let dense = TensorData::new(dense, weight.dims());
        let dense = Tensor::from_data(dense, &Device::flex());
        *linear = Linear::new(Weight::frozen(dense), None);
    }
}

/// The scales of the golden bitsandbytes checkpoint as its CPU kernel takes them: in each row from
/// `row * (160 / 64)` on, though the blocks straddle rows.
fn misplace_blocks(model: &mut Model) {
    for (path, linear) in model.linears_mut() {
        if path.ends_with("down_proj") {
            let [n_groups, repeated] = [160 / 32, 64 / 32];
            change(linear, |parts, format| {
                let Scales::Double(scales) = &mut parts.scales else {
                    panic!("the scales are floats");
                };
                let right = scales.codes.clone();
                for (k, code) in scales.codes.iter_mut().enumerate() {
                    let (row, group) = (k / n_groups, k % n_groups);
                    *code = right[(row * (160 / 64) + group / repeated) * repeated];
                }
                format
            });
        }
    }
}

fn logits_differ_by(model: &Model, dir: &Path, name: &str) -> Option<f32> {
    let path = dir.join("reference.safetensors");
    let mut reference = TensorFile::open(&path).unwrap();
    reference.contains(name).then(|| {
        let (expected, _) = reference.floats::<3>(name).unwrap();
        let found = values(model.forward(reference_tokens(&path)));
        let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max)
    })
}

#[test]
fn logits_are_those_of_the_numbers_in_the_files() {
    for name in [GPTQ, NF4] {
        let lm = load(golden(name), &Device::flex()).unwrap();
        let differ = logits_differ_by(&lm.model, &golden(name), "logits_exact").unwrap();
        assert!(differ <= 1e-5, "{name}: logits differ by {differ}");
    }
}

/// Each program computes with other numbers than those that it wrote; see the files' README.
#[test]
fn logits_are_those_of_the_programs_that_packed_them() {
    check_logits(golden);
}

/// Bytes stored as bf16, and a head that is packed.
#[test]
fn logits_are_those_of_what_bitsandbytes_dequantizes() {
    let dir = golden("llama_nf4_head");
    let lm = load(&dir, &Device::flex()).unwrap();
    assert!(parts(&lm.model).iter().all(|(_, packed)| packed.is_some()));
    let head = head_format(&lm.model).unwrap();
    assert_eq!((head.bits(), head.group_size()), (4, Some(64)));
    let differ = logits_differ_by(&lm.model, &dir, "logits").unwrap();
    assert!(differ <= 1e-5, "logits differ by {differ}");
    // Written back with its bytes, as uint8.
    let out = tempfile::tempdir().unwrap();
    save_as(&lm, out.path().join("out"), Bitsandbytes).unwrap();
    let (before, after) = (tensors(&dir), tensors(&out.path().join("out")));
    for (tensor, (_, _, bytes)) in &before {
        if tensor.contains("_proj.") || tensor.contains("lm_head.") {
            assert!(bytes == &after[tensor].2, "{tensor}");
        }
    }
    assert_eq!(after["lm_head.weight"].0, Dtype::U8);
}

/// All checks on the directories beside the project.
#[test]
#[ignore = "needs ../shared"]
fn shared_checkpoints_are_those_of_the_programs_that_packed_them() {
    check_logits(shared);
    check_what_is_written(shared);
}

fn check_logits(directory: fn(&str) -> PathBuf) {
    for (name, as_they_do) in [
        (GPTQ, round_to_bf16 as fn(&mut Model)),
        (NF4, misplace_blocks),
    ] {
        let dir = directory(name);
        let mut lm = load(&dir, &Device::flex()).unwrap();
        assert!(parts(&lm.model).iter().all(|(_, packed)| packed.is_some()));
        as_they_do(&mut lm.model);
        let differ = logits_differ_by(&lm.model, &dir, "logits").unwrap();
        assert!(differ <= 1e-5, "{name}: logits differ by {differ}");
    }
}

/// All packed tensors byte for byte, `quant_state` included. Other tensors have the shortest type
/// that holds them, which is not always that of the file: bitsandbytes' norms of ones are `F32`.
#[test]
fn what_was_read_is_written_back_as_it_was() {
    check_what_is_written(golden);
}

fn check_what_is_written(directory: fn(&str) -> PathBuf) {
    for (name, format) in [(GPTQ, Gptq(V1)), (NF4, Bitsandbytes)] {
        let dir = directory(name);
        let lm = load(&dir, &Device::flex()).unwrap();
        let out = tempfile::tempdir().unwrap();
        save_as(&lm, out.path().join("out"), format).unwrap();
        let (before, after) = (tensors(&dir), tensors(&out.path().join("out")));
        assert_eq!(
            before.keys().collect::<Vec<_>>(),
            after.keys().collect::<Vec<_>>()
        );
        let mut identical = 0;
        for (tensor, before) in &before {
            let after = &after[tensor];
            if tensor.contains("_proj.") || name == GPTQ {
                assert!(before == after, "{tensor} in {name}");
                identical += 1;
            }
            assert_eq!(before.1, after.1, "{tensor}");
            if before.0 != after.0 {
                let same = floats(&before.2, before.0) == floats(&after.2, after.0);
                assert!(same, "{tensor} in {name}");
            }
        }
        assert_eq!(identical, if name == GPTQ { 63 } else { 84 });
        let config = |dir: &Path, file: &str| -> Value {
            serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap()
        };
        let written = config(&out.path().join("out"), "config.json");
        let original = config(&dir, "config.json");
        if format == Bitsandbytes {
            assert_eq!(written, original);
        } else {
            let written = &written["quantization_config"];
            for (setting, value) in written.as_object().unwrap() {
                if setting != "meta" {
                    assert_eq!(&original["quantization_config"][setting], value);
                }
            }
            let beside = config(&out.path().join("out"), "quantize_config.json");
            assert_eq!(*written, beside);
        }
        let again = load(out.path().join("out"), &Device::flex()).unwrap();
        assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    }
}

#[test]
fn packed_checkpoints_train_and_merge() {
    for name in [GPTQ, NF4] {
        let device = Device::flex();
        let dir = golden(name);
        let mut lm = load(&dir, &device).unwrap();
        let batch = Batch::new(reference_tokens(&dir.join("reference.safetensors"))).unwrap();
        peft::attach(&mut lm.model, &Peqa::new()).unwrap();
        let before = parts(&lm.model);
        let mut steps = 0;
        let fit = FitConfig::new().with_learning_rate(1e-3);
        peft::fit(&mut lm.model, &[batch], &fit, |_, _| steps += 1).unwrap();
        assert_eq!(steps, 1);
        let certificate = peft::merge(&mut lm.model).unwrap();
        let after = parts(&lm.model);
        for ((path, before), (_, after)) in before.iter().zip(&after) {
            let (before, after) = (before.as_ref().unwrap(), after.as_ref().unwrap());
            assert_eq!(before.1.words, after.1.words, "{path}");
            assert_ne!(before.1.scales, after.1.scales, "{path}");
            assert!(matches!(after.1.scales, Scales::Float(_)));
        }
        let out = tempfile::tempdir().unwrap();
        save(&lm, out.path().join("out")).unwrap();
        let again = load(out.path().join("out"), &device).unwrap();
        certificate.verify(&again.model).unwrap();
        if name == GPTQ {
            let error = save_as(&lm, out.path().join("gptq"), Gptq(V1)).unwrap_err();
            assert_says(&error, &["quant-core", "that f16 does not hold exactly"]);
        } else {
            // Its blocks straddle rows, and each part of one has learnt a scale of its own: they
            // are blocks of 32 now.
            save_as(&lm, out.path().join("nf4"), Bitsandbytes).unwrap();
            let again = load(out.path().join("nf4"), &device).unwrap();
            certificate.verify(&again.model).unwrap();
            let tensors = tensors(&out.path().join("nf4"));
            let state = |layer: &str| {
                let name = format!("model.layers.0.{layer}.weight.quant_state.bitsandbytes__nf4");
                String::from_utf8(tensors[&name].2.clone()).unwrap()
            };
            assert_says(state("mlp.down_proj"), &["\"blocksize\": 32,"]);
            assert_says(state("mlp.up_proj"), &["\"blocksize\": 64,"]);
        }
    }
}

/// Other writers have scales in `bf16` and `f32`.
#[test]
fn scales_of_gptq_may_have_any_type_of_float() {
    let dir = copy(&golden(GPTQ));
    let mut file = TensorFile::open(&dir.path().join("model.safetensors")).unwrap();
    let name = format!("{LAYER}.scales");
    let (scales, shape) = file.floats::<2>(&name).unwrap();
    let out = tempfile::tempdir().unwrap();
    tensor_files::write_tensors(
        &out.path().join("model.safetensors"),
        [(
            name.clone(),
            LazyTensor::floats_as(FloatType::F32, shape, move || scales.clone()),
        )],
    )
    .unwrap();
    let mut all = tensors(dir.path());
    all.append(&mut tensors(out.path()));
    assert_eq!(all[&name].0, Dtype::F32);
    write(dir.path(), &all);
    let lm = load(dir.path(), &Device::flex()).unwrap();
    let expected = load(golden(GPTQ), &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&expected.model));
}

#[test]
fn what_says_nothing_new_is_passed_over() {
    let dir = copy(&golden(GPTQ));
    let mut all = tensors(dir.path());
    all.insert(
        format!("{LAYER}.bias"),
        (Dtype::F16, vec![64], vec![0; 128]),
    );
    all.remove(&format!("{LAYER}.g_idx"));
    write(dir.path(), &all);
    let lm = load(dir.path(), &Device::flex()).unwrap();
    let expected = load(golden(GPTQ), &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&expected.model));
    all.get_mut(&format!("{LAYER}.bias")).unwrap().2[1] = 1;
    write(dir.path(), &all);
    let error = load(dir.path(), &Device::flex()).unwrap_err();
    assert_says(&error, &["down_proj.bias", "no place"]);
}
