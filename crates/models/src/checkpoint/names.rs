//! The names of tensors in files, which differ in how the model was saved.

use std::collections::{BTreeMap, BTreeSet};

use crate::Config;
use crate::source::{HEAD, weight_name};

/// Parts of names that the wrappers of training programs add, and the wrapper of each.
const WRAPPERS: [(&str, &str); 4] = [
    ("_orig_mod", "torch.compile"),
    ("_fsdp_wrapped_module", "PyTorch's FullyShardedDataParallel"),
    ("_checkpoint_wrapped_module", "PyTorch's checkpoint_wrapper"),
    ("base_layer", "PEFT, whose adapters are not merged"),
];

/// First parts of names that the wrappers of training programs add.
const OUTER_WRAPPERS: [(&str, &str); 2] = [
    (
        "module",
        "PyTorch's DistributedDataParallel, or of DeepSpeed",
    ),
    ("base_model", "PEFT"),
];

/// The name in its file of each tensor, by the name that a model of this shape has for it.
///
/// A model that was saved without its head lacks the first part of each name. Where the head is the
/// embedding, the file may have it under either name. transformers reads both.
///
/// Fails with a tensor and the problem with its name.
pub(super) fn names(
    stored: Vec<String>,
    shape: &Config,
) -> Result<BTreeMap<String, String>, (String, String)> {
    let in_file: BTreeSet<&String> = stored.iter().collect();
    let mut names = BTreeMap::new();
    let of_model = shape.shape();
    let prefix = format!("{}.", of_model.names.prefix);
    let base = format!("{}.", prefix.split('.').next().unwrap_or_default());
    for name in &stored {
        let full = format!("{base}{name}");
        let is_short = !name.starts_with(&base) && full.starts_with(&prefix);
        let of_head = name.split('.').next() == Some(HEAD);
        let known = if is_short && !of_head && !in_file.contains(&full) {
            full
        } else {
            name.clone()
        };
        if let Some((part, wrapper)) = wrapper(name) {
            let problem = format!(
                "is of a model inside of another module, of {wrapper}: save the model itself, whose names have no part `{part}`"
            );
            return Err((name.clone(), problem));
        }
        names.insert(known, name.clone());
    }
    let embedding = weight_name(&of_model.embedding_path());
    if shape.tie_word_embeddings()
        && !names.contains_key(&embedding)
        && let Some(head) = names.remove(&weight_name(HEAD))
    {
        names.insert(embedding, head);
    }
    Ok(names)
}

fn wrapper(name: &str) -> Option<(&'static str, &'static str)> {
    let outer = name.split('.').next()?;
    let mut outers = OUTER_WRAPPERS.into_iter();
    let mut inners = WRAPPERS.into_iter();
    let has = |part: &str| name.split('.').any(|found| found == part);
    inners
        .find(|(part, _)| has(part))
        .or_else(|| outers.find(|(part, _)| outer == *part))
}

/// Whether a tensor is a buffer that programs saved and no model reads: it follows from the configuration.
pub(super) fn is_buffer(name: &str) -> bool {
    let mut parts = name.rsplit('.');
    let (last, module) = (parts.next(), parts.next());
    match last {
        Some("inv_freq" | "cos_cached" | "sin_cached") => module == Some("rotary_emb"),
        // The causal mask, and what it puts in the place of later tokens.
        Some("bias" | "masked_bias") => {
            module.is_some_and(|module| ["self_attn", "attn", "attention"].contains(&module))
        }
        Some("position_ids") => true,
        // fairseq's, in OPTs that were converted early.
        Some("version") => module == Some("decoder"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GptNeoConfig, LlamaConfig, OptConfig};

    fn known(names_in_file: &[&str], config: impl Into<Config>) -> Vec<(String, String)> {
        let stored = names_in_file.iter().map(|name| name.to_string()).collect();
        names(stored, &config.into()).unwrap().into_iter().collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let pairs = pairs.iter();
        pairs.map(|(a, b)| (a.to_string(), b.to_string())).collect()
    }

    #[test]
    fn names_of_models_without_heads_lack_their_first_part() {
        let llama = LlamaConfig::default();
        let found = known(
            &["layers.0.a.weight", "lm_head.weight", "norm.weight"],
            Config::from(llama),
        );
        let expected = [
            ("lm_head.weight", "lm_head.weight"),
            ("model.layers.0.a.weight", "layers.0.a.weight"),
            ("model.norm.weight", "norm.weight"),
        ];
        assert_eq!(found, pairs(&expected));
        let neo = known(&["h.0.ln_1.weight", "wte.weight"], GptNeoConfig::default());
        let expected = [
            ("transformer.h.0.ln_1.weight", "h.0.ln_1.weight"),
            ("transformer.wte.weight", "wte.weight"),
        ];
        assert_eq!(neo, pairs(&expected));
        // Not what has a name of its own, and not a part of an OPT's base.
        let opt = OptConfig::default();
        let found = known(
            &["decoder.a", "decoder.b", "layers.0.a", "model.decoder.a"],
            Config::from(opt),
        );
        let expected = [
            ("decoder.a", "decoder.a"),
            ("layers.0.a", "layers.0.a"),
            ("model.decoder.a", "model.decoder.a"),
            ("model.decoder.b", "decoder.b"),
        ];
        assert_eq!(found, pairs(&expected));
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        let (head, embedding) = ("lm_head.weight", "model.embed_tokens.weight");
        let tied = |tied| Config::from(LlamaConfig::default().with_tie_word_embeddings(tied));
        assert_eq!(known(&[head], tied(true)), pairs(&[(embedding, head)]));
        assert_eq!(known(&[head], tied(false)), pairs(&[(head, head)]));
        let both = pairs(&[(head, head), (embedding, embedding)]);
        assert_eq!(known(&[head, embedding], tied(true)), both);
        let opt = OptConfig::default();
        let expected = pairs(&[("model.decoder.embed_tokens.weight", head)]);
        assert_eq!(known(&[head], opt), expected);
    }

    #[test]
    fn names_of_wrapped_models_are_refused() {
        for (name, part) in [
            ("_orig_mod.model.norm.weight", "torch.compile"),
            ("model.layers.0._orig_mod.mlp.weight", "torch.compile"),
            ("module.model.norm.weight", "DistributedDataParallel"),
            ("_fsdp_wrapped_module.model.norm.weight", "FullyShardedData"),
            ("base_model.model.model.norm.weight", "PEFT"),
            ("model.layers.0.mlp.up_proj.base_layer.weight", "not merged"),
        ] {
            let names = names(vec![name.into()], &LlamaConfig::default().into());
            let (tensor, problem) = names.unwrap_err();
            assert_eq!(tensor, name);
            assert!(problem.contains(part), "{problem}");
        }
    }

    #[test]
    fn buffers_are_known_by_their_modules() {
        for name in [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.rotary_emb.inv_freq",
            "model.layers.0.self_attn.rotary_emb.cos_cached",
            "model.layers.0.self_attn.masked_bias",
            "model.layers.0.self_attn.bias",
            "transformer.h.0.attn.attention.masked_bias",
            "model.position_ids",
            "model.decoder.version",
        ] {
            assert!(is_buffer(name), "{name}");
        }
        for name in [
            "inv_freq",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.mlp.masked_bias",
            "version",
            "model.norm.bias",
        ] {
            assert!(!is_buffer(name), "{name}");
        }
    }
}
