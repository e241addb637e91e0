//! Bits of layers under a budget of bytes.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;
use models::{Allocation, AllocationStep, Error, Model, quantize, quantize_within, sensitivities};
use peft::{Batch, CausalLm, Fingerprint, Fisher, Linears, PerLayer, Weight, token_nll};
use quant_core::{AllocationError, Gram, Optq, Quantizer, Rtn, allocate};

use super::quantize::{batches, model, opt_model};

const BITS: [usize; 4] = [2, 3, 4, 8];

fn widths() -> [Optq; 4] {
    BITS.map(|bits| Optq::new().with_bits(bits).with_group_size(8))
}

fn refs(widths: &[Optq]) -> Vec<&dyn Quantizer> {
    widths.iter().map(|optq| optq as _).collect()
}

fn loss(model: &Model, batches: &[Batch]) -> f64 {
    let sums = batches.iter().map(|batch| {
        let nll: Vec<f32> = token_nll(model, batch).into_data().try_into_vec().unwrap();
        nll.into_iter().map(f64::from).sum::<f64>()
    });
    let n_targets: usize = batches.iter().map(Batch::n_targets).sum();
    sums.sum::<f64>() / n_targets as f64
}

/// The bytes of all layers in a format.
fn n_bytes(model: &Model, quantizer: &dyn Quantizer) -> u64 {
    let format = quantizer.format().unwrap();
    let linears = model.linears().into_iter();
    linears
        .map(|(_, linear)| format.n_bytes(linear.weight().dims()).unwrap())
        .sum()
}

fn quantized_within(model: &mut Model, batches: &[Batch], budget: u64) -> Allocation {
    quantize_within(model, &refs(&widths()), batches, budget, |_| {}).unwrap()
}

#[test]
fn a_model_is_quantized_within_its_budget() {
    for dense in [model(), opt_model(true), opt_model(false)] {
        let batches = batches(6);
        let n_layers = dense.linears().len();
        let (three, four) = (n_bytes(&dense, &widths()[1]), n_bytes(&dense, &widths()[2]));
        for budget in [three, (three + four) / 2, u64::MAX] {
            let mut packed = dense.clone();
            let [mut gradients, mut predicted, mut quantized] = [0, 0, 0];
            let count = |step: AllocationStep| match step {
                AllocationStep::Gradient => gradients += 1,
                AllocationStep::Predicted { .. } => predicted += 1,
                AllocationStep::Quantized(_) => quantized += 1,
                _ => panic!("{step:?}"),
            };
            let quantizers = widths();
            let found =
                quantize_within(&mut packed, &refs(&quantizers), &batches, budget, count).unwrap();
            let uniform = found.uniform.as_ref().unwrap();
            let runs = if uniform.choice == found.allocated.choice {
                1
            } else {
                2
            };
            assert_eq!(
                [gradients, predicted, quantized],
                [24, n_layers, runs * n_layers]
            );

            // What was chosen fits, and the best single width that fits is beside it.
            let best = found.best();
            assert!(best.n_bytes <= budget && found.allocated.n_bytes <= budget);
            let widest = if budget == u64::MAX { 3 } else { 1 };
            assert_eq!(uniform.choice, vec![widest; n_layers]);
            assert!(found.allocated.predicted <= uniform.predicted);
            assert!(best.measured <= uniform.measured);
            assert!(found.dense < found.allocated.predicted);

            // The model is that of the recipe, and its loss the one that was measured.
            let bytes: usize = found.layers.iter().map(|layer| layer.n_bytes).sum();
            assert_eq!(bytes as u64, best.n_bytes);
            let mut recipe = PerLayer::default();
            for ((path, _), &at) in dense.linears().into_iter().zip(&best.choice) {
                recipe.0.insert(path, Box::new(quantizers[at]));
            }
            let mut again = dense.clone();
            let layers = quantize(&mut again, &recipe, &batches, |_| {}).unwrap();
            assert_eq!(Fingerprint::of(&again), Fingerprint::of(&packed));
            for (layer, found) in layers.iter().zip(&found.layers) {
                assert_eq!((&layer.path, layer.format), (&found.path, found.format));
            }
            assert!((loss(&again, &batches) - best.measured).abs() < 1e-9);
            assert!((loss(&dense, &batches) - found.dense).abs() < 1e-9);
        }
    }
}

/// The prediction is `½ Σ_j b_j mean_t e_tj²`, summed in f64.
#[test]
fn rises_of_the_loss_are_weighted_errors_of_outputs() {
    let (model, batches) = (model(), batches(2));
    let rtn = [Rtn::new().with_bits(3), Rtn::new().with_bits(4)];
    let quantizers: Vec<&dyn Quantizer> = rtn.iter().map(|rtn| rtn as _).collect();
    let table = sensitivities(&model, &quantizers, &batches, |_| {}).unwrap();
    let fisher = Fisher::sum(&model, &batches, || ()).unwrap();
    // The first stage reads the norm of the embedding, which no quantizer changes.
    let mut gram = Gram::new(32, &batches[0].tokens().device());
    let mut energy = 0.0;
    for batch in &batches {
        let input = peft::Stages::input(&model, 0, &peft::State::start(&model, batch));
        let squares: Vec<f32> = input.clone().square().into_data().try_into_vec().unwrap();
        energy += squares.into_iter().map(f64::from).sum::<f64>();
        gram.update(input);
    }
    for (path, linear) in &model.linears()[..3] {
        let roots = fisher.of(path).unwrap();
        let [inputs, outputs] = [&roots.of_inputs, &roots.of_outputs].map(|roots| {
            let roots: Vec<f32> = roots.clone().into_data().try_into_vec().unwrap();
            roots.into_iter().map(f64::from).collect::<Vec<f64>>()
        });
        // Σ_i F_ij, from the mean over outputs of each input and the share of each output.
        let total: f64 = inputs.iter().map(|root| root * root).sum();
        let costs = &table.iter().find(|(of, _)| of == path).unwrap().1;
        for (rtn, cost) in rtn.iter().zip(costs) {
            let weight = linear.weight().to_dense();
            let found = rtn.quantize(weight.clone(), None).unwrap().weight;
            let error = found.dequantize() - weight;
            let mut expected = 0.0;
            for (j, share) in outputs.iter().enumerate() {
                let column = error.clone().narrow(1, j, 1);
                expected += 0.5 * total * share * share / energy * gram.energy(column);
            }
            let off = (cost.error - expected).abs();
            assert!(
                off < 1e-4 * expected,
                "{path}: {} for {expected}",
                cost.error
            );
        }
    }
}

/// The divergence of the outputs from those of the dense model, in nats per target.
fn divergence(dense: &Model, other: &Model, batches: &[Batch]) -> f64 {
    let (mut sum, mut n) = (0.0, 0);
    for batch in batches {
        let logs = |model: &Model| -> Tensor<3> {
            let logits = model.forward(batch.tokens());
            let seq = logits.dims()[1];
            log_softmax(logits, 2).narrow(1, 0, seq - 1)
        };
        let (dense, other) = (logs(dense), logs(other));
        let terms = dense.clone().exp() * (dense - other);
        sum += f64::from(terms.sum().into_scalar::<f32>());
        n += batch.n_targets();
    }
    sum / n as f64
}

/// The prediction of a layer is near the divergence that its rounding alone makes.
#[test]
fn rises_of_the_loss_are_near_divergences() {
    let (model, batches) = (model(), batches(8));
    let rtn = Rtn::new().with_bits(4).with_group_size(8);
    let table = sensitivities(&model, &[&rtn], &batches, |_| {}).unwrap();
    let [mut predicted, mut measured] = [0.0, 0.0];
    for (path, costs) in &table {
        let mut recipe = PerLayer::default();
        recipe.0.insert(path.clone(), Box::new(rtn));
        let mut packed = model.clone();
        quantize(&mut packed, &recipe, &[], |_| {}).unwrap();
        let divergence = divergence(&model, &packed, &batches);
        predicted += costs[0].error;
        measured += divergence;
    }
    let ratio = predicted / measured;
    assert!((0.8..1.25).contains(&ratio), "{ratio}");
}

#[test]
fn budgets_and_models_that_do_not_fit_are_refused_before_the_work() {
    let (dense, batches) = (model(), batches(1));
    let mut model = dense.clone();
    let widths = widths();
    let least = n_bytes(&dense, &widths[0]);
    let none = |_: AllocationStep| panic!("no work");
    let error = quantize_within(&mut model, &refs(&widths), &batches, least - 1, none).unwrap_err();
    let needed = least;
    let too_small = AllocationError::BudgetTooSmall {
        needed,
        budget: least - 1,
    };
    assert!(matches!(error, Error::Allocation(error) if error == too_small));
    let error = quantize_within(&mut model, &refs(&widths), &[], least, none).unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::NoCalibration)),
        "{error}"
    );
    let error = quantize_within(&mut model, &[], &batches, least, none).unwrap_err();
    assert!(matches!(error, Error::Allocation(_)), "{error}");
    let wide = Rtn::new().with_group_size(64);
    let error = quantize_within(&mut model, &[&wide], &batches, u64::MAX, none).unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::Quant { .. })),
        "{error}"
    );
    assert_eq!(Fingerprint::of(&model), Fingerprint::of(&dense));

    let found = quantized_within(&mut model, &batches, least);
    assert_eq!(found.best().choice, vec![0; 14]);
    assert!(found.is_uniform());
    assert!(
        model
            .linears()
            .iter()
            .all(|(_, linear)| matches!(linear.weight(), Weight::Quant(_)))
    );
    let error = quantize_within(&mut model, &refs(&widths), &batches, least, none).unwrap_err();
    let packed = matches!(error, Error::Peft(peft::Error::AlreadyQuantized { .. }));
    assert!(packed, "{error}");
}

/// The table goes to the solver as it is.
#[test]
fn rises_of_the_loss_are_allocated() {
    let (model, batches) = (model(), batches(8));
    let widths = widths();
    let table = sensitivities(&model, &refs(&widths), &batches, |_| {}).unwrap();
    let (_, layers): (Vec<String>, Vec<_>) = table.into_iter().unzip();
    for costs in &layers {
        assert!(costs.is_sorted_by(|a, b| a.n_bytes < b.n_bytes && a.error >= b.error));
    }
    let uniform = n_bytes(&model, &widths[1]);
    let allocation = allocate(&layers, uniform).unwrap();
    assert!(allocation.is_optimal() && allocation.n_bytes <= uniform);
    let same = allocation.uniform.unwrap();
    assert_eq!((same.candidate, same.n_bytes), (1, uniform));
    assert!(allocation.error < same.error);
}
