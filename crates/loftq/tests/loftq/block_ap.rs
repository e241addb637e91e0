//! Block-AP of EfficientQAT.

use burn::tensor::Device;
use loftq::{BlockAp, Error, Initialization, InitializedLayer, init};
use models::{Model, Pretrained, load_verified, save};
use peft::{Batch, Blocks, CausalLm, FitConfig, Linears, Peqa, PerLayer, Weight};
use quant_core::{NormalFloat, Optq, Order, Parts, Quantizer, Rtn, StoredGrid};

use crate::llama::{batches, model, rtn};
use crate::word_level;

/// Rates for a model of this size and few steps.
fn block_ap() -> BlockAp {
    BlockAp::new().with_learning_rates(2e-3, 2e-3)
}

fn trained(
    method: &BlockAp,
    recipe: &dyn peft::Recipe,
    calibration: &[Batch],
) -> (Model, Vec<InitializedLayer>) {
    let mut model = model();
    let layers = init(&mut model, method, recipe, calibration, |_| {}).unwrap();
    (model, layers)
}

fn quantized(quantizer: &impl Quantizer, calibration: &[Batch]) -> Model {
    let mut model = model();
    models::quantize(&mut model, quantizer, calibration, |_| {}).unwrap();
    model
}

/// Codes, scales and zeros of all layers.
fn parts(model: &Model) -> Vec<Parts> {
    let linears = model.linears().into_iter();
    let parts = linears.map(|(path, linear)| match linear.weight() {
        Weight::Quant(weight) => weight.to_parts(),
        Weight::Dense(_) => panic!("{path} is dense"),
    });
    parts.collect()
}

/// The squared error of the first block's output.
fn error(model: &Model, calibration: &[Batch]) -> f64 {
    let dense = crate::llama::model();
    let of = |batch: &Batch| {
        let positions = model.positions(batch.spans());
        let x = model.embed(batch.tokens(), &positions);
        let y = model.block(0, x.clone(), &positions);
        let difference = y - dense.block(0, x, &positions);
        f64::from(difference.square().sum().into_scalar::<f32>())
    };
    calibration.iter().map(of).sum()
}

/// The quantizer's weights where nothing is trained, and where training makes a block worse.
#[test]
fn a_block_that_is_not_better_has_the_weights_of_the_quantizer() {
    let calibration = batches(2);
    let symmetric = rtn(3).with_symmetric(true);
    let fractional = rtn(2).with_fractional_zeros(true);
    let still = BlockAp::new().with_learning_rates(0.0, 0.0);
    let none = block_ap().with_rounds(0);
    let wild = BlockAp::new().with_learning_rates(10.0, 10.0);
    for quantizer in [rtn(2), symmetric, fractional] {
        let expected = parts(&quantized(&quantizer, &calibration));
        // Its zeros become whole before the first step.
        let n_methods = if quantizer == fractional { 2 } else { 3 };
        for method in [&none, &wild, &still].into_iter().take(n_methods) {
            let (model, layers) = trained(method, &quantizer, &calibration);
            assert!(parts(&model) == expected, "{method:?}, {quantizer:?}");
            for layer in layers {
                assert_eq!(layer.rank, None);
                assert_eq!(layer.before, layer.report.error);
                assert_eq!(layer.report.format, Some(quantizer.format().unwrap()));
            }
        }
    }
    // Codes that are not the nearest ones are kept, too.
    let optq = Optq::new().with_bits(2).with_group_size(8);
    let optq = optq.with_order(Order::Natural);
    for method in [none, wild] {
        let (_, layers) = trained(&method, &optq, &calibration);
        for layer in layers {
            assert_eq!((layer.round, layer.before), (0, layer.report.error));
        }
    }
}

#[test]
fn block_ap_lowers_the_error_of_a_block() {
    let calibration = batches(3);
    for quantizer in [
        rtn(2),
        rtn(2).with_symmetric(true),
        Rtn::new().with_bits(3).with_group_size(12),
    ] {
        let plain = error(&quantized(&quantizer, &calibration), &calibration);
        let with = |rounds: usize| {
            let (model, layers) =
                trained(&block_ap().with_rounds(rounds), &quantizer, &calibration);
            assert!(layers.iter().all(|layer| layer.round == rounds));
            error(&model, &calibration)
        };
        let (some, more) = (with(10), with(40));
        assert!(
            some < plain && more < 0.6 * plain && more < some,
            "{plain} {some} {more}"
        );
    }
}

/// Weights alone, or grids alone.
#[test]
fn a_rate_of_zero_leaves_its_parameters() {
    let calibration = batches(2);
    let plain = parts(&quantized(&rtn(2), &calibration));
    for (of_grids, of_weights) in [(2e-3, 0.0), (0.0, 2e-3)] {
        let method = BlockAp::new().with_learning_rates(of_grids, of_weights);
        let (model, _) = trained(&method.with_rounds(20), &rtn(2), &calibration);
        let found = parts(&model);
        let differs = |part: fn(&Parts) -> String| {
            let mut pairs = plain.iter().zip(&found);
            pairs.any(|(plain, found)| part(plain) != part(found))
        };
        assert_eq!(differs(|of| format!("{:?}", of.scales)), of_grids > 0.0);
        assert!(of_grids > 0.0 || !differs(|of| format!("{:?}", of.zeros)));
        assert!(differs(|of| format!("{:?}", of.words)));
    }
}

#[test]
fn the_model_is_an_ordinary_packed_one() {
    let calibration = batches(2);
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    word_level::write_tokenizer(&tokenizer, 48);
    for f16_scales in [false, true] {
        let quantizer = rtn(2).with_f16_scales(f16_scales);
        let method = block_ap().with_rounds(5).with_f16_scales(f16_scales);
        let (model, layers) = trained(&method, &quantizer, &calibration);
        assert!(layers.iter().all(|layer| layer.round == 5));
        for ((path, linear), layer) in model.linears().into_iter().zip(&layers) {
            assert!(linear.adapter().is_none(), "{path}");
            assert_eq!(layer.report.path, path);
            let Weight::Quant(weight) = linear.weight() else {
                panic!("{path} is dense");
            };
            let zeros = weight.zeros().unwrap().into_data();
            let zeros = zeros.try_into_vec::<f32>().unwrap();
            let is_code = |zero: &f32| zero.fract() == 0.0 && (0.0..=3.0).contains(zero);
            assert!(zeros.iter().all(is_code), "{path}");
            let in_f16 = StoredGrid::new().with_f16_scales(true);
            assert_eq!(in_f16.holds(weight), f16_scales, "{path}");
        }
        for n_threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            let again = pool
                .build()
                .unwrap()
                .install(|| trained(&method, &quantizer, &calibration).0);
            assert_eq!(parts(&model), parts(&again));
        }

        let lm = Pretrained::new(model, &tokenizer).unwrap();
        let out = dir.path().join(format!("{f16_scales}"));
        save(&lm, &out).unwrap();
        let loaded = load_verified(&out, &Device::flex()).unwrap().model;
        assert_eq!(parts(&loaded), parts(&lm.model));
    }
}

/// The second phase of EfficientQAT: scales are trained on a task, and merge into the weight.
#[test]
fn peqa_merges_exactly_on_top() {
    let calibration = batches(2);
    let (mut model, _) = trained(&block_ap(), &rtn(2), &calibration);
    let before = parts(&model);
    peft::attach(&mut model, &Peqa::new()).unwrap();
    let fit = FitConfig::new().with_learning_rate(1e-2).with_steps(4);
    peft::fit(&mut model, &calibration, &fit, |_, _| {}).unwrap();
    let logits = |model: &Model| {
        let logits = model.forward(calibration[0].tokens()).into_data();
        logits.try_into_vec::<f32>().unwrap()
    };
    let tuned = logits(&model);
    peft::merge(&mut model).unwrap();
    assert_eq!(logits(&model), tuned);
    for (before, after) in before.iter().zip(parts(&model)) {
        assert_eq!(before.words, after.words);
        assert_ne!(before.scales, after.scales);
    }
}

/// Layers that the recipe leaves dense stay as they are, and others have their own bits.
#[test]
fn layers_may_stay_dense() {
    let (dense, calibration) = (model(), batches(1));
    let mut recipe = PerLayer::default();
    let packed = [
        ("model.layers.0.mlp.up_proj", 3),
        ("model.layers.1.self_attn.q_proj", 2),
    ];
    for (path, bits) in packed {
        recipe.0.insert(path.into(), Box::new(rtn(bits)));
    }
    let (model, layers) = trained(&block_ap(), &recipe, &calibration);
    let paths: Vec<&str> = layers
        .iter()
        .map(|layer| layer.report.path.as_str())
        .collect();
    assert_eq!(paths, packed.map(|(path, _)| path));
    for ((path, linear), (_, original)) in model.linears().into_iter().zip(dense.linears()) {
        let bits = packed.iter().find(|(packed, _)| *packed == path);
        let format = linear.weight().format();
        assert_eq!(
            format.map(|format| format.bits()),
            bits.map(|&(_, bits)| bits)
        );
        if bits.is_none() {
            let [found, expected] = [linear, original].map(|linear| {
                let weight = linear.weight().to_dense().into_data();
                weight.try_into_vec::<f32>().unwrap()
            });
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let calibration = batches(1);
    let refused = |method: &BlockAp, quantizer: &dyn Quantizer, calibration: &[Batch]| {
        let mut model = model();
        let error = init(&mut model, method, &quantizer, calibration, |_| {}).unwrap_err();
        let linears = model.linears();
        assert!(
            linears
                .iter()
                .all(|(_, linear)| linear.weight().format().is_none())
        );
        error
    };
    let error = refused(&BlockAp::new(), &rtn(2), &[]);
    assert!(
        matches!(error, Error::Peft(peft::Error::NoCalibration)),
        "{error}"
    );
    let regrouped = Optq::new().with_group_size(8);
    let regrouped = regrouped.with_order(Order::DescendingRegrouped);
    let quantizers: [&dyn Quantizer; 2] = [&NormalFloat::new().with_block_size(8), &regrouped];
    for quantizer in quantizers {
        let error = refused(&BlockAp::new(), quantizer, &calibration);
        assert!(matches!(error, Error::NoRange { .. }), "{error}");
    }
    for (of_grids, of_weights) in [(f64::NAN, 1e-3), (-1e-3, 1e-3), (1e-3, f64::INFINITY)] {
        let method = BlockAp::new().with_learning_rates(of_grids, of_weights);
        let error = refused(&method, &rtn(2), &calibration);
        let is_setting = matches!(error, Error::Peft(peft::Error::Setting { .. }));
        assert!(is_setting, "{error}");
    }
    let mut packed = quantized(&rtn(4), &[]);
    let error = init(&mut packed, &BlockAp::new(), &rtn(2), &calibration, |_| {}).unwrap_err();
    let is_packed = matches!(&error, Error::Peft(peft::Error::AlreadyQuantized { .. }));
    assert!(is_packed, "{error}");
    assert!(!Initialization::<Model>::has_adapters(&BlockAp::new()));
}
