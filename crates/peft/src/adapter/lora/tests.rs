use proptest::prelude::*;
use quant_core::{Quantizer, Rtn};

use burn::tensor::{Device, TensorData};
use rand::RngExt;

use super::*;
use crate::adapter::tensors::{layer_rng, trained};
use crate::adapter::testing::Matrix;

#[derive(Debug)]
struct Case {
    weight: Tensor<2>,
    adapter: LoraAdapter,
    x: Tensor<2>,
    /// The gradient of the output.
    dy: Tensor<2>,
}

fn cases() -> impl Strategy<Value = Case> {
    let alpha = prop::sample::select(vec![0.3f32, 1.0, 32.0]);
    let dims = (1..40usize, 1..40usize, 1..9usize);
    (dims, 1..=8usize, alpha, any::<u64>()).prop_map(|((d_in, d_out, rows), rank, alpha, seed)| {
        let rank = rank.min(d_in).min(d_out);
        let mut rng = layer_rng(seed, "");
        let mut random = |dims: [usize; 2]| {
            let n = dims[0] * dims[1];
            let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::<2>::from_data(TensorData::new(values, dims), &Device::flex())
        };
        Case {
            weight: random([d_in, d_out]),
            adapter: {
                let [a, b] = [random([d_in, rank]), random([rank, d_out])];
                LoraAdapter::from_factors(a, b, alpha / rank as f32).unwrap()
            },
            x: random([rows, d_in]),
            dy: random([rows, d_out]),
        }
    })
}

fn plain(weight: &Weight) -> Linear {
    Linear::new(weight.clone(), None)
}

fn refused(lora: &Lora, dims: [usize; 2]) -> Error {
    let weight = Weight::frozen(Tensor::zeros(dims, &Device::flex()));
    lora.init("mlp.up", &Linear::new(weight, None)).unwrap_err()
}

proptest! {
    /// Outputs, adapted and merged, and the merged weight against sums in f64.
    #[test]
    fn outputs_are_those_of_the_sum(case in cases()) {
        let Case { weight, adapter, x, .. } = case;
        let (d_in, rank) = (weight.dims()[0], adapter.rank());
        let scale = f64::from(adapter.alpha() / rank as f32);
        let [w, a, b, rows] = [weight.clone(), adapter.a(), adapter.b(), x.clone()].map(Matrix::of);
        let sum = w.plus(scale, &a.times(&b));
        let magnitudes = w.abs().plus(scale, &a.abs().times(&b.abs()));
        let y = rows.times(&sum);
        let y_magnitudes = rows.abs().times(&magnitudes);

        let base = Weight::frozen(weight);
        let adapted = Matrix::of(adapter.forward(&base, x.clone()));
        prop_assert!(y.is_near(&adapted, d_in + rank + 2, &y_magnitudes));
        let (merged, exactness) = adapter.to_dense(&base);
        let Exactness::Bounded { max_weight_error, max_weight } = exactness else {
            panic!("{exactness:?}");
        };
        let found = Matrix::of(merged.clone());
        prop_assert!(sum.is_near(&found, rank + 2, &magnitudes));
        let errors = sum.values.iter().zip(&found.values).map(|(sum, found)| (sum - found).abs());
        prop_assert!(errors.fold(0.0, f64::max) <= max_weight_error);
        prop_assert_eq!(max_weight, found.values.iter().fold(0f64, |most, w| most.max(w.abs())));
        prop_assert!(max_weight_error < 1e-5 * magnitudes.values.iter().fold(0.0, |most, &w| w.max(most)));
        let found = Matrix::of(Linear::new(Weight::frozen(merged), None).forward(x));
        prop_assert!(y.is_near(&found, d_in + rank + 2, &y_magnitudes));
        prop_assert!(adapted.is_near(&found, 2 * (d_in + rank + 2), &y_magnitudes));
    }

    /// Gradients against sums in f64.
    #[test]
    fn gradients_are_those_of_the_sum(case in cases()) {
        let Case { weight, adapter, x, dy } = case;
        let (rank, [rows, d_in]) = (adapter.rank(), x.dims());
        let (d_out, scale) = (weight.dims()[1], f64::from(adapter.scale()));
        let x = x.autodiff().require_grad();
        let base = Weight::frozen(weight.clone());
        let tracked = adapter.clone().train();
        let loss = (tracked.forward(&base, x.clone()) * dy.clone().autodiff()).sum();
        let gradients = loss.backward();
        let found = [
            tracked.a().grad(&gradients),
            tracked.b().grad(&gradients),
            x.grad(&gradients),
        ];
        let found = found.map(|gradient| Matrix::of(gradient.unwrap()));

        let [w, a, b, x, dy] =
            [weight, adapter.a(), adapter.b(), x.inner(), dy].map(Matrix::of);
        let expected = |[w, a, b, x, dy]: [&Matrix; 5]| {
            let zero = |m: &Matrix| Matrix::new(m.dims, |_, _| 0.0);
            [
                zero(a).plus(scale, &x.t().times(&dy.times(&b.t()))),
                zero(b).plus(scale, &x.times(a).t().times(dy)),
                dy.times(&w.t()).plus(scale, &dy.times(&b.t()).times(&a.t())),
            ]
        };
        let exact = expected([&w, &a, &b, &x, &dy]);
        let magnitudes = expected([&w.abs(), &a.abs(), &b.abs(), &x.abs(), &dy.abs()]);
        let roundings = [d_out + rows + 1, d_in + rows + 1, d_out + rank + 2];
        for (at, n) in roundings.into_iter().enumerate() {
            prop_assert!(exact[at].is_near(&found[at], n, &magnitudes[at]), "gradient {}", at);
        }
    }

    /// Over a packed weight: its product, and the same update as over a dense one.
    #[test]
    fn over_a_packed_weight_it_is_qlora(case in cases()) {
        let Case { weight, adapter, x, .. } = case;
        let zeros = Weight::frozen(weight.zeros_like());
        let rtn = Rtn::new().with_bits(3).with_group_size(weight.dims()[0].min(5));
        let packed = rtn.quantize(weight, None).unwrap();
        let packed = Weight::Quant(packed.weight);
        let expected = packed.matmul(x.clone()) + adapter.forward(&zeros, x.clone());
        let found = adapter.forward(&packed, x);
        let [found, expected] = [found, expected].map(|y| y.into_data().try_into_vec::<f32>().unwrap());
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn fresh_factors_are_uniform_and_follow_seed_and_path() {
    let weight = Weight::frozen(Tensor::zeros([400, 300], &Device::flex()));
    let a = |lora: &Lora, path| {
        let Adapter::Lora(adapter) = lora.init(path, &plain(&weight)).unwrap() else {
            panic!("another method");
        };
        assert_eq!(adapter.scale(), 2.0);
        assert_eq!(adapter.b().dims(), [50, 300]);
        assert!(Matrix::of(adapter.b()).values.iter().all(|&b| b == 0.0));
        Matrix::of(adapter.a()).values
    };
    let lora = Lora::new(50).with_alpha(100.0);
    let found = a(&lora, "mlp.up");
    assert_eq!(a(&lora, "mlp.up"), found);
    assert_ne!(a(&lora, "mlp.down"), found);
    assert_ne!(a(&lora.clone().with_seed(1), "mlp.up"), found);
    // The bound is 1/20, the variance a third of its square; within four standard deviations.
    let n = found.len() as f64;
    assert!(found.iter().all(|a| a.abs() <= 0.05 + 1e-9));
    let (sum, squares) = (found.iter()).fold((0.0, 0.0), |(s, q), a| (s + a, q + a * a));
    let variance = 0.05f64.powi(2) / 3.0;
    assert!((sum / n).abs() < 4.0 * (variance / n).sqrt());
    assert!((squares / n / variance - 1.0).abs() < 4.0 * (0.8 / n).sqrt());
}

#[test]
fn settings_out_of_range_are_refused() {
    let dims = [6, 4];
    for alpha in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = refused(&Lora::new(2).with_alpha(alpha), dims);
        let named = matches!(
            error,
            Error::Setting {
                setting: "alpha",
                ..
            }
        );
        assert!(named, "{error}");
    }
    let error = refused(&Lora::new(0).with_alpha(1.0), dims);
    let named = matches!(
        error,
        Error::Setting {
            setting: "rank",
            ..
        }
    );
    assert!(named, "{error}");
    for dims in [dims, [4, 6]] {
        let error = refused(&Lora::new(5), dims);
        let named = matches!(&error, Error::Rank { path, rank: 5, .. } if path == "mlp.up");
        assert!(named, "{error}");
    }
    let of = |dtype| {
        let weight = Tensor::<2>::zeros(dims, (&Device::flex(), dtype));
        Lora::new(1).init("mlp.up", &plain(&Weight::frozen(weight)))
    };
    assert!(matches!(of(DType::F64), Err(Error::NotF32 { .. })));
    assert!(of(DType::BF16).is_ok());
}

/// DoRA over a weight, with norms that are not those of the weight.
fn dora(case: &Case) -> LoraAdapter {
    let weight = Weight::frozen(case.weight.clone());
    let d_out = case.weight.dims()[1];
    let m = (0..d_out).map(|output| 0.5 + output as f32 / 7.0).collect();
    let m = trained::<1>(m, [d_out], &Device::flex());
    let settings = LoraSettings {
        dora: true,
        ..case.adapter.settings.clone()
    };
    let (a, b) = (case.adapter.a.clone(), case.adapter.b.clone());
    let mut adapter = LoraAdapter::new(a, b, Some(m), None, settings).unwrap();
    // With the norms of the weight at hand, and without.
    if d_out % 2 == 1 {
        adapter.bind(&weight);
    }
    adapter
}

proptest! {
    /// DoRA: outputs, merged weights, and gradients with the norms as constants, against sums in f64.
    #[test]
    fn dora_is_its_formula(case in cases()) {
        let adapter = dora(&case);
        let scale = f64::from(adapter.scale());
        let d_out = case.weight.dims()[1];
        let [w, a, b, x, dy] = [
            case.weight.clone(), adapter.a(), adapter.b(), case.x.clone(), case.dy.clone()
        ].map(Matrix::of);
        let sum = w.plus(scale, &a.times(&b));
        let norms: Vec<f64> = (0..d_out)
            .map(|j| (0..w.dims[0]).map(|i| sum.at(i, j).powi(2)).sum::<f64>().sqrt())
            .collect();
        // Directions that all but cancel have no digits left.
        let parts = w.abs().plus(scale, &a.abs().times(&b.abs()));
        prop_assume!((0..d_out).all(|j| {
            let largest = (0..w.dims[0]).map(|i| parts.at(i, j)).fold(0.0, f64::max);
            norms[j] > 0.05 * largest
        }));
        let m: Vec<f32> = adapter.magnitude().unwrap().into_data().try_into_vec().unwrap();
        let by_output = |values: &Matrix| Matrix::new(values.dims, |i, j| {
            values.at(i, j) * f64::from(m[j]) / norms[j]
        });
        let near = |expected: &Matrix, found: &Matrix| {
            let largest = expected.values.iter().fold(1e-3, |most: f64, v| most.max(v.abs()));
            (expected.values.iter().zip(&found.values)).all(|(e, f)| (e - f).abs() < 2e-4 * largest)
        };

        let base = Weight::frozen(case.weight.clone());
        let found = Matrix::of(adapter.forward(&base, case.x.clone()));
        prop_assert!(near(&by_output(&x.times(&sum)), &found));
        let (merged, exactness) = adapter.to_dense(&base);
        let found = Matrix::of(merged);
        prop_assert!(near(&by_output(&sum), &found));
        // With the factors that the adapted layer computes, within the bound.
        let factors: Vec<f32> = adapter.factors(&base).unwrap().into_data().try_into_vec().unwrap();
        let Exactness::Bounded { max_weight_error, .. } = exactness else { panic!("{exactness:?}") };
        let mut errors = (0..found.values.len()).map(|at| {
            let (i, j) = (at / d_out, at % d_out);
            (sum.at(i, j) * f64::from(factors[j]) - found.at(i, j)).abs()
        });
        prop_assert!(errors.all(|error| error <= max_weight_error));

        let tracked = adapter.clone().train();
        let loss = (tracked.forward(&base, case.x.autodiff()) * case.dy.autodiff()).sum();
        let gradients = loss.backward();
        let dy = by_output(&dy);
        let zero = |m: &Matrix| Matrix::new(m.dims, |_, _| 0.0);
        let da = zero(&a).plus(scale, &x.t().times(&dy.times(&b.t())));
        let db = zero(&b).plus(scale, &x.times(&a).t().times(&dy));
        prop_assert!(near(&da, &Matrix::of(tracked.a().grad(&gradients).unwrap())));
        prop_assert!(near(&db, &Matrix::of(tracked.b().grad(&gradients).unwrap())));
        let y = x.times(&sum);
        let dm = Matrix::new([1, d_out], |_, j| {
            (0..x.dims[0]).map(|row| dy.at(row, j) * y.at(row, j)).sum::<f64>() / f64::from(m[j])
        });
        let found = tracked.magnitude().unwrap().grad(&gradients).unwrap();
        prop_assert!(near(&dm, &Matrix::of(found.unsqueeze())));
    }
}

#[test]
fn dora_stays_finite_where_the_weight_is_cancelled() {
    let weight = (0..300)
        .map(|at| ((at * 37 % 101) as f32 - 50.0) / 50.0)
        .collect();
    let weight = trained::<2>(weight, [300, 1], &Device::flex())
        .val()
        .detach();
    let b = Tensor::from_data([[-1.0f32]], &Device::flex());
    let adapter = LoraAdapter::from_factors(weight.clone(), b, 1.0).unwrap();
    let base = Weight::frozen(weight);
    let m = trained::<1>(vec![1.0], [1], &Device::flex());
    let settings = LoraSettings {
        dora: true,
        ..adapter.settings.clone()
    };
    let adapter = LoraAdapter::new(adapter.a, adapter.b, Some(m), None, settings).unwrap();
    let factor = adapter.factors(&base).unwrap().into_scalar::<f32>();
    // The norm is taken for a thousandth of that of both parts.
    let norm = column_squares(&base).into_scalar::<f32>().sqrt();
    assert!(
        (factor * norm * 2f32.sqrt() / 1e3 - 1.0).abs() < 1e-3,
        "{factor} {norm}"
    );
}

/// A dense weight that trains beside DoRA has new norms at each step.
#[test]
fn dora_keeps_norms_of_frozen_weights_alone() {
    let lora = Lora::new(1).with_dora(true);
    for trains in [false, true] {
        let weight = trained::<2>(vec![0.5, -1.0, 2.0, 0.25], [2, 2], &Device::flex());
        let weight = Weight::Dense(weight.set_require_grad(trains));
        assert_eq!(weight.trains(), trains);
        let Adapter::Lora(mut adapter) = lora.init("up", &plain(&weight)).unwrap() else {
            panic!("another method");
        };
        adapter.bind(&weight);
        assert_eq!(adapter.magnitude.unwrap().squares.is_none(), trains);
    }
}

#[test]
fn ranks_are_stabilized_by_their_root() {
    let weight = Weight::frozen(Tensor::zeros([40, 30], &Device::flex()));
    let scale = |lora: Lora| {
        let Adapter::Lora(adapter) = lora.init("up", &plain(&weight)).unwrap() else {
            panic!("another method");
        };
        adapter.scale()
    };
    assert_eq!(scale(Lora::new(16).with_alpha(8.0)), 0.5);
    assert_eq!(
        scale(Lora::new(16).with_alpha(8.0).with_rank_stabilized(true)),
        2.0
    );
    assert_eq!(scale(Lora::new(16).with_rank_stabilized(true)), 1.0);
}

#[test]
fn dropout_drops_its_share_while_a_seed_is_set() {
    let weight = Weight::frozen(Tensor::zeros([64, 1], &Device::flex()));
    let lora = Lora::new(1).with_dropout(0.3);
    let Adapter::Lora(mut adapter) = lora.init("up", &plain(&weight)).unwrap() else {
        panic!("another method");
    };
    adapter.a = Param::from_tensor(Tensor::ones([64, 1], &Device::flex()));
    adapter.b = Param::from_tensor(Tensor::ones([1, 1], &Device::flex()));
    let x = Tensor::<2>::ones([500, 64], &Device::flex());
    let sums = |adapter: &LoraAdapter| {
        let y = adapter.forward(&weight, x.clone()).into_data();
        y.try_into_vec::<f32>().unwrap()
    };
    assert!(sums(&adapter).iter().all(|&y| y == 64.0));
    let mut seeded = |seed, path: &str| {
        adapter.dropout.seed(path, seed);
        sums(&adapter)
    };
    let first = seeded(Some(1), "up");
    // The same again: a block that is run twice drops the same.
    assert_eq!(seeded(Some(1), "up"), first);
    assert_ne!(seeded(Some(2), "up"), first);
    assert_ne!(seeded(Some(1), "down"), first);
    assert!(seeded(None, "up").iter().all(|&y| y == 64.0));
    // Each sum is `kept / 0.7`: mean 64, variance `64 · 0.3 / 0.7`; within four standard deviations.
    let n = first.len() as f64;
    let mean = first.iter().map(|&y| f64::from(y)).sum::<f64>() / n;
    let variance = first
        .iter()
        .map(|&y| (f64::from(y) - 64.0).powi(2))
        .sum::<f64>()
        / n;
    let expected = 64.0 * 0.3 / 0.7;
    assert!((mean - 64.0).abs() < 4.0 * (expected / n).sqrt(), "{mean}");
    assert!(
        (variance / expected - 1.0).abs() < 4.0 * (2.0 / n).sqrt(),
        "{variance}"
    );
    for probability in [-0.1, 1.0, f32::NAN] {
        let error = refused(&Lora::new(1).with_dropout(probability), [6, 4]);
        assert!(
            matches!(
                error,
                Error::Setting {
                    setting: "dropout",
                    ..
                }
            ),
            "{error}"
        );
    }
}
