//! The models that adapters and tasks are for.

use std::sync::OnceLock;

use burn::module::Module;
use models::{LlamaConfig, Model, OptConfig};
use quant_core::Rtn;

use crate::device;

/// A LLaMA of one block.
pub fn llama() -> LlamaConfig {
    LlamaConfig::default()
        .with_vocab_size(8)
        .with_hidden_size(8)
        .with_intermediate_size(8)
        .with_num_hidden_layers(1)
        .with_num_attention_heads(2)
        .with_num_key_value_heads(2)
        .with_head_dim(4)
        .with_max_position_embeddings(16)
}

/// An OPT of one block.
pub fn opt() -> OptConfig {
    OptConfig::default()
        .with_vocab_size(8)
        .with_hidden_size(8)
        .with_ffn_dim(8)
        .with_num_hidden_layers(1)
        .with_num_attention_heads(2)
        .with_max_position_embeddings(16)
        .with_word_embed_proj_dim(8)
}

/// A LLaMA, packed with 4 bits in groups of 4.
pub fn packed_model() -> Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    let packed = || {
        let mut model = Model::init(llama(), 1, &device()).no_grad();
        let rtn = Rtn::new().with_group_size(4);
        models::quantize(&mut model, &rtn, &[], |_| {}).expect("groups of 4 divide 8 inputs");
        model
    };
    MODEL.get_or_init(packed).clone()
}

/// An OPT, whose projections have biases.
pub fn dense_model() -> Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL
        .get_or_init(|| Model::init(opt(), 1, &device()).no_grad())
        .clone()
}
