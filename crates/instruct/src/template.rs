use std::collections::HashSet;
use std::path::Path;

use minijinja::{Environment, Value};
use models::SpecialTokens;
use serde_json::Value as Json;

use crate::records::kind;
use crate::{Chat, Error, Record, Result, jinja};

#[cfg(test)]
mod tests;

/// A part of a text, all of which is to be learned or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The part.
    pub text: String,
    /// Whether it is to be learned.
    pub learn: bool,
}

/// What makes a text of a record.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Template {
    /// From its fields.
    Fields(Fields),
    /// From its conversation.
    Chat(Chat),
}

impl Template {
    /// A prompt and a completion, which is learned, from the fields of a record.
    ///
    /// Both are Jinja templates, such as `Question: {{ question }}\nAnswer:` and ` {{ answer }}`.
    /// A space between the two belongs to the completion, where most tokenizers have it. A field
    /// that a record does not have, or that has no text (a null, an array), is an error.
    ///
    /// # Errors
    /// [`Error::BadTemplate`] if one of them cannot be read.
    pub fn fields(prompt: &str, completion: &str) -> Result<Self> {
        Fields::new(prompt, completion).map(Self::Fields)
    }

    /// Stanford Alpaca's (<https://github.com/tatsu-lab/stanford_alpaca>, `train.py`): records
    /// have an `instruction`, an `output`, and perhaps an `input`.
    pub fn alpaca() -> Self {
        let prompt = concat!(
            "Below is an instruction that describes a task",
            "{% if input is defined and input %}",
            ", paired with an input that provides further context",
            "{% endif %}. ",
            "Write a response that appropriately completes the request.\n\n",
            "### Instruction:\n{{ instruction }}\n\n",
            "{% if input is defined and input %}### Input:\n{{ input }}\n\n{% endif %}",
            "### Response:",
        );
        Self::fields(prompt, "{{ output }}").expect("the template is right")
    }

    /// Questions and answers of GSM8K (Cobbe et al. 2021, arXiv:2110.14168), as they stand.
    pub fn gsm8k() -> Self {
        let fields = Self::fields("Question: {{ question }}\nAnswer:", " {{ answer }}");
        fields.expect("the template is right")
    }

    /// The chat template of a model's directory.
    ///
    /// # Errors
    /// Those of [`Chat::open`].
    pub fn chat(dir: &Path, special: &SpecialTokens) -> Result<Self> {
        Chat::open(dir, special).map(Self::Chat)
    }

    /// The text of a record, in pieces.
    ///
    /// # Errors
    /// [`Error::MissingField`], [`Error::Field`], [`Error::Render`], [`Error::PrefixUnstable`].
    pub fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        match self {
            Self::Fields(fields) => fields.pieces(record),
            Self::Chat(chat) => chat.pieces(record),
        }
    }
}

/// Two templates over the fields of a record.
#[derive(Clone, Debug)]
pub struct Fields {
    jinja: Environment<'static>,
}

const PROMPT: &str = "prompt";
const COMPLETION: &str = "completion";

impl Fields {
    fn new(prompt: &str, completion: &str) -> Result<Self> {
        let mut jinja = jinja::for_fields();
        for (name, source) in [(PROMPT, prompt), (COMPLETION, completion)] {
            let added = jinja.add_template_owned(name, source.to_owned());
            added.map_err(|error| bad_template(name, &error))?;
        }
        Ok(Self { jinja })
    }

    fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        let fields = jinja::value(&Json::Object(record.fields.clone()));
        let piece = |name, learn| -> Result<Piece> {
            let text = self.render(name, &fields, record)?;
            Ok(Piece { text, learn })
        };
        Ok(vec![piece(PROMPT, false)?, piece(COMPLETION, true)?])
    }

    fn render(&self, name: &'static str, fields: &Value, record: &Record) -> Result<String> {
        let template = self.jinja.get_template(name);
        let template = template.expect("both were added");
        template.render(fields.clone()).map_err(|error| {
            let problem = jinja::problem(&error);
            let named = template.undeclared_variables(false);
            blame(named, &problem, record).unwrap_or_else(|| Error::Render {
                path: record.path.to_path_buf(),
                line: record.line,
                template: name,
                problem,
            })
        })
    }
}

/// The field, of those that a template names, because of which it was not rendered.
fn blame(named: HashSet<String>, problem: &str, record: &Record) -> Option<Error> {
    let Record { fields, path, line } = record;
    let is_missing = |name: &&String| {
        !fields.contains_key(*name) && problem.contains(&format!("`{name}` is undefined"))
    };
    if let Some(field) = named.iter().find(is_missing) {
        return Some(Error::MissingField {
            path: path.to_path_buf(),
            line: *line,
            field: field.clone(),
            found: fields.keys().cloned().collect(),
        });
    }
    if !problem.contains(jinja::NO_TEXT) {
        return None;
    }
    let mut textless = named.iter().filter_map(|name| {
        let value = fields.get(name)?;
        let is_text = value.is_string() || value.is_number() || value.is_boolean();
        (!is_text).then_some((name, value))
    });
    // Where there are several, one of them may stand in a condition or a loop.
    let (Some((field, value)), None) = (textless.next(), textless.next()) else {
        return None;
    };
    let problem = format!("is {}, which {}", kind(value), jinja::NO_TEXT);
    Some(bad_field(record, field, problem))
}

/// A field of a record that is not what a template takes.
pub(crate) fn bad_field(record: &Record, field: &str, problem: String) -> Error {
    Error::Field {
        path: record.path.to_path_buf(),
        line: record.line,
        field: field.into(),
        problem,
    }
}

pub(crate) fn bad_template(template: &'static str, error: &minijinja::Error) -> Error {
    let problem = error.detail().map(str::to_owned);
    Error::BadTemplate {
        template,
        line: error.line().unwrap_or(1),
        problem: problem.unwrap_or_else(|| error.kind().to_string()),
    }
}
