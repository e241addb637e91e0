//! The laws of every quantizer and format, over random weights.

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use proptest::prelude::*;
use quant_core::{
    DoubleQuant, Error, Format, Gram, Grid, GroupRange, NormalFloat, Optq, Order, Parts,
    QuantTensor, Quantizer, Rtn, ScaleLevels, Scales,
};

/// A weight with a quantizer of uniform grids.
#[derive(Clone, Debug)]
struct Case {
    dims: [usize; 2],
    weight: Vec<f32>,
    rtn: Rtn,
}

/// A weight with any quantizer, and what it may ask for.
#[derive(Clone, Debug)]
struct AnyCase {
    dims: [usize; 2],
    weight: Vec<f32>,
    method: Method,
    gram: Gram,
}

#[derive(Clone, Copy, Debug)]
enum Method {
    Rtn(Rtn),
    NormalFloat(NormalFloat),
    Optq(Optq),
}

impl Method {
    fn get(&self) -> &dyn Quantizer {
        match self {
            Method::Rtn(method) => method,
            Method::NormalFloat(method) => method,
            Method::Optq(method) => method,
        }
    }
}

fn any_cases() -> impl Strategy<Value = AnyCase> {
    (cases(), 0..17u8, any::<u64>()).prop_map(|(case, kind, seed)| {
        let Case { dims, weight, rtn } = case;
        let format = rtn.format().unwrap();
        let (bits, group) = (format.bits(), format.group_size());
        let narrow = bits.min(4);
        let nf = NormalFloat::new().with_bits(narrow).with_block_size(group);
        let optq = Optq::new().with_bits(bits).with_group_size(group);
        let optq = optq.with_symmetric(format.grid() == Grid::Symmetric);
        let unsigned = DoubleQuant {
            levels: ScaleLevels::Unsigned { bits },
            block_size: 5,
        };
        let method = match kind {
            0 => Method::Rtn(rtn),
            1 => Method::Rtn(rtn.with_range(GroupRange::Clipped)),
            2 => Method::Rtn(rtn.with_range(GroupRange::ClippedForOutput)),
            3 => Method::Rtn(rtn.with_per_tensor(true)),
            4 => Method::NormalFloat(nf),
            5 => Method::NormalFloat(nf.with_offset_by_bits(true)),
            6 => Method::NormalFloat(NormalFloat::float4().with_block_size(group)),
            7 => Method::NormalFloat(nf.with_double_quant(DoubleQuant::dynamic())),
            8 => Method::NormalFloat(nf.with_double_quant(unsigned)),
            9 => Method::Optq(optq.with_order(Order::DescendingRegrouped)),
            10 => Method::Optq(optq.with_order(Order::Descending)),
            11 => Method::Optq(optq.with_order(Order::DescendingByGroup)),
            12 => Method::Optq(optq.with_stale_groups(true)),
            13 => Method::Optq(optq.with_range(GroupRange::Clipped).with_f16_scales(true)),
            14 => Method::Optq(optq.with_range(GroupRange::ClippedForOutput)),
            15 => Method::Optq(optq.with_drift(0.25)),
            _ => Method::Optq(optq),
        };
        let device = Device::flex();
        device.seed(seed);
        let mut gram = Gram::new(dims[0], &device);
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<2>::random([2 * dims[0], dims[0]], normal, &device);
        gram.update_with_drift(x.clone(), x * 1.1);
        AnyCase {
            dims,
            weight,
            method,
            gram,
        }
    })
}

impl AnyCase {
    fn quantize(&self) -> QuantTensor {
        let weight = tensor(self.weight.clone(), self.dims);
        let quantized = self.method.get().quantize(weight, Some(&self.gram));
        quantized.unwrap().weight
    }
}

/// The scales of each group, whatever form they have.
fn scales(packed: &QuantTensor) -> Vec<f32> {
    values(packed.scales())
}

fn cases() -> impl Strategy<Value = Case> {
    (1..80usize, 1..80usize)
        .prop_flat_map(|(d_in, d_out)| {
            let value = prop_oneof![
                8 => -1.0..1.0f32,
                1 => Just(0.0f32),
                1 => -1e4..1e4f32,
            ];
            let weight = prop::collection::vec(value, d_in * d_out);
            let bits = prop::sample::select(vec![2, 3, 4, 8]);
            (
                Just([d_in, d_out]),
                weight,
                bits,
                prop::option::of(1..=d_in),
                any::<bool>(),
            )
        })
        .prop_map(|(dims, weight, bits, group_size, symmetric)| Case {
            dims,
            weight,
            rtn: Rtn::new()
                .with_bits(bits)
                .with_group_size(group_size)
                .with_symmetric(symmetric),
        })
}

impl Case {
    fn tensor(&self) -> Tensor<2> {
        tensor(self.weight.clone(), self.dims)
    }

    fn quantize(&self) -> QuantTensor {
        self.rtn.quantize(self.tensor(), None).unwrap().weight
    }

    fn group_size(&self) -> usize {
        self.rtn
            .format()
            .unwrap()
            .group_size()
            .unwrap_or(self.dims[0])
    }
}

fn tensor(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

fn values(t: Tensor<2>) -> Vec<f32> {
    t.into_data().try_into_vec().unwrap()
}

proptest! {
    #[test]
    fn parts_are_the_tensor(case in any_cases()) {
        let packed = case.quantize();
        let parts = packed.to_parts();
        let again =
            QuantTensor::from_parts(parts.clone(), packed.format(), case.dims, &Device::flex()).unwrap();
        prop_assert_eq!(again.to_parts(), parts);
        prop_assert_eq!(again.codes(), packed.codes());
        // Files have no padding: a tile is the same without what it was padded with.
        let columns = Parts::from_columns(&packed.columns(), &packed.layout(), vec![], None).unwrap();
        prop_assert_eq!(columns.words, packed.to_parts().words);
        prop_assert_eq!(values(again.dequantize()), values(packed.dequantize()));
    }

    /// The dense weight is what the codes, scales and zeros say, bit for bit, and the product with
    /// the packed one is that with the dense one.
    #[test]
    fn a_weight_is_its_codes_scales_and_zeros(case in any_cases(), rows in 1..4usize) {
        let packed = case.quantize();
        let [d_in, d_out] = case.dims;
        let (codes, scales, layout) = (packed.codes(), scales(&packed), packed.layout());
        let zeros = packed.zeros().map(values);
        let mut row_of = (0..d_in).collect::<Vec<_>>();
        for (row, input) in packed.input_order().unwrap_or_default().into_iter().enumerate() {
            row_of[input as usize] = row;
        }
        for (at, found) in values(packed.dequantize()).into_iter().enumerate() {
            let grid = row_of[at / d_out] / layout.group_size() * d_out + at % d_out;
            let zero = zeros.as_ref().map_or(0.0, |zeros| zeros[grid]);
            let expected = (layout.level(codes[at]) - zero) * scales[grid];
            prop_assert_eq!(found.to_bits(), expected.to_bits());
        }
        let x: Vec<f32> = (0..rows * d_in).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let x = tensor(x, [rows, d_in]);
        let dense = packed.dequantize();
        let magnitude = values(x.clone().abs().matmul(dense.clone().abs()));
        let expected = values(x.clone().matmul(dense));
        let found = values(packed.matmul(x));
        for ((found, expected), magnitude) in found.iter().zip(&expected).zip(&magnitude) {
            prop_assert!((found - expected).abs() <= 1e-5 * magnitude);
        }
        let n_bytes = packed.format().n_bytes(case.dims).unwrap() as usize;
        let order = if packed.input_order().is_some() { 8 * d_in } else { 0 };
        prop_assert_eq!(packed.n_bytes(), n_bytes + order);
    }

    /// The codes of a codebook are those of the nearest levels.
    #[test]
    fn codebooks_round_to_the_nearest_level(case in any_cases()) {
        let Method::NormalFloat(method) = case.method else { return Ok(()) };
        let packed = case.quantize();
        // With bitsandbytes' double quantization the codes are those of the exact scales.
        let dynamic = packed.format().double_quant().is_some_and(|d| d.levels == ScaleLevels::Dynamic);
        let used = match dynamic {
            true => {
                let weight = tensor(case.weight.clone(), case.dims);
                scales(&method.with_double_quant(None).quantize(weight, None).unwrap().weight)
            }
            false => scales(&packed),
        };
        let (layout, [_, d_out]) = (packed.layout(), case.dims);
        let levels: Vec<f64> = (0..1u8 << layout.bits()).map(|code| f64::from(layout.level(code))).collect();
        for (at, (&w, &code)) in case.weight.iter().zip(&packed.codes()).enumerate() {
            let scale = f64::from(used[at / d_out / layout.group_size() * d_out + at % d_out]);
            let error = |level: f64| (level * scale - f64::from(w)).abs();
            let least = levels.iter().map(|&level| error(level)).fold(f64::INFINITY, f64::min);
            let found = error(levels[usize::from(code)]);
            prop_assert!(found <= least + 1e-6 * scale.abs(), "{w} on {scale}");
        }
    }

    /// A searched range costs at most what the full one does, in its own measure.
    #[test]
    fn a_searched_range_costs_no_more(case in any_cases()) {
        let Method::Rtn(_) = case.method else { return Ok(()) };
        let format = case.method.get().format().unwrap();
        let rtn = Rtn::new()
            .with_bits(format.bits())
            .with_group_size(format.group_size())
            .with_symmetric(format.grid() == Grid::Symmetric);
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

    #[test]
    fn non_finite_weights_are_refused(
        case in any_cases(),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let mut case = case;
        let at = at.index(case.weight.len());
        case.weight[at] = bad;
        let d_out = case.dims[1];
        let weight = tensor(case.weight.clone(), case.dims);
        let error = case.method.get().quantize(weight, Some(&case.gram)).unwrap_err();
        let found = matches!(error, Error::NonFinite { row, column, count: 1, .. }
            if [row, column] == [at / d_out, at % d_out]);
        prop_assert!(found, "{error}");
    }

    /// A row of one sign, and one with an outlier (that scales in f16 can step): nothing breaks, and
    /// zero stays zero.
    #[test]
    fn hard_groups_are_kept(case in any_cases(), outlier in 1e3..9e4f32) {
        for hard in [
            case.weight.iter().map(|w| w.abs()).collect::<Vec<_>>(),
            case.weight.iter().map(|w| -w.abs()).collect(),
            std::iter::once(outlier).chain(case.weight[1..].iter().copied()).collect(),
        ] {
            let packed = AnyCase { weight: hard.clone(), ..case.clone() }.quantize();
            for (found, w) in values(packed.dequantize()).iter().zip(&hard) {
                prop_assert!(found.is_finite());
                let rounds_each = !matches!(case.method, Method::Optq(_));
                prop_assert!(!rounds_each || *w != 0.0 || *found == 0.0, "zero became {found}");
            }
        }
    }
}

/// Relative errors of methods.md §1.5 on Gaussian weights, within 1 %, and falling with the bits.
#[test]
fn gaussian_weights_have_the_known_errors() {
    let device = Device::flex();
    device.seed(11);
    let weight = Tensor::<2>::random([4096, 512], Distribution::Normal(0.0, 1.0), &device);
    let rows = [
        (Some(32), false, [0.4063, 0.1731, 0.0808, 0.00475]),
        (Some(64), false, [0.4571, 0.1952, 0.0911, 0.00536]),
        (Some(128), false, [0.5032, 0.2155, 0.1006, 0.00592]),
        (None, false, [0.6826, 0.2995, 0.1398, 0.00822]),
        (Some(64), true, [0.5109, 0.2203, 0.1028, 0.00605]),
        (Some(128), true, [0.5496, 0.2373, 0.1108, 0.00652]),
        (None, true, [0.7096, 0.3145, 0.1468, 0.00864]),
    ];
    for (group_size, symmetric, errors) in rows {
        for (bits, expected) in [2, 3, 4, 8].into_iter().zip(errors) {
            let rtn = Rtn::new()
                .with_bits(bits)
                .with_group_size(group_size)
                .with_symmetric(symmetric);
            check_error(&rtn, &weight, expected);
        }
    }
    let clipped = [
        (Some(64), [0.3566, 0.1769, 0.0874]),
        (Some(128), [0.3705, 0.1875, 0.0952]),
        (None, [0.3882, 0.2027, 0.1097]),
    ];
    for (group_size, errors) in clipped {
        for (bits, expected) in [2, 3, 4].into_iter().zip(errors) {
            let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
            check_error(&rtn.with_range(GroupRange::Clipped), &weight, expected);
        }
    }
    for (by_bits, errors) in [
        (false, [0.5628, 0.2016, 0.09196]),
        (true, [0.5643, 0.1974, 0.09196]),
    ] {
        for (bits, expected) in [2, 3, 4].into_iter().zip(errors) {
            let nf = NormalFloat::new()
                .with_bits(bits)
                .with_offset_by_bits(by_bits);
            check_error(&nf, &weight, expected);
        }
    }
}

fn check_error(method: &dyn Quantizer, weight: &Tensor<2>, expected: f64) {
    let packed = method.quantize(weight.clone(), None).unwrap().weight;
    let found = packed.distortion(weight.clone()).relative;
    let off = (found / expected - 1.0).abs();
    assert!(off < 0.01, "{}: {found}, not {expected}", packed.format());
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

#[test]
fn formats_that_do_not_exist_are_refused() {
    let weight = || tensor(vec![1.0; 8], [8, 1]);
    for bits in [0, 1, 5, 6, 7, 9, 16, usize::MAX] {
        assert_eq!(
            Rtn::new()
                .with_bits(bits)
                .quantize(weight(), None)
                .unwrap_err(),
            Error::Bits { bits }
        );
    }
    let error = Rtn::new()
        .with_group_size(0)
        .quantize(weight(), None)
        .unwrap_err();
    assert_eq!(error, Error::EmptyGroup);
    let error = Rtn::new()
        .with_group_size(9)
        .quantize(weight(), None)
        .unwrap_err();
    assert_eq!(
        error,
        Error::GroupSize {
            group_size: 9,
            d_in: 8
        }
    );
    let format = |bits, grid| Format::new(bits, Some(32), grid).unwrap_err();
    for (bits, grid) in [
        (8, Grid::NormalFloat),
        (3, Grid::Float4),
        (8, Grid::NormalFloatByBits),
    ] {
        assert_eq!(format(bits, grid), Error::GridBits { bits, grid });
    }
    let affine = Format::new(4, Some(32), Grid::Affine).unwrap();
    assert!(affine.with_double_quant(DoubleQuant::dynamic()).is_err());
    let unsigned = |bits, block_size| DoubleQuant {
        levels: ScaleLevels::Unsigned { bits },
        block_size,
    };
    let nf4 = Format::new(4, Some(64), Grid::NormalFloat).unwrap();
    for bad in [unsigned(1, 8), unsigned(9, 8), unsigned(4, 0)] {
        assert!(nf4.with_double_quant(bad).is_err());
    }
    let double = nf4.with_double_quant(unsigned(4, 16)).unwrap();
    let json = serde_json::to_string(&double).unwrap();
    assert_eq!(serde_json::from_str::<Format>(&json).unwrap(), double);
    let json = r#"{"bits":5,"group_size":null,"grid":"affine"}"#;
    assert!(serde_json::from_str::<quant_core::Format>(json).is_err());
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let packed = Rtn::new()
        .with_bits(3)
        .quantize(tensor(vec![1.0; 12], [6, 2]), None)
        .unwrap()
        .weight;
    let (format, parts) = (packed.format(), packed.to_parts());
    let make = |parts: Parts, dims| QuantTensor::from_parts(parts, format, dims, &Device::flex());
    assert!(make(parts.clone(), [6, 2]).is_ok());
    let length = |what, expected, found| Error::Length {
        what,
        expected,
        found,
    };
    let error = make(parts.clone(), [12, 2]).unwrap_err();
    assert_eq!(error, length("words", 128, 64));
    let error = make(
        Parts {
            scales: Scales::Float(vec![1.0]),
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert_eq!(error, length("scales", 2, 1));
    let error = make(
        Parts {
            zeros: None,
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert_eq!(
        error,
        Error::Zeros {
            grid: Grid::Affine,
            found: false
        }
    );
    let error = make(
        Parts {
            scales: Scales::Float(vec![1.0, f32::NAN]),
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert!(matches!(
        error,
        Error::NonFinite {
            what: "the scales",
            column: 1,
            ..
        }
    ));
    let error = make(parts, [usize::MAX, 2]).unwrap_err();
    assert!(matches!(error, Error::Size { .. }));
}

/// `Rᵀ R = G + δ I`, upper triangular; of too few tokens, of none that is not zero, and of no inputs.
#[test]
fn a_gram_has_a_root() {
    let device = Device::flex();
    let values = |n: usize| (0..n).map(|at| ((at * 7919 % 1009) as f32 - 504.0) / 504.0);
    for (n_tokens, d_in, damping) in [(40, 12, 1e-6), (5, 12, 1e-6), (700, 300, 1e-4)] {
        let x: Vec<f32> = values(n_tokens * d_in).collect();
        let x = Tensor::<1>::from_floats(&x[..], &device).reshape([n_tokens, d_in]);
        let mut gram = Gram::new(d_in, &device);
        gram.update(x);
        let root = gram.root().unwrap();
        let product = root.clone().transpose().matmul(root.clone());
        let found: Vec<f32> = product.into_data().try_into_vec().unwrap();
        let sum: Vec<f32> = gram.sum().into_data().try_into_vec().unwrap();
        let mean = sum.iter().step_by(d_in + 1).sum::<f32>() / d_in as f32;
        for (at, (found, sum)) in found.iter().zip(&sum).enumerate() {
            // The least damping that serves, and the rounding of a product in f32.
            let on_diagonal = at % (d_in + 1) == 0;
            let damping = if on_diagonal { damping * mean } else { 0.0 };
            assert!(
                (found - sum - damping).abs() < 1e-5 * mean,
                "{found} for {sum}"
            );
        }
        let root: Vec<f32> = root.into_data().try_into_vec().unwrap();
        assert!((0..d_in * d_in).all(|at| at / d_in <= at % d_in || root[at] == 0.0));
    }
    let mut zeros = Gram::new(3, &device);
    zeros.update(Tensor::<2>::zeros([4, 3], &device));
    let root = zeros.root().unwrap();
    let root: Vec<f32> = root.into_data().try_into_vec().unwrap();
    assert!(root[0] > 0.0 && root[0] == root[4] && root[1] == 0.0);
    assert_eq!(Gram::new(3, &device).root().unwrap_err(), Error::EmptyGram);
    let sum = Tensor::<2>::from_floats([[1.0, 3.0], [3.0, 1.0]], &device);
    let impossible = Gram::from_sum(sum, 2).unwrap();
    assert_eq!(impossible.root().unwrap_err(), Error::NotPositive);
}

/// On the grid that a quantizer found, a weight has the quantizer's codes.
#[test]
fn a_weight_is_rounded_to_a_grid_found_elsewhere() {
    let device = Device::flex();
    let values: Vec<f32> = (0..30 * 8)
        .map(|at| ((at * 7919 % 1009) as f32 - 504.0) / 504.0)
        .collect();
    let weight = Tensor::<1>::from_floats(&values[..], &device).reshape([30, 8]);
    for symmetric in [false, true] {
        let rtn = Rtn::new()
            .with_bits(3)
            .with_group_size(8)
            .with_symmetric(symmetric);
        let packed = rtn.quantize(weight.clone(), None).unwrap().weight;
        let on_grid =
            |scales, zeros| QuantTensor::on_grid(weight.clone(), packed.format(), scales, zeros);
        let found = on_grid(packed.scales(), packed.zeros()).unwrap();
        assert_eq!(found.codes(), packed.codes());
        let error = on_grid(packed.scales() * 0.0, packed.zeros()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NoGrid {
                    what: "the scales",
                    ..
                }
            ),
            "{error}"
        );
        match packed.zeros() {
            Some(zeros) => {
                let error = on_grid(packed.scales(), Some(zeros + 0.5)).unwrap_err();
                assert!(
                    matches!(
                        error,
                        Error::NoGrid {
                            what: "the zeros",
                            ..
                        }
                    ),
                    "{error}"
                );
                let error = on_grid(packed.scales(), None).unwrap_err();
                assert!(matches!(error, Error::Zeros { .. }), "{error}");
            }
            None => {
                let error = on_grid(packed.scales(), Some(packed.scales())).unwrap_err();
                assert!(matches!(error, Error::Zeros { .. }), "{error}");
            }
        }
    }
    let nf = NormalFloat::new().with_block_size(8);
    let packed = nf.quantize(weight.clone(), None).unwrap().weight;
    let error = QuantTensor::on_grid(weight.clone(), packed.format(), packed.scales(), None);
    assert!(matches!(error.unwrap_err(), Error::Scales { .. }));
    let rtn = Rtn::new().quantize(weight.clone(), None).unwrap().weight;
    let nan = weight * f32::NAN;
    let error = QuantTensor::on_grid(nan, rtn.format(), rtn.scales(), rtn.zeros());
    assert!(matches!(error.unwrap_err(), Error::NonFinite { .. }));
}

#[test]
fn squares_are_summed_in_double_precision() {
    let n = (1 << 16) + 77;
    let values = Tensor::<1>::full([n], 0.1f32, &Device::flex());
    let expected = n as f64 * f64::from(0.1f32).powi(2);
    let found = quant_core::sum_of_squares(values);
    assert!(
        (found - expected).abs() < 1e-12 * expected,
        "{found} {expected}"
    );
}
