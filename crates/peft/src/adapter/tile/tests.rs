use burn::tensor::{Device, TensorData};
use proptest::prelude::*;
use quant_core::{NormalFloat, Optq, Quantizer, Rtn};
use rand::RngExt;

use super::*;
use crate::adapter::tensors::layer_rng;
use crate::adapter::testing::Matrix;

#[derive(Debug)]
struct Case {
    weight: Tensor<2>,
    group: usize,
    bits: usize,
    adapter: TileAdapter,
    x: Tensor<2>,
    /// The gradient of the output.
    dy: Tensor<2>,
}

fn cases() -> impl Strategy<Value = Case> {
    let pooling = prop::sample::select(vec![Pooling::Sum, Pooling::Mean, Pooling::Peft]);
    let bits = prop::sample::select(vec![2usize, 3, 4, 8]);
    let tiles = (1..5usize, 1..6usize, 1..5usize, 1..5usize);
    (
        tiles,
        1..4usize,
        bits,
        pooling,
        1..9usize,
        any::<(bool, u64)>(),
    )
        .prop_map(
            |((n_pools, pool, n_out, repeat), in_tile, bits, pooling, rows, (one_matrix, seed))| {
                let mut rng = layer_rng(seed, "");
                let mut random = |dims: [usize; 2]| {
                    let n = dims[0] * dims[1];
                    let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
                    Tensor::<2>::from_data(TensorData::new(values, dims), &Device::flex())
                };
                // Groups that lie inside tiles of `pool * in_tile` inputs.
                let (group, pool) = (pool, pool * in_tile);
                let rank = n_pools.min(n_out);
                let settings = TileSettings {
                    tiles: if one_matrix {
                        TileMethod::QaHira
                    } else {
                        TileMethod::QaLora
                    },
                    pool,
                    repeat,
                    pooling,
                    alpha: 1.5,
                    rank,
                    dropout: 0.0,
                };
                let factor = if one_matrix {
                    Factor::Matrix(Param::from_tensor(random([n_pools, n_out])))
                } else {
                    Factor::Product(Product {
                        a: Param::from_tensor(random([n_pools, rank])),
                        b: Param::from_tensor(random([rank, n_out])),
                    })
                };
                let (d_in, d_out) = (n_pools * pool, n_out * repeat);
                Case {
                    weight: random([d_in, d_out]),
                    group,
                    bits,
                    adapter: TileAdapter::new(factor, settings),
                    x: random([rows, d_in]),
                    dy: random([rows, d_out]),
                }
            },
        )
}

/// `c F` for each weight.
fn added(adapter: &TileAdapter, dims: [usize; 2]) -> Matrix {
    let matrix = match adapter.factors() {
        Some((a, b)) => Matrix::of(a).times(&Matrix::of(b)),
        None => Matrix::of(adapter.matrix()),
    };
    let ([pool, repeat], scale) = (adapter.tile(), f64::from(adapter.scale()));
    Matrix::new(dims, |i, j| scale * matrix.at(i / pool, j / repeat))
}

fn near(expected: &Matrix, found: &Matrix) -> bool {
    let largest = expected
        .values
        .iter()
        .fold(0.1, |most: f64, v| most.max(v.abs()));
    (expected.values.iter().zip(&found.values)).all(|(e, f)| (e - f).abs() < 1e-5 * largest)
}

proptest! {
    /// Outputs, merges and gradients against the dense update in f64.
    #[test]
    fn it_is_the_update_that_it_stands_for(case in cases()) {
        let Case { weight, adapter, x, dy, .. } = case;
        let base = Weight::frozen(weight.clone());
        let update = added(&adapter, weight.dims());
        let [w, rows, d_rows] = [weight, x.clone(), dy.clone()].map(Matrix::of);
        let sum = w.plus(1.0, &update);
        prop_assert!(near(&rows.times(&sum), &Matrix::of(adapter.forward(&base, x.clone()))));
        let (merged, exactness) = adapter.to_dense(&base);
        let found = Matrix::of(merged);
        let errors = sum.values.iter().zip(&found.values).map(|(sum, found)| (sum - found).abs());
        let Exactness::Bounded { max_weight_error, .. } = exactness else { panic!("{exactness:?}") };
        prop_assert!(errors.fold(0.0, f64::max) <= max_weight_error && max_weight_error < 1e-4);

        let tracked = adapter.clone().train();
        let x = x.autodiff().require_grad();
        let gradients = (tracked.forward(&base, x.clone()) * dy.autodiff()).sum().backward();
        let dx = d_rows.times(&sum.t());
        prop_assert!(near(&dx, &Matrix::of(x.grad(&gradients).unwrap())));
        // The gradient of `F` is that of the dense update, summed over each tile.
        let dw = rows.t().times(&d_rows);
        let ([pool, repeat], scale) = (adapter.tile(), f64::from(adapter.scale()));
        let df = Matrix::new(adapter.n_tiles(), |i, j| {
            let inputs = i * pool..(i + 1) * pool;
            let outputs = |i| (j * repeat..(j + 1) * repeat).map(move |j| (i, j));
            scale * inputs.flat_map(outputs).map(|(i, j)| dw.at(i, j)).sum::<f64>()
        });
        match (&tracked.factor, adapter.factors()) {
            (Factor::Matrix(matrix), _) => {
                prop_assert!(near(&df, &Matrix::of(matrix.val().grad(&gradients).unwrap())));
            }
            (Factor::Product(product), Some((a, b))) => {
                let (a, b) = (Matrix::of(a), Matrix::of(b));
                let (da, db) = (df.times(&b.t()), a.t().times(&df));
                prop_assert!(near(&da, &Matrix::of(product.a.val().grad(&gradients).unwrap())));
                prop_assert!(near(&db, &Matrix::of(product.b.val().grad(&gradients).unwrap())));
            }
            _ => unreachable!("a product has factors"),
        }
    }

    /// Into a packed weight: the same codes and scales, zeros that make the weights the sums.
    #[test]
    fn it_merges_into_the_zeros(case in cases()) {
        let Case { weight, adapter, group, bits, .. } = case;
        let rtn = Rtn::new().with_bits(bits).with_group_size(Some(group));
        let packed = rtn.quantize(weight.clone(), None).unwrap().weight;
        adapter.check("up", &plain(&Weight::Quant(packed.clone()))).unwrap();
        let (merged, exactness) = adapter.on_codes("up", &packed).unwrap();
        prop_assert_eq!(merged.codes(), packed.codes());
        prop_assert_eq!(merged.format(), packed.format());
        prop_assert_eq!(floats(merged.scales()), floats(packed.scales()));
        // The weights in f64, as the numbers of the format define them.
        let parts = merged.to_parts();
        let (codes, zeros) = (packed.codes(), parts.zeros.unwrap());
        let (scales, d_out) = (floats(packed.scales()), weight.dims()[1]);
        let old = floats(packed.zeros().unwrap());
        let at = |zeros: &[f32], i: usize, j: usize| {
            let grid = i / group * d_out + j;
            f64::from(scales[grid]) * (f64::from(codes[i * d_out + j]) - f64::from(zeros[grid]))
        };
        let update = added(&adapter, weight.dims());
        let Exactness::Bounded { max_weight_error, max_weight } = exactness else {
            panic!("{exactness:?}");
        };
        let mut most = 0f64;
        for i in 0..weight.dims()[0] {
            for j in 0..d_out {
                let sum = at(&old, i, j) + update.at(i, j);
                most = most.max((at(&zeros, i, j) - sum).abs());
            }
        }
        prop_assert!(most <= max_weight_error && max_weight_error < 1e-6 * max_weight);
        // And the weights as they are in f32.
        let sums = Matrix::new(weight.dims(), |i, j| at(&old, i, j) + update.at(i, j));
        let found = Matrix::of(merged.dequantize());
        let errors = sums.values.iter().zip(&found.values).map(|(sum, found)| (sum - found).abs());
        let most = errors.fold(0.0, f64::max);
        prop_assert!(most <= max_weight_error, "{} {}", most, max_weight_error);
    }
}

fn settings(pool: usize, repeat: usize) -> TileSettings {
    TileSettings {
        tiles: TileMethod::QBara,
        pool,
        repeat,
        pooling: Pooling::Sum,
        alpha: 1.0,
        rank: 1,
        dropout: 0.0,
    }
}

fn plain(weight: &Weight) -> Linear {
    Linear::new(weight.clone(), None)
}

fn weight(dims: [usize; 2]) -> Tensor<2> {
    let n = dims[0] * dims[1];
    let values: Vec<f32> = (0..n)
        .map(|at| ((at * 37 % 101) as f32 - 50.0) / 50.0)
        .collect();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

/// Where the groups of a weight lie in no tile, or have no zeros, it is not merged, and the methods
/// that are meant to merge are not attached.
#[test]
fn groups_that_tiles_do_not_hold_are_refused() {
    let dense = weight([24, 6]);
    let rtn = |group| Rtn::new().with_group_size(group);
    let mut gram = quant_core::Gram::new(24, &Device::flex());
    gram.update(weight([40, 24]));
    let optq = Optq::new().with_group_size(Some(8));
    let optq = optq.with_order(quant_core::Order::DescendingRegrouped);
    let symmetric = rtn(Some(8)).with_symmetric(true);
    let packed = [
        (rtn(Some(8)).quantize(dense.clone(), None), 12, "straddle"),
        (rtn(Some(5)).quantize(dense.clone(), None), 6, "straddle"),
        (rtn(None).quantize(dense.clone(), None), 12, "straddle"),
        (symmetric.quantize(dense.clone(), None), 8, "no zeros"),
        (
            NormalFloat::new()
                .with_block_size(8)
                .quantize(dense.clone(), None),
            8,
            "no zeros",
        ),
        (optq.quantize(dense.clone(), Some(&gram)), 8, "desc_act"),
    ];
    for (packed, pool, problem) in packed {
        let packed = packed.unwrap().weight;
        let format = packed.format();
        let matrix = Param::from_tensor(weight([24 / pool, 6]));
        let adapter = TileAdapter::new(Factor::Matrix(matrix), settings(pool, 1));
        let error = adapter.on_codes("mlp.up", &packed).unwrap_err();
        let named = matches!(&error, Error::MergeIntoPacked { path, reason, .. }
            if path == "mlp.up" && reason.contains(problem));
        assert!(named, "{format}: {error}");
        let packed = Weight::Quant(packed);
        assert!(adapter.check("mlp.up", &plain(&packed)).is_ok());
        let error = Tile::qa_hira()
            .with_pool(pool)
            .init("mlp.up", &plain(&packed))
            .unwrap_err();
        let named = matches!(&error, Error::Tiles { path, problem: found, .. }
            if path == "mlp.up" && found.contains(problem));
        assert!(named, "{format}: {error}");
    }
    // One short group, in a tile of its own.
    let short = rtn(Some(16)).quantize(dense.clone(), None).unwrap().weight;
    let adapter = TileAdapter::new(
        Factor::Matrix(Param::from_tensor(weight([1, 6]))),
        settings(24, 1),
    );
    assert!(adapter.on_codes("mlp.up", &short).is_ok());
    // Groups whose inputs are in another order, all of them in one tile.
    let regrouped = optq.quantize(dense, Some(&gram)).unwrap().weight;
    let (merged, _) = adapter.on_codes("mlp.up", &regrouped).unwrap();
    let found = Matrix::of(merged.dequantize());
    let sum = Matrix::of(regrouped.dequantize()).plus(1.0, &added(&adapter, [24, 6]));
    assert!(near(&sum, &found));
}

#[test]
fn settings_out_of_range_are_refused() {
    let packed = Rtn::new()
        .with_group_size(Some(8))
        .quantize(weight([24, 6]), None);
    let packed = Weight::Quant(packed.unwrap().weight);
    let dense = Weight::frozen(weight([24, 6]));
    let refused = |tile: Tile, weight: &Weight| tile.init("mlp.up", &plain(weight)).unwrap_err();
    for tile in [
        Tile::qa_lora(0),
        Tile::qa_hira().with_pool(0),
        Tile::q_bara(1).with_repeat(0),
    ] {
        assert!(matches!(refused(tile, &packed), Error::Setting { .. }));
    }
    for alpha in [0.0, f32::NAN, f32::INFINITY, -1.0] {
        let error = refused(Tile::qa_lora(1).with_alpha(alpha), &packed);
        assert!(
            matches!(
                error,
                Error::Setting {
                    setting: "alpha",
                    ..
                }
            ),
            "{error}"
        );
    }
    for tile in [
        Tile::qa_hira().with_pool(16),
        Tile::qa_hira().with_repeat(4),
    ] {
        assert!(matches!(refused(tile, &packed), Error::Tiles { .. }));
    }
    // 3 pools, and 12 inputs and 3 outputs of pairs.
    for tile in [
        Tile::qa_lora(4),
        Tile::q_bara(2),
        Tile::qa_blora(4),
        Tile::q_bara(usize::MAX),
    ] {
        let error = refused(tile, &packed);
        let named = matches!(&error, Error::Tiles { path, problem, .. }
            if path == "mlp.up" && problem.contains("rank"));
        assert!(named, "{error}");
    }
    // A scale of 0 holds no update: refused before anything is trained.
    let Weight::Quant(without) = &packed else {
        panic!("not packed");
    };
    let zeros = without.zeros();
    let without = without.clone().with_grid(without.scales() * 0.0, zeros);
    let error = refused(Tile::qa_lora(2), &Weight::Quant(without.unwrap()));
    assert!(error.to_string().contains("scale of group 0"), "{error}");
    let error = refused(Tile::qa_lora(2), &dense);
    assert!(
        matches!(
            error,
            Error::NeedsQuantized {
                method: "QA-LoRA",
                ..
            }
        ),
        "{error}"
    );
    assert!(
        Tile::qa_lora(2)
            .with_pool(8)
            .init("mlp.up", &plain(&dense))
            .is_ok()
    );
}

#[test]
fn ranks_and_parameters_are_those_of_the_papers() {
    let packed = Rtn::new()
        .with_group_size(Some(32))
        .quantize(weight([256, 128]), None);
    let packed = Weight::Quant(packed.unwrap().weight);
    let adapter = |tile: Tile| match tile.init("mlp.up", &plain(&packed)).unwrap() {
        Adapter::Tile(adapter) => adapter,
        other => panic!("{}", other.method()),
    };
    let shapes = |adapter: &TileAdapter| {
        let (a, b) = adapter.factors().unwrap();
        (a.dims(), b.dims())
    };
    let qa_lora = adapter(Tile::qa_lora(4).with_alpha(1.0));
    assert_eq!(shapes(&qa_lora), ([8, 4], [4, 128]));
    assert_eq!((qa_lora.tile(), qa_lora.scale()), ([32, 1], 0.25));
    // As many parameters as LoRA of the rank, and twice the rank.
    let q_bara = adapter(Tile::q_bara(4).with_alpha(1.0));
    assert_eq!(shapes(&q_bara), ([128, 8], [8, 64]));
    assert_eq!(q_bara.num_params(), 4 * (256 + 128));
    assert_eq!((q_bara.tile(), q_bara.scale()), ([2, 2], 0.125));
    let qa_hira = adapter(Tile::qa_hira());
    assert_eq!(
        (qa_hira.num_params(), qa_hira.scale()),
        (256 * 128 / 32, 1.0)
    );
    let qa_blora = adapter(Tile::qa_blora(4));
    assert_eq!(shapes(&qa_blora), ([8, 4], [4, 64]));
    let scale = |pooling| adapter(Tile::qa_lora(4).with_pooling(pooling)).scale();
    assert_eq!(scale(Pooling::Mean), 1.0 / 32.0);
    assert_eq!(scale(Pooling::Peft), 8.0 / 32.0);
}
