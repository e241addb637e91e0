//! LoftQ, and what every start of a layer is: a packed weight and two factors.

use burn::tensor::Tensor;
use loftq::{Layer, LayerMethod, Loftq};
use peft::{Adapter, Linear, Lora, Weight};
use proptest::prelude::*;
use quant_core::{NormalFloat, Rtn, sum_of_squares, symmetric_eigen};

use crate::layers::{EXACT, floats, gram, inputs, layer, quantizers, random, square_error};
use crate::property;

/// §6.1 (1) of the methods' notes: after one round the squared error is that of the quantizer without
/// its largest singular values.
#[test]
fn one_round_of_loftq_leaves_the_smallest_singular_values() {
    let weight = random([72, 56], 1);
    let gram = gram(&inputs(72, 2));
    let power = sum_of_squares(weight.clone());
    for quantizer in quantizers() {
        let layer = Layer {
            gram: Some(&gram),
            ..layer(&weight)
        };
        let plain = quantizer
            .quantize(weight.clone(), Some(&gram))
            .unwrap()
            .weight;
        let residual = floats(weight.clone() - plain.dequantize());
        let residual: Vec<f64> = residual.into_iter().map(f64::from).collect();
        let square = |at: usize| {
            (0..72)
                .map(|i| residual[i * 56 + at / 56] * residual[i * 56 + at % 56])
                .sum::<f64>()
        };
        let square: Vec<f64> = (0..56 * 56).map(square).collect();
        // From the smallest on.
        let (squares, _) = symmetric_eigen(&square, 56).unwrap();
        let mut last = square_error(&weight, plain.dequantize());
        for rank in 1..=56 {
            let loftq = Loftq::new(rank).with_rounds(1).with_truncation(EXACT);
            let start = loftq.start(&layer, &*quantizer).unwrap();
            let left: f64 = squares[..56 - rank].iter().sum();
            assert!(
                (start.error - left).abs() < 1e-5 * left + 1e-10 * power,
                "{rank}"
            );
            let measured = square_error(&weight, start.sum());
            assert!(
                (measured - left).abs() < 1e-5 * left + 1e-10 * power,
                "{rank}"
            );
            // Below QLoRA at every rank, and lower with each.
            assert!(start.error < last, "rank {rank}: {} of {last}", start.error);
            last = start.error;
        }
        // Nothing is left at full rank.
        assert!(last < 1e-9 * power);
    }
}

#[test]
fn loftq_keeps_its_best_round() {
    let weight = random([64, 64], 5);
    for quantizer in quantizers() {
        if quantizer.needs() > quant_core::Needs::Nothing {
            continue;
        }
        let mut last = f64::INFINITY;
        for rounds in 1..8 {
            let loftq = Loftq::new(8).with_rounds(rounds);
            let (start, trace) = loftq.trace(&layer(&weight), &*quantizer).unwrap();
            assert_eq!(trace.len(), rounds);
            let least = trace.iter().copied().fold(f64::INFINITY, f64::min);
            assert_eq!(start.error, least);
            assert_eq!(start.error, trace[start.round - 1]);
            let measured = square_error(&weight, start.sum());
            assert!((measured - start.error).abs() < 1e-5 * measured);
            assert!(start.error <= last, "more rounds are no worse");
            last = start.error;
        }
    }
}

/// `σ A B` is the low rank, whatever `α` is, and each factor has its share.
#[test]
fn the_model_starts_at_the_sum() {
    let weight = random([40, 48], 3);
    let x = random([5, 40], 4);
    let start = Loftq::new(6)
        .start(&layer(&weight), &NormalFloat::new().with_block_size(8))
        .unwrap();
    let expected = x.clone().matmul(start.sum());
    let scale = expected.clone().abs().max().into_scalar::<f32>();
    let [a, b] = start.factors.clone().unwrap();
    let linear = Linear::new(start.weight.clone(), None);
    let plain = Lora::new(6);
    for lora in [
        plain.clone(),
        plain.clone().with_alpha(1.5),
        plain.clone().with_alpha(96.0),
        plain.clone().with_alpha(16.0).with_rank_stabilized(true),
        plain.clone().with_alpha(3.0).with_dora(true),
    ] {
        let adapter = lora.init_at("proj", &linear, a.clone(), b.clone()).unwrap();
        let norms = |squares: Tensor<2>| floats(squares.sqrt());
        let of_a = norms(adapter.a().square().sum_dim(0));
        let of_b = norms(adapter.b().square().sum_dim(1));
        for (of_a, of_b) in of_a.iter().zip(&of_b) {
            assert!((of_a - of_b).abs() < 1e-5 * of_a, "{of_a} and {of_b}");
        }
        let mut adapted = Linear::new(Weight::frozen(weight.clone()), None);
        adapted
            .replace("proj", start.weight.clone(), Some(Adapter::Lora(adapter)))
            .unwrap();
        let found = adapted.forward(x.clone());
        let error = (found - expected.clone()).abs().max().into_scalar::<f32>();
        assert!(error < 2e-6 * scale * 40.0, "{error} of {scale}");
        // A second time there is no dense layer to replace.
        let again = adapted.replace("proj", start.weight.clone(), None);
        assert!(again.is_err());
    }
    // Factors of another rank or size, and a weight of another size.
    assert!(
        Lora::new(5)
            .init_at("proj", &linear, a.clone(), b.clone())
            .is_err()
    );
    assert!(
        plain
            .init_at("proj", &linear, a, random([6, 47], 1))
            .is_err()
    );
    let mut other = Linear::new(Weight::frozen(random([40, 47], 1)), None);
    assert!(other.replace("proj", start.weight, None).is_err());
    assert!(matches!(other.weight(), Weight::Dense(_)));
}

proptest! {
    #![proptest_config(property(16))]

    /// For any shape, also one whose last group is short.
    #[test]
    fn loftq_is_never_worse_than_qlora(
        d_in in 8usize..70, d_out in 8usize..70, rank in 1usize..8,
        bits in prop::sample::select(vec![2usize, 3, 4]), seed in 0u64..100,
    ) {
        let weight = random([d_in, d_out], seed);
        let quantizer = Rtn::new().with_bits(bits).with_group_size(8);
        let plain = Lora::new(rank).start(&layer(&weight), &quantizer).unwrap();
        let start = Loftq::new(rank).start(&layer(&weight), &quantizer).unwrap();
        prop_assert!(start.error < plain.error);
        let measured = square_error(&weight, start.sum());
        prop_assert!((measured - start.error).abs() < 1e-4 * measured + 1e-10);
    }
}
