use std::ops::ControlFlow;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use peft::{
    Adapter, Batch, Bayesian, Error, Fingerprint, FitConfig, Linear, Linears, Lora, Method,
    Schedule, Targets, Tile, Vera, Weight, attach, fit, fit_with, token_nll,
};
use proptest::prelude::*;
use quant_core::Rtn;

use crate::cases::cases;
use crate::model::{
    Bigram, HIDDEN, VOCAB, WIDTH, adapted, batch, dense, logits, parameters, quantized, tensor,
    tune,
};
use crate::property;

/// The paths of the parameters that have a gradient, and of those that have none.
struct Gradients<'a> {
    gradients: &'a burn::optim::GradientsParams,
    path: Vec<String>,
    with: Vec<String>,
    without: Vec<String>,
}

impl ModuleVisitor for Gradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.get::<D>(param.id);
        // A tensor that is not tracked costs no work in the backward pass.
        assert_eq!(param.val().is_tracked(), gradient.is_some());
        let list = match gradient {
            Some(gradient) => {
                assert!(gradient.abs().max().into_scalar::<f32>() > 0.0);
                &mut self.with
            }
            None => &mut self.without,
        };
        list.push(self.path.join("."));
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

proptest! {
    #![proptest_config(property(64))]

    #[test]
    fn only_adapters_have_gradients(case in cases(), seed in 0..1000u64) {
        let mut model = case.adapted(seed);
        // A fresh `B` of LoRA gives `A` a gradient of zero.
        tune(&mut model, seed);
        let model = model.train();
        let loss = token_nll(&model, &batch(seed, [2, 9])).sum();
        let gradients = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
        let mut visitor = Gradients { gradients: &gradients, path: vec![], with: vec![], without: vec![] };
        model.visit(&mut visitor);
        prop_assert_eq!(visitor.with.len(), case.n_parameters());
        prop_assert!(visitor.with.iter().all(|path| path.contains("adapter")));
        prop_assert!(visitor.without.iter().all(|path| !path.contains("adapter")));
    }

    /// Blocks that are run again give the same losses, gradients and parameters, whatever trains.
    #[test]
    fn checkpointing_changes_no_bit(case in cases(), seed in 0..1000u64, trained in 0..4usize) {
        let mut model = case.base.model(seed);
        match trained {
            0 => drop(peft::attach(&mut model, &*case.method(Targets::All)).unwrap()),
            1 => drop(peft::attach(&mut model, &*case.method(["down"])).unwrap()),
            // Below, and above as the head.
            _ => model.embedding = model.embedding.set_require_grad(true),
        }
        if trained == 3 {
            peft::attach(&mut model, &*case.method(["up"])).unwrap();
        }
        let batches: Vec<Batch> = (0..3).map(|at| batch(seed + at, [2, 9])).collect();
        let run = |checkpoint_blocks| {
            let mut model = model.clone();
            let config = FitConfig::new()
                .with_accumulation(2)
                .with_epochs(2)
                .with_checkpoint_blocks(checkpoint_blocks);
            let mut steps = Vec::new();
            fit(&mut model, &batches, &config, |step, _| steps.push(step.clone())).unwrap();
            (steps, Fingerprint::of(&model), logits(&model))
        };
        prop_assert_eq!(run(true), run(false));
    }
}

/// A callback sees each step's model, and ends the training with it; what it computes changes nothing.
#[test]
fn a_callback_sees_the_model_and_ends_the_training() {
    let mut fresh = quantized(3, &Rtn::new().with_group_size(32));
    attach(&mut fresh, &Lora::new(2).with_dropout(0.5)).unwrap();
    let batches: Vec<Batch> = (0..5).map(|at| batch(at, [2, 9])).collect();
    for checkpoint_blocks in [false, true] {
        let config = FitConfig::new()
            .with_learning_rate(0.02)
            .with_epochs(2)
            .with_accumulation(2)
            .with_warmup_steps(2)
            .with_checkpoint_blocks(checkpoint_blocks);
        let mut undisturbed = fresh.clone();
        fit(&mut undisturbed, &batches, &config, |_, _| {}).unwrap();

        let (mut steps, mut seen) = (Vec::new(), Vec::new());
        let mut watched = fresh.clone();
        fit(&mut watched, &batches, &config, |step, training| {
            // Without dropout: the same each time.
            let [model, again] = [training.model(), training.model()];
            assert_eq!(logits(&model), logits(&again));
            seen.push((parameters(&model), logits(&model)));
            steps.push(step.clone());
        })
        .unwrap();
        assert_eq!(steps.len(), 6);
        assert!(seen.windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(parameters(&watched), parameters(&undisturbed));
        assert_eq!(seen[5], (parameters(&watched), logits(&watched)));

        for end in [1, 4, 6] {
            let mut stopped = fresh.clone();
            let mut taken = Vec::new();
            fit(&mut stopped, &batches, &config, |step, _| {
                taken.push(step.clone());
                match step.index {
                    index if index == end => ControlFlow::Break(()),
                    _ => ControlFlow::Continue(()),
                }
            })
            .unwrap();
            assert_eq!(taken, steps[..end]);
            let found = (parameters(&stopped), logits(&stopped));
            assert_eq!(found, seen[end - 1]);
        }
    }
}

/// Batches of several sizes in one step give the step of one batch with all of their windows.
#[test]
fn accumulation_weighs_each_token_the_same() {
    let parts = [batch(1, [1, 9]), batch(2, [3, 9]), batch(3, [2, 9])];
    let whole = Tensor::cat(parts.iter().map(Batch::tokens).collect(), 0);
    let whole = [Batch::new(whole).unwrap()];
    let step = |batches: &[Batch]| {
        let config = FitConfig::new()
            .with_accumulation(batches.len())
            .with_steps(Some(1));
        let mut found = None;
        let mut model = adapted(5);
        fit(&mut model, batches, &config, |step, _| {
            found = Some(step.clone())
        })
        .unwrap();
        found.unwrap()
    };
    let (parts, whole) = (step(&parts), step(&whole));
    assert_eq!(parts.n_targets, whole.n_targets);
    assert!((parts.loss - whole.loss).abs() < 1e-6);
    assert!((parts.grad_norm / whole.grad_norm - 1.0).abs() < 1e-5);
}

#[test]
fn training_lowers_the_loss_and_is_repeatable() {
    let batches: Vec<Batch> = (0..4).map(|at| batch(at, [4, 9])).collect();
    let run = |seed| {
        let mut model = adapted(7);
        let config = FitConfig::new()
            .with_learning_rate(0.05)
            .with_epochs(20)
            .with_schedule(Schedule::Linear)
            .with_seed(seed);
        let mut losses = Vec::new();
        fit(&mut model, &batches, &config, |step, _| {
            losses.push(step.loss)
        })
        .unwrap();
        (losses, logits(&model))
    };
    let (losses, tuned) = run(3);
    assert_eq!(losses.len(), 80);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&losses[60..]) < 0.8 * mean(&losses[..4]), "{losses:?}");
    assert_eq!(run(3).1, tuned);
    assert_ne!(run(4).1, tuned);
}

#[test]
fn a_loss_that_is_not_finite_names_the_step_and_loses_nothing() {
    let mut model = adapted(8);
    let before = logits(&model);
    // Factors that grow by a million each step overflow soon.
    let config = FitConfig::new()
        .with_learning_rate(1e20)
        .with_steps(Some(50));
    let error = fit(&mut model, &[batch(1, [2, 9])], &config, |_, _| {}).unwrap_err();
    assert!(
        matches!(&error, Error::NonFinite { step, .. } if *step > 1),
        "{error}"
    );
    let said = error.to_string();
    assert!(
        said.contains("from block 0 on") || said.contains("factors"),
        "{said}"
    );
    assert_eq!(logits(&model), before);
}

#[test]
fn a_loss_that_is_not_finite_names_where_it_comes_from() {
    let huge = |dims| Linear::new(Weight::frozen(tensor(3, dims) * f32::MAX), None);
    for place in ["block 0", "block 1", "what follows the last block"] {
        let mut model = dense(8);
        // Products with the huge weight are beyond the range of f32.
        let embedding = tensor(8, [VOCAB, HIDDEN]) * 100.0;
        model.embedding = Param::from_tensor(embedding).set_require_grad(false);
        let trained = match place {
            "block 0" => {
                model.up = huge([HIDDEN, WIDTH]);
                "down"
            }
            "block 1" => {
                model.down = huge([WIDTH, HIDDEN]);
                "up"
            }
            _ => "up",
        };
        attach(&mut model, &Lora::new(2).with_targets([trained])).unwrap();
        let loss = |_: &Bigram, x: Tensor<3>, _: usize| match place {
            "what follows the last block" => x.sum() * f32::INFINITY,
            _ => x.sum(),
        };
        for checkpoint in [false, true] {
            let config = FitConfig::new().with_checkpoint_blocks(checkpoint);
            let error = fit_with(&mut model, &[batch(1, [2, 9])], &config, loss, |_, _| {});
            let said = error.unwrap_err().to_string();
            let expected = format!("the loss, from {place} on, is not finite at step 1");
            assert!(said.starts_with(&expected), "{said}");
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_names_its_tensor() {
    let mut model = adapted(8);
    // The loss is finite, but the gradient's square is not.
    if let Some((_, linear)) = model.linears_mut().into_iter().nth(1) {
        let weight = tensor(3, [WIDTH, HIDDEN]) * 1e30;
        *linear = Linear::new(Weight::frozen(weight), None);
        linear.quantize("mlp.down", &Rtn::new(), None).unwrap();
    }
    let error = fit(
        &mut model,
        &[batch(1, [2, 9])],
        &FitConfig::new(),
        |_, _| {},
    )
    .unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("up.adapter") && message.contains("factors"),
        "{message}"
    );
    assert!(message.contains("step 1"), "{message}");
}

/// Factors that the last step made infinite are not returned, though loss and gradients were finite.
#[test]
fn a_result_that_is_not_finite_is_refused() {
    let mut model = adapted(8);
    let before = logits(&model);
    // The decay multiplies the factors by 1 - 3e39, which f32 does not hold.
    let config = FitConfig::new()
        .with_learning_rate(3e38)
        .with_weight_decay(10.0)
        .with_schedule(Schedule::Constant)
        .with_steps(Some(1));
    let error = fit(&mut model, &[batch(1, [2, 9])], &config, |_, _| {}).unwrap_err();
    let named =
        matches!(&error, Error::NonFinite { what, step: 1, .. } if what.contains("factors"));
    assert!(named, "{error}");
    assert_eq!(logits(&model), before);
}

#[test]
fn tokens_that_the_model_lacks_are_refused() {
    let mut model = adapted(1);
    for bad in [VOCAB as i32, -1] {
        let tokens = TensorData::new(vec![1, bad, 2], [1, 3]);
        let batch = Batch::new(Tensor::from_data(tokens, &Device::flex())).unwrap();
        let error = fit(&mut model, &[batch], &FitConfig::new(), |_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Token { token, .. } if token == i64::from(bad)));
    }
}

/// LoRA+ gives `B` its own rate: the first step of AdamW moves each value by its rate.
#[test]
fn lora_plus_gives_b_its_own_rate() {
    let mut model = dense(1);
    peft::attach(&mut model, &Lora::new(2).with_dora(true)).unwrap();
    tune(&mut model, 1);
    let values = |model: &Bigram| {
        let Some(Adapter::Lora(lora)) = model.up.adapter() else {
            panic!("no LoRA");
        };
        let magnitude = lora.magnitude().unwrap().unsqueeze();
        [lora.a(), lora.b(), magnitude].map(|t| t.into_data().try_into_vec::<f32>().unwrap())
    };
    let before = values(&model);
    let config = FitConfig::new()
        .with_learning_rate(1e-3)
        .with_schedule(Schedule::Constant)
        .with_lora_plus_ratio(16.0)
        .with_steps(Some(1));
    fit(&mut model, &[batch(1, [2, 9])], &config, |_, _| {}).unwrap();
    let moved = before.iter().zip(values(&model)).map(|(before, after)| {
        let moves = before
            .iter()
            .zip(after)
            .map(|(before, after)| (after - before).abs());
        moves.fold(0.0, f32::max)
    });
    for (moved, expected) in moved.zip([1e-3, 1.6e-2, 1.6e-2]) {
        assert!((moved / expected - 1.0).abs() < 1e-2, "{moved} {expected}");
    }
    let config = config.with_lora_plus_ratio(0.0);
    assert!(matches!(config.check(), Err(Error::Setting { .. })));
}

/// A penalty on open gates shuts them; without one, gates that the task needs stay open.
#[test]
fn bayesian_lora_shuts_what_costs_more_than_it_gives() {
    let tuned = |penalty: f32| {
        let mut model = dense(3);
        peft::attach(&mut model, &Bayesian::new(4).with_penalty(penalty)).unwrap();
        let config = FitConfig::new()
            .with_learning_rate(2e-2)
            .with_steps(Some(60));
        peft::fit(&mut model, &[batch(4, [4, 12])], &config, |_, _| {}).unwrap();
        let Some(Adapter::Bayesian(adapter)) = model.up.adapter() else {
            panic!("attached");
        };
        (adapter.rank(), adapter.bits())
    };
    let (rank, bits) = tuned(0.0);
    assert!(rank >= 3 && bits[0] >= 8, "{rank} {bits:?}");
    let (rank, bits) = tuned(30.0);
    assert!(rank == 0 || bits == [0, 0], "{rank} {bits:?}");
}

/// Dropout changes the trained parameters by its seed alone, and no output after training.
#[test]
fn dropout_follows_its_seed() {
    type WithDropout = fn(f32) -> Box<dyn Method>;
    let methods: [WithDropout; 3] = [
        |probability| Box::new(Tile::qa_lora(2).with_dropout(probability)),
        |probability| Box::new(Lora::new(2).with_dropout(probability)),
        |probability| Box::new(Vera::new(8).with_dropout(probability)),
    ];
    let run = |method: WithDropout, probability, seed, checkpoint_blocks| {
        let mut model = quantized(3, &Rtn::new().with_group_size(32));
        peft::attach(&mut model, &*method(probability)).unwrap();
        let batches: Vec<Batch> = (0..3).map(|at| batch(at, [2, 9])).collect();
        let config = FitConfig::new()
            .with_learning_rate(0.02)
            .with_steps(Some(6))
            .with_seed(seed)
            .with_checkpoint_blocks(checkpoint_blocks);
        fit(&mut model, &batches, &config, |_, _| {}).unwrap();
        // Nothing is dropped once training is over, until a seed is set.
        let tuned = logits(&model);
        peft::set_dropout(&mut model, 1);
        assert_eq!(logits(&model) == tuned, probability == 0.0);
        peft::set_dropout(&mut model, None);
        assert_eq!(logits(&model), tuned);
        tuned
    };
    for method in methods {
        let dropped = run(method, 0.5, 1, false);
        assert_eq!(dropped, run(method, 0.5, 1, true));
        assert_ne!(dropped, run(method, 0.0, 1, false));
        assert_ne!(dropped, run(method, 0.5, 2, false));
    }
}
