//! Records of burn's, of packed models.

use burn::module::{Module, ModuleMapper, Param};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Tensor};
use peft::{Error, Fingerprint, Formats, Linear, Linears, Peqa, Weight};
use quant_core::{DoubleQuant, NormalFloat, Parts, QuantTensor, Quantizer, Rtn};

use crate::model::{Bigram, HIDDEN, WIDTH, dense, logits, quantized, tensor};

fn record(model: &impl Module) -> ModuleRecord {
    let bytes = model.clone().into_record().into_bytes().unwrap();
    ModuleRecord::from_bytes(bytes).unwrap()
}

/// Packed models of every grid, with scales as codes, and with rows in another order than the inputs.
fn packed() -> Vec<Bigram> {
    let quantizers: [&dyn Quantizer; 4] = [
        &Rtn::new().with_bits(3).with_group_size(5),
        &Rtn::new().with_bits(2).with_symmetric(true),
        &NormalFloat::new()
            .with_block_size(32)
            .with_double_quant(DoubleQuant::dynamic()),
        &NormalFloat::new().with_bits(3),
    ];
    let mut models: Vec<Bigram> = quantizers.map(|quantizer| quantized(1, quantizer)).into();
    // One layer dense, the other one with an order of its inputs.
    let mut ordered = dense(1);
    let rtn = Rtn::new().with_group_size(16);
    let up = rtn.quantize(tensor(2, [HIDDEN, WIDTH]), None).unwrap();
    let parts = Parts {
        input_order: Some((0..HIDDEN as u32).rev().collect()),
        ..up.weight.to_parts()
    };
    let up = QuantTensor::from_parts(parts, up.weight.format(), [HIDDEN, WIDTH], &Device::flex());
    ordered.up = ordered.up.with_weight(Weight::Quant(up.unwrap()));
    models.push(ordered);
    models
}

#[test]
fn packed_models_are_recorded_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (at, model) in packed().iter().enumerate() {
        let path = dir.path().join(format!("{at}.json"));
        Formats::of(model).save(&path).unwrap();
        let formats = Formats::load(&path).unwrap();
        assert_eq!(formats, Formats::of(model));
        // Into a model of other values, dense or packed.
        for built in [dense(7), quantized(7, &Rtn::new().with_group_size(8))] {
            let is_mixed = model.down.weight().format().is_none();
            let was_packed = built.down.weight().format().is_some();
            if is_mixed && was_packed {
                let error = formats.load_record(built, record(model)).unwrap_err();
                assert!(matches!(error, Error::Record { .. }), "{error}");
                continue;
            }
            let loaded = formats.load_record(built, record(model)).unwrap();
            assert_eq!(Fingerprint::of(&loaded), Fingerprint::of(model));
            assert_eq!(logits(&loaded), logits(model));
            assert_eq!(Formats::of(&loaded), formats);
            let [before, after] = [model, &loaded].map(|of| of.up.to_dense().into_data());
            before.assert_eq(&after, true);
            // What was frozen is frozen: only adapters train.
            let mut loaded = loaded;
            let attached = peft::attach(&mut loaded, &peft::Lora::new(1)).unwrap();
            assert_eq!(attached.n_trainable_outside, 0);
        }
        // burn alone says what is missing.
        let error = dense(7).try_load_record(record(model)).unwrap_err();
        assert!(error.to_string().contains("up.weight"), "{error}");
    }
}

/// A model whose head may be packed.
#[derive(Module, Debug)]
struct Headed {
    proj: Linear,
    head: Weight,
}

impl Linears for Headed {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("proj".into(), &self.proj)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("proj".into(), &mut self.proj)]
    }

    fn other_weights(&self) -> Vec<(String, &Weight)> {
        vec![("head".into(), &self.head)]
    }

    fn other_weights_mut(&mut self) -> Vec<&mut Weight> {
        vec![&mut self.head]
    }
}

#[test]
fn a_packed_head_is_recorded() {
    let built = |seed| Headed {
        proj: Linear::new(Weight::frozen(tensor(seed, [8, 8])), None),
        head: Weight::frozen(tensor(seed + 1, [8, 4])),
    };
    let mut model = built(1);
    model.head.quantize("head", &Rtn::new(), None).unwrap();
    let formats = Formats::of(&model);
    let loaded = formats.load_record(built(3), record(&model)).unwrap();
    assert_eq!(Fingerprint::of(&loaded), Fingerprint::of(&model));
    // Formats of another model.
    let error = formats
        .load_record(dense(1), record(&dense(1)))
        .unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("its formats list `head`, which is no weight of the model"),
        "{said}"
    );
}

/// Makes all floats NaN.
struct Damage;

impl ModuleMapper for Damage {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|values| values * f32::NAN)
    }
}

#[test]
fn records_of_other_models_are_refused() {
    let rtn = Rtn::new().with_bits(3).with_group_size(4);
    let model = quantized(1, &rtn);
    let formats = Formats::of(&model);
    let mut adapted = model.clone();
    peft::attach(&mut adapted, &Peqa::new()).unwrap();
    let others = [
        record(&dense(1)),
        record(&quantized(1, &rtn.with_bits(2))),
        record(&quantized(1, &rtn.with_group_size(8))),
        record(&quantized(1, &rtn.with_symmetric(true))),
        record(&adapted),
    ];
    for record in others {
        let error = formats.load_record(dense(1), record).unwrap_err();
        assert!(matches!(error, Error::Record { .. }), "{error}");
    }
    let error = Formats::default()
        .load_record(dense(1), record(&model))
        .unwrap_err();
    assert!(matches!(error, Error::Record { .. }), "{error}");
    let error = formats.load_record(adapted, record(&model)).unwrap_err();
    assert!(matches!(error, Error::AlreadyAdapted { .. }), "{error}");
    let damaged = record(&model.clone().map(&mut Damage));
    let error = formats.load_record(dense(1), damaged).unwrap_err();
    assert!(
        matches!(&error, Error::Quant { path, .. } if path == "mlp.up"),
        "{error}"
    );

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("formats.json");
    formats.save(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("\"format_version\": 1", "\"format_version\": 2"),
        ("\"bits\": 3", "\"bits\": 5"),
        ("\"weights\"", "\"layers\""),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = Formats::load(&path).unwrap_err();
        let refused = matches!(&error, Error::File(tensor_files::Error::File { .. }));
        assert!(refused, "{error}");
    }
    assert!(Formats::load(dir.path().join("none.json")).is_err());
}
