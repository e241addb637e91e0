//! Heads with a bias and a soft cap, dense and packed.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft::{Batch, Blocks, CausalLm, Head, Linear, Linears, Spans, Weight, token_nll};
use proptest::prelude::*;
use quant_core::{Quantizer, Rtn};

use crate::model::{Bigram, HIDDEN, VOCAB, batch, dense, numbers, tensor};

/// A [`Bigram`] whose logits have a bias and a soft cap.
#[derive(Module, Debug)]
struct Headed {
    inner: Bigram,
    head: Weight,
    bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    softcap: Option<f64>,
}

impl Headed {
    fn new(seed: u64, packed: bool, bias: bool, softcap: Option<f64>) -> Self {
        let weight = tensor(seed + 9, [HIDDEN, VOCAB]) * 3.0;
        let head = if packed {
            Weight::Quant(
                Rtn::new()
                    .with_group_size(32)
                    .quantize(weight, None)
                    .unwrap()
                    .weight,
            )
        } else {
            Weight::frozen(weight)
        };
        let values = TensorData::new(numbers(seed + 10, VOCAB), [VOCAB]);
        let values = Tensor::<1>::from_data(values, &Device::flex()) * 2.0;
        Self {
            inner: dense(seed),
            head,
            bias: bias.then(|| Param::from_tensor(values)),
            softcap,
        }
    }
}

impl Linears for Headed {
    fn linears(&self) -> Vec<(String, &Linear)> {
        self.inner.linears()
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        self.inner.linears_mut()
    }
}

impl Blocks for Headed {
    type Positions = ();

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn n_blocks(&self) -> usize {
        self.inner.n_blocks()
    }

    fn positions(&self, _: &Spans) {}

    fn embed(&self, tokens: Tensor<2, Int>, (): &()) -> Tensor<3> {
        self.inner.embed(tokens, &())
    }

    fn block(&self, index: usize, x: Tensor<3>, (): &()) -> Tensor<3> {
        self.inner.block(index, x, &())
    }
}

impl CausalLm for Headed {
    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.inner.norm(x)
    }

    fn head(&self) -> Head<'_> {
        Head::from(&self.head)
            .with_bias(self.bias.as_ref().map(Param::val))
            .with_softcap(self.softcap)
    }
}

fn values<const D: usize>(t: Tensor<D>) -> Vec<f64> {
    t.into_data().convert::<f64>().try_into_vec().unwrap()
}

proptest! {
    /// Logits are those of the formula, and losses those of the logits, of all targets and of some.
    #[test]
    fn a_bias_and_a_cap_are_in_all_results(
        seed in 0..1000u64,
        packed: bool,
        bias: bool,
        softcap in prop::sample::select(vec![None, Some(1.0), Some(30.0)]),
    ) {
        let model = Headed::new(seed, packed, bias, softcap);
        let (n, seq) = (2, 6);
        let tokens = batch(seed, [n, seq]).tokens();
        let x = (0..2).fold(model.embed(tokens.clone(), &()), |x, at| model.block(at, x, &()));
        let x = values(x);
        let weight = values(model.head().weight().to_dense());
        let of_bias = model.bias.as_ref().map_or(vec![0.0; VOCAB], |bias| values(bias.val()));
        let logits = x.chunks_exact(HIDDEN).flat_map(|x| {
            (0..VOCAB).map(|token| {
                let terms = x.iter().enumerate().map(|(i, x)| x * weight[i * VOCAB + token]);
                let logit = terms.sum::<f64>() + of_bias[token];
                softcap.map_or(logit, |cap| cap * (logit / cap).tanh())
            })
        });
        let logits: Vec<f64> = logits.collect();
        for (found, expected) in values(model.forward(tokens.clone())).iter().zip(&logits) {
            prop_assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
        }

        let ids = values(tokens.clone().float());
        let expected: Vec<f64> = (0..n * (seq - 1))
            .map(|at| {
                let (row, position) = (at / (seq - 1), at % (seq - 1));
                let logits = &logits[(row * seq + position) * VOCAB..][..VOCAB];
                let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
                sum.ln() - logits[ids[row * seq + position + 1] as usize]
            })
            .collect();
        let of_text: Vec<bool> = (0..n * seq).map(|at| at % 3 != 1).collect();
        let some = Batch::new(tokens.clone()).unwrap().with_targets(&of_text).unwrap();
        for batch in [Batch::new(tokens).unwrap(), some] {
            let found = values(token_nll(&model, &batch));
            for ((found, expected), is_target) in found.iter().zip(&expected).zip(batch.targets()) {
                let expected = if is_target { *expected } else { 0.0 };
                prop_assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
            }
        }
    }
}

/// A bias at rest in another dtype than `x` is converted, and logits have the dtype of `x`.
#[test]
fn a_bias_may_have_another_dtype() {
    let device = Device::flex();
    let (bf16, f32) = (DType::BF16, DType::F32);
    for (of_x, of_bias) in [(bf16, f32), (f32, bf16)] {
        let bias = Tensor::<1>::from_data([0.5, -2.0], (&device, of_bias));
        let head = Head::from(Tensor::<2>::zeros([4, 2], (&device, of_x))).with_bias(bias);
        let x = Tensor::<2>::ones([1, 4], (&device, of_x));
        let logits = head.logits(x.clone());
        assert_eq!(logits.dtype(), of_x);
        assert_eq!(values(logits), [0.5, -2.0]);
        let nll = head.nll(x, Tensor::from_data([1], &device));
        assert_eq!(nll.dtype(), f32);
        assert!((values(nll)[0] - (1.0 + 2.5f64.exp()).ln()).abs() < 1e-6);
    }
}
