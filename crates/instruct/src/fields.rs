use std::collections::HashSet;

use minijinja::Value;
use serde_json::Value as Json;

use crate::jinja::{self, Templates};
use crate::records::kind;
use crate::{Error, Piece, Record, RecordError, Result};

#[cfg(test)]
mod tests;

const PROMPT: &str = "prompt";
const COMPLETION: &str = "completion";

/// Templates of a prompt and of a completion over the fields of a record.
///
/// Every character outside of Jinja's delimiters is part of the text. A field that the record lacks,
/// or that has no text (a null, an array, an object), is an error.
#[derive(Clone, Debug)]
pub struct Fields {
    templates: Templates,
}

impl Fields {
    pub(crate) fn new(prompt: &str, completion: &str) -> Result<Self> {
        let templates = Templates::for_fields(&[(PROMPT, prompt), (COMPLETION, completion)])?;
        Ok(Self { templates })
    }

    pub(crate) fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        let fields = jinja::value(&Json::Object(record.fields.clone()));
        let piece = |name, is_target| -> Result<Piece> {
            let text = self.render(name, &fields, record)?;
            Ok(Piece { text, is_target })
        };
        Ok(vec![piece(PROMPT, false)?, piece(COMPLETION, true)?])
    }

    fn render(&self, name: &'static str, fields: &Value, record: &Record) -> Result<String> {
        let rendered = self.templates.render(name, fields.clone());
        rendered.map_err(|problem| {
            let refused = match &problem {
                RecordError::Render { problem, .. } => {
                    refuse_field(self.templates.used(name), problem, record)
                }
                _ => None,
            };
            refused.unwrap_or_else(|| record.refuse(problem))
        })
    }
}

/// The error of the one field, among those that a template uses, that kept it from rendering.
fn refuse_field(used: &HashSet<String>, problem: &str, record: &Record) -> Option<Error> {
    let fields = &record.fields;
    let is_missing = |name: &&String| {
        !fields.contains_key(*name) && problem.contains(&format!("`{name}` is undefined"))
    };
    if let Some(field) = used.iter().find(is_missing) {
        return Some(record.refuse_without(field));
    }
    if !problem.contains(jinja::NO_TEXT) {
        return None;
    }
    let mut textless = used.iter().filter_map(|name| {
        let value = fields.get(name)?;
        let is_text = value.is_string() || value.is_number() || value.is_boolean();
        (!is_text).then_some((name, value))
    });
    // One of several may be there for a condition or a loop.
    let (Some((field, value)), None) = (textless.next(), textless.next()) else {
        return None;
    };
    let problem = format!("is {}, which {}", kind(value), jinja::NO_TEXT);
    Some(record.refuse_field(field, problem))
}
