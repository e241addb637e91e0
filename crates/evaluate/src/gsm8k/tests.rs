use super::*;

const REFERENCE: &str = "She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072";

#[test]
fn answers_are_extracted_and_compared() {
    // The text, the strict and the flexible answer.
    let cases = [
        ("It is 1,072.\n#### 1,072", Some("1,072"), Some("1,072")),
        ("#### 1072", Some("1072"), Some("1072")),
        // The period is part of the answer, and ignored in the comparison.
        ("So #### 1072.", Some("1072."), Some("1072.")),
        ("#### $1,072", None, Some("$1,072")),
        ("The answer is $1072.", None, Some("$1072.")),
        ("The answer is 1072 dollars", None, Some("1072")),
        ("####1072", None, Some("1072")),
        ("####  1072", None, Some("1072")),
    ];
    for (text, in_strict, in_flexible) in cases {
        assert_eq!(strict(text), in_strict, "{text}");
        assert_eq!(flexible(text), in_flexible, "{text}");
        assert_eq!(
            is_correct(strict(text), REFERENCE),
            in_strict.is_some(),
            "{text}"
        );
        assert!(is_correct(flexible(text), REFERENCE), "{text}");
    }
}

#[test]
fn another_number_is_wrong() {
    for text in [
        "#### -1072",
        "#### 1072.00",
        "#### 1072.5",
        "#### 107",
        "#### 1072..",
    ] {
        assert!(strict(text).is_some(), "{text}");
        assert!(!is_correct(strict(text), REFERENCE), "{text}");
    }
    assert!(is_correct(Some("-5"), "#### -5"));
    assert!(is_correct(Some("0.50"), "half of it\n#### 0.50"));
    assert!(!is_correct(Some("0.5"), "half of it\n#### 0.50"));
}

#[test]
fn strict_takes_the_first_and_flexible_the_last() {
    let text = "#### 7\nQ: how many?\n#### 8, or is it -9?";
    assert_eq!((strict(text), flexible(text)), (Some("7"), Some("-9")));
    // Commas and periods of the sentence are part of a match.
    assert_eq!(strict("#### 8, or 9"), Some("8,"));
    assert_eq!(flexible("first 3, then 4, then"), Some("4,"));
    assert_eq!(flexible("#### 72\nThat is 12 a month"), Some("12"));
    assert_eq!(flexible("he has 5 left ..."), Some("..."));
}

#[test]
fn one_character_is_a_number_only_if_it_is_a_digit() {
    assert_eq!(flexible("cost: 5"), Some("5"));
    assert_eq!(flexible("from 1 to -5"), Some("-5"));
    assert_eq!(flexible("1-5"), Some("-5"));
    assert_eq!(flexible("a $ or a . or a , or a -"), None);
    assert_eq!(flexible("٣"), None);
}

#[test]
fn without_a_number_there_is_no_answer() {
    for text in ["", "I do not know", "#### many", "#### "] {
        assert_eq!((strict(text), flexible(text)), (None, None), "{text}");
        assert!(!is_correct(strict(text), ""));
        assert!(!is_correct(None, "[invalid]"));
    }
}

#[test]
fn normalization_is_that_of_the_harness() {
    let cases = [
        ("a #### b\n#### 1,000.", "1000"),
        // Commas are removed before the period.
        ("72.,", "72"),
        ("5.\n", "5\n"),
        ("5.\n\n", "5.\n\n"),
        ("5..", "5."),
        ("5 .", "5 "),
        ("#,### 5", "5"),
        ("##### 5", "5"),
        ("####5", "####5"),
        ("ABC", "abc"),
    ];
    for (text, expected) in cases {
        assert_eq!(normalized(text), expected, "{text:?}");
    }
}

#[test]
fn prompts_are_those_of_the_harness() {
    let example = |question: &str, answer: &str| Problem {
        question: question.into(),
        answer: answer.into(),
    };
    let examples = [example("1+1?", "Two.\n#### 2"), example("2+2?", "#### 4")];
    assert_eq!(
        few_shot_prompt(&examples, "3+3?"),
        "Question: 1+1?\nAnswer: Two.\n#### 2\n\nQuestion: 2+2?\nAnswer: #### 4\n\nQuestion: 3+3?\nAnswer:"
    );
    assert_eq!(few_shot_prompt(&[], "3+3?"), prompt("3+3?"));
}

#[test]
fn a_text_ends_at_the_first_stop() {
    let text = "6\n#### 6</s>\n\nQuestion: 7<|im_end|>";
    assert_eq!(cut(text, &STOPS), "6\n#### 6");
    assert_eq!(cut("6\nQuestion: 1</s>", &STOPS), "6\n");
    assert_eq!(cut("Question:", &STOPS), "");
    assert_eq!(cut("no question: here", &STOPS), "no question: here");
    assert_eq!(cut("one\n\ntwo", &["", "\n\n"]), "one");
}

#[test]
fn a_problem_is_read_from_a_record() {
    let of = |json: &str| {
        Problem::of(&Record {
            fields: serde_json::from_str(json).unwrap(),
            path: std::path::Path::new("test.jsonl").into(),
            line: 3,
        })
    };
    let problem = of(r#"{"question": "How many?", "answer": "Six.\n#### 6", "id": 3}"#).unwrap();
    assert_eq!(problem.answer, "Six.\n#### 6");
    assert!(is_correct(Some("6"), &problem.answer));
    assert_eq!(
        of(r#"{"question": "How many?"}"#).unwrap_err().to_string(),
        "`test.jsonl`, line 3: missing field `answer`"
    );
}
