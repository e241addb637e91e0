use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Map, Value};

use crate::checkpoint::{TOKENIZER, TOKENIZER_CONFIG, carried, stop_tokens};
use crate::{Error, Generation, Model, Result, SpecialTokens, Tokenizer, Windows, generate};

/// A model with its tokenizer and the files that go along.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The model.
    pub model: Model,
    /// Its tokenizer, if the directory has one.
    pub tokenizer: Option<Tokenizer>,
    pub(crate) dir: PathBuf,
    /// `config.json`, without a quantization.
    pub(crate) config: Map<String, Value>,
    pub(crate) carried: BTreeMap<&'static str, Vec<u8>>,
    pub(crate) stop_tokens: Vec<u32>,
    /// Read when they are first asked for.
    pub(crate) special: OnceLock<SpecialTokens>,
}

/// What a model wrote after a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// Its text, without special tokens.
    pub text: String,
    /// All its tokens, with the one that ended it.
    pub tokens: Vec<u32>,
}

impl Pretrained {
    /// A new model with the tokenizer in the file at `tokenizer`, and what a directory of a model has
    /// beside that, such as a `tokenizer_config.json`.
    ///
    /// # Errors
    /// If the tokenizer cannot be read.
    ///
    /// # Panics
    /// If the model has a rope scaling: see [`Config::to_json`](crate::Config::to_json).
    pub fn new(model: Model, tokenizer: &Path) -> Result<Self> {
        let dir = tokenizer.parent().unwrap_or(tokenizer);
        let mut carried = carried(dir)?;
        carried.insert(TOKENIZER, tensor_files::read(tokenizer)?);
        // Other programs guess the class by the model's type without it.
        let class = br#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#;
        carried.entry(TOKENIZER_CONFIG).or_insert(class.to_vec());
        let config = model.config().to_json();
        Ok(Self {
            stop_tokens: stop_tokens(dir, &config, &carried)?,
            special: OnceLock::new(),
            config,
            model,
            tokenizer: Some(Tokenizer::open(tokenizer)?),
            dir: dir.into(),
            carried,
        })
    }

    /// Where its files are, or were.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`].
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer {
            dir: self.dir.clone(),
        })
    }

    /// The tokens of a text, without any that the text does not contain (such as a first `<s>`).
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`], or [`peft::Error::Token`] if the tokenizer gives a
    /// token that the model lacks.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.tokenizer()?.encode(text)?;
        let vocab_size = self.model.config().vocab_size();
        match tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(&token) => {
                let token = token.into();
                Err(peft::Error::Token { token, vocab_size }.into())
            }
            None => Ok(tokens),
        }
    }

    /// The tokens of a text as the model reads one: after the token that begins texts, where the
    /// tokenizer puts it.
    ///
    /// # Errors
    /// As [`Pretrained::encode`] and [`Pretrained::special_tokens`].
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let special = self.special_tokens()?;
        let bos = special.bos.filter(|_| special.add_bos);
        let mut tokens: Vec<u32> = bos.into_iter().map(|bos| bos.id).collect();
        tokens.extend(self.encode(text)?);
        Ok(tokens)
    }

    /// The tokens of `text` in windows of `seq_len`.
    ///
    /// # Errors
    /// [`Error::SeqLen`] if the model was not made for such windows; [`Error::ShortText`] if the text
    /// does not fill one; as [`Pretrained::encode`].
    pub fn windows(&self, text: &str, seq_len: usize) -> Result<Windows> {
        let max = self.model.config().max_seq_len();
        if !(2..=max).contains(&seq_len) {
            return Err(Error::SeqLen { seq_len, max });
        }
        Windows::new(self.encode(text)?, seq_len)
    }

    /// The special tokens that the directory's files name.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], or as [`SpecialTokens::read`].
    pub fn special_tokens(&self) -> Result<SpecialTokens> {
        if let Some(special) = self.special.get() {
            return Ok(special.clone());
        }
        // A directory that is gone is not one that names none.
        if let Err(source) = self.dir.metadata() {
            let path = self.dir.clone();
            return Err(tensor_files::Error::Io { path, source }.into());
        }
        let special = SpecialTokens::read(&self.dir, self.tokenizer()?)?;
        Ok(self.special.get_or_init(|| special).clone())
    }

    /// The token for padding, which is neither a target nor attended to.
    ///
    /// # Errors
    /// As [`Pretrained::special_tokens`].
    pub fn padding(&self) -> Result<u32> {
        let padding = self.special_tokens()?.padding();
        // Some tokenizers have one that their model lacks.
        let is_known = (padding as usize) < self.model.config().vocab_size();
        Ok(if is_known { padding } else { 0 })
    }

    /// What the first token of a text is predicted from: the token that begins texts, or the one that
    /// ends them, as lm-evaluation-harness has it.
    ///
    /// # Errors
    /// [`Error::MissingSpecial`] if the files name neither, or as [`Pretrained::special_tokens`].
    pub fn first_token(&self) -> Result<u32> {
        let special = self.special_tokens()?;
        match special.bos.as_ref().or(special.eos.as_ref()) {
            Some(token) => Ok(token.id),
            None => Err(Error::MissingSpecial {
                name: "bos_token",
                needed_by: "what predicts the first token of a text".into(),
            }),
        }
    }

    /// The tokens that end a text: `eos_token_id` of `generation_config.json`, or of `config.json`, one
    /// or several.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Continues a text of tokens. `on_text` sees each piece of text as it comes, and may break off
    /// after it. Ends at the [`Pretrained::stop_tokens`] too.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`], or as [`generate`].
    pub fn generate(
        &self,
        prompt: &[u32],
        settings: &Generation,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Continuation> {
        let mut settings = settings.clone();
        settings.stop.extend(self.stop_tokens());
        let mut stream = self.tokenizer()?.stream();
        if let Some(&last) = prompt.last() {
            // What the next token looks like may depend on it: a space before a word, for one.
            stream.push(last)?;
        }
        let (mut text, mut failed) = (String::new(), None);
        let tokens = generate(&self.model, prompt, &settings, |token| {
            if settings.stop.contains(&token) {
                return ControlFlow::Break(());
            }
            match stream.push(token) {
                Ok(piece) => {
                    text += &piece;
                    match piece.is_empty() {
                        true => ControlFlow::Continue(()),
                        false => on_text(&piece),
                    }
                }
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        match failed {
            Some(error) => Err(error),
            None => Ok(Continuation { text, tokens }),
        }
    }
}
