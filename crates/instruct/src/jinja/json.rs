//! The filter `tojson` of transformers, which is Python's `json.dumps`.

use std::cmp::Ordering;
use std::fmt::Write;

use minijinja::value::{DynObject, Kwargs, ValueKind, from_args};
use minijinja::{Error, State, Value};

use super::bounds::{Size, charge, invalid, max_bytes};
use super::text;

/// The settings of `json.dumps`.
struct Json {
    is_ascii: bool,
    /// The text of one level of indentation.
    indent: Option<String>,
    between_items: String,
    between_key_and_value: String,
    sorts_keys: bool,
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(state: &State, value: &Value, args: &[Value]) -> Result<String, Error> {
    let (ascii, indent, separators, sort, named): (
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Kwargs,
    ) = from_args(args)?;
    let given = |positional: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let value = positional.map_or_else(|| named.get(name), |value| Ok(Some(value)))?;
        Ok(value.filter(|value| !value.is_none()))
    };
    let ascii = given(ascii, "ensure_ascii")?;
    let indent = given(indent, "indent")?;
    let separators = given(separators, "separators")?;
    let sort = given(sort, "sort_keys")?;
    named.assert_all_used()?;
    let size = Size::of(value, max_bytes(state))?;
    let n_spaces = indent.as_ref().map_or(0, |indent| match indent.as_str() {
        Some(indent) => indent.len() as u64,
        None => n_spaces(indent),
    });
    // Each value may begin a line, and a bracket another.
    let n_lines = size.n_values.saturating_mul(2);
    charge(
        state,
        n_lines.saturating_mul(n_spaces.saturating_mul(size.depth as u64)),
    )?;
    let indent = indent.map(|indent| match indent.as_str() {
        Some(indent) => indent.to_owned(),
        None => " ".repeat(usize::try_from(n_spaces).unwrap_or_default()),
    });
    let (items, keys) = match separators {
        Some(separators) => pair(&separators)?,
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    charge(
        state,
        size.n_values
            .saturating_mul((items.len() + keys.len()) as u64),
    )?;
    let is_ascii = ascii.is_some_and(|ascii| ascii.is_true());
    if is_ascii {
        charge(state, size.n_bytes.saturating_mul(6))?;
    }
    let json = Json {
        is_ascii,
        indent,
        between_items: items,
        between_key_and_value: keys,
        sorts_keys: sort.is_some_and(|sort| sort.is_true()),
    };
    let mut out = String::new();
    json.write(value, 0, &mut out)?;
    Ok(out)
}

/// The spaces of an indentation, of which `true` is one.
fn n_spaces(indent: &Value) -> u64 {
    match indent.kind() {
        ValueKind::Bool => u64::from(indent.is_true()),
        _ => indent.as_usize().unwrap_or_default() as u64,
    }
}

fn pair(separators: &Value) -> Result<(String, String), Error> {
    let problem = || invalid("tojson takes two strings as separators");
    let items: Vec<Value> = separators.try_iter()?.collect();
    match items.as_slice() {
        [items, keys] => {
            let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(problem);
            Ok((text(items)?, text(keys)?))
        }
        _ => Err(problem()),
    }
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(boolean(value)),
            ValueKind::Number => out.push_str(&number(value)?),
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable
                if value.downcast_object_ref::<text::View>().is_none() =>
            {
                let items = value.try_iter()?.checked();
                let items = items.collect::<Result<Vec<_>, _>>()?;
                self.bracketed('[', ']', items.len(), depth, out, |at, out| {
                    self.write(&items[at], depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
                let mut pairs: Vec<_> = pairs.into_iter().flatten().collect();
                if self.sorts_keys {
                    sort(&mut pairs)?;
                }
                self.bracketed('{', '}', pairs.len(), depth, out, |at, out| {
                    let (key, value) = &pairs[at];
                    self.key(key, out)?;
                    out.push_str(&self.between_key_and_value);
                    self.write(value, depth + 1, out)
                })?;
            }
            other => return Err(invalid(format!("tojson cannot write {other}"))),
        }
        Ok(())
    }

    fn bracketed(
        &self,
        open: char,
        close: char,
        n_items: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(indent.as_str(), depth));
            }
        };
        out.push(open);
        for at in 0..n_items {
            if at > 0 {
                out.push_str(&self.between_items);
            }
            line(depth + 1, out);
            item(at, out)?;
        }
        if n_items > 0 {
            line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn key(&self, key: &Value, out: &mut String) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.quote(key.as_str().unwrap_or_default(), out),
            ValueKind::None => out.push_str("\"null\""),
            ValueKind::Bool => *out += &format!("\"{}\"", boolean(key)),
            ValueKind::Number => *out += &format!("\"{}\"", number(key)?),
            other => {
                return Err(invalid(format!(
                    "tojson cannot write a key that is a {other}"
                )));
            }
        }
        Ok(())
    }

    fn quote(&self, text: &str, out: &mut String) {
        out.push('"');
        for char in text.chars() {
            match char {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\x08' => out.push_str("\\b"),
                '\x0c' => out.push_str("\\f"),
                '\0'..' ' => escape(char, out),
                ' '..='~' => out.push(char),
                char if self.is_ascii => escape(char, out),
                char => out.push(char),
            }
        }
        out.push('"');
    }
}

/// Escapes a character as the UTF-16 that JSON's escapes are.
fn escape(char: char, out: &mut String) {
    for unit in char.encode_utf16(&mut [0; 2]) {
        let _ = write!(out, "\\u{unit:04x}");
    }
}

fn boolean(value: &Value) -> &'static str {
    if value.is_true() { "true" } else { "false" }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    Ok(match number {
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        number if number.is_nan() => "NaN".into(),
        number => text::float(number),
    })
}

/// Sorts by keys, which Python compares among strings and among numbers.
fn sort(pairs: &mut [(Value, Value)]) -> Result<(), Error> {
    let is_number =
        |(key, _): &(Value, Value)| matches!(key.kind(), ValueKind::Number | ValueKind::Bool);
    let is_text = |(key, _): &(Value, Value)| key.as_str().is_some();
    if pairs.iter().all(is_text) {
        pairs.sort_by(|(a, _), (b, _)| a.as_str().cmp(&b.as_str()));
    } else if pairs.iter().all(is_number) {
        pairs.sort_by(|(a, _), (b, _)| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    } else if pairs.len() > 1 {
        return Err(invalid("tojson cannot sort keys of several types"));
    }
    Ok(())
}
