//! The only module that names the crate `tokenizers`.
//!
//! That crate trusts its files. What would make it abort the process (a size that becomes an allocation,
//! a length that becomes the depth of a recursion), or panic for lack of another part, is refused by
//! [`limits`] before; the panics that remain are caught here.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, DecoderWrapper, Encoding, Model, ModelWrapper, NormalizerWrapper, PaddingParams,
    PostProcessor, PostProcessorWrapper, PreTokenizerWrapper, Token, TokenizerBuilder,
    TruncationParams,
};

use super::limits;
use super::stream::Continuity;

/// The stack of the thread that reads a file: for a file of the depth that `limits` allows, with much
/// to spare.
const STACK: usize = 8 << 20;

/// An operation whose error is a message that names the part of the file, if it is known.
pub(super) type Result<T> = std::result::Result<T, String>;

/// A tokenizer of the crate `tokenizers`.
#[derive(Clone, Debug)]
pub(super) struct Library {
    /// Without the post-processor, which adds tokens to a text, and moves the offsets of others.
    inner: tokenizers::Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    /// The most by which a text can grow on its way to the model.
    growth: f64,
    /// Whether spaces before punctuation are removed from a decoded text.
    cleans_up: bool,
    continuity: Continuity,
}

impl Library {
    /// Reads a `tokenizer.json`.
    pub(super) fn new(bytes: &[u8]) -> Result<Self> {
        in_thread(|| Self::build(limits::parse(bytes)?, None))
    }

    /// Builds the tokenizer of an object that a `tokenizer.json` would have, in which a text grows by
    /// `growth` at most, if that is known.
    pub(super) fn of(json: Map<String, Value>, growth: Option<f64>) -> Result<Self> {
        in_thread(|| Self::build(json, growth))
    }

    /// Removes spaces before punctuation from decoded texts, as transformers does for all models but BPE.
    pub(super) fn cleaned_up(mut self, cleans_up: bool) -> Self {
        let is_bpe = matches!(self.inner.get_model(), ModelWrapper::BPE(_));
        self.cleans_up = cleans_up && !is_bpe;
        if self.cleans_up {
            self.continuity = Continuity::Nothing;
        }
        self
    }

    fn build(mut file: Map<String, Value>, growth: Option<f64>) -> Result<Self> {
        let limits::Checked {
            growth: most,
            continuity,
        } = limits::check(&file)?;
        if file.get("version").is_some_and(|version| version != "1.0") {
            return Err("version: is not \"1.0\"".into());
        }
        // They would change a text.
        part::<TruncationParams>(&mut file, "truncation")?;
        part::<PaddingParams>(&mut file, "padding")?;
        let mut model = file.remove("model").ok_or("has no model")?;
        if let Value::Object(model) = &mut model {
            // It would make the tokens of a text random.
            model.remove("dropout");
        }
        let builder = TokenizerBuilder::new()
            .with_model(read::<ModelWrapper>("model", model)?)
            .with_normalizer(part::<NormalizerWrapper>(&mut file, "normalizer")?)
            .with_pre_tokenizer(part::<PreTokenizerWrapper>(&mut file, "pre_tokenizer")?)
            .with_post_processor(None::<PostProcessorWrapper>)
            .with_decoder(part::<DecoderWrapper>(&mut file, "decoder")?);
        let post_processor = part(&mut file, "post_processor")?;
        let added: Vec<Added> = part(&mut file, "added_tokens")?.unwrap_or_default();
        let inner = within(
            "added_tokens",
            caught(|| with_added(builder.build()?, &added)),
        )?;
        for Added { id, token } in &added {
            let content = &token.content;
            if inner.token_to_id(content) != Some(*id) {
                return Err(format!(
                    "the added token `{content}` has the id {id}, which is not its place in the vocabulary"
                ));
            }
        }
        Ok(Self {
            inner,
            post_processor,
            growth: growth.map_or(most, |growth| most.min(growth)),
            cleans_up: false,
            continuity,
        })
    }

    /// The tokens of a text.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        limits::check_text(text.len(), self.growth)?;
        let encoding = caught(|| self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text, each with the byte of the text at which it begins.
    pub(super) fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        limits::check_text(text.len(), self.growth)?;
        // `encode_fast` gives no offsets, `encode_char_offsets` gives them in characters.
        let encoding = caught(|| self.inner.encode(text, false))?;
        let starts = encoding.get_offsets().iter().map(|&(start, _)| start);
        Ok(encoding.get_ids().iter().copied().zip(starts).collect())
    }

    /// The tokens that the post-processor puts before a text.
    pub(super) fn added_before(&self) -> Result<Vec<u32>> {
        let Some(post_processor) = &self.post_processor else {
            return Ok(Vec::new());
        };
        // A token in place of a text, to tell the tokens before a text from those after it.
        let text = Encoding::from_tokens(vec![Token::new(0, String::new(), (0, 0))], 0);
        let all = caught(|| post_processor.process(text, None, true));
        let all = within("post_processor", all)?;
        let is_added = all.get_special_tokens_mask().iter();
        let n = is_added.take_while(|&&is_added| is_added == 1).count();
        let added = &all.get_ids()[..n];
        match added.iter().find(|&&id| self.id_to_token(id).is_none()) {
            Some(id) => Err(format!(
                "post_processor: adds the token {id}, which is not in the vocabulary"
            )),
            None => Ok(added.to_vec()),
        }
    }

    /// The text of some tokens, without special tokens if `skips_special`.
    pub(super) fn decode(&self, tokens: &[u32], skips_special: bool) -> Result<String> {
        let text = caught(|| self.inner.decode(tokens, skips_special))?;
        Ok(if self.cleans_up {
            cleaned_up(&text)
        } else {
            text
        })
    }

    /// The `tokenizer.json`, without a post-processor.
    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.inner).expect("what was read can be written")
    }

    /// What can still change in a decoded text.
    pub(super) fn continuity(&self) -> Continuity {
        self.continuity
    }

    /// Whether a token is part of a text: in the vocabulary, and not special.
    pub(super) fn has_text(&self, id: u32) -> bool {
        let is_special = |token: &str| self.inner.get_added_vocabulary().is_special_token(token);
        self.decoded(id).is_some_and(|token| !is_special(&token))
    }

    /// Whether a token stands for a byte, such as `<0x0A>`.
    pub(super) fn is_byte(&self, id: u32) -> bool {
        let token = self.decoded(id).unwrap_or_default();
        let hex = token
            .strip_prefix("<0x")
            .and_then(|token| token.strip_suffix('>'));
        hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
    }

    /// The token of an id, as decoders get it.
    fn decoded(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary().simple_id_to_token(id);
        added.or_else(|| self.inner.get_model().id_to_token(id))
    }

    /// The id of a token.
    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub(super) fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }
}

/// A text without spaces before punctuation.
///
/// Source: `clean_up_tokenization` in `transformers/tokenization_utils_base.py`.
fn cleaned_up(text: &str) -> String {
    let patterns = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    let replace = |text: String, (from, to): (&str, &str)| text.replace(from, to);
    patterns.into_iter().fold(text.to_owned(), replace)
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

type Parts = tokenizers::TokenizerImpl<
    ModelWrapper,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// Adds tokens, which get the ids that follow the vocabulary if they are not in it.
fn with_added(mut parts: Parts, added: &[Added]) -> tokenizers::Result<tokenizers::Tokenizer> {
    parts.add_tokens(added.iter().map(|added| added.token.clone()))?;
    Ok(parts.into())
}

/// Calls a reader in a thread with a stack for deep files.
fn in_thread<T: Send>(read: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let reader = thread::Builder::new().stack_size(STACK);
        let reader = reader.spawn_scoped(scope, read);
        let reader = reader.map_err(|error| format!("no thread can be started: {error}"))?;
        reader.join().unwrap_or_else(|panic| Err(message(&*panic)))
    })
}

/// Takes a part of a file, if the file has it.
fn part<T: DeserializeOwned>(file: &mut Map<String, Value>, name: &str) -> Result<Option<T>> {
    let value = file.remove(name).filter(|value| !value.is_null());
    value.map(|value| read(name, value)).transpose()
}

fn read<T: DeserializeOwned>(name: &str, value: Value) -> Result<T> {
    within(name, caught(|| Ok(serde_json::from_value(value)?)))
}

/// Names the part of a file in which an operation failed.
pub(super) fn within<T>(part: &str, result: Result<T>) -> Result<T> {
    result.map_err(|problem| format!("{part}: {problem}"))
}

/// Calls the library, with a panic of it as an error.
fn caught<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    // What a panic can leave behind is a cache with an entry less.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(message(&*panic)),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let text = text.unwrap_or("without a message");
    format!("the crate `tokenizers` panicked: {text}")
}
