//! Rounding to nearest on uniform grids.

use burn::tensor::{Device, Tensor, TensorData};
use proptest::prelude::*;
use quant_core::{Error, GroupRange, Quantizer, Rtn, StoredGrid};

use crate::cases::{Method, cases, rtn_cases, scales, tensor, values};

proptest! {
    /// A searched range costs at most as much as the full one, by the loss of its search.
    #[test]
    fn a_searched_range_costs_no_more(case in rtn_cases()) {
        let Method::Rtn(rtn) = case.method else { unreachable!() };
        let rtn = rtn.with_per_tensor(false);
        let weight = tensor(case.weight.clone(), case.dims);
        let diagonal = values(case.gram.sum());
        let cost = |range: GroupRange| {
            let packed = rtn.with_range(range).quantize(weight.clone(), Some(&case.gram));
            let found = values(packed.unwrap().weight.dequantize());
            let (mut power, mut output) = (0.0, 0.0);
            for (at, (found, w)) in found.iter().zip(&case.weight).enumerate() {
                let error = f64::from(found - w).abs();
                let input = at / case.dims[1];
                power += error.powf(2.4);
                output += f64::from(diagonal[input * case.dims[0] + input]) * error * error;
            }
            (power, output)
        };
        let full = cost(GroupRange::Full);
        prop_assert!(cost(GroupRange::Clipped).0 <= full.0 * 1.0001);
        prop_assert!(cost(GroupRange::ClippedForOutput).1 <= full.1 * 1.0001);
    }

    #[test]
    fn one_grid_serves_a_whole_tensor(case in cases()) {
        let packed = case.rtn.with_per_tensor(true).quantize(case.tensor(), None).unwrap().weight;
        let flat = Tensor::<2>::from_data(
            TensorData::new(case.weight.clone(), [case.weight.len(), 1]), &Device::flex());
        let one = case.rtn.with_group_size(None).quantize(flat, None).unwrap().weight;
        let same = |all: Vec<f32>, one: Vec<f32>| all.iter().all(|value| *value == one[0]);
        prop_assert!(same(scales(&packed), scales(&one)));
        prop_assert_eq!(packed.codes(), one.codes());
    }

    /// Scales in f16 are those of f32 rounded once, and the weights the nearest on their grids.
    #[test]
    fn f16_scales_are_rounded_before_the_weights(case in cases()) {
        let packed = case.rtn.with_f16_scales(true).quantize(case.tensor(), None).unwrap().weight;
        let exact = case.quantize();
        prop_assert_eq!(&packed.to_parts().zeros, &exact.to_parts().zeros);
        let (narrow, wide) = (scales(&packed), scales(&exact));
        for (narrow, wide) in narrow.iter().zip(wide) {
            let rounded = half::f16::from_f32(wide).max(half::f16::from_bits(1));
            prop_assert_eq!(*narrow, rounded.to_f32());
        }
        let zeros = exact.zeros().map(values);
        let max_code = ((1u32 << packed.format().bits()) - 1) as f32;
        let [_, d_out] = case.dims;
        for (at, (w, code)) in case.weight.iter().zip(packed.codes()).enumerate() {
            let grid = at / d_out / case.group_size() * d_out + at % d_out;
            let center = ((1u32 << packed.format().bits()) / 2) as f32;
            let zero = zeros.as_ref().map_or(center, |zeros| zeros[grid]);
            let nearest = ((w / narrow[grid]).round_ties_even() + zero).clamp(0.0, max_code);
            prop_assert_eq!(f32::from(code), nearest);
        }
    }

    /// Each value goes to the nearest level: half a step away, or beyond the end of the grid.
    #[test]
    fn rounding_is_to_the_nearest_level(case in cases()) {
        let packed = case.quantize();
        let (parts, scales) = (packed.to_parts(), scales(&packed));
        let bits = packed.format().bits();
        let max_code = f64::from((1u32 << bits) - 1);
        let [_, d_out] = case.dims;
        for (at, (&w, &found)) in case.weight.iter().zip(&values(packed.dequantize())).enumerate() {
            let grid = at / d_out / case.group_size() * d_out + at % d_out;
            let scale = f64::from(scales[grid]);
            let zero = parts.zeros.as_ref().map_or(f64::from(1 << (bits - 1)), |z| f64::from(z[grid]));
            prop_assert!(scale > 0.0 && zero.fract() == 0.0 && (0.0..=max_code).contains(&zero));
            let nearest = f64::from(w).clamp(-zero * scale, (max_code - zero) * scale);
            let error = (nearest - f64::from(found)).abs();
            prop_assert!(error <= scale * 0.5001, "{w} became {found} on steps of {scale}");
        }
    }

    /// Both ends of a range are levels, and every weight is half a step from one, or nearer.
    #[test]
    fn fractional_zeros_meet_both_ends(case in cases(), clip in any::<bool>()) {
        let rtn = case.rtn.with_symmetric(false).with_fractional_zeros(true);
        let packed = rtn.quantize(case.tensor(), None).unwrap().weight;
        let (found, scales) = (values(packed.dequantize()), scales(&packed));
        let [d_in, d_out] = case.dims;
        for (at, scale) in scales.iter().enumerate() {
            let (g, o) = (at / d_out, at % d_out);
            let rows = g * case.group_size()..d_in.min((g + 1) * case.group_size());
            let pairs = rows.map(|i| (case.weight[i * d_out + o], found[i * d_out + o]));
            let pairs: Vec<_> = pairs.collect();
            let [low, high] = [f32::min, f32::max].map(|end| {
                pairs.iter().map(|pair| pair.0).reduce(end).unwrap()
            });
            let rounding = 1e-6 * low.abs().max(high.abs());
            for &(weight, found) in &pairs {
                let is_end = weight == low || weight == high;
                let bound = if is_end { 0.0 } else { 0.5001 * scale };
                prop_assert!((found - weight).abs() <= bound + rounding, "{weight} {found} {scale}");
            }
            if low < high {
                let step = (high - low) / ((1u32 << packed.format().bits()) - 1) as f32;
                prop_assert!((scale - step).abs() <= 1e-6 * step);
            }
        }
        // The search keeps the full range where that is best.
        if clip {
            let clipped = rtn.with_range(GroupRange::Clipped).quantize(case.tensor(), None).unwrap();
            let loss = |found: &[f32]| {
                let errors = found.iter().zip(&case.weight);
                errors.map(|(a, b)| f64::from((a - b).abs()).powf(2.4)).sum::<f64>()
            };
            prop_assert!(loss(&values(clipped.weight.dequantize())) <= loss(&found) * 1.0001);
        }
    }

    /// Weights that are on a grid whose minimums and scales are `f16`, as those of Q4_1 are, keep all of it.
    #[test]
    fn a_grid_in_f16_is_found_again(
        groups in prop::collection::vec((-0.5..0.5f32, 1e-3..0.1f32), 1..12),
        bits in prop::sample::select(vec![2usize, 3, 4]),
        seed in any::<u32>(),
    ) {
        let n = groups.len();
        let max_code = (1u32 << bits) - 1;
        let f16 = |value: f32| half::f16::from_f32(value).to_f32();
        let weight = groups.iter().enumerate().flat_map(|(g, &(minimum, scale))| {
            (0..32u32).map(move |i| {
                // Both ends are taken.
                let code = match i {
                    0 => 0,
                    1 => max_code,
                    _ => (i.wrapping_mul(seed | 1).wrapping_add(g as u32) >> 3) & max_code,
                };
                f16(scale) * code as f32 + f16(minimum)
            })
        });
        let weight: Vec<f32> = weight.collect();
        let rtn = Rtn::new()
            .with_bits(bits)
            .with_group_size(32)
            .with_f16_scales(true)
            .with_fractional_zeros(true);
        let packed = rtn.quantize(tensor(weight.clone(), [32 * n, 1]), None).unwrap().weight;
        let parts = packed.to_parts();
        for (at, &(minimum, scale)) in groups.iter().enumerate() {
            prop_assert_eq!(scales(&packed)[at], f16(scale));
            let zero = parts.zeros.as_ref().unwrap()[at];
            prop_assert_eq!(zero, -f16(minimum) / f16(scale) + 0.0);
        }
        let stored = StoredGrid::new().with_f16_scales(true).with_f16_minimums(true);
        prop_assert!(stored.holds(&packed));
        let found = values(packed.dequantize());
        for (found, weight) in found.iter().zip(&weight) {
            prop_assert!((found - weight).abs() <= 1e-6 * 2.0);
        }
        let again = rtn.quantize(packed.dequantize(), None).unwrap().weight;
        prop_assert_eq!(again.to_parts(), parts);
    }

    /// A group that takes both ends of its affine grid keeps its codes. (A symmetric grid's lowest
    /// level lies beyond the range that it was made from.)
    #[test]
    fn quantizing_again_changes_no_code(case in cases()) {
        let rtn = case.rtn.with_symmetric(false);
        let packed = rtn.quantize(case.tensor(), None).unwrap().weight;
        let again = rtn.quantize(packed.dequantize(), None).unwrap().weight;
        let (first, second) = (packed.to_parts(), scales(&again));
        let zeros = first.zeros.unwrap();
        let [d_in, d_out] = case.dims;
        let max_code = ((1u16 << packed.format().bits()) - 1) as u8;
        let (codes, again) = (packed.codes(), again.codes());
        for (at, (&scale, &zero)) in scales(&packed).iter().zip(&zeros).enumerate() {
            let (g, o) = (at / d_out, at % d_out);
            let rows = g * case.group_size()..d_in.min((g + 1) * case.group_size());
            let column = |codes: &[u8]| rows.clone().map(|i| codes[i * d_out + o]).collect::<Vec<_>>();
            let group = column(&codes);
            let taken = |code| group.contains(&code) || zero == f32::from(code);
            if taken(0) && taken(max_code) {
                prop_assert_eq!(column(&again), group);
                prop_assert!((scale - second[at]).abs() <= 1e-6 * scale);
            }
        }
    }

    #[test]
    fn a_power_of_two_scales_the_scales_alone(case in cases(), k in -6..6i32) {
        let factor = 2f32.powi(k);
        let first = case.quantize();
        let second = case.rtn.quantize(case.tensor() * factor, None).unwrap().weight;
        let zero_group = |g: usize, o: usize| {
            let rows = g * case.group_size()..case.dims[0].min((g + 1) * case.group_size());
            rows.into_iter().all(|i| case.weight[i * case.dims[1] + o] == 0.0)
        };
        prop_assert_eq!(first.codes(), second.codes());
        prop_assert_eq!(first.to_parts().zeros, second.to_parts().zeros);
        for (at, (a, b)) in scales(&first).iter().zip(&scales(&second)).enumerate() {
            let factor = if zero_group(at / case.dims[1], at % case.dims[1]) { 1.0 } else { factor };
            prop_assert_eq!(a * factor, *b);
        }
    }

    /// Other values in one group of one column change nothing elsewhere.
    #[test]
    fn groups_and_columns_are_independent(case in cases(), at in any::<prop::sample::Index>()) {
        let at = at.index(case.weight.len());
        let [_, d_out] = case.dims;
        let same_group = |other: usize| {
            other % d_out == at % d_out
                && other / d_out / case.group_size() == at / d_out / case.group_size()
        };
        let mut other = case.clone();
        other.weight[at] = 1e3 - other.weight[at];
        let (first, second) = (values(case.quantize().dequantize()), values(other.quantize().dequantize()));
        for (at, (first, second)) in first.iter().zip(&second).enumerate() {
            prop_assert!(first == second || same_group(at));
        }
    }
}

#[test]
fn groups_without_a_range_are_kept() {
    for symmetric in [false, true] {
        for value in [0.0, 1e-45, -3e-45, 1e-38, 3.0, -0.25, 1e30] {
            let rtn = Rtn::new()
                .with_bits(3)
                .with_group_size(2)
                .with_symmetric(symmetric);
            let packed = rtn
                .quantize(tensor(vec![value; 4], [4, 1]), None)
                .unwrap()
                .weight;
            let scale = scales(&packed)[0];
            let error = (values(packed.dequantize())[0] - value).abs();
            // The symmetric grid clips its largest positive value by half a step.
            assert!(
                scale > 0.0 && error <= scale * 0.5001,
                "{value}: {error} with {scale}"
            );
        }
    }
}

/// Costs beyond what a float holds leave the full range.
#[test]
fn a_search_that_overflows_keeps_the_range() {
    let weight = || tensor(vec![-1e30, 0.3e30, 0.7e30, 1e30], [4, 1]);
    let full = Rtn::new()
        .with_bits(2)
        .quantize(weight(), None)
        .unwrap()
        .weight;
    let rtn = Rtn::new().with_bits(2).with_range(GroupRange::Clipped);
    let clipped = rtn.quantize(weight(), None).unwrap().weight;
    assert_eq!(clipped.to_parts(), full.to_parts());
    assert_eq!(
        rtn.with_per_tensor(true).format(),
        Err(Error::SearchPerTensor)
    );
}

#[test]
fn a_span_beyond_f32_is_refused() {
    let weight = tensor(vec![-3e38, 3e38], [2, 1]);
    let error = Rtn::new().quantize(weight, None).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Span {
                group: 0,
                column: 0,
                ..
            }
        ),
        "{error}"
    );
}
