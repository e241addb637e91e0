//! Multiple choice by log-likelihood, as in lm-evaluation-harness.
//!
//! Each choice is a continuation of the context, and the likeliest one is the answer of the model.
//! Sources: `process_results` of `multiple_choice` in `lm_eval/api/task.py`, and `_encode_pair` in
//! `lm_eval/api/model.py`.

use instruct::Record;
use models::Pretrained;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::refuse;
use crate::harness::{AddBos, encode};
use crate::rolling::ScoredWindow;
use crate::score::score;
use crate::whitespace::split_trailing;
use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// A question with several choices, one of which is right.
///
/// A record has
/// * `context`, `query` or `question`: the text that the choices continue;
/// * `choices`: at least two strings, none of them empty;
/// * `answer`: the index of the right choice from 0, its text, or its letter from `"A"`. A letter that
///   is the text of another choice is refused.
///
/// Other fields are ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceItem {
    /// The text that the choices continue.
    pub context: String,
    /// The choices.
    pub choices: Vec<String>,
    /// The index of the right choice.
    pub answer: usize,
}

#[derive(Deserialize)]
struct Fields {
    context: Option<String>,
    query: Option<String>,
    question: Option<String>,
    choices: Option<Vec<String>>,
    answer: Option<Value>,
}

impl ChoiceItem {
    /// Reads an item from a record.
    ///
    /// # Errors
    /// [`Error::Record`] for a record without these fields.
    ///
    /// # Examples
    /// ```
    /// use evaluate::{ChoiceItem, Error};
    /// use instruct::read_records;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let path = dir.path().join("items.jsonl");
    /// let line = r#"{"question": "1 + 1 =", "choices": ["2", "3"], "answer": "A"}"#;
    /// std::fs::write(&path, format!("{line}\n{{\"question\": \"2 + 2 =\"}}\n"))?;
    /// let records = read_records(&path)?;
    /// assert_eq!(ChoiceItem::of(&records[0])?.answer, 0);
    ///
    /// let error = ChoiceItem::of(&records[1]).unwrap_err();
    /// assert!(matches!(error, Error::Record { line: 2, .. }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn of(record: &Record) -> Result<Self> {
        Self::read(&record.fields).map_err(|problem| refuse(record, problem))
    }

    fn read(fields: &Map<String, Value>) -> Result<Self, String> {
        let fields = serde_json::from_value(fields.clone().into());
        let fields: Fields = fields.map_err(|error| error.to_string())?;
        let mut contexts = [fields.context, fields.query, fields.question]
            .into_iter()
            .flatten();
        let context = match (contexts.next(), contexts.next()) {
            (Some(context), None) => context,
            (None, _) => return Err("no `context`, `query` or `question`; give one".into()),
            (Some(_), Some(_)) => {
                return Err("several of `context`, `query` and `question`; keep one".into());
            }
        };
        let choices = fields
            .choices
            .ok_or("no `choices`; give a list of strings")?;
        if choices.len() < 2 {
            let n = choices.len();
            return Err(format!("{n} in `choices`; give at least two"));
        }
        if let Some(at) = choices.iter().position(String::is_empty) {
            return Err(format!("choice {at} is empty; give it a text"));
        }
        let answer = fields
            .answer
            .ok_or("no `answer`; give an index, a letter or a text")?;
        let answer = index_of(&answer, &choices)?;
        Ok(Self {
            context,
            choices,
            answer,
        })
    }

    /// The choices as continuations of the context: each after a space.
    pub fn continuations(&self) -> impl Iterator<Item = String> + '_ {
        self.choices.iter().map(|choice| format!(" {choice}"))
    }

    /// Scores the log-likelihoods of the [`continuations`](Self::continuations).
    ///
    /// The first of equally likely choices is predicted, as by `numpy.argmax`.
    ///
    /// # Errors
    /// [`Error::Unpaired`] unless there is one log-likelihood for each choice; [`Error::NoItems`]
    /// without choices; [`Error::LogLikelihood`] for one that is not finite.
    pub fn score(&self, log_likelihoods: &[f64]) -> Result<ChoiceScore> {
        let (expected, found) = (self.choices.len(), log_likelihoods.len());
        if expected != found {
            return Err(Error::Unpaired {
                of: "choices",
                expected,
                and: "log-likelihoods",
                found,
            });
        }
        if expected == 0 {
            return Err(Error::NoItems);
        }
        let bad = |(_, value): &(usize, &f64)| !value.is_finite();
        if let Some((choice, &value)) = log_likelihoods.iter().enumerate().find(bad) {
            return Err(Error::LogLikelihood { choice, value });
        }
        // `len` of Python: code points, without the space before the choice.
        let lengths = self.choices.iter().map(|choice| choice.chars().count());
        let by_length = log_likelihoods.iter().zip(lengths);
        let normalized: Vec<f64> = by_length.map(|(sum, length)| sum / length as f64).collect();
        let (predicted, predicted_norm) = (argmax(log_likelihoods), argmax(&normalized));
        Ok(ChoiceScore {
            predicted,
            is_correct: predicted == self.answer,
            predicted_norm,
            is_correct_norm: predicted_norm == self.answer,
            probabilities: softmax(log_likelihoods),
        })
    }
}

/// Scores the answers of a model to some items.
///
/// A context follows `bos` if the tokenizer adds it, which is the default of lm-evaluation-harness.
///
/// # Errors
/// [`models::TextError::NoTokenizer`]; [`peft::Error::Token`]; [`models::TextError::MissingSpecial`] if a
/// context is empty and the model has neither `bos` nor `eos`; as [`encode_pair`],
/// [`ScoredWindow::after`], [`score`](crate::score()) and [`ChoiceItem::score`].
pub fn choices(lm: &Pretrained, items: &[ChoiceItem]) -> Result<Vec<ChoiceScore>> {
    let max_len = lm.model.config().max_seq_len();
    let mut windows = Vec::new();
    for item in items {
        for continuation in item.continuations() {
            let encode = |text: &str| encode(lm, text, AddBos::default());
            let prefix = || Ok(lm.first_token()?);
            let (context, continuation) =
                encode_pair(&item.context, &continuation, prefix, encode)?;
            windows.push(ScoredWindow::after(&context, &continuation, max_len)?);
        }
    }
    let losses = score(&lm.model, &windows, &lm.model.device())?;
    let sums: Vec<f64> = losses
        .iter()
        .map(|losses| -losses.iter().sum::<f64>())
        .collect();
    let mut sums = sums.as_slice();
    let score = |item: &ChoiceItem| {
        let (of_item, rest) = sums.split_at(item.choices.len());
        sums = rest;
        item.score(of_item)
    };
    items.iter().map(score).collect()
}

fn index_of(answer: &Value, choices: &[String]) -> Result<usize, String> {
    let n = choices.len();
    match answer {
        Value::Number(number) => {
            let index = number
                .as_u64()
                .and_then(|index| usize::try_from(index).ok());
            index.filter(|&index| index < n).ok_or_else(|| {
                format!(
                    "`answer` is {number}; with {n} choices an index is 0 to {}",
                    n - 1
                )
            })
        }
        Value::String(text) => {
            let by_text = choices.iter().position(|choice| choice == text);
            let by_letter = match text.as_bytes() {
                [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
                _ => None,
            };
            match (by_text, by_letter.filter(|&index| index < n)) {
                (Some(text), Some(letter)) if text != letter => Err(format!(
                    "`answer` is \"{}\", the text of choice {text} and the letter of choice {letter}; give the index",
                    choices[text]
                )),
                (Some(index), _) | (None, Some(index)) => Ok(index),
                (None, None) => Err(format!(
                    "`answer` is \"{text}\", neither the text of a choice nor a letter of one of the {n}"
                )),
            }
        }
        other => Err(format!(
            "`answer` is {other}; give an index, a letter or a text"
        )),
    }
}

/// The answer of a model to a [`ChoiceItem`].
#[derive(Clone, Debug, PartialEq)]
pub struct ChoiceScore {
    /// The choice with the largest log-likelihood.
    pub predicted: usize,
    /// Whether that choice is right; the mean over items is `acc`.
    pub is_correct: bool,
    /// The choice with the largest log-likelihood per character.
    pub predicted_norm: usize,
    /// Whether that choice is right; the mean over items is `acc_norm`.
    pub is_correct_norm: bool,
    /// The probability of each choice: the softmax of the log-likelihoods.
    pub probabilities: Vec<f64>,
}

impl ChoiceScore {
    /// The probability of the predicted choice and whether it is right, for
    /// [`calibration`](crate::calibration()).
    pub fn confidence(&self) -> (f64, bool) {
        (self.probabilities[self.predicted], self.is_correct)
    }
}

/// The index of the first of the largest values, of which there must be one.
fn argmax(values: &[f64]) -> usize {
    (1..values.len()).fold(
        0,
        |best, at| if values[at] > values[best] { at } else { best },
    )
}

fn softmax(values: &[f64]) -> Vec<f64> {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let terms: Vec<f64> = values.iter().map(|value| (value - largest).exp()).collect();
    let sum: f64 = terms.iter().sum();
    terms.iter().map(|term| term / sum).collect()
}

/// Encodes a context and its continuation.
///
/// Whitespace at the end of the context moves to the continuation. The context has the tokens of its
/// own encoding. The continuation has the tokens of the joint encoding, without as many tokens as the
/// context has: if a token spans the end of the context, the two are not the encoding of both together.
/// A context without tokens becomes `prefix`, usually `bos`. `encode` adds special tokens as the
/// tokenizer does.
///
/// # Errors
/// Those of `encode` and `prefix`; [`Error::NoContinuation`] if the continuation has no tokens.
pub fn encode_pair(
    context: &str,
    continuation: &str,
    prefix: impl Fn() -> Result<u32>,
    encode: impl Fn(&str) -> Result<Vec<u32>>,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let (head, _) = split_trailing(context);
    let mut whole = encode(&[context, continuation].concat())?;
    let mut head = encode(head)?;
    if head.is_empty() {
        let prefix = prefix()?;
        head.push(prefix);
        if whole.first() != Some(&prefix) {
            whole.insert(0, prefix);
        }
    }
    let tail = whole.split_off(head.len().min(whole.len()));
    if tail.is_empty() {
        let continuation = continuation.into();
        return Err(Error::NoContinuation { continuation });
    }
    Ok((head, tail))
}
