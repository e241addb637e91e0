//! Evaluation in the course of a training, and steps that are not finite.

use std::cell::Cell;

use burn::tensor::{Device, Tensor, TensorData};
use peft::{
    Batch, Error, Evaluation, FitConfig, FitEnd, FitWarning, Linear, Lora, Schedule, Weight,
    attach, fit, fit_with, nll_of_output, token_nll,
};
use quant_core::Rtn;

use crate::model::{Bigram, HIDDEN, WIDTH, batch, dense, parameters, quantized};

fn with_dropout() -> Bigram {
    let mut model = quantized(3, &Rtn::new().with_group_size(32));
    attach(&mut model, &Lora::new(4).with_dropout(0.3)).unwrap();
    model
}

fn mean_loss(model: &Bigram, batches: &[Batch]) -> f64 {
    let n_targets: usize = batches.iter().map(Batch::n_targets).sum();
    let sum = |batch| f64::from(token_nll(model, batch).sum().into_scalar::<f32>());
    batches.iter().map(sum).sum::<f64>() / n_targets as f64
}

/// The loss is that of the model that the callback sees, and the training is not changed by it.
#[test]
fn an_evaluation_changes_nothing_and_weighs_each_target_the_same() {
    let train: Vec<Batch> = (0..5).map(|at| batch(at, [2, 9])).collect();
    let held_out = vec![batch(50, [3, 9]), batch(51, [1, 5])];
    let config = FitConfig::new().with_learning_rate(0.02).with_steps(7);
    let mut plain = with_dropout();
    let undisturbed = fit(&mut plain, &train, &config, |_, _| {}).unwrap();
    let evaluation = Evaluation::new(held_out.clone()).with_every(3);
    let config = config.with_evaluation(evaluation);
    let mut evaluated = Vec::new();
    let mut model = with_dropout();
    let report = fit(&mut model, &train, &config, |step, training| {
        if let Some(loss) = step.held_out_loss {
            let expected = mean_loss(&training.model(), &held_out);
            assert!((loss / expected - 1.0).abs() < 1e-6, "{loss} {expected}");
            evaluated.push(step.index);
        }
    })
    .unwrap();
    // After the last step, too.
    assert_eq!(evaluated, [3, 6, 7]);
    assert_eq!(parameters(&model), parameters(&plain));
    assert!(report.warnings.is_empty());
    for (with, without) in report.steps.iter().zip(&undisturbed.steps) {
        assert_eq!(with.loss, without.loss);
    }
    let best = report.best.unwrap();
    let losses = report.steps.iter().filter_map(|step| step.held_out_loss);
    assert_eq!(losses.fold(f64::INFINITY, f64::min), best.loss);
    assert_eq!(report.steps[best.step - 1].held_out_loss, Some(best.loss));
}

/// At a rate that ruins the model the training ends early, and the best parameters come back if asked for.
#[test]
fn patience_ends_a_training_and_the_best_comes_back() {
    let train: Vec<Batch> = (0..5).map(|at| batch(at, [2, 9])).collect();
    let held_out = vec![batch(50, [3, 9])];
    for (patience, restore_best) in [(1, true), (3, true), (2, false)] {
        let evaluation = Evaluation::new(held_out.clone())
            .with_every(1)
            .with_patience(patience)
            .with_restore_best(restore_best);
        let config = FitConfig::new()
            .with_learning_rate(1.0)
            .with_schedule(Schedule::Constant)
            .with_warmup_steps(30)
            .with_steps(40)
            .with_evaluation(evaluation);
        let (mut seen, mut model) = (Vec::new(), with_dropout());
        let report = fit(&mut model, &train, &config, |_, training| {
            seen.push(parameters(&training.model()));
        })
        .unwrap();
        assert_eq!(report.end, FitEnd::Patience);
        let best = report.best.unwrap();
        assert_eq!(report.steps.len(), best.step + patience);
        let returned = if restore_best {
            best.step
        } else {
            report.steps.len()
        };
        assert!(parameters(&model) == seen[returned - 1]);
    }
}

#[test]
fn held_out_documents_that_are_trained_on_are_reported() {
    let train: Vec<Batch> = (0..3).map(|at| batch(at, [2, 9])).collect();
    let tokens = |batch: &Batch| {
        batch
            .tokens()
            .into_data()
            .convert::<i64>()
            .try_into_vec::<i64>()
    };
    // The second sequence of a batch, in another order and with padding.
    let shared = tokens(&train[1]).unwrap()[9..].to_vec();
    let other = tokens(&batch(70, [1, 11])).unwrap();
    let mut rows = vec![0; 2];
    rows.extend(&shared);
    rows.extend(&other);
    let rows = TensorData::new(rows, [2, 11]);
    let is_text: Vec<bool> = (0..22).map(|at| at >= 2).collect();
    let rows = Batch::new(Tensor::from_data(rows, &Device::flex())).unwrap();
    let held_out = vec![rows.with_padding(&is_text).unwrap()];
    // `A` of LoRA moves from the second step on.
    let config = FitConfig::new().with_steps(2);
    let config = config.with_evaluation(Evaluation::new(held_out));
    let report = fit(&mut with_dropout(), &train, &config, |_, _| {}).unwrap();
    let expected = FitWarning::SharedDocuments {
        n_shared: 1,
        n_held_out: 2,
    };
    assert_eq!(report.warnings, [expected]);
    assert!(
        report.warnings[0]
            .to_string()
            .starts_with("1 of 2 held-out documents")
    );
}

#[test]
fn parameters_without_a_gradient_are_reported() {
    let mut model = dense(3);
    // Nothing that `up` does is in the output.
    model.down = Linear::new(
        Weight::frozen(Tensor::zeros([WIDTH, HIDDEN], &Device::flex())),
        None,
    );
    attach(&mut model, &Lora::new(2).with_targets(["up"])).unwrap();
    let config = FitConfig::new().with_steps(3);
    let report = fit(&mut model, &[batch(1, [2, 9])], &config, |_, _| {}).unwrap();
    let [FitWarning::NoGradient { paths }] = &report.warnings[..] else {
        panic!("{:?}", report.warnings);
    };
    assert_eq!(paths, &["up.adapter.a", "up.adapter.b"]);
    assert!(
        report.warnings[0]
            .to_string()
            .contains("`up.adapter.a` first")
    );
}

/// Steps that are not finite are skipped as often as allowed, at half the rate each time.
#[test]
fn steps_that_are_not_finite_are_skipped_and_halve_the_rate() {
    let batches = [batch(1, [2, 9])];
    let bad = [2, 5];
    let run = |allowed| {
        let mut model = with_dropout();
        let at = Cell::new(0);
        let loss = |model: &Bigram, x, _: usize| {
            at.set(at.get() + 1);
            let loss = nll_of_output(model, x, &batches[0]).sum();
            if bad.contains(&at.get()) {
                loss * f32::INFINITY
            } else {
                loss
            }
        };
        let config = FitConfig::new()
            .with_learning_rate(0.01)
            .with_schedule(Schedule::Constant)
            .with_steps(7)
            .with_skip_non_finite(allowed);
        let mut seen = vec![parameters(&model)];
        let result = fit_with(&mut model, &batches, &config, loss, |_, training| {
            seen.push(parameters(&training.model()));
        });
        (result, seen)
    };
    let (report, seen) = run(2);
    let steps = report.unwrap().steps;
    for step in &steps {
        assert_eq!(step.is_skipped, bad.contains(&step.index));
        assert_eq!(step.loss.is_finite(), !step.is_skipped);
        assert_eq!(seen[step.index] == seen[step.index - 1], step.is_skipped);
    }
    let rates = steps.iter().map(|step| step.learning_rate);
    let expected = [0.01, 0.01, 0.005, 0.005, 0.005, 0.0025, 0.0025];
    assert_eq!(rates.collect::<Vec<_>>(), expected);
    for (allowed, at) in [(0, 2), (1, 5)] {
        let (error, seen) = run(allowed);
        assert!(matches!(error, Err(Error::NonFinite { step, .. }) if step == at));
        assert_eq!(seen.len(), at);
    }
}

/// A loss on held-out text that is not finite is an error, as that of a step is.
#[test]
fn a_held_out_loss_that_is_not_finite_is_refused() {
    let train = [batch(1, [2, 9])];
    let held_out = [batch(2, [2, 9])];
    let loss = |model: &Bigram, x, at: usize| {
        let batch = [&train[0], &held_out[0]][at];
        nll_of_output(model, x, batch).sum() * if at == 1 { f32::NAN } else { 1.0 }
    };
    let evaluation = Evaluation::new(held_out.to_vec()).with_every(2);
    let config = FitConfig::new().with_steps(4).with_evaluation(evaluation);
    let error = fit_with(&mut with_dropout(), &train, &config, loss, |_, _| {}).unwrap_err();
    let said = error.to_string();
    assert!(
        said.starts_with("the loss on the held-out batches is not finite at step 2"),
        "{said}"
    );
}
