use approx::assert_relative_eq;
use proptest::prelude::*;

use super::*;

fn normals(seed: u64, n: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Sums of twelve uniform numbers: mean 0, variance 1.
    let sum = |rng: &mut ChaCha8Rng| (0..12).map(|_| rng.random_range(-0.5..0.5)).sum();
    (0..n).map(|_| sum(&mut rng)).collect()
}

#[test]
fn quantiles_are_those_of_numpy() {
    // numpy.percentile([1, 2, 4, 8], [0, 10, 50, 97.5, 100])
    let sorted = [1.0, 2.0, 4.0, 8.0];
    for (part, expected) in [(0.0, 1.0), (0.1, 1.3), (0.5, 3.0), (0.975, 7.7), (1.0, 8.0)] {
        assert_relative_eq!(quantile(&sorted, part), expected, epsilon = 1e-12);
    }
    assert_eq!(quantile(&[3.0], 0.975), 3.0);
}

#[test]
fn two_items_have_three_means() {
    // 0, 1/2 and 1, with probabilities 1/4, 1/2, 1/4: 95 % spans all, 40 % the middle alone.
    let items = [0.0, 1.0];
    let wide = Bootstrap::new().mean(&items).unwrap();
    assert_eq!(
        (wide.lower, wide.value, wide.upper, wide.n),
        (0.0, 0.5, 1.0, 2)
    );
    let narrow = Bootstrap::new().with_confidence(0.4).mean(&items).unwrap();
    assert_eq!((narrow.lower, narrow.upper), (0.5, 0.5));
}

#[test]
fn the_interval_of_a_proportion_has_its_width() {
    // The standard error of 400 coins is 0.025; 1.960 and 0.6745 of it on each side.
    let items: Vec<f64> = (0..400).map(|item| f64::from(item % 2)).collect();
    let bootstrap = Bootstrap::new().with_resamples(5000);
    for (confidence, width) in [(0.95, 0.0980), (0.5, 0.0337)] {
        let found = bootstrap.with_confidence(confidence).mean(&items).unwrap();
        assert_relative_eq!(found.upper - found.lower, width, max_relative = 0.06);
        assert_relative_eq!(found.lower + found.upper, 1.0, epsilon = 0.005);
    }
}

#[test]
fn nineteen_intervals_of_twenty_hold_the_mean() {
    let bootstrap = Bootstrap::new().with_resamples(200);
    let holds = |seed: u64| {
        let found = bootstrap.with_seed(seed).mean(&normals(seed, 60)).unwrap();
        found.lower <= 0.0 && 0.0 <= found.upper
    };
    let n_held = (0..300).filter(|&seed| holds(seed)).count();
    // 285 are expected, slightly fewer by the percentile method; the standard deviation is 4.
    assert!((270..=296).contains(&n_held), "{n_held}");
}

#[test]
fn a_ratio_is_of_sums_and_draws_items_whole() {
    let bootstrap = Bootstrap::new();
    let found = bootstrap.ratio(&[1.0, 9.0], &[1.0, 3.0]).unwrap();
    // The mean of the ratios would be 2.
    assert_eq!((found.lower, found.value, found.upper), (1.0, 2.5, 3.0));
    let found = bootstrap
        .ratio(&[2.0, 6.0, 14.0], &[1.0, 3.0, 7.0])
        .unwrap();
    assert_eq!((found.lower, found.value, found.upper), (2.0, 2.0, 2.0));
    let items = normals(3, 40);
    let doubled: Vec<f64> = items.iter().map(|item| 2.0 * item).collect();
    let as_ratio = bootstrap.ratio(&doubled, &[2.0; 40]).unwrap();
    assert_eq!(as_ratio, bootstrap.mean(&items).unwrap());
}

#[test]
fn the_seed_sets_the_resamples() {
    let items = normals(1, 50);
    let of = |seed| Bootstrap::new().with_seed(seed).mean(&items).unwrap();
    assert_eq!(of(5), of(5));
    assert_ne!(of(5), of(6));
    assert_eq!(of(5).value, of(6).value);
}

#[test]
fn a_monotone_function_keeps_the_interval() {
    let estimate = Estimate {
        value: 1.0,
        lower: 0.0,
        upper: 2.0,
        n: 9,
    };
    let perplexity = estimate.map(f64::exp);
    assert_eq!((perplexity.lower, perplexity.upper), (1.0, 2f64.exp()));
    assert_eq!((perplexity.value, perplexity.n), (1f64.exp(), 9));
    let error = estimate.map(|value| 1.0 - value);
    assert_eq!((error.lower, error.value, error.upper), (-1.0, 0.0, 1.0));
}

#[test]
fn invalid_items_and_settings_are_refused() {
    let bootstrap = Bootstrap::new();
    assert!(matches!(bootstrap.mean(&[]), Err(Error::NoItems)));
    let item = |error| match error {
        Err(Error::NonFiniteItem { index, .. } | Error::Denominator { index, .. }) => index,
        other => panic!("{other:?}"),
    };
    assert_eq!(item(bootstrap.mean(&[1.0, f64::NAN])), 1);
    assert_eq!(item(bootstrap.mean(&[f64::INFINITY])), 0);
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(item(bootstrap.ratio(&[1.0, 1.0], &[1.0, wrong])), 1);
    }
    let message = bootstrap.ratio(&[1.0], &[]).unwrap_err().to_string();
    assert_eq!(
        message,
        "1 numerators and 0 denominators; give one of each for every item"
    );
    for confidence in [0.0, 1.0, -0.1, f64::NAN] {
        let found = bootstrap.with_confidence(confidence).mean(&[1.0]);
        assert!(
            matches!(found, Err(Error::Peft(peft::Error::Setting { .. }))),
            "{confidence}"
        );
    }
    let message = bootstrap
        .with_resamples(0)
        .mean(&[1.0])
        .unwrap_err()
        .to_string();
    assert_eq!(message, "resamples is 0; it must be at least 1");
}

#[test]
fn an_estimate_is_read_back_bit_for_bit() {
    let estimate = Bootstrap::new().mean(&normals(2, 30)).unwrap();
    let json = serde_json::to_string(&estimate).unwrap();
    assert_eq!(serde_json::from_str::<Estimate>(&json).unwrap(), estimate);
    let infinite = estimate.map(|value| value / 0.0);
    let json = serde_json::to_string(&infinite).unwrap();
    assert_eq!(json, r#"{"value":null,"lower":null,"upper":null,"n":30}"#);
    assert!(
        serde_json::from_str::<Estimate>(&json)
            .unwrap()
            .value
            .is_nan()
    );
}

#[test]
fn calibration_by_hand() {
    let items = [(0.9, true), (0.8, false), (0.35, true), (0.3, false)];
    let found = calibration(&items, 2).unwrap();
    // 2/4 |0.5 - 0.325| + 2/4 |0.5 - 0.85|
    assert_relative_eq!(found.ece, 0.2625, epsilon = 1e-12);
    assert_eq!(found.n, 4);
    let [low, high] = found.bins[..] else {
        panic!("{found:?}");
    };
    assert_eq!(
        (low.above, low.at_most, low.n, low.accuracy),
        (0.0, 0.5, 2, 0.5)
    );
    assert_relative_eq!(low.confidence, 0.325, epsilon = 1e-12);
    assert_eq!((high.above, high.at_most, high.n), (0.5, 1.0, 2));
    assert_relative_eq!(high.confidence, 0.85, epsilon = 1e-12);
    // Differences cancel inside of a bin, and not between bins.
    assert_relative_eq!(calibration(&items, 1).unwrap().ece, 0.0875, epsilon = 1e-12);
}

#[test]
fn certain_and_right_predictions_are_calibrated() {
    let sure = [(1.0, true), (0.0, false), (1.0, true)];
    let found = calibration(&sure, CALIBRATION_BINS).unwrap();
    assert_eq!(found.ece, 0.0);
    let ranges: Vec<(f64, usize)> = found.bins.iter().map(|bin| (bin.at_most, bin.n)).collect();
    assert_eq!(ranges, [(1.0 / 15.0, 1), (1.0, 2)]);
    assert_eq!(calibration(&[(1.0, false)], 15).unwrap().ece, 1.0);
}

#[test]
fn a_border_belongs_to_the_bin_below() {
    for n_bins in 1..=40 {
        for bin in 1..=n_bins {
            let border = bin as f64 / n_bins as f64;
            let found = calibration(&[(border, true)], n_bins).unwrap();
            assert_eq!(found.bins[0].at_most, border, "{bin} of {n_bins}");
        }
    }
}

#[test]
fn invalid_confidences_are_refused() {
    for wrong in [-0.01, 1.01, f64::NAN, f64::INFINITY] {
        let found = calibration(&[(0.5, true), (wrong, true)], 15);
        assert!(
            matches!(found, Err(Error::Confidence { index: 1, .. })),
            "{wrong}"
        );
    }
    assert!(matches!(calibration(&[], 15), Err(Error::NoItems)));
    let message = calibration(&[(0.5, true)], 0).unwrap_err().to_string();
    assert_eq!(message, "n_bins is 0; it must be at least 1");
}

proptest! {
    #[test]
    fn an_interval_is_inside_the_range_of_the_items(
        items in prop::collection::vec(-1e3..1e3, 1..40), seed: u64,
    ) {
        let bootstrap = Bootstrap::new().with_resamples(50).with_seed(seed);
        let found = bootstrap.mean(&items).unwrap();
        let (least, most) = items.iter().fold((f64::MAX, f64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
        prop_assert!(found.lower <= found.upper);
        prop_assert!(least - 1e-9 <= found.lower && found.upper <= most + 1e-9);
        let wider = bootstrap.with_confidence(0.99).mean(&items).unwrap();
        prop_assert!(wider.lower <= found.lower && found.upper <= wider.upper);
    }

    #[test]
    fn bins_hold_each_item_once(
        items in prop::collection::vec((0.0..=1.0, any::<bool>()), 1..60), n_bins in 1usize..30,
    ) {
        let found = calibration(&items, n_bins).unwrap();
        prop_assert_eq!(found.bins.iter().map(|bin| bin.n).sum::<usize>(), items.len());
        for bin in &found.bins {
            prop_assert!(bin.above - 1e-12 <= bin.confidence && bin.confidence <= bin.at_most + 1e-12);
        }
        // The error over bins is at least that over all items, and at most 1.
        let whole = calibration(&items, 1).unwrap().ece;
        prop_assert!(whole - 1e-12 <= found.ece && found.ece <= 1.0);
    }
}
