//! Writes a checkpoint of a real model's shape with random weights in `bf16`, in one file for each block, to
//! measure time and memory with.
//!
//! `cargo run --release --package quant-models --example random_checkpoint -- tinyllama-1.1b DIR`
//!
//! The shapes are those of TinyLlama-1.1B (`tinyllama-1.1b`, 2.2 GB) and Llama-3.1-8B (`llama-3.1-8b`, 16 GB),
//! and one of 20 MB (`small`). The tokenizer has a word for each token.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use models::{Config, LlamaConfig};
use serde_json::json;
use tensor_files::{FloatType, LazyTensor, write_json, write_tensors};

#[path = "../tests/fixtures/word_level.rs"]
mod word_level;

/// The deviation of the weights.
const DEVIATION: f32 = 0.02;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [shape, dir] = &args[..] else {
        return Err(
            "give a shape (small, tinyllama-1.1b, llama-3.1-8b) and a new directory".into(),
        );
    };
    let config = match shape.as_str() {
        "tinyllama-1.1b" => LlamaConfig::default()
            .with_hidden_size(2048)
            .with_intermediate_size(5632)
            .with_num_hidden_layers(22)
            .with_num_key_value_heads(4)
            .with_head_dim(64)
            .with_max_position_embeddings(2048),
        "llama-3.1-8b" => LlamaConfig::default()
            .with_vocab_size(128_256)
            .with_intermediate_size(14_336)
            .with_num_key_value_heads(8)
            .with_max_position_embeddings(131_072)
            .with_rope_theta(500_000.0),
        "small" => LlamaConfig::default()
            .with_vocab_size(1000)
            .with_hidden_size(256)
            .with_intermediate_size(704)
            .with_num_hidden_layers(12)
            .with_num_attention_heads(4)
            .with_num_key_value_heads(4)
            .with_head_dim(64),
        other => return Err(format!("no shape `{other}`").into()),
    };
    tensor_files::write_directory(dir.as_str(), |dir| write(&config, dir))
}

fn write(config: &LlamaConfig, dir: &Path) -> Result<(), Box<dyn Error>> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let n = config.num_hidden_layers;
    let matrix = |name: &str, rows, columns| (format!("{name}.weight"), vec![rows, columns]);
    let norm = |name: &str| (format!("{name}.weight"), vec![hidden]);
    let mut files = vec![vec![matrix("model.embed_tokens", vocab, hidden)]];
    let projections = Config::from(config).projections();
    for block in 0..n {
        let path = format!("model.layers.{block}.");
        let of_block = projections
            .iter()
            .filter(|(name, _)| name.starts_with(&path));
        let mut tensors: Vec<_> = of_block
            .map(|(name, [d_in, d_out])| matrix(name, *d_out, *d_in))
            .collect();
        tensors.push(norm(&format!("{path}input_layernorm")));
        tensors.push(norm(&format!("{path}post_attention_layernorm")));
        files.push(tensors);
    }
    files.push(vec![norm("model.norm"), matrix("lm_head", vocab, hidden)]);

    let (n_files, mut seed) = (files.len(), 0);
    let mut weight_map = BTreeMap::new();
    for (at, tensors) in files.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{n_files:05}.safetensors", at + 1);
        let tensors = tensors.into_iter().map(|(tensor, shape)| {
            seed += 1;
            weight_map.insert(tensor.clone(), name.clone());
            (tensor, random(&shape, seed))
        });
        write_tensors(&dir.join(&name), tensors)?;
    }
    write_json(
        &dir.join("model.safetensors.index.json"),
        &json!({ "metadata": {}, "weight_map": weight_map }),
    )?;
    word_level::write_tokenizer(&dir.join("tokenizer.json"), vocab);
    let mut json = config.to_json();
    json.insert("dtype".into(), "bfloat16".into());
    Ok(write_json(&dir.join("config.json"), &json)?)
}

/// Norms near one, and weights that are nearly normal: sums of four bytes.
fn random(shape: &[usize], seed: u64) -> LazyTensor<'static> {
    let values = move |n: usize, center: f32| {
        // SplitMix64 (Steele et al. 2014).
        let mut state = seed << 40;
        let mut next = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        };
        let deviation = (4.0f32 * 65535.0 / 12.0).sqrt();
        let value = move |_| {
            let sum: u32 = (next() as u32)
                .to_le_bytes()
                .into_iter()
                .map(u32::from)
                .sum();
            center + DEVIATION * (sum as f32 - 510.0) / deviation
        };
        (0..n).map(value).collect()
    };
    match *shape {
        [n] => LazyTensor::floats_as(FloatType::Bf16, [n], move || values(n, 1.0)),
        [rows, columns] => LazyTensor::floats_as(FloatType::Bf16, [rows, columns], move || {
            values(rows * columns, 0.0)
        }),
        _ => unreachable!("a vector or a matrix"),
    }
}
