//! Training of whole models.

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::Device;
use models::{Error, Model, load, quantize_head, save};
use peft::{Batch, Checkpoints, Evaluation, FitConfig, Lora, Peqa};
use proptest::prelude::*;
use quant_core::{Precision, Rtn};

use super::fixtures::*;

proptest! {
    #![proptest_config(cases(24))]

    /// A step on texts of one row is a step on the same texts in rows of their own, however the tokens
    /// to be learned are chosen.
    #[test]
    fn a_packed_row_trains_as_its_texts(
        config in configs(),
        cut in 3..10usize,
        first_target in 0..3usize,
        seed in 0..100u64,
    ) {
        let mut model = Model::init(&config, seed, &Device::flex()).map(&mut Unround).no_grad();
        let lora = Lora::new(2).with_seed(seed);
        peft::attach(&mut model, &lora).unwrap();
        let is_target: Vec<bool> = (0..12)
            .map(|at| (first_target..cut).contains(&at) || at > cut + 1)
            .collect();
        let starts: Vec<usize> = (0..12).map(|at| if at < cut { 0 } else { cut }).collect();
        let packed = Batch::new(tokens(&PROBE, 1)).unwrap();
        let packed = packed.with_starts(&starts).unwrap().with_targets(&is_target).unwrap();
        let alone = |range: std::ops::Range<usize>| {
            let batch = Batch::new(tokens(&PROBE[range.clone()], 1)).unwrap();
            batch.with_targets(&is_target[range])
        };
        let unpacked: Vec<Batch> = [alone(0..cut), alone(cut..12)].into_iter().flatten().collect();
        let run = |batches: &[Batch]| {
            let mut model = model.clone();
            let fit = FitConfig::new().with_steps(Some(1)).with_accumulation(batches.len());
            let mut steps = Vec::new();
            peft::fit(&mut model, batches, &fit, |step, _| steps.push(step.clone())).unwrap();
            (steps.remove(0), logits(&model, &PROBE, 1))
        };
        let ((one, first), (many, second)) = (run(&[packed]), run(&unpacked));
        prop_assert_eq!(one.n_targets, many.n_targets);
        prop_assert!((one.loss - many.loss).abs() < 1e-5, "{} {}", one.loss, many.loss);
        prop_assert!((one.grad_norm / many.grad_norm - 1.0).abs() < 1e-3);
        // AdamW makes a whole step of any gradient, of rounding too.
        for (a, b) in first.iter().zip(&second) {
            prop_assert!((a - b).abs() < 2e-2, "{a} {b}");
        }
    }

    /// Blocks that are run again train the model to the same bits: its adapters, or all of it.
    #[test]
    fn checkpointing_changes_no_bit(config in configs(), seed in 0..100u64, packed in any::<bool>()) {
        let mut model = Model::init(&config, seed, &Device::flex());
        if packed {
            let rtn = Rtn::new().with_group_size(8);
            models::quantize(&mut model, &rtn, &[], |_| {}).unwrap();
            quantize_head(&mut model, &rtn).unwrap();
            model = model.no_grad();
            peft::attach(&mut model, &Peqa::new()).unwrap();
        }
        let batches = [Batch::new(tokens(&PROBE, 2)).unwrap()];
        let run = |checkpoint_blocks| {
            let mut model = model.clone();
            let fit = FitConfig::new()
                .with_steps(Some(3))
                .with_checkpoint_blocks(checkpoint_blocks);
            let mut steps = Vec::new();
            peft::fit(&mut model, &batches, &fit, |step, _| steps.push(step.clone())).unwrap();
            (steps, bits(logits(&model, &PROBE, 1)))
        };
        prop_assert_eq!(run(true), run(false));
    }

    /// All products with packed weights are computed in 16 bits, the head's too, and the setting is
    /// taken back without a trace.
    #[test]
    fn the_precision_of_products_is_a_setting(config in configs(), seed in 0..100u64) {
        let mut model = Model::init(&config, seed, &Device::flex()).map(&mut Unround);
        let rtn = Rtn::new().with_group_size(16);
        // Per channel: products with small groups are floats with either precision, where that is faster.
        quantize_head(&mut model, &Rtn::new()).unwrap();
        let of_head = |model: &Model| logits(model, &PROBE, 1);
        let full = of_head(&model);
        peft::set_precision(&mut model, Precision::Fast);
        let fast = of_head(&model);
        let largest = full.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        let off = full.iter().zip(&fast).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        prop_assert!(off <= 1e-3 * largest, "{off} of {largest}");
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi2") {
            prop_assert!(off > 0.0, "the head is computed as before");
        }
        models::quantize(&mut model, &rtn, &[], |_| {}).unwrap();
        peft::set_precision(&mut model, Precision::Full);
        let full = of_head(&model);
        peft::set_precision(&mut model, Precision::Fast);
        peft::set_precision(&mut model, Precision::Full);
        prop_assert_eq!(bits(of_head(&model)), bits(full));
    }
}

/// The whole path, and the number of threads has no part in it.
#[test]
fn quantize_tune_merge_save_and_reload_is_one_model_on_any_number_of_threads() {
    let run = || {
        let device = Device::flex();
        let (dir, mut lm) = pretrained(
            llama()
                .with_attention_bias(true)
                .with_attention_output_bias(true)
                .with_mlp_bias(true),
            1,
        );
        let batches = lm
            .windows(&text(), 20)
            .unwrap()
            .shuffled(3)
            .batches(4, &device);
        assert_eq!(
            batches.iter().map(|b| b.tokens().dims()[0]).sum::<usize>(),
            20
        );
        let rtn = Rtn::new().with_bits(3).with_group_size(8);
        let layers = models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        assert_eq!(layers.len(), 14);
        assert_eq!(layers[0].path, "model.layers.0.self_attn.q_proj");
        let nll = |model: &Model| -> f64 {
            let nll = batches.iter().map(|batch| peft::token_nll(model, batch));
            nll.flat_map(|nll| nll.into_data().try_into_vec::<f32>().unwrap())
                .map(f64::from)
                .sum()
        };
        let before = nll(&lm.model);
        peft::attach(&mut lm.model, &Peqa::new()).unwrap();
        let fit = FitConfig::new().with_learning_rate(0.02).with_epochs(4);
        peft::fit(&mut lm.model, &batches, &fit, |_, _| {}).unwrap();
        let tuned = nll(&lm.model);
        assert!(tuned < before, "{tuned} after {before}");
        assert!(matches!(
            save(&lm, dir.path().join("unmerged")),
            Err(Error::Peft(peft::Error::AlreadyAdapted { .. }))
        ));
        let tuned = bits(logits(&lm.model, &PROBE, 2));
        let certificate = peft::merge(&mut lm.model).unwrap();
        save(&lm, dir.path().join("out")).unwrap();
        let again = load(dir.path().join("out"), &device).unwrap();
        certificate.verify(&again.model).unwrap();
        assert_eq!(bits(logits(&again.model, &PROBE, 2)), tuned);
        tuned
    };
    let one = on(1, run);
    assert_eq!(on(2, run), one);
    assert_eq!(on(5, run), one);
}

/// Runs on so many threads.
fn on<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(run)
}

/// A training that is stopped on some threads and resumed on others is one on any number of them.
#[test]
fn a_resumed_training_is_one_on_any_number_of_threads() {
    let train = |dir: Option<&std::path::Path>, stop: usize| {
        let (_, mut lm) = pretrained(llama(), 1);
        let windows = lm.windows(&text(), 20).unwrap().shuffled(3);
        let mut batches = windows.batches(4, &Device::flex());
        let held_out = batches.split_off(4);
        let rtn = Rtn::new().with_group_size(8);
        models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        let lora = Lora::new(4).with_dropout(0.3);
        peft::attach(&mut lm.model, &lora).unwrap();
        let evaluation = Evaluation::new(held_out).with_every(2);
        let checkpoints = |dir| Checkpoints::new(dir).with_every(2).with_resume(true);
        let fit = FitConfig::new()
            .with_learning_rate(0.02)
            .with_steps(7)
            .with_evaluation(evaluation.with_restore_best(true))
            .with_checkpoints(dir.map(checkpoints));
        let report = peft::fit(&mut lm.model, &batches, &fit, |step, _| match step.index {
            index if index == stop => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        (report.unwrap().steps, bits(logits(&lm.model, &PROBE, 2)))
    };
    let undisturbed = on(1, || train(None, 0));
    assert_eq!(undisturbed.0.len(), 7);
    for [first, then] in [[2, 5], [5, 1]] {
        let dir = tempfile::tempdir().unwrap();
        on(first, || train(Some(dir.path()), 3));
        assert!(on(then, || train(Some(dir.path()), 0)) == undisturbed);
    }
}
