//! GSM8K as in the task `gsm8k` of lm-evaluation-harness, version 3.
//!
//! A model continues [`prompt`] or [`few_shot_prompt`] greedily, until its text has one of [`STOPS`] or the
//! tokenizer's end-of-sequence token, and [`cut`] ends it there. [`strict`] and [`flexible`] extract an answer, which [`is_correct`] compares with the
//! reference. [`answers`] does all of it.
//!
//! Cobbe et al. 2021, arXiv:2110.14168; `lm_eval/tasks/gsm8k/gsm8k.yaml`.

use std::ops::ControlFlow;
use std::sync::LazyLock;

use instruct::Record;
use models::{Generation, Pretrained};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::error::refuse;
use crate::harness::{AddBos, encode};

#[cfg(test)]
mod tests;

/// The strings that end a generated text, beside the end-of-sequence token of the tokenizer and the stop
/// tokens of the model.
pub const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// A question and its solution, which ends with the answer after `#### `.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The question.
    pub question: String,
    /// The solution.
    pub answer: String,
}

impl Problem {
    /// Reads a problem from a record, whose other fields are ignored.
    ///
    /// # Errors
    /// [`Error::Record`](crate::Error::Record) without `question` or `answer`.
    pub fn of(record: &Record) -> Result<Self> {
        let problem = serde_json::from_value(record.fields.clone().into());
        problem.map_err(|error| refuse(record, error.to_string()))
    }
}

/// The prompt without examples.
pub fn prompt(question: &str) -> String {
    format!("Question: {question}\nAnswer:")
}

/// The prompt after solved examples; the harness uses five of the training set.
pub fn few_shot_prompt(examples: &[Problem], question: &str) -> String {
    let solved =
        |example: &Problem| format!("{} {}\n\n", prompt(&example.question), example.answer);
    examples.iter().map(solved).collect::<String>() + &prompt(question)
}

/// A model's answer to one problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The generated text up to a stop.
    pub text: String,
    /// Whether the [`strict`] answer is right.
    pub strict: bool,
    /// Whether the [`flexible`] answer is right.
    pub flexible: bool,
}

/// Generates a model's answers of at most `max_new_tokens` tokens, after solved examples.
///
/// A prompt follows `bos` if the tokenizer adds it. The beginning of a prompt that leaves too few
/// positions for the answer is dropped, as by the harness. The text is that of the new tokens alone,
/// without special tokens; those that are stops are found before. `on_answer` is called after each answer.
///
/// Source: `HFLM.generate_until` in `lm_eval/models/huggingface.py` 0.4.13, for batches of one.
///
/// # Errors
/// As [`Pretrained::special_tokens`], [`Pretrained::encode`] and [`Pretrained::generate`].
pub fn answers(
    lm: &Pretrained,
    examples: &[Problem],
    problems: &[Problem],
    max_new_tokens: usize,
    mut on_answer: impl FnMut(&Answer),
) -> Result<Vec<Answer>> {
    let tokenizer = lm.tokenizer()?;
    let mut stops = STOPS.map(String::from).to_vec();
    if let Some(eos) = lm.special_tokens()?.eos {
        stops.push(tokenizer.decode_with_special(&[eos.id])?);
    }
    let settings = Generation::new(max_new_tokens).with_stop_strings(&stops);
    let max_len = lm.model.config().max_seq_len();
    let mut answers = Vec::new();
    for problem in problems {
        let prompt = few_shot_prompt(examples, &problem.question);
        let prompt = encode(lm, &prompt, AddBos::default())?;
        let room = max_len.saturating_sub(max_new_tokens).max(1);
        let prompt = &prompt[prompt.len().saturating_sub(room)..];
        let new = lm.generate(prompt, &settings, |_| ControlFlow::Continue(()))?;
        let text = tokenizer.decode(&new.tokens)?;
        let text = cut(&text, &stops).to_string();
        let answer = Answer {
            strict: is_correct(strict(&text), &problem.answer),
            flexible: is_correct(flexible(&text), &problem.answer),
            text,
        };
        on_answer(&answer);
        answers.push(answer);
    }
    Ok(answers)
}

/// Cuts a text at the first of the stops; empty stops are ignored.
pub fn cut<'a>(text: &'a str, stops: &[impl AsRef<str>]) -> &'a str {
    let stops = stops.iter().map(AsRef::as_ref);
    let stops = stops.filter(|stop: &&str| !stop.is_empty());
    stops.fold(text, |text, stop| {
        text.split_once(stop).map_or(text, |(before, _)| before)
    })
}

/// Extracts the first number that follows `#### ` (the filter `strict-match`).
///
/// # Examples
/// ```
/// use evaluate::gsm8k::{is_correct, strict};
///
/// assert!(is_correct(strict("2 + 2 = 4\n#### 4"), "It is 4.\n#### 4"));
/// assert_eq!(strict("The answer is 4"), None);
/// ```
pub fn strict(text: &str) -> Option<&str> {
    static ANSWER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").expect("a valid pattern"));
    let captures = ANSWER.captures(text)?;
    captures.get(1).map(|answer| answer.as_str())
}

/// Extracts the last number of a text (the filter `flexible-extract`).
///
/// Other runs of two or more digits, periods, commas and dollar signs count as numbers, such as `...`.
pub fn flexible(text: &str) -> Option<&str> {
    // The reference has a group for each alternative, and takes the one that matched.
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"-?[$0-9.,]{2,}|-?[0-9]+").expect("a valid pattern"));
    NUMBER.find_iter(text).last().map(|number| number.as_str())
}

/// Whether an extracted answer equals that of `reference`, a [`Problem::answer`].
///
/// Both are compared as strings without commas, dollar signs, the text up to the last `#### `, and one
/// period at the end: `18.00` is not `18`.
pub fn is_correct(extracted: Option<&str>, reference: &str) -> bool {
    extracted.is_some_and(|extracted| normalized(extracted) == normalized(reference))
}

fn normalized(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rfind("#### ").map_or(&*text, |at| &text[at + 5..]);
    // `\.$` of Python also matches before a newline at the end.
    let (line, newline) = match text.strip_suffix('\n') {
        Some(line) => (line, "\n"),
        None => (text, ""),
    };
    match line.strip_suffix('.') {
        Some(line) => (line.to_string() + newline).to_lowercase(),
        None => text.to_lowercase(),
    }
}
