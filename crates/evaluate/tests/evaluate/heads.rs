//! A head with a bias and a soft cap.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use evaluate::{ScoredWindow, compare, perplexity, score};
use models::{LlamaConfig, Model};
use peft::{Batch, Blocks, CausalLm, Head, Linear, Linears, Spans};

const CAP: f64 = 1.5;

/// A model whose logits have a bias and a soft cap.
#[derive(Module, Debug)]
struct Headed {
    inner: Model,
    bias: Param<Tensor<1>>,
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
    type Positions = <Model as Blocks>::Positions;

    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn n_blocks(&self) -> usize {
        self.inner.n_blocks()
    }

    fn positions(&self, spans: &Spans) -> Self::Positions {
        self.inner.positions(spans)
    }

    fn embed(&self, tokens: Tensor<2, Int>, positions: &Self::Positions) -> Tensor<3> {
        self.inner.embed(tokens, positions)
    }

    fn block(&self, index: usize, x: Tensor<3>, positions: &Self::Positions) -> Tensor<3> {
        self.inner.block(index, x, positions)
    }
}

impl CausalLm for Headed {
    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.inner.norm(x)
    }

    fn head(&self) -> Head<'_> {
        self.inner
            .head()
            .with_bias(self.bias.val())
            .with_softcap(CAP)
    }
}

/// Every protocol reads the same distributions: those of the logits with the bias and the cap.
#[test]
fn protocols_have_the_bias_and_the_cap_of_a_head() {
    const VOCAB: usize = 16;
    let device = Device::flex();
    let config = LlamaConfig::default()
        .with_vocab_size(VOCAB)
        .with_hidden_size(8)
        .with_intermediate_size(16)
        .with_num_hidden_layers(1)
        .with_num_attention_heads(2)
        .with_num_key_value_heads(2)
        .with_head_dim(4);
    let inner = Model::init(config, 1, &device);
    let bias = (0..VOCAB).map(|token| (token % 5) as f32 - 2.0);
    let bias = TensorData::new(bias.collect::<Vec<f32>>(), [VOCAB]);
    let model = Headed {
        inner: inner.clone(),
        bias: Param::from_tensor(Tensor::from_data(bias.clone(), &device)),
    };

    let ids = [3u32, 1, 4, 1, 5, 9, 2, 6];
    let row = TensorData::new(ids.map(i64::from).to_vec(), [1, ids.len()]);
    let tokens = Tensor::<2, Int>::from_data(row, &device);
    let without: Vec<f32> = inner
        .forward(tokens.clone())
        .into_data()
        .try_into_vec()
        .unwrap();
    let bias = bias.try_into_vec::<f32>().unwrap();
    let expected: Vec<f64> = without
        .chunks_exact(VOCAB)
        .zip(&ids[1..])
        .map(|(logits, &target)| {
            let logits = logits
                .iter()
                .zip(&bias)
                .map(|(&logit, &bias)| CAP * ((f64::from(logit) + f64::from(bias)) / CAP).tanh());
            let logits: Vec<f64> = logits.collect();
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            sum.ln() - logits[target as usize]
        })
        .collect();

    let window = ScoredWindow {
        tokens: ids.to_vec(),
        scored: 1..ids.len(),
    };
    let found = score(&model, &[window], &device).unwrap();
    assert_eq!(found[0].len(), expected.len());
    for (found, expected) in found[0].iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
    }
    let batches = [Batch::new(tokens).unwrap()];
    let mean = expected.iter().sum::<f64>() / expected.len() as f64;
    let found = perplexity(&model, &batches).unwrap().nll;
    assert!((found - mean).abs() < 1e-5, "{found} for {mean}");
    assert!(compare(&model, &inner, &batches).unwrap().divergence[0] > 0.1);
}
