//! The tokens of texts in lm-evaluation-harness.

use models::Pretrained;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Whether the tokens of a text begin with the one that begins texts: `add_bos_token` of
/// lm-evaluation-harness, which is unset by default.
///
/// A token that the tokenizer has no name for is never added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddBos {
    /// As the tokenizer does: `add_bos_token` is unset.
    #[default]
    AsTokenizer,
    /// Always: `add_bos_token=True`.
    Always,
    /// Never: `add_bos_token=False`.
    Never,
}

/// The tokens of a text.
///
/// A text that states the token from which its first token is predicted gets no other.
///
/// Source: `HFLM.tok_encode` in `lm_eval/models/huggingface.py` 0.4.13.
pub(crate) fn encode(lm: &Pretrained, text: &str, add_bos: AddBos) -> Result<Vec<u32>> {
    let special = lm.special_tokens()?;
    let prefix = special.bos.as_ref().or(special.eos.as_ref());
    let is_stated = match prefix {
        Some(token) => text.starts_with(&lm.tokenizer()?.decode_with_special(&[token.id])?),
        None => false,
    };
    let is_added = match add_bos {
        AddBos::AsTokenizer => special.add_bos,
        AddBos::Always => true,
        AddBos::Never => false,
    };
    let bos = special.bos.filter(|_| is_added && !is_stated);
    let mut tokens: Vec<u32> = bos.into_iter().map(|bos| bos.id).collect();
    tokens.extend(lm.encode(text)?);
    Ok(tokens)
}
