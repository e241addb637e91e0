//! The plan of a quantization.

use std::fs;

use burn::tensor::Device;
use models::{
    CheckpointError, CheckpointFormat, Error, GptqVersion, plan, quantize, save, save_as,
};
use peft::{Blocks, Linears, Lora, Method, Peqa, PerLayer, Tile};
use quant_core::{NormalFloat, Quantizer, Rtn};
use serde_json::Value;

use super::fixtures::*;
use super::quantize::llama_config;

#[test]
fn a_plan_is_what_comes_of_it() {
    let (dir, mut lm) = pretrained(llama_config(), 3);
    let dense = dir.path().join("dense");
    save(&lm, &dense).unwrap();

    let rtn = Rtn::new().with_bits(3).with_group_size(40);
    let error = plan(&dense, &rtn).unwrap_err();
    let Error::Checkpoint(CheckpointError::Plan { layers }) = &error else {
        panic!("{error}");
    };
    // Every layer but the two of 40 inputs.
    assert_eq!(layers.len(), 12);
    assert!(
        layers[0].1.contains("group size 40 does not fit 32 inputs"),
        "{error}"
    );
    let error = plan(&dense, &Rtn::new().with_bits(5)).unwrap_err();
    assert!(error.to_string().contains("not 5"), "{error}");
    // One reason is one line, with the number of its layers.
    assert_eq!(error.to_string().lines().count(), 2, "{error}");
    let layers = "\n  14 layers, the first of them `model.layers.0.self_attn.q_proj`: ";
    assert!(error.to_string().contains(layers), "{error}");

    let rtn = Rtn::new().with_bits(3).with_group_size(8);
    let planned = plan(&dense, &rtn).unwrap();
    let layers = quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
    assert_eq!(planned.layers.len(), layers.len());
    for (planned, layer) in planned.layers.iter().zip(&layers) {
        assert_eq!(planned.path, layer.path);
        assert_eq!(planned.format, layer.format);
        assert_eq!(planned.n_bytes, layer.n_bytes as u64);
    }
    assert!(planned.to_string().ends_with("% of f32"), "{planned}");
    let packed = dir.path().join("packed");
    save(&lm, &packed).unwrap();
    let error = plan(&packed, &rtn).unwrap_err();
    assert!(
        error.to_string().contains("is quantized already"),
        "{error}"
    );
    assert_eq!(lm.model.vocab_size(), 48);
}

/// What no values could change is refused before there are values.
#[test]
fn a_format_that_cannot_hold_the_plan_is_refused() {
    let (dir, mut lm) = pretrained(llama_config(), 3);
    let dense = dir.path().join("dense");
    save(&lm, &dense).unwrap();
    let formats = [
        CheckpointFormat::QuantCore,
        CheckpointFormat::Gptq(GptqVersion::V1),
        CheckpointFormat::Gptq(GptqVersion::V2),
        CheckpointFormat::Bitsandbytes,
    ];
    let rtn = Rtn::new().with_group_size(8).with_f16_scales(true);
    let nf = NormalFloat::new().with_block_size(32);
    let quantizers: [(&dyn Quantizer, [bool; 4]); 4] = [
        (&rtn, [true, false, true, false]),
        (&rtn.with_symmetric(true), [true, true, true, false]),
        // Of 40 inputs, a group is left over.
        (&rtn.with_group_size(16), [true, false, false, false]),
        (&nf, [true, false, false, false]),
    ];
    for (quantizer, holds) in quantizers {
        let plan = plan(&dense, &quantizer).unwrap();
        for (format, holds) in formats.into_iter().zip(holds) {
            let checked = plan.check(format);
            assert_eq!(checked.is_ok(), holds, "{format}: {checked:?}");
        }
    }

    // The refusal is that of saving.
    quantize(&mut lm.model, &nf, &[], |_| {}).unwrap();
    let planned = plan(&dense, &nf).unwrap();
    let lists = |error: Error| match error {
        Error::Checkpoint(CheckpointError::CannotHold { layers, .. }) => layers,
        error => panic!("{error}"),
    };
    for format in &formats[1..] {
        let planned = lists(planned.check(*format).unwrap_err());
        assert!(!planned.is_empty());
        let saved = save_as(&lm, dir.path().join("saved"), *format).unwrap_err();
        assert_eq!(planned, lists(saved));
    }
}

#[test]
fn packed_layers_are_found_without_a_declared_format() {
    for name in ["llama_gptq_w4_g32_sym", "llama_nf4_dq"] {
        let dir = tempfile::tempdir().unwrap();
        let read = |file: &str| fs::read(golden(name).join(file)).unwrap();
        let mut config: Value = serde_json::from_slice(&read("config.json")).unwrap();
        let declared = config
            .as_object_mut()
            .unwrap()
            .remove("quantization_config");
        assert!(declared.is_some());
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let weights = "model.safetensors";
        fs::write(dir.path().join(weights), read(weights)).unwrap();
        let error = plan(dir.path(), &Rtn::new()).unwrap_err();
        let Error::Checkpoint(CheckpointError::UnstatedQuantization { tensor, .. }) = &error else {
            panic!("{error}");
        };
        assert!(tensor.starts_with("model.layers.0.self_attn.q_proj."));
        assert!(
            error.to_string().contains("quantize_config.json"),
            "{error}"
        );
    }
}

/// A recipe that quantizes nothing gives the formats of a directory as it is.
#[test]
fn a_packed_directory_is_planned_as_it_is() {
    for name in ["llama_gqa", "llama_gptq_w4_g32_sym", "llama_nf4_dq"] {
        let dir = golden(name);
        let planned = plan(&dir, &PerLayer::default()).unwrap();
        let lm = models::load(&dir, &Device::flex()).unwrap();
        assert_eq!(&planned.config, lm.model.config());
        assert_eq!(planned.is_packed(), name != "llama_gqa");
        let linears = lm.model.linears();
        assert_eq!(planned.layers.len(), linears.len());
        for (planned, (path, linear)) in planned.layers.iter().zip(linears) {
            let weight = linear.weight();
            assert_eq!((&planned.path, planned.dims), (&path, weight.dims()));
            assert_eq!(planned.format, weight.format(), "{name}");
            assert_eq!(planned.n_bytes, weight.n_bytes() as u64, "{name}, {path}");
        }
    }
}

/// What a method cannot adapt is known before the weights are.
#[test]
fn a_method_that_cannot_adapt_the_plan_is_refused() {
    let (dir, lm) = pretrained(llama_config(), 3);
    let dense = dir.path().join("dense");
    save(&lm, &dense).unwrap();
    let device = Device::flex();
    let rtn = Rtn::new().with_group_size(8);
    let packed = plan(&dense, &rtn).unwrap();
    let symmetric = plan(&dense, &rtn.with_symmetric(true)).unwrap();
    let dense = plan(&dense, &PerLayer::default()).unwrap();
    let f16 = Peqa::new().with_f16_scales(true);
    // The least number of groups of a layer is 4.
    let (fits, too_high) = (Tile::qa_lora(4), Tile::qa_lora(5));
    let methods: [(&dyn Method, [bool; 3]); 6] = [
        (&f16, [true, true, false]),
        (&Peqa::new().with_zeros(true), [true, false, false]),
        (&fits, [true, false, false]),
        (&too_high, [false, false, false]),
        (&Lora::new(2), [true, true, true]),
        (&Lora::new(2).with_targets(["no"]), [false, false, false]),
    ];
    for (method, fits) in methods {
        for (plan, fits) in [&packed, &symmetric, &dense].into_iter().zip(fits) {
            let checked = plan.check_method(method, &device);
            assert_eq!(checked.is_ok(), fits, "{checked:?}");
        }
    }
}
