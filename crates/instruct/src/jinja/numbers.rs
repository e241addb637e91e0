//! The filters `int` and `float` of Jinja2, which have a default for what is no number.

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, Value};

/// `int(value, default=0, base=10)`.
pub(super) fn int(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (default, base, named): (Option<Value>, Option<u32>, Kwargs) = from_args(&args)?;
    let default = match default {
        None if named.has("default") => named.get::<Value>("default")?,
        default => default.unwrap_or_else(|| 0.into()),
    };
    let base = base.map_or_else(|| named.get::<Option<u32>>("base"), |base| Ok(Some(base)))?;
    named.assert_all_used()?;
    let read = match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => return Ok(value.clone()),
        ValueKind::String => digits(value.as_str().unwrap_or_default(), base.unwrap_or(10)),
        _ => None,
    };
    let truncated = || {
        real(value)
            .filter(|value| value.abs() < 1e38)
            .map(|value| value as i128)
    };
    Ok(read.or_else(truncated).map_or(default, whole))
}

/// `float(value, default=0.0)`.
pub(super) fn float(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (default, named): (Option<Value>, Kwargs) = from_args(&args)?;
    let default = match default {
        None if named.has("default") => named.get::<Value>("default")?,
        default => default.unwrap_or_else(|| 0.0.into()),
    };
    named.assert_all_used()?;
    Ok(real(value).map_or(default, Value::from))
}

fn whole(value: i128) -> Value {
    i64::try_from(value).map_or_else(|_| value.into(), Value::from)
}

/// The number that a text is in a base, with the prefix of the base if it has one.
fn digits(text: &str, base: u32) -> Option<i128> {
    let text = without_underscores(text)?;
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => (if text.starts_with('-') { "-" } else { "" }, digits),
        None => ("", text.as_str()),
    };
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "",
    };
    let has_prefix = !prefix.is_empty()
        && digits
            .get(..2)
            .is_some_and(|found| found.eq_ignore_ascii_case(prefix));
    let digits = if has_prefix { &digits[2..] } else { digits };
    if digits.starts_with(['+', '-']) || !(2..=36).contains(&base) {
        return None;
    }
    i128::from_str_radix(&format!("{sign}{digits}"), base).ok()
}

/// A value as a float, if it is a number or the text of one.
fn real(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => without_underscores(value.as_str()?)?.parse().ok(),
        _ => None,
    }
}

/// A text without the underscores that Python allows between digits, and without whitespace around it.
fn without_underscores(text: &str) -> Option<String> {
    let text = text.trim_matches(super::strings::is_space);
    let is_digit = |at: Option<usize>| {
        let byte = at.and_then(|at| text.as_bytes().get(at));
        byte.is_some_and(u8::is_ascii_alphanumeric)
    };
    let mut underscores = text.match_indices('_');
    let are_between =
        underscores.all(|(at, _)| is_digit(at.checked_sub(1)) && is_digit(Some(at + 1)));
    are_between.then(|| text.replace('_', ""))
}
