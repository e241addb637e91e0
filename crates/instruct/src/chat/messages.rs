use minijinja::Value;
use serde_json::{Map, Value as Json};

use crate::records::kind;
use crate::template::bad_field;
use crate::{Error, Record, Result, jinja};

/// Fields with which a record asks for more than its messages, of a record and of a message.
const UNSUPPORTED: [&str; 3] = ["tools", "functions", "documents"];
const UNSUPPORTED_IN_MESSAGES: [&str; 2] = ["tool_calls", "function_call"];

/// A message as templates take it.
#[derive(Clone)]
pub(super) struct Message {
    pub(super) is_assistant: bool,
    pub(super) value: Value,
}

/// The messages of a record, under the names that templates know.
pub(super) fn messages(record: &Record) -> Result<Vec<Message>> {
    refuse_unsupported(record, &record.fields, &UNSUPPORTED, "")?;
    let (field, messages) = match (
        record.fields.get("messages"),
        record.fields.get("conversations"),
    ) {
        (Some(messages), _) => ("messages", messages),
        (None, Some(messages)) => ("conversations", messages),
        (None, None) => {
            return Err(Error::MissingField {
                path: record.path.to_path_buf(),
                line: record.line,
                field: "messages".into(),
                found: record.fields.keys().cloned().collect(),
            });
        }
    };
    let Json::Array(messages) = messages else {
        let problem = format!(
            "is {}, where an array of messages was expected",
            kind(messages)
        );
        return Err(bad_field(record, field, problem));
    };
    let message = |(at, message): (usize, &Json)| {
        let name = format!("{field}[{at}]");
        let Json::Object(message) = message else {
            let problem = format!("is {}, where an object was expected", kind(message));
            return Err(bad_field(record, &name, problem));
        };
        refuse_unsupported(
            record,
            message,
            &UNSUPPORTED_IN_MESSAGES,
            &format!("{name}."),
        )?;
        let (role, fields) = if field == "messages" {
            let role = text(record, message, &name, "role")?;
            if !message.get("content").is_some_and(Json::is_array) {
                text(record, message, &name, "content")?;
            }
            (role, Json::Object(message.clone()))
        } else {
            share_gpt(record, message, &name)?
        };
        Ok(Message {
            is_assistant: role == "assistant",
            value: jinja::value(&fields),
        })
    };
    messages.iter().enumerate().map(message).collect()
}

/// A message of ShareGPT with its role, which transformers' templates know.
fn share_gpt<'a>(
    record: &Record,
    message: &'a Map<String, Json>,
    name: &str,
) -> Result<(&'a str, Json)> {
    let role = match text(record, message, name, "from")? {
        "human" | "user" => "user",
        "gpt" | "assistant" => "assistant",
        "system" => "system",
        other => {
            let problem = format!("is `{other}`; known are `system`, `human` and `gpt`");
            return Err(bad_field(record, &format!("{name}.from"), problem));
        }
    };
    let content = text(record, message, name, "value")?;
    Ok((role, serde_json::json!({"role": role, "content": content})))
}

fn text<'a>(
    record: &Record,
    message: &'a Map<String, Json>,
    name: &str,
    field: &str,
) -> Result<&'a str> {
    let problem = match message.get(field) {
        Some(Json::String(text)) => return Ok(text),
        Some(other) => format!("is {}, where a text was expected", kind(other)),
        None => "is missing".into(),
    };
    Err(bad_field(record, &format!("{name}.{field}"), problem))
}

fn refuse_unsupported(
    record: &Record,
    fields: &Map<String, Json>,
    names: &[&str],
    prefix: &str,
) -> Result<()> {
    let is_something = |value: &Json| match value {
        Json::Null => false,
        Json::Array(values) => !values.is_empty(),
        _ => true,
    };
    let name = names
        .iter()
        .find(|&&name| fields.get(name).is_some_and(is_something));
    name.map_or(Ok(()), |name| {
        let problem = "is not supported, and without it the text would be another one; render such records before, and use a template of their fields";
        Err(bad_field(record, &format!("{prefix}{name}"), problem.into()))
    })
}
