//! ApiQ, of a layer and of a block.

use burn::tensor::Tensor;
use loftq::{Apiq, ApiqBlock, Error, Layer, LayerMethod, Qera, init};
use models::Model;
use peft::{Blocks, Lora};
use quant_core::{Gram, NormalFloat, Rtn, sum_of_squares};

use crate::layers::{inputs, layer, random, square_error};
use crate::llama::{batches, model, rtn};

#[test]
fn apiq_follows_the_inputs_of_the_dense_model() {
    let weight = random([48, 40], 11);
    let dense = inputs(48, 12);
    // The same tokens after packed layers.
    let x = dense.clone() + random([144, 48], 13) * 0.3;
    let mut gram = Gram::new(48, &weight.device());
    gram.update_with_drift(x.clone(), dense.clone());
    let layer = Layer {
        gram: Some(&gram),
        ..layer(&weight)
    };
    let target = dense.matmul(weight.clone());
    let error = |found: Tensor<2>| sum_of_squares(x.clone().matmul(found) - target.clone());
    for quantizer in [
        Rtn::new().with_bits(2).with_group_size(16),
        Rtn::new()
            .with_bits(3)
            .with_group_size(20)
            .with_symmetric(true),
    ] {
        let plain = error(Lora::new(4).start(&layer, &quantizer).unwrap().sum());
        // No step changes nothing.
        let apiq = Apiq::new(4).with_learning_rates(2e-2, 1e-2);
        let start = apiq
            .clone()
            .with_rounds(0)
            .start(&layer, &quantizer)
            .unwrap();
        let none = error(start.sum());
        assert!((none - plain).abs() < 1e-4 * plain, "{none} of {plain}");
        let mut last = plain;
        for rounds in [30, 200] {
            let apiq = apiq.clone().with_rounds(rounds);
            let start = apiq.start(&layer, &quantizer).unwrap();
            let found = error(start.sum());
            assert!(found < last, "{found} of {last}");
            last = found;
            // The error that it reports is that of the packed weight, but for a constant.
            let constant = error(weight.clone());
            let said = start.error + constant;
            assert!((said - found).abs() < 1e-2 * found, "{said} of {found}");
        }
        // Closer than the best adapter on the quantizer's own weight and inputs alone.
        let qera = error(Qera::new(4).start(&layer, &quantizer).unwrap().sum());
        assert!(last < qera, "{last} of {qera}");
    }

    // A layer that gives nothing is left as it is.
    let zeros = Tensor::<2>::zeros([48, 40], &weight.device());
    let still = Layer {
        weight: zeros.clone(),
        ..layer.clone()
    };
    let start = Apiq::new(4)
        .with_rounds(3)
        .start(&still, &Rtn::new())
        .unwrap();
    assert_eq!(square_error(&zeros, start.sum()), 0.0);

    for (of_ranges, of_factors, decay) in [
        (f64::NAN, 1e-3, 0.1),
        (1e-3, -1.0, 0.1),
        (1e-3, 1e-3, f32::INFINITY),
    ] {
        let apiq = Apiq::new(4).with_learning_rates(of_ranges, of_factors);
        let refused = apiq.with_weight_decay(decay).start(&layer, &Rtn::new());
        let expected = matches!(refused, Err(Error::Peft(peft::Error::Setting { .. })));
        assert!(expected, "{refused:?}");
    }
    let refused = Apiq::new(4).start(&layer, &NormalFloat::new().with_block_size(16));
    assert!(matches!(refused, Err(Error::NoRange { .. })));
    let blind = Apiq::new(4).start(&self::layer(&weight), &Rtn::new());
    let expected = matches!(blind, Err(Error::Peft(peft::Error::NoCalibration)));
    assert!(expected, "{blind:?}");
}

/// ApiQ minimizes the error of each block's output, for its own inputs.
#[test]
fn apiq_lowers_the_error_of_a_block() {
    let (dense, calibration) = (model(), batches(3));
    let error = |model: &Model| {
        let mut sum = 0.0;
        for batch in &calibration {
            let positions = model.positions(batch.spans());
            let x = model.embed(batch.tokens(), &positions);
            let y = model.block(0, x.clone(), &positions);
            let difference = y - dense.block(0, x, &positions);
            sum += f64::from(difference.square().sum().into_scalar::<f32>());
        }
        sum
    };
    let with = |rounds: usize| {
        let mut model = dense.clone();
        let apiq = ApiqBlock::new(3).with_learning_rates(1e-2, 5e-3);
        let apiq = apiq.with_rounds(rounds);
        init(&mut model, &apiq, &rtn(2), &calibration, |_| {}).unwrap();
        error(&model)
    };
    let mut plain = dense.clone();
    init(&mut plain, &Lora::new(3), &rtn(2), &calibration, |_| {}).unwrap();
    let plain = error(&plain);
    let (none, some, more) = (with(0), with(10), with(60));
    assert!((none - plain).abs() < 1e-3 * plain, "{none} {plain}");
    assert!(
        some < 0.9 * plain && more < 0.7 * plain && more < some,
        "{plain} {some} {more}"
    );
}
