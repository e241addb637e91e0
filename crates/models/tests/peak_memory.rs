//! The memory of training and decoding.

#[path = "../../kernels/tests/counting/mod.rs"]
mod counting;

use std::path::Path;
use std::slice;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use models::{
    FloatType, LlamaConfig, Model, Pretrained, Streaming, Tokenizer, load, load_as, quantize_to,
    save_dense,
};
use peft::{Batch, CausalLm, FitConfig, Linears, Peqa};
use quant_core::{Optq, Quantizer, Rtn};

#[path = "fixtures/word_level.rs"]
mod word_level;

const HIDDEN: usize = 64;
/// So many that the input of a block is large beside burn's handles of the block's tensors, of half a KiB each.
const N: usize = 64;
const SEQ: usize = 64;

fn llama(num_hidden_layers: usize, vocab_size: usize) -> Model {
    let config = LlamaConfig::default()
        .with_vocab_size(vocab_size)
        .with_hidden_size(HIDDEN)
        .with_intermediate_size(160)
        .with_num_hidden_layers(num_hidden_layers)
        .with_num_attention_heads(4)
        .with_num_key_value_heads(2)
        .with_head_dim(16)
        .with_max_position_embeddings(SEQ)
        .with_tie_word_embeddings(true);
    let mut model = Model::init(&config, 1, &Device::flex()).no_grad();
    models::quantize(&mut model, &Rtn::new(), &[], |_| {}).unwrap();
    model
}

fn peqa(num_hidden_layers: usize) -> Model {
    let mut model = llama(num_hidden_layers, 32);
    peft::attach(&mut model, &Peqa::new()).unwrap();
    model
}

/// One after the other: what one allocates would be counted to the other.
#[test]
fn what_is_kept() {
    checkpointing_keeps_the_inputs_of_the_blocks();
    a_cached_token_is_written_in_its_place();
    a_packed_head_stays_packed();
    a_packed_head_is_unpacked_once();
    a_tokenizer_is_not_larger_than_its_file();
    weights_of_16_bits_take_half_the_bytes();
    a_streamed_model_is_never_in_memory_whole();
    the_planned_memory_is_that_of_the_peak();
}

/// A block more costs its input, where its gradients are made from it alone.
fn checkpointing_keeps_the_inputs_of_the_blocks() {
    let tokens = Tensor::<1, Int>::arange(0..(N * SEQ) as i64, &Device::flex());
    let batch = Batch::new((tokens % 32).reshape([N, SEQ])).unwrap();
    let growth = |checkpoint_blocks| {
        let config = FitConfig::new()
            .with_steps(Some(2))
            .with_checkpoint_blocks(checkpoint_blocks);
        let peak = |n_blocks| {
            let mut model = peqa(n_blocks);
            let batches = [batch.clone()];
            let mut run = || drop(peft::fit(&mut model, &batches, &config, |_, _| {}).unwrap());
            run(); // The thread pool and its buffers come to stay.
            counting::peak_of(run)
        };
        (peak(8) - peak(4)) / 4
    };
    let input = N * SEQ * HIDDEN * size_of::<f32>();
    let (with, without) = (growth(true), growth(false));
    assert!(
        with < input * 6 / 5,
        "{with} bytes per block, its input is {input}"
    );
    assert!(
        without > input * 10,
        "{without} bytes per block without checkpoints"
    );
}

/// Between two times that the cache grows, a token is written into it without a copy.
fn a_cached_token_is_written_in_its_place() {
    let model = peqa(2);
    let read = |seq| Tensor::<2, Int>::ones([1, seq], &Device::flex());
    let mut cache = model.cache(4000).unwrap();
    model.forward_cached(read(1000), &mut cache).unwrap();
    let mut step = || drop(model.forward_cached(read(1), &mut cache).unwrap());
    let keys = 2000 * 2 * 16 * size_of::<f32>();
    let growing = counting::peak_of(&mut step);
    assert!(growing > 2 * keys, "{growing} bytes for keys of {keys}");
    let above = counting::peak_of(&mut step);
    assert!(above < keys * 3 / 4, "{above} bytes beside keys of {keys}");
}

/// The head of the loss is unpacked into one dense matrix where the model trains, too.
fn a_packed_head_is_unpacked_once() {
    const VOCAB: usize = 8192;
    let mut model = llama(1, VOCAB);
    models::quantize_head(&mut model, &Rtn::new()).unwrap();
    for model in [model.clone(), model.train()] {
        drop(model.head().weight().to_dense());
        let above = counting::peak_of(|| drop(model.head().weight().to_dense()));
        let dense = VOCAB * HIDDEN * size_of::<f32>();
        assert!(above < dense * 5 / 4, "{above} bytes for a head of {dense}");
    }
}

/// A token is decoded without unpacking the head.
fn a_packed_head_stays_packed() {
    const VOCAB: usize = 8192;
    let mut model = llama(1, VOCAB);
    models::quantize_head(&mut model, &Rtn::new()).unwrap();
    let token = Tensor::<2, Int>::ones([1, 1], &Device::flex());
    let mut cache = model.cache(8).unwrap();
    let mut step = || drop(model.forward_cached(token.clone(), &mut cache).unwrap());
    step();
    let (above, logits) = (counting::peak_of(&mut step), VOCAB * size_of::<f32>());
    assert!(
        above < 4 * logits,
        "{above} bytes for logits of {logits}, a dense head has {HIDDEN} times as many"
    );
}

/// A size in a file is compared with the file before it is allocated: here that of a table of characters,
/// whose 12 bytes state 4 GiB.
fn a_tokenizer_is_not_larger_than_its_file() {
    let json =
        br#"{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAA"},
        "padding": {"strategy": {"Fixed": 1000000000000}, "direction": "Right", "pad_id": 0,
            "pad_type_id": 0, "pad_token": "", "pad_to_multiple_of": 1000000000000},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 4294967295}, "unk_token": "<unk>"}}"#;
    let open = || assert!(Tokenizer::from_bytes(json, Path::new("tokenizer.json")).is_err());
    let peak = counting::peak_of(open);
    assert!(peak < 1 << 20, "{peak}");
}

/// A model of 200 MB in `bf16` is quantized in a small part of that.
fn a_streamed_model_is_never_in_memory_whole() {
    const BLOCKS: usize = 24;
    let dir = tempfile::tempdir().unwrap();
    let (dense, tokenizer) = (dir.path().join("dense"), dir.path().join("tokenizer.json"));
    word_level::write_tokenizer(&tokenizer, 64);
    let config = LlamaConfig::default()
        .with_vocab_size(64)
        .with_hidden_size(512)
        .with_intermediate_size(2048)
        .with_num_hidden_layers(BLOCKS)
        .with_num_attention_heads(8)
        .with_num_key_value_heads(8)
        .with_head_dim(64);
    let model = Model::init(&config, 1, &Device::flex());
    let dims = model
        .linears()
        .into_iter()
        .map(|(_, linear)| linear.weight().dims());
    let block = dims.map(|[d_in, d_out]| 4 * d_in * d_out).sum::<usize>() / BLOCKS;
    let lm = Pretrained::new(model, &tokenizer).unwrap();
    save_dense(&lm, &dense, FloatType::Bf16).unwrap();
    drop(lm);
    let size = std::fs::metadata(dense.join("model.safetensors"))
        .unwrap()
        .len() as usize;
    assert!(size > 200_000_000, "{size}");

    let tokens = Tensor::<1, Int>::arange(0..256, &Device::flex());
    let batch = Batch::new((tokens.clone() * tokens % 61).reshape([2, 128])).unwrap();
    let peak = |quantizer: &dyn Quantizer, calibration: &[Batch], name: &str| {
        let settings = Streaming::new(&Device::flex());
        counting::peak_of(|| {
            let out = dir.path().join(name);
            quantize_to(&dense, &out, &quantizer, calibration, &settings, |_| {}).unwrap();
        })
    };
    let rtn = peak(&Rtn::new().with_group_size(64), &[], "rtn");
    assert!(rtn < block * 3, "{rtn} bytes for blocks of {block}");
    let optq = Optq::new().with_group_size(64);
    // The first factorization reserves a workspace of the size of the last cache, which comes to stay.
    peak(&optq, slice::from_ref(&batch), "first");
    let optq = peak(&optq, &[batch], "optq");
    // The Gram of 2048 inputs, its factor and what they are made from.
    let grams = 4 * 4 * 2048 * 2048;
    assert!(
        optq < block * 2 + grams,
        "{optq} bytes for blocks of {block}"
    );
    assert!(rtn.max(optq) < 2 * size / 3, "a third of the size in f32");
}

/// Of sources in `bf16` and `f32`, with a head that is copied and one that is packed, tied or not.
fn the_planned_memory_is_that_of_the_peak() {
    /// The program itself, which is not on the heap.
    const PROGRAM: u64 = 30 << 20;
    let tokens = Tensor::<1, Int>::arange(0..256, &Device::flex());
    let batch = Batch::new((tokens.clone() * tokens % 61).reshape([2, 128])).unwrap();
    let (rtn, optq) = (
        Rtn::new().with_group_size(64),
        Optq::new().with_group_size(64),
    );
    let cases = [
        (64, true, FloatType::Bf16),
        (64, true, FloatType::F32),
        (20_000, false, FloatType::Bf16),
        (20_000, true, FloatType::Bf16),
        (20_000, false, FloatType::F32),
        (20_000, true, FloatType::F32),
    ];
    for (vocab_size, tied, float) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (dense, tokenizer) = (dir.path().join("dense"), dir.path().join("tokenizer.json"));
        word_level::write_tokenizer(&tokenizer, vocab_size);
        let config = LlamaConfig::default()
            .with_vocab_size(vocab_size)
            .with_hidden_size(512)
            .with_intermediate_size(2048)
            .with_num_hidden_layers(2)
            .with_num_attention_heads(8)
            .with_num_key_value_heads(8)
            .with_head_dim(64)
            .with_tie_word_embeddings(tied);
        let model = Model::init(config, 1, &Device::flex());
        let lm = Pretrained::new(model, &tokenizer).unwrap();
        save_dense(&lm, &dense, float).unwrap();
        drop(lm);
        let runs: [(&dyn Quantizer, &[Batch]); 2] = [(&rtn, &[]), (&optq, slice::from_ref(&batch))];
        for (quantizer, calibration) in runs {
            let plan = models::plan(&dense, &quantizer).unwrap();
            for head in [None, Some(&rtn as &dyn Quantizer)] {
                let mut settings = Streaming::new(&Device::flex());
                if let Some(head) = head {
                    settings = settings.with_head(head);
                }
                let peak = || {
                    counting::peak_of(|| {
                        let out = dir.path().join("out");
                        quantize_to(&dense, &out, &quantizer, calibration, &settings, |_| {})
                            .unwrap();
                        std::fs::remove_dir_all(out).unwrap();
                    })
                };
                peak(); // Workspaces come to stay.
                let peak = peak() as u64;
                let n_tokens = 256 * calibration.len();
                let format = head.map(|head| head.format().unwrap());
                let planned = plan.memory(quantizer.needs(), format, n_tokens, n_tokens);
                let planned = planned - PROGRAM;
                assert!(
                    peak < planned * 11 / 10 && planned < peak * 6 / 5,
                    "{peak} bytes, planned {planned}: {vocab_size} {tied} {float:?} {quantizer:?} {format:?}"
                );
            }
        }
    }
}

/// Of a model that computes in `f32`, too.
fn weights_of_16_bits_take_half_the_bytes() {
    let device = Device::flex();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_bf16");
    let scratch = tempfile::tempdir().unwrap();
    let lm = load(&golden, &device).unwrap();
    let kept_in = |float: FloatType, compute: FloatType| {
        let dir = scratch.path().join(format!("{float:?} {compute:?}"));
        save_dense(&lm, &dir, float).unwrap();
        drop(load(&dir, &device).unwrap());
        let (lm, kept) = counting::kept_by(|| load_as(&dir, &device, compute).unwrap());
        drop(lm);
        kept
    };
    // Nearly all of it matrices; the rest of a model is the same in each.
    let file = std::fs::metadata(golden.join("model.safetensors")).unwrap();
    let matrices = file.len() as usize * 95 / 100;
    let wide = kept_in(FloatType::F32, FloatType::F32);
    assert!(wide > 2 * matrices);
    for (float, compute) in [
        (FloatType::Bf16, FloatType::F32),
        (FloatType::F16, FloatType::F32),
        (FloatType::Bf16, FloatType::Bf16),
    ] {
        let kept = kept_in(float, compute);
        assert!(
            kept + matrices < wide,
            "{kept} bytes in {float:?}, {wide} in F32, matrices of {matrices} in 16 bits"
        );
    }
}
