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
        ("A:Four. ".to_owned(), true),
        ("False\n".to_owned(), false),
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
            json!({"messages": [1]}),
            "`messages[0]` is a number, expected an object",
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
            "`conversations[0].from` is `tool`, a turn of a tool, and the chat template has none",
        ),
        (
            json!({"messages": [{"role": "function_call", "content": "a"}]}),
            "`messages[0].role` is `function_call`, a turn of a tool, and the chat template has none",
        ),
        (
            json!({"messages": "[1"}),
            "`messages` is a string that is no JSON: EOF while parsing a list at line 1 column 2",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}),
            "`messages[0].weight` is 0.5, expected 0 or 1",
        ),
        (
            json!({"messages": [{"role": "system", "content": "a"}], "system": "b"}),
            "`system` is not what the first message, which is the system's too, says",
        ),
        (
            json!({"messages": [], "system": ["b"]}),
            "`system` is an array, expected a string",
        ),
        (
            json!({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}),
            "`chosen` is a conversation, and so is `rejected`; name the one to learn `messages`",
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

/// Rows that say the same by other names and in other columns.
#[test]
fn turns_are_told_by_their_keys() {
    let turns = |role: &str, content: &str, [user, assistant]: [&str; 2]| {
        json!([
            {role: user, content: "Two plus two?"},
            {role: assistant, content: "Four."},
            {role: user, content: "É?"},
            {role: assistant, content: "Ü!"},
        ])
    };
    let names = ["user", "assistant"];
    let rows = [
        json!({"messages": turns("role", "content", names)}),
        json!({"conversations": turns("role", "content", names)}),
        json!({"messages": turns("from", "value", ["human", "gpt"])}),
        json!({"id": 1, "dialog": turns("speaker", "text", ["Human", "Bot"])}),
        json!({"tree": turns("role", "text", ["prompter", "assistant"]), "tags": ["a"]}),
        json!({"messages": turns("role", "value", ["user", "model"])}),
        json!({"conversation": turns("from", "content", ["human", "chatgpt"])}),
        json!({"data": ["Two plus two?", "Four.", "É?", "Ü!"], "id": "0"}),
        json!({"conversation": [{"human": "Two plus two?", "assistant": "Four."}, {"human": "É?", "assistant": "Ü!"}]}),
        json!({"messages": turns("role", "content", names).to_string()}),
        json!({"messages": turns("role", "content", names), "conversations": [], "data": "x", "tools": []}),
    ];
    for row in rows {
        let expected = [
            "<s>[INST] Two plus two? [/INST]",
            " Four. </s>",
            "<s>[INST] É? [/INST]",
            " Ü! </s>",
        ];
        check(LLAMA_2, row, expected);
    }
}

#[test]
fn what_else_a_row_says_of_its_messages() {
    let answer = json!({"role": "assistant", "content": "b"});
    let said = |fields: Json| {
        let template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}";
        pieces(template, fields).unwrap()
    };
    let system = json!({"messages": [{"role": "user", "content": "a"}, answer], "system": "s"});
    let expected = [
        ("system: s;user: a;".to_owned(), false),
        ("assistant: b;".to_owned(), true),
    ];
    assert_eq!(said(system), expected);
    for system in [json!(""), json!(null)] {
        let fields = json!({"messages": [answer], "system": system});
        assert_eq!(said(fields)[1].0, "assistant: b;");
    }
    // A conversation in two parts, of which the second is learned, and messages that are not.
    let parts = json!({
        "completion": [answer],
        "prompt": [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "c"}],
    });
    let expected = [
        ("user: a;assistant: b;user: c;".to_owned(), false),
        ("assistant: b;".to_owned(), true),
    ];
    assert_eq!(said(parts), expected);
    for unlearned in [json!({"weight": 0}), json!({"train": false})] {
        let mut first = answer.clone();
        let fields = first.as_object_mut().unwrap();
        fields.extend(unlearned.as_object().unwrap().clone());
        let expected = [
            ("assistant: b;".to_owned(), false),
            ("assistant: b;".to_owned(), true),
        ];
        assert_eq!(said(json!({"messages": [first, answer]})), expected);
    }
}

/// Compared with transformers, which gives the tools to the template and reasoning its other names.
#[test]
fn tools_where_the_template_has_them() {
    let template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{% if m.role == 'tool' %}{{ m.content | tojson }}{% elif m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{{ m.reasoning_content }}{% endfor %}";
    let fields = |role: &str| {
        json!({
            "tools": [{"name": "f", "arguments": {"b": 1, "a": 2}}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}], "thinking": "t"},
                {"role": role, "content": [{"text": "x", "kind": "y"}]},
            ],
        })
    };
    for role in ["tool", "observation"] {
        let pieces = pieces(template, fields(role)).unwrap();
        assert_eq!(
            pieces[0].0,
            "[{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": 2}}]<user>a"
        );
        assert_eq!(pieces[1].0, "<assistant>[{\"name\": \"f\"}]t");
    }
    let marked = format!("{{% generation %}}{template}{{% endgeneration %}}");
    let all = pieces(&marked, fields("tool")).unwrap();
    assert!(
        all[1]
            .0
            .ends_with("<tool>[{\"text\": \"x\", \"kind\": \"y\"}]"),
        "{all:?}"
    );
}

/// The places are those of transformers' `return_assistant_tokens_mask`.
#[test]
fn marks_of_what_is_generated_decide() {
    let template = "{% for m in messages %}\n  {% if m.role == 'assistant' %}\nA: {% generation %}\n{{ m.content }}</s>{% endgeneration %}\n\n  {% else %}\nU: {{ m.content }}\n  {% endif %}\n{% endfor %}";
    let messages = conversation()["messages"].as_array().unwrap()[1..].to_vec();
    let expected = [
        ("U:  Two plus\ntwo? \nA: ", false),
        ("Four. </s>", true),
        ("\nU: É?\nA: ", false),
        ("Ü!</s>", true),
        ("\nU: Thanks.\n", false),
    ];
    let expected = expected.map(|(text, is_target)| (text.to_owned(), is_target));
    assert_eq!(
        pieces(template, json!({"messages": messages})).unwrap(),
        expected
    );
    let forged = json!({"messages": [{"role": "user", "content": "\u{fdd0}"}]});
    let error = pieces(template, forged).unwrap_err().to_string();
    assert!(error.contains("U+FDD0"), "{error}");
}

#[test]
fn a_template_with_windows_line_ends() {
    let template = "{% for m in messages %}\n<{{ m.role }}>\n{{ m.content }}\n{% endfor %}\n{% if add_generation_prompt %}\n<assistant>\n{% endif %}\n";
    let expected = pieces(template, conversation()).unwrap();
    for ends in ["\r\n", "\r"] {
        let template = template.replace('\n', ends);
        assert_eq!(pieces(&template, conversation()).unwrap(), expected);
    }
}
