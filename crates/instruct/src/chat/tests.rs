use std::fs;

use models::SpecialToken;
use serde_json::json;

use super::*;
use crate::Template;
use crate::testing::record;

/// The template of ChatML, as Qwen 1.5's and many others'.
const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// LLaMA 2's, with its `\\n` as JSON has it.
const LLAMA_2: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

fn special() -> SpecialTokens {
    let token = |text: &str, id| {
        let text = text.into();
        Some(SpecialToken { text, id })
    };
    SpecialTokens {
        bos: token("<s>", 1),
        eos: token("</s>", 2),
        ..SpecialTokens::default()
    }
}

fn conversation() -> Json {
    json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Two plus\ntwo? "},
        {"role": "assistant", "content": "Four. "},
        {"role": "user", "content": "É?"},
        {"role": "assistant", "content": "Ü!"},
        {"role": "user", "content": "Thanks."},
    ]})
}

/// Texts, and whether each is a target.
fn pieces(template: &str, fields: Json) -> Result<Vec<(String, bool)>> {
    let template = Template::Chat(Chat::new(template, &special())?);
    let pieces = template.pieces(&record(fields))?.into_iter();
    Ok(pieces.map(|piece| (piece.text, piece.is_target)).collect())
}

fn check(template: &str, fields: Json, expected: [&str; 4]) {
    let is_target = [false, true, false, true];
    let expected: Vec<_> = expected
        .map(String::from)
        .into_iter()
        .zip(is_target)
        .collect();
    assert_eq!(pieces(template, fields).unwrap(), expected);
}

// The texts are those of `render_jinja_template` in transformers 5.23, up to and with messages
// 2 and 4, and before them with `add_generation_prompt`.

#[test]
fn chatml() {
    check(
        CHATML,
        conversation(),
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Two plus\ntwo? <|im_end|>\n<|im_start|>assistant\n",
            "Four. <|im_end|>\n",
            "<|im_start|>user\nÉ?<|im_end|>\n<|im_start|>assistant\n",
            "Ü!<|im_end|>\n",
        ],
    );
}

#[test]
fn llama_2() {
    check(
        LLAMA_2,
        conversation(),
        [
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Two plus\ntwo? [/INST]",
            " Four. </s>",
            "<s>[INST] É? [/INST]",
            " Ü! </s>",
        ],
    );
}

#[test]
fn llama_3() {
    check(
        LLAMA_3,
        conversation(),
        [
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nTwo plus\ntwo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Four.<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nÉ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Ü!<|eot_id|>",
        ],
    );
}

#[test]
fn share_gpt_has_other_names() {
    let fields = json!({"id": "x", "conversations": [
        {"from": "human", "value": "Two plus two?"},
        {"from": "gpt", "value": "Four."},
        {"from": "human", "value": "É?"},
        {"from": "gpt", "value": "Ü!"},
    ]});
    check(
        LLAMA_2,
        fields,
        [
            "<s>[INST] Two plus two? [/INST]",
            " Four. </s>",
            "<s>[INST] É? [/INST]",
            " Ü! </s>",
        ],
    );
}

/// Blocks leave no lines and no indentation; marks of what is generated leave nothing.
#[test]
fn whitespace_and_marks() {
    let template = "{% for m in messages %}\n    {% if m.role == 'assistant' %}\n  {%- generation -%}\n A:{{ m.content }}\n  {%- set x = 1 %}\n{% endgeneration %}\n{{ x is defined }}\n    {% else %}\nU:{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
    // Compared with transformers.
    let expected = [
        ("U: Two plus\ntwo? \n".to_owned(), false),
        ("A:Four. False\n".to_owned(), true),
    ];
    let fields = json!({"messages": conversation()["messages"].as_array().unwrap()[1..3]});
    assert_eq!(pieces(template, fields).unwrap(), expected);
}

#[test]
fn a_conversation_without_an_answer_has_no_targets() {
    let fields = json!({"messages": [{"role": "user", "content": "Hello?"}]});
    assert_eq!(pieces(CHATML, fields).unwrap(), []);
}

#[test]
fn content_in_parts_is_the_template_s_matter() {
    let template = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}";
    let part = |text| json!([{"type": "text", "text": text}]);
    let fields = json!({"messages": [{"role": "user", "content": part("a")},
        {"role": "assistant", "content": part("b")}]});
    assert_eq!(
        pieces(template, fields).unwrap(),
        [("a".into(), false), ("b".into(), true)]
    );
}

fn is_unstable(error: &Error, message: usize) -> bool {
    let expected = RecordError::PrefixUnstable { message };
    matches!(error, Error::Record { line: 7, problem, .. } if *problem == expected)
}

#[test]
fn templates_that_are_not_prefix_stable() {
    // The prompt is always there, as in LLaMA 3's first release, behind the last answer too.
    let always = LLAMA_3.replace("{% if add_generation_prompt %}", "{% if true %}");
    let messages = conversation()["messages"].take();
    let one_answer = json!({"messages": messages.as_array().unwrap()[..3]});
    for (fields, expected) in [(conversation(), 4), (one_answer, 2)] {
        let error = pieces(&always, fields).unwrap_err();
        assert!(is_unstable(&error, expected), "{error}");
    }
    // Only the last answer is shown.
    let last = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}";
    let error = pieces(last, conversation()).unwrap_err();
    assert!(is_unstable(&error, 4), "{error}");
    assert!(error.to_string().contains("not prefix-stable"));
}

#[test]
fn what_a_template_says_is_passed_on() {
    let fields = json!({"messages": [{"role": "assistant", "content": "Hello."},
        {"role": "assistant", "content": "Hello?"}]});
    let error = pieces(LLAMA_2, fields).unwrap_err();
    assert!(
        matches!(
            &error,
            Error::Record {
                line: 7,
                problem: RecordError::Render { .. },
                ..
            }
        ),
        "{error}"
    );
    let fields = json!({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"}]});
    assert_eq!(
        pieces(LLAMA_2, fields).unwrap_err().to_string(),
        "`data.jsonl`, line 7: cannot render the chat template: Conversation roles must alternate user/assistant/user/assistant/... (line 1 of the template)"
    );
}

#[test]
fn messages_that_are_none() {
    let cases = [
        (
            json!({"messages": "a"}),
            "`messages` is a string, expected an array of messages",
        ),
        (
            json!({"messages": ["a"]}),
            "`messages[0]` is a string, expected an object",
        ),
        (
            json!({"messages": [{"content": "a"}]}),
            "`messages[0].role` is missing",
        ),
        (
            json!({"messages": [{"role": "user", "content": null}]}),
            "`messages[0].content` is a null, expected a string",
        ),
        (
            json!({"conversations": [{"from": "tool", "value": "a"}]}),
            "`conversations[0].from` is `tool`, expected `system`, `human` or `gpt`",
        ),
        (
            json!({"conversations": [{"from": "gpt"}]}),
            "`conversations[0].value` is missing",
        ),
        (
            json!({"messages": [], "tools": [1]}),
            "`tools` is not supported",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}),
            "`messages[0].tool_calls` is not supported",
        ),
    ];
    for (fields, expected) in cases {
        let error = pieces(CHATML, fields).unwrap_err();
        assert!(matches!(
            error,
            Error::Record {
                line: 7,
                problem: RecordError::Field { .. },
                ..
            }
        ));
        assert!(error.to_string().contains(expected), "{error}");
    }
    let error = pieces(CHATML, json!({"text": "a"})).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`data.jsonl`, line 7: no field `messages`, which the template uses; the record has `text`"
    );
    assert!(pieces(CHATML, json!({"messages": [], "tools": null})).is_ok());
}

#[test]
fn a_template_needs_its_special_tokens() {
    let error = Chat::new(LLAMA_3, &SpecialTokens::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the chat template needs its `bos_token`; state it in the model's `tokenizer_config.json`"
    );
    assert!(Chat::new(CHATML, &SpecialTokens::default()).is_ok());
    let error = Chat::new("{% for m in messages %}\n{% endif %}", &special()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Template {
                template: "chat",
                line: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn where_a_directory_has_its_template() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let chat = Chat::open(dir.path(), &special())?;
        let fields = json!({"messages": [{"role": "assistant", "content": ""}]});
        Ok::<String, Error>(chat.pieces(&record(fields))?[1].text.clone())
    };
    let config = |template: Json| {
        let config = json!({"chat_template": template}).to_string();
        fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    };
    let only = |text: &str| format!("{{% if messages %}}{text}{{% endif %}}");
    assert!(matches!(open(), Err(Error::NoChatTemplate { .. })));
    config(json!(null));
    assert!(matches!(open(), Err(Error::NoChatTemplate { .. })));
    config(json!(only("one")));
    assert_eq!(open().unwrap(), "one");
    let named = |name: &str| json!([{"name": "tool_use", "template": "x"}, {"name": name, "template": only("two")}]);
    config(named("default"));
    assert_eq!(open().unwrap(), "two");
    for template in [named("rag"), json!(1)] {
        config(template);
        assert!(
            matches!(open(), Err(Error::Model(models::Error::Config(models::ConfigError::Setting { setting, .. }))) if setting == "chat_template")
        );
    }
    fs::write(dir.path().join("chat_template.jinja"), only("three")).unwrap();
    assert_eq!(open().unwrap(), "three");
}

#[test]
fn errors_of_a_template_name_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chat_template.jinja");
    let named = |problem: &str| format!("{problem}`{}`", path.display());
    let cases = [
        (
            b"a\n{{ [1] * 40 }}".to_vec(),
            named("only strings and numbers are multiplied (line 2 of ") + ")",
        ),
        (
            b"a\n{% for a in range(9000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}"
                .to_vec(),
            named("steps (of an instruction or 64 bytes) (line 2 of ") + ")",
        ),
        (
            format!("a\n{{{{ {}1 }}}}", "-".repeat(2000)).into_bytes(),
            named("line 2: a tag has more than 1024 tokens, in "),
        ),
        (
            b"a\n\xff".to_vec(),
            "chat_template.jinja`: line 2 is not UTF-8, at byte 2 of the file".into(),
        ),
    ];
    for (source, expected) in cases {
        fs::write(&path, source).unwrap();
        let error = Chat::open(dir.path(), &special()).and_then(|chat| chat.prompt("a"));
        let error = error.unwrap_err().to_string();
        assert!(error.ends_with(&expected), "{error}");
    }
}
