//! A random LLaMA and its calibration.

use burn::tensor::{Device, Distribution, Tensor};
use models::{LlamaConfig, Model};
use peft::Batch;
use quant_core::Rtn;

pub(crate) fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 48,
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        sliding_window: None,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        attention_bias: true,
        attention_output_bias: true,
        mlp_bias: false,
        tie_word_embeddings: false,
    }
}

pub(crate) fn model() -> Model {
    Model::init(config(), 3, &Device::flex())
}

pub(crate) fn batches(n: usize) -> Vec<Batch> {
    let device = Device::flex();
    device.seed(5);
    let batch = |_| {
        let tokens = Tensor::<2>::random([4, 24], Distribution::Uniform(0.0, 48.0), &device);
        Batch::new(tokens.int()).unwrap()
    };
    (0..n).map(batch).collect()
}

pub(crate) fn rtn(bits: usize) -> Rtn {
    Rtn::new().with_bits(bits).with_group_size(8)
}
