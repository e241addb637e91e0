//! GSM8K as the task `gsm8k` of lm-evaluation-harness has it, version 3.
//!
//! Cobbe et al. 2021, arXiv:2110.14168; `lm_eval/tasks/gsm8k/gsm8k.yaml`. Texts are generated greedily
//! after [`prompt`] or [`few_shot_prompt`], ended by [`cut`] at one of [`STOPS`]; an answer is taken
//! out of each by [`strict`] or [`flexible`] and held against the reference by [`is_correct`].

use std::ops::ControlFlow;
use std::sync::LazyLock;

use models::{Generation, Pretrained};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::Result;

#[cfg(test)]
mod tests;

/// What ends a generated text; the harness adds the text of the model's end-of-sequence token.
pub const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// One line of the data: a question, and its solution with the answer after `#### `.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The question.
    pub question: String,
    /// The whole solution.
    pub answer: String,
}

/// The prompt without examples.
pub fn prompt(question: &str) -> String {
    format!("Question: {question}\nAnswer:")
}

/// The prompt after solved examples, of which the harness takes five from the training set.
pub fn few_shot_prompt(examples: &[Problem], question: &str) -> String {
    let solved =
        |example: &Problem| format!("{} {}\n\n", prompt(&example.question), example.answer);
    examples.iter().map(solved).collect::<String>() + &prompt(question)
}

/// A model's answer to one problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What it wrote, up to a stop.
    pub text: String,
    /// Whether the [`strict`] answer is right.
    pub strict: bool,
    /// Whether the [`flexible`] answer is right.
    pub flexible: bool,
}

/// A model's answers, after solved examples if there are any, each of up to `max_new_tokens` tokens.
///
/// A prompt begins with the token that begins texts, where the tokenizer puts it. Of one that leaves
/// no room for the answer in what the model was made for, the last tokens are kept, as the harness
/// does. `on_answer` sees each answer as it comes.
///
/// # Errors
/// As [`Pretrained::encode_text`] and [`Pretrained::generate`].
pub fn answers(
    lm: &Pretrained,
    examples: &[Problem],
    problems: &[Problem],
    max_new_tokens: usize,
    mut on_answer: impl FnMut(&Answer),
) -> Result<Vec<Answer>> {
    let settings = Generation::new(max_new_tokens);
    let max_len = lm.model.config().max_seq_len();
    let mut answers = Vec::new();
    for problem in problems {
        let prompt = lm.encode_text(&few_shot_prompt(examples, &problem.question))?;
        let room = max_len.saturating_sub(max_new_tokens).max(1);
        let prompt = &prompt[prompt.len().saturating_sub(room)..];
        let mut text = String::new();
        lm.generate(prompt, &settings, |piece| {
            text += piece;
            match cut(&text, &STOPS).len() < text.len() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        let text = cut(&text, &STOPS).to_string();
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

/// A text up to the first of the stops.
///
/// The stops are looked for one after the other, each in what the others have left, and an empty one
/// is none.
pub fn cut<'a>(text: &'a str, stops: &[&str]) -> &'a str {
    let stops = stops.iter().filter(|stop| !stop.is_empty());
    stops.fold(text, |text, stop| {
        text.split_once(stop).map_or(text, |(before, _)| before)
    })
}

/// The answer where the examples have theirs, after `#### ` (the filter `strict-match`).
///
/// The first of them, if there are several. Without a number right after it, there is none.
pub fn strict(text: &str) -> Option<&str> {
    static ANSWER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").expect("a valid pattern"));
    let captures = ANSWER.captures(text)?;
    captures.get(1).map(|answer| answer.as_str())
}

/// The last number of the text (the filter `flexible-extract`).
///
/// What looks like one also counts: an ellipsis at the end is taken for the answer, and is wrong.
pub fn flexible(text: &str) -> Option<&str> {
    // Of the two groups that the reference has for these, the one that matched is the whole match.
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"-?[$0-9.,]{2,}|-?[0-9]+").expect("a valid pattern"));
    NUMBER.find_iter(text).last().map(|number| number.as_str())
}

/// Whether an extracted answer is that of the reference, the whole [`Problem::answer`].
///
/// Compared as strings, after commas, dollar signs, what is before the last `#### ` and one period at
/// the end are left out of both: `18.00` is not `18`.
pub fn is_correct(extracted: Option<&str>, reference: &str) -> bool {
    extracted.is_some_and(|extracted| normalized(extracted) == normalized(reference))
}

fn normalized(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rfind("#### ").map_or(&*text, |at| &text[at + 5..]);
    // Python's `\.$` also takes the period before a newline at the end.
    let (line, newline) = match text.strip_suffix('\n') {
        Some(line) => (line, "\n"),
        None => (text, ""),
    };
    match line.strip_suffix('.') {
        Some(line) => (line.to_string() + newline).to_lowercase(),
        None => text.to_lowercase(),
    }
}
