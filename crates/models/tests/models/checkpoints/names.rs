//! Tensors under other names than those that are written here, too many of them, and too few.

use std::path::Path;

use models::{Config, Streaming, plan, quantize_to, save, save_dense};
use peft::PerLayer;
use proptest::prelude::*;
use quant_core::Rtn;
use safetensors::Dtype;
use tensor_files::FloatType;

use super::*;
use crate::fixtures::{cases, configs};

const HEAD: &str = "lm_head.weight";

/// The name of the embedding.
fn embedding(config: &Config) -> &'static str {
    match config {
        Config::Opt(_) => "model.decoder.embed_tokens.weight",
        Config::GptNeo(_) | Config::GptJ(_) => "transformer.wte.weight",
        _ => "model.embed_tokens.weight",
    }
}

/// Changes the tensors of a directory.
fn rewrite(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut all = tensors(dir);
    change(&mut all);
    write(dir, &all);
}

/// Asserts that a directory is the one of the model, however it is read.
fn assert_is(dir: &Path, lm: &Pretrained) {
    let again = load(dir, &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    let planned = plan(dir, &PerLayer::default()).unwrap();
    assert_eq!(planned.layers.len(), lm.model.linears().len());
}

/// Quantizes a directory from files to files, to the tensors of the result.
fn streamed(dir: &Path) -> Model {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let settings = Streaming::new(&Device::flex());
    quantize_to(dir, &out, &Rtn::new(), &[], &settings, |_| {}).unwrap();
    load(&out, &Device::flex()).unwrap().model
}

proptest! {
    #![proptest_config(cases(16))]

    /// Where the head is the embedding, the file may have it under the name of the head alone; and a model
    /// that was saved without its head has no `model.` before its names. transformers reads both.
    #[test]
    fn a_model_is_read_under_the_names_of_its_parts(config in configs(), seed in 0..100u64) {
        let (place, lm) = fixtures::pretrained(config.clone(), seed);
        let dir = place.path().join("model");
        save(&lm, &dir).unwrap();
        let expected = Fingerprint::of(&streamed(&dir));
        if config.tie_word_embeddings() {
            let plain = tensors(&dir);
            rewrite(&dir, |all| {
                let matrix = all.remove(embedding(&config)).unwrap();
                all.insert(HEAD.into(), matrix);
            });
            assert_is(&dir, &lm);
            prop_assert_eq!(Fingerprint::of(&streamed(&dir)), expected.clone());
            write(&dir, &plain);
        }
        rewrite(&dir, |all| {
            let short = |name: String| name.strip_prefix("model.").map_or(name.clone(), Into::into);
            *all = std::mem::take(all).into_iter().map(|(name, of)| (short(name), of)).collect();
        });
        assert_is(&dir, &lm);
        prop_assert_eq!(Fingerprint::of(&streamed(&dir)), expected);
    }
}

/// Of packed models, too.
#[test]
fn packed_models_may_lack_the_first_part_of_their_names() {
    for name in [GPTQ, NF4] {
        let dir = copy(&golden(name));
        rewrite(dir.path(), |all| {
            let short = |name: String| name.strip_prefix("model.").map_or(name.clone(), Into::into);
            *all = std::mem::take(all)
                .into_iter()
                .map(|(name, of)| (short(name), of))
                .collect();
        });
        assert_is(dir.path(), &load(golden(name), &Device::flex()).unwrap());
    }
}

/// An untied head is neither the embedding nor made up, which transformers does.
#[test]
fn a_matrix_that_is_missed_is_named() {
    let (place, lm) = pretrained(&config(32, 64));
    let dir = place.path().join("model");
    save(&lm, &dir).unwrap();
    for (name, missing) in [
        (HEAD, HEAD),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ] {
        let plain = tensors(&dir);
        rewrite(&dir, |all| drop(all.remove(name)));
        let error = load(&dir, &Device::flex()).unwrap_err();
        let is_named = matches!(
            &error,
            Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor == missing
        );
        assert!(is_named, "{error}");
        write(&dir, &plain);
    }
}

/// Tensors of models that this one is no other than, and tensors that would make it another.
#[test]
fn what_a_model_does_not_need_is_passed_over_or_refused() {
    let (place, lm) = fixtures::pretrained(fixtures::opt(), 3);
    let opt = place.path().join("model");
    save_dense(&lm, &opt, FloatType::F32).unwrap();
    let (place, lm) = pretrained(
        &config(32, 64)
            .with_attention_bias(false)
            .with_attention_output_bias(false),
    );
    let llama = place.path().join("model");
    save_dense(&lm, &llama, FloatType::F32).unwrap();
    let of_zeros = |n: usize| (Dtype::F32, vec![n], vec![0; 4 * n]);
    let of_ones = |n: usize| (Dtype::F32, vec![n], [0, 0, 128, 63].repeat(n));
    let with = |dir: &Path, name: &str, tensor: &(Dtype, Vec<usize>, Vec<u8>)| {
        let plain = tensors(dir);
        rewrite(dir, |all| {
            all.insert(name.into(), tensor.clone());
        });
        let loaded = load(dir, &Device::flex());
        let planned = plan(dir, &PerLayer::default()).map(|_| ());
        assert!(planned.is_ok() || loaded.is_err());
        write(dir, &plain);
        loaded
    };
    for (dir, name) in [
        (&llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (&llama, "model.rotary_emb.inv_freq"),
        (&llama, "model.layers.0.self_attn.rotary_emb.cos_cached"),
        (&llama, "model.layers.0.self_attn.masked_bias"),
        (&llama, "model.layers.0.self_attn.bias"),
        (&llama, "model.embeddings.position_ids"),
        (&opt, "model.decoder.version"),
    ] {
        with(dir, name, &of_ones(4)).unwrap();
    }
    for (dir, module, n) in [
        (&llama, "model.layers.0.self_attn.q_proj", 32),
        (&llama, "model.layers.0.mlp.up_proj", 64),
        (&llama, "model.layers.0.input_layernorm", 32),
        (&llama, "model.norm", 32),
        (&llama, "lm_head", 16),
        (&opt, "lm_head", 16),
    ] {
        let name = format!("{module}.bias");
        let error = with(dir, &name, &of_ones(n)).map(|_| ());
        if module == "lm_head" && dir == &opt {
            assert_says(error.unwrap_err(), &[&name, "tie_word_embeddings"]);
        } else {
            assert_says(error.unwrap_err(), &[&name, "no place"]);
        }
        with(dir, &name, &of_zeros(n)).unwrap();
    }
    for (name, part) in [
        ("model.embed_positions.weight", "no place"),
        ("layers.0.other.weight", "`layers.0.other.weight`"),
        ("_orig_mod.model.norm.weight", "torch.compile"),
        ("module.model.norm.weight", "DistributedDataParallel"),
        ("base_model.model.model.norm.weight", "PEFT"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "no place"),
    ] {
        let error = with(&llama, name, &of_ones(4)).unwrap_err();
        assert_says(error, &[name, part]);
    }
}
