//! Comparison with `f64` and with the composed operations, and through autodiff.

use burn::backend::{Flex, flex::FlexTensor};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use super::head::{Bias, Head};
use super::{LossOps, OutputHead, composed, linear_cross_entropy};
use crate::softcap::Softcap;
use crate::testing::*;

struct Case {
    x: Tensor<2>,
    head: Tensor<2>,
    bias: Option<Tensor<1>>,
    cap: Option<f64>,
    targets: Vec<i64>,
    dnll: Tensor<1>,
}

/// From a cap that most logits reach to none.
fn caps() -> impl Strategy<Value = Option<f64>> {
    prop::sample::select(vec![Some(0.5), Some(30.0), None])
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
            bias: None,
            cap: None,
            targets: targets
                .iter()
                .map(|&t| (t as i64).min(vocab as i64 - 1))
                .collect(),
            dnll: random.tensor([rows]),
        }
    }

    /// The same with a bias and a soft cap.
    fn with(mut self, bias: bool, cap: Option<f64>) -> Self {
        let vocab = self.head.dims()[1];
        self.bias = bias.then(|| Random::new(vocab as u64).tensor([vocab]));
        self.cap = cap;
        self
    }

    fn targets(&self, dtype: DType) -> Tensor<1, Int> {
        let data = TensorData::new(self.targets.clone(), [self.targets.len()]);
        Tensor::from_data(data, (&Device::flex(), dtype))
    }

    fn primitives(&self) -> (FlexTensor, Head<Flex>, FlexTensor, FlexTensor) {
        let targets = self
            .targets(DType::I32)
            .try_into_primitive::<Flex>()
            .unwrap();
        let bias = match &self.bias {
            Some(bias) => Bias::Each(primitive(bias)),
            None => Bias::Absent,
        };
        let head = Head {
            weight: primitive(&self.head),
            bias,
            softcap: self.cap.map(Softcap::new),
        };
        (primitive(&self.x), head, targets, primitive(&self.dnll))
    }

    /// Losses, log-sum-exps, gradients of each row's loss, and the gradients for the weight and the bias of
    /// the head, empty if there is none.
    fn native(&self) -> Vec<Vec<f32>> {
        let (x, head, targets, dnll) = self.primitives();
        let (nll, lse, dx) =
            Flex::linear_cross_entropy_with_dx(x.clone(), head.clone(), targets.clone());
        let (alone, lse_alone) =
            Flex::linear_cross_entropy_forward(x.clone(), head.clone(), targets.clone());
        let (dweight, dbias) =
            Flex::linear_cross_entropy_dhead(x, head, targets, lse.clone(), dnll);
        let [nll, lse, dx, dweight] = [nll, lse, dx, dweight].map(primitive_values);
        let [alone, lse_alone] = [alone, lse_alone].map(primitive_values);
        assert_eq!(bits(&nll), bits(&alone), "losses without gradients");
        assert_eq!(bits(&lse), bits(&lse_alone));
        vec![nll, lse, dx, dweight, of_bias(dbias)]
    }

    fn by_composition(&self) -> Vec<Vec<f32>> {
        let (x, head, targets, dnll) = self.primitives();
        let (nll, lse, dx) =
            composed::forward::<Flex>(x.clone(), head.clone(), targets.clone(), true);
        let (dweight, dbias) = composed::dhead::<Flex>(x, head, targets, lse.clone(), dnll);
        let mut all = [nll, lse, dx.unwrap(), dweight]
            .map(primitive_values)
            .to_vec();
        all.push(of_bias(dbias));
        all
    }

    /// The same in `f64`.
    fn reference(&self) -> [Vec<f64>; 5] {
        let [hidden, vocab] = self.head.dims();
        let [x, head] = [&self.x, &self.head].map(|t| doubles(&values(t)));
        let dnll = doubles(&values(&self.dnll));
        let (mut nll, mut lse) = (Vec::new(), Vec::new());
        let bias = self.bias.as_ref().map(|bias| doubles(&values(bias)));
        let (mut dx, mut dhead) = (vec![0.0; x.len()], vec![0.0; head.len()]);
        let mut dbias = vec![0.0; bias.as_ref().map_or(0, Vec::len)];
        for (row, &target) in self.targets.iter().enumerate() {
            let x = &x[row * hidden..][..hidden];
            let mut logits = bias.clone().unwrap_or(vec![0.0; vocab]);
            for (x, head) in x.iter().zip(head.chunks_exact(vocab)) {
                for (logit, head) in logits.iter_mut().zip(head) {
                    *logit += x * head;
                }
            }
            let mut slopes = vec![1.0; vocab];
            if let Some(cap) = self.cap {
                for (logit, slope) in logits.iter_mut().zip(&mut slopes) {
                    *slope = (*logit / cap).cosh().powi(-2);
                    *logit = cap * (*logit / cap).tanh();
                }
            }
            let most = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - most).exp()).sum();
            let log_sum = most + sum.ln();
            nll.push(log_sum - logits[target as usize]);
            lse.push(log_sum);
            let mut p: Vec<f64> = logits.iter().map(|l| (l - log_sum).exp()).collect();
            p[target as usize] -= 1.0;
            for (p, slope) in p.iter_mut().zip(&slopes) {
                *p *= slope;
            }
            for (dbias, p) in dbias.iter_mut().zip(&p) {
                *dbias += p * dnll[row];
            }
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
        [nll, lse, dx, dhead, dbias]
    }
}

fn of_bias(bias: Bias<Flex>) -> Vec<f32> {
    match bias {
        Bias::Each(bias) => primitive_values(bias),
        Bias::Absent => Vec::new(),
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
        bias: bool,
        cap in caps(),
        seed: u64,
    ) {
        let case = Case::new([rows, hidden, vocab], tied, seed).with(bias, cap);
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
        tracked in prop::sample::select(vec![
            [true, true, true],
            [true, false, false],
            [false, true, false],
            [false, false, true],
        ]),
        cap in caps(),
        seed: u64,
    ) {
        let case = Case::new([rows, hidden, vocab], true, seed).with(true, cap);
        let bias = case.bias.clone().unwrap();
        let (x, embedding) = (values(&case.x), values(&case.head.clone().transpose()));
        let of_bias = values(&bias);
        let dnll = values(&case.dnll);
        let loss = |x: &[f64], embedding: &[f64], bias: &[f64]| -> f64 {
            let of_row = |row: usize| {
                let logit = |token: usize| -> f64 {
                    let pairs = x[row * hidden..][..hidden].iter().zip(&embedding[token * hidden..]);
                    let logit = pairs.map(|(x, e)| x * e).sum::<f64>() + bias[token];
                    cap.map_or(logit, |cap| cap * (logit / cap).tanh())
                };
                let sum: f64 = (0..vocab).map(|token| logit(token).exp()).sum();
                (sum.ln() - logit(case.targets[row] as usize)) * f64::from(dnll[row])
            };
            (0..rows).map(of_row).sum()
        };
        let lift = |t: Tensor<2>, tracked: bool| if tracked { leaf(&t) } else { t };
        let tx = lift(case.x.clone(), tracked[0]);
        let te = lift(case.head.clone().transpose(), tracked[1]);
        let tb = if tracked[2] { leaf(&bias) } else { bias };
        let head = OutputHead::new(te.clone().transpose()).with_bias(tb.clone()).with_softcap(cap);
        let nll = linear_cross_entropy(tx.clone(), head, case.targets(DType::I64));
        let grads = (nll * case.dnll.clone().autodiff()).sum().backward();
        let [wide_x, wide_e, wide_b] = [&x, &embedding, &of_bias].map(|t| doubles(t));
        if tracked[0] {
            let expected = slopes(&x, |x| loss(x, &wide_e, &wide_b));
            assert_close(&values(&tx.grad(&grads).unwrap()), &expected, 1e-5);
        }
        if tracked[1] {
            let expected = slopes(&embedding, |embedding| loss(&wide_x, embedding, &wide_b));
            assert_close(&values(&te.grad(&grads).unwrap()), &expected, 1e-5);
        }
        if tracked[2] {
            let expected = slopes(&of_bias, |bias| loss(&wide_x, &wide_e, bias));
            assert_close(&values(&tb.grad(&grads).unwrap()), &expected, 1e-5);
        }
    }
}

/// A matrix is a head without a bias and a cap, and a bias of zeros changes no bit.
#[test]
fn a_matrix_is_a_head() {
    let case = Case::new([5, 7, 300], false, 21);
    let targets = || case.targets(DType::I64);
    let run = |head: OutputHead| {
        bits(&values(&linear_cross_entropy(
            case.x.clone(),
            head,
            targets(),
        )))
    };
    let alone = run(case.head.clone().into());
    let zeros = Tensor::zeros([300], &Device::flex());
    assert!(run(OutputHead::new(case.head.clone()).with_bias(zeros)) == alone);
    let capped = OutputHead::new(case.head.clone()).with_softcap(0.5);
    assert!(run(capped.clone()) != alone);
    assert!(run(capped.with_softcap(None)) == alone);
}

#[test]
#[should_panic(expected = "the shape of the bias of the head")]
fn a_bias_is_of_the_vocabulary() {
    let case = Case::new([2, 3, 7], false, 22);
    let head = OutputHead::new(case.head.clone()).with_bias(Tensor::zeros([1], &Device::flex()));
    linear_cross_entropy(case.x.clone(), head, case.targets(DType::I32));
}

/// With several chunks of rows, slabs of columns and tiles of products.
#[test]
fn slabs_add_up() {
    for tied in [false, true] {
        let case = Case::new([1100, 3, 4500], tied, 12).with(tied, tied.then_some(1.0));
        for (found, expected) in case.native().iter().zip(&case.reference()) {
            assert_close(found, expected, 1e-5);
        }
        assert_same_on_any_threads(|| case.native());
    }
}

#[test]
fn other_dtypes_take_the_composed_operations() {
    let case = Case::new([7, 4, 30], false, 16).with(true, Some(0.5));
    let (x, weight) = (leaf(&wide(&case.x)), leaf(&wide(&case.head)));
    let bias = leaf(&wide(case.bias.as_ref().unwrap()));
    let head = OutputHead::new(weight.clone())
        .with_bias(bias.clone())
        .with_softcap(case.cap);
    let nll = linear_cross_entropy(x.clone(), head, case.targets(DType::I32));
    let grads = (nll.clone() * wide(&case.dnll).autodiff()).sum().backward();
    let [expected, _, dx, dhead, dbias] = case.reference();
    assert_close(&wide_values(nll.inner()), &expected, 1e-13);
    let dnll = doubles(&values(&case.dnll));
    let dx: Vec<f64> = dx
        .iter()
        .enumerate()
        .map(|(at, dx)| dx * dnll[at / 4])
        .collect();
    assert_close(&wide_values(x.grad(&grads).unwrap()), &dx, 1e-13);
    assert_close(&wide_values(weight.grad(&grads).unwrap()), &dhead, 1e-13);
    assert_close(&wide_values(bias.grad(&grads).unwrap()), &dbias, 1e-13);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let case = Case::new([300, 600, 700], true, 13);
    assert_same_on_any_threads(|| case.native());
    let case = case.with(true, Some(2.0));
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
    for (at, tied, cap) in [(0, false, None), (1, true, None), (0, true, Some(3.0))] {
        for dtype in [DType::BF16, DType::F16] {
            let case = Case::new([rows, hidden, vocab], tied, at + 1).with(cap.is_some(), cap);
            let head = case.head.clone().cast(dtype);
            let bias = case.bias.clone().map(|bias| bias.cast(dtype));
            let run = |of_x: DType, weight: Tensor<2>| {
                let x = leaf(&case.x.clone().cast(dtype).cast(of_x));
                let bias = bias
                    .clone()
                    .map(|bias| bias.cast(weight.dtype()).autodiff());
                let head = OutputHead::new(weight.autodiff())
                    .with_bias(bias)
                    .with_softcap(cap);
                let nll = linear_cross_entropy(x.clone(), head, case.targets(DType::I64));
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
            let head = Head {
                weight: primitive(&head),
                bias: bias.map_or(Bias::Absent, |bias| Bias::Each(primitive(&bias))),
                softcap: cap.map(Softcap::new),
            };
            let (found, _, _) = composed::forward::<Flex>(of_x, head, targets, true);
            assert_eq!(found.dtype(), DType::F32);
            assert_within(found, &primitive(&wide(&nll)), unit);
        }
    }
}
