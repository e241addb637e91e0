//! A small language model, dense or packed, and its training.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft::{Batch, Blocks, CausalLm, FitConfig, Head, Linear, Linears, Peqa, Spans, Weight, fit};
use quant_core::{Quantizer, Rtn};

pub(crate) const VOCAB: usize = 11;
pub(crate) const HIDDEN: usize = 128;
pub(crate) const WIDTH: usize = 256;

/// Predicts a token from the one before it, in two blocks and with the embedding for a head.
#[derive(Module, Debug)]
pub(crate) struct Bigram {
    pub(crate) embedding: Param<Tensor<2>>,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

impl Linears for Bigram {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("mlp.up".into(), &self.up), ("mlp.down".into(), &self.down)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![
            ("mlp.up".into(), &mut self.up),
            ("mlp.down".into(), &mut self.down),
        ]
    }
}

impl Blocks for Bigram {
    type Positions = ();

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn n_blocks(&self) -> usize {
        2
    }

    fn positions(&self, _: &Spans) {}

    fn embed(&self, tokens: Tensor<2, Int>, (): &()) -> Tensor<3> {
        let [batch, seq] = tokens.dims();
        let x = self
            .embedding
            .val()
            .select(0, tokens.reshape([batch * seq]));
        x.reshape([batch, seq, HIDDEN])
    }

    fn block(&self, index: usize, x: Tensor<3>, (): &()) -> Tensor<3> {
        match index {
            0 => silu(self.up.forward(x)),
            _ => self.down.forward(x),
        }
    }
}

impl CausalLm for Bigram {
    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        x
    }

    fn head(&self) -> Head<'_> {
        self.embedding.val().transpose().into()
    }
}

/// Numbers that a seed makes, without a generator that tests would share.
pub(crate) fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Of such a size that products keep the magnitude of their inputs.
pub(crate) fn tensor(seed: u64, dims: [usize; 2]) -> Tensor<2> {
    let values = TensorData::new(numbers(seed, dims[0] * dims[1]), dims);
    Tensor::<2>::from_data(values, &Device::flex()) * (3.0 / dims[0] as f32).sqrt()
}

pub(crate) fn dense(seed: u64) -> Bigram {
    let bias = Tensor::<1>::full([WIDTH], 0.1, &Device::flex());
    let bias = Param::from_tensor(bias).set_require_grad(false);
    Bigram {
        embedding: Param::from_tensor(tensor(seed, [VOCAB, HIDDEN])).set_require_grad(false),
        up: Linear::new(
            Weight::frozen(tensor(seed + 1, [HIDDEN, WIDTH])),
            Some(bias),
        ),
        down: Linear::new(Weight::frozen(tensor(seed + 2, [WIDTH, HIDDEN])), None),
    }
}

pub(crate) fn quantized(seed: u64, quantizer: &dyn Quantizer) -> Bigram {
    let mut model = dense(seed);
    for (path, linear) in model.linears_mut() {
        linear.quantize(&path, quantizer, None).unwrap();
    }
    model
}

pub(crate) fn batch(seed: u64, [n, seq]: [usize; 2]) -> Batch {
    let tokens = numbers(seed, n * seq)
        .into_iter()
        .map(|v| ((v + 1.0) * 1000.0) as i32 % VOCAB as i32);
    let tokens = TensorData::new(tokens.collect::<Vec<_>>(), [n, seq]);
    Batch::new(Tensor::from_data(tokens, &Device::flex())).unwrap()
}

pub(crate) fn logits(model: &Bigram) -> Vec<u32> {
    let logits = model.forward(batch(99, [2, 9]).tokens()).into_data();
    logits
        .try_into_vec::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits)
        .collect()
}

/// Ten steps at a rate that moves every scale.
pub(crate) fn tune(model: &mut Bigram, seed: u64) {
    let batches: Vec<Batch> = (0..5).map(|at| batch(seed + at, [2, 9])).collect();
    let config = FitConfig::new()
        .with_learning_rate(0.02)
        .with_steps(Some(10))
        .with_seed(seed);
    fit(model, &batches, &config, |_, _| {}).unwrap();
}

/// A packed model with a fresh PEQA.
pub(crate) fn adapted(seed: u64) -> Bigram {
    let mut model = quantized(seed, &Rtn::new().with_bits(3).with_group_size(4));
    peft::attach(&mut model, &Peqa::new()).unwrap();
    model
}

/// The largest difference of two models' logits, relative to the largest logit.
pub(crate) fn difference(a: &Bigram, b: &Bigram) -> f32 {
    let (a, b) = (logits(a), logits(b));
    let (a, b) = (
        a.into_iter().map(f32::from_bits),
        b.into_iter().map(f32::from_bits),
    );
    let largest = a.clone().fold(0.0, |most: f32, v| most.max(v.abs()));
    a.zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// The bits of all floats of a model.
pub(crate) fn parameters(model: &Bigram) -> Vec<u32> {
    struct Bits(Vec<u32>);
    impl ModuleVisitor for Bits {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let values = param.val();
            assert!(!values.device().is_autodiff());
            let values = values.into_data().try_into_vec::<f32>().unwrap();
            self.0.extend(values.into_iter().map(f32::to_bits));
        }
    }
    let mut bits = Bits(Vec::new());
    model.visit(&mut bits);
    bits.0
}
