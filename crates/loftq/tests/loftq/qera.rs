//! QERA: the closed form.

use burn::tensor::{Device, Tensor};
use loftq::{Layer, LayerMethod, Loftq, Qera, Start};
use peft::{Linear, Lora};
use quant_core::{Gram, Quantizer, Rtn, sum_of_squares, symmetric_eigen};

use crate::layers::{EXACT, floats, gram, inputs, layer, quantizers, random, square_error};

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
        let none = output_error(plain.sum());
        let mut last = none;
        for rank in [1, 5, 20] {
            let qera = Qera::new(rank).with_truncation(EXACT);
            let start = qera.start(&layer, &*quantizer).unwrap();
            let closed = output_error(start.sum());
            let svd = Loftq::new(rank)
                .with_rounds(1)
                .with_truncation(EXACT)
                .start(&layer, &*quantizer)
                .unwrap();
            let svd = output_error(svd.sum());
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

/// An error of a lower rank than the adapter's: the other columns of the factors are zeros.
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
            |start: &Start| sum_of_squares(x.clone().matmul(weight.clone() - start.sum()));
        assert!(of_output(&start) <= 0.8 * of_output(&plain));
        assert!(square_error(&weight, start.sum()).is_finite());
    }
}
