use super::*;

/// Linear congruential generator with the constants of Knuth's MMIX.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, end: u64) -> u64 {
        let (multiplier, increment) = (6364136223846793005, 1442695040888963407);
        self.0 = self.0.wrapping_mul(multiplier).wrapping_add(increment);
        (self.0 >> 33) % end
    }

    fn unit(&mut self) -> f64 {
        self.below(1 << 30) as f64 / (1u64 << 30) as f64
    }
}

fn candidate(n_bytes: u64, error: f64) -> Candidate {
    Candidate { n_bytes, error }
}

fn random_layers(
    n_layers: usize,
    random: &mut Lcg,
    n_candidates: impl Fn(&mut Lcg) -> u64,
    new: impl Fn(&mut Lcg) -> Candidate,
) -> Vec<Vec<Candidate>> {
    let mut layer = || (0..n_candidates(random)).map(|_| new(random)).collect();
    (0..n_layers).map(|_| layer()).collect()
}

/// Every choice with its bytes and error, in the order in which [`allocate`] prefers them.
fn all_choices(layers: &[Vec<Candidate>]) -> Vec<(f64, u64, Vec<usize>)> {
    let mut choices = vec![Vec::new()];
    for layer in layers {
        let extend = |choice: Vec<usize>| {
            (0..layer.len()).map(move |index| [choice.clone(), vec![index]].concat())
        };
        choices = choices.into_iter().flat_map(extend).collect();
    }
    let mut choices: Vec<_> = choices
        .into_iter()
        .map(|choice| {
            let (n_bytes, error) = total(layers, &choice);
            (error, n_bytes, choice)
        })
        .collect();
    choices.sort_by(|a, b| a.partial_cmp(b).expect("errors are finite"));
    choices
}

fn assert_same_as_brute_force(layers: &[Vec<Candidate>], budgets: impl Iterator<Item = u64>) {
    let choices = all_choices(layers);
    let smallest = choices
        .iter()
        .map(|c| c.1)
        .min()
        .expect("there are choices");
    for budget in budgets {
        let Some((error, n_bytes, choice)) = choices.iter().find(|c| c.1 <= budget) else {
            let expected = AllocationError::BudgetTooSmall {
                needed: smallest,
                budget,
            };
            assert_eq!(allocate(layers, budget), Err(expected));
            continue;
        };
        let found = allocate(layers, budget).expect("the budget is large enough");
        assert_eq!(&found.choice, choice, "{layers:?} within {budget}");
        assert_eq!((found.n_bytes, found.error), (*n_bytes, *error));
        assert_eq!(found.lower_bound, found.error);

        let is_uniform = |choice: &[usize]| choice.iter().all(|&index| index == choice[0]);
        let uniform = choices.iter().find(|c| c.1 <= budget && is_uniform(&c.2));
        let expected = uniform.map(|(error, n_bytes, choice)| UniformChoice {
            candidate: choice[0],
            n_bytes: *n_bytes,
            error: *error,
        });
        assert_eq!(found.uniform, expected);
    }
}

#[test]
fn finds_the_first_optimum_among_ties_at_every_budget() {
    let mut random = Lcg(1);
    for round in 0..3000 {
        let n_layers = 2 + random.below(5) as usize;
        let (max_bytes, max_error) = [(3, 3), (8, 4), (9, 20), (4, 1)][round % 4];
        let layers = random_layers(
            n_layers,
            &mut random,
            |random| 1 + random.below(4),
            |random| candidate(random.below(max_bytes), random.below(max_error) as f64),
        );
        assert_same_as_brute_force(&layers, 0..=max_bytes * n_layers as u64);
    }
}

#[test]
fn finds_the_optimum_of_real_errors_and_large_sizes() {
    let mut random = Lcg(2);
    for round in 0..1000 {
        let n_layers = 2 + random.below(5) as usize;
        let scale = [1.0, 1e-300, 1e300, 1e-9][round % 4];
        let layers = random_layers(
            n_layers,
            &mut random,
            |random| 1 + random.below(4),
            |random| {
                let n_bytes = 1 << 40 | random.below(1 << 30);
                candidate(n_bytes, scale * 10f64.powf(3.0 * random.unit()))
            },
        );
        let choices = all_choices(&layers);
        let totals = choices.iter().step_by(1 + choices.len() / 20).map(|c| c.1);
        let budgets = totals.flat_map(|bytes| [bytes - 1, bytes, bytes + 1]);
        assert_same_as_brute_force(&layers, budgets);
    }
}

#[test]
fn finds_the_optimum_when_errors_follow_from_sizes() {
    let mut random = Lcg(3);
    for _ in 0..300 {
        let layers = random_layers(
            5,
            &mut random,
            |_| 4,
            |random| {
                let n_bytes = random.below(1000);
                candidate(n_bytes, 1000.0 - n_bytes as f64)
            },
        );
        let budget = random.below(5000);
        assert_same_as_brute_force(&layers, [budget].into_iter());
    }
}

/// Least error for every budget up to `budget` by dynamic programming over the bytes.
fn least_error(layers: &[Vec<Candidate>], budget: usize) -> f64 {
    let mut least = vec![0.0; budget + 1];
    for layer in layers {
        let at = |bytes: usize| {
            layer
                .iter()
                .filter(|c| c.n_bytes as usize <= bytes)
                .map(|c| c.error + least[bytes - c.n_bytes as usize])
                .fold(f64::INFINITY, f64::min)
        };
        least = (0..=budget).map(at).collect();
    }
    least[budget]
}

#[test]
fn agrees_with_dynamic_programming_over_bytes() {
    let mut random = Lcg(4);
    for round in 0..60 {
        let layers = random_layers(
            40,
            &mut random,
            |random| 1 + random.below(8),
            |random| {
                let n_bytes = random.below(100);
                // Uncorrelated, weakly and strongly correlated.
                let error = match round % 3 {
                    0 => random.below(1000),
                    1 => 200 - n_bytes + random.below(10),
                    _ => 200 - n_bytes,
                };
                candidate(n_bytes, error as f64)
            },
        );
        let smallest = sum_of_bytes(&layers, u64::min).expect("small sizes");
        let budget = smallest + random.below(2000);
        let found = allocate(&layers, budget).expect("the budget is large enough");
        assert!(found.is_optimal());
        assert_eq!(found.error, least_error(&layers, budget as usize));
    }
}

/// Errors fall by a factor of four per bit; sensitivities span three orders of magnitude.
fn language_model(n_layers: usize, random: &mut Lcg) -> Vec<Vec<Candidate>> {
    let shapes = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024)];
    let layer = |index: usize| {
        let (n_rows, n_columns): (u64, u64) = shapes[index % shapes.len()];
        let sensitivity = 10f64.powf(3.0 * random.unit());
        let formats = [2, 3, 4, 8]
            .into_iter()
            .flat_map(|bits| [(bits, 32), (bits, 64), (bits, 128)]);
        let new = |(bits, group): (u64, u64)| {
            let n_bytes = n_rows * n_columns * bits / 8 + n_rows * n_columns / group * 2;
            let noise = 1.0 + 0.3 * random.unit() + group as f64 / 256.0;
            candidate(n_bytes, sensitivity * noise * 0.25f64.powi(bits as i32))
        };
        formats.take(10).map(new).collect()
    };
    (0..n_layers).map(layer).collect()
}

#[test]
fn proves_the_optimum_of_300_layers_with_10_candidates() {
    let mut random = Lcg(5);
    let model = language_model(300, &mut random);
    let n_weights = 75 * (4096 * (4096 + 11008 + 11008 + 1024));
    let found = allocate(&model, n_weights * 7 / 16).expect("3.5 bits per weight suffice");
    assert!(found.is_optimal());
    assert_eq!(found.gap(), 0.0);
    assert_eq!(total(&model, &found.choice), (found.n_bytes, found.error));
    let uniform = found.uniform.expect("3 bits fit");
    assert!(found.error < uniform.error);

    let unrelated = random_layers(
        300,
        &mut random,
        |_| 10,
        |random| candidate(random.below(100_000_000), random.unit()),
    );
    let found = allocate(&unrelated, 5_000_000_000).expect("the budget is large enough");
    assert!(found.is_optimal());
}

#[test]
fn is_deterministic() {
    let model = language_model(100, &mut Lcg(6));
    let budget = 1_000_000_000;
    let first = allocate(&model, budget);
    assert!(first.is_ok());
    assert_eq!(allocate(&model, budget), first);
    let stopped = allocate_within(&model, budget, 50, 0);
    assert_eq!(allocate_within(&model, budget, 50, 0), stopped);
}

#[test]
fn bounds_the_optimum_when_the_search_is_stopped() {
    let mut random = Lcg(7);
    let mut n_stopped = 0;
    for round in 0..200 {
        let layers = random_layers(
            30,
            &mut random,
            |_| 6,
            |random| {
                let n_bytes = 1 + random.below(1_000_000);
                let noise = [1e6, 1e5][round % 2] * random.unit();
                candidate(n_bytes, 1e6 - n_bytes as f64 + noise)
            },
        );
        let budget = 8_000_000 + random.below(6_000_000);
        let optimum = allocate(&layers, budget).expect("the budget is large enough");
        assert!(optimum.is_optimal());
        let mut last_bound = 0.0;
        for limit in [0, 1, 10, 100, 1000, 10_000] {
            let found = allocate_within(&layers, budget, limit, 0).expect("the same budget");
            assert!(found.lower_bound <= optimum.error);
            assert!(optimum.error <= found.error);
            assert!(found.n_bytes <= budget);
            assert!(found.lower_bound >= last_bound);
            assert!(found.gap() >= 0.0 && found.gap() < 0.05 * found.error);
            assert!(
                found
                    .uniform
                    .is_none_or(|uniform| found.error <= uniform.error)
            );
            last_bound = found.lower_bound.min(optimum.error);
            n_stopped += usize::from(!found.is_optimal());
        }
    }
    assert!(n_stopped > 200);
}

#[test]
fn separates_errors_far_below_the_largest() {
    let huge = |small| {
        vec![
            candidate(1, 1e30),
            candidate(2, small),
            candidate(3, small / 2.0),
        ]
    };
    let layers = [huge(1e-9), huge(1.5e-9), huge(1.1e-9)];
    let found = allocate(&layers, 7).expect("the budget is large enough");
    assert_eq!(found.choice, [1, 2, 1]);
    assert!(found.is_optimal());
}

#[test]
fn accepts_zero_errors_and_extreme_budgets() {
    let layers = vec![vec![candidate(5, -0.0), candidate(5, 0.0), candidate(0, 0.0)]; 3];
    let found = allocate(&layers, u64::MAX).expect("the budget is large enough");
    assert_eq!(found.choice, [2, 2, 2]);
    assert_eq!((found.n_bytes, found.error, found.gap()), (0, 0.0, 0.0));
    let wide = vec![vec![candidate(0, 3.0), candidate(u64::MAX / 2, 1.0)]; 2];
    let found = allocate(&wide, u64::MAX - 2).expect("the budget is large enough");
    assert_eq!(found.choice, [0, 1]);
    assert!(found.is_optimal());
    let tiny = f64::from_bits(1);
    let found = allocate(&[vec![candidate(1, tiny), candidate(2, 0.0)]], 1);
    assert_eq!(found.map(|found| found.error), Ok(tiny));
}

#[test]
fn a_uniform_choice_needs_its_candidate_in_every_layer() {
    let layers = [
        vec![candidate(4, 2.0), candidate(6, 1.0)],
        vec![candidate(4, 2.0)],
    ];
    let found = allocate(&layers, 10).expect("the budget is large enough");
    let expected = UniformChoice {
        candidate: 0,
        n_bytes: 8,
        error: 4.0,
    };
    assert_eq!((found.choice, found.uniform), (vec![1, 0], Some(expected)));
    let crossed = [
        vec![candidate(1, 1.0), candidate(9, 0.0)],
        vec![candidate(9, 0.0), candidate(1, 1.0)],
    ];
    let found = allocate(&crossed, 9).expect("the budget is large enough");
    assert_eq!((found.choice, found.uniform), (vec![0, 1], None));
}

#[test]
fn rejects_invalid_input() {
    assert_eq!(allocate(&[], 1), Err(AllocationError::NoLayers));
    let good = vec![candidate(1, 1.0)];
    assert_eq!(
        allocate(&[good.clone(), Vec::new()], 1),
        Err(AllocationError::NoCandidates { layer: 1 })
    );
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, f64::MAX] {
        let layers = [good.clone(), vec![candidate(1, 0.0), candidate(1, value)]];
        match allocate(&layers, 2) {
            Err(AllocationError::InvalidError {
                layer,
                candidate,
                value: reported,
            }) => {
                assert_eq!((layer, candidate), (1, 1));
                assert_eq!(reported.to_bits(), value.to_bits());
            }
            other => panic!("{value} gave {other:?}"),
        }
    }
    let wide = vec![candidate(1, 1.0), candidate(u64::MAX, 0.0)];
    let overflow = allocate(&[good.clone(), wide], 2);
    assert_eq!(overflow, Err(AllocationError::BytesOverflow));
    let infeasible = allocate(&[good.clone(), good], 1);
    let expected = AllocationError::BudgetTooSmall {
        needed: 2,
        budget: 1,
    };
    assert_eq!(infeasible, Err(expected.clone()));
    assert!(expected.to_string().contains("need 2 bytes"));
}
