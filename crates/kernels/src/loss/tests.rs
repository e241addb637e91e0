//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::{Flex, flex::FlexTensor};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use super::{LossOps, composed, linear_cross_entropy};
use crate::testing::*;

struct Case {
    x: Tensor<2>,
    head: Tensor<2>,
    targets: Vec<i64>,
    dnll: Tensor<1>,
}

impl Case {
    fn new([rows, hidden, vocab]: [usize; 3], tied: bool, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let x = random.tensor([rows, hidden]) * 2.0;
        let head = if tied {
            random.tensor([vocab, hidden]).transpose()
        } else {
            random.tensor([hidden, vocab])
        };
        let targets = random.floats(rows, 0.0, vocab as f32);
        Self {
            x,
            head,
            targets: targets
                .iter()
                .map(|&t| (t as i64).min(vocab as i64 - 1))
                .collect(),
            dnll: random.tensor([rows]),
        }
    }

    fn targets(&self, dtype: DType) -> Tensor<1, Int> {
        let data = TensorData::new(self.targets.clone(), [self.targets.len()]);
        Tensor::from_data(data, (&Device::flex(), dtype))
    }

    fn primitives(&self) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        let targets = self
            .targets(DType::I32)
            .try_into_primitive::<Flex>()
            .unwrap();
        (
            primitive(&self.x),
            primitive(&self.head),
            targets,
            primitive(&self.dnll),
        )
    }

    /// Losses, log-sum-exps, gradients of each row's loss, and the gradient for the head.
    fn native(&self) -> Vec<Vec<f32>> {
        let (x, head, targets, dnll) = self.primitives();
        let (nll, lse, dx) =
            Flex::linear_cross_entropy_with_dx(x.clone(), head.clone(), targets.clone());
        let (alone, lse_alone) =
            Flex::linear_cross_entropy_forward(x.clone(), head.clone(), targets.clone());
        let dhead = Flex::linear_cross_entropy_dhead(x, head, targets, lse.clone(), dnll);
        let all = [nll, lse, dx, dhead, alone, lse_alone].map(primitive_values);
        assert_eq!(bits(&all[0]), bits(&all[4]), "losses without gradients");
        assert_eq!(bits(&all[1]), bits(&all[5]));
        all[..4].to_vec()
    }

    fn by_composition(&self) -> Vec<Vec<f32>> {
        let (x, head, targets, dnll) = self.primitives();
        let (nll, lse, dx) =
            composed::forward::<Flex>(x.clone(), head.clone(), targets.clone(), true);
        let dhead = composed::dhead::<Flex>(x, head, targets, lse.clone(), dnll);
        [nll, lse, dx.unwrap(), dhead]
            .map(primitive_values)
            .to_vec()
    }

    /// The same in `f64`.
    fn reference(&self) -> [Vec<f64>; 4] {
        let [hidden, vocab] = self.head.dims();
        let [x, head] = [&self.x, &self.head].map(|t| doubles(&values(t)));
        let dnll = doubles(&values(&self.dnll));
        let (mut nll, mut lse) = (Vec::new(), Vec::new());
        let (mut dx, mut dhead) = (vec![0.0; x.len()], vec![0.0; head.len()]);
        for (row, &target) in self.targets.iter().enumerate() {
            let x = &x[row * hidden..][..hidden];
            let mut logits = vec![0.0; vocab];
            for (x, head) in x.iter().zip(head.chunks_exact(vocab)) {
                for (logit, head) in logits.iter_mut().zip(head) {
                    *logit += x * head;
                }
            }
            let most = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - most).exp()).sum();
            let log_sum = most + sum.ln();
            nll.push(log_sum - logits[target as usize]);
            lse.push(log_sum);
            let mut p: Vec<f64> = logits.iter().map(|l| (l - log_sum).exp()).collect();
            p[target as usize] -= 1.0;
            for i in 0..hidden {
                let (head, dhead) = (
                    &head[i * vocab..][..vocab],
                    &mut dhead[i * vocab..][..vocab],
                );
                dx[row * hidden + i] = p.iter().zip(head).map(|(p, h)| p * h).sum();
                for (dhead, p) in dhead.iter_mut().zip(&p) {
                    *dhead += x[i] * p * dnll[row];
                }
            }
        }
        [nll, lse, dx, dhead]
    }
}

proptest! {
    #![proptest_config(cases_of(48))]

    #[test]
    fn losses_and_gradients_are_those_of_f64(
        rows in 1..40usize,
        hidden in 1..40usize,
        vocab in 2..300usize,
        tied: bool,
        seed: u64,
    ) {
        let case = Case::new([rows, hidden, vocab], tied, seed);
        let expected = case.reference();
        for found in [case.native(), case.by_composition()] {
            for (found, expected) in found.iter().zip(&expected) {
                assert_close(found, expected, 3e-6);
            }
        }
    }

    /// Autodiff gives the gradients of `Σ dnll nll` by differences in `f64`.
    #[test]
    fn backward_agrees_with_differences(
        [rows, hidden, vocab] in [1..4usize, 1..4usize, 2..6usize],
        [x_tracked, head_tracked] in prop::sample::select(vec![[true, true], [true, false], [false, true]]),
        seed: u64,
    ) {
        let case = Case::new([rows, hidden, vocab], true, seed);
        let (x, embedding) = (values(&case.x), values(&case.head.clone().transpose()));
        let dnll = values(&case.dnll);
        let loss = |x: &[f64], embedding: &[f64]| -> f64 {
            let of_row = |row: usize| {
                let logit = |token: usize| -> f64 {
                    let pairs = x[row * hidden..][..hidden].iter().zip(&embedding[token * hidden..]);
                    pairs.map(|(x, e)| x * e).sum()
                };
                let sum: f64 = (0..vocab).map(|token| logit(token).exp()).sum();
                (sum.ln() - logit(case.targets[row] as usize)) * f64::from(dnll[row])
            };
            (0..rows).map(of_row).sum()
        };
        let lift = |t: Tensor<2>, tracked: bool| if tracked { leaf(&t) } else { t };
        let tx = lift(case.x.clone(), x_tracked);
        let te = lift(case.head.clone().transpose(), head_tracked);
        let nll = linear_cross_entropy(tx.clone(), te.clone().transpose(), case.targets(DType::I64));
        let grads = (nll * case.dnll.clone().autodiff()).sum().backward();
        if x_tracked {
            let expected = slopes(&x, |x| loss(x, &doubles(&embedding)));
            assert_close(&values(&tx.grad(&grads).unwrap()), &expected, 1e-5);
        }
        if head_tracked {
            let expected = slopes(&embedding, |embedding| loss(&doubles(&x), embedding));
            assert_close(&values(&te.grad(&grads).unwrap()), &expected, 1e-5);
        }
    }
}

/// With several chunks of rows, slabs of columns and tiles of products.
#[test]
fn slabs_add_up() {
    for tied in [false, true] {
        let case = Case::new([1100, 3, 4500], tied, 12);
        for (found, expected) in case.native().iter().zip(&case.reference()) {
            assert_close(found, expected, 1e-5);
        }
        assert_same_on_any_threads(|| case.native());
    }
}

#[test]
fn other_dtypes_take_the_composed_operations() {
    let case = Case::new([7, 4, 30], false, 16);
    let (x, head) = (leaf(&wide(&case.x)), leaf(&wide(&case.head)));
    let nll = linear_cross_entropy(x.clone(), head.clone(), case.targets(DType::I32));
    let grads = (nll.clone() * wide(&case.dnll).autodiff()).sum().backward();
    let [expected, _, dx, dhead] = case.reference();
    assert_close(&wide_values(nll.inner()), &expected, 1e-13);
    let dnll = doubles(&values(&case.dnll));
    let dx: Vec<f64> = dx
        .iter()
        .enumerate()
        .map(|(at, dx)| dx * dnll[at / 4])
        .collect();
    assert_close(&wide_values(x.grad(&grads).unwrap()), &dx, 1e-13);
    assert_close(&wide_values(head.grad(&grads).unwrap()), &dhead, 1e-13);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let case = Case::new([300, 600, 700], true, 13);
    assert_same_on_any_threads(|| case.native());
}

/// Whole numbers, whose logits are exact: beyond the range of `exp` in `f32` and in `f64`.
#[test]
fn large_logits_do_not_overflow() {
    let mut case = Case::new([5, 8, 50], true, 14);
    case.x = (case.x * 100.0).round();
    case.head = (case.head * 8.0).round();
    let expected = case.reference();
    assert!(expected[1].iter().any(|&lse| lse > 1000.0));
    for (found, expected) in case.native().iter().zip(&expected) {
        assert_close(found, expected, 1e-6);
    }
}

#[test]
#[should_panic(expected = "target 7 is not in the vocabulary of 7 tokens")]
fn targets_are_in_the_vocabulary() {
    let mut case = Case::new([2, 3, 7], false, 15);
    case.targets[1] = 7;
    linear_cross_entropy(case.x.clone(), case.head.clone(), case.targets(DType::I32));
}

/// In 16 bits, losses are those of `f32` of the same logits, and the head in its own dtype, by rows or by
/// columns, gives what its values give.
#[test]
fn losses_are_wide_in_16_bits() {
    let [rows, hidden, vocab] = [5, 40, 3000];
    for (at, tied) in [false, true].into_iter().enumerate() {
        for dtype in [DType::BF16, DType::F16] {
            let case = Case::new([rows, hidden, vocab], tied, at as u64 + 1);
            let head = case.head.clone().cast(dtype);
            let run = |of_x: DType, head: Tensor<2>| {
                let x = leaf(&case.x.clone().cast(dtype).cast(of_x));
                let nll =
                    linear_cross_entropy(x.clone(), head.autodiff(), case.targets(DType::I64));
                let gradients = nll.clone().sum().backward();
                (nll.inner(), x.grad(&gradients).unwrap())
            };
            let (nll, dx) = run(DType::F32, head.clone().cast(DType::F32));
            // The type at rest changes no bit.
            let (found, found_dx) = run(DType::F32, head.clone());
            assert!(bits(&values(&found)) == bits(&values(&nll)));
            assert!(bits(&values(&found_dx)) == bits(&values(&dx)));
            // Neither does that of `x`, for the loss; its gradient is rounded.
            let (found, found_dx) = run(dtype, head.clone());
            assert_eq!((found.dtype(), found_dx.dtype()), (DType::F32, dtype));
            assert!(bits(&values(&found)) == bits(&values(&nll)));
            let unit = 2f64.powi(if dtype == DType::F16 { -10 } else { -7 });
            assert_within(primitive(&found_dx), &primitive(&wide(&dx)), unit);
            // The composed operations round the logits to the type of `x`, and no more.
            let of_x = primitive(&case.x.clone().cast(dtype));
            let targets = case
                .targets(DType::I64)
                .try_into_primitive::<Flex>()
                .unwrap();
            let (found, _, _) = composed::forward::<Flex>(of_x, primitive(&head), targets, true);
            assert_eq!(found.dtype(), DType::F32);
            assert_within(found, &primitive(&wide(&nll)), unit);
        }
    }
}
