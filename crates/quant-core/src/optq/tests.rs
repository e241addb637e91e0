//! The identities of OPTQ, its ladder, and runs against sums in f64 input by input.

use burn::tensor::{Distribution, TensorData};

use super::*;
use crate::Rtn;

fn tensor(values: &[f64], dims: [usize; 2]) -> Tensor<2> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

fn values(t: Tensor<2>) -> Vec<f64> {
    let values: Vec<f32> = t.into_data().try_into_vec().unwrap();
    values.into_iter().map(f64::from).collect()
}

/// A weight, and correlated inputs of which some are loud.
fn layer(d_in: usize, d_out: usize, n_tokens: usize) -> (Tensor<2>, Tensor<2>) {
    let device = Device::flex();
    device.seed(7);
    let normal = Distribution::Normal(0.0, 1.0);
    let weight = Tensor::<2>::random([d_in, d_out], normal, &device);
    let mix = Tensor::<2>::random([d_in, d_in], normal, &device) / (d_in as f32).sqrt();
    let x = Tensor::<2>::random([n_tokens, d_in], normal, &device);
    let loud: Vec<f64> = (0..d_in)
        .map(|i| if i % 29 == 3 { 6.0 } else { 1.0 })
        .collect();
    (
        weight,
        (x.clone() + x.matmul(mix)) * tensor(&loud, [1, d_in]),
    )
}

fn gram(x: Tensor<2>) -> Gram {
    let mut gram = Gram::new(x.dims()[1], &x.device());
    gram.update(x);
    gram
}

fn round(optq: &Optq, weight: &Tensor<2>, gram: &Gram) -> Rounded {
    let layout = optq.format().unwrap().layout(weight.dims()).unwrap();
    kernels::with_values(weight.clone(), |w| optq.round(w, gram, &layout)).unwrap()
}

fn share_equal(a: &[u8], b: &[u8]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

/// OPTQ as its paper has it: one input after the other, in f64. `group_starts[i]` is the number of
/// inputs whose errors the grid of the group that starts at `i` has heard of.
struct Naive {
    n: usize,
    d_out: usize,
    /// `Uᵀ U` is the inverse of the damped Hessian.
    u: Vec<f64>,
    /// What GPTAQ adds.
    drift: Vec<f64>,
}

impl Naive {
    fn new(gram: &Gram, d_out: usize, damping: f64) -> Self {
        let n = gram.d_in();
        let mut h = values(gram.sum());
        let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
        for i in 0..n {
            h[i * n + i] += damping * mean;
        }
        let inverse = invert(&h, n);
        // The upper factor: rows from the first, `inverse = Uᵀ U`.
        let mut u = vec![0.0; n * n];
        for i in 0..n {
            for j in i..n {
                let sum: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
                let rest = inverse[i * n + j] - sum;
                u[i * n + j] = if i == j {
                    rest.sqrt()
                } else {
                    rest / u[i * n + i]
                };
            }
        }
        let mut drift = vec![0.0; n * n];
        if let Some(sum) = gram.drift() {
            // 0.25 triu(D Uᵀ, 1) U
            let d = values(sum);
            for i in 0..n {
                let row: Vec<f64> = (0..n)
                    .map(|j| match j > i {
                        true => (0..n).map(|k| d[i * n + k] * u[j * n + k]).sum(),
                        false => 0.0,
                    })
                    .collect();
                for j in 0..n {
                    drift[i * n + j] = 0.25 * (0..n).map(|k| row[k] * u[k * n + j]).sum::<f64>();
                }
            }
        }
        Self { n, d_out, u, drift }
    }

    /// `stale`: the grid of a group is made when its block of 128 begins.
    fn round(&self, weight: &Tensor<2>, bits: u32, group: usize, stale: bool) -> Vec<u8> {
        let (n, d_out) = (self.n, self.d_out);
        let mut w = values(weight.clone());
        let mut codes = vec![0; n * d_out];
        let max = f64::from((1u32 << bits) - 1);
        let grid = |w: &[f64], first: usize, o: usize| {
            let rows = first..n.min(first + group);
            let column = rows.map(|i| w[i * d_out + o]);
            let (low, high) = column.fold((0.0f64, 0.0f64), |(l, h), w| (l.min(w), h.max(w)));
            let scale = (high - low) / max;
            (scale, (-low / scale).round_ties_even())
        };
        let mut grids = vec![(0.0, 0.0); n.div_ceil(group) * d_out];
        for i in 0..n {
            let starts: Vec<usize> = match stale {
                true if i % 128 == 0 => (i..n.min(i + 128)).filter(|t| t % group == 0).collect(),
                false if i % group == 0 => vec![i],
                _ => Vec::new(),
            };
            for start in starts {
                for o in 0..d_out {
                    grids[start / group * d_out + o] = grid(&w, start, o);
                }
            }
            for o in 0..d_out {
                let (scale, zero) = grids[i / group * d_out + o];
                let value = w[i * d_out + o];
                let code = ((value / scale).round_ties_even() + zero).clamp(0.0, max);
                codes[i * d_out + o] = code as u8;
                let error = (value - scale * (code - zero)) / self.u[i * n + i];
                for k in i + 1..n {
                    w[k * d_out + o] -= error * self.u[i * n + k];
                    // The reference's code has the rounded weight for what lies beyond its block.
                    let of_drift = match k / 128 == i / 128 {
                        true => value,
                        false => scale * (code - zero),
                    };
                    w[k * d_out + o] += of_drift * self.drift[i * n + k];
                }
            }
        }
        codes
    }
}

/// By elimination: well enough for what is here.
fn invert(a: &[f64], n: usize) -> Vec<f64> {
    let mut a = a.to_vec();
    let mut inverse = vec![0.0; n * n];
    for i in 0..n {
        inverse[i * n + i] = 1.0;
    }
    for i in 0..n {
        let pivot = a[i * n + i];
        for k in 0..n {
            a[i * n + k] /= pivot;
            inverse[i * n + k] /= pivot;
        }
        for j in (0..n).filter(|&j| j != i) {
            let factor = a[j * n + i];
            for k in 0..n {
                a[j * n + k] -= factor * a[i * n + k];
                inverse[j * n + k] -= factor * inverse[i * n + k];
            }
        }
    }
    inverse
}

/// `Σ loss = ½ tr(D H D)` with the damped Hessian: the best single test of the whole method.
#[test]
fn the_losses_are_the_error_of_the_output() {
    let (weight, x) = layer(300, 40, 900);
    let gram = gram(x);
    for order in [Order::Natural, Order::Descending, Order::DescendingByGroup] {
        let optq = Optq::new().with_bits(3).with_order(order);
        let rounded = round(&optq, &weight, &gram);
        let loss = rounded.loss;
        let quantized = optq.quantize(weight.clone(), Some(&gram)).unwrap();
        let difference = quantized.weight.dequantize() - weight.clone();
        let h = values(gram.sum());
        let mean = (0..300).map(|i| h[i * 300 + i]).sum::<f64>() / 300.0;
        let d = values(difference);
        let mut expected = 0.01 * mean * d.iter().map(|d| d * d).sum::<f64>();
        for o in 0..40 {
            for i in 0..300 {
                let row = &h[i * 300..][..300];
                let product: f64 = row.iter().enumerate().map(|(k, h)| h * d[k * 40 + o]).sum();
                expected += d[i * 40 + o] * product;
            }
        }
        assert!(
            (2.0 * loss / expected - 1.0).abs() < 1e-5,
            "{order:?}: {loss}, not half of {expected}"
        );
    }
}

/// Blocks of 128 inputs, of a group's, and of one: the same codes.
#[test]
fn blocks_change_nothing() {
    let (weight, x) = layer(300, 24, 900);
    let gram = gram(x);
    let naive = Naive::new(&gram, 24, 0.01);
    for (bits, group, stale) in [
        (4, 300, false),
        (2, 300, false),
        (4, 32, false),
        (3, 48, false),
        (4, 150, false),
        (4, 48, true),
        (3, 32, true),
    ] {
        let group_size = (group < 300).then_some(group);
        let optq = Optq::new()
            .with_bits(bits)
            .with_group_size(group_size)
            .with_stale_groups(stale);
        let found = round(&optq, &weight, &gram).codes;
        let expected = naive.round(&weight, bits as u32, group, stale);
        let share = share_equal(&found, &expected);
        assert!(
            share > 0.998,
            "{bits} bits, group {group}, stale {stale}: {share}"
        );
    }
    let fresh = round(&Optq::new().with_group_size(48), &weight, &gram).codes;
    let stale = Optq::new().with_group_size(48).with_stale_groups(true);
    assert!(share_equal(&fresh, &round(&stale, &weight, &gram).codes) < 0.98);
}

#[test]
fn inputs_without_correlation_are_rounded_to_nearest() {
    let (weight, _) = layer(96, 70, 1);
    let diagonal: Vec<f64> = (0..96 * 96)
        .map(|k| {
            if k % 97 == 0 {
                1.0 + (k % 7) as f64
            } else {
                0.0
            }
        })
        .collect();
    let gram = Gram::from_sum(tensor(&diagonal, [96, 96]), 1000).unwrap();
    for symmetric in [false, true] {
        for bits in [2, 3, 4, 8] {
            for group in [None, Some(32), Some(40)] {
                let rtn = Rtn::new().with_bits(bits).with_group_size(group);
                let rtn = rtn.with_symmetric(symmetric).quantize(weight.clone(), None);
                let rtn = rtn.unwrap().weight.to_parts();
                for order in [Order::Natural, Order::Descending, Order::DescendingByGroup] {
                    let optq = Optq::new().with_bits(bits).with_group_size(group);
                    let optq = optq.with_symmetric(symmetric).with_order(order);
                    let optq = optq.quantize(weight.clone(), Some(&gram)).unwrap();
                    let optq = optq.weight.to_parts();
                    assert!(optq == rtn, "{bits} bits, group {group:?}, {order:?}");
                }
            }
        }
    }
}

#[test]
fn drift_is_made_up_for() {
    let (weight, x) = layer(300, 24, 900);
    let dense = x.clone() + (x.clone() * 3.0).sin() * 2.0;
    let mut with_drift = Gram::new(300, &x.device());
    with_drift.update_with_drift(x.clone(), dense);
    let expected = Naive::new(&with_drift, 24, 0.01).round(&weight, 4, 300, false);
    let gptaq = Optq::new().with_drift(0.25);
    let found = round(&gptaq, &weight, &with_drift).codes;
    let share = share_equal(&found, &expected);
    assert!(share > 0.998, "{share}");
    assert!(share_equal(&found, &round(&Optq::new(), &weight, &with_drift).codes) < 0.9);

    // Inputs that have not drifted: OPTQ itself, over several blocks.
    let (weight, x) = layer(300, 24, 900);
    let mut still = Gram::new(300, &x.device());
    still.update_with_drift(x.clone(), x);
    let found = round(&gptaq, &weight, &still).codes;
    assert!(found == round(&Optq::new(), &weight, &still).codes);
    let error = gptaq.quantize(weight.clone(), Some(&gram(layer(300, 1, 9).1)));
    assert_eq!(error.unwrap_err(), Error::NoDrift);
}

/// Every rung, each with the Hessian that needs it.
#[test]
fn the_ladder_is_climbed() {
    let climb = |optq: Optq, hessian: &[f64], d_in: usize| {
        let weight: Vec<f64> = (0..d_in * 8)
            .map(|k| ((k * 37) % 23) as f64 / 23.0 - 0.4)
            .collect();
        let gram = Gram::from_sum(tensor(hessian, [d_in, d_in]), 1000).unwrap();
        let quantized = optq.quantize(tensor(&weight, [d_in, 8]), Some(&gram));
        let Quantized { weight, notes } = quantized.unwrap();
        assert!(values(weight.dequantize()).iter().all(|w| w.is_finite()));
        notes
    };
    let optq = Optq::new();
    let ones = vec![1.0; 64];
    assert_eq!(climb(optq, &ones, 8), []);

    let indefinite = [1.0, 1.02, 1.02, 1.0];
    assert_eq!(
        climb(optq, &indefinite, 2),
        [Note::Damped { damping: 0.04 }]
    );

    let loud = vec![1e8; 64 * 64];
    let notes = climb(optq.with_damping(1e-10), &loud, 64);
    assert_eq!(notes, [Note::DoublePrecision]);

    let unsound = [1e-12, 1e-3, 1e-3, 1.0];
    let notes = climb(optq.with_damping(0.0), &unsound, 2);
    assert_eq!(notes, [Note::DiagonalFloor { fraction: 1e-5 }]);

    let hopeless = [1.0, 5.0, 5.0, 1.0];
    assert_eq!(climb(optq, &hopeless, 2), [Note::RoundedToNearest]);
    let singular = climb(optq.with_damping(0.0), &ones, 8);
    assert_eq!(singular, [Note::RoundedToNearest]);
}

/// The scale of the Gram cancels, with a dead input too.
#[test]
fn the_scale_of_the_gram_cancels() {
    let (weight, x) = layer(60, 24, 300);
    let alive: Vec<f64> = (0..60).map(|i| f64::from(u8::from(i % 20 != 5))).collect();
    let gram = gram(x * tensor(&alive, [1, 60]));
    let small = Gram::from_sum(gram.sum() * 2f32.powi(-30), 300).unwrap();
    let optq = Optq::new().with_bits(3);
    let found = round(&optq, &weight, &small);
    let large = Gram::from_sum(gram.sum() * 2f32.powi(30), 300).unwrap();
    for other in [&gram, &large] {
        // Up to the part of dead inputs in the damping.
        assert!(share_equal(&found.codes, &round(&optq, &weight, other).codes) > 0.97);
    }
    let rtn = Rtn::new().with_bits(3).quantize(weight, None).unwrap();
    assert!(share_equal(&found.codes, &rtn.weight.codes()) < 0.95);
}

/// Errors that grow without end end in rounding to nearest, not in an error about the weight.
#[test]
fn a_layer_that_diverges_is_rounded_to_nearest() {
    let d_in = 64;
    let entry = |i: usize, j: usize| if i == j { 1.0 } else { 1.0 - 1e-7 };
    let hessian: Vec<f64> = (0..d_in * d_in)
        .map(|k| entry(k / d_in, k % d_in))
        .collect();
    let gram = Gram::from_sum(tensor(&hessian, [d_in, d_in]), 1000).unwrap();
    let weight: Vec<f64> = (0..d_in * 4)
        .map(|k| (k as f64 * 0.7).sin() * 1e37)
        .collect();
    let weight = tensor(&weight, [d_in, 4]);
    let optq = Optq::new().with_group_size(4).with_damping(0.0);
    let quantized = optq.quantize(weight, Some(&gram)).unwrap();
    assert_eq!(quantized.notes.last(), Some(&Note::RoundedToNearest));
}

#[test]
#[should_panic(expected = "the inputs of the Gram")]
fn inputs_of_another_layer_are_no_inputs() {
    Gram::new(4, &Device::flex()).update(tensor(&[1.0; 60], [10, 6]));
}

#[test]
fn dead_inputs_and_few_tokens_are_told() {
    let (weight, x) = layer(40, 8, 30);
    let alive: Vec<f64> = (0..40).map(|i| f64::from(u8::from(i != 5))).collect();
    let gram = gram(x * tensor(&alive, [1, 40]));
    let quantized = Optq::new().quantize(weight, Some(&gram)).unwrap();
    let few = Note::FewTokens {
        n_tokens: 30,
        d_in: 40,
    };
    assert_eq!(quantized.notes, [few, Note::DeadInputs { n_inputs: 1 }]);
    let rounded = values(quantized.weight.dequantize());
    assert!(rounded[5 * 8..6 * 8].iter().all(|&w| w == 0.0));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let (weight, x) = layer(200, 150, 500);
    let gram = gram(x);
    let optq = Optq::new()
        .with_group_size(64)
        .with_order(Order::DescendingRegrouped);
    let on = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
        pool.build()
            .unwrap()
            .install(|| round(&optq, &weight, &gram))
    };
    let (one, three) = (on(1), on(3));
    assert!(one.codes == three.codes && one.grids.scales == three.grids.scales);
    assert_eq!(one.loss, three.loss);
}

#[test]
fn grams_that_cannot_be_used_are_refused() {
    let weight = tensor(&[0.5; 12], [4, 3]);
    let with = |gram: Option<&Gram>| Optq::new().quantize(weight.clone(), gram).unwrap_err();
    assert_eq!(with(None), Error::NoGram);
    let empty = Gram::new(4, &Device::flex());
    assert_eq!(with(Some(&empty)), Error::EmptyGram);
    let other = gram(tensor(&[1.0; 10], [2, 5]));
    assert_eq!(with(Some(&other)), Error::GramSize { d_in: 4, found: 5 });
    let mut sum = vec![1.0; 16];
    sum[6] = f64::INFINITY;
    let broken = Gram::from_sum(tensor(&sum, [4, 4]), 9).unwrap();
    let expected = Error::NonFinite {
        what: "the Gram",
        value: f32::INFINITY,
        row: 1,
        column: 2,
        count: 1,
    };
    assert_eq!(with(Some(&broken)), expected);
    assert!(Gram::from_sum(tensor(&[1.0; 6], [2, 3]), 9).is_err());
    let mut sum = vec![1.0; 16];
    sum[5] = -2.0;
    let negative = Gram::from_sum(tensor(&sum, [4, 4]), 9).unwrap();
    let expected = Error::NegativeMoment {
        input: 1,
        value: -2.0,
    };
    assert_eq!(with(Some(&negative)), expected);
    for damping in [-0.1, 1.5, f64::NAN] {
        let error = Optq::new().with_damping(damping).format().unwrap_err();
        assert!(matches!(error, Error::Fraction { .. }));
    }
}
