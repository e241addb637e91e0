use minijinja::Value;
use serde_json::{Map, Value as Json};

use crate::records::kind;
use crate::{Record, Result, jinja};

/// Fields of a record, and of a message, that change the text and are not supported.
const UNSUPPORTED: [&str; 3] = ["tools", "functions", "documents"];
const UNSUPPORTED_IN_MESSAGES: [&str; 2] = ["tool_calls", "function_call"];

/// A message in the form that chat templates expect.
#[derive(Clone)]
pub(super) struct Message {
    pub(super) is_assistant: bool,
    pub(super) value: Value,
}

/// The messages of a record.
pub(super) fn messages(record: &Record) -> Result<Vec<Message>> {
    refuse_unsupported(record, &record.fields, &UNSUPPORTED, "")?;
    let (field, messages) = match (
        record.fields.get("messages"),
        record.fields.get("conversations"),
    ) {
        (Some(messages), _) => ("messages", messages),
        (None, Some(messages)) => ("conversations", messages),
        (None, None) => {
            return Err(record.refuse_without("messages"));
        }
    };
    let Json::Array(messages) = messages else {
        let problem = format!("is {}, expected an array of messages", kind(messages));
        return Err(record.refuse_field(field, problem));
    };
    let message = |(at, message): (usize, &Json)| {
        let name = format!("{field}[{at}]");
        let Json::Object(message) = message else {
            let problem = format!("is {}, expected an object", kind(message));
            return Err(record.refuse_field(name, problem));
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

/// Converts a message of ShareGPT to its role and the message that templates expect.
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
            let problem = format!("is `{other}`, expected `system`, `human` or `gpt`");
            return Err(record.refuse_field(format!("{name}.from"), problem));
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
        Some(other) => format!("is {}, expected a string", kind(other)),
        None => "is missing".into(),
    };
    Err(record.refuse_field(format!("{name}.{field}"), problem))
}

fn refuse_unsupported(
    record: &Record,
    fields: &Map<String, Json>,
    names: &[&str],
    prefix: &str,
) -> Result<()> {
    let is_present = |value: &Json| match value {
        Json::Null => false,
        Json::Array(values) => !values.is_empty(),
        _ => true,
    };
    let name = names
        .iter()
        .find(|&&name| fields.get(name).is_some_and(is_present));
    name.map_or(Ok(()), |name| {
        let problem = "is not supported and would change the text; render the conversation yourself, and use a template of fields";
        Err(record.refuse_field(format!("{prefix}{name}"), problem.into()))
    })
}
