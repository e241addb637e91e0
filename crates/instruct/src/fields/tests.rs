use serde_json::json;

use super::*;
use crate::Template;
use crate::testing::record;

/// The prompt and the completion of a record.
fn texts(template: &Template, fields: Json) -> (String, String) {
    let pieces = template.pieces(&record(fields)).unwrap();
    let [prompt, completion] = <[Piece; 2]>::try_from(pieces).unwrap();
    assert!(!prompt.is_target && completion.is_target);
    (prompt.text, completion.text)
}

fn refused(prompt: &str, completion: &str, fields: Json) -> Error {
    let template = Template::fields(prompt, completion).unwrap();
    template.pieces(&record(fields)).unwrap_err()
}

/// Compared with `PROMPT_DICT` of `train.py`.
#[test]
fn alpaca_with_and_without_an_input() {
    let fields = json!({"instruction": "Add <1>.", "input": "2 & 'x'", "output": "3\n"});
    let with_input = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd <1>.\n\n### Input:\n2 & 'x'\n\n### Response:";
    assert_eq!(
        texts(&Template::alpaca(), fields),
        (with_input.into(), "3\n".into())
    );
    let without = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nSay hello.\n\n### Response:";
    for input in [json!(null), json!("")] {
        let fields = json!({"instruction": "Say hello.", "input": input, "output": "Hello."});
        assert_eq!(
            texts(&Template::alpaca(), fields),
            (without.into(), "Hello.".into())
        );
    }
    let fields = json!({"instruction": "Say hello.", "output": "Hello."});
    assert_eq!(
        texts(&Template::alpaca(), fields),
        (without.into(), "Hello.".into())
    );
}

#[test]
fn gsm8k() {
    let fields = json!({"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"});
    let expected = ("Question: 1 + 1?\nAnswer:", " <<1+1=2>>2\n#### 2");
    assert_eq!(
        texts(&Template::gsm8k(), fields),
        (expected.0.into(), expected.1.into())
    );
}

#[test]
fn whitespace_of_a_template_is_kept() {
    let template = Template::fields("  {% if a %}\n{{ a }}\n{% endif %}\n\n", "{{ b }}\n").unwrap();
    let texts = texts(&template, json!({"a": "x", "b": "y"}));
    assert_eq!(texts, ("  \nx\n\n\n".into(), "y\n".into()));
}

#[test]
fn fields_of_other_types() {
    let prompt =
        "{{ n }} {{ x }} {{ is }} {{ parts[1].text }} {{ parts | length }} {{ s.strip() }}";
    let template = Template::fields(prompt, "").unwrap();
    let fields = json!({"n": 72, "x": 0.5, "is": true, "parts": [0, {"text": "y"}], "s": " z "});
    assert_eq!(texts(&template, fields).0, "72 0.5 True y 2 z");
}

#[test]
fn a_missing_field_is_named() {
    let error = refused(
        "Q: {{ question }}",
        "{{ answer }}",
        json!({"question": "1", "reply": "2"}),
    );
    assert_eq!(
        error.to_string(),
        "`data.jsonl`, line 7: no field `answer`, which the template uses; the record has `question`, `reply`"
    );
    assert!(
        matches!(error, Error::Record { problem: RecordError::MissingField { field, .. }, .. } if field == "answer")
    );
    // Not `input`, which may be missing.
    let error = Template::alpaca().pieces(&record(json!({"instruction": "Say hello."})));
    assert!(
        matches!(error, Err(Error::Record { problem: RecordError::MissingField { field, .. }, .. }) if field == "output")
    );
    for prompt in [
        "{{ a | trim }}",
        "{{ a.b }}",
        "{% if a %}{% endif %}",
        "{{ 'x' ~ a }}",
        "{% for b in a %}{% endfor %}",
    ] {
        let error = refused(prompt, "", json!({}));
        assert!(
            matches!(&error, Error::Record { problem: RecordError::MissingField { field, .. }, .. } if field == "a"),
            "{prompt}: {error}"
        );
    }
}

#[test]
fn a_field_in_a_field_that_is_missing_is_named() {
    let error = refused(
        "{{ instances[0].text }}",
        "",
        json!({"instances": [{"input": "x"}]}),
    );
    assert_eq!(
        error.to_string(),
        "`data.jsonl`, line 7: cannot render the prompt template: `instances[0].text` is undefined (line 1 of the template)"
    );
}

#[test]
fn a_field_without_a_text_is_refused() {
    let error = refused("{{ q }}", "\n{{ a }}", json!({"q": "1", "a": null}));
    assert_eq!(
        error.to_string(),
        "`data.jsonl`, line 7: `a` is a null, which has no text of its own"
    );
    for value in [json!([1]), json!({"b": 1})] {
        let error = refused("{{ a }}", "", json!({"a": value}));
        assert!(
            matches!(&error, Error::Record { problem: RecordError::Field { field, .. }, .. } if field == "a"),
            "{error}"
        );
    }
    // Only the line of the template tells which of two it is.
    let error = refused(
        "{% if b %}{% endif %}\n{{ a }}",
        "",
        json!({"a": null, "b": null}),
    );
    assert!(
        matches!(&error, Error::Record { problem: RecordError::Render { problem, .. }, .. }
        if problem == "none has no text of its own (line 2 of the template)"),
        "{error}"
    );
}

#[test]
fn a_template_that_does_not_parse() {
    let error = Template::fields("Q\n{{ question", "").unwrap_err();
    assert!(
        matches!(
            &error,
            Error::Template {
                template: "prompt",
                line: 2,
                ..
            }
        ),
        "{error}"
    );
    let error = Template::fields("", "{% if a %}").unwrap_err();
    assert!(
        matches!(
            &error,
            Error::Template {
                template: "completion",
                ..
            }
        ),
        "{error}"
    );
}
