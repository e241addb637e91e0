//! The one door to minijinja, which renders as Jinja2 does in Python, within bounds.

use std::collections::{BTreeMap, HashSet};
use std::error::Error as _;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use jiff::civil::DateTime;
use jiff::fmt::strtime;
use minijinja::syntax::{SyntaxConfig, SyntaxConfigBuilder};
use minijinja::value::ValueKind;
use minijinja::{
    AutoEscape, Environment, Error as JinjaError, ErrorKind, Output, State, UndefinedBehavior,
    Value,
};
use serde_json::Value as Json;

use crate::{Error, RecordError};

mod bounds;
mod filters;
mod guard;
mod json;
mod literals;
mod marks;
mod numbers;
mod strings;
#[cfg(test)]
mod tests;
mod text;

/// The steps after which rendering is stopped, apart from one for each byte of what is rendered.
///
/// A step is an instruction, or 64 bytes that are made or looked at.
const MAX_STEPS: u64 = 300_000;

/// The deepest nesting of loops, blocks and calls, in minijinja's measure: a call counts 4.
const MAX_RECURSION: usize = 250;

/// The stack of the thread that parses. A recursion of minijinja's parser is at most as deep as
/// [`guard`] lets a tag be long.
const PARSER_STACK: usize = 64 << 20;

/// The longest text of an error that is passed on, in characters.
const MAX_PROBLEM: usize = 2000;

/// The filter that checks an operand, as it is inserted into a source.
const VALUE: &str = "|_v ";
/// The same for a value that gets a name, which may be a namespace.
const HELD: &str = "|_h ";
/// The same for an operand of `*`, which may not be a list.
const SCALAR: &str = "|_s ";

/// The same for an operand of `~`, which becomes its text.
const TEXT: &str = "|_t ";
/// What `%` behind a string becomes.
const FORMAT: &str = "|_f(";
/// The filter of what is in a `generation` block.
const MARKED: &str = "_g";

/// The function with which chat templates read the date.
const CLOCK: &str = "strftime_now";

/// The problem of values other than strings, numbers and booleans.
pub(crate) const NO_TEXT: &str = "has no text of its own";

/// Parsed templates with the same settings.
///
/// What a template does is bounded, beyond what it is given: no rendering takes more than a fixed number
/// of steps and one for each byte of its context, no value nests without end, and none takes more than
/// a share of the bytes that the steps pay for.
#[derive(Clone, Debug)]
pub(crate) struct Templates {
    jinja: Environment<'static>,
    parsed: BTreeMap<&'static str, Parsed>,
    /// Where the templates are, for errors.
    pub(crate) place: String,
}

/// What is known of a template without rendering it.
#[derive(Clone, Debug)]
struct Parsed {
    used: HashSet<String>,
    mentioned: HashSet<String>,
    has_marks: bool,
}

impl Templates {
    /// Templates of fields, in which whitespace is significant.
    pub(crate) fn for_fields(sources: &[(&'static str, &str)]) -> Result<Self, Error> {
        let mut jinja = plain();
        jinja.set_undefined_behavior(UndefinedBehavior::Strict);
        let mut syntax = SyntaxConfig::builder();
        jinja.set_syntax(built(syntax.keep_trailing_newline(true)));
        jinja.set_formatter(|out, state, value| match value.kind() {
            ValueKind::None | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
                let problem = format!("{} {NO_TEXT}", value.kind());
                Err(JinjaError::new(ErrorKind::InvalidOperation, problem))
            }
            // A strict one is an error.
            ValueKind::Undefined => minijinja::escape_formatter(out, state, value),
            _ => print(out, state, value),
        });
        Self::parse(jinja, sources)
    }

    /// A chat template, as in transformers (`utils/chat_template_utils.py`, 5.23).
    ///
    /// `strftime_now` is not defined before [`Templates::set_now`].
    pub(crate) fn for_chats(name: &'static str, source: &str) -> Result<Self, Error> {
        let mut jinja = plain();
        let mut syntax = SyntaxConfig::builder();
        jinja.set_syntax(built(syntax.trim_blocks(true).lstrip_blocks(true)));
        jinja.set_formatter(print);
        jinja.add_function(
            "raise_exception",
            |message: String| -> Result<Value, JinjaError> {
                Err(JinjaError::new(ErrorKind::InvalidOperation, message))
            },
        );
        Self::parse(jinja, &[(name, source)])
    }

    fn parse(
        mut jinja: Environment<'static>,
        sources: &[(&'static str, &str)],
    ) -> Result<Self, Error> {
        let mut parsed = BTreeMap::new();
        for &(name, source) in sources {
            let refuse = |guard::Refusal { line, problem }| Error::Template {
                template: name,
                line,
                problem,
            };
            let source = with_line_feeds(source);
            let guarded = guard::guarded(&source, jinja.syntax().clone()).map_err(refuse)?;
            let source = guarded.source;
            let added = with_stack(|| -> Result<_, JinjaError> {
                jinja.add_template_owned(name, source)?;
                Ok(jinja.get_template(name)?.undeclared_variables(false))
            });
            let names = added.map_err(|problem| refuse(guard::Refusal { line: 1, problem }))?;
            let template = Parsed {
                used: names.map_err(|error| refuse((&error).into()))?,
                mentioned: guarded.mentioned,
                has_marks: guarded.has_marks,
            };
            parsed.insert(name, template);
        }
        let place = "the template".into();
        Ok(Self {
            jinja,
            parsed,
            place,
        })
    }

    /// Defines `strftime_now` as the formats of a time.
    pub(crate) fn set_now(&mut self, now: DateTime) {
        let formatted = move |format: &str| {
            let text = strtime::format(format, now);
            text.map_err(|error| {
                let problem = format!("{CLOCK} cannot write `{format}`: {error}");
                JinjaError::new(ErrorKind::InvalidOperation, problem)
            })
        };
        self.jinja.add_function(CLOCK, formatted);
    }

    /// The variables that a template uses and does not set.
    pub(crate) fn used(&self, name: &str) -> &HashSet<String> {
        &self.parsed[name].used
    }

    /// Whether a name or a string is in the tags of a template.
    pub(crate) fn mentions(&self, name: &str, what: &str) -> bool {
        self.parsed[name].mentioned.contains(what)
    }

    /// Whether a template has `generation` blocks.
    pub(crate) fn has_marks(&self, name: &str) -> bool {
        self.parsed[name].has_marks
    }

    /// Renders one of the templates, with the places of what is in its `generation` blocks.
    ///
    /// # Errors
    /// As [`Templates::render`]; [`RecordError::Render`] if a block is cut apart.
    pub(crate) fn render_marked(
        &self,
        template: &'static str,
        context: Value,
    ) -> Result<(String, Vec<Range<usize>>), RecordError> {
        let refuse = |problem: &str| RecordError::Render {
            template,
            problem: problem.into(),
        };
        if self.has_marks(template) && marks::are_in(&context) {
            return Err(refuse(marks::IN_TEXT));
        }
        let rendered = self.rendered(template, context)?;
        match self.has_marks(template) {
            true => marks::taken(&rendered).ok_or_else(|| refuse(marks::CUT)),
            false => Ok((rendered, Vec::new())),
        }
    }

    /// Renders one of the templates.
    ///
    /// # Errors
    /// [`RecordError::Limit`]; [`RecordError::Render`] if it cannot be rendered for another reason.
    pub(crate) fn render(
        &self,
        template: &'static str,
        context: Value,
    ) -> Result<String, RecordError> {
        Ok(self.render_marked(template, context)?.0)
    }

    fn rendered(&self, template: &'static str, context: Value) -> Result<String, RecordError> {
        let size = bounds::Size::of(&context, u64::MAX);
        let size = size.map_err(|error| self.failure(template, &error, MAX_STEPS))?;
        let max_steps = MAX_STEPS.saturating_add(size.n_bytes);
        let mut jinja = self.jinja.clone();
        jinja.set_fuel(Some(max_steps));
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            jinja.get_template(template)?.render(context)
        }));
        let panicked = |_| RecordError::Render {
            template,
            problem: PANIC.into(),
        };
        let rendered = rendered.map_err(panicked)?;
        rendered.map_err(|error| self.failure(template, &error, max_steps))
    }

    /// Why a template was not rendered.
    fn failure(&self, template: &'static str, error: &JinjaError, max_steps: u64) -> RecordError {
        let mut problem = detail(error);
        let mut is_limit = error.kind() == ErrorKind::OutOfFuel;
        let mut cause = error.source();
        while let Some(error) = cause {
            problem = format!("{problem}: {error}");
            let error: Option<&JinjaError> = error.downcast_ref();
            is_limit |= error.is_some_and(|error| error.kind() == ErrorKind::OutOfFuel);
            cause = cause.and_then(|error| error.source());
        }
        if is_limit && error.detail().is_none() {
            problem = format!("more than {max_steps} steps (of an instruction or 64 bytes)");
        }
        if error.kind() == ErrorKind::UnknownFunction && problem.contains(CLOCK) {
            problem += ": templates cannot read the clock; give the date";
        }
        if let Some((end, _)) = problem.char_indices().nth(MAX_PROBLEM) {
            problem.truncate(end);
            problem += "…";
        }
        if let Some(line) = error.line() {
            problem = format!("{problem} (line {line} of {})", self.place);
        }
        if is_limit {
            RecordError::Limit { template, problem }
        } else {
            RecordError::Render { template, problem }
        }
    }
}

/// The problem of a template at which minijinja panics.
const PANIC: &str =
    "the template engine failed: the template does something that it is not made for";

/// Runs a parser on a thread with a stack that its recursion does not overflow.
fn with_stack<T: Send>(parse: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().stack_size(PARSER_STACK);
        let thread = builder.spawn_scoped(scope, parse);
        let thread = thread.map_err(|error| format!("no thread to parse it: {error}"))?;
        thread.join().map_err(|_| PANIC.to_owned())
    })
}

fn plain() -> Environment<'static> {
    let mut jinja = Environment::new();
    jinja.set_auto_escape_callback(|_| AutoEscape::None);
    jinja.set_recursion_limit(MAX_RECURSION);
    bounds::add_to(&mut jinja);
    filters::add_to(&mut jinja);
    jinja.add_filter(MARKED, marks::marked);
    // Errors then name the undefined variable.
    jinja.set_debug(true);
    jinja
}

fn built(syntax: &SyntaxConfigBuilder) -> SyntaxConfig {
    syntax.build().expect("the delimiters are Jinja's own")
}

/// The line ends that Jinja2 reads in a source.
fn with_line_feeds(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// Writes a value as Python's `str`.
fn print(out: &mut Output, _: &mut State, value: &Value) -> Result<(), JinjaError> {
    Ok(out.write_str(&text::text(value)?)?)
}

/// Converts JSON to a value of a template.
pub(crate) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Value::from(number),
            (_, Some(number), _) => Value::from(number),
            (_, _, number) => Value::from(number),
        },
        Json::String(text) => Value::from(text),
        Json::Array(values) => values.iter().map(value).collect(),
        Json::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(key, field)| (key.as_str(), value(field)));
            Value::from_pairs(fields)
        }
    }
}

/// What an error says, without its place.
fn detail(error: &JinjaError) -> String {
    let detail = error.detail().map(str::to_owned);
    detail.unwrap_or_else(|| error.kind().to_string())
}
