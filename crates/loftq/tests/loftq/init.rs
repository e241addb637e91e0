//! Initializations of whole models.

use std::collections::BTreeSet;

use burn::tensor::{Device, Tensor};
use loftq::{
    Apiq, ApiqBlock, Initialization, InitializedLayer, Loftq, LqLora, Pissa, Qera, Rilq, init,
};
use models::Model;
use peft::{
    Adapter, Batch, Blocks, CausalLm, Evaluation, FitConfig, Linears, Lora, PerLayer, Schedule,
    last_output,
};
use quant_core::Quantizer;

use crate::llama::{batches, model, rtn};

/// The mean squared distance of last hidden states from those of the dense model.
fn distance(model: &Model, dense: &Model, batches: &[Batch]) -> f64 {
    let hidden = |model: &Model, batch: &Batch| model.norm(last_output(model, batch));
    let of = |batch: &Batch| {
        let difference = hidden(model, batch) - hidden(dense, batch);
        f64::from(difference.square().mean().into_scalar::<f32>())
    };
    batches.iter().map(of).sum::<f64>() / batches.len() as f64
}

/// By multiplying the layer's inputs one at a time.
fn sum(linear: &peft::Linear) -> Tensor<2> {
    let [d_in, _] = linear.weight().dims();
    let y = linear.forward(Tensor::<2>::eye(d_in, &Device::flex()));
    match linear.bias() {
        Some(bias) => y - bias.unsqueeze(),
        None => y,
    }
}

fn relative(dense: Tensor<2>, found: Tensor<2>) -> f64 {
    let square = |values: Tensor<2>| quant_core::sum_of_squares(values);
    (square(found - dense.clone()) / square(dense)).sqrt()
}

type Case = (&'static str, Box<dyn Initialization<Model>>);

fn cases() -> Vec<Case> {
    let lora = || Lora::new(3).with_alpha(5.0);
    let few = FitConfig::new().with_learning_rate(2e-3).with_steps(40);
    vec![
        ("qlora", Box::new(lora())),
        ("loftq", Box::new(Loftq::new(lora()))),
        ("pissa", Box::new(Pissa::new(lora()))),
        ("lq-lora", Box::new(LqLora::new(lora()))),
        (
            "lq-lora, fisher",
            Box::new(LqLora::new(lora()).with_fisher(true)),
        ),
        ("qera", Box::new(Qera::new(lora()))),
        (
            "apiq",
            Box::new(Apiq::new(lora()).with_learning_rates(1e-2, 5e-3)),
        ),
        (
            "apiq by block",
            Box::new(ApiqBlock::new(lora()).with_learning_rates(1e-2, 5e-3)),
        ),
        (
            "rilq",
            Box::new(
                Rilq::new(lora())
                    .with_fit(few.clone())
                    .with_cross_entropy(0.0),
            ),
        ),
        (
            "rilq after loftq",
            Box::new(
                Rilq::after(Loftq::new(lora()))
                    .with_fit(few)
                    .with_cross_entropy(0.1),
            ),
        ),
    ]
}

/// Every method: all layers packed and adapted, a report that is true, nearer to the dense model than
/// the base alone; the same bits for the same seed.
#[test]
fn all_methods_bring_the_model_nearer_to_the_dense_one() {
    let (dense, calibration) = (model(), batches(3));
    let mut base = dense.clone();
    init(&mut base, &Lora::new(3), &rtn(2), &calibration, |_| {}).unwrap();
    let without = distance(&base, &dense, &calibration);
    for (name, method) in cases() {
        let mut model = dense.clone();
        let mut called = Vec::new();
        let mut on_layer = |layer: &InitializedLayer| called.push(layer.report.path.clone());
        let layers = init(&mut model, &*method, &rtn(2), &calibration, &mut on_layer).unwrap();
        let paths: Vec<String> = dense.linears().into_iter().map(|(path, _)| path).collect();
        assert_eq!(called, paths, "{name}");
        for ((layer, (path, linear)), (_, original)) in
            layers.iter().zip(model.linears()).zip(dense.linears())
        {
            assert_eq!(layer.report.path, path);
            assert_eq!(layer.report.format, linear.weight().format());
            assert_eq!(layer.report.format, Some(rtn(2).format().unwrap()));
            assert_eq!(layer.rank, Some(3));
            let Some(Adapter::Lora(lora)) = linear.adapter() else {
                panic!("{name}: {path} has no adapter");
            };
            assert_eq!((lora.rank(), lora.alpha()), (3, 5.0));
            let weight = original.weight().to_dense();
            let expected = relative(weight.clone(), sum(linear));
            assert!(
                (layer.report.error.weight.relative - expected).abs() < 1e-5,
                "{name} {path}"
            );
            let plain = rtn(2).quantize(weight.clone(), None).unwrap().weight;
            let before = relative(weight, plain.dequantize());
            assert!(
                (layer.before.weight.relative - before).abs() < 1e-6,
                "{name} {path}"
            );
            let (before, after) = (
                layer.before.output.unwrap(),
                layer.report.error.output.unwrap(),
            );
            assert!(before > 0.0 && after > 0.0 && layer.report.seconds > 0.0);
            match name {
                "qlora" => assert_eq!((before, layer.round), (after, 1)),
                "qera" => assert!(after < before, "{path}: {after} of {before}"),
                _ => {}
            }
        }
        let with = distance(&model, &dense, &calibration);
        match name {
            "qlora" => assert_eq!(with, without),
            _ => assert!(with < without, "{name}: {with} of {without}"),
        }

        // Only adapters were tuned.
        let others = |model: &Model| {
            let head = model
                .head()
                .weight()
                .to_dense()
                .into_data()
                .try_into_vec::<f32>()
                .unwrap();
            let tokens = calibration[0].tokens();
            let embedded = model
                .embed(tokens, &model.positions(calibration[0].spans()))
                .into_data()
                .try_into_vec::<f32>()
                .unwrap();
            (head, embedded)
        };
        assert!(
            others(&model) == others(&dense),
            "{name} changed more than the layers"
        );
        let mut again = dense.clone();
        init(&mut again, &*method, &rtn(2), &calibration, |_| {}).unwrap();
        let bits = |model: &Model| {
            let logits = model.forward(calibration[0].tokens()).into_data();
            logits.try_into_vec::<f32>().unwrap()
        };
        assert!(bits(&model) == bits(&again), "{name} is not deterministic");
    }
}

/// With held-out batches RILQ keeps the adapters that were best on them, where a high rate ends with worse ones.
#[test]
fn rilq_keeps_the_best_on_held_out_batches() {
    let (dense, batches) = (model(), batches(5));
    let (calibration, held_out) = batches.split_at(3);
    let tuned = |evaluation: Option<Evaluation>| {
        let fit = FitConfig::new().with_learning_rate(0.1).with_steps(40);
        let fit = fit.with_schedule(Schedule::Constant);
        let rilq = Rilq::new(Lora::new(3)).with_cross_entropy(0.0);
        let rilq = rilq.with_fit(fit.with_evaluation(evaluation));
        let mut model = dense.clone();
        init(&mut model, &rilq, &rtn(2), calibration, |_| {}).unwrap();
        // Without the last token, which predicts none.
        let hidden = |model: &Model, batch: &Batch| {
            let hidden = model.norm(last_output(model, batch));
            let [n, seq, width] = hidden.dims();
            hidden.slice([0..n, 0..seq - 1, 0..width])
        };
        let errors = held_out.iter().map(|batch| {
            let difference = hidden(&model, batch) - hidden(&dense, batch);
            f64::from(difference.square().mean().into_scalar::<f32>())
        });
        errors.sum::<f64>()
    };
    let evaluation = Evaluation::new(held_out).with_every(1);
    let best = tuned(Some(evaluation.clone().with_restore_best(true)));
    let last = tuned(None);
    assert!(best < 0.99 * last, "{best} of {last}");
    // Watching alone changes nothing.
    assert_eq!(tuned(Some(evaluation)), last);
}

/// Calibration on the inputs that packed layers give: the closed form serves the stream that it is in.
#[test]
fn later_layers_see_what_earlier_ones_became() {
    let (dense, calibration) = (model(), batches(2));
    let mut model = dense.clone();
    init(&mut model, &Qera::new(4), &rtn(2), &calibration, |_| {}).unwrap();
    // The same layer on the inputs of the dense model is another.
    let path = "model.layers.1.mlp.down_proj";
    let mut recipe = PerLayer::default();
    recipe.0.insert(path.into(), Box::new(rtn(2)));
    let mut alone = dense.clone();
    let only = Lora::new(4).with_targets(["down_proj"]);
    let layers = init(&mut alone, &Qera::new(only), &recipe, &calibration, |_| {}).unwrap();
    // Targeted but left dense, the first block's has an adapter that adds nothing.
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[0].report.format, None);
    assert_eq!(
        (
            layers[0].before.weight.relative,
            layers[0].report.error.weight.relative
        ),
        (0.0, 0.0)
    );
    assert_eq!(layers[1].report.path, path);
    let factor = |model: &Model| {
        let linears = model.linears();
        let (_, linear) = linears.iter().find(|(other, _)| other == path).unwrap();
        let Some(Adapter::Lora(lora)) = linear.adapter() else {
            panic!("adapted");
        };
        let product = lora.a().matmul(lora.b()).into_data();
        product.try_into_vec::<f32>().unwrap()
    };
    assert_ne!(factor(&model), factor(&alone));
}

#[test]
fn layers_have_their_own_bits_and_some_no_adapter() {
    let (dense, calibration) = (model(), batches(1));
    let mut recipe = PerLayer::default();
    for (path, _) in dense.linears() {
        let bits = if path.contains("layers.0") { 4 } else { 2 };
        recipe.0.insert(path, Box::new(rtn(bits)));
    }
    for method in [
        Box::new(Loftq::new(Lora::new(2).with_targets(["q_proj", "up_proj"])))
            as Box<dyn Initialization<Model>>,
        Box::new(ApiqBlock::new(Lora::new(2).with_targets(["q_proj", "up_proj"])).with_rounds(2)),
        Box::new(Rilq::new(Lora::new(2).with_targets(["q_proj", "up_proj"]))),
    ] {
        let mut model = dense.clone();
        let layers = init(&mut model, &*method, &recipe, &calibration, |_| {}).unwrap();
        for (layer, (path, linear)) in layers.iter().zip(model.linears()) {
            let targeted = path.ends_with("q_proj") || path.ends_with("up_proj");
            assert_eq!(linear.adapter().is_some(), targeted, "{path}");
            assert_eq!(layer.rank, targeted.then_some(2));
            let bits = if path.contains("layers.0") { 4 } else { 2 };
            assert_eq!(linear.weight().format().unwrap().bits(), bits);
        }
    }
}

/// A block of which nothing is packed, and a layer that is targeted but stays dense.
#[test]
fn blocks_may_stay_dense() {
    let (dense, calibration) = (model(), batches(1));
    let mut recipe = PerLayer::default();
    recipe
        .0
        .insert("model.layers.1.mlp.up_proj".into(), Box::new(rtn(2)));
    let targets = ["up_proj", "q_proj"];
    for method in [
        Box::new(Apiq::new(Lora::new(2).with_targets(targets)).with_rounds(3))
            as Box<dyn Initialization<Model>>,
        Box::new(ApiqBlock::new(Lora::new(2).with_targets(targets)).with_rounds(3)),
        Box::new(Rilq::new(Lora::new(2).with_targets(targets))),
    ] {
        let mut model = dense.clone();
        let layers = init(&mut model, &*method, &recipe, &calibration, |_| {}).unwrap();
        let paths: Vec<&str> = layers
            .iter()
            .map(|layer| layer.report.path.as_str())
            .collect();
        let expected = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
        ];
        assert_eq!(paths, expected);
        let packed: Vec<bool> = layers
            .iter()
            .map(|layer| layer.report.format.is_some())
            .collect();
        assert_eq!(packed, [false, false, false, true]);
        for (path, linear) in model.linears() {
            assert_eq!(linear.adapter().is_some(), paths.contains(&path.as_str()));
        }
    }
}

/// Readers of reports find these keys.
#[test]
fn a_report_has_its_keys() {
    let layers = init(&mut model(), &Lora::new(3), &rtn(2), &[], |_| {}).unwrap();
    let json = serde_json::to_value(&layers[0]).unwrap();
    let keys: BTreeSet<&str> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let expected = [
        "path", "format", "rank", "before", "after", "round", "n_bytes", "seconds", "notes",
    ];
    assert_eq!(keys, BTreeSet::from(expected));
    let (before, after) = (&json["before"], &json["after"]);
    assert_eq!(before["weight"], layers[0].before.weight.relative);
    assert_eq!(after["weight"], layers[0].report.error.weight.relative);
    assert!(before["output"].is_null() && after["output"].is_null());
}
