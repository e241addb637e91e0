//! Saving: a model read back is the model, and nothing is overwritten.

use std::{array, fs};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use models::{
    CheckpointError, Error, Model, Pretrained, Rounding, load, quantize, quantize_head, save,
    save_dense,
};
use peft::{Adapters, Linear, Linears, Lora, Weight};
use proptest::prelude::*;
use quant_core::Rtn;
use serde_json::{Map, Value};
use tempfile::TempDir;
use tensor_files::{FloatType, Output};

use super::damage::Damage;
use super::fixtures::*;

proptest! {
    #![proptest_config(cases(24))]

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
            quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
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

/// Settings keep their order, wherever the quantization was among them.
#[test]
fn settings_are_written_in_their_order() {
    let (dir, mut lm) = pretrained(llama(), 1);
    quantize(&mut lm.model, &Rtn::new().with_group_size(4), &[], |_| {}).unwrap();
    let packed = dir.path().join("packed");
    save(&lm, &packed).unwrap();
    let path = packed.join("config.json");
    let read = |path| -> Map<String, Value> { tensor_files::read_json(path).unwrap() };
    let mut config = read(&path);
    let quantization = config.shift_remove("quantization_config").unwrap();
    config.shift_insert(1, "quantization_config".into(), quantization);
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();

    let dense = dir.path().join("dense");
    save_dense(
        &load(&packed, &Device::flex()).unwrap(),
        &dense,
        FloatType::F32,
    )
    .unwrap();
    config.shift_remove("quantization_config");
    let written = read(&dense.join("config.json"));
    let expected: Vec<&String> = config.keys().collect();
    let kept = written.keys().filter(|key| config.contains_key(*key));
    assert_eq!(kept.collect::<Vec<_>>(), expected);
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

/// What keeps a model from being saved is known before the work begins.
#[test]
fn a_place_can_be_reserved_before() {
    let (dir, lm) = pretrained(llama(), 1);
    let at = |name: &str| dir.path().join(name);
    let reserved = ["own", "dense", "adapters"].map(|name| Output::reserve(at(name)).unwrap());
    for name in ["own", "dense", "adapters"] {
        let error = save(&lm, at(name)).unwrap_err();
        let is_busy = matches!(error, Error::File(tensor_files::Error::OutputBusy { .. }));
        assert!(is_busy, "{error}");
    }
    let [own, dense, adapters] = reserved;
    save(&lm, own).unwrap();
    save_dense(&lm, dense, FloatType::F32).unwrap();
    for name in ["own", "dense"] {
        load(at(name), &Device::flex()).unwrap();
    }
    let mut model = lm.model.clone();
    peft::freeze_base(&mut model);
    peft::attach(&mut model, &Lora::new(2)).unwrap();
    Adapters::of(&model).unwrap().save(adapters).unwrap();
    Adapters::load(at("adapters"), &Device::flex()).unwrap();
}

/// A model whose parameters are ones, but for the first element of each, and a directory of its own.
fn ones_and(first: f32) -> (TempDir, Pretrained) {
    struct Fill(f32);

    impl ModuleMapper for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|values| {
                let at = || array::from_fn::<_, D, _>(|_| 0..1);
                let (first, ones) = (values.ones_like().slice(at()), values.ones_like());
                ones.slice_assign(at(), first * self.0)
            })
        }
    }

    let (dir, mut lm) = pretrained(llama(), 1);
    lm.model = lm.model.map(&mut Fill(first));
    (dir, lm)
}

fn dense_weights(model: &Model) -> Vec<Vec<u32>> {
    let linears = model.linears().into_iter();
    let weights = linears.map(|(_, linear)| bits(values(linear.weight().to_dense())));
    weights.collect()
}

#[test]
fn values_that_are_rounded_are_counted() {
    // Between 1 and the next number of either type; ties go to the even one, which is 1.
    let above = 1.0 + f32::exp2(-11.0);
    let (dir, lm) = ones_and(above);
    // The embedding and the head, two blocks and the last norm.
    let n_values = 2 * 16 * 24 + 2 * (2 * 24 * (32 + 16) + 3 * 24 * 20 + 2 * 24) + 24;
    let exact = Rounding {
        n_values,
        n_rounded: 0,
        largest: 0.0,
    };
    let rounded = Rounding {
        n_values,
        n_rounded: 2 + 2 * 9 + 1,
        largest: f64::exp2(-11.0) / f64::from(above),
    };
    for (name, float, expected) in [
        ("f32", FloatType::F32, exact),
        ("f16", FloatType::F16, rounded),
        ("bf16", FloatType::Bf16, rounded),
    ] {
        let out = dir.path().join(name);
        assert_eq!(save_dense(&lm, &out, float).unwrap(), expected, "{name}");
        let again = load(&out, &Device::flex()).unwrap();
        let first = if expected == exact { above } else { 1.0 };
        let (_other, expected) = ones_and(first);
        assert_eq!(
            peft::Fingerprint::of(&again.model),
            peft::Fingerprint::of(&expected.model)
        );
    }
}

#[test]
fn packed_weights_are_saved_unpacked() {
    let (dir, mut lm) = pretrained(llama(), 1);
    quantize(&mut lm.model, &Rtn::new().with_group_size(8), &[], |_| {}).unwrap();
    let out = dir.path().join("dense");
    let rounding = save_dense(&lm, &out, FloatType::F32).unwrap();
    assert_eq!((rounding.n_rounded, rounding.largest), (0, 0.0));
    let again = load(&out, &Device::flex()).unwrap();
    let is_dense = |(_, linear): (String, &Linear)| matches!(linear.weight(), Weight::Dense(_));
    assert!(again.model.linears().into_iter().all(is_dense));
    assert_eq!(dense_weights(&again.model), dense_weights(&lm.model));
}

#[test]
fn values_beyond_the_type_leave_no_directory() {
    let (dir, mut lm) = pretrained(llama(), 1);
    let (path, linear) = lm.model.linears_mut().remove(3);
    let weight = linear.weight().to_dense();
    let weight = weight.slice_assign([1..2, 0..3], Tensor::full([1, 3], 1e6, &Device::flex()));
    *linear = Linear::new(Weight::frozen(weight), None);
    let error = save_dense(&lm, dir.path().join("out"), FloatType::F16).unwrap_err();
    let is_named = matches!(
        &error,
        Error::Checkpoint(CheckpointError::Overflow { tensor, float: FloatType::F16, value: 1e6, n: 3 })
            if *tensor == format!("{path}.weight")
    );
    assert!(is_named, "{error}");
    let left = fs::read_dir(dir.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["tokenizer.json"]);
    let rounding = save_dense(&lm, dir.path().join("out"), FloatType::Bf16).unwrap();
    assert!(rounding.n_rounded > 0);
}
