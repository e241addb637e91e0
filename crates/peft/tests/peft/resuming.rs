//! Trainings that are stopped and resumed, and their checkpoints.

use std::fs;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use peft::{
    Batch, Bayesian, Checkpoints, Error, Evaluation, FitConfig, FitEnd, FitReport, FitWarning,
    Lora, Method, Optimizer, ParameterGroup, Peqa, Step, Tile, Vera, attach, fit,
};
use quant_core::Rtn;

use crate::model::{Bigram, adapted, batch, logits, parameters, quantized};

/// Models with fresh adapters, and what trains them: with random numbers, with several states and rates.
fn trainings() -> Vec<(&'static str, Bigram, FitConfig)> {
    let config = FitConfig::new()
        .with_learning_rate(0.02)
        .with_epochs(2)
        .with_accumulation(2)
        .with_warmup_steps(2);
    let on = |group_size: usize, method: &dyn Method| {
        let mut model = quantized(3, &Rtn::new().with_group_size(group_size));
        attach(&mut model, method).unwrap();
        model
    };
    let lora = Lora::new(2).with_dropout(0.5);
    let held_out = vec![batch(50, [2, 9]), batch(51, [1, 9])];
    let evaluation = Evaluation::new(held_out).with_every(2);
    vec![
        ("LoRA with dropout", on(32, &lora), config.clone()),
        (
            "LoRA+ with DoRA and decay",
            on(32, &lora.clone().with_dora(true).with_bias(true)),
            config
                .clone()
                .with_lora_plus_ratio(16.0)
                .with_weight_decay(0.1),
        ),
        (
            "PEQA with zeros",
            on(4, &Peqa::new().with_zeros(true)),
            config.clone().with_evaluation(evaluation.clone()),
        ),
        (
            "QA-LoRA, evaluated",
            on(32, &Tile::qa_lora(2).with_dropout(0.5)),
            (config.clone().with_checkpoint_blocks(true))
                .with_evaluation(evaluation.with_restore_best(true)),
        ),
        (
            "gates that are drawn",
            on(32, &Bayesian::new(4)),
            config.clone(),
        ),
        ("VeRA", on(32, &Vera::new(8)), config.clone()),
        (
            "states of 8 bits, and noise",
            on(32, &Lora::new(40)),
            (config.clone().with_optimizer(Optimizer::AdamW8bit)).with_neftune_alpha(5.0),
        ),
        (
            "Lion with groups",
            on(32, &lora),
            (config.with_optimizer(Optimizer::Lion))
                .with_group(ParameterGroup::new(r"\.b$").with_rate_factor(2.0)),
        ),
    ]
}

fn batches() -> Vec<Batch> {
    (0..5).map(|at| batch(at, [2, 9])).collect()
}

/// Trains to the end, or to the end of step `stop`.
fn train(
    model: &mut Bigram,
    config: &FitConfig,
    stop: impl Into<Option<usize>>,
) -> Result<FitReport, Error> {
    let stop = stop.into();
    fit(model, &batches(), config, |step, _| match stop {
        Some(stop) if step.index == stop => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
}

/// The bytes of all files of a checkpoint.
fn files(dir: &Path, step: usize) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir.join(format!("step-{step}"))).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            (name, fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// The names in a directory of checkpoints, hidden ones included.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Losses, parameters, optimizer and random numbers of a resumed training are those of an undisturbed one.
#[test]
fn a_resumed_training_is_the_undisturbed_one() {
    for (name, fresh, config) in trainings() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| Checkpoints::new(place.path().join(name)).with_resume(true);
        let mut plain = fresh.clone();
        let undisturbed = train(&mut plain, &config, None).unwrap();
        assert_eq!(undisturbed.steps.len(), 6);

        // To save changes nothing.
        let mut saved = fresh.clone();
        let whole = place.path().join("whole");
        let with = config.clone().with_checkpoints(at("whole").with_every(1));
        let report = train(&mut saved, &with, None).unwrap();
        assert_eq!(report.steps, undisturbed.steps, "{name}");
        assert_eq!(report.checkpoint, Some(whole.join("step-6")));
        assert_eq!(parameters(&saved), parameters(&plain), "{name}");

        for stop in 1..=6 {
            let dir = place.path().join(format!("stopped-{stop}"));
            let with = Checkpoints::new(&dir).with_every(100).with_resume(true);
            let config = config.clone().with_checkpoints(with);
            let mut stopped = fresh.clone();
            let report = train(&mut stopped, &config, stop).unwrap();
            assert_eq!(report.end, FitEnd::Callback);
            assert_eq!(report.checkpoint, Some(dir.join(format!("step-{stop}"))));
            assert_eq!(report.steps, undisturbed.steps[..stop]);

            let mut resumed = fresh.clone();
            let report = train(&mut resumed, &config, None).unwrap();
            assert_eq!(report.resumed_from, Some(stop), "{name}");
            assert_eq!(report.end, FitEnd::LastStep);
            assert_eq!(report.steps, undisturbed.steps, "{name}, stopped at {stop}");
            assert_eq!(report.best, undisturbed.best);
            assert_eq!(report.warnings, undisturbed.warnings);
            assert_eq!(
                parameters(&resumed),
                parameters(&plain),
                "{name}, stopped at {stop}"
            );
            assert_eq!(logits(&resumed), logits(&plain));
            assert!(
                files(&dir, 6) == files(&whole, 6),
                "{name}, stopped at {stop}"
            );
        }
    }
}

/// A training that dies in any step goes on after the last checkpoint before it.
#[test]
fn a_killed_training_goes_on_after_its_newest_checkpoint() {
    let (_, fresh, config) = trainings().swap_remove(0);
    let mut plain = fresh.clone();
    let undisturbed = train(&mut plain, &config, None).unwrap();
    for death in 1..=6 {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path()).with_every(2).with_resume(true);
        let config = config.clone().with_checkpoints(checkpoints);
        let mut killed = fresh.clone();
        let died = catch_unwind(AssertUnwindSafe(|| {
            fit(&mut killed, &batches(), &config, |step, _| {
                if step.index == death {
                    resume_unwind(Box::new(()));
                }
            })
        }));
        assert!(died.is_err());
        let report = train(&mut killed, &config, None).unwrap();
        let newest = (death - 1) / 2 * 2;
        assert_eq!(report.resumed_from, (newest > 0).then_some(newest));
        assert_eq!(report.steps, undisturbed.steps);
        assert_eq!(parameters(&killed), parameters(&plain));
    }
}

/// A training that is over is not trained again.
#[test]
fn a_completed_training_is_restored() {
    let (_, fresh, config) = trainings().swap_remove(3);
    let dir = tempfile::tempdir().unwrap();
    let config = config.with_checkpoints(Checkpoints::new(dir.path()).with_resume(true));
    let mut first = fresh.clone();
    let report = train(&mut first, &config, None).unwrap();
    let mut again = fresh.clone();
    let mut called = false;
    let restored = fit(&mut again, &batches(), &config, |_, _| called = true).unwrap();
    assert!(!called);
    let mut expected = report;
    expected.resumed_from = Some(6);
    assert_eq!(restored, expected);
    assert_eq!(parameters(&again), parameters(&first));
}

/// What is not whole is skipped, and said; nothing else is.
#[test]
fn a_damaged_checkpoint_is_skipped_for_the_one_before() {
    let (_, fresh, config) = trainings().swap_remove(0);
    let mut plain = fresh.clone();
    let undisturbed = train(&mut plain, &config, None).unwrap();
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("state.safetensors", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("state.safetensors", |path| {
            let mut bytes = fs::read(path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("steps.jsonl", |path| fs::remove_file(path).unwrap()),
        ("SHA256SUMS", |path| fs::remove_file(path).unwrap()),
    ];
    for (file, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path()).with_every(2).with_keep(3);
        let config = config
            .clone()
            .with_checkpoints(checkpoints.with_resume(true));
        train(&mut fresh.clone(), &config, 5).unwrap();
        assert_eq!(names(dir.path()), ["step-2", "step-4", "step-5"]);
        damage(&dir.path().join("step-5").join(file));

        let mut resumed = fresh.clone();
        let report = train(&mut resumed, &config, None).unwrap();
        assert_eq!(report.resumed_from, Some(4));
        let [FitWarning::Damaged { path, problem }] = &report.warnings[..] else {
            panic!("{:?}", report.warnings);
        };
        assert_eq!(path, &dir.path().join("step-5"));
        assert!(problem.contains(file), "{problem}");
        assert_eq!(report.steps, undisturbed.steps);
        assert_eq!(parameters(&resumed), parameters(&plain));
        // The damaged one is no longer needed.
        assert_eq!(names(dir.path()), ["step-2", "step-4", "step-6"]);

        for step in [2, 4, 6] {
            damage(&dir.path().join(format!("step-{step}")).join(file));
        }
        let error = train(&mut fresh.clone(), &config, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("step-6"), "{error}");
    }
}

/// The last ones are kept, and that of the best evaluation.
#[test]
fn old_checkpoints_are_removed_and_the_best_is_not() {
    let (_, fresh, config) = trainings().swap_remove(0);
    for keep in 1..4 {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path()).with_every(1).with_keep(keep);
        let config = config.clone().with_checkpoints(checkpoints);
        train(&mut fresh.clone(), &config, None).unwrap();
        let last: Vec<String> = (7 - keep..7).map(|step| format!("step-{step}")).collect();
        assert_eq!(names(dir.path()), last);
    }
    // A rate at which the loss rises after the second step.
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path()).with_every(1).with_keep(1);
    let evaluation = Evaluation::new(batches()).with_every(1);
    let config = config
        .with_learning_rate(10.0)
        .with_checkpoints(checkpoints)
        .with_evaluation(evaluation);
    let report = train(&mut fresh.clone(), &config, None).unwrap();
    let best = report.best.unwrap();
    let losses = report.steps.iter().map(|step| step.held_out_loss.unwrap());
    assert_eq!(losses.fold(f64::INFINITY, f64::min), best.loss);
    assert!(best.step < 6, "{best:?}");
    assert_eq!(
        names(dir.path()),
        [format!("step-{}", best.step), "step-6".into()]
    );
}

/// A callback asks for a checkpoint of the step that it is called for.
#[test]
fn a_callback_asks_for_a_checkpoint() {
    let (_, mut model, config) = trainings().swap_remove(0);
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path()).with_every(100).with_keep(9);
    let config = config.with_checkpoints(checkpoints);
    fit(&mut model, &batches(), &config, |step, training| {
        assert_eq!(training.steps().last(), Some(step));
        assert_eq!(training.steps().len(), step.index);
        if step.index == 3 {
            training.request_checkpoint();
        }
    })
    .unwrap();
    assert_eq!(names(dir.path()), ["step-3", "step-6"]);
}

/// Another model, other data or other settings are refused, with what differs as it was and is.
#[test]
fn another_training_is_not_resumed() {
    let (_, fresh, config) = trainings().swap_remove(0);
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path()).with_resume(true);
    let held_out = vec![batch(50, [2, 9])];
    let evaluation = Evaluation::new(held_out.clone()).with_every(3);
    let config = config
        .with_checkpoints(checkpoints.clone())
        .with_evaluation(evaluation.clone());
    train(&mut fresh.clone(), &config, 2).unwrap();
    let before = files(dir.path(), 2);

    let of_settings = [
        (
            config.clone().with_learning_rate(0.01),
            "the setting `learning_rate` was 0.02, is 0.01",
        ),
        (
            config.clone().with_epochs(3),
            "the setting `steps` was 6, is 9",
        ),
        (
            config.clone().with_accumulation(3),
            "the setting `accumulation` was 2, is 3",
        ),
        (
            config.clone().with_seed(1),
            "the setting `seed` was 0, is 1",
        ),
        (
            config.clone().with_max_grad_norm(None),
            "the setting `max_grad_norm` was 1.0, is null",
        ),
        (
            config.clone().with_evaluation(None),
            "the evaluation was on, is off",
        ),
        (
            config
                .clone()
                .with_evaluation(evaluation.clone().with_patience(1)),
            "of the evaluation the setting `patience` was null, is 1",
        ),
        (
            config
                .clone()
                .with_evaluation(Evaluation::new([held_out, batches()].concat()).with_every(3)),
            "the held-out data was 1 batches",
        ),
    ];
    for (config, expected) in of_settings {
        let error = train(&mut fresh.clone(), &config, None).unwrap_err();
        let Error::OtherTraining { path, differences } = &error else {
            panic!("{error}");
        };
        assert_eq!(path, &dir.path().join("step-2"));
        assert!(differences[0].starts_with(expected), "{differences:?}");
    }
    let mut other_base = quantized(4, &Rtn::new().with_group_size(32));
    attach(&mut other_base, &Lora::new(2).with_dropout(0.5)).unwrap();
    let with = |lora: Lora| {
        let mut model = quantized(3, &Rtn::new().with_group_size(32));
        attach(&mut model, &lora.with_dropout(0.5)).unwrap();
        model
    };
    let mut more = with(Lora::new(2));
    more.embedding = more.embedding.set_require_grad(true);
    let of_models = [
        (other_base, "of the base the parameters are"),
        (
            with(Lora::new(2).with_alpha(3.0)),
            "of the adapter of layer `mlp.down` the setting `alpha` was",
        ),
        (
            with(Lora::new(3)),
            "of the adapter of layer `mlp.down` the setting",
        ),
        (
            with(Lora::new(2).with_targets(["up"])),
            "of the adapter of layer `mlp.down` the setting",
        ),
        (
            more,
            "the parameter `embedding` was not trained, is [11, 128]",
        ),
    ];
    for (mut model, expected) in of_models {
        let as_it_was = logits(&model);
        let error = train(&mut model, &config, None).unwrap_err();
        let named = matches!(&error, Error::OtherTraining { differences, .. } if differences[0].starts_with(expected));
        assert!(named, "{error}");
        assert_eq!(logits(&model), as_it_was);
    }
    let others = [
        &batches()[..4],
        &[batches(), vec![batch(9, [2, 9])]].concat()[1..],
    ];
    for data in others {
        let error = fit(&mut fresh.clone(), data, &config, |_, _| {}).unwrap_err();
        let is_named = |of: &String| of.starts_with("the data was 5 batches with the SHA-256 ");
        let named = matches!(&error, Error::OtherTraining { differences, .. } if differences.iter().any(is_named));
        assert!(named, "{error}");
    }

    // Of another version, or of another format, though its files have their sums.
    let restate = |from: &str, to: &str| {
        let step = dir.path().join("step-2");
        let text = fs::read_to_string(step.join("state.json")).unwrap();
        assert!(text.contains(from));
        fs::write(step.join("state.json"), text.replacen(from, to, 1)).unwrap();
        fs::remove_file(step.join("SHA256SUMS")).unwrap();
        tensor_files::write_sums(&step).unwrap();
        train(&mut fresh.clone(), &config, None)
            .unwrap_err()
            .to_string()
    };
    let version = env!("CARGO_PKG_VERSION");
    let said = restate(
        &format!("\"version\": \"{version}\""),
        "\"version\": \"0.0.1\"",
    );
    let expected = format!("the version of the program was 0.0.1, is {version}");
    assert!(said.contains(&expected), "{said}");
    let said = restate("\"format_version\": 1", "\"format_version\": 99");
    assert!(said.contains("format version 99"), "{said}");
    fs::remove_dir_all(dir.path().join("step-2")).unwrap();
    fs::create_dir(dir.path().join("step-2")).unwrap();
    for (name, bytes) in before {
        fs::write(dir.path().join("step-2").join(name), bytes).unwrap();
    }

    // Settings that change no result may change.
    let other = config.clone().with_checkpoint_blocks(true).with_steps(6);
    let other = other.with_checkpoints(checkpoints.with_every(3));
    assert_eq!(
        train(&mut fresh.clone(), &other, None)
            .unwrap()
            .resumed_from,
        Some(2)
    );
}

/// A directory with checkpoints is not written over, and one training at a time uses it.
#[test]
fn a_directory_has_one_training_at_a_time() {
    let (_, fresh, config) = trainings().swap_remove(0);
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("new/checkpoints");
    let checkpoints = Checkpoints::new(&dir).with_every(2);
    let config = config.with_checkpoints(checkpoints.clone());
    let resuming = config
        .clone()
        .with_checkpoints(checkpoints.with_resume(true));
    let mut refused = 0;
    fit(&mut fresh.clone(), &batches(), &config, |_, _| {
        let error = train(&mut fresh.clone(), &resuming, None).unwrap_err();
        let busy =
            matches!(&error, Error::File(tensor_files::Error::OutputBusy { path }) if *path == dir);
        assert!(busy, "{error}");
        refused += 1;
    })
    .unwrap();
    assert_eq!(refused, 6);
    let error = train(&mut fresh.clone(), &config, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("has checkpoints of a training; resume it"),
        "{error}"
    );
    assert_eq!(
        train(&mut fresh.clone(), &resuming, None)
            .unwrap()
            .resumed_from,
        Some(6)
    );

    // A training that does not begin leaves no directory.
    let none = place.path().join("none");
    let mut frozen = quantized(3, &Rtn::new().with_group_size(32));
    let config = FitConfig::new().with_checkpoints(Checkpoints::new(none.join("checkpoints")));
    train(&mut frozen, &config, None).unwrap_err();
    assert!(!none.exists());
}

/// A disk that fails takes neither what was saved before nor what was learned.
#[test]
fn a_checkpoint_that_cannot_be_written_loses_nothing() {
    let (_, fresh, config) = trainings().swap_remove(0);
    let mut plain = fresh.clone();
    let undisturbed = train(&mut plain, &config, None).unwrap();
    let mut after_4 = fresh.clone();
    train(&mut after_4, &config, 4).unwrap();

    let place = tempfile::tempdir().unwrap();
    let [dir, moved] = ["checkpoints", "moved"].map(|name| place.path().join(name));
    let checkpoints = Checkpoints::new(&dir).with_every(2).with_resume(true);
    let config = config.with_checkpoints(checkpoints);
    let mut model = fresh.clone();
    let error = fit(&mut model, &batches(), &config, |step, _| {
        if step.index == 3 {
            fs::rename(&dir, &moved).unwrap();
            fs::write(&dir, "no directory").unwrap();
        }
    })
    .unwrap_err();
    assert!(matches!(&error, Error::File(_)), "{error}");
    assert!(error.to_string().contains(dir.to_str().unwrap()), "{error}");
    assert_eq!(parameters(&model), parameters(&after_4));

    fs::remove_file(&dir).unwrap();
    fs::rename(&moved, &dir).unwrap();
    let mut resumed = fresh.clone();
    let report = train(&mut resumed, &config, None).unwrap();
    assert_eq!(report.resumed_from, Some(2));
    assert_eq!(report.steps, undisturbed.steps);
    assert_eq!(parameters(&resumed), parameters(&plain));
}

/// A training that diverges says from where it can go on, which is finite.
#[test]
fn divergence_names_the_last_good_checkpoint() {
    let mut model = adapted(8);
    let before = logits(&model);
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path()).with_every(1).with_resume(true);
    let config = FitConfig::new()
        .with_learning_rate(1e20)
        .with_steps(50)
        .with_warmup_steps(50)
        .with_checkpoints(checkpoints);
    let error = fit(&mut model, &batches(), &config, |_, _| {}).unwrap_err();
    let Error::NonFinite {
        step, checkpoint, ..
    } = &error
    else {
        panic!("{error}");
    };
    let newest = checkpoint.as_ref().unwrap();
    assert!(newest.ends_with(format!("step-{}", step - 1)), "{error}");
    let said = format!("and go on from `{}`", newest.display());
    assert!(error.to_string().ends_with(&said), "{error}");
    assert_eq!(logits(&model), before);
    // It goes on from there to the same error.
    let again = fit(&mut model, &batches(), &config, |_, _| {}).unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
}

/// A file in JSON has every step with all its digits.
#[test]
fn steps_are_read_back_as_they_were() {
    let step = Step {
        index: 1,
        n_steps: 2,
        loss: f64::INFINITY,
        grad_norm: 0.1 + 0.2,
        learning_rate: 1e-300,
        n_targets: 3,
        held_out_loss: None,
        is_skipped: true,
    };
    let text = serde_json::to_string(&step).unwrap();
    assert_eq!(serde_json::from_str::<Step>(&text).unwrap(), step);
    let step = Step {
        loss: 0.3,
        held_out_loss: Some(1.0 / 3.0),
        is_skipped: false,
        ..step
    };
    let text = serde_json::to_string(&step).unwrap();
    assert!(!text.contains("skipped"), "{text}");
    assert_eq!(serde_json::from_str::<Step>(&text).unwrap(), step);
}
