use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use models::{SpecialTokens, Tokenizer};

use crate::{Error, Piece, Record, RecordError, Result, Template};

#[cfg(test)]
mod tests;

/// The tokens of a text, and which of them are targets of the loss.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Example {
    tokens: Vec<u32>,
    is_target: Vec<bool>,
}

impl Example {
    /// An example of `tokens`, each with whether it is a target.
    ///
    /// The first token is never a target: no token before it could predict it.
    ///
    /// # Panics
    /// If `tokens` and `is_target` have different lengths.
    pub fn new(tokens: Vec<u32>, mut is_target: Vec<bool>) -> Self {
        assert_eq!(tokens.len(), is_target.len(), "one mark for each token");
        if let Some(first) = is_target.first_mut() {
            *first = false;
        }
        Self { tokens, is_target }
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether each token is a target: one that the loss predicts from those before it.
    pub fn is_target(&self) -> &[bool] {
        &self.is_target
    }

    /// The number of targets.
    pub fn n_targets(&self) -> usize {
        let targets = self.is_target.iter().filter(|&&is_target| is_target);
        targets.count()
    }

    fn truncate(&mut self, max_len: usize) {
        self.tokens.truncate(max_len);
        self.is_target.truncate(max_len);
    }
}

/// The treatment of examples that are longer than the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TooLong {
    /// Cuts off the end, with the end-of-sequence token.
    #[default]
    Cut,
    /// Leaves the record out.
    Drop,
    /// Fails with [`RecordError::TooLong`].
    Refuse,
}

/// The largest length of an example, and the treatment of longer ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    max_len: usize,
    too_long: TooLong,
}

impl Limit {
    /// A limit of `max_len` tokens, special tokens included; longer examples are cut.
    pub fn new(max_len: usize) -> Self {
        let too_long = TooLong::default();
        Self { max_len, too_long }
    }

    /// The treatment of longer examples.
    pub fn with_too_long(mut self, too_long: TooLong) -> Self {
        self.too_long = too_long;
        self
    }
}

/// The examples of some records, and the number of records that gave none.
///
/// Displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Encoded {
    /// The examples in the order of their records, each with at least one target.
    pub examples: Vec<Example>,
    /// Examples that were cut.
    pub n_cut: usize,
    /// Records left out because they are too long.
    pub n_dropped: usize,
    /// Records left out because they have no target within the limit.
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
            "{} examples, {n_tokens} tokens, {n_targets} of them targets; {n_cut} cut to {max_len} tokens; left out: {n_dropped} too long, {n_without_targets} without targets",
            examples.len()
        )
    }
}

/// Tokenizes the texts that a template renders from records.
///
/// A text is tokenized as a whole, and a token belongs to the piece in which it begins: a token across
/// the end of a prompt is not a target, but one of which a part is in a `generation` block of a chat
/// template is. Special tokens that a text spells out are encoded as such. A text from
/// [`Template::Fields`] follows `bos` if the tokenizer adds it, and is followed by `eos`, which is a
/// target; a chat template writes its own special tokens.
///
/// # Errors
/// As [`Template::pieces`]; [`models::TextError::Tokenizer`]; [`models::TextError::MissingSpecial`] without
/// an `eos` to end a text; [`RecordError::TooLong`] with [`TooLong::Refuse`]; [`Error::NoExamples`] if
/// no example is left.
///
/// # Examples
/// ```
/// use instruct::{Error, Limit, Template, encode, read_records};
/// use models::{SpecialToken, SpecialTokens, Tokenizer};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("tokenizer.json");
/// std::fs::write(&path, r#"{"pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel",
///     "vocab": {"<unk>": 0, "</s>": 1, "one": 2, "two": 3}, "unk_token": "<unk>"}}"#)?;
/// let tokenizer = Tokenizer::open(&path)?;
/// let eos = SpecialToken { text: "</s>".into(), id: 1 };
/// let special = SpecialTokens { eos: Some(eos), ..SpecialTokens::default() };
///
/// let data = dir.path().join("train.jsonl");
/// std::fs::write(&data, r#"{"question": "one", "answer": "two"}"#)?;
/// let records = read_records(&data)?;
/// let template = Template::fields("{{ question }}", " {{ answer }}")?;
/// let encoded = encode(&records, &template, &tokenizer, &special, Limit::new(8))?;
/// assert_eq!(encoded.examples[0].tokens(), [2, 3, 1]);
/// assert_eq!(encoded.examples[0].is_target(), [false, true, true]);
///
/// // The only token within this limit is the prompt.
/// let error = encode(&records, &template, &tokenizer, &special, Limit::new(1)).unwrap_err();
/// assert!(matches!(error, Error::NoExamples { n_without_targets: 1, .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
        let is_long = n_tokens > max_len;
        match too_long {
            TooLong::Drop if is_long => {
                encoded.n_dropped += 1;
                continue;
            }
            TooLong::Refuse if is_long => {
                return Err(record.refuse(RecordError::TooLong { n_tokens, max_len }));
            }
            _ => example.truncate(max_len),
        }
        if example.n_targets() == 0 {
            encoded.n_without_targets += 1;
            continue;
        }
        encoded.n_cut += usize::from(is_long);
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

/// The number of examples in `eval` whose tokens are those of an example in `train`.
pub fn count_duplicates(train: &[Example], eval: &[Example]) -> usize {
    let train: HashSet<&[u32]> = train.iter().map(Example::tokens).collect();
    let is_known = |example: &&Example| train.contains(example.tokens());
    eval.iter().filter(is_known).count()
}

struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Whether a part of a token makes it a target, or only its beginning.
    by_parts: bool,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl<'a> Encoder<'a> {
    fn new(template: &Template, tokenizer: &'a Tokenizer, special: &SpecialTokens) -> Result<Self> {
        let (mut bos, mut eos) = (None, None);
        if !template.is_complete() {
            if special.add_bos {
                bos = Some(special.need_bos("the tokenizer")?.id);
            }
            eos = Some(special.need_eos("the end of an example")?.id);
        }
        Ok(Self {
            tokenizer,
            by_parts: template.marks_targets(),
            bos,
            eos,
        })
    }

    fn encode(&self, pieces: &[Piece]) -> Result<Example> {
        let mut text = String::new();
        let mut targets: Vec<Range<usize>> = Vec::new();
        for piece in pieces {
            let start = text.len();
            text.push_str(&piece.text);
            if piece.is_target {
                targets.push(start..text.len());
            }
        }
        let encoding = self.tokenizer.encode_with_starts(&text)?;
        let ends = encoding.iter().skip(1).map(|&(_, start)| start);
        let ends = ends.chain([text.len()]);
        let is_target = encoding.iter().zip(ends).map(|(&(_, start), end)| {
            let at = targets.partition_point(|range| range.end <= start);
            // A token may have no bytes of its own.
            let end = if self.by_parts {
                end.max(start + 1)
            } else {
                start + 1
            };
            targets.get(at).is_some_and(|range| range.start < end)
        });
        let bos = self.bos.into_iter();
        let tokens = bos.chain(encoding.iter().map(|&(token, _)| token));
        let of_bos = self.bos.map(|_| false).into_iter();
        Ok(Example::new(
            tokens.chain(self.eos).collect(),
            of_bos
                .chain(is_target)
                .chain(self.eos.map(|_| true))
                .collect(),
        ))
    }
}
