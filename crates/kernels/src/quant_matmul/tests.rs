//! Comparison of the native operations with the composed ones and with sums in `f64`.

use burn::backend::Flex;
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use proptest::prelude::*;

use super::packed::{Packed, Precision, Zeros};
use super::{QuantOps, composed, dequantize, quant_matmul};
use crate::layout::{Layout, Levels};
use crate::pack::{columns_to_tiles, pack, tiles_to_columns, unpack};
use crate::testing::*;

/// Unsorted levels, as in FP4.
const TABLE: [f32; 16] = [
    0.0, 0.01, 0.7, 1.0, 0.3, 0.5, 0.2, 0.25, -0.1, -0.02, -0.6, -1.0, -0.35, -0.55, -0.15, -0.3,
];

/// A weight with its inputs and the gradient of its outputs, in host memory.
#[derive(Clone, Debug)]
struct Case {
    layout: Layout,
    rows: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Option<Vec<f32>>,
    x: Vec<f32>,
    dy: Vec<f32>,
}

fn cases() -> impl Strategy<Value = Case> {
    // Few rows and many, groups of any size and groups that integer units support.
    let rows = prop_oneof![3 => 1..9usize, 1 => 9..40usize];
    let group = prop_oneof![
        1..320usize,
        prop::sample::select(vec![16, 32, 48, 64, 96, 128, 192, 256, 512, 1024])
    ];
    let sizes = (rows, 1..600usize, 1..150usize, group);
    let grid = (
        prop::sample::select(vec![2, 3, 4, 8]),
        any::<bool>(),
        0..3u8,
    );
    (sizes, grid, any::<u64>()).prop_map(
        |((rows, d_in, d_out, group), (bits, zeros, levels), seed)| {
            let levels = match levels {
                0 => Levels::Unsigned,
                1 if bits <= 4 => Levels::Table(TABLE),
                _ => Levels::Centered,
            };
            let layout = Layout::new(d_in, d_out, bits, group, levels);
            Case::new(layout, rows, zeros, seed)
        },
    )
}

impl Case {
    fn new(layout: Layout, rows: usize, zeros: bool, seed: u64) -> Self {
        let (d_in, d_out) = (layout.d_in(), layout.d_out());
        let most = ((1 << layout.bits()) - 1) as f32;
        let mut random = Random::new(seed);
        let n_grid = layout.n_groups() * d_out;
        let scales = random.floats(n_grid, 0.01, 0.1);
        let zeros = zeros.then(|| random.floats(n_grid, 0.0, most));
        let x = random.floats(rows * d_in, -1.0, 1.0);
        let dy = random.floats(rows * d_out, -1.0, 1.0);
        let codes = random.floats(d_in * d_out, 0.0, most + 1.0);
        let codes = codes.iter().map(|&c| c as u8).collect();
        Self {
            layout,
            rows,
            codes,
            scales,
            zeros,
            x,
            dy,
        }
    }

    fn offset(&self, i: usize, o: usize) -> f32 {
        let at = i / self.layout.group_size() * self.layout.d_out() + o;
        let zero = self.zeros.as_ref().map_or(0.0, |zeros| zeros[at]);
        self.layout.level(self.codes[i * self.layout.d_out() + o]) - zero
    }

    fn weight(&self, i: usize, o: usize) -> f32 {
        self.offset(i, o) * self.scales[i / self.layout.group_size() * self.layout.d_out() + o]
    }

    fn words(&self) -> Tensor<3, Int> {
        let words = TensorData::new(pack(&self.codes, &self.layout), self.layout.words_shape());
        Tensor::from_data(words, (&Device::flex(), DType::U32))
    }

    fn floats(&self, values: &[f32], shape: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    fn x(&self) -> Tensor<2> {
        self.floats(&self.x, [self.rows, self.layout.d_in()])
    }

    fn dy(&self) -> Tensor<2> {
        self.floats(&self.dy, [self.rows, self.layout.d_out()])
    }

    fn scales(&self) -> Tensor<2> {
        self.floats(&self.scales, self.layout.grid_shape())
    }

    fn zeros(&self) -> Option<Tensor<2>> {
        let zeros = self.zeros.as_ref()?;
        Some(self.floats(zeros, self.layout.grid_shape()))
    }

    fn packed(&self) -> Packed<Flex> {
        Packed {
            words: self.words().try_into_primitive::<Flex>().unwrap(),
            scales: primitive(&self.scales()),
            zeros: match self.zeros() {
                Some(zeros) => Zeros::Each(primitive(&zeros)),
                None => Zeros::Absent,
            },
            layout: self.layout,
            precision: Precision::Full,
        }
    }

    /// The magnitude of the terms of a weight: the steps from its zero, and one for the fraction of the
    /// zero. (For zeros beyond 255, that is larger.)
    fn parts(&self, i: usize, o: usize) -> f64 {
        let at = i / self.layout.group_size() * self.layout.d_out() + o;
        let zero = self.zeros.as_ref().map_or(0.0, |zeros| zeros[at]) + self.layout.center();
        let steps = self.offset(i, o).abs() + 1.0 + (zero - 255.0).max(0.0);
        f64::from(self.scales[at]) * f64::from(steps)
    }

    /// The sums over `k` of the terms in `f64`, and of their bounds, for each row and column.
    fn sums(
        &self,
        n: usize,
        m: usize,
        k: usize,
        f: impl Fn(usize, usize, usize) -> [f64; 2],
    ) -> Vec<[f64; 2]> {
        let sum = |r: usize, c: usize| {
            (0..k).fold([0.0, 0.0], |[s, b], k| {
                let [term, bound] = f(r, c, k);
                [s + term, b + bound]
            })
        };
        (0..n)
            .flat_map(|r| (0..m).map(move |c| (r, c)))
            .map(|(r, c)| sum(r, c))
            .collect()
    }
}

/// The largest magnitude in each row of `width` values.
fn largest(values: &[f32], width: usize) -> Vec<f64> {
    let largest = |row: &[f32]| row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    values
        .chunks_exact(width)
        .map(|row| f64::from(largest(row)))
        .collect()
}

/// Asserts an error of at most a few units in the last place of the largest value of a row, per term.
///
/// That is the accuracy of fixed point with 24 bits and of `f32`; a wrong term is off by a million times
/// as much.
#[track_caller]
fn assert_near(found: &[f32], expected: &[[f64; 2]]) {
    assert_eq!(found.len(), expected.len());
    for (at, (&found, [sum, bound])) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - sum).abs();
        assert!(error <= 1e-6 * bound, "{found} for {sum} at {at}");
    }
}

proptest! {
    #[test]
    fn pack_and_tiles_are_invertible(case in cases()) {
        let words = pack(&case.codes, &case.layout);
        prop_assert_eq!(unpack(&words, &case.layout), case.codes);
        let columns = tiles_to_columns(&words, &case.layout);
        prop_assert_eq!(columns_to_tiles(&columns, &case.layout), words);
    }

    #[test]
    fn unpacked_weights_are_the_formula_bit_for_bit(case in cases()) {
        let (d_in, d_out) = (case.layout.d_in(), case.layout.d_out());
        let expected: Vec<f32> =
            (0..d_in * d_out).map(|at| case.weight(at / d_out, at % d_out)).collect();
        prop_assert_eq!(bits(&primitive_values(Flex::quant_unpack(case.packed()))), bits(&expected));
        prop_assert_eq!(bits(&primitive_values(composed::unpack(case.packed()))), bits(&expected));
    }

    #[test]
    fn products_and_gradients_are_the_sums(case in cases()) {
        let (rows, d_in, d_out) = (case.rows, case.layout.d_in(), case.layout.d_out());
        let x = |r: usize, i: usize| f64::from(case.x[r * d_in + i]);
        let dy = |r: usize, o: usize| f64::from(case.dy[r * d_out + o]);
        let w = |i, o| f64::from(case.weight(i, o));

        let (x_most, dy_most) = (largest(&case.x, d_in), largest(&case.dy, d_out));
        let y = Flex::quant_matmul(primitive(&case.x()), case.packed());
        assert_near(&primitive_values(y), &case.sums(rows, d_out, d_in, |r, o, i| {
            [x(r, i) * w(i, o), x_most[r] * case.parts(i, o)]
        }));
        // `dy` is multiplied by the scales first.
        let scale = |i: usize, o: usize| f64::from(case.scales[i / case.layout.group_size() * d_out + o]);
        let most = (0..d_out).map(|o| (0..d_in).map(|i| scale(i, o)).fold(0.0, f64::max)).fold(0.0, f64::max);
        let dx = Flex::quant_matmul_dx(primitive(&case.dy()), case.packed());
        assert_near(&primitive_values(dx), &case.sums(rows, d_in, d_out, |r, i, o| {
            [dy(r, o) * w(i, o), dy_most[r] * most * case.parts(i, o) / scale(i, o)]
        }));

        let (n_groups, size) = (case.layout.n_groups(), case.layout.group_size());
        let group = |g: usize| g * size..d_in.min((g + 1) * size);
        let over_group = |f: &dyn Fn(usize, usize, usize) -> [f64; 2]| {
            case.sums(n_groups, d_out, size * rows, |g, o, k| {
                let i = g * size + k / rows;
                if group(g).contains(&i) { f(i, o, k % rows) } else { [0.0; 2] }
            })
        };
        let bound = |o: usize, r: usize| x_most[r] * dy(r, o).abs();
        let dscales = over_group(&|i, o, r| {
            let term = x(r, i) * dy(r, o) * f64::from(case.offset(i, o));
            [term, bound(o, r) * case.parts(i, o) / scale(i, o)]
        });
        let dzeros = over_group(&|i, o, r| {
            [-scale(i, o) * x(r, i) * dy(r, o), bound(o, r) * scale(i, o)]
        });
        let native = Flex::quant_matmul_dgrid(primitive(&case.dy()), primitive(&case.x()), case.packed());
        let reference = composed::dgrid(primitive(&case.dy()), primitive(&case.x()), case.packed());
        for (ds, dz) in [native, reference] {
            assert_near(&primitive_values(ds), &dscales);
            assert_near(&primitive_values(dz), &dzeros);
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit(case in cases()) {
        assert_same_on_any_threads(|| {
            let y = Flex::quant_matmul(primitive(&case.x()), case.packed());
            let dx = Flex::quant_matmul_dx(primitive(&case.dy()), case.packed());
            let (ds, dz) =
                Flex::quant_matmul_dgrid(primitive(&case.dy()), primitive(&case.x()), case.packed());
            [y, dx, ds, dz].map(primitive_values).to_vec()
        });
    }

    /// Through `Tensor` and autodiff, with untracked words and a view as `x`.
    #[test]
    fn backward_gives_the_gradients_of_each_parent(case in cases()) {
        let x = case.x().transpose().autodiff().require_grad();
        let scales = case.scales().autodiff().require_grad();
        let zeros = case.zeros().map(|z| z.autodiff().require_grad());
        let y = quant_matmul(x.clone().transpose(), case.words(), scales.clone(), zeros.clone(), case.layout, Precision::Full);
        let grads = (y * case.dy().autodiff()).sum().backward();

        let dx = Flex::quant_matmul_dx(primitive(&case.dy()), case.packed());
        let found = x.grad(&grads).unwrap().transpose().into_data().try_to_vec::<f32>().unwrap();
        prop_assert_eq!(bits(&found), bits(&primitive_values(dx)));
        let (ds, dz) =
            Flex::quant_matmul_dgrid(primitive(&case.dy()), primitive(&case.x()), case.packed());
        let found = scales.grad(&grads).unwrap().into_data().try_to_vec::<f32>().unwrap();
        prop_assert_eq!(bits(&found), bits(&primitive_values(ds)));
        if let Some(zeros) = zeros {
            let found = zeros.grad(&grads).unwrap().into_data().try_to_vec::<f32>().unwrap();
            prop_assert_eq!(bits(&found), bits(&primitive_values(dz)));
        }
    }
}

/// With more inputs than a panel has, more rows than a slab, a strip without a partner, and an
/// incomplete tile of columns; and gradients of inputs from more outputs than a block has.
#[test]
fn products_of_many_panels_are_the_sums() {
    let sizes = [(530, 2100, 70), (40, 70, 1300)];
    let levels = [
        (4, Levels::Unsigned),
        (8, Levels::Unsigned),
        (4, Levels::Table(TABLE)),
    ];
    for ((rows, d_in, d_out), (bits, levels)) in sizes
        .into_iter()
        .flat_map(|sizes| levels.map(|levels| (sizes, levels)))
    {
        let layout = Layout::new(d_in, d_out, bits, 64, levels);
        let case = Case::new(layout, rows, true, 5);
        let weights: Vec<[f64; 2]> = (0..d_in * d_out)
            .map(|at| (at / d_out, at % d_out))
            .map(|(i, o)| [case.weight(i, o).into(), case.parts(i, o)])
            .collect();
        let (x_most, dy_most) = (largest(&case.x, d_in), largest(&case.dy, d_out));
        let some = [0, 15, 16, 31, 32, 271, 272, 303, 511, 512, 529];
        let some: Vec<usize> = some.into_iter().filter(|row| *row < rows).collect();
        let of_rows = |found: Vec<f32>, width: usize| -> Vec<f32> {
            let row = |row: &usize| found[row * width..][..width].to_vec();
            some.iter().flat_map(row).collect()
        };
        let y = primitive_values(Flex::quant_matmul(primitive(&case.x()), case.packed()));
        let expected = case.sums(some.len(), d_out, d_in, |at, o, i| {
            let (row, [w, parts]) = (some[at], weights[i * d_out + o]);
            [f64::from(case.x[row * d_in + i]) * w, x_most[row] * parts]
        });
        assert_near(&of_rows(y, d_out), &expected);
        let dx = primitive_values(Flex::quant_matmul_dx(primitive(&case.dy()), case.packed()));
        let expected = case.sums(some.len(), d_in, d_out, |at, i, o| {
            let (row, [w, parts]) = (some[at], weights[i * d_out + o]);
            [
                f64::from(case.dy[row * d_out + o]) * w,
                dy_most[row] * parts,
            ]
        });
        assert_near(&of_rows(dx, d_in), &expected);

        let (ds, dz) =
            Flex::quant_matmul_dgrid(primitive(&case.dy()), primitive(&case.x()), case.packed());
        let (ds, dz) = (primitive_values(ds), primitive_values(dz));
        for g in [0, layout.n_groups() / 2, layout.n_groups() - 1] {
            let inputs = g * 64..d_in.min((g + 1) * 64);
            let term = |o: usize, k: usize| {
                let (i, row) = (inputs.start + k / rows, k % rows);
                let product =
                    f64::from(case.x[row * d_in + i]) * f64::from(case.dy[row * d_out + o]);
                let scale = f64::from(case.scales[g * d_out + o]);
                (
                    product,
                    weights[i * d_out + o].map(|part| part / scale),
                    scale,
                )
            };
            let n = inputs.len() * rows;
            let expected = case.sums(1, d_out, n, |_, o, k| {
                let (product, [offset, parts], _) = term(o, k);
                [product * offset, parts]
            });
            assert_near(&ds[g * d_out..][..d_out], &expected);
            let expected = case.sums(1, d_out, n, |_, o, k| {
                let (product, _, scale) = term(o, k);
                [-product * scale, scale]
            });
            assert_near(&dz[g * d_out..][..d_out], &expected);
        }
    }
}

#[test]
fn no_rows_give_no_rows() {
    let device = Device::flex();
    let layout = Layout::new(32, 3, 4, 16, Levels::Unsigned);
    let words = TensorData::new(pack(&[3; 96], &layout), layout.words_shape());
    let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
    let scales = Tensor::<2>::ones(layout.grid_shape(), &device);
    let x = Tensor::<2>::zeros([0, 32], &device);
    let (x, scales) = (
        x.autodiff().require_grad(),
        scales.autodiff().require_grad(),
    );
    let y = quant_matmul(
        x.clone(),
        words,
        scales.clone(),
        None,
        layout,
        Precision::Full,
    );
    assert_eq!(y.dims(), [0, 3]);
    let grads = y.sum().backward();
    assert_eq!(x.grad(&grads).unwrap().dims(), [0, 32]);
    let dscales = scales.grad(&grads).unwrap().into_data();
    assert!(dscales.iter::<f32>().all(|ds| ds == 0.0));
}

/// The error of `Full` is at most that of a product in `f32`.
#[test]
fn the_errors_of_both_precisions_are_bounded() {
    let device = Device::flex();
    device.seed(3);
    let (d_in, d_out) = (1024, 96);
    let kinds = [
        (2, Levels::Unsigned),
        (3, Levels::Unsigned),
        (4, Levels::Centered),
        (4, Levels::Table(TABLE)),
        (8, Levels::Unsigned),
    ];
    // The number of rows selects the unit that multiplies.
    for (rows, (bits, levels)) in [1, 3, 24]
        .into_iter()
        .flat_map(|rows| kinds.map(|kind| (rows, kind)))
    {
        let layout = Layout::new(d_in, d_out, bits, 128, levels);
        let codes: Vec<u8> = (0..d_in * d_out)
            .map(|i| ((i * 2_654_435_761) >> 16) as u8 % (1 << bits))
            .collect();
        let words = TensorData::new(pack(&codes, &layout), layout.words_shape());
        let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
        let random = |shape, low, high| {
            Tensor::<2>::random(shape, Distribution::Uniform(low, high), &device)
        };
        // With an outlier in each row, of a hundred times the other values.
        let x = Tensor::<2>::random([rows, d_in], Distribution::Normal(0.0, 1.0), &device);
        let outlier = Tensor::<2>::full([rows, 1], 100.0, &device);
        let x = x.slice_assign([0..rows, 200..201], outlier);
        let scales = random(layout.grid_shape(), 0.01, 0.02);
        let middle = f64::from((1 << bits) - 1) / 2.0;
        let zeros = (levels == Levels::Unsigned)
            .then(|| random(layout.grid_shape(), middle - 0.5, middle + 0.5));
        let dense = dequantize(words.clone(), scales.clone(), zeros.clone(), layout);

        let doubles = |t: Tensor<2>| t.cast(DType::F64);
        let norm = |t: Tensor<2>| t.square().sum().sqrt().into_scalar::<f64>();
        let error = |found: Tensor<2>, exact: &Tensor<2>| {
            norm(doubles(found) - exact.clone()) / norm(exact.clone())
        };
        let dy = Tensor::<2>::random([rows, d_out], Distribution::Normal(0.0, 1.0), &device);
        let with = |precision| {
            let x = x.clone().autodiff().require_grad();
            let (words, scales, zeros) = (words.clone(), scales.clone(), zeros.clone());
            let y = quant_matmul(x.clone(), words, scales, zeros, layout, precision);
            let grads = (y.clone() * dy.clone().autodiff()).sum().backward();
            [y.inner(), x.grad(&grads).unwrap()]
        };
        let factors = [(x.clone(), dense.clone()), (dy.clone(), dense.transpose())];
        let found = with(Precision::Full).into_iter().zip(with(Precision::Fast));
        for ((a, b), (full, fast)) in factors.into_iter().zip(found) {
            let exact = doubles(a.clone()).matmul(doubles(b.clone()));
            let plain = error(a.matmul(b), &exact);
            let (full, fast) = (error(full, &exact), error(fast, &exact));
            assert!(
                full <= 1.2 * plain + 1e-7,
                "{bits} bits, {rows} rows: {full:e}, in f32 {plain:e}"
            );
            assert!(fast <= 5e-4, "{bits} bits, {rows} rows: {fast:e}");
        }
    }
}

/// Values that fixed point cannot represent.
#[test]
fn values_that_are_not_finite_propagate_and_the_smallest_count() {
    let device = Device::flex();
    let levels = [Levels::Unsigned, Levels::Table(TABLE)];
    for (rows, levels) in [2, 20]
        .into_iter()
        .flat_map(|rows| levels.map(|levels| (rows, levels)))
    {
        let layout = Layout::new(300, 3, 4, 64, levels);
        let words = TensorData::new(pack(&[3; 900], &layout), layout.words_shape());
        let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
        let scales = Tensor::<2>::ones(layout.grid_shape(), &device);
        let product = |value: f32| {
            let x = Tensor::<2>::zeros([rows, 300], &device);
            let x = x.slice_assign([1..2, 299..300], Tensor::full([1, 1], value, &device));
            let y = quant_matmul(
                x,
                words.clone(),
                scales.clone(),
                None,
                layout,
                Precision::Full,
            );
            let y: Vec<f32> = y.into_data().try_to_vec().unwrap();
            assert!(y[..3].iter().chain(&y[6..]).all(|y| y.to_bits() == 0));
            y[3]
        };
        let level = layout.level(3);
        assert!(product(f32::NAN).is_nan());
        assert!(!product(f32::INFINITY).is_finite());
        for value in [1e-37f32, -3e-33, 1e-20, 1e37] {
            let (found, exact) = (product(value), value * level);
            // Half of the smallest normal number, times the code.
            let least = 3.0 * 0.5 * f32::MIN_POSITIVE;
            let off = (found - exact).abs();
            assert!(off <= 1e-6 * exact.abs() + least, "{found} for {value}");
        }
    }
}

/// A column whose codes equal its zero gives exactly 0, also where the zero is the largest code.
#[test]
fn weights_of_zero_give_exactly_zero() {
    let device = Device::flex();
    for (bits, rows) in [2, 3, 4, 8]
        .into_iter()
        .flat_map(|bits| [(bits, 1), (bits, 3), (bits, 40)])
    {
        let layout = Layout::new(200, 2, bits, 64, Levels::Unsigned);
        let last = ((1u32 << bits) - 1) as u8;
        let codes: Vec<u8> = (0..200).flat_map(|i| [last, i as u8 & last]).collect();
        let words = TensorData::new(pack(&codes, &layout), layout.words_shape());
        let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
        let scales = Tensor::<2>::full(layout.grid_shape(), 0.3, &device);
        let zeros = Tensor::<2>::full(layout.grid_shape(), f32::from(last), &device);
        let x = Tensor::<2>::random([rows, 200], Distribution::Normal(0.0, 1.0), &device);
        let y = quant_matmul(x, words, scales, Some(zeros), layout, Precision::Full);
        let y: Vec<f32> = y.into_data().try_to_vec().unwrap();
        assert!(
            y.chunks(2).all(|y| y[0] == 0.0 && y[1] != 0.0),
            "{bits} bits, {rows} rows"
        );
    }
}

/// `y` is linear in the scales and in the zeros, so a difference quotient is exact except for rounding.
#[test]
fn gradients_agree_with_differences() {
    let device = Device::flex();
    device.seed(7);
    let layout = Layout::new(40, 6, 3, 16, Levels::Unsigned);
    let codes: Vec<u8> = (0..240).map(|i| (i * 5 % 8) as u8).collect();
    let words = TensorData::new(pack(&codes, &layout), layout.words_shape());
    let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
    let random = |shape| Tensor::<2>::random(shape, Distribution::Uniform(0.5, 1.5), &device);
    let (x, scales, zeros, dy) = (
        random([5, 40]),
        random([3, 6]),
        random([3, 6]),
        random([5, 6]),
    );
    let loss = |x: &Tensor<2>, scales: &Tensor<2>, zeros: &Tensor<2>| {
        let y = quant_matmul(
            x.clone(),
            words.clone(),
            scales.clone(),
            Some(zeros.clone()),
            layout,
            Precision::Full,
        );
        (y * dy.clone()).sum()
    };
    let (tx, ts, tz) = (leaf(&x), leaf(&scales), leaf(&zeros));
    let y = quant_matmul(
        tx.clone(),
        words.clone(),
        ts.clone(),
        Some(tz.clone()),
        layout,
        Precision::Full,
    );
    let grads = (y * leaf(&dy)).sum().backward();

    let h = 0.5;
    let bump = |at: [usize; 2], shape: [usize; 2]| {
        let mut values = vec![0.0; shape[0] * shape[1]];
        values[at[0] * shape[1] + at[1]] = h;
        Tensor::<2>::from_data(TensorData::new(values, shape), &device)
    };
    let slope = |high: Tensor<1>, low: Tensor<1>| (high - low).into_scalar::<f32>() / (2.0 * h);
    let at = |t: Tensor<2>, [i, j]: [usize; 2]| t.slice([i..i + 1, j..j + 1]).into_scalar::<f32>();
    for (p, q) in [([0, 0], [0, 0]), ([4, 39], [2, 5]), ([2, 20], [1, 3])] {
        let d = bump(p, [5, 40]);
        let dx = slope(
            loss(&(x.clone() + d.clone()), &scales, &zeros),
            loss(&(x.clone() - d), &scales, &zeros),
        );
        let d = bump(q, [3, 6]);
        let ds = slope(
            loss(&x, &(scales.clone() + d.clone()), &zeros),
            loss(&x, &(scales.clone() - d.clone()), &zeros),
        );
        let dz = slope(
            loss(&x, &scales, &(zeros.clone() + d.clone())),
            loss(&x, &scales, &(zeros.clone() - d)),
        );
        for (found, expected) in [
            (at(tx.grad(&grads).unwrap(), p), dx),
            (at(ts.grad(&grads).unwrap(), q), ds),
            (at(tz.grad(&grads).unwrap(), q), dz),
        ] {
            approx::assert_relative_eq!(found, expected, max_relative = 1e-3, epsilon = 1e-3);
        }
    }
}
