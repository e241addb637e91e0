//! A random LLaMA and its calibration.

use burn::tensor::{Device, Distribution, Tensor};
use models::{LlamaConfig, Model};
use peft::Batch;
use quant_core::Rtn;

pub(crate) fn model() -> Model {
    let config = LlamaConfig::default()
        .with_vocab_size(48)
        .with_hidden_size(32)
        .with_intermediate_size(40)
        .with_num_hidden_layers(2)
        .with_num_attention_heads(4)
        .with_num_key_value_heads(2)
        .with_head_dim(8)
        .with_max_position_embeddings(64)
        .with_attention_bias(true)
        .with_attention_output_bias(true);
    Model::init(config, 3, &Device::flex())
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
