//! Optimizers, groups of parameters, and noise.

use burn::tensor::DType;
use peft::{
    Adapter, Batch, Checkpoints, Error, Evaluation, FitConfig, FitReport, Lora, Optimizer,
    ParameterGroup, Peqa, Schedule, attach, fit,
};
use quant_core::Rtn;
use tensor_files::TensorFile;

use crate::model::{Bigram, batch, dense, logits, parameters, quantized, tune};

fn with_lora(rank: usize) -> Bigram {
    let mut model = quantized(3, &Rtn::new().with_group_size(32));
    attach(&mut model, &Lora::new(rank)).unwrap();
    model
}

fn losses(report: &FitReport) -> Vec<f64> {
    report.steps.iter().map(|step| step.loss).collect()
}

/// States of 8 bits take a quarter of the bytes, and the losses stay within one percent.
#[test]
fn states_of_8_bits_train_as_those_of_32_do() {
    let batches: Vec<Batch> = (0..4).map(|at| batch(at, [4, 9])).collect();
    let run = |optimizer, rank| {
        let dir = tempfile::tempdir().unwrap();
        let config = FitConfig::new()
            .with_optimizer(optimizer)
            .with_learning_rate(5e-3)
            .with_epochs(20)
            .with_checkpoints(Checkpoints::new(dir.path()));
        let mut model = with_lora(rank);
        let report = fit(&mut model, &batches, &config, |_, _| {}).unwrap();
        let path = report.checkpoint.clone().unwrap().join("state.safetensors");
        let file = TensorFile::open(&path).unwrap();
        let names = file
            .names()
            .into_iter()
            .filter(|name| name.starts_with("moment_"));
        let bytes: u64 = names.map(|name| file.n_bytes_of(&name).unwrap()).sum();
        (losses(&report), bytes, logits(&model))
    };
    let (full, full_bytes, _) = run(Optimizer::AdamW, 32);
    let (coded, coded_bytes, _) = run(Optimizer::AdamW8bit, 32);
    // Two moments of the factors of two layers, 128 and 256 wide.
    let n = 2 * 2 * 32 * (128 + 256);
    assert_eq!(full_bytes, 4 * n);
    assert_eq!(coded_bytes, n + 4 * n / 256);
    assert_ne!(full, coded);
    let of_epoch = |losses: &[f64]| losses.iter().sum::<f64>();
    assert!(
        of_epoch(&full[76..]) < 0.85 * of_epoch(&full[..4]),
        "{full:?}"
    );
    for (at, (full, coded)) in full.iter().zip(&coded).enumerate() {
        assert!(
            (coded / full - 1.0).abs() < 0.01,
            "step {at}: {coded} {full}"
        );
    }
    // Small tensors have their states in f32.
    let (full, coded) = (run(Optimizer::AdamW, 8), run(Optimizer::AdamW8bit, 8));
    assert!(full == coded);
}

/// Each element moves by the learning rate, and by the decay.
#[test]
fn lion_moves_by_signs() {
    let batches = [batch(1, [2, 9])];
    let mut model = with_lora(2);
    tune(&mut model, 1);
    let before = values(&model);
    let config = FitConfig::new()
        .with_optimizer(Optimizer::Lion)
        .with_learning_rate(1e-3)
        .with_schedule(Schedule::Constant)
        .with_steps(1);
    let mut plain = model.clone();
    fit(&mut plain, &batches, &config, |_, _| {}).unwrap();
    for (before, after) in before.iter().flatten().zip(values(&plain).iter().flatten()) {
        assert!(
            ((after - before).abs() / 1e-3 - 1.0).abs() < 1e-3,
            "{before} {after}"
        );
    }
    let mut decayed = model.clone();
    fit(
        &mut decayed,
        &batches,
        &config.with_weight_decay(10.0),
        |_, _| {},
    )
    .unwrap();
    let pairs = values(&plain)
        .into_iter()
        .flatten()
        .zip(values(&decayed).into_iter().flatten());
    for ((plain, decayed), before) in pairs.zip(before.iter().flatten()) {
        assert!(
            (plain - decayed - 0.01 * before).abs() < 1e-6,
            "{before} {plain} {decayed}"
        );
    }
    let mut long = with_lora(2);
    let config = FitConfig::new()
        .with_optimizer(Optimizer::Lion)
        .with_beta_2(0.99);
    let config = config.with_learning_rate(3e-3).with_steps(60);
    let losses = losses(&fit(&mut long, &batches, &config, |_, _| {}).unwrap());
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
}

/// `A` and `B` of the first layer.
fn values(model: &Bigram) -> [Vec<f32>; 2] {
    let Some(Adapter::Lora(lora)) = model.up.adapter() else {
        panic!("no LoRA");
    };
    [lora.a(), lora.b()].map(|of| of.cast(DType::F32).into_data().try_into_vec().unwrap())
}

/// A group has its own rate and decay; the first one that matches counts, and LoRA+ is a factor more.
#[test]
fn groups_have_their_own_rate_and_decay() {
    let mut model = dense(1);
    attach(&mut model, &Lora::new(2)).unwrap();
    tune(&mut model, 1);
    let before = values(&model);
    let config = FitConfig::new()
        .with_learning_rate(1e-3)
        .with_schedule(Schedule::Constant)
        .with_steps(1);
    let moved = |config: &FitConfig| {
        let mut tuned = model.clone();
        fit(&mut tuned, &[batch(1, [2, 9])], config, |_, _| {}).unwrap();
        let pairs = before.iter().zip(values(&tuned));
        let most = |(before, after): (&Vec<f32>, Vec<f32>)| {
            let moves = before
                .iter()
                .zip(after)
                .map(|(before, after)| (after - before).abs());
            moves.fold(0.0, f32::max)
        };
        pairs.map(most).collect::<Vec<f32>>()
    };
    let near = |found: &[f32], expected: [f32; 2]| {
        let off = found
            .iter()
            .zip(expected)
            .map(|(found, expected)| (found / expected - 1.0).abs());
        assert!(off.fold(0.0, f32::max) < 1e-2, "{found:?} {expected:?}");
    };
    // The first step of AdamW moves each value by its rate.
    near(&moved(&config), [1e-3, 1e-3]);
    let group = |pattern, factor| ParameterGroup::new(pattern).with_rate_factor(factor);
    let a = config.clone().with_group(group(r"up\.adapter\.a$", 4.0));
    let both = a.clone().with_group(group("adapter", 2.0));
    near(&moved(&a), [4e-3, 1e-3]);
    near(&moved(&both), [4e-3, 2e-3]);
    near(&moved(&both.with_lora_plus_ratio(3.0)), [4e-3, 6e-3]);

    // Decay in a group alone is that of the others without it.
    let decay = 300.0;
    let group = ParameterGroup::new(r"\.a$").with_weight_decay(0.0);
    let without = moved(&config);
    let of_group = moved(&config.clone().with_weight_decay(decay).with_group(group));
    assert_eq!(of_group[0], without[0]);
    assert!(of_group[1] > 10.0 * without[1]);

    let none = config.with_group(ParameterGroup::new("magnitude"));
    let error = fit(&mut model.clone(), &[batch(1, [2, 9])], &none, |_, _| {}).unwrap_err();
    let named = matches!(&error, Error::NoParameter { paths, .. } if paths[0] == "down.adapter.a");
    assert!(named, "{error}");
}

/// Noise is a part of the training alone, follows its seed, and is the same where a block runs again.
#[test]
fn noise_is_on_the_training_alone() {
    let batches: Vec<Batch> = (0..3).map(|at| batch(at, [2, 9])).collect();
    let run = |alpha, seed, checkpoint_blocks, trains_embedding: bool| {
        let mut model = quantized(3, &Rtn::new().with_group_size(32));
        attach(&mut model, &Peqa::new()).unwrap();
        model.embedding = model.embedding.set_require_grad(trains_embedding);
        let config = FitConfig::new()
            .with_steps(6)
            .with_seed(seed)
            .with_neftune_alpha(alpha)
            .with_checkpoint_blocks(checkpoint_blocks)
            .with_evaluation(Evaluation::new([batch(50, [2, 9])]).with_every(1));
        let report = fit(&mut model, &batches, &config, |_, _| {}).unwrap();
        (report.steps, parameters(&model))
    };
    for trains_embedding in [false, true] {
        let noisy = run(5.0, 1, false, trains_embedding);
        assert!(noisy == run(5.0, 1, true, trains_embedding));
        assert!(noisy.1 != run(5.0, 2, false, trains_embedding).1);
        assert!(noisy.1 != run(0.0, 1, false, trains_embedding).1);
    }
    // A rate that moves nothing: the losses of steps differ, those of evaluations do not.
    let still = |alpha| {
        let mut model = with_lora(2);
        let config = FitConfig::new()
            .with_learning_rate(1e-30)
            .with_steps(4)
            .with_neftune_alpha(alpha)
            .with_evaluation(Evaluation::new([batch(1, [2, 9])]).with_every(1));
        fit(&mut model, &[batch(1, [2, 9])], &config, |_, _| {})
            .unwrap()
            .steps
    };
    let (noisy, quiet) = (still(5.0), still(0.0));
    for (noisy, quiet) in noisy.iter().zip(&quiet) {
        assert_ne!(noisy.loss, quiet.loss);
        assert_eq!(noisy.held_out_loss, quiet.held_out_loss);
    }
}
