//! Merged models, saved and loaded again.

use burn::tensor::Device;
use peft::{Batch, Exactness, FitConfig, Lora, Method, OffGrid, Peqa, Tile, fit};
use quant_core::Rtn;

use super::adapters::{CASES, base, difference, logits, tokens};

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
