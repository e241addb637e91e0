//! Merged models, saved and loaded again.

use burn::tensor::Device;
use models::CheckpointFormat::{Bitsandbytes, Gptq};
use models::GptqVersion::{V1, V2};
use models::{CheckpointError, CheckpointFormat, Error};
use peft::{Batch, Exactness, FitConfig, Lora, MergeConfig, Method, OffGrid, Peqa, Tile, fit};
use quant_core::{NormalFloat, Quantizer, Rtn};

use super::adapters::{CASES, base, difference, logits, tokens};
use super::fixtures::{self, PROBE, SMALL, architectures, pretrained};

/// Tuned, merged, saved, loaded again: the packed model that was tuned.
#[test]
fn merged_models_are_proved_on_the_reloaded_file() {
    let dir = tempfile::tempdir().unwrap();
    let methods: [(&str, Box<dyn Method>); 6] = [
        ("peqa", Box::new(Peqa::new())),
        ("peqa-zeros", Box::new(Peqa::new().with_zeros(true))),
        // One group for each output leaves one pool.
        ("qa-lora", Box::new(Tile::qa_lora(1))),
        ("qa-hira", Box::new(Tile::qa_hira())),
        ("qa-blora", Box::new(Tile::qa_blora(1))),
        ("lora", Box::new(Lora::new(2))),
    ];
    let tokens = tokens(CASES[0]);
    let batch = Batch::new(tokens.clone()).unwrap();
    let groups = [Some(32), Some(16), None];
    for (bits, group_size) in [2, 3, 4, 8]
        .into_iter()
        .flat_map(|b| groups.map(|g| (b, g)))
    {
        for (name, method) in &methods {
            let mut lm = base();
            let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
            models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
            let rounded = logits(&lm.model, tokens.clone());
            peft::attach(&mut lm.model, &**method).unwrap();
            let config = FitConfig::new()
                .with_learning_rate(5e-3)
                .with_steps(Some(5));
            fit(
                &mut lm.model,
                std::slice::from_ref(&batch),
                &config,
                |_, _| {},
            )
            .unwrap();
            let tuned = logits(&lm.model, tokens.clone());
            assert!(
                difference(&tuned, &rounded) > 1e-3,
                "{name}: nothing was learned"
            );
            // LoRA has no codes; rounded to 8 bits, it is near.
            let finer = Rtn::new().with_bits(8).with_group_size(32);
            let off_grid = match *name {
                "lora" => OffGrid::Round(&finer),
                _ => OffGrid::Refuse,
            };
            let certificate = peft::merge_probed(&mut lm.model, off_grid, &batch).unwrap();
            let path = dir.path().join(format!("{name}-{bits}-{group_size:?}"));
            models::save(&lm, &path).unwrap();
            let merged = logits(&lm.model, tokens.clone());

            let reloaded = models::load(&path, &Device::flex()).unwrap();
            certificate.verify(&reloaded.model).unwrap();
            assert_eq!(logits(&reloaded.model, tokens.clone()), merged, "{name}");
            let largest = tuned.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
            let change = difference(&merged, &tuned) / largest;
            let retention = certificate.probe.unwrap().retention;
            match certificate.layers[0].exactness {
                Exactness::Exact => assert_eq!((change, retention), (0.0, 1.0), "{name}"),
                Exactness::Bounded { .. } => {
                    assert!(change < 1e-5, "{name}: {change}");
                    assert!((retention - 1.0).abs() < 1e-3, "{name}: {retention}");
                }
                _ => {
                    assert_eq!(certificate.kind(), "rounded");
                    assert!((retention - 1.0).abs() < 0.5, "{name}: {retention}");
                }
            }
            let json = serde_json::to_string(&certificate).unwrap();
            let again: peft::Certificate = serde_json::from_str(&json).unwrap();
            assert_eq!(again, certificate);
        }
    }
}

/// Every method on every architecture: what was tuned is what is merged, saved and loaded again.
#[test]
fn every_architecture_is_merged_as_it_was_tuned() {
    let methods: [(&str, Box<dyn Method>); 5] = [
        ("peqa", Box::new(Peqa::new())),
        ("peqa-zeros", Box::new(Peqa::new().with_zeros(true))),
        ("qa-lora", Box::new(Tile::qa_lora(1))),
        ("qa-hira", Box::new(Tile::qa_hira())),
        ("qa-blora", Box::new(Tile::qa_blora(1))),
    ];
    let rtn = Rtn::new().with_group_size(4);
    for config in architectures(SMALL) {
        let model_type = config.to_json()["model_type"].clone();
        let (dir, dense) = pretrained(config, 1);
        let batch = Batch::new(fixtures::tokens(&PROBE, 2)).unwrap();
        for (name, method) in &methods {
            let mut lm = dense.clone();
            models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
            let rounded = fixtures::logits(&lm.model, &PROBE, 2);
            peft::attach(&mut lm.model, &**method).unwrap();
            let config = FitConfig::new().with_learning_rate(5e-3).with_steps(5);
            let batches = std::slice::from_ref(&batch);
            fit(&mut lm.model, batches, &config, |_, _| {}).unwrap();
            let tuned = fixtures::logits(&lm.model, &PROBE, 2);
            let largest = tuned.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
            let case = format!("{model_type} {name}");
            assert!(difference(&tuned, &rounded) > 1e-4 * largest, "{case}");

            lm.certificate = Some(peft::merge(&mut lm.model).unwrap());
            let merged = fixtures::logits(&lm.model, &PROBE, 2);
            let change = difference(&merged, &tuned) / largest;
            match lm.certificate.as_ref().unwrap().is_exact() {
                true => assert_eq!(change, 0.0, "{case}"),
                false => assert!(change < 1e-5, "{case}: {change}"),
            }
            let path = dir.path().join(name);
            models::save(&lm, &path).unwrap();
            let again = models::load_verified(&path, &Device::flex()).unwrap();
            assert_eq!(fixtures::logits(&again.model, &PROBE, 2), merged, "{case}");
        }
    }
}

/// Tuned on the grid of a format of other programs, a model is saved in it as it is; rounded to it
/// otherwise, as its certificate says.
#[test]
fn tuned_models_leave_in_the_format_of_their_base() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = tokens(CASES[0]);
    let batch = Batch::new(tokens.clone()).unwrap();
    let rtn = Rtn::new().with_group_size(32).with_f16_scales(true);
    let symmetric = rtn.with_symmetric(true);
    let nf4 = NormalFloat::new().with_block_size(32);
    let (peqa, f16) = (Peqa::new(), Peqa::new().with_f16_scales(true));
    let zeros = f16.clone().with_zeros(true);
    let qa_hira = Tile::qa_hira();
    type Case<'a> = (
        &'a str,
        CheckpointFormat,
        &'a dyn Quantizer,
        &'a dyn Method,
        &'a str,
    );
    let cases: [Case; 7] = [
        ("f16", Gptq(V2), &rtn, &f16, "exact"),
        ("symmetric", Gptq(V1), &symmetric, &f16, "exact"),
        ("f32", Gptq(V2), &rtn, &peqa, "rounded"),
        ("zeros", Gptq(V2), &rtn, &zeros, "rounded"),
        ("tiles", Gptq(V2), &rtn, &qa_hira, "rounded"),
        ("nf4", Bitsandbytes, &nf4, &peqa, "exact"),
        (
            "own",
            CheckpointFormat::QuantCore,
            &rtn,
            &qa_hira,
            "bounded",
        ),
    ];
    for (name, format, quantizer, method, kind) in cases {
        let mut lm = base();
        models::quantize(&mut lm.model, &quantizer, &[], |_| {}).unwrap();
        peft::attach(&mut lm.model, method).unwrap();
        let config = FitConfig::new().with_learning_rate(5e-3).with_steps(5);
        fit(
            &mut lm.model,
            std::slice::from_ref(&batch),
            &config,
            |_, _| {},
        )
        .unwrap();
        let tuned = logits(&lm.model, tokens.clone());

        let mut unrounded = lm.clone();
        peft::merge(&mut unrounded.model).unwrap();
        let held = models::check_format(&unrounded, format);
        assert_eq!(held.is_ok(), kind != "rounded", "{name}: {held:?}");
        if let Err(error) = held {
            let is_named = matches!(error, Error::Checkpoint(CheckpointError::CannotHold { .. }));
            assert!(is_named, "{name}: {error}");
        }

        let merge = MergeConfig::new().with_stored_grid(format.stored_grid());
        let certificate = peft::merge_probed(&mut lm.model, merge, &batch).unwrap();
        assert_eq!(certificate.kind(), kind, "{name}");
        let merged = logits(&lm.model, tokens.clone());
        assert_eq!(merged == tuned, kind == "exact", "{name}");
        lm.certificate = Some(certificate);
        let path = dir.path().join(format!("{name}-{format}"));
        models::save_as(&lm, &path, format).unwrap();
        let again = models::load_verified(&path, &Device::flex()).unwrap();
        assert_eq!(logits(&again.model, tokens.clone()), merged, "{name}");
    }
}
