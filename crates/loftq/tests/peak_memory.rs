//! The memory of an initialization beside the weight.

#[path = "../../kernels/tests/counting/mod.rs"]
mod counting;

use burn::tensor::{Device, Distribution, Tensor};
use loftq::{Initializer, Layer, LayerMethod, Loftq, LqLora, Pissa, Qera};
use models::{FloatType, LlamaConfig, Model, Pretrained, Streaming, initialize_to, save_dense};
use peft::Batch;
use quant_core::{Gram, NormalFloat, Rtn};

#[path = "../../models/tests/fixtures/word_level.rs"]
mod word_level;

const WIDTH: usize = 1024;

/// One after the other: what one allocates would be counted to the other.
#[test]
fn what_is_taken() {
    a_layer_takes_less_than_four_of_its_weights();
    a_streamed_model_is_never_in_memory_whole();
}

/// A model of 75 MB in `bf16` is initialized in a part of that, which does not grow with it.
fn a_streamed_model_is_never_in_memory_whole() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    word_level::write_tokenizer(&tokenizer, 64);
    let tokens = Tensor::<1, burn::tensor::Int>::arange(0..256, &Device::flex());
    let batch = Batch::new((tokens.clone() * tokens % 61).reshape([2, 128])).unwrap();
    let mut peak = |n_blocks| {
        let config = LlamaConfig::default()
            .with_vocab_size(64)
            .with_hidden_size(512)
            .with_intermediate_size(1024)
            .with_num_hidden_layers(n_blocks)
            .with_num_attention_heads(8)
            .with_num_key_value_heads(8)
            .with_head_dim(64);
        let model = Model::init(config, 1, &Device::flex());
        let lm = Pretrained::new(model, &tokenizer).unwrap();
        let dense = dir.path().join(format!("dense-{n_blocks}"));
        save_dense(&lm, &dense, FloatType::Bf16).unwrap();
        drop(lm);
        let (method, rtn) = (Qera::new(8), Rtn::new().with_group_size(64));
        let initializer = Initializer::new(&method, &rtn);
        let (settings, batches) = (Streaming::new(&Device::flex()), [batch.clone()]);
        let out = dir.path().join(format!("out-{n_blocks}"));
        let size = std::fs::metadata(dense.join("model.safetensors")).unwrap();
        let peak = counting::peak_of(|| {
            initialize_to(&dense, &out, &initializer, &batches, &settings, |_| {}).unwrap();
        });
        (peak, size.len() as usize)
    };
    // Libraries keep buffers.
    peak(1);
    let (few, _) = peak(4);
    let (many, size) = peak(14);
    assert!(size > 70_000_000, "{size}");
    // Beside the blocks, the adapters of all of them are in memory at the end.
    assert!(many < few + size / 20, "{many} bytes, {few} for 4 blocks");
    assert!(many < size / 2, "{many} bytes for {size}");
}

/// With the weight itself, that is.
fn a_layer_takes_less_than_four_of_its_weights() {
    let device = Device::flex();
    device.seed(1);
    let weight = Tensor::<2>::random([WIDTH, WIDTH], Distribution::Normal(0.0, 0.1), &device);
    let mut gram = Gram::new(WIDTH, &device);
    gram.update(weight.clone());
    let layer = Layer {
        path: "proj",
        weight: weight.clone(),
        gram: Some(&gram),
        fisher: None,
    };
    let n_bytes = 4 * WIDTH * WIDTH;
    let methods: [(&str, Box<dyn LayerMethod>); 4] = [
        ("loftq", Box::new(Loftq::new(16))),
        ("pissa", Box::new(Pissa::new(16))),
        ("lq-lora", Box::new(LqLora::new(16).with_max_rounds(5))),
        ("qera", Box::new(Qera::new(16))),
    ];
    for (name, method) in methods {
        for quantizer in [
            &NormalFloat::new() as &dyn quant_core::Quantizer,
            &Rtn::new().with_bits(2).with_group_size(64),
        ] {
            // The libraries of products keep buffers of a fixed size for each thread.
            method.start(&layer, quantizer).unwrap();
            // A thread that a busy machine kept from taking part makes its own in a later run.
            let peaks = [(); 3].map(|()| {
                counting::peak_of(|| {
                    method.start(&layer, quantizer).unwrap();
                })
            });
            let peak = peaks.into_iter().min().unwrap();
            // The closed form has the root of the Gram too, and its product with the error.
            let allowed = if name == "qera" { 9 } else { 6 } * n_bytes / 2;
            assert!(
                peak < allowed,
                "{name}: {:.2} weights beside the first",
                peak as f64 / n_bytes as f64
            );
        }
    }
}
