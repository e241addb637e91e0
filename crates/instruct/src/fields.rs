use std::collections::HashSet;

use minijinja::{Environment, Value};
use serde_json::Value as Json;

use crate::records::kind;
use crate::{Error, Piece, Record, RecordError, Result, jinja};

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
    jinja: Environment<'static>,
}

impl Fields {
    pub(crate) fn new(prompt: &str, completion: &str) -> Result<Self> {
        let mut jinja = jinja::for_fields();
        for (name, source) in [(PROMPT, prompt), (COMPLETION, completion)] {
            let added = jinja.add_template_owned(name, source.to_owned());
            added.map_err(|error| jinja::refuse(name, &error))?;
        }
        Ok(Self { jinja })
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
        let template = self.jinja.get_template(name);
        let template = template.expect("both were added");
        template.render(fields.clone()).map_err(|error| {
            let problem = jinja::problem(&error);
            let named = template.undeclared_variables(false);
            refuse_field(named, &problem, record).unwrap_or_else(|| {
                record.refuse(RecordError::Render {
                    template: name,
                    problem,
                })
            })
        })
    }
}

/// The error of the one field, among those that a template uses, that kept it from rendering.
fn refuse_field(used: HashSet<String>, problem: &str, record: &Record) -> Option<Error> {
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
