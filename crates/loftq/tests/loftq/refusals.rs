//! Layers, models and settings that are refused.

use burn::tensor::{Device, Tensor};
use loftq::{
    Apiq, ApiqBlock, Error, Initialization, Layer, LayerMethod, Loftq, LqLora, Pissa, Qera, Rilq,
    init,
};
use models::Model;
use peft::{Batch, Fingerprint, Linears, Lora, PerLayer};
use quant_core::{NormalFloat, Optq, Quantizer, Rtn};

use crate::layers::{gram, layer, random};
use crate::llama::{batches, model, rtn};

#[test]
fn what_is_not_finite_is_named() {
    let mut values = vec![0.5f32; 48 * 40];
    values[7] = f32::NAN;
    let weight = Tensor::<1>::from_floats(&values[..], &Device::flex()).reshape([48, 40]);
    let quantizer = Rtn::new().with_group_size(16);
    let methods: [Box<dyn LayerMethod>; 3] = [
        Box::new(Loftq::new(4)),
        Box::new(Pissa::new(4)),
        Box::new(LqLora::new(4)),
    ];
    for method in methods {
        let error = method.start(&layer(&weight), &quantizer).unwrap_err();
        assert!(error.to_string().contains("proj"), "{error}");
    }
    let weight = random([48, 40], 1);
    let narrow = gram(&random([60, 47], 1));
    for (method, gram, expected) in [
        (
            Box::new(Loftq::new(0)) as Box<dyn LayerMethod>,
            None,
            "rank is 0",
        ),
        (Box::new(LqLora::new(41)), None, "a rank of 41"),
        (Box::new(Qera::new(4)), Some(&narrow), "layer `proj`"),
        (Box::new(Apiq::new(4)), Some(&narrow), "layer `proj`"),
    ] {
        let layer = Layer {
            gram,
            ..layer(&weight)
        };
        let error = method.start(&layer, &quantizer).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn what_cannot_be_is_refused_before_anything_changes() {
    let (dense, calibration) = (model(), batches(1));
    let refused =
        |method: &dyn Initialization<Model>, recipe: &dyn peft::Recipe, calibration: &[Batch]| {
            let mut model = dense.clone();
            let error = init(&mut model, method, recipe, calibration, |_| {}).unwrap_err();
            assert_eq!(Fingerprint::of(&model), Fingerprint::of(&dense), "{error}");
            error
        };
    let blind: [Box<dyn Initialization<Model>>; 5] = [
        Box::new(Qera::new(2)),
        Box::new(Apiq::new(2)),
        Box::new(ApiqBlock::new(2)),
        Box::new(Rilq::new(2)),
        Box::new(LqLora::new(2).with_fisher(true)),
    ];
    for method in blind {
        let error = refused(&*method, &rtn(4), &[]);
        assert!(
            matches!(error, Error::Peft(peft::Error::NoCalibration)),
            "{error}"
        );
    }
    let error = refused(&Loftq::new(2), &Optq::new().with_group_size(8), &[]);
    assert!(matches!(error, Error::Peft(peft::Error::NoCalibration)));
    let error = refused(&Rilq::new(2).with_cross_entropy(1.5), &rtn(4), &calibration);
    assert!(matches!(error, Error::Peft(peft::Error::Setting { .. })));
    // A rank above the smallest side, no such target, a token that is not there.
    let error = refused(&Loftq::new(33), &rtn(4), &[]);
    assert!(
        matches!(error, Error::Peft(peft::Error::Rank { .. })),
        "{error}"
    );
    let targets = Lora::new(2).with_targets(["qproj"]);
    let error = refused(&Loftq::new(targets), &rtn(4), &[]);
    assert!(matches!(error, Error::Peft(peft::Error::NoTarget { .. })));
    let tokens = Tensor::<2, burn::tensor::Int>::full([1, 4], 48, &Device::flex());
    let error = refused(&Rilq::new(2), &rtn(4), &[Batch::new(tokens).unwrap()]);
    assert!(matches!(error, Error::Peft(peft::Error::Token { .. })));
    // Normal floats have no range to learn.
    for method in [
        Box::new(Apiq::new(2)) as Box<dyn Initialization<Model>>,
        Box::new(ApiqBlock::new(2)),
    ] {
        let nf = NormalFloat::new().with_block_size(8);
        let error = refused(&*method, &nf, &calibration);
        assert!(matches!(error, Error::NoRange { .. }), "{error}");
    }
    // Also where only the last layer has none.
    let mut last = PerLayer::default();
    for (path, _) in dense.linears() {
        let quantizer: Box<dyn Quantizer> = if path.ends_with("1.mlp.down_proj") {
            Box::new(NormalFloat::new().with_block_size(8))
        } else {
            Box::new(rtn(2))
        };
        last.0.insert(path, quantizer);
    }
    for method in [
        Box::new(Apiq::new(2)) as Box<dyn Initialization<Model>>,
        Box::new(ApiqBlock::new(2)),
    ] {
        let error = refused(&*method, &last, &calibration);
        assert!(matches!(error, Error::NoRange { .. }), "{error}");
    }
    // Twice.
    let mut model = dense.clone();
    init(&mut model, &Loftq::new(2), &rtn(4), &[], |_| {}).unwrap();
    let error = init(&mut model, &Loftq::new(2), &rtn(4), &[], |_| {}).unwrap_err();
    assert!(matches!(
        error,
        Error::Peft(peft::Error::AlreadyAdapted { .. })
    ));
}
