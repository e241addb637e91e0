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

use crate::{Error, Result, TextError};

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
    /// As [`tensor_files::read`]; [`TextError::Tokenizer`] if the file has no tokenizer.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = tensor_files::read(path)?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes);
        let mut inner = inner.map_err(|error| refuse(path, error))?;
        // Files may ask for truncation and padding, which would change a text.
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

    /// Checks that added tokens have the ids of the file. The library gives them other ids if they do
    /// not follow the vocabulary.
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

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false);
        Ok(encoding
            .map_err(|error| refuse(&self.path, error))?
            .get_ids()
            .to_vec())
    }

    /// Decodes tokens one after the other.
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
    /// [`TextError::Tokenizer`] if a token is unknown.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = self.inner.decode(tokens, true);
        text.map_err(|error| refuse(&self.path, error))
    }
}

/// A decoder of tokens one after the other, made by [`Tokenizer::stream`].
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
    /// Decodes one more token. Returns an empty string while a character is incomplete.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the token is unknown.
    pub fn push(&mut self, token: u32) -> Result<String> {
        let piece = self.inner.step(token);
        let piece = piece.map_err(|error| refuse(self.path, error))?;
        Ok(piece.unwrap_or_default())
    }
}

fn refuse(path: &Path, error: tokenizers::Error) -> Error {
    let path = path.into();
    let problem = error.to_string();
    TextError::Tokenizer { path, problem }.into()
}

/// The tokens of a text in non-overlapping windows of one length, without an incomplete last one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    seq_len: usize,
}

impl Windows {
    /// Cuts tokens into windows of `seq_len`.
    ///
    /// # Examples
    /// ```
    /// let windows = models::Windows::new((0..10).collect(), 4)?;
    /// assert_eq!(windows.len(), 2);
    /// assert!(models::Windows::new(vec![1, 2], 4).is_err());
    /// # Ok::<(), models::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`TextError::ShortText`] for fewer tokens than a window has.
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
            return Err(TextError::ShortText { n_tokens, seq_len }.into());
        }
        tokens.truncate(n_tokens / seq_len * seq_len);
        Ok(Self { tokens, seq_len })
    }

    /// The number of windows, at least one.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        self.tokens.len() / self.seq_len
    }

    /// Shuffles the windows by a seed.
    pub fn shuffled(&self, seed: u64) -> Self {
        let mut windows: Vec<&[u32]> = self.tokens.chunks_exact(self.seq_len).collect();
        windows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        Self {
            tokens: windows.concat(),
            seq_len: self.seq_len,
        }
    }

    /// Selects windows by index.
    ///
    /// # Panics
    /// If there are no indices, or one is out of range.
    pub fn select(&self, at: &[usize]) -> Self {
        assert!(!at.is_empty(), "no windows");
        let window = |&at: &usize| &self.tokens[at * self.seq_len..][..self.seq_len];
        Self {
            tokens: at.iter().flat_map(window).copied().collect(),
            seq_len: self.seq_len,
        }
    }

    /// The first `n` windows, at least one and at most all.
    pub fn take(mut self, n: usize) -> Self {
        self.tokens.truncate(n.max(1).saturating_mul(self.seq_len));
        self
    }

    /// Batches of `batch_size` windows, of which the last may be smaller.
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
