//! Initializations of whole models, on random LLaMAs.

use burn::tensor::{Device, Distribution, Tensor};
use loftq::{
    Apiq, ApiqBlock, Error, Fisher, Initialization, InitializedLayer, Loftq, LqLora, Pissa, Qera,
    Rilq, init, sensitivities,
};
use models::{LlamaConfig, Model, RopeScaling};
use peft::{
    Adapter, Batch, Blocks, CausalLm, Fingerprint, FitConfig, Linears, Lora, PerLayer, Weight,
    last_output, token_nll,
};
use quant_core::{NormalFloat, Optq, Quantizer, Rtn, allocate};

fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 48,
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        sliding_window: None,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        attention_bias: true,
        attention_output_bias: true,
        mlp_bias: false,
        tie_word_embeddings: false,
    }
}

fn model() -> Model {
    Model::init(config(), 3, &Device::flex())
}

fn batches(n: usize) -> Vec<Batch> {
    let device = Device::flex();
    device.seed(5);
    let batch = |_| {
        let tokens = Tensor::<2>::random([4, 24], Distribution::Uniform(0.0, 48.0), &device);
        Batch::new(tokens.int()).unwrap()
    };
    (0..n).map(batch).collect()
}

fn rtn(bits: usize) -> Rtn {
    Rtn::new().with_bits(bits).with_group_size(8)
}

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
    let few = FitConfig::new()
        .with_learning_rate(2e-3)
        .with_steps(Some(40));
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
        let mut heard = Vec::new();
        let mut hear = |layer: &InitializedLayer| heard.push(layer.report.path.clone());
        let layers = init(&mut model, &*method, &rtn(2), &calibration, &mut hear).unwrap();
        let paths: Vec<String> = dense.linears().into_iter().map(|(path, _)| path).collect();
        assert_eq!(heard, paths, "{name}");
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

/// What ApiQ makes small is the error of each block's output, for its own inputs.
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

#[test]
fn pissa_splits_what_stays_dense() {
    let (dense, batch) = (model(), &batches(1)[0]);
    let mut model = dense.clone();
    let dense_recipe = PerLayer::default();
    let layers = init(&mut model, &Pissa::new(4), &dense_recipe, &[], |_| {}).unwrap();
    assert_eq!(layers.len(), dense.linears().len());
    let logits = |model: &Model| model.forward(batch.tokens());
    let difference = (logits(&model) - logits(&dense)).abs().max();
    assert!(difference.into_scalar::<f32>() < 1e-4);
    let mut base = model.clone();
    peft::detach(&mut base).unwrap();
    let difference = (logits(&base) - logits(&dense)).abs().max();
    assert!(difference.into_scalar::<f32>() > 1e-2, "the base lost them");
    // It trains on from there.
    let loss = |model: &Model| f64::from(token_nll(model, batch).mean().into_scalar::<f32>());
    let before = loss(&model);
    let config = FitConfig::new().with_steps(Some(5));
    peft::fit(&mut model, &batches(1), &config, |_| {}).unwrap();
    assert!(loss(&model) < before);
}

#[test]
fn bits_are_chosen_under_a_budget() {
    let (dense, calibration) = (model(), batches(2));
    let quantizers = [rtn(2), rtn(3), rtn(4)];
    let refs: Vec<&dyn Quantizer> = quantizers.iter().map(|one| one as _).collect();
    for method in [LqLora::new(2), LqLora::new(2).with_fisher(true)] {
        let table = sensitivities(&dense, &method, &refs, &calibration).unwrap();
        assert_eq!(table.len(), dense.linears().len());
        for (path, costs) in &table {
            // More bits, less error.
            assert!(
                costs.is_sorted_by(|a, b| a.error > b.error),
                "{path}: {costs:?}"
            );
            assert!(costs.is_sorted_by(|a, b| a.n_bytes < b.n_bytes));
        }
        let costs: Vec<_> = table.iter().map(|(_, costs)| costs.clone()).collect();
        let budget = costs.iter().map(|costs| costs[1].n_bytes).sum();
        let chosen = allocate(&costs, budget).unwrap();
        let mut recipe = PerLayer::default();
        for ((path, _), &choice) in table.iter().zip(&chosen.choice) {
            recipe.0.insert(path.clone(), Box::new(quantizers[choice]));
        }
        let mut model = dense.clone();
        let layers = init(&mut model, &method, &recipe, &calibration, |_| {}).unwrap();
        let n_bytes: usize = layers.iter().map(|layer| layer.report.n_bytes).sum();
        assert!(n_bytes as u64 <= budget);
        assert_eq!(n_bytes as u64, chosen.n_bytes);
    }
}

/// The Fisher information against differences of losses.
#[test]
fn the_fisher_information_is_the_square_of_gradients() {
    let (model, calibration) = (model(), batches(1));
    let fisher = Fisher::sum(&model, &calibration).unwrap();
    let path = "model.layers.1.mlp.down_proj";
    let found = fisher.of(path).unwrap();
    let of_outputs: Vec<f32> = found.of_outputs.clone().into_data().try_into_vec().unwrap();
    let found: Vec<f32> = found.of_inputs.clone().into_data().try_into_vec().unwrap();
    assert_eq!(found.len(), 40);
    assert!(fisher.of("model.layers.9.mlp.down_proj").is_none());
    let tokens = calibration[0].tokens();
    let (input, step) = (7, 2e-2f32);
    let gradient = |one: &Batch, input: usize, output: usize| {
        let loss = |by: f32| {
            let mut moved = model.clone();
            for (other, linear) in moved.linears_mut() {
                if other != path {
                    continue;
                }
                let mut one = vec![0.0f32; 40 * 32];
                one[input * 32 + output] = by;
                let one = Tensor::<1>::from_floats(&one[..], &Device::flex());
                let weight = linear.weight().to_dense() + one.reshape([40, 32]);
                linear.replace(path, Weight::frozen(weight), None).unwrap();
            }
            f64::from(token_nll(&moved, one).mean().into_scalar::<f32>())
        };
        (loss(step) - loss(-step)) / f64::from(2.0 * step)
    };
    let (mut sum, mut of_output) = (0.0, 0.0);
    for sequence in 0..4 {
        let one = Batch::new(tokens.clone().slice([sequence..sequence + 1, 0..24])).unwrap();
        for output in 0..32 {
            sum += gradient(&one, input, output).powi(2);
        }
        for input in 0..40 {
            of_output += gradient(&one, input, 5).powi(2);
        }
    }
    let expected = (sum / 32.0).sqrt();
    // What stands for an output is relative to the mean of all weights.
    let square = |roots: &[f32]| {
        let squares = roots.iter().map(|&root| f64::from(root).powi(2));
        squares.sum::<f64>() / roots.len() as f64
    };
    assert!((square(&of_outputs) - 1.0).abs() < 1e-4);
    let of_output = (of_output / 40.0 / square(&found)).sqrt();
    for (found, expected) in [(found[input], expected), (of_outputs[5], of_output)] {
        let found = f64::from(found);
        let near = (found - expected).abs() < 0.02 * expected;
        assert!(near, "{found} for {expected}");
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
        let quantizer: Box<dyn Quantizer> = match path.ends_with("1.mlp.down_proj") {
            true => Box::new(NormalFloat::new().with_block_size(8)),
            false => Box::new(rtn(2)),
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
