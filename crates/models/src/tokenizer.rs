use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use peft::Batch;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::Deserialize;
use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper,
};

use crate::{Error, Result};

/// The tokenizer of a model, from its `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`tensor_files::read`]; [`Error::Tokenizer`] if it is no tokenizer.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = tensor_files::read(path)?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes);
        let mut inner = inner.map_err(|error| refuse(path, error))?;
        // Files may ask for texts to be cut or filled up to one length; a text here is all of it.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| refuse(path, error))?;
        let tokenizer = Self {
            inner,
            path: path.into(),
        };
        tokenizer.check_added(&bytes)?;
        Ok(tokenizer)
    }

    /// Checks that added tokens have the numbers that the file gives them: the library gives them others
    /// where they do not follow the vocabulary.
    fn check_added(&self, bytes: &[u8]) -> Result<()> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            added_tokens: Vec<Added>,
        }
        #[derive(Deserialize)]
        struct Added {
            id: u32,
            content: String,
        }
        let file: File = serde_json::from_slice(bytes)
            .map_err(|error| refuse(&self.path, error.to_string().into()))?;
        for Added { id, content } in file.added_tokens {
            let found = self.inner.token_to_id(&content);
            if found != Some(id) {
                let problem = format!(
                    "the added token `{content}` has the id {id}, which is not its place in the vocabulary"
                );
                return Err(refuse(&self.path, problem.into()));
            }
        }
        Ok(())
    }

    /// The tokens of a text, without any that the text does not contain (such as a first `<s>`).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer does not take the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false);
        Ok(encoding
            .map_err(|error| refuse(&self.path, error))?
            .get_ids()
            .to_vec())
    }

    /// Turns tokens into text as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream {
            inner: self.inner.decode_stream(true),
            path: &self.path,
        }
    }

    /// The tokenizer of the crate `tokenizers`.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// The file from which it was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text of some tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a token is unknown.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = self.inner.decode(tokens, true);
        text.map_err(|error| refuse(&self.path, error))
    }
}

/// The text of tokens that come one after the other, made by [`Tokenizer::stream`].
pub struct TextStream<'a> {
    inner: DecodeStream<
        'a,
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
    path: &'a Path,
}

impl TextStream<'_> {
    /// What one more token adds to the text; nothing while it is a part of a character.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the token is unknown.
    pub fn push(&mut self, token: u32) -> Result<String> {
        let piece = self.inner.step(token);
        let piece = piece.map_err(|error| refuse(self.path, error))?;
        Ok(piece.unwrap_or_default())
    }
}

fn refuse(path: &Path, error: tokenizers::Error) -> Error {
    Error::Tokenizer {
        path: path.into(),
        problem: error.to_string(),
    }
}

/// A text's tokens in non-overlapping windows of one length; what does not fill the last is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    seq_len: usize,
}

impl Windows {
    /// # Errors
    /// [`Error::ShortText`] if the tokens fill no window.
    ///
    /// # Panics
    /// If a window has fewer than two tokens.
    pub fn new(mut tokens: Vec<u32>, seq_len: usize) -> Result<Self> {
        assert!(
            seq_len >= 2,
            "a window of {seq_len} tokens has nothing to predict"
        );
        let n_tokens = tokens.len();
        if n_tokens < seq_len {
            return Err(Error::ShortText { n_tokens, seq_len });
        }
        tokens.truncate(n_tokens / seq_len * seq_len);
        Ok(Self { tokens, seq_len })
    }

    /// How many there are; at least one.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        self.tokens.len() / self.seq_len
    }

    /// The windows in an order drawn with `seed`.
    pub fn shuffled(&self, seed: u64) -> Self {
        let mut windows: Vec<&[u32]> = self.tokens.chunks_exact(self.seq_len).collect();
        windows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        Self {
            tokens: windows.concat(),
            seq_len: self.seq_len,
        }
    }

    /// The windows at these places, in this order.
    ///
    /// # Panics
    /// If there are none, or a window is not there.
    pub fn select(&self, at: &[usize]) -> Self {
        assert!(!at.is_empty(), "no windows");
        let window = |&at: &usize| &self.tokens[at * self.seq_len..][..self.seq_len];
        Self {
            tokens: at.iter().flat_map(window).copied().collect(),
            seq_len: self.seq_len,
        }
    }

    /// The first `n` windows, or all if there are fewer. At least one is kept.
    pub fn take(mut self, n: usize) -> Self {
        self.tokens.truncate(n.max(1).saturating_mul(self.seq_len));
        self
    }

    /// The windows in batches of `batch_size`, the last of which may be smaller.
    ///
    /// # Panics
    /// If `batch_size` is 0.
    pub fn batches(&self, batch_size: usize, device: &Device) -> Vec<Batch> {
        let batch = |tokens: &[u32]| {
            let tokens: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
            let shape = [tokens.len() / self.seq_len, self.seq_len];
            let tokens = Tensor::from_data(TensorData::new(tokens, shape), device);
            Batch::new(tokens).expect("windows of two tokens or more")
        };
        self.tokens
            .chunks(batch_size.saturating_mul(self.seq_len))
            .map(batch)
            .collect()
    }
}
