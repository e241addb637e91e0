//! What must hold for every initialization of one layer.

use burn::tensor::{Device, Tensor, TensorData};
use loftq::{
    Apiq, Error, FisherRoots, Layer, LayerMethod, Loftq, LqLora, Pissa, Qera, Start, Truncation,
};
use peft::{Adapter, Linear, Lora, Weight};
use proptest::prelude::*;
use quant_core::{
    Gram, NormalFloat, Optq, Quantizer, Rtn, full_svd, sum_of_squares, symmetric_eigen,
};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

const EXACT: Truncation = Truncation {
    tolerance: 1e-9,
    seed: 0,
};

fn random([m, n]: [usize; 2], seed: u64) -> Tensor<2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..m * n).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    Tensor::from_data(TensorData::new::<f32, _>(values, [m, n]), &Device::flex())
}

fn floats(matrix: Tensor<2>) -> Vec<f32> {
    matrix.into_data().try_into_vec().unwrap()
}

fn layer(weight: &Tensor<2>) -> Layer<'_> {
    Layer {
        path: "proj",
        weight: weight.clone(),
        gram: None,
        fisher: None,
    }
}

/// Correlated inputs, some of them loud.
fn inputs(d_in: usize, seed: u64) -> Tensor<2> {
    let loud: Vec<f32> = (0..d_in)
        .map(|i| if i % 7 == 3 { 6.0 } else { 1.0 })
        .collect();
    let loud = Tensor::<1>::from_floats(&loud[..], &Device::flex()).unsqueeze::<2>();
    let x = random([3 * d_in, d_in], seed);
    (x.clone() + x.matmul(random([d_in, d_in], seed + 1)) * 0.2) * loud
}

fn gram(x: &Tensor<2>) -> Gram {
    let mut gram = Gram::new(x.dims()[1], &x.device());
    gram.update(x.clone());
    gram
}

fn sum(start: &Start) -> Tensor<2> {
    start.sum()
}

fn quantizers() -> Vec<Box<dyn Quantizer>> {
    vec![
        Box::new(Rtn::new().with_bits(2).with_group_size(16)),
        Box::new(
            Rtn::new()
                .with_bits(4)
                .with_group_size(24)
                .with_symmetric(true),
        ),
        Box::new(Rtn::new().with_bits(3)),
        Box::new(NormalFloat::new().with_block_size(32)),
        Box::new(NormalFloat::new().with_bits(2).with_block_size(16)),
        Box::new(Optq::new().with_bits(3).with_group_size(16)),
    ]
}

fn square_error(weight: &Tensor<2>, found: Tensor<2>) -> f64 {
    sum_of_squares(weight.clone() - found)
}

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
            let measured = square_error(&weight, sum(&start));
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
            let measured = square_error(&weight, sum(&start));
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
    let expected = x.clone().matmul(sum(&start));
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

#[test]
fn pissa_holds_the_largest_singular_values() {
    let weight = random([60, 44], 6);
    let [_, s, _] = full_svd(&floats(weight.clone()), 60, 44).unwrap();
    let pissa = Pissa::new(7).with_truncation(EXACT);
    let start = pissa.start_dense(&layer(&weight)).unwrap();
    // Nothing is lost, and what is left has the smallest ones.
    assert!(square_error(&weight, sum(&start)) < 1e-11 * sum_of_squares(weight.clone()));
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
fn lq_lora_stops_before_its_error_rises() {
    let weight = random([64, 48], 8);
    let quantizer = NormalFloat::new().with_bits(2).with_block_size(16);
    let errors: Vec<f64> = (1..40)
        .map(|rounds| {
            let lq = LqLora::new(6).with_max_rounds(rounds);
            let start = lq.start(&layer(&weight), &quantizer).unwrap();
            assert!(start.round <= rounds);
            let measured = square_error(&weight, sum(&start));
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
    let (with, without) = (weighed(sum(&seeing)), weighed(sum(&blind)));
    assert!(with < 0.95 * without, "{with} of {without}");
    assert!((with - seeing.error).abs() < 1e-5 * with);

    // Alike for all, it changes nothing but the unit: F = 4.
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

/// `R⁻¹ (R E)_r` in f64, with the symmetric square root `R` of the Gram.
fn by_symmetric_root(gram: &Gram, error: &Tensor<2>, rank: usize) -> Vec<f64> {
    let [m, n] = error.dims();
    let g: Vec<f64> = floats(gram.sum()).into_iter().map(f64::from).collect();
    let e: Vec<f64> = floats(error.clone()).into_iter().map(f64::from).collect();
    let (values, q) = symmetric_eigen(&g, m).unwrap();
    let power = |p: f64| -> Vec<f64> {
        (0..m * m)
            .map(|at| {
                (0..m)
                    .map(|k| q[at / m * m + k] * values[k].powf(p) * q[at % m * m + k])
                    .sum()
            })
            .collect()
    };
    let times = |a: &[f64], b: &[f64], inner: usize, columns: usize| -> Vec<f64> {
        (0..a.len() / inner * columns)
            .map(|at| {
                (0..inner)
                    .map(|k| a[at / columns * inner + k] * b[k * columns + at % columns])
                    .sum()
            })
            .collect()
    };
    let re = times(&power(0.5), &e, m, n);
    let square: Vec<f64> = (0..n * n)
        .map(|at| {
            (0..m)
                .map(|k| re[k * n + at / n] * re[k * n + at % n])
                .sum()
        })
        .collect();
    let (_, v) = symmetric_eigen(&square, n).unwrap();
    let projector: Vec<f64> = (0..n * n)
        .map(|at| {
            (n - rank..n)
                .map(|k| v[at / n * n + k] * v[at % n * n + k])
                .sum()
        })
        .collect();
    times(&power(-0.5), &times(&re, &projector, n, n), m, n)
}

/// §6.1 (6): the closed form, below a singular value decomposition, below nothing; the same for any
/// square root.
#[test]
fn the_closed_form_is_the_least_error_of_the_output() {
    let weight = random([48, 40], 11);
    let x = inputs(48, 12);
    let gram = gram(&x);
    for quantizer in quantizers() {
        let layer = Layer {
            gram: Some(&gram),
            ..layer(&weight)
        };
        let output_error =
            |found: Tensor<2>| sum_of_squares(x.clone().matmul(weight.clone() - found));
        let plain = Lora::new(5).start(&layer, &*quantizer).unwrap();
        let none = output_error(sum(&plain));
        let mut last = none;
        for rank in [1, 5, 20] {
            let qera = Qera::new(rank).with_truncation(EXACT);
            let start = qera.start(&layer, &*quantizer).unwrap();
            let closed = output_error(sum(&start));
            let svd = Loftq::new(rank)
                .with_rounds(1)
                .with_truncation(EXACT)
                .start(&layer, &*quantizer)
                .unwrap();
            let svd = output_error(sum(&svd));
            assert!(closed < svd && closed < last, "{closed} {svd} {last}");
            assert!(svd < none);
            assert!(
                (start.error - closed).abs() < 1e-3 * closed,
                "{} {closed}",
                start.error
            );
            last = closed;

            let error = weight.clone() - plain.weight.to_dense();
            let expected = by_symmetric_root(&gram, &error, rank);
            let [a, b] = start.factors.unwrap();
            let found = floats(a.matmul(b));
            let scale = expected
                .iter()
                .fold(0.0f64, |most, value| most.max(value.abs()));
            for (found, expected) in found.iter().zip(&expected) {
                let difference = (f64::from(*found) - expected).abs();
                assert!(difference < 1e-3 * scale, "{found} for {expected}");
            }
        }
    }
}

/// An error of a lower rank than the adapter's: what is left over of the rank adds nothing.
#[test]
fn an_error_of_low_rank_is_undone_whole() {
    let x = inputs(48, 12);
    let gram = gram(&x);
    // On the grid but for one output.
    let quantizer = Rtn::new().with_bits(4);
    let exact = quantizer
        .quantize(random([48, 40], 3), None)
        .unwrap()
        .weight;
    let packed = exact.dequantize();
    let one = Tensor::<2>::zeros([48, 39], &Device::flex());
    let off = Tensor::cat(vec![one, random([48, 1], 5) * 0.01], 1);
    let weight = packed + off;
    for rank in [8, 16] {
        let layer = Layer {
            gram: Some(&gram),
            ..layer(&weight)
        };
        let plain = Lora::new(rank).start(&layer, &quantizer).unwrap();
        let start = Qera::new(rank).start(&layer, &quantizer).unwrap();
        let error = |found: Tensor<2>| sum_of_squares(x.clone().matmul(weight.clone() - found));
        let (with, without) = (error(start.sum()), error(plain.sum()));
        assert!(with < 1e-6 * without, "{with} of {without}");
        // Such a layer can be trained at every rank.
        let [a, b] = start.factors.unwrap();
        let linear = Linear::new(start.weight, None);
        let adapter = Lora::new(rank).init_at("proj", &linear, a, b).unwrap();
        let of_a = floats(adapter.a().square().sum_dim(0).sqrt());
        assert!(of_a.iter().all(|&norm| norm > 1e-6), "{of_a:?}");
    }
}

#[test]
fn few_tokens_and_dead_inputs_have_a_closed_form_too() {
    let weight = random([48, 40], 11);
    let quantizer = Rtn::new().with_bits(2).with_group_size(16);
    // Less tokens than inputs, one input always zero; and none but zeros.
    let alive: Vec<f32> = (0..48).map(|i| f32::from(u8::from(i != 9))).collect();
    let alive = Tensor::<1>::from_floats(&alive[..], &Device::flex()).unsqueeze::<2>();
    for x in [
        random([10, 48], 1) * alive,
        Tensor::zeros([10, 48], &Device::flex()),
    ] {
        let gram = gram(&x);
        let layer = Layer {
            gram: Some(&gram),
            ..layer(&weight)
        };
        let plain = Lora::new(4).start(&layer, &quantizer).unwrap();
        let start = Qera::new(4).start(&layer, &quantizer).unwrap();
        let of_output =
            |start: &Start| sum_of_squares(x.clone().matmul(weight.clone() - sum(start)));
        assert!(of_output(&start) <= 0.8 * of_output(&plain));
        assert!(square_error(&weight, sum(&start)).is_finite());
    }
}

#[test]
fn apiq_follows_the_inputs_of_the_dense_model() {
    let weight = random([48, 40], 11);
    let dense = inputs(48, 12);
    // What packed layers made of them.
    let x = dense.clone() + random([144, 48], 13) * 0.3;
    let mut gram = Gram::new(48, &weight.device());
    gram.update_with_drift(x.clone(), dense.clone());
    let layer = Layer {
        gram: Some(&gram),
        ..layer(&weight)
    };
    let target = dense.matmul(weight.clone());
    let error = |found: Tensor<2>| sum_of_squares(x.clone().matmul(found) - target.clone());
    for quantizer in [
        Rtn::new().with_bits(2).with_group_size(16),
        Rtn::new()
            .with_bits(3)
            .with_group_size(20)
            .with_symmetric(true),
    ] {
        let plain = error(sum(&Lora::new(4).start(&layer, &quantizer).unwrap()));
        // No step changes nothing.
        let apiq = Apiq::new(4).with_learning_rates(2e-2, 1e-2);
        let start = apiq
            .clone()
            .with_rounds(0)
            .start(&layer, &quantizer)
            .unwrap();
        let none = error(sum(&start));
        assert!((none - plain).abs() < 1e-4 * plain, "{none} of {plain}");
        let mut last = plain;
        for rounds in [30, 200] {
            let apiq = apiq.clone().with_rounds(rounds);
            let start = apiq.start(&layer, &quantizer).unwrap();
            let found = error(sum(&start));
            assert!(found < last, "{found} of {last}");
            last = found;
            // What it says it reached is that of the packed weight, but for a constant.
            let constant = error(weight.clone());
            let said = start.error + constant;
            assert!((said - found).abs() < 1e-2 * found, "{said} of {found}");
        }
        // Closer than the best adapter on the quantizer's own weight and inputs alone.
        let qera = error(sum(&Qera::new(4).start(&layer, &quantizer).unwrap()));
        assert!(last < qera, "{last} of {qera}");
    }

    // A layer that gives nothing is left as it is.
    let zeros = Tensor::<2>::zeros([48, 40], &weight.device());
    let still = Layer {
        weight: zeros.clone(),
        ..layer.clone()
    };
    let start = Apiq::new(4)
        .with_rounds(3)
        .start(&still, &Rtn::new())
        .unwrap();
    assert_eq!(square_error(&zeros, start.sum()), 0.0);

    for (of_ranges, of_factors, decay) in [
        (f64::NAN, 1e-3, 0.1),
        (1e-3, -1.0, 0.1),
        (1e-3, 1e-3, f32::INFINITY),
    ] {
        let apiq = Apiq::new(4).with_learning_rates(of_ranges, of_factors);
        let refused = apiq.with_weight_decay(decay).start(&layer, &Rtn::new());
        let expected = matches!(refused, Err(Error::Peft(peft::Error::Setting { .. })));
        assert!(expected, "{refused:?}");
    }
    let refused = Apiq::new(4).start(&layer, &NormalFloat::new().with_block_size(16));
    assert!(matches!(refused, Err(Error::NoRange { .. })));
    let blind = Apiq::new(4).start(&self::layer(&weight), &Rtn::new());
    let expected = matches!(blind, Err(Error::Peft(peft::Error::NoCalibration)));
    assert!(expected, "{blind:?}");
}

#[test]
fn what_is_not_finite_is_named() {
    let mut values = vec![0.5f32; 48 * 40];
    values[7] = f32::NAN;
    let weight = Tensor::<1>::from_floats(&values[..], &Device::flex()).reshape([48, 40]);
    let quantizer = Rtn::new().with_group_size(16);
    let methods: [Box<dyn LayerMethod>; 3] = [
        Box::new(Loftq::new(4)),
        Box::new(Pissa::new(4)),
        Box::new(LqLora::new(4)),
    ];
    for method in methods {
        let error = method.start(&layer(&weight), &quantizer).unwrap_err();
        assert!(error.to_string().contains("proj"), "{error}");
    }
    let weight = random([48, 40], 1);
    let narrow = gram(&random([60, 47], 1));
    for (method, gram, expected) in [
        (
            Box::new(Loftq::new(0)) as Box<dyn LayerMethod>,
            None,
            "rank is 0",
        ),
        (Box::new(LqLora::new(41)), None, "a rank of 41"),
        (Box::new(Qera::new(4)), Some(&narrow), "layer `proj`"),
        (Box::new(Apiq::new(4)), Some(&narrow), "layer `proj`"),
    ] {
        let layer = Layer {
            gram,
            ..layer(&weight)
        };
        let error = method.start(&layer, &quantizer).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

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
        let measured = square_error(&weight, sum(&start));
        prop_assert!((measured - start.error).abs() < 1e-4 * measured + 1e-10);
    }
}
