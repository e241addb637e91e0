//! Saving: a model read back is the model, and nothing is overwritten.

use std::fs;

use burn::tensor::Device;
use models::{Error, load, quantize_head, save};
use proptest::prelude::*;
use quant_core::Rtn;

use super::damage::Damage;
use super::fixtures::*;

proptest! {
    #![proptest_config(cases(12))]

    /// A directory gives the model back, bit for bit, dense or in any format.
    #[test]
    fn a_saved_model_is_the_model(
        config in configs(),
        bits_of in prop::option::of(prop::sample::select(vec![2, 3, 4, 8])),
        group_size in prop::sample::select(vec![None, Some(8), Some(7)]),
        symmetric in any::<bool>(),
        head in prop::option::of(0..3usize),
    ) {
        let (dir, mut lm) = pretrained(&config, 5);
        let head = head.map(head_quantizer);
        if let Some(quantizer) = &head {
            quantize_head(&mut lm.model, quantizer).unwrap();
        }
        if let Some(n) = bits_of {
            let rtn = Rtn::new().with_bits(n).with_group_size(group_size).with_symmetric(symmetric);
            models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        }
        let out = dir.path().join("saved");
        save(&lm, &out).unwrap();
        let again = load(&out, &Device::flex()).unwrap();
        prop_assert_eq!(bits(logits(&again.model, &PROBE, 2)), bits(logits(&lm.model, &PROBE, 2)));
        prop_assert_eq!(peft::Fingerprint::of(&again.model), peft::Fingerprint::of(&lm.model));
        prop_assert_eq!(again.model.config(), lm.model.config());
        prop_assert_eq!(head_format(&again.model), head.map(|head| head.format().unwrap()));
        let twice = dir.path().join("twice");
        save(&again, &twice).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            prop_assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(twice.join(name)).unwrap());
        }
    }
}

#[test]
fn what_is_there_is_not_overwritten() {
    let damage = Damage::new();
    let lm = load(&damage.path, &Device::flex()).unwrap();
    let before = fs::read(damage.path.join("model.safetensors")).unwrap();
    let error = save(&lm, &damage.path).unwrap_err();
    assert!(matches!(
        error,
        Error::File(tensor_files::Error::OutputExists { .. })
    ));
    assert_eq!(
        fs::read(damage.path.join("model.safetensors")).unwrap(),
        before
    );
    let other = damage.dir.path().join("notes");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("notes.txt"), "mine").unwrap();
    assert!(save(&lm, &other).is_err());
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1);
}
