//! The names of tensors in PEFT's files.

use crate::adapter::hf::{HfFormat, HfSource};

/// The prefix of tensors of the whole model.
pub(super) const SHARED_PREFIX: &str = "base_model.";

/// What a tensor belongs to.
#[derive(Debug, PartialEq)]
pub(super) enum Place {
    /// All layers: some of [`HfFormat::shared`].
    Shared,
    /// The adapter of the layer at a path: some of [`HfFormat::tensors`].
    Adapter(String, &'static str),
    /// The rows of the trained tokens in the embedding at a path.
    Tokens(String),
    /// A parameter of the base, under the name that it has in files of the base.
    Base(String),
}

/// Modules that PyTorch puts around others, whose names a state dict has.
const WRAPPERS: [&str; 3] = [
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
];
/// Modules of PEFT that hold a copy for each adapter.
const SAVED: &str = "modules_to_save";
const TOKENS: &str = "trainable_tokens_delta";
/// The name of an adapter that is given none.
const DEFAULT: &str = "default";

/// The place of a tensor, under the name of PEFT's files or of a state dict, if it has any.
pub(super) fn place(format: &HfFormat, name: &str) -> Option<Place> {
    let name = plain(format, name);
    let shared = name.strip_prefix(SHARED_PREFIX);
    if shared.is_some_and(|name| format.shared.contains(&name)) {
        return Some(Place::Shared);
    }
    let name = name.strip_prefix(HfSource::PREFIX)?;
    let path = |tensor: &str| name.strip_suffix(tensor)?.strip_suffix('.');
    let own = format.tensors.iter().map(|tensor| (tensor, tensor));
    let aliases = format.aliases.iter().map(|(alias, tensor)| (alias, tensor));
    for (alias, tensor) in own.chain(aliases) {
        if let Some(path) = path(alias) {
            return Some(Place::Adapter(path.into(), tensor));
        }
    }
    if let Some(path) = path(&format!("token_adapter.{TOKENS}")) {
        return Some(Place::Tokens(path.into()));
    }
    let is_parameter = name.ends_with(".weight") || name.ends_with(".bias");
    is_parameter.then(|| Place::Base(name.replace(".base_layer.", ".")))
}

/// A name without wrappers and without the name of the adapter.
fn plain(format: &HfFormat, name: &str) -> String {
    let tensors = format.tensors.iter().chain(format.shared);
    let tensors = tensors.chain(format.aliases.iter().map(|(alias, _)| alias));
    let tensors = tensors.filter_map(|tensor| tensor.split('.').next());
    let of_adapters: Vec<&str> = tensors.chain([SAVED, TOKENS]).collect();
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('.').filter(|part| !WRAPPERS.contains(part)) {
        let is_copy = parts.last().is_some_and(|last| of_adapters.contains(last));
        if !(part == DEFAULT && is_copy) {
            parts.push(part);
        }
    }
    parts.retain(|part| *part != SAVED);
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::vera;
    use crate::adapters::hf::lora;

    #[test]
    fn names_of_files_and_of_state_dicts_have_the_same_places() {
        let adapter = |path: &str, tensor| Some(Place::Adapter(path.into(), tensor));
        let base = |name: &str| Some(Place::Base(name.into()));
        for (name, expected) in [
            (
                "base_model.model.a.q.lora_A.weight",
                adapter("a.q", "lora_A.weight"),
            ),
            (
                "base_model.model.a.q.lora_A.default.weight",
                adapter("a.q", "lora_A.weight"),
            ),
            (
                "_orig_mod.base_model.model.a.q.lora_B.weight",
                adapter("a.q", "lora_B.weight"),
            ),
            (
                "base_model.model._orig_mod.a.q.lora_B.weight",
                adapter("a.q", "lora_B.weight"),
            ),
            (
                "base_model.model.a._orig_mod.q.lora_B.weight",
                adapter("a.q", "lora_B.weight"),
            ),
            (
                "base_model.model.default.q.lora_B.weight",
                adapter("default.q", "lora_B.weight"),
            ),
            (
                "base_model.model.e.lora_embedding_A",
                adapter("e", "lora_A.weight"),
            ),
            (
                "base_model.model.e.lora_embedding_B.default",
                adapter("e", "lora_B.weight"),
            ),
            (
                "base_model.model.q.lora_magnitude_vector",
                adapter("q", "lora_magnitude_vector"),
            ),
            (
                "base_model.model.q.lora_magnitude_vector.default.weight",
                adapter("q", "lora_magnitude_vector.weight"),
            ),
            (
                "base_model.model.a.q.base_layer.bias",
                adapter("a.q", "base_layer.bias"),
            ),
            ("base_model.model.e.base_layer.weight", base("e.weight")),
            ("base_model.model.lm_head.weight", base("lm_head.weight")),
            (
                "base_model.model.lm_head.modules_to_save.default.weight",
                base("lm_head.weight"),
            ),
            (
                "base_model.model.e.token_adapter.trainable_tokens_delta",
                Some(Place::Tokens("e".into())),
            ),
            ("base_model.model.q.lora_C.other", None),
            ("a.q.lora_A.weight", None),
        ] {
            assert_eq!(place(&lora::FORMAT, name), expected, "{name}");
        }
        for name in ["base_model.vera_A", "base_model.vera_A.default"] {
            assert_eq!(place(&vera::HF_FORMAT, name), Some(Place::Shared), "{name}");
        }
    }
}
