//! Environments of minijinja that render as Jinja2 does in Python.

use std::collections::BTreeMap;
use std::error::Error as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{
    AutoEscape, Environment, Error as JinjaError, ErrorKind, UndefinedBehavior, Value,
};
use serde_json::Value as Json;

use crate::Error;

/// The steps after which rendering is stopped.
const FUEL: u64 = 20_000_000;

/// The function with which chat templates read the date.
const CLOCK: &str = "strftime_now";

/// The problem of values other than strings, numbers and booleans.
pub(crate) const NO_TEXT: &str = "has no text of its own";

/// The environment for templates of fields, in which whitespace is significant.
pub(crate) fn for_fields() -> Environment<'static> {
    let mut jinja = plain();
    jinja.set_undefined_behavior(UndefinedBehavior::Strict);
    let mut syntax = SyntaxConfig::builder();
    jinja.set_syntax(built(syntax.keep_trailing_newline(true)));
    jinja.set_formatter(|out, state, value| match value.kind() {
        ValueKind::None | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            let problem = format!("{} {NO_TEXT}", value.kind());
            Err(JinjaError::new(ErrorKind::InvalidOperation, problem))
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    jinja
}

/// The environment for chat templates, as in transformers (`utils/chat_template_utils.py`, 5.23).
///
/// `strftime_now` is not defined: with a clock, the tokens of a record would change from day to day.
/// The template of LLaMA 3.2 then falls back to a fixed date.
pub(crate) fn for_chats() -> Environment<'static> {
    let mut jinja = plain();
    let mut syntax = SyntaxConfig::builder();
    jinja.set_syntax(built(syntax.trim_blocks(true).lstrip_blocks(true)));
    jinja.add_function(
        "raise_exception",
        |message: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        },
    );
    jinja
}

fn plain() -> Environment<'static> {
    let mut jinja = Environment::new();
    jinja.set_auto_escape_callback(|_| AutoEscape::None);
    jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    jinja.add_filter("tojson", to_json);
    jinja.set_fuel(Some(FUEL));
    // Errors then name the undefined variable.
    jinja.set_debug(true);
    jinja
}

fn built(syntax: &minijinja::syntax::SyntaxConfigBuilder) -> SyntaxConfig {
    syntax.build().expect("the delimiters are Jinja's own")
}

/// The filter `tojson` of transformers, which escapes only the characters that JSON requires.
fn to_json(value: &Value, indent: Option<Value>, args: Kwargs) -> Result<Value, JinjaError> {
    let only_default = |name: &str| {
        let other = args.get::<Option<bool>>(name)?.unwrap_or(false);
        let problem = format!("tojson with {name}=true is not supported");
        let error = || JinjaError::new(ErrorKind::InvalidOperation, problem);
        if other { Err(error()) } else { Ok(()) }
    };
    only_default("ensure_ascii")?;
    only_default("sort_keys")?;
    let named: Option<Value> = args.get("indent")?;
    args.assert_all_used()?;
    let indent = indent.or(named).filter(|indent| !indent.is_none());
    let no_args: Kwargs = std::iter::empty::<(&str, Value)>().collect();
    let json = minijinja::filters::tojson(value, indent, no_args)?;
    Ok(without_html_escapes(json.as_str().unwrap_or_default()).into())
}

/// Replaces the escapes with which minijinja makes JSON safe in HTML.
fn without_html_escapes(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        // In JSON, at least one byte follows a backslash.
        let escape = &rest[at..];
        let (len, text) = match escape.get(..6) {
            Some("\\u003c") => (6, "<"),
            Some("\\u003e") => (6, ">"),
            Some("\\u0026") => (6, "&"),
            Some("\\u0027") => (6, "'"),
            _ => (2, &escape[..2]),
        };
        plain.push_str(text);
        rest = &escape[len..];
    }
    plain + rest
}

/// Converts JSON to a value of a template; the keys of objects are sorted.
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
                .map(|(key, field)| (key.clone(), value(field)));
            Value::from(fields.collect::<BTreeMap<String, Value>>())
        }
    }
}

/// The message of an error with its causes and the line of the template.
pub(crate) fn problem(error: &JinjaError) -> String {
    let mut problem = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    let mut cause = error.source();
    while let Some(error) = cause {
        problem = format!("{problem}: {error}");
        cause = error.source();
    }
    if problem.contains(CLOCK) {
        problem += ": templates cannot read the clock; write the date into the template";
    }
    match error.line() {
        Some(line) => format!("{problem} (line {line} of the template)"),
        None => problem,
    }
}

/// The error of a template that does not parse.
pub(crate) fn refuse(template: &'static str, error: &JinjaError) -> Error {
    let problem = error.detail().map(str::to_owned);
    Error::Template {
        template,
        line: error.line().unwrap_or(1),
        problem: problem.unwrap_or_else(|| error.kind().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(template: &str) -> Result<String, JinjaError> {
        let context = BTreeMap::from([(
            "x".to_owned(),
            value(&serde_json::json!(
                {"b": "<a & 'b'> \\u003c \"é\" 語\n", "a": [1, 2.5, -3, true, null, {}, []]}
            )),
        )]);
        for_chats().render_str(template, Value::from(context))
    }

    /// Compared with `json.dumps(x, ensure_ascii=False, indent=…)` of Python 3.11.
    #[test]
    fn tojson_is_that_of_python() {
        assert_eq!(
            chat("{{ x | tojson }}").unwrap(),
            "{\"a\": [1, 2.5, -3, true, null, {}, []], \"b\": \"<a & 'b'> \\\\u003c \\\"é\\\" 語\\n\"}"
        );
        assert_eq!(
            chat("{{ x.a | tojson(indent=2) }}").unwrap(),
            "[\n  1,\n  2.5,\n  -3,\n  true,\n  null,\n  {},\n  []\n]"
        );
        assert_eq!(
            chat("{{ x.a[4] | tojson(ensure_ascii=False, indent=none) }}").unwrap(),
            "null"
        );
        let error = chat("{{ x | tojson(sort_keys=true) }}").unwrap_err();
        assert_eq!(
            problem(&error),
            "tojson with sort_keys=true is not supported (line 1 of the template)"
        );
    }

    #[test]
    fn constants_have_the_names_of_python() {
        let template = "{{ x.a[3] }} {{ none }} {{ 1 > 2 }} {{ x.a }} {{ 'x' ~ none ~ true }}";
        let expected = "True None False [1, 2.5, -3, True, None, {}, []] xNoneTrue";
        assert_eq!(chat(template).unwrap(), expected);
    }

    #[test]
    fn a_template_without_end_is_stopped() {
        let loops =
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        assert_eq!(chat(loops).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }

    #[test]
    fn there_is_no_clock() {
        let error = chat("\n{{ strftime_now('%d %b %Y') }}").unwrap_err();
        assert_eq!(
            problem(&error),
            "strftime_now is unknown: templates cannot read the clock; write the date into the template (line 2 of the template)"
        );
        let llama_3_2 = "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{%- else %}26 Jul 2024{%- endif %}";
        assert_eq!(chat(llama_3_2).unwrap(), "26 Jul 2024");
    }
}
