//! LQ-LoRA and PiSSA, the Fisher information, and bits under a budget.

use burn::tensor::{Device, Tensor};
use loftq::{Layer, LayerMethod, LqLora, Pissa, init, sensitivities};
use models::Model;
use peft::{Batch, CausalLm, Fisher, FisherRoots, FitConfig, Linears, PerLayer, Weight, token_nll};
use quant_core::{NormalFloat, Quantizer, Rtn, allocate, full_svd, sum_of_squares};

use crate::layers::{EXACT, floats, layer, random, square_error};
use crate::llama::{batches, model, rtn};

#[test]
fn pissa_holds_the_largest_singular_values() {
    let weight = random([60, 44], 6);
    let [_, s, _] = full_svd(&floats(weight.clone()), 60, 44).unwrap();
    let pissa = Pissa::new(7).with_truncation(EXACT);
    let start = pissa.start_dense(&layer(&weight)).unwrap();
    // The sum is exact, and the rest has the smallest singular values.
    assert!(square_error(&weight, start.sum()) < 1e-11 * sum_of_squares(weight.clone()));
    let rest: f64 = s[7..].iter().map(|&s| f64::from(s).powi(2)).sum();
    let found = sum_of_squares(start.weight.to_dense());
    assert!((found - rest).abs() < 1e-5 * rest, "{found} of {rest}");

    // QPiSSA quantizes that.
    let quantizer = Rtn::new().with_group_size(20);
    let packed = pissa.start(&layer(&weight), &quantizer).unwrap();
    let expected = quantizer
        .quantize(start.weight.to_dense(), None)
        .unwrap()
        .weight;
    let Weight::Quant(found) = &packed.weight else {
        panic!("packed");
    };
    let same = (found.codes().into_iter().zip(expected.codes())).filter(|(a, b)| a == b);
    assert!(same.count() * 1000 > 999 * 60 * 44);
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
    peft::freeze_base(&mut base);
    peft::detach(&mut base).unwrap();
    let difference = (logits(&base) - logits(&dense)).abs().max();
    assert!(difference.into_scalar::<f32>() > 1e-2, "the base lost them");
    // It trains on from there.
    let loss = |model: &Model| f64::from(token_nll(model, batch).mean().into_scalar::<f32>());
    let before = loss(&model);
    let config = FitConfig::new().with_steps(5);
    peft::fit(&mut model, &batches(1), &config, |_, _| {}).unwrap();
    assert!(loss(&model) < before);
}

#[test]
fn lq_lora_stops_before_its_error_rises() {
    let weight = random([64, 48], 8);
    let quantizer = NormalFloat::new().with_bits(2).with_block_size(16);
    let errors: Vec<f64> = (1..40)
        .map(|rounds| {
            let lq = LqLora::new(6).with_max_rounds(rounds);
            let start = lq.start(&layer(&weight), &quantizer).unwrap();
            assert!(start.round <= rounds);
            let measured = square_error(&weight, start.sum());
            assert!((measured - start.error).abs() < 1e-5 * measured);
            start.error
        })
        .collect();
    assert!(errors.is_sorted_by(|a, b| a >= b), "{errors:?}");
    // It ends long before it must.
    assert_eq!(errors[37], errors[38]);
    // Its first round is QPiSSA.
    let pissa = Pissa::new(6).start(&layer(&weight), &quantizer).unwrap();
    assert_eq!(pissa.error, errors[0]);
}

#[test]
fn the_fisher_information_says_what_matters() {
    let weight = random([64, 48], 8);
    let device = weight.device();
    let quantizer = Rtn::new().with_bits(2).with_group_size(16);
    let roots = |f: fn(usize) -> f32, n| {
        let values: Vec<f32> = (0..n).map(f).collect();
        Tensor::<1>::from_floats(&values[..], &device)
    };
    let fisher = FisherRoots {
        of_inputs: roots(|i| if i < 8 { 10.0 } else { 0.1 }, 64),
        of_outputs: roots(|o| 1.0 + o as f32 / 10.0, 48),
    };
    let weighed = |found: Tensor<2>| {
        let error = (weight.clone() - found)
            * fisher.of_inputs.clone().unsqueeze_dim::<2>(1)
            * fisher.of_outputs.clone().unsqueeze_dim::<2>(0);
        sum_of_squares(error)
    };
    let lq = LqLora::new(6).with_max_rounds(1).with_truncation(EXACT);
    let blind = lq.start(&layer(&weight), &quantizer).unwrap();
    let seeing = Layer {
        fisher: Some(&fisher),
        ..layer(&weight)
    };
    let seeing = lq
        .clone()
        .with_fisher(true)
        .start(&seeing, &quantizer)
        .unwrap();
    let (with, without) = (weighed(seeing.sum()), weighed(blind.sum()));
    assert!(with < 0.95 * without, "{with} of {without}");
    assert!((with - seeing.error).abs() < 1e-5 * with);

    // The same for all weights, it changes only the unit: F = 4.
    let alike = FisherRoots {
        of_inputs: roots(|_| 2.0, 64),
        of_outputs: roots(|_| 1.0, 48),
    };
    let layer = Layer {
        fisher: Some(&alike),
        ..layer(&weight)
    };
    let alike = lq.clone().with_fisher(true);
    let start = alike.start(&layer, &quantizer).unwrap();
    assert!((start.error - 4.0 * blind.error).abs() < 1e-4 * blind.error);
    assert!((alike.measure(&layer, start.sum()) - start.error).abs() < 1e-4 * start.error);

    // No gradient at all is no information.
    let none = FisherRoots {
        of_inputs: roots(|_| 0.0, 64),
        of_outputs: roots(|_| 0.0, 48),
    };
    let layer = Layer {
        fisher: Some(&none),
        ..self::layer(&weight)
    };
    let start = alike.start(&layer, &quantizer).unwrap();
    assert_eq!(start.error, blind.error);
}

/// The Fisher information against differences of losses.
#[test]
fn the_fisher_information_is_the_square_of_gradients() {
    let (model, calibration) = (model(), batches(1));
    let mut n_sequences = 0;
    let fisher = Fisher::sum(&model, &calibration, || n_sequences += 1).unwrap();
    assert_eq!(n_sequences, 4);
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
            f64::from(token_nll(&moved, one).sum().into_scalar::<f32>())
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
    // For each target.
    let n_targets = 4.0 * 23.0;
    let expected = (sum / n_targets / 32.0).sqrt();
    // The number of an output is relative to the mean of all weights.
    let square = |roots: &[f32]| {
        let squares = roots.iter().map(|&root| f64::from(root).powi(2));
        squares.sum::<f64>() / roots.len() as f64
    };
    assert!((square(&of_outputs) - 1.0).abs() < 1e-4);
    let of_output = (of_output / n_targets / 40.0 / square(&found)).sqrt();
    for (found, expected) in [(found[input], expected), (of_outputs[5], of_output)] {
        let found = f64::from(found);
        let near = (found - expected).abs() < 0.02 * expected;
        assert!(near, "{found} for {expected}");
    }
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
