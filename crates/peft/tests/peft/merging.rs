use burn::tensor::Tensor;
use peft::{Error, Exactness, Fingerprint, Linears, MergeConfig, OffGrid, Peqa, Weight};
use proptest::prelude::*;
use quant_core::{Quantizer, Rtn, StoredGrid};

use crate::cases::{Merge, Tuning, cases};
use crate::model::{Bigram, batch, difference, logits, quantized, tune};
use crate::property;

/// Codes, scales and zeros.
type OnGrid = (Vec<u8>, Vec<f32>, Option<Vec<f32>>);

/// The codes and grids of the packed layers.
fn codes(model: &Bigram) -> Vec<OnGrid> {
    let linears = model.linears().into_iter();
    let packed = linears.filter_map(|(_, linear)| match linear.weight() {
        Weight::Quant(weight) => Some(weight.clone()),
        Weight::Dense(_) => None,
    });
    let values = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
    packed
        .map(|weight| {
            (
                weight.codes(),
                values(weight.scales()),
                weight.zeros().map(values),
            )
        })
        .collect()
}

/// The part of the way from `base` to `sum` that `found` has gone.
fn kept(base: &[f32], sum: &[f32], found: &[f32]) -> f64 {
    let along = |to: &[f32]| -> f64 {
        let steps = (0..base.len()).map(|at| {
            let [base, sum, to] = [base[at], sum[at], to[at]].map(f64::from);
            (to - base) * (sum - base)
        });
        steps.sum()
    };
    along(found) / along(sum)
}

proptest! {
    #![proptest_config(property(64))]

    /// A merge changes no bit where it is exact, and nothing that f32 could tell where it is bounded;
    /// codes and scales stay. A sum that codes cannot hold is refused, and merges in the ways that
    /// are asked for by name.
    #[test]
    fn merging_keeps_what_was_tuned(case in cases(), seed in 0..1000u64) {
        let mut model = case.adapted(seed);
        let (base, before, on_grid) = (Fingerprint::of(&model), logits(&model), codes(&model));
        tune(&mut model, seed);
        let adapted = model.clone();
        prop_assert_ne!(logits(&adapted), before.clone());
        // The base is frozen.
        prop_assert_eq!(Fingerprint::of(&model), base.clone());
        let merge = case.merge().unwrap();
        if merge == Merge::OffGrid {
            let error = peft::merge(&mut model).unwrap_err();
            let named = matches!(&error, Error::MergeIntoPacked { path, .. } if path == "mlp.up");
            prop_assert!(named, "{}", error);
            prop_assert_eq!(logits(&model), logits(&adapted));
            let dense = peft::merge_with(&mut model, OffGrid::Dense).unwrap();
            prop_assert!(dense.layers.iter().all(|layer| layer.format.is_none()));
            prop_assert_eq!(dense.kind(), "bounded");
            prop_assert!(difference(&adapted, &model) < 1e-5);

            let mut rounded = adapted.clone();
            let eight = Rtn::new().with_bits(8).with_group_size(32);
            let probe = batch(99, [2, 9]);
            let certificate = peft::merge_probed(&mut rounded, OffGrid::Round(&eight), &probe).unwrap();
            prop_assert_eq!(certificate.kind(), "rounded");
            certificate.verify(&rounded).unwrap();
            let weights = |model: &Bigram| -> Vec<Vec<f32>> {
                let linears = model.linears().into_iter();
                let dense = linears.map(|(_, linear)| linear.weight().to_dense());
                dense.map(|weight| weight.into_data().try_into_vec().unwrap()).collect()
            };
            let [base, sum, found] = [&adapted, &model, &rounded].map(weights);
            for (at, layer) in certificate.layers.iter().enumerate() {
                let Exactness::Rounded { relative_error, retention } = layer.exactness else {
                    panic!("{:?}", layer.exactness);
                };
                prop_assert_eq!(layer.format, Some(eight.format().unwrap()));
                let [error, all] = [&found[at], &vec![0.0; sum[at].len()]].map(|other| {
                    let differences = sum[at].iter().zip(other).map(|(a, b)| f64::from(a - b));
                    differences.map(|d| d * d).sum::<f64>().sqrt()
                });
                prop_assert!((relative_error - error / all).abs() < 1e-5, "{}", relative_error);
                let expected = kept(&base[at], &sum[at], &found[at]);
                prop_assert!((retention - expected).abs() < 1e-5, "{} {}", retention, expected);
            }
            let measured = certificate.probe.unwrap();
            let mut plain = adapted.clone();
            peft::detach(&mut plain).unwrap();
            let [base, sum, found] = [&plain, &adapted, &rounded].map(|model| {
                logits(model).into_iter().map(f32::from_bits).collect::<Vec<_>>()
            });
            prop_assert!((measured.retention - kept(&base, &sum, &found)).abs() < 1e-9);
            let change = |a: &[f32], b: &[f32]| {
                let changes = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
                changes.fold(0.0, f64::max)
            };
            prop_assert_eq!(measured.max_adapter_change, change(&base, &sum));
            prop_assert_eq!(measured.max_merge_change, change(&sum, &found));
            return Ok(());
        }
        let probe = batch(99, [2, 9]);
        let certificate = peft::merge_probed(&mut model, OffGrid::Refuse, &probe).unwrap();
        let measured = certificate.probe.unwrap();
        prop_assert_eq!(measured.n_logits, before.len());
        prop_assert!(measured.max_adapter_change > 0.0);
        match merge {
            Merge::Exact => {
                prop_assert!(certificate.is_exact());
                prop_assert_eq!(certificate.kind(), "exact");
                prop_assert_eq!(logits(&model), logits(&adapted));
                prop_assert_eq!((measured.max_merge_change, measured.retention), (0.0, 1.0));
            }
            _ => {
                prop_assert_eq!(certificate.kind(), "bounded");
                prop_assert!(difference(&adapted, &model) < 1e-5, "{}", certificate);
                prop_assert!((measured.retention - 1.0).abs() < 1e-3, "{}", certificate);
                for layer in &certificate.layers {
                    let Exactness::Bounded { max_weight_error, max_weight } = layer.exactness else {
                        panic!("{:?}", layer.exactness);
                    };
                    // LoRA states a bound, tiles a measured error.
                    let bound = match case.tuning {
                        Tuning::Tile(..) => 1e-6,
                        _ => 1e-4,
                    };
                    prop_assert!(max_weight_error <= bound * max_weight, "{}", certificate);
                }
            }
        }
        // The same codes; of scales and zeros, only those that the method trains are others.
        for (before, after) in on_grid.iter().zip(codes(&model)) {
            prop_assert_eq!(&before.0, &after.0);
            prop_assert_eq!(before.1 == after.1, matches!(case.tuning, Tuning::Tile(..)));
            prop_assert_eq!(before.2 == after.2, !case.trains_zeros());
        }
        certificate.verify(&model).unwrap();
        let mut other = model.clone();
        other.embedding = other.embedding.map(|embedding| embedding + 1e-3);
        for stranger in [case.base.model(seed), other] {
            let refused = matches!(certificate.verify(&stranger), Err(Error::NotMerged { .. }));
            prop_assert!(refused);
        }
        prop_assert!(matches!(peft::merge(&mut model), Err(Error::NoAdapters)));
    }

    /// Rounded for a file, each packed layer has scales and zeros that the file holds, on its codes, and
    /// the certificate says what of the adapter is left; a layer that is held already does not change.
    #[test]
    fn a_merge_is_rounded_to_what_a_file_holds(case in cases(), seed in 0..1000u64) {
        let mut adapted = case.adapted(seed);
        tune(&mut adapted, seed);
        if case.merge().unwrap() == Merge::OffGrid {
            return Ok(());
        }
        let mut base = adapted.clone();
        peft::detach(&mut base).unwrap();
        let (mut plain, mut rounded) = (adapted.clone(), adapted.clone());
        let expected = peft::merge(&mut plain).unwrap();
        let stored = StoredGrid::new().with_f16_scales(true).with_whole_zeros_from(0);
        let config = MergeConfig::new().with_stored_grid(stored);
        let certificate = peft::merge_probed(&mut rounded, config, &batch(99, [2, 9])).unwrap();
        certificate.verify(&rounded).unwrap();
        let values = |weight: &Weight| weight.to_dense().into_data().try_into_vec::<f32>().unwrap();
        let layers = certificate.layers.iter().zip(&expected.layers);
        let weights = base.linears().into_iter().zip(plain.linears()).zip(rounded.linears());
        for ((layer, expected), (((_, base), (_, plain)), (_, rounded))) in layers.zip(weights) {
            let (Weight::Quant(before), Weight::Quant(after)) = (plain.weight(), rounded.weight()) else {
                prop_assert_eq!(layer, expected);
                continue;
            };
            prop_assert!(stored.holds(after));
            prop_assert_eq!(after.codes(), before.codes());
            if stored.holds(before) {
                prop_assert_eq!(layer, expected);
                prop_assert_eq!(after.to_parts(), before.to_parts());
                continue;
            }
            let Exactness::Rounded { relative_error, retention } = layer.exactness else {
                panic!("{:?}", layer.exactness);
            };
            let [base, sum, found] = [base, plain, rounded].map(|linear| values(linear.weight()));
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
            };
            let error = norm(&mut sum.iter().zip(&found).map(|(a, b)| a - b));
            let error = error / norm(&mut sum.iter().copied());
            prop_assert!((relative_error - error).abs() < 1e-5, "{} {}", relative_error, error);
            let kept = kept(&base, &sum, &found);
            prop_assert!((retention - kept).abs() < 1e-3 * kept.abs().max(1.0), "{} {}", retention, kept);
        }
        // What was trained on the grid of the file is exact.
        let is_held = matches!(&case.tuning, Tuning::Peqa(peqa)
            if *peqa == Peqa::new().with_f16_scales(true));
        if is_held {
            prop_assert!(certificate.is_exact());
            prop_assert_eq!(logits(&rounded), logits(&adapted));
        }
    }
}

/// A layer without an adapter is rounded too, and listed.
#[test]
fn layers_without_adapters_are_rounded_for_a_file() {
    let mut model = quantized(1, &Rtn::new().with_group_size(32));
    peft::attach(&mut model, &Peqa::new().with_targets(["down"])).unwrap();
    tune(&mut model, 1);
    let stored = StoredGrid::new().with_f16_scales(true);
    let config = MergeConfig::new().with_stored_grid(stored);
    let certificate = peft::merge_with(&mut model, config).unwrap();
    let [up, down] = &certificate.layers[..] else {
        panic!("{certificate}");
    };
    assert_eq!([&*up.path, &*up.method], ["mlp.up", "none"]);
    assert_eq!([&*down.path, &*down.method], ["mlp.down", "PEQA"]);
    let Exactness::Rounded {
        relative_error,
        retention,
    } = up.exactness
    else {
        panic!("{certificate}");
    };
    assert_eq!(retention, 1.0);
    assert!(0.0 < relative_error && relative_error < 2f64.powi(-11));
    assert_eq!(certificate.kind(), "rounded");
    certificate.verify(&model).unwrap();
}
