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
    AddedToken, DecodeStream, DecoderWrapper, Encoding, ModelWrapper, NormalizerWrapper,
    PaddingParams, PostProcessor, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerBuilder, TruncationParams,
};

use super::limits;

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
}

impl Library {
    /// Reads a `tokenizer.json`.
    pub(super) fn new(bytes: &[u8]) -> Result<Self> {
        thread::scope(|scope| {
            let reader = thread::Builder::new().stack_size(STACK);
            let reader = reader.spawn_scoped(scope, || Self::build(bytes));
            let reader = reader.map_err(|error| format!("no thread can be started: {error}"))?;
            reader.join().unwrap_or_else(|panic| Err(message(&*panic)))
        })
    }

    fn build(bytes: &[u8]) -> Result<Self> {
        let (mut file, growth) = limits::parse(bytes)?;
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
            growth,
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

    /// The text of some tokens.
    pub(super) fn decode(&self, tokens: &[u32]) -> Result<String> {
        caught(|| self.inner.decode(tokens, true))
    }

    /// A decoder of tokens one after the other.
    pub(super) fn stream(&self) -> Stream<'_> {
        Stream(self.inner.decode_stream(true))
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

/// A decoder of tokens one after the other.
pub(super) struct Stream<'a>(
    DecodeStream<
        'a,
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
);

impl Stream<'_> {
    /// Decodes one more token, if it completes a character.
    pub(super) fn push(&mut self, token: u32) -> Result<Option<String>> {
        caught(|| self.0.step(token))
    }
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
