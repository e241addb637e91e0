use approx::assert_relative_eq;
use proptest::prelude::*;

use super::*;

fn item(choices: &[&str], answer: usize) -> ChoiceItem {
    ChoiceItem {
        context: "It is".into(),
        choices: choices.iter().map(|choice| choice.to_string()).collect(),
        answer,
    }
}

#[test]
fn the_longer_choice_may_win_by_length() {
    // -4 / 2 = -2 and -6 / 6 = -1
    let score = item(&["no", "surely"], 1).score(&[-4.0, -6.0]).unwrap();
    assert_eq!((score.predicted, score.is_correct), (0, false));
    assert_eq!((score.predicted_norm, score.is_correct_norm), (1, true));
    // 1 / (1 + e^-2)
    assert_relative_eq!(score.probabilities[0], 0.8807970779778823, epsilon = 1e-15);
    assert_relative_eq!(score.confidence().0, 0.8807970779778823, epsilon = 1e-15);
    assert!(!score.confidence().1);
}

#[test]
fn a_length_is_in_characters_and_without_the_space() {
    // By characters -9 / 3 = -3 and -10 / 4 = -2.5; by bytes -9 / 6 = -1.5 would win.
    let score = item(&["äöü", "oaue"], 1).score(&[-9.0, -10.0]).unwrap();
    assert_eq!((score.predicted, score.predicted_norm), (0, 1));
    // -2 / 1 = -2 and -5.4 / 3 = -1.8; with the space -2 / 2 = -1 would win over -5.4 / 4 = -1.35.
    let score = item(&["a", "abc"], 1).score(&[-2.0, -5.4]).unwrap();
    assert_eq!(score.predicted_norm, 1);
}

#[test]
fn the_first_of_equal_choices_is_predicted() {
    let score = item(&["ab", "cd", "ef"], 1)
        .score(&[-3.0, -2.0, -2.0])
        .unwrap();
    assert_eq!((score.predicted, score.predicted_norm), (1, 1));
    let score = item(&["ab", "cd"], 1).score(&[-2.0, -2.0]).unwrap();
    assert_eq!((score.predicted, score.is_correct), (0, false));
    assert_eq!(score.probabilities, [0.5, 0.5]);
}

#[test]
fn unlikely_choices_have_probabilities() {
    let score = item(&["ab", "cd"], 0)
        .score(&[-2000.0, -2000.0 - 3f64.ln()])
        .unwrap();
    assert_relative_eq!(score.probabilities[0], 0.75, epsilon = 1e-12);
    assert_relative_eq!(score.probabilities[1], 0.25, epsilon = 1e-12);
    let score = item(&["ab", "cd"], 0).score(&[-1.0, -5000.0]).unwrap();
    assert_eq!(score.confidence(), (1.0, true));
}

#[test]
fn likelihoods_that_cannot_be_compared_are_refused() {
    assert!(matches!(item(&[], 0).score(&[]), Err(Error::NoItems)));
    let item = item(&["ab", "cd"], 0);
    let message = item.score(&[-1.0]).unwrap_err().to_string();
    assert_eq!(
        message,
        "2 choices and 1 log-likelihoods; give one of each for every item"
    );
    for wrong in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let found = item.score(&[-1.0, wrong]);
        assert!(
            matches!(found, Err(Error::LogLikelihood { choice: 1, .. })),
            "{wrong}"
        );
    }
}

fn item_of(json: &str, line: usize) -> Result<ChoiceItem> {
    ChoiceItem::of(&Record {
        fields: serde_json::from_str(json).unwrap(),
        path: std::path::Path::new("items.jsonl").into(),
        line,
    })
}

#[test]
fn an_answer_is_an_index_a_letter_or_a_text() {
    let parse = |choices: &str, answer: &str| {
        let line = format!(r#"{{"query": "", "choices": {choices}, "answer": {answer}, "id": 7}}"#);
        item_of(&line, 3).map(|item| item.answer)
    };
    let words = r#"["red", "green", "blue"]"#;
    assert_eq!(parse(words, "2").unwrap(), 2);
    assert_eq!(parse(words, r#""C""#).unwrap(), 2);
    assert_eq!(parse(words, r#""blue""#).unwrap(), 2);
    assert_eq!(parse(r#"["2", "3"]"#, r#""3""#).unwrap(), 1);
    assert_eq!(parse(r#"["A", "B"]"#, r#""B""#).unwrap(), 1);
    assert_eq!(parse(r#"["so", "so", "B"]"#, r#""so""#).unwrap(), 0);

    let problem = |choices, answer| parse(choices, answer).unwrap_err().to_string();
    assert_eq!(
        problem(words, "3"),
        "`items.jsonl`, line 3: `answer` is 3; with 3 choices an index is 0 to 2"
    );
    assert_eq!(
        problem(r#"["B", "A"]"#, r#""A""#),
        "`items.jsonl`, line 3: `answer` is \"A\", the text of choice 1 and the letter of choice 0; give the index"
    );
    for (choices, answer) in [
        (words, "-1"),
        (words, "1.0"),
        (words, "null"),
        (words, "true"),
        (words, r#""D""#),
        (words, r#""a""#),
        (words, r#""Blue""#),
        (words, r#""""#),
        (words, r#""1""#),
    ] {
        assert!(problem(choices, answer).contains("answer`"), "{answer}");
    }
}

#[test]
fn the_problem_of_a_record_is_named() {
    let problem = |line| item_of(line, 12).unwrap_err().to_string();
    let cases = [
        (
            r#"{"choices": ["a", "b"], "answer": 0}"#,
            "`items.jsonl`, line 12: no `context`, `query` or `question`; give one",
        ),
        (
            r#"{"context": "a", "question": "b", "choices": ["a", "b"], "answer": 0}"#,
            "`items.jsonl`, line 12: several of `context`, `query` and `question`; keep one",
        ),
        (
            r#"{"context": "a", "answer": 0}"#,
            "`items.jsonl`, line 12: no `choices`; give a list of strings",
        ),
        (
            r#"{"context": "a", "choices": ["b"], "answer": 0}"#,
            "`items.jsonl`, line 12: 1 in `choices`; give at least two",
        ),
        (
            r#"{"context": "a", "choices": ["b", ""], "answer": 0}"#,
            "`items.jsonl`, line 12: choice 1 is empty; give it a text",
        ),
        (
            r#"{"context": "a", "choices": ["b", "c"]}"#,
            "`items.jsonl`, line 12: no `answer`; give an index, a letter or a text",
        ),
    ];
    for (line, expected) in cases {
        assert_eq!(problem(line), expected);
    }
    assert!(problem(r#"{"context": 3}"#).contains("expected a string"));
    assert!(
        problem(r#"{"context": "a", "choices": {"text": []}}"#).contains("expected a sequence")
    );
}

/// One token for each of `th`, ` b` and two spaces, and for each other character.
fn encode(text: &str) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let pair = ["th", " b", "  "]
            .iter()
            .position(|pair| rest.starts_with(pair));
        let (token, len) = match pair {
            Some(at) => (at as u32, 2),
            None => (u32::from(c), c.len_utf8()),
        };
        tokens.push(token);
        rest = &rest[len..];
    }
    Ok(tokens)
}

#[test]
fn spaces_of_the_context_go_to_the_continuation() {
    let (a, b, c) = (u32::from('a'), u32::from('b'), u32::from('c'));
    assert_eq!(
        encode_pair("a", " b", || Ok(9), encode).unwrap(),
        (vec![a], vec![1])
    );
    assert_eq!(
        encode_pair("a ", "b", || Ok(9), encode).unwrap(),
        (vec![a], vec![1])
    );
    assert_eq!(
        encode_pair("a ", " c", || Ok(9), encode).unwrap(),
        (vec![a], vec![2, c])
    );
    let tab = u32::from('\t');
    assert_eq!(
        encode_pair("a\t", "b", || Ok(9), encode).unwrap(),
        (vec![a], vec![tab, b])
    );
}

#[test]
fn a_token_across_the_border_is_cut_by_count() {
    let t = u32::from('t');
    // `th` is one token, as is the context: the continuation is the tokens after the first.
    let e = u32::from('e');
    assert_eq!(
        encode_pair("t", "he", || Ok(9), encode).unwrap(),
        (vec![t], vec![e])
    );
    let error = encode_pair("t", "h", || Ok(9), encode).unwrap_err();
    assert!(matches!(&error, Error::NoContinuation { continuation } if continuation == "h"));
    assert!(matches!(
        encode_pair("a", "", || Ok(9), encode),
        Err(Error::NoContinuation { .. })
    ));
}

#[test]
fn a_context_without_tokens_is_the_prefix() {
    let c = u32::from('c');
    assert_eq!(
        encode_pair("", "c", || Ok(9), encode).unwrap(),
        (vec![9], vec![c])
    );
    assert_eq!(
        encode_pair("  ", "c", || Ok(9), encode).unwrap(),
        (vec![9], vec![2, c])
    );
    // A prefix with which the continuation begins comes once.
    assert_eq!(
        encode_pair("", "cc", || Ok(c), encode).unwrap(),
        (vec![c], vec![c])
    );
    let with_bos = |text: &str| Ok([vec![9], encode(text)?].concat());
    assert_eq!(
        encode_pair("", "c", || Ok(9), with_bos).unwrap(),
        (vec![9], vec![c])
    );
    let a = u32::from('a');
    assert_eq!(
        encode_pair("a", "c", || Ok(9), with_bos).unwrap(),
        (vec![9, a], vec![c])
    );
    assert!(matches!(
        encode_pair("", "", || Ok(9), encode),
        Err(Error::NoContinuation { .. })
    ));
    let fails = |_: &str| Err(Error::NoItems);
    assert!(matches!(
        encode_pair("a", "b", || Ok(9), fails),
        Err(Error::NoItems)
    ));
}

proptest! {
    #[test]
    fn probabilities_are_of_one_whole(sums in prop::collection::vec(-800.0..0.0, 2..8)) {
        let choices = vec!["x"; sums.len()];
        let score = item(&choices, 0).score(&sums).unwrap();
        prop_assert!((score.probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        // Choices of one length have the same predictions.
        prop_assert_eq!(score.predicted, score.predicted_norm);
        let (confidence, _) = score.confidence();
        prop_assert!(score.probabilities.iter().all(|&probability| probability <= confidence));
        prop_assert!(confidence >= 1.0 / sums.len() as f64 - 1e-12);
    }

    #[test]
    fn without_tokens_across_the_border_a_pair_is_the_whole(
        context in "[a-c]{1,6}", space in "[ \t\u{1f}\n]{0,3}", continuation in "[a-c]{1,6}",
    ) {
        let characters = |text: &str| Ok(text.chars().map(u32::from).collect::<Vec<_>>());
        let spaced = context.clone() + &space;
        let (head, tail) = encode_pair(&spaced, &continuation, || Ok(9), characters).unwrap();
        prop_assert_eq!(&head, &characters(&context).unwrap());
        prop_assert_eq!(tail, characters(&(space + &continuation)).unwrap());
    }
}
