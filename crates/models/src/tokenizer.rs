use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use peft::Batch;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::checkpoint::directory::{TOKENIZER, TOKENIZER_CONFIG};
use crate::special_tokens::read_config;
use crate::{Result, TextError};

mod byte_level;
mod charsmap;
mod library;
mod limits;
pub(crate) mod parts;
pub(crate) mod pre;
mod sentence_piece;
mod stream;
mod vocabularies;

/// The tokenizer of a model, from its `tokenizer.json` or the vocabulary of a Python tokenizer.
///
/// Truncation, padding and the `dropout` of a BPE model, which files may ask for, are ignored: the
/// tokens of a text are all of it, and always the same.
///
/// The crate `tokenizers` reads files and encodes texts. Files that would make it overflow its stack,
/// exhaust memory, or panic for lack of another part are refused before. If it panics all the same, the
/// message is that of a [`TextError::Tokenizer`]; the program's panic hook has been called by then, and
/// prints it if it is Rust's. A program built with `panic = "abort"` ends there.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    library: library::Library,
    path: PathBuf,
    /// The special tokens that a configuration need not state.
    specials: Vec<(&'static str, String)>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model's directory, if it has one: `tokenizer.json`, or else
    /// `tokenizer.model` of SentencePiece, or `vocab.json` with `merges.txt`.
    ///
    /// Those without a `tokenizer.json` are converted as by transformers, by what
    /// `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `config.json` state.
    ///
    /// # Errors
    /// As [`tensor_files::read`] and [`Tokenizer::from_bytes`]; [`ConfigError`](crate::ConfigError) for
    /// one of those configurations that is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(TOKENIZER);
        if !tensor_files::is_there(&path) {
            return vocabularies::read(dir);
        }
        let mut tokenizer = Self::open(&path)?;
        let config = read_config(&dir.join(TOKENIZER_CONFIG))?;
        let cleans_up = config.get(vocabularies::CLEAN_UP) == Some(&true.into());
        tokenizer.library = tokenizer.library.cleaned_up(cleans_up);
        Ok(Some(tokenizer))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`tensor_files::read`] and [`Tokenizer::from_bytes`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(&tensor_files::read(path)?, path)
    }

    /// Reads the content of a `tokenizer.json`, which errors call `path`.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if it has no tokenizer, or one beyond the limits that
    /// `docs/security.md` lists.
    ///
    /// # Examples
    /// ```
    /// use std::path::Path;
    ///
    /// use models::Tokenizer;
    ///
    /// let json = br#"{"pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel",
    ///     "vocab": {"<unk>": 0, "one": 1}, "unk_token": "<unk>"}}"#;
    /// let tokenizer = Tokenizer::from_bytes(json, Path::new("tokenizer.json"))?;
    /// assert_eq!(tokenizer.encode("one two")?, [1, 0]);
    ///
    /// let error = Tokenizer::from_bytes(&json[..40], Path::new("tokenizer.json")).unwrap_err();
    /// assert!(error.to_string().starts_with("`tokenizer.json`: is not a JSON object"));
    /// # Ok::<(), models::Error>(())
    /// ```
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let path = path.to_owned();
        match library::Library::new(bytes) {
            Ok(library) => Ok(Self {
                library,
                path,
                specials: Vec::new(),
            }),
            Err(problem) => Err(TextError::Tokenizer { path, problem }.into()),
        }
    }

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.refused(self.library.encode(text))
    }

    /// As [`Tokenizer::encode`], each token with the byte of the text at which it begins.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        self.refused(self.library.encode_with_starts(text))
    }

    /// Decodes tokens one after the other, which follow those of a context.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn stream(&self, context: &[u32]) -> Result<TextStream<'_>> {
        let library = self.refused(stream::Stream::new(&self.library, context))?;
        Ok(TextStream {
            library,
            tokenizer: self,
        })
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// The file from which it was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text of some tokens, without special tokens and those outside of the vocabulary.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the tokenizer refuses the tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.refused(self.library.decode(tokens, true))
    }

    /// As [`Tokenizer::decode`], with special tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_with_special(&self, tokens: &[u32]) -> Result<String> {
        self.refused(self.library.decode(tokens, false))
    }

    /// The special token of a name that a configuration need not state.
    pub(crate) fn special(&self, name: &str) -> Option<&str> {
        let special = self.specials.iter().find(|(of, _)| *of == name);
        special.map(|(_, token)| token.as_str())
    }

    /// Its `tokenizer.json`, without a post-processor.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        self.library.to_json()
    }

    /// The tokens that the tokenizer adds before a text.
    pub(crate) fn added_before(&self) -> Result<Vec<u32>> {
        self.refused(self.library.added_before())
    }

    fn refused<T>(&self, result: library::Result<T>) -> Result<T> {
        result.map_err(|problem| {
            let path = self.path.clone();
            TextError::Tokenizer { path, problem }.into()
        })
    }
}

/// A decoder of tokens one after the other, made by [`Tokenizer::stream`].
///
/// The pieces together are the text of all tokens less that of the context: what follows it, or what
/// follows the beginning that both have, if a character begins in the context and ends after it. A piece
/// is returned when no later token can change it: not while a character is incomplete, nor, where bytes
/// have tokens of their own, before the end of a run of them, since one that is no character makes all of
/// them replacement characters. If the decoder of a tokenizer can change any of its text, the last piece
/// is all of it.
pub struct TextStream<'a> {
    library: stream::Stream<'a>,
    tokenizer: &'a Tokenizer,
}

impl TextStream<'_> {
    /// Decodes one more token. Returns an empty string while the text of it can change.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the tokenizer refuses the token.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokenizer.refused(self.library.push(token))
    }

    /// The rest of the text, with a replacement character for each incomplete one.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if the tokenizer refuses the tokens.
    pub fn finish(self) -> Result<String> {
        self.tokenizer.refused(self.library.finish())
    }
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
