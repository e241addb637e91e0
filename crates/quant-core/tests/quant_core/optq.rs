//! OPTQ against sums in f64, input by input, and its fallbacks.

use burn::tensor::{Device, Distribution, Tensor};
use proptest::prelude::*;
use quant_core::{Error, Gram, Note, Optq, Order, Quantized, Quantizer, Rtn};
use serde_json::json;

use crate::cases::{AnyCase, Method, optq_cases, scales, tensor, values};

const ORDERS: [Order; 4] = [
    Order::Natural,
    Order::Descending,
    Order::DescendingByGroup,
    Order::DescendingRegrouped,
];

fn matrix(values: &[f64], dims: [usize; 2]) -> Tensor<2> {
    tensor(values.iter().map(|&value| value as f32).collect(), dims)
}

fn doubles(t: Tensor<2>) -> Vec<f64> {
    values(t).into_iter().map(f64::from).collect()
}

/// A weight, and correlated inputs of which some are large.
fn layer(d_in: usize, d_out: usize, n_tokens: usize) -> (Tensor<2>, Tensor<2>) {
    let device = Device::flex();
    device.seed(7);
    let normal = Distribution::Normal(0.0, 1.0);
    let weight = Tensor::<2>::random([d_in, d_out], normal, &device);
    let mix = Tensor::<2>::random([d_in, d_in], normal, &device) / (d_in as f32).sqrt();
    let x = Tensor::<2>::random([n_tokens, d_in], normal, &device);
    let size: Vec<f64> = (0..d_in)
        .map(|i| if i % 29 == 3 { 6.0 } else { 1.0 })
        .collect();
    (
        weight,
        (x.clone() + x.matmul(mix)) * matrix(&size, [1, d_in]),
    )
}

fn gram(x: Tensor<2>) -> Gram {
    let mut gram = Gram::new(x.dims()[1], &x.device());
    gram.update(x);
    gram
}

fn codes(optq: &Optq, weight: &Tensor<2>, gram: &Gram) -> Vec<u8> {
    let quantized = optq.quantize(weight.clone(), Some(gram)).unwrap();
    quantized.weight.codes()
}

fn share_equal(a: &[u8], b: &[u8]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

/// The inputs in the order in which they are rounded.
fn rounded_in(order: Order, gram: &Gram, group_size: usize) -> Vec<usize> {
    let n = gram.d_in();
    let moments: Vec<f32> = values(gram.sum()).into_iter().step_by(n + 1).collect();
    let mut inputs: Vec<usize> = (0..n).collect();
    let n_whole = n / group_size * group_size;
    match order {
        Order::Natural => {}
        Order::Descending | Order::DescendingRegrouped => {
            inputs.sort_by(|&a, &b| moments[b].total_cmp(&moments[a]));
        }
        Order::DescendingByGroup => inputs[..n_whole].sort_by(|&a, &b| {
            let largest = |input: usize| {
                let group = input / group_size * group_size;
                let of_group = moments[group..group + group_size].iter().copied();
                of_group.fold(0.0, f32::max)
            };
            largest(b)
                .total_cmp(&largest(a))
                .then((a / group_size).cmp(&(b / group_size)))
                .then(moments[b].total_cmp(&moments[a]))
        }),
    }
    inputs
}

/// The matrices of OPTQ's paper, with inputs in the order in which they are rounded.
struct Reference {
    /// Upper triangular; `Uᵀ U` is the inverse of the damped Hessian.
    u: Vec<f64>,
    /// The matrix that GPTAQ adds, `fraction · triu(D Uᵀ, 1) U`.
    drift: Vec<f64>,
}

impl Reference {
    fn new(gram: &Gram, order: &[usize], damping: f64, fraction: f64) -> Self {
        let n = order.len();
        let ordered = |matrix: Vec<f64>| -> Vec<f64> {
            let row = |&i: &usize| order.iter().map(|&j| matrix[i * n + j]).collect::<Vec<_>>();
            order.iter().flat_map(row).collect()
        };
        let mut h = ordered(doubles(gram.sum()));
        let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
        for i in 0..n {
            h[i * n + i] += damping * mean;
        }
        let inverse = invert(&h, n);
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
        if fraction > 0.0 {
            let d = ordered(doubles(gram.drift().unwrap()));
            for i in 0..n {
                let dot = |j: usize| (0..n).map(|k| d[i * n + k] * u[j * n + k]).sum::<f64>();
                let row: Vec<f64> = (0..n).map(|j| if j > i { dot(j) } else { 0.0 }).collect();
                for j in 0..n {
                    let sum: f64 = (0..n).map(|k| row[k] * u[k * n + j]).sum();
                    drift[i * n + j] = fraction * sum;
                }
            }
        }
        Self { u, drift }
    }
}

/// By elimination, which is accurate enough for the matrices here.
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

/// The rounding of a sum in f32, relative to the sum of its magnitudes.
const ROUNDING: f64 = 2e-4;

/// Follows OPTQ in f64 along the codes that it found.
///
/// Each code must be the nearest to its weight as updated by the errors of all inputs before it, and
/// each grid that of the weights at its time.
fn check_each_code(optq: &Optq, weight: &Tensor<2>, gram: &Gram) {
    let settings = serde_json::to_value(optq).unwrap();
    let rtn = json!({ "grid": settings["grid"], "per_tensor": false });
    let rtn: Rtn = serde_json::from_value(rtn).unwrap();
    let order: Order = serde_json::from_value(settings["order"].clone()).unwrap();
    let stale = settings["stale_groups"] == true;
    let damping = settings["damping"].as_f64().unwrap();
    let fraction = settings["drift"].as_f64().unwrap_or(0.0);
    let fractional =
        settings["grid"]["fractional_zeros"] == true && settings["grid"]["symmetric"] == false;
    let is_static = settings["grid"]["group_size"].is_null() || order == Order::Descending;

    let quantized = optq.quantize(weight.clone(), Some(gram)).unwrap();
    assert_eq!(quantized.notes, [], "{optq:?}");
    let packed = quantized.weight;
    let ([n, d_out], layout) = (packed.dims(), packed.layout());
    let (group, max) = (layout.group_size(), f64::from((1u32 << layout.bits()) - 1));
    let found_scales = doubles(packed.scales());
    let symmetric = packed.zeros().is_none();
    let found_zeros = packed.zeros().map_or_else(
        || vec![f64::from(1 << (layout.bits() - 1)); found_scales.len()],
        doubles,
    );
    if is_static {
        let grids = rtn.quantize(weight.clone(), Some(gram)).unwrap().weight;
        assert_eq!(scales(&packed), scales(&grids), "{optq:?}");
        assert_eq!(packed.zeros().map(values), grids.zeros().map(values));
    }

    let inputs = rounded_in(order, gram, group);
    let mut group_of: Vec<usize> = (0..n).map(|input| input / group).collect();
    for (row, input) in packed.input_order().iter().flatten().enumerate() {
        group_of[*input as usize] = row / group;
    }
    let Reference { u, drift } = Reference::new(gram, &inputs, damping, fraction);
    let codes = packed.codes();
    let original = doubles(weight.clone());
    let rows = inputs
        .iter()
        .flat_map(|&input| &original[input * d_out..][..d_out]);
    let mut w: Vec<f64> = rows.copied().collect();
    let mut magnitude: Vec<f64> = w.iter().map(|w| w.abs()).collect();

    let check_grid = |w: &[f64], magnitude: &[f64], first: usize, o: usize| {
        let rows = first..n.min(first + group);
        let column = rows.clone().map(|i| w[i * d_out + o]);
        let from = if fractional {
            (f64::INFINITY, f64::NEG_INFINITY)
        } else {
            (0.0, 0.0)
        };
        let (mut low, mut high) = column.fold(from, |(l, h), w| (l.min(w), h.max(w)));
        if symmetric {
            high = high.max(-low);
            low = -high;
        }
        let at = group_of[inputs[first]] * d_out + o;
        let (scale, zero) = (found_scales[at], found_zeros[at]);
        let largest = rows.map(|i| magnitude[i * d_out + o]).fold(0.0, f64::max);
        if fractional && high - low <= ROUNDING * largest {
            // One value, up to rounding, whose level is that of code 0.
            return;
        }
        // The grid of a group of zeros; in f64 they may be the rounding of others.
        if high - low <= ROUNDING * largest && scale == f64::from(2.0 / max as f32) {
            (low, high) = (-1.0, 1.0);
        }
        let expected = (high - low) / max;
        let slack = 2.0 * ROUNDING * largest / max + 1e-6 * expected;
        assert!(
            (scale - expected).abs() <= slack,
            "{optq:?}: scale {scale}, not {expected}"
        );
        let off = (zero * scale + low).abs();
        assert!(
            symmetric || off <= if fractional { 0.0 } else { 0.5 * scale } + max * slack,
            "{optq:?}: zero {zero} for {low} and {scale}"
        );
    };
    let full = settings["grid"]["range"] == "full";
    // The reference's code feeds the rounded weight into later blocks, not the weight itself.
    let block = if is_static || stale {
        128
    } else {
        (128 / group * group).max(1)
    };
    for (i, &input) in inputs.iter().enumerate() {
        if full && !is_static {
            let starts = if !stale {
                i..i + 1
            } else if i % 128 == 0 {
                i..n.min(i + 128)
            } else {
                i..i
            };
            for first in starts.filter(|first| first % group == 0) {
                (0..d_out).for_each(|o| check_grid(&w, &magnitude, first, o));
            }
        }
        for o in 0..d_out {
            let at = group_of[input] * d_out + o;
            let (scale, zero) = (found_scales[at], found_zeros[at]);
            let value = w[i * d_out + o];
            let distance = |code: f64| (scale * (code - zero) - value).abs();
            let code = f64::from(codes[input * d_out + o]);
            let nearest = (value / scale + zero).round().clamp(0.0, max);
            let slack = ROUNDING * magnitude[i * d_out + o];
            assert!(
                distance(code) <= distance(nearest) + slack,
                "{optq:?}: input {input}, the {i}th: code {code} for {value} on {scale} ({zero})"
            );
            let level = scale * (code - zero);
            let error = (value - level) / u[i * n + i];
            // An error is a small difference of f32: that of an outlier has the rounding of its level
            // and of each update before it, 6e-8 of the outlier each. 1e-6 allows for all of them.
            let rounding = 1e-6 / ROUNDING * magnitude[i * d_out + o] / u[i * n + i];
            for k in i + 1..n {
                let of_drift = if k / block == i / block { value } else { level };
                magnitude[k * d_out + o] += rounding * u[i * n + k].abs();
                for change in [-error * u[i * n + k], of_drift * drift[i * n + k]] {
                    w[k * d_out + o] += change;
                    magnitude[k * d_out + o] += change.abs();
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn each_code_is_the_nearest_after_the_errors_before_it(
        case in optq_cases(),
        outlier in 1e1..1e2f32,
    ) {
        let Method::Optq(optq) = case.method else { unreachable!() };
        // Beside larger weights, the errors of the others are lost in the rounding of f32.
        let small = |w: f32| if w.abs() > 1.0 { w * 1e-4 } else { w };
        let weight = case.weight.iter().copied().map(small).collect();
        let case = AnyCase { weight, ..case };
        for case in [case.clone()].into_iter().chain(case.hard(outlier)) {
            check_each_code(&optq, &tensor(case.weight, case.dims), &case.gram);
        }
    }
}

/// Over several blocks of 128 inputs, with groups that divide them and groups that do not.
#[test]
fn blocks_change_nothing() {
    let (weight, x) = layer(300, 24, 900);
    let gram = gram(x);
    let with = |bits, group: usize, stale| {
        Optq::new()
            .with_bits(bits)
            .with_group_size((group < 300).then_some(group))
            .with_stale_groups(stale)
    };
    for (bits, group, stale) in [
        (4, 300, false),
        (2, 300, false),
        (4, 32, false),
        (3, 48, false),
        (4, 150, false),
        (4, 48, true),
        (3, 32, true),
    ] {
        for order in ORDERS {
            let optq = with(bits, group, stale).with_order(order);
            check_each_code(&optq, &weight, &gram);
        }
    }
    let codes = |stale| {
        let optq = with(4, 48, stale).with_order(Order::Natural);
        codes(&optq, &weight, &gram)
    };
    assert!(share_equal(&codes(false), &codes(true)) < 0.98);
}

#[test]
fn drift_is_compensated() {
    let (weight, x) = layer(300, 24, 900);
    let dense = x.clone() + (x.clone() * 3.0).sin() * 2.0;
    let mut with_drift = Gram::new(300, &x.device());
    with_drift.update_with_drift(x.clone(), dense);
    for order in ORDERS {
        let optq = Optq::new().with_order(order);
        let gptaq = optq.with_drift(0.25);
        check_each_code(&gptaq, &weight, &with_drift);
        let (found, without) = (
            codes(&gptaq, &weight, &with_drift),
            codes(&optq, &weight, &with_drift),
        );
        assert!(share_equal(&found, &without) < 0.9);

        // Without a drift this is OPTQ, over several blocks.
        let mut still = Gram::new(300, &x.device());
        still.update_with_drift(x.clone(), x.clone());
        assert!(codes(&gptaq, &weight, &still) == codes(&optq, &weight, &still));
        let error = gptaq.quantize(weight.clone(), Some(&gram(x.clone())));
        assert_eq!(error.unwrap_err(), Error::NoDrift);
    }
}

/// On correlated inputs, the output error is below that of rounding to nearest, in every order.
#[test]
fn the_output_error_is_below_that_of_rounding_to_nearest() {
    let (weight, x) = layer(128, 64, 1024);
    let gram = gram(x);
    for bits in [2, 3, 4, 8] {
        for group in [None, Some(32)] {
            let rtn = Rtn::new().with_bits(bits).with_group_size(group);
            let error = |quantizer: &dyn Quantizer| {
                let quantized = quantizer.quantize(weight.clone(), Some(&gram)).unwrap();
                gram.energy(quantized.weight.dequantize() - weight.clone())
            };
            let nearest = error(&rtn);
            for order in ORDERS {
                let optq = Optq::new().with_bits(bits).with_group_size(group);
                let ratio = error(&optq.with_order(order)) / nearest;
                assert!(
                    ratio < 0.85,
                    "{bits} bits, group {group:?}, {order:?}: {ratio}"
                );
            }
        }
    }
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
    let gram = Gram::from_sum(matrix(&diagonal, [96, 96]), 1000).unwrap();
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

/// Every fallback, each with a Hessian that needs it.
#[test]
fn fallbacks_are_tried_in_turn() {
    let notes = |optq: Optq, hessian: &[f64], d_in: usize| {
        let weight: Vec<f64> = (0..d_in * 8)
            .map(|k| ((k * 37) % 23) as f64 / 23.0 - 0.4)
            .collect();
        let gram = Gram::from_sum(matrix(hessian, [d_in, d_in]), 1000).unwrap();
        let quantized = optq.quantize(matrix(&weight, [d_in, 8]), Some(&gram));
        let Quantized { weight, notes } = quantized.unwrap();
        assert!(values(weight.dequantize()).iter().all(|w| w.is_finite()));
        notes
    };
    let optq = Optq::new();
    let ones = vec![1.0; 64];
    assert_eq!(notes(optq, &ones, 8), []);

    let indefinite = [1.0, 1.02, 1.02, 1.0];
    assert_eq!(
        notes(optq, &indefinite, 2),
        [Note::Damped { damping: 0.04 }]
    );

    let large = vec![1e8; 64 * 64];
    let found = notes(optq.with_damping(1e-10), &large, 64);
    assert_eq!(found, [Note::DoublePrecision]);

    let inconsistent = [1e-12, 1e-3, 1e-3, 1.0];
    let found = notes(optq.with_damping(0.0), &inconsistent, 2);
    assert_eq!(found, [Note::DiagonalFloor { fraction: 1e-5 }]);

    let hopeless = [1.0, 5.0, 5.0, 1.0];
    assert_eq!(notes(optq, &hopeless, 2), [Note::RoundedToNearest]);
    let singular = notes(optq.with_damping(0.0), &ones, 8);
    assert_eq!(singular, [Note::RoundedToNearest]);
}

/// With a dead input too.
#[test]
fn the_scale_of_the_gram_cancels() {
    let (weight, x) = layer(60, 24, 300);
    let alive: Vec<f64> = (0..60).map(|i| f64::from(u8::from(i % 20 != 5))).collect();
    let gram = gram(x * matrix(&alive, [1, 60]));
    let small = Gram::from_sum(gram.sum() * 2f32.powi(-30), 300).unwrap();
    let optq = Optq::new().with_bits(3);
    let found = codes(&optq, &weight, &small);
    let large = Gram::from_sum(gram.sum() * 2f32.powi(30), 300).unwrap();
    for other in [&gram, &large] {
        // Up to the part of dead inputs in the damping.
        assert!(share_equal(&found, &codes(&optq, &weight, other)) > 0.97);
    }
    let rtn = Rtn::new().with_bits(3).quantize(weight, None).unwrap();
    assert!(share_equal(&found, &rtn.weight.codes()) < 0.95);
}

/// Errors that grow without bound end in rounding to nearest, not in an error about the weight.
#[test]
fn a_layer_that_diverges_is_rounded_to_nearest() {
    let d_in = 64;
    let entry = |i: usize, j: usize| if i == j { 1.0 } else { 1.0 - 1e-7 };
    let hessian: Vec<f64> = (0..d_in * d_in)
        .map(|k| entry(k / d_in, k % d_in))
        .collect();
    let gram = Gram::from_sum(matrix(&hessian, [d_in, d_in]), 1000).unwrap();
    let weight: Vec<f64> = (0..d_in * 4)
        .map(|k| (k as f64 * 0.7).sin() * 1e37)
        .collect();
    let weight = matrix(&weight, [d_in, 4]);
    let optq = Optq::new().with_order(Order::Natural);
    let optq = optq.with_group_size(4).with_damping(0.0);
    let quantized = optq.quantize(weight, Some(&gram)).unwrap();
    assert_eq!(quantized.notes.last(), Some(&Note::RoundedToNearest));
}

#[test]
fn dead_inputs_and_few_tokens_are_noted() {
    let (weight, x) = layer(40, 8, 30);
    let alive: Vec<f64> = (0..40).map(|i| f64::from(u8::from(i != 5))).collect();
    let gram = gram(x * matrix(&alive, [1, 40]));
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
fn unusable_grams_and_settings_are_refused() {
    let weight = matrix(&[0.5; 12], [4, 3]);
    let with = |gram: Option<&Gram>| Optq::new().quantize(weight.clone(), gram).unwrap_err();
    assert_eq!(with(None), Error::NoGram);
    let empty = Gram::new(4, &Device::flex());
    assert_eq!(with(Some(&empty)), Error::EmptyGram);
    let other = gram(matrix(&[1.0; 10], [2, 5]));
    assert_eq!(with(Some(&other)), Error::GramSize { d_in: 4, found: 5 });
    let mut sum = vec![1.0; 16];
    sum[6] = f64::INFINITY;
    let broken = Gram::from_sum(matrix(&sum, [4, 4]), 9).unwrap();
    let expected = Error::NonFinite {
        what: "the Gram",
        value: f32::INFINITY,
        row: 1,
        column: 2,
        count: 1,
    };
    assert_eq!(with(Some(&broken)), expected);
    assert!(Gram::from_sum(matrix(&[1.0; 6], [2, 3]), 9).is_err());
    let mut sum = vec![1.0; 16];
    sum[5] = -2.0;
    let negative = Gram::from_sum(matrix(&sum, [4, 4]), 9).unwrap();
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
