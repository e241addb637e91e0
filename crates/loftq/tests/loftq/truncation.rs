//! The truncated decomposition against the full one.

use burn::tensor::{Device, Tensor};
use loftq::Truncation;
use proptest::prelude::*;
use quant_core::{full_svd, sum_of_squares, symmetric_eigen};

use crate::layers::{floats, random};
use crate::property;

/// The least squared error of each rank from 0 on.
fn least_errors(matrix: &Tensor<2>) -> Vec<f64> {
    let [m, n] = matrix.dims();
    let a: Vec<f64> = floats(matrix.clone()).into_iter().map(f64::from).collect();
    let square = |at: usize| {
        (0..m)
            .map(|i| a[i * n + at / n] * a[i * n + at % n])
            .sum::<f64>()
    };
    let square: Vec<f64> = (0..n * n).map(square).collect();
    let (mut squares, _) = symmetric_eigen(&square, n).unwrap();
    squares.reverse();
    (0..=m.min(n))
        .map(|rank| squares[rank..].iter().sum::<f64>().max(0.0))
        .collect()
}

fn check(matrix: &Tensor<2>, rank: usize, tolerance: f64) {
    let least = least_errors(matrix);
    let truncation = Truncation { tolerance, seed: 4 };
    let found = truncation.of(matrix.clone(), rank, None).unwrap();
    let measured = sum_of_squares(matrix.clone() - found.left.clone().matmul(found.right.clone()));
    let power = least[0];
    // The error that it reports is the measured one.
    assert!(
        (found.error - measured).abs() <= 2e-5 * measured + 1e-11 * power,
        "{} is said of {measured}",
        found.error
    );
    // No matrix of the rank is nearer; this one is near the nearest.
    let slack = 1e-6 * power.sqrt() * measured.sqrt() + 1e-11 * power;
    assert!(
        measured >= least[rank] - slack,
        "{measured} of {}",
        least[rank]
    );
    let allowed = least[rank] * (1.0 + 10.0 * tolerance) + 2e-7 * power;
    assert!(
        measured <= allowed,
        "{measured} of {} at {rank}",
        least[rank]
    );
    // Orthonormal columns, and rows that are orthogonal, the longest first.
    let columns = found.left.clone().transpose().matmul(found.left);
    let rows = found.right.clone().matmul(found.right.transpose());
    let (columns, rows) = (floats(columns), floats(rows));
    for at in 0..rank * rank {
        let (i, j) = (at / rank, at % rank);
        if i != j {
            assert!(columns[at].abs() < 1e-4, "{}", columns[at]);
            assert!(
                f64::from(rows[at].abs()) < 1e-4 * power.max(1e-30),
                "{}",
                rows[at]
            );
        } else {
            assert!((columns[at] - 1.0).abs() < 1e-4 || f64::from(rows[at]) < 1e-9 * power);
            assert!(i == 0 || rows[at] <= rows[at - rank - 1] + 1e-5 * rows[0]);
        }
    }
}

#[test]
fn flat_spectra_are_cut_as_well_as_by_a_full_decomposition() {
    for (dims, rank) in [([200, 300], 8), ([300, 200], 3), ([257, 129], 1)] {
        check(&random(dims, 7), rank, 5e-4);
        check(&random(dims, 7), rank, 1e-7);
    }
}

#[test]
fn steep_spectra_too() {
    for decay in [0.9f32, 0.5, 0.1] {
        let scales: Vec<f32> = (0..60).map(|k| decay.powi(k)).collect();
        let scales = Tensor::<1>::from_floats(&scales[..], &Device::flex()).unsqueeze::<2>();
        let matrix = (random([250, 60], 1) * scales).matmul(random([60, 180], 2));
        check(&matrix, 5, 5e-4);
        check(&matrix, 20, 5e-4);
    }
}

#[test]
fn a_lower_rank_than_asked_for_is_found_whole() {
    let matrix = random([400, 6], 1).matmul(random([6, 300], 2));
    for rank in [6, 16] {
        let found = Truncation::default()
            .of(matrix.clone(), rank, None)
            .unwrap();
        assert_eq!(found.left.dims(), [400, rank]);
        assert_eq!(found.right.dims(), [rank, 300]);
        let rest = sum_of_squares(found.taken_from(matrix.clone()));
        assert!(rest < 1e-10 * sum_of_squares(matrix.clone()), "{rest}");
        assert!(found.error < 1e-10 * sum_of_squares(matrix.clone()));
    }
}

#[test]
fn zeros_and_what_is_not_finite() {
    let zeros = Tensor::<2>::zeros([300, 200], &Device::flex());
    let found = Truncation::default().of(zeros.clone(), 4, None).unwrap();
    assert_eq!(found.error, 0.0);
    assert_eq!(sum_of_squares(found.left.matmul(found.right)), 0.0);
    for bad in [f32::NAN, f32::INFINITY] {
        let matrix = zeros.clone() + bad;
        assert!(Truncation::default().of(matrix, 4, None).is_none());
    }
    // Squares that f32 does not hold.
    let plain = Truncation::default().of(random([300, 200], 3), 4, None);
    let plain = plain.unwrap().error;
    for scale in [1e30, 1e-30] {
        let matrix = random([300, 200], 3) * scale;
        let found = Truncation::default().of(matrix, 4, None).unwrap();
        let expected = plain * f64::from(scale as f32).powi(2);
        assert!((found.error - expected).abs() < 1e-4 * expected, "{scale}");
        assert!(floats(found.right).iter().any(|value| *value != 0.0));
    }
}

#[test]
fn directions_that_the_matrix_does_not_see_lead_somewhere() {
    // The first columns are zero, and the iteration starts from them.
    let (zeros, block) = (
        Tensor::<2>::zeros([300, 100], &Device::flex()),
        random([300, 150], 5),
    );
    let matrix = Tensor::cat(vec![zeros, block.clone()], 1);
    let start = Tensor::<2>::eye(250, &Device::flex()).slice([0..250, 0..16]);
    let found = Truncation::default().of(matrix, 8, Some(start)).unwrap();
    let least = least_errors(&block)[8];
    assert!(found.error <= least * 1.002, "{} of {least}", found.error);
}

#[test]
fn where_a_like_matrix_led_it_begins_better() {
    let matrix = random([300, 250], 1);
    let like = matrix.clone() + random([300, 250], 2) * 0.05;
    let truncation = Truncation {
        tolerance: 1e-8,
        ..Truncation::default()
    };
    let start = truncation.of(matrix, 8, None).unwrap().directions;
    // One step only.
    let rough = Truncation {
        tolerance: 1.0,
        ..Truncation::default()
    };
    let cold = rough.of(like.clone(), 8, None).unwrap().error;
    let warm = rough.of(like, 8, Some(start)).unwrap().error;
    assert!(warm < cold, "{warm} {cold}");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let matrix = random([300, 280], 9);
    let on = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
        let pool = pool.build().unwrap();
        let found = pool.install(|| Truncation::default().of(matrix.clone(), 12, None).unwrap());
        let values = [floats(found.left), floats(found.right)].concat();
        values
            .iter()
            .map(|value| value.to_bits())
            .collect::<Vec<_>>()
    };
    assert!(on(1) == on(2));
    assert!(on(1) == on(5));
}

#[test]
fn eigenvectors_are_those_of_the_matrix() {
    let n = 40;
    let a = floats(random([n, n], 3));
    let entry = |i: usize, j: usize| f64::from(a[i * n + j]) + f64::from(a[j * n + i]);
    let symmetric: Vec<f64> = (0..n * n).map(|at| entry(at / n, at % n)).collect();
    let (values, vectors) = symmetric_eigen(&symmetric, n).unwrap();
    assert!(values.is_sorted());
    for k in 0..n {
        for i in 0..n {
            let image: f64 = (0..n).map(|j| entry(i, j) * vectors[j * n + k]).sum();
            assert!((image - values[k] * vectors[i * n + k]).abs() < 1e-10);
        }
    }
    assert!(symmetric_eigen(&[f64::NAN], 1).is_none());
    assert!(full_svd(&[f32::INFINITY], 1, 1).is_none());
}

proptest! {
    #![proptest_config(property(24))]

    #[test]
    fn any_shape_and_rank(m in 1usize..150, n in 1usize..150, part in 0.0f64..1.0, seed in 0u64..1000) {
        let rank = 1 + (part * (m.min(n) - 1) as f64) as usize;
        check(&random([m, n], seed), rank, 1e-6);
    }
}
