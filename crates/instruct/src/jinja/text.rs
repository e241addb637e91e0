//! Values as Python prints them.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::OnceLock;

use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, ValueKind};
use minijinja::{Error, Value};
use regex::Regex;

/// The view that Python's `keys`, `values` and `items` give of a dictionary.
#[derive(Debug)]
pub(super) struct View {
    pub(super) name: &'static str,
    pub(super) values: Vec<Value>,
}

impl Object for View {
    fn repr(self: &std::sync::Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &std::sync::Arc<Self>) -> Enumerator {
        Enumerator::Values(self.values.clone())
    }
}

/// `str(value)`.
pub(super) fn text(value: &Value) -> Result<Cow<'_, str>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.into());
    }
    if value.is_undefined() {
        return Ok("".into());
    }
    let mut out = String::new();
    represent(value, &mut out)?;
    Ok(out.into())
}

/// Appends `repr(value)`.
pub(super) fn represent(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Number if !value.is_integer() => {
            out.push_str(&float(f64::try_from(value.clone())?));
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Seq | ValueKind::Iterable => sequence(value, out)?,
        ValueKind::Map if is_plain(value) => {
            out.push('{');
            let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
            for (at, (key, value)) in pairs.into_iter().flatten().enumerate() {
                separate(at, out);
                represent(&key, out)?;
                out.push_str(": ");
                represent(&value, out)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}").map_err(|_| Error::from(minijinja::ErrorKind::WriteFailure))?,
    }
    Ok(())
}

/// Whether a map is one of values, and not an object of the engine with attributes.
fn is_plain(value: &Value) -> bool {
    let name = value.as_object().map_or("", |object| object.type_name());
    !name.contains("::Macro")
}

fn sequence(value: &Value, out: &mut String) -> Result<(), Error> {
    let view = value.downcast_object_ref::<View>();
    let (start, end) = match view {
        Some(view) => {
            out.push_str(view.name);
            ("([", "])")
        }
        None if value.is_tuple() => ("(", ")"),
        None => ("[", "]"),
    };
    out.push_str(start);
    let mut n_items = 0;
    for item in value.try_iter()?.checked() {
        separate(n_items, out);
        represent(&item?, out)?;
        n_items += 1;
    }
    if value.is_tuple() && n_items == 1 {
        out.push(',');
    }
    out.push_str(end);
    Ok(())
}

fn separate(at: usize, out: &mut String) {
    if at > 0 {
        out.push_str(", ");
    }
}

/// Whether a value is or has a float that Python prints with an exponent, and the formats of the engine
/// without one.
pub(super) fn has_exponent(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).is_ok_and(|value| float(value).contains('e'))
        }
        ValueKind::Seq => value
            .try_iter()
            .is_ok_and(|mut items| items.any(|item| has_exponent(&item))),
        ValueKind::Map => {
            let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
            pairs
                .into_iter()
                .flatten()
                .any(|(_, value)| has_exponent(&value))
        }
        _ => false,
    }
}

/// Appends `repr(text)`.
fn quote(text: &str, out: &mut String) {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    out.push(quote);
    for char in text.chars() {
        match char {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            char if char == quote => out.extend(['\\', char]),
            ' '..='~' => out.push(char),
            char if is_printable(char) => out.push(char),
            char => {
                let code = u32::from(char);
                *out += &match code {
                    0..0x100 => format!("\\x{code:02x}"),
                    0x100..0x1_0000 => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// `char.isprintable()`: whether it is a space, or neither a separator nor one of the categories
/// "other".
pub(super) fn is_printable(char: char) -> bool {
    static HIDDEN: OnceLock<Regex> = OnceLock::new();
    let hidden = HIDDEN.get_or_init(|| Regex::new(r"[\p{C}\p{Z}]").expect("the pattern is valid"));
    matches!(char, ' '..='~') || !hidden.is_match(char.encode_utf8(&mut [0; 4]))
}

/// `repr(value)` of a float: the shortest digits that give it, with an exponent below 1e-4 and from
/// 1e16 on.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent @ ..-4) => format!("{digits}e-{:02}", -exponent),
        Ok(exponent @ 16..) => format!("{digits}e+{exponent:02}"),
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compared with `repr` of Python 3.11.
    #[test]
    fn floats_are_those_of_python() {
        let cases = [
            (1e20, "1e+20"),
            (1e-7, "1e-07"),
            (1e16, "1e+16"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (0.0001, "0.0001"),
            (0.000_012, "1.2e-05"),
            (-0.0, "-0.0"),
            (3.0, "3.0"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            (-1e-10, "-1e-10"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ];
        for (value, expected) in cases {
            assert_eq!(float(value), expected);
        }
    }
}
