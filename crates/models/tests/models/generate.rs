//! Generation with a KV cache gives what the whole text gives.

use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{Config, Error, Generation, LlamaConfig, Model, Result, RopeScaling, generate};
use peft::CausalLm;
use proptest::prelude::*;
use quant_core::{NormalFloat, Rtn};

use super::fixtures::{self, SMALL, Sizes, architectures, cases};

const VOCAB: usize = 32;

fn config(n_kv: usize, rope_scaling: RopeScaling) -> LlamaConfig {
    fixtures::llama()
        .with_vocab_size(VOCAB)
        .with_intermediate_size(40)
        .with_num_hidden_layers(3)
        .with_num_key_value_heads(n_kv)
        .with_max_position_embeddings(96)
        .with_rope_scaling(rope_scaling)
        .with_attention_bias(n_kv == 2)
        .with_attention_output_bias(n_kv == 2)
        .with_tie_word_embeddings(n_kv == 1)
}

fn ropes() -> impl Strategy<Value = RopeScaling> {
    prop::sample::select(vec![
        RopeScaling::None,
        RopeScaling::Linear { factor: 2.0 },
        RopeScaling::Dynamic { factor: 2.0 },
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original: 32,
        },
        RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: 1.1,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original: 24,
            truncate: true,
        },
    ])
}

/// LLaMAs with every rope scaling, OPTs of both styles, and models of every architecture.
fn configs() -> impl Strategy<Value = Config> {
    let llama = (prop::sample::select(vec![1, 2, 4]), ropes());
    let llama = llama.prop_map(|(n_kv, rope)| Config::Llama(config(n_kv, rope)));
    let opt = (any::<bool>(), any::<bool>()).prop_map(|(is_small, tied)| {
        let config = fixtures::opt()
            .with_vocab_size(VOCAB)
            .with_ffn_dim(40)
            .with_num_hidden_layers(3)
            .with_max_position_embeddings(96)
            .with_word_embed_proj_dim(if is_small { 24 } else { 16 })
            .with_do_layer_norm_before(is_small)
            .with_tie_word_embeddings(tied);
        Config::Opt(config)
    });
    let sizes = Sizes {
        vocab: VOCAB,
        positions: 96,
        ..SMALL
    };
    let all = prop::sample::select(architectures(sizes));
    prop_oneof![llama, opt, all]
}

/// Random weights, large enough for attention to matter: dense, or packed in one of two formats,
/// without the head or with it.
fn model(config: impl Into<Config>, seed: u64, format: usize) -> Model {
    use burn::module::{Module, ModuleMapper, Param};
    struct Louder;
    impl ModuleMapper for Louder {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|values| if D == 2 { values * 10.0 } else { values })
        }
    }
    let mut model = Model::init(config, seed, &Device::flex()).map(&mut Louder);
    match format {
        0 => {}
        2 => {
            let nf4 = NormalFloat::new().with_block_size(8);
            models::quantize(&mut model, &nf4, &[], |_| {}).unwrap();
        }
        _ => {
            let rtn = Rtn::new().with_group_size(8);
            models::quantize(&mut model, &rtn, &[], |_| {}).unwrap();
            if format == 3 {
                models::quantize_head(&mut model, &rtn).unwrap();
            }
        }
    }
    model
}

fn tokens(ids: &[u32], n: usize) -> Tensor<2, Int> {
    let values: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    Tensor::from_data(TensorData::new(values, [n, ids.len() / n]), &Device::flex())
}

/// The likeliest tokens, one after the other.
fn greedy(
    model: &Model,
    prompt: &[u32],
    n_new: usize,
    stop: Option<u32>,
    mut on_token: impl FnMut(u32),
) -> Result<Vec<u32>> {
    let settings = Generation::new(n_new).with_stop(stop);
    generate(model, prompt, &settings, |token| {
        on_token(token);
        ControlFlow::Continue(())
    })
}

/// The logits after the last token of each of `n` texts, all of their tokens read at once.
fn last_logits(model: &Model, ids: &[u32], n: usize) -> Vec<f32> {
    let all: Vec<f32> = model
        .forward(tokens(ids, n))
        .into_data()
        .try_into_vec()
        .unwrap();
    let texts = all.chunks(all.len() / n);
    texts
        .flat_map(|text| text[text.len() - VOCAB..].to_vec())
        .collect()
}

fn argmax(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == largest).unwrap() as u32
}

fn assert_near(found: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let off = (found - expected).abs() / largest;
        assert!(off <= 1e-5, "{found} for {expected}, largest {largest}");
    }
}

proptest! {
    #![proptest_config(cases(32))]

    /// Texts cut anywhere, two at a time, into parts of one token and of several.
    #[test]
    fn a_cache_gives_the_logits_of_the_whole_text(
        config in configs(),
        format in 0..4usize,
        seed in 0..100u64,
        parts in prop::collection::vec(prop::sample::select(vec![1usize, 1, 1, 2, 5, 33]), 1..8),
        n in 1..3usize,
    ) {
        let model = model(&config, seed, format);
        let len: usize = parts.iter().sum::<usize>().min(96);
        let ids: Vec<u32> = (0..n * len).map(|at| ((at * at + 7 * at) as u32 + seed as u32) % 32).collect();
        let text = |range: std::ops::Range<usize>| -> Vec<u32> {
            ids.chunks(len).flat_map(|text| text[range.clone()].to_vec()).collect()
        };
        let mut cache = model.cache(len).unwrap();
        let mut start = 0;
        for part in parts {
            let end = (start + part).min(len);
            if start == end {
                break;
            }
            let logits = model.forward_cached(tokens(&text(start..end), n), &mut cache).unwrap();
            prop_assert_eq!(cache.len(), end);
            let found: Vec<f32> = logits.into_data().try_into_vec().unwrap();
            assert_near(&found, &last_logits(&model, &text(0..end), n));
            start = end;
        }
        let full = model.forward_cached(tokens(&text(0..1), n), &mut cache);
        let refused = matches!(full, Err(Error::Generation(models::GenerationError::CacheFull { len: found, max_len })) if found == len + 1 && max_len == len);
        prop_assert!(refused);
    }

    /// Each token has the largest logit after the whole text before it, up to rounding.
    #[test]
    fn greedy_is_the_largest_logit_again_and_again(
        config in configs(),
        format in 0..4usize,
        seed in 0..100u64,
        n_prompt in 1..6usize,
    ) {
        let model = model(&config, seed, format);
        let mut ids: Vec<u32> = (0..n_prompt as u32).map(|at| (at * 11 + seed as u32) % 32).collect();
        let prompt = ids.clone();
        let mut seen = Vec::new();
        let new = greedy(&model, &prompt, 70, None, |token| seen.push(token)).unwrap();
        prop_assert_eq!(new.len(), 70);
        prop_assert_eq!(&seen, &new);
        for &token in &new {
            let logits = last_logits(&model, &ids, 1);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let off = largest - logits[token as usize];
            prop_assert!(off <= 2e-5 * largest.abs(), "{} for {largest}", logits[token as usize]);
            ids.push(token);
        }
        // Up to the first token that ends it, and with it.
        let stop = new[40];
        let until = new.iter().position(|&token| token == stop).unwrap() + 1;
        prop_assert_eq!(&greedy(&model, &prompt, 70, Some(stop), |_| {}).unwrap(), &new[..until]);
        prop_assert_eq!(greedy(&model, &prompt, 0, None, |_| {}).unwrap(), Vec::<u32>::new());
    }
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let model = model(config(2, RopeScaling::None), 1, 0);
    assert!(matches!(
        greedy(&model, &[], 4, None, |_| {}),
        Err(Error::Generation(models::GenerationError::NoTokens))
    ));
    let error = greedy(&model, &[3, 32], 4, None, |_| {}).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Peft(peft::Error::Token {
                token: 32,
                vocab_size: 32
            })
        ),
        "{error}"
    );
    // A room that no machine has is not taken before it is needed.
    let stop = greedy(&model, &[3], 1, None, |_| {}).unwrap()[0];
    assert_eq!(
        greedy(&model, &[3], usize::MAX, Some(stop), |_| {}).unwrap(),
        [stop]
    );
}

/// Beyond the positions that the model was made for, angles go on, except for those that would change.
#[test]
fn texts_longer_than_the_model_was_made_for() {
    let mut plain = config(2, RopeScaling::None);
    plain.max_position_embeddings = 8;
    let long = model(&plain, 1, 0);
    let new = greedy(&long, &[1, 2, 3], 20, None, |_| {}).unwrap();
    let ids = [&[1, 2, 3], &new[..19]].concat();
    assert_eq!(new[19], argmax(&last_logits(&long, &ids, 1)));

    plain.rope_scaling = RopeScaling::Dynamic { factor: 2.0 };
    let dynamic = model(&plain, 1, 0);
    // The last token of a text is not read.
    let new = greedy(&dynamic, &[1, 2, 3], 6, None, |_| {}).unwrap();
    let ids = [&[1, 2, 3], &new[..5]].concat();
    assert_eq!(new[5], argmax(&last_logits(&dynamic, &ids, 1)));
    let error = greedy(&dynamic, &[1, 2, 3], 7, None, |_| {}).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Generation(models::GenerationError::DynamicRope { max_len: 9, max: 8 })
        ),
        "{error}"
    );
}

#[test]
fn logits_that_are_not_finite_are_refused() {
    use burn::module::{Module, ModuleMapper, Param};
    struct Overflow;
    impl ModuleMapper for Overflow {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|values| if D == 1 { values * 1e30 } else { values })
        }
    }
    let model = model(config(2, RopeScaling::None), 1, 0).map(&mut Overflow);
    let error = greedy(&model, &[1, 2], 4, None, |_| {}).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Generation(models::GenerationError::NonFiniteLogits { position: 2 })
        ),
        "{error}"
    );
}
