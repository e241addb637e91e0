use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use peft::{AsModel, Certificate};
use serde_json::{Map, Value};

use crate::checkpoint::directory::{
    CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, carried, stop_tokens, tokenizer_digest,
};
use crate::{Generation, Model, Result, SpecialTokens, TextError, Tokenizer, Windows, generate};

/// A model with its tokenizer and the other files of its directory.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The model.
    pub model: Model,
    /// The tokenizer, if the directory has one.
    pub tokenizer: Option<Tokenizer>,
    /// The certificate of the merge that the model comes from, which [`save`](crate::save) writes beside
    /// the weights. Set it to `None` when the model is changed: with the certificate of another model,
    /// it is not saved.
    pub certificate: Option<Certificate>,
    pub(crate) dir: PathBuf,
    /// The content of `config.json`, without `quantization_config`.
    pub(crate) config: Map<String, Value>,
    pub(crate) carried: BTreeMap<&'static str, Vec<u8>>,
    pub(crate) stop_tokens: Vec<u32>,
    /// Read on first use.
    pub(crate) special: OnceLock<SpecialTokens>,
}

/// The text that a model generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The text of the prompt and the tokens, less that of the prompt: see [`TextStream`](crate::TextStream).
    /// Special tokens are no part of it; a string that ended it is.
    pub text: String,
    /// All new tokens, including the one that ended the text.
    pub tokens: Vec<u32>,
}

impl AsModel for Pretrained {
    type Model = Model;

    fn as_model(&self) -> &Model {
        &self.model
    }

    /// The model, to be changed: the certificate is set to `None`.
    fn as_model_mut(&mut self) -> &mut Model {
        self.certificate = None;
        &mut self.model
    }
}

impl Pretrained {
    /// A new model with a tokenizer, and with the files beside it that belong to a model, such as
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// If the tokenizer cannot be read.
    ///
    /// # Panics
    /// If the model has a rope scaling: see [`Config::to_json`](crate::Config::to_json).
    pub fn new(mut model: Model, tokenizer: &Path) -> Result<Self> {
        let dir = tokenizer.parent().unwrap_or(tokenizer);
        let mut carried = carried(dir)?;
        carried.insert(TOKENIZER, tensor_files::read(tokenizer)?);
        // Without it, other programs infer the class from the model type.
        let class = br#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#;
        carried.entry(TOKENIZER_CONFIG).or_insert(class.to_vec());
        let config = model.config().to_json();
        model.tokenizer = tokenizer_digest(&carried);
        let opened = Tokenizer::open(tokenizer)?;
        Ok(Self {
            stop_tokens: stop_tokens(dir, &config, &carried, model.config().vocab_size())?,
            special: OnceLock::new(),
            config,
            model,
            tokenizer: Some(opened),
            certificate: None,
            dir: dir.into(),
            carried,
        })
    }

    /// The directory from which the files were read.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The chat template that came with the model in a file of its own (`chat_template.jinja`) or in a GGUF
    /// file.
    pub fn chat_template(&self) -> Option<&str> {
        let template = self.carried.get(CHAT_TEMPLATE)?;
        std::str::from_utf8(template).ok()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`].
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let tokenizer = self.tokenizer.as_ref();
        tokenizer.ok_or_else(|| {
            let dir = self.dir.clone();
            TextError::NoTokenizer { dir }.into()
        })
    }

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`], [`TextError::Tokenizer`], or [`peft::Error::Token`] for a token outside
    /// of the model's vocabulary.
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

    /// The tokens of a text, after the token that begins texts if the tokenizer adds one.
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
    /// [`TextError::SeqLen`] for windows that are longer than the model was trained for;
    /// [`TextError::ShortText`] for a text shorter than a window; as [`Pretrained::encode`].
    pub fn windows(&self, text: &str, seq_len: usize) -> Result<Windows> {
        let max = self.model.config().max_seq_len();
        if !(2..=max).contains(&seq_len) {
            return Err(TextError::SeqLen { seq_len, max }.into());
        }
        Windows::new(self.encode(text)?, seq_len)
    }

    /// The special tokens that the directory's files name.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`], or as [`SpecialTokens::read`].
    pub fn special_tokens(&self) -> Result<SpecialTokens> {
        if let Some(special) = self.special.get() {
            return Ok(special.clone());
        }
        // A directory that was removed must not look like one without special tokens.
        if let Err(cause) = self.dir.metadata() {
            let path = self.dir.clone();
            return Err(tensor_files::Error::Io { path, cause }.into());
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

    /// The token from which the first token of a text is predicted: the one that begins texts, or else
    /// the one that ends them, as in lm-evaluation-harness.
    ///
    /// # Errors
    /// [`TextError::MissingSpecial`] if the files name neither, or as [`Pretrained::special_tokens`].
    pub fn first_token(&self) -> Result<u32> {
        let special = self.special_tokens()?;
        match special.bos.as_ref().or(special.eos.as_ref()) {
            Some(token) => Ok(token.id),
            None => {
                let needed_by = "the prediction of the first token of a text".into();
                let name = "bos_token";
                Err(TextError::MissingSpecial { name, needed_by }.into())
            }
        }
    }

    /// The tokens that end a text: `eos_token_id` of `generation_config.json` or of `config.json`.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Continues a text, up to one of the [`Pretrained::stop_tokens`] or of the settings' stop tokens and
    /// strings.
    ///
    /// `on_text` is called with each new piece of text, and may end the text.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`], [`TextError::Tokenizer`], or as [`generate`].
    pub fn generate(
        &self,
        prompt: &[u32],
        settings: &Generation,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Continuation> {
        let stop = settings.stop().iter().chain(self.stop_tokens());
        let settings = settings.clone().with_stop(stop.copied());
        let tokenizer = self.tokenizer()?;
        let mut stream = tokenizer.stream(prompt)?;
        let (mut text, mut new) = (String::new(), Vec::new());
        let mut is_ended = false;
        let mut push = |token| -> Result<bool> {
            let piece = stream.push(token)?;
            text += &piece;
            is_ended = !piece.is_empty() && on_text(&piece).is_break();
            new.push(token);
            Ok(is_ended || self.is_stopped(&new, &settings)?)
        };
        let mut failed = None;
        let tokens = generate(&self.model, prompt, &settings, |token| match push(token) {
            Ok(false) => ControlFlow::Continue(()),
            Ok(true) => ControlFlow::Break(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let rest = stream.finish()?;
        text += &rest;
        if !(rest.is_empty() || is_ended) {
            // There is nothing left to end.
            let _ = on_text(&rest);
        }
        Ok(Continuation { text, tokens })
    }

    /// Whether the text of new tokens has one of the strings that end it.
    fn is_stopped(&self, new: &[u32], settings: &Generation) -> Result<bool> {
        let stops = settings.stop_strings();
        if stops.is_empty() {
            return Ok(false);
        }
        let text = self.tokenizer()?.decode_with_special(new)?;
        Ok(stops.iter().any(|stop| text.contains(stop)))
    }
}
