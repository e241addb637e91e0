//! The names of tensors, and the order of the rows of queries and keys.

use crate::{Config, LlamaConfig};

/// The names of the parts of a block: Hugging Face's, and those of GGUF.
const PARTS: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The names of the other parts.
const OTHERS: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// The factors of the rotary frequencies, which are no parameter.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// The name in GGUF of a tensor that Hugging Face calls `name`.
pub(super) fn tensor(name: &str) -> Option<String> {
    let (path, kind) = name.rsplit_once('.')?;
    if let Some((_, other)) = OTHERS.iter().find(|(hf, _)| *hf == path) {
        return Some(format!("{other}.{kind}"));
    }
    let (block, part) = path.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, part) = PARTS.iter().find(|(hf, _)| *hf == part)?;
    Some(format!("blk.{block}.{part}.{kind}"))
}

/// The architecture of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
}

impl Architecture {
    /// Those of this crate, by their names in GGUF.
    pub(super) const ALL: [(&'static str, Self); 2] =
        [("llama", Self::Llama), ("qwen2", Self::Qwen2)];

    pub(super) fn name(self) -> &'static str {
        let mut all = Self::ALL.into_iter();
        all.find(|(_, of)| *of == self).map_or("", |(name, _)| name)
    }

    /// The architecture of a `model_type` of Hugging Face's.
    pub(super) fn of_model_type(model_type: &str) -> Option<Self> {
        match model_type {
            "llama" | "mistral" => Some(Self::Llama),
            "qwen2" => Some(Self::Qwen2),
            _ => None,
        }
    }
}

/// The shape of a model of such an architecture.
pub(super) fn shape(config: &Config) -> Option<&LlamaConfig> {
    match config {
        Config::Llama(config) => Some(config),
        _ => None,
    }
}

/// The row of a GGUF file that each row of Hugging Face's tensor `name` is; `None` if they are the same.
///
/// llama.cpp turns neighbors where transformers turns the two halves of a head. Its files of `llama` have
/// the rows of queries and keys in that order, and biases likewise. The order has as many rows as the
/// configuration asks for: the tensor must have been checked to have them.
pub(super) fn row_order(
    architecture: Architecture,
    config: &LlamaConfig,
    name: &str,
) -> Option<Vec<usize>> {
    let (path, _) = name.rsplit_once('.')?;
    let n_heads = match path {
        _ if architecture != Architecture::Llama => return None,
        path if path.ends_with(".self_attn.q_proj") => config.num_attention_heads,
        path if path.ends_with(".self_attn.k_proj") => config.num_key_value_heads,
        _ => return None,
    };
    let (width, half) = (config.head_dim, config.head_dim / 2);
    let rows = 0..n_heads * width;
    let place = |row: usize| {
        let (head, within) = (row / width, row % width);
        head * width + 2 * (within % half) + within / half
    };
    Some(rows.map(place).collect())
}

/// The inverse of an order of rows.
pub(super) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (row, &place) in order.iter().enumerate() {
        inverse[place] = row;
    }
    inverse
}

/// The rows of a matrix in another order, each of `width` values.
pub(super) fn reordered<T: Copy>(values: &[T], width: usize, order: &[usize]) -> Vec<T> {
    let rows = order.iter();
    rows.flat_map(|&row| &values[row * width..][..width])
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_converter() {
        for (hf, gguf) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            (
                "model.layers.17.self_attn.q_proj.bias",
                "blk.17.attn_q.bias",
            ),
            (
                "model.layers.0.mlp.down_proj.weight",
                "blk.0.ffn_down.weight",
            ),
        ] {
            assert_eq!(tensor(hf).as_deref(), Some(gguf));
        }
        assert_eq!(tensor("model.layers.0.mlp.router.weight"), None);
    }

    /// `permute` of llama.cpp's `convert_hf_to_gguf.py`: `(h, 2, d / 2)` becomes `(h, d / 2, 2)`.
    #[test]
    fn rows_of_queries_are_those_of_the_converter() {
        let config = LlamaConfig::default()
            .with_num_attention_heads(2)
            .with_num_key_value_heads(1)
            .with_head_dim(6);
        let order = |part: &str| {
            let name = format!("model.layers.0.self_attn.{part}.weight");
            row_order(Architecture::Llama, &config, &name)
        };
        let queries = order("q_proj").unwrap();
        // numpy: arange(12).reshape(2, 2, 3).swapaxes(1, 2).ravel()
        let in_file = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        assert_eq!(inverse(&queries), in_file);
        assert_eq!(order("k_proj").unwrap().len(), 6);
        assert_eq!(order("v_proj"), None);
        let rows: Vec<usize> = (0..12).collect();
        let written = reordered(&rows, 1, &inverse(&queries));
        assert_eq!(written, in_file);
        assert_eq!(reordered(&written, 1, &queries), rows);
    }
}
