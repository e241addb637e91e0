use minijinja::Value;
use serde_json::{Map, Value as Json};

use super::Asked;
use crate::records::kind;
use crate::{Record, RecordError, Result, jinja};

mod columns;

use columns::{Column, Conversation};

/// Keys of a turn that say whose it is, and keys of what is said.
const ROLE_KEYS: [&str; 4] = ["role", "from", "speaker", "author"];
const CONTENT_KEYS: [&str; 5] = ["content", "value", "text", "message", "utterance"];

/// Names of the user and of the assistant, in any case.
const USERS: [&str; 3] = ["user", "human", "prompter"];
const ASSISTANTS: [&str; 7] = [
    "assistant",
    "gpt",
    "chatgpt",
    "bot",
    "chatbot",
    "model",
    "ai",
];
const SYSTEM: &str = "system";

/// Roles of what a tool says, for which templates have `tool`.
const RESULTS: [&str; 7] = [
    "tool",
    "observation",
    "ipython",
    "function",
    "function_response",
    "tool_response",
    "tool_result",
];
/// Roles of turns that call a tool.
const CALLS: [&str; 3] = ["function_call", "tool_call", "tool_calls"];

/// Fields of a record with the system's message.
const SYSTEM_FIELDS: [&str; 3] = ["system", "system_prompt", "system_message"];
/// Fields of a message that change the text of templates that know them.
const CALL_FIELDS: [&str; 2] = ["tool_calls", "function_call"];
/// Fields of a message with what was thought before it.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Fields of a message that say whether it is learned.
const WEIGHT_FIELDS: [&str; 2] = ["weight", "train"];

/// A message in the form that chat templates expect.
#[derive(Clone)]
pub(super) struct Message {
    /// Whether it is the assistant's, and learned.
    pub(super) is_target: bool,
    pub(super) value: Value,
}

/// The messages of a record, and the variables that it gives to the template.
pub(super) struct Messages {
    pub(super) messages: Vec<Message>,
    pub(super) variables: Vec<(&'static str, Value)>,
}

impl Messages {
    /// Reads the conversation of a record, for a template with some variables and roles.
    pub(super) fn of(record: &Record, asked: &Asked) -> Result<Self> {
        let variables = variables(record, asked)?;
        let mut messages = Vec::new();
        for column in Conversation::of(record)?.columns {
            add(&mut messages, record, &column, asked)?;
        }
        if let Some(system) = system(record, &messages)? {
            messages.insert(0, system);
        }
        Ok(Self {
            messages,
            variables,
        })
    }
}

/// The tools and documents of a record.
fn variables(record: &Record, asked: &Asked) -> Result<Vec<(&'static str, Value)>> {
    let mut variables = Vec::new();
    for name in ["tools", "documents", "functions"] {
        let Some(value) = record.fields.get(name).filter(|value| is_present(value)) else {
            continue;
        };
        if !asked.variables.contains(name) {
            return Err(unsupported(record, name));
        }
        let parsed = columns::parsed(record, name, value)?;
        variables.push((name, jinja::value(&parsed)));
    }
    Ok(variables)
}

/// The message of the system that has a field of its own.
fn system(record: &Record, messages: &[Message]) -> Result<Option<Message>> {
    let fields = SYSTEM_FIELDS.into_iter().filter_map(|name| {
        let value = record.fields.get(name)?;
        (is_present(value) && *value != "").then_some((name, value))
    });
    let Some((name, content)) = fields.into_iter().next() else {
        return Ok(None);
    };
    if !content.is_string() {
        let problem = format!("is {}, expected a string", kind(content));
        return Err(record.refuse_field(name, problem));
    }
    let value = serde_json::json!({"role": SYSTEM, "content": content});
    let value = jinja::value(&value);
    let first = messages.first().map(|message| &message.value);
    let is_system = |first: &&Value| {
        first
            .get_attr("role")
            .is_ok_and(|role| role.as_str() == Some(SYSTEM))
    };
    match first.filter(is_system) {
        None => Ok(Some(Message {
            is_target: false,
            value,
        })),
        Some(first) if first.get_attr("content").ok() == value.get_attr("content").ok() => Ok(None),
        Some(_) => {
            let problem = "is not what the first message, which is the system's too, says";
            Err(record.refuse_field(name, problem.into()))
        }
    }
}

fn add(messages: &mut Vec<Message>, record: &Record, column: &Column, asked: &Asked) -> Result<()> {
    let Json::Array(turns) = &*column.turns else {
        let problem = format!("is {}, expected an array of messages", kind(&column.turns));
        return Err(record.refuse_field(column.name, problem));
    };
    for (at, turn) in turns.iter().enumerate() {
        let name = format!("{}[{at}]", column.name);
        let mut say = |(role, fields): (String, Map<String, Json>), is_learned: bool| {
            let is_target = column.is_learned && is_learned && role == "assistant";
            let value = jinja::value(&Json::Object(fields));
            messages.push(Message { is_target, value });
        };
        match turn {
            Json::String(text) if column.is_of_texts => {
                let role = ["user", "assistant"][at % 2];
                say(said(role, text), true);
            }
            Json::Object(turn) => match pair(turn) {
                Some([question, answer]) => {
                    say(said("user", question), true);
                    say(said("assistant", answer), true);
                }
                None => say(
                    message(record, turn, &name, asked)?,
                    is_learned(record, turn, &name)?,
                ),
            },
            other => {
                let problem = format!("is {}, expected an object", kind(other));
                return Err(record.refuse_field(name, problem));
            }
        }
    }
    Ok(())
}

fn said(role: &str, content: &str) -> (String, Map<String, Json>) {
    let fields = [("role", role), ("content", content)];
    let fields = fields.map(|(key, value)| (key.to_owned(), Json::from(value)));
    (role.into(), fields.into_iter().collect())
}

/// The two texts of a turn like `{"human": .., "assistant": ..}`.
fn pair(turn: &Map<String, Json>) -> Option<[&str; 2]> {
    let text = |names: &[&str]| {
        let mut texts = turn.iter().filter(|(key, _)| is_one(key, names));
        texts.next()?.1.as_str()
    };
    Some([text(&USERS)?, text(&ASSISTANTS)?])
}

/// Whether an object is a turn.
fn is_turn(value: &Json) -> bool {
    let has =
        |turn: &Map<String, Json>, keys: &[&str]| keys.iter().any(|&key| turn.contains_key(key));
    value.as_object().is_some_and(|turn| {
        has(turn, &ROLE_KEYS) && (has(turn, &CONTENT_KEYS) || has(turn, &CALL_FIELDS))
            || pair(turn).is_some()
    })
}

fn is_one(name: &str, names: &[&str]) -> bool {
    names.iter().any(|one| one.eq_ignore_ascii_case(name))
}

/// A turn as its role and the message that templates expect, with its other fields.
fn message(
    record: &Record,
    turn: &Map<String, Json>,
    name: &str,
    asked: &Asked,
) -> Result<(String, Map<String, Json>)> {
    let key = |keys: &[&'static str]| {
        let key = keys.iter().find(|&&key| turn.contains_key(key));
        key.copied().unwrap_or(keys[0])
    };
    // What is missing is missing by the names that the other key goes with.
    let mut role_key = key(&ROLE_KEYS);
    let mut content_key = key(&CONTENT_KEYS);
    match (role_key, content_key) {
        ("from", "content") if !turn.contains_key("content") => content_key = "value",
        ("role", "value") if !turn.contains_key("role") => role_key = "from",
        _ => (),
    }
    let role = match turn.get(role_key) {
        Some(Json::String(role)) => role_of(record, role, &format!("{name}.{role_key}"), asked)?,
        other => return Err(record.refuse_field(format!("{name}.{role_key}"), no_text(other))),
    };
    let mut has_calls = false;
    for field in CALL_FIELDS {
        if turn.get(field).is_some_and(is_present) {
            has_calls = true;
            if !asked.mentions(field) {
                return Err(unsupported(record, &format!("{name}.{field}")));
            }
        }
    }
    match turn.get(content_key) {
        Some(Json::String(_) | Json::Array(_)) => (),
        Some(Json::Null) | None if has_calls => (),
        other => return Err(record.refuse_field(format!("{name}.{content_key}"), no_text(other))),
    }
    let fields = turn.iter().map(|(key, value)| match key.as_str() {
        key if key == role_key => ("role".into(), role.as_str().into()),
        key if key == content_key => ("content".into(), value.clone()),
        key => (key.to_owned(), value.clone()),
    });
    Ok((role.clone(), with_reasoning(fields.collect())))
}

/// Gives the reasoning of a message the names that templates have for it, as transformers does.
fn with_reasoning(mut fields: Map<String, Json>) -> Map<String, Json> {
    let mut reasoning = REASONING_FIELDS.iter().filter_map(|&name| fields.get(name));
    let Some(reasoning) = reasoning.find(|value| !value.is_null()).cloned() else {
        return fields;
    };
    fields.insert("reasoning_content".into(), reasoning.clone());
    // As there, one that is null stays.
    let thinking = fields.shift_remove("thinking").unwrap_or(reasoning);
    [("thinking".into(), thinking)]
        .into_iter()
        .chain(fields)
        .collect()
}

fn no_text(value: Option<&Json>) -> String {
    match value {
        Some(other) => format!("is {}, expected a string", kind(other)),
        None => "is missing".into(),
    }
}

/// The role that templates have for a name; that of a tool has to be one of the template's.
fn role_of(record: &Record, name: &str, field: &str, asked: &Asked) -> Result<String> {
    if is_one(name, &USERS) {
        return Ok("user".into());
    }
    if is_one(name, &ASSISTANTS) {
        return Ok("assistant".into());
    }
    let is_result = is_one(name, &RESULTS);
    if asked.mentions(name) || !(is_result || is_one(name, &CALLS)) {
        return Ok(if is_one(name, &[SYSTEM]) {
            SYSTEM
        } else {
            name
        }
        .into());
    }
    if is_result && asked.mentions("tool") {
        return Ok("tool".into());
    }
    let problem = format!("is `{name}`, a turn of a tool, and the chat template has none");
    Err(record.refuse_field(field, problem))
}

/// Whether a message of the assistant is learned.
fn is_learned(record: &Record, turn: &Map<String, Json>, name: &str) -> Result<bool> {
    for field in WEIGHT_FIELDS {
        match turn.get(field) {
            None | Some(Json::Null) => (),
            Some(Json::Bool(is_learned)) => return Ok(*is_learned),
            Some(Json::Number(weight)) if weight.as_f64() == Some(0.0) => return Ok(false),
            Some(Json::Number(weight)) if weight.as_f64() == Some(1.0) => return Ok(true),
            Some(other) => {
                let problem = format!("is {other}, expected 0 or 1");
                return Err(record.refuse_field(format!("{name}.{field}"), problem));
            }
        }
    }
    Ok(true)
}

fn is_present(value: &Json) -> bool {
    match value {
        Json::Null => false,
        Json::Array(values) => !values.is_empty(),
        _ => true,
    }
}

fn unsupported(record: &Record, field: &str) -> crate::Error {
    let problem = "is not supported by the chat template and would change the text; render the conversation yourself, and use a template of fields";
    record.refuse(RecordError::Field {
        field: field.into(),
        problem: problem.into(),
    })
}
