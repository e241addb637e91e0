//! Text from tokens, one after the other.

use serde_json::Value;

use super::library::{Library, Result};

/// The character for bytes that are none.
const REPLACEMENT: char = '\u{fffd}';

/// What a decoder can still change in the text of the tokens that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Continuity {
    /// A character whose bytes are incomplete.
    Characters,
    /// All characters of a run of tokens of single bytes, which become replacement characters if one of
    /// them is incomplete.
    ByteRuns,
    /// Any part.
    Nothing,
}

impl Continuity {
    /// That of the steps of a decoder, in their order; none if a tokenizer has no decoder.
    ///
    /// Steps that replace longer strings in the text of several tokens, or treat the last token otherwise,
    /// can change what was decoded before.
    pub(super) fn of<'a>(steps: impl Iterator<Item = &'a Value>) -> Self {
        let (mut is_fused, mut falls_back, mut is_changed) = (false, false, false);
        let mut is_sequence = false;
        for step in steps {
            match step["type"].as_str() {
                None if step.is_null() => {}
                // The steps of one in another have another order.
                Some("Sequence") if !is_sequence => is_sequence = true,
                Some("ByteLevel" | "Fuse") => is_fused = true,
                Some("ByteFallback") if !is_fused && !is_changed => falls_back = true,
                Some("Metaspace") if step["replacement"] != "\u{fffd}" => is_changed = true,
                // A space in place of a character.
                Some("Replace") if step["content"] == " " && is_character(&step["pattern"]) => {}
                Some("Strip") if step["content"] == " " && step["stop"] == 0 => {
                    is_changed |= !is_fused;
                }
                Some("WordPiece") if !is_fused => is_changed = true,
                _ => return Self::Nothing,
            }
        }
        match falls_back {
            true => Self::ByteRuns,
            false => Self::Characters,
        }
    }
}

/// Whether a pattern is one character that cannot be in the place of a byte, or in its name.
fn is_character(pattern: &Value) -> bool {
    let pattern = pattern["String"].as_str().unwrap_or_default();
    let mut characters = pattern.chars();
    let first = characters.next().unwrap_or('x');
    characters.next().is_none() && !first.is_ascii() && first != REPLACEMENT
}

/// A decoder of tokens that follow a context.
///
/// The pieces together are the text of all tokens without that of the context; see
/// [`TextStream`](super::TextStream). A decoder treats the first token of a text otherwise than the others,
/// so that tokens are decoded after some whose text is known.
pub(super) struct Stream<'a> {
    library: &'a Library,
    /// Tokens with a text of their own: some whose text is known, then those without a text so far.
    tokens: Vec<u32>,
    n_known: usize,
    /// The text of the known tokens.
    known: Known,
}

/// The beginning of a text that is not part of the next piece.
enum Known {
    /// The text of a context, whose end the tokens after it may change.
    Context(String),
    /// A number of bytes.
    Bytes(usize),
}

impl<'a> Stream<'a> {
    pub(super) fn new(library: &'a Library, context: &[u32]) -> Result<Self> {
        let has_text = |&token: &u32| library.has_text(token);
        let tokens: Vec<u32> = context.iter().copied().filter(has_text).collect();
        Ok(Self {
            library,
            n_known: tokens.len(),
            known: Known::Context(text(library, &tokens)?),
            tokens,
        })
    }

    /// The text that is complete with one more token.
    pub(super) fn push(&mut self, token: u32) -> Result<String> {
        if !self.library.has_text(token) {
            return Ok(String::new());
        }
        self.tokens.push(token);
        let is_open = match self.library.continuity() {
            Continuity::Characters => false,
            Continuity::ByteRuns => self.library.is_byte(token),
            Continuity::Nothing => true,
        };
        if is_open {
            return Ok(String::new());
        }
        let text = text(self.library, &self.tokens)?;
        if text.ends_with(REPLACEMENT) {
            return Ok(String::new());
        }
        let piece = self.rest(&text);
        self.forget(text.len())?;
        Ok(piece)
    }

    /// The rest of the text, with replacement characters for bytes that are no character.
    pub(super) fn finish(self) -> Result<String> {
        let text = text(self.library, &self.tokens)?;
        Ok(self.rest(&text))
    }

    fn rest(&self, text: &str) -> String {
        let start = match &self.known {
            Known::Bytes(n) => *n,
            Known::Context(context) if text.starts_with(context) => context.len(),
            Known::Context(context) => {
                let mut both = context.char_indices().zip(text.chars());
                let first = both.find(|((_, a), b)| a != b);
                first.map_or(context.len().min(text.len()), |((at, _), _)| at)
            }
        };
        text.get(start..).unwrap_or_default().to_owned()
    }

    /// Keeps the last tokens alone, if they have a text that what follows is told from.
    fn forget(&mut self, n_bytes: usize) -> Result<()> {
        let last = text(self.library, &self.tokens[self.n_known..])?;
        if last.is_empty() {
            self.known = Known::Bytes(n_bytes);
        } else {
            self.tokens.drain(..self.n_known);
            self.known = Known::Bytes(last.len());
        }
        self.n_known = self.tokens.len();
        Ok(())
    }
}

/// Decoders may need a token.
fn text(library: &Library, tokens: &[u32]) -> Result<String> {
    match tokens {
        [] => Ok(String::new()),
        tokens => library.decode(tokens, true),
    }
}
