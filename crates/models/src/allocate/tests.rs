use quant_core::Candidate;

use super::{Allocation, Assignment, monotone};

#[test]
fn a_smaller_format_costs_no_less_than_a_larger_one() {
    let candidate = |n_bytes, error| Candidate { n_bytes, error };
    let given = [(4, 2.0), (2, 1.0), (8, 0.5), (4, 3.0), (1, 2.5)];
    let raised = monotone(given.map(|(n, error)| candidate(n, error)).into());
    // Formats of one size are not compared.
    let expected = [(4, 2.0), (2, 3.0), (8, 0.5), (4, 3.0), (1, 3.0)];
    assert_eq!(raised, expected.map(|(n, error)| candidate(n, error)));
}

#[test]
fn the_model_has_what_was_measured_to_be_better() {
    let assignment = |measured| Assignment {
        choice: vec![0],
        n_bytes: 1,
        predicted: 0.0,
        measured,
    };
    let allocation = |allocated, uniform: Option<f64>| Allocation {
        layers: Vec::new(),
        dense: 0.0,
        allocated: assignment(allocated),
        uniform: uniform.map(assignment),
    };
    let cases = [
        (1.0, Some(1.5), false),
        (1.5, Some(1.0), true),
        // Of the same loss, the format that is the same everywhere.
        (1.0, Some(1.0), true),
        (f64::NAN, Some(1.0), true),
        (1.0, Some(f64::NAN), false),
        (1.0, None, false),
    ];
    for (allocated, uniform, is_uniform) in cases {
        let found = allocation(allocated, uniform);
        assert_eq!(found.is_uniform(), is_uniform, "{allocated}, {uniform:?}");
        let best = uniform.filter(|_| is_uniform).unwrap_or(allocated);
        assert_eq!(found.best().measured, best);
    }
}
