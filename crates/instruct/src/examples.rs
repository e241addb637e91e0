use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use models::{SpecialTokens, Tokenizer};
use tokenizers::PostProcessorWrapper;

use crate::{Error, Piece, Record, Result, Template};

#[cfg(test)]
mod tests;

/// The tokens of a text, and which of them are to be learned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Example {
    tokens: Vec<u32>,
    is_target: Vec<bool>,
}

impl Example {
    /// The first token is never learned: there is nothing before it that could predict it.
    ///
    /// # Panics
    /// If there is not one `is_target` for each token.
    pub fn new(tokens: Vec<u32>, mut is_target: Vec<bool>) -> Self {
        assert_eq!(tokens.len(), is_target.len(), "one is_target a token");
        if let Some(first) = is_target.first_mut() {
            *first = false;
        }
        Self { tokens, is_target }
    }

    /// Its tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether each token is to be learned, that is, predicted from those before it.
    pub fn is_target(&self) -> &[bool] {
        &self.is_target
    }

    /// How many are.
    pub fn n_targets(&self) -> usize {
        self.is_target
            .iter()
            .filter(|&&is_target| is_target)
            .count()
    }
}

/// What becomes of texts of too many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// Their ends are cut off, with the token that says that it is the end.
    Cut,
    /// They are left out.
    Drop,
    /// They are an error.
    Refuse,
}

/// How long an example may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In tokens, with those before and behind the text.
    pub max_len: usize,
    /// What becomes of longer ones.
    pub too_long: TooLong,
}

/// The examples of some records, and what became of the others.
///
/// Displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Encoded {
    /// In the order of their records, each with at least one target.
    pub examples: Vec<Example>,
    /// How many of them were cut.
    pub n_cut: usize,
    /// Records left out because they are too long.
    pub n_dropped: usize,
    /// Records left out because nothing of them is to be learned, or nothing within the limit.
    pub n_without_targets: usize,
    max_len: usize,
}

impl fmt::Display for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let n_tokens: usize = self.examples.iter().map(|e| e.tokens.len()).sum();
        let n_targets: usize = self.examples.iter().map(Example::n_targets).sum();
        let Self {
            examples,
            n_cut,
            n_dropped,
            n_without_targets,
            max_len,
        } = self;
        write!(
            f,
            "{} examples, {n_tokens} tokens, {n_targets} of them to be learned; {n_cut} cut to {max_len} tokens; left out: {n_dropped} too long, {n_without_targets} without anything to learn",
            examples.len()
        )
    }
}

/// The tokens of the texts that `template` makes of records.
///
/// Each text is tokenized at once. A token belongs to the piece in which it begins: one that
/// straddles the end of a prompt is not learned. Special tokens that a text spells out are taken
/// as such. A text from [`Template::Fields`] comes after `bos`, where the tokenizer puts it, and
/// before `eos`, which is learned; a chat template puts its own.
///
/// # Errors
/// Those of [`Template::pieces`]; [`models::Error::Tokenizer`]; [`models::Error::MissingSpecial`] without an `eos`
/// where one is needed; [`Error::TooLong`] if that is asked for; [`Error::NoExamples`] if none is
/// left.
pub fn encode(
    records: &[Record],
    template: &Template,
    tokenizer: &Tokenizer,
    special: &SpecialTokens,
    limit: Limit,
) -> Result<Encoded> {
    let encoder = Encoder::new(template, tokenizer, special)?;
    let Limit { max_len, too_long } = limit;
    let mut encoded = Encoded {
        examples: Vec::with_capacity(records.len()),
        n_cut: 0,
        n_dropped: 0,
        n_without_targets: 0,
        max_len,
    };
    for record in records {
        let mut example = encoder.encode(&template.pieces(record)?)?;
        let n_tokens = example.tokens.len();
        let is_cut = n_tokens > max_len;
        if is_cut {
            match too_long {
                TooLong::Cut => {
                    example.tokens.truncate(max_len);
                    example.is_target.truncate(max_len);
                }
                TooLong::Drop => {
                    encoded.n_dropped += 1;
                    continue;
                }
                TooLong::Refuse => {
                    return Err(Error::TooLong {
                        path: record.path.to_path_buf(),
                        line: record.line,
                        n_tokens,
                        max_len,
                    });
                }
            }
        }
        if example.n_targets() == 0 {
            encoded.n_without_targets += 1;
            continue;
        }
        encoded.n_cut += usize::from(is_cut);
        encoded.examples.push(example);
    }
    if encoded.examples.is_empty() {
        return Err(Error::NoExamples {
            n_records: records.len(),
            n_too_long: encoded.n_dropped,
            n_without_targets: encoded.n_without_targets,
            max_len,
        });
    }
    Ok(encoded)
}

/// How many examples for evaluation are among those for training, token by token.
pub fn count_duplicates(train: &[Example], eval: &[Example]) -> usize {
    let train: HashSet<&[u32]> = train.iter().map(Example::tokens).collect();
    let is_known = |example: &&Example| train.contains(example.tokens());
    eval.iter().filter(is_known).count()
}

struct Encoder<'a> {
    tokenizer: tokenizers::Tokenizer,
    /// For errors.
    source: &'a Tokenizer,
    before: Option<u32>,
    behind: Option<u32>,
}

impl<'a> Encoder<'a> {
    fn new(template: &Template, source: &'a Tokenizer, special: &SpecialTokens) -> Result<Self> {
        let (before, behind) = match template {
            Template::Chat(_) => (None, None),
            Template::Fields(_) => {
                let bos = match special.add_bos {
                    true => Some(special.need_bos("the tokenizer")?.id),
                    false => None,
                };
                let eos = special.need_eos("the end of an example, which is learned,")?;
                (bos, Some(eos.id))
            }
        };
        let mut tokenizer = source.inner().clone();
        // It would move the offsets of tokens beyond the spaces with which they begin
        // (`trim_offsets`), and so a token that begins in the prompt into what is learned.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        Ok(Self {
            tokenizer,
            source,
            before,
            behind,
        })
    }

    fn encode(&self, pieces: &[Piece]) -> Result<Example> {
        let mut text = String::new();
        let mut learned: Vec<Range<usize>> = Vec::new();
        for piece in pieces {
            let start = text.len();
            text.push_str(&piece.text);
            if piece.learn {
                learned.push(start..text.len());
            }
        }
        // With offsets in bytes; `encode_fast` gives none, `encode_char_offsets` others.
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|error| models::Error::Tokenizer {
            path: self.source.path().into(),
            problem: error.to_string(),
        })?;
        let is_learned = |&(start, _): &(usize, usize)| {
            let at = learned.partition_point(|range| range.end <= start);
            learned.get(at).is_some_and(|range| range.contains(&start))
        };
        let before = self.before.into_iter();
        let tokens = before.chain(encoding.get_ids().iter().copied());
        let is_target = self.before.map(|_| false).into_iter();
        let is_target = is_target.chain(encoding.get_offsets().iter().map(is_learned));
        Ok(Example::new(
            tokens.chain(self.behind).collect(),
            is_target.chain(self.behind.map(|_| true)).collect(),
        ))
    }
}
