//! The sizes of values, and the filters and methods that charge for what they do before they do it.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat::unknown_method_callback;

/// The deepest nesting of values. A record's JSON nests at most 128 levels deep.
const MAX_DEPTH: usize = 150;

/// What a value costs apart from its text, in bytes.
const VALUE_BYTES: u64 = 32;

/// The bytes that a step pays for, as in minijinja.
const STEP_BYTES: u64 = 64;

/// The part of the bytes of a rendering that a value, or the result of a filter, may take: to make it,
/// and to make another of it, takes several copies, such as the characters of a string.
const SHARE: u64 = 16;

/// The most characters that are stripped. Each character of a text is compared with all of them.
const MAX_STRIPPED: usize = 256;

/// Adds the filters that [`super::guard`] inserts, and replaces those that would do their work first.
pub(super) fn add_to(jinja: &mut Environment) {
    let named = |name: &'static str| name.trim_matches(['|', ' ']);
    jinja.add_filter(named(super::VALUE), |state: &State, value: &Value| {
        refuse_namespace(value)?;
        checked(state, value)
    });
    jinja.add_filter(named(super::HELD), checked);
    jinja.add_filter(named(super::SCALAR), |state: &State, value: &Value| {
        if value.as_object().is_some() {
            return Err(invalid("only strings and numbers are multiplied"));
        }
        checked(state, value)
    });
    // Their results have no bound; chat templates use none of them.
    jinja.remove_global("debug");
    jinja.remove_filter("pprint");
    jinja.remove_filter("chain");
    jinja.add_filter("tojson", to_json);
    jinja.add_filter(
        "format",
        |state: &State, text: &str, args: Rest<ValueOrKwargs>| -> Result<String, Error> {
            let args = args.into_values();
            charge_format(state, text, &args)?;
            format(FormatStyle::Printf, text, &args)
        },
    );
    jinja.add_filter("indent", indent);
    jinja.add_filter(
        "split",
        |state: &State, value: &Value, by: Option<&Value>, n_max: Option<i64>| {
            charge_pieces(state, value, by)?;
            let by = by.and_then(Value::as_str).map(Into::into);
            filters::split(value, by, n_max)
        },
    );
    jinja.add_filter("lines", |state: &State, value: &Value| {
        charge_pieces(state, value, Some(&"\n".into()))?;
        filters::lines(value)
    });
    jinja.add_filter(
        "trim",
        |state: &State, value: &Value, stripped: Option<&str>| {
            charge_stripped(stripped)?;
            let text = StringInput::new(state, value)?;
            Ok::<_, Error>(filters::trim(text, stripped.map(Into::into)))
        },
    );
    jinja.set_unknown_method_callback(method);
}

fn invalid(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}

/// The size of a value, in which shared parts count as often as they occur.
#[derive(Clone, Copy, Default)]
pub(super) struct Size {
    /// The bytes of its texts, and [`VALUE_BYTES`] for each value in it.
    pub(super) n_bytes: u64,
    n_values: u64,
    depth: usize,
}

impl Size {
    /// Measures a value of at most `max` bytes.
    pub(super) fn of(value: &Value, max: u64) -> Result<Self, Error> {
        let mut size = Self::default();
        size.add(value, 0, max)?;
        Ok(size)
    }

    fn add(&mut self, value: &Value, depth: usize, max: u64) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let problem = format!("a value nests more than {MAX_DEPTH} levels deep");
            return Err(Error::new(ErrorKind::OutOfFuel, problem));
        }
        let text = value.as_bytes().map_or(0, <[u8]>::len);
        self.n_values += 1;
        self.n_bytes = self.n_bytes.saturating_add(VALUE_BYTES + text as u64);
        self.depth = self.depth.max(depth);
        if self.n_bytes > max {
            return Err(too_large(max));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()?.checked() {
                    let item = item?;
                    refuse_namespace(&item)?;
                    self.add(&item, depth + 1, max)?;
                }
            }
            ValueKind::Map => {
                let pairs = value.as_object().and_then(|map| map.try_iter_pairs());
                for (key, value) in pairs.into_iter().flatten() {
                    refuse_namespace(&value)?;
                    self.add(&key, depth + 1, max)?;
                    self.add(&value, depth + 1, max)?;
                }
            }
            _ => (),
        }
        Ok(())
    }
}

/// Refuses namespaces and loops, which can hold themselves if a value can hold them.
///
/// Such a value would have no end, and would not be freed.
fn refuse_namespace(value: &Value) -> Result<(), Error> {
    // By their names: the types are private, and that of a plain map depends on the engine's features.
    let is_self_holding = value.as_object().is_some_and(|object| {
        let name = object.type_name();
        name.ends_with("::Namespace") || name.ends_with("::Loop")
    });
    if is_self_holding {
        return Err(invalid(
            "a namespace or a loop is no value: use its attributes",
        ));
    }
    Ok(())
}

/// Charges for a value before something is done with it.
///
/// An iterable becomes a list: one that is made of others would compute them again and again.
fn checked(state: &State, value: &Value) -> Result<Value, Error> {
    let size = Size::of(value, max_bytes(state))?;
    // The engine charges for the text that a filter is given.
    if value.as_object().is_some() {
        charge(state, size.n_values * VALUE_BYTES + size.n_bytes / 8)?;
    }
    if value.kind() == ValueKind::Iterable {
        return value.try_iter()?.checked().collect::<Result<Value, _>>();
    }
    Ok(value.clone())
}

/// The bytes that a value may take.
fn max_bytes(state: &State) -> u64 {
    let (n_done, n_left) = state.fuel_levels().unwrap_or_default();
    n_done.saturating_add(n_left).saturating_mul(STEP_BYTES) / SHARE
}

/// Charges for bytes before they are made.
fn charge(state: &State, n_bytes: u64) -> Result<(), Error> {
    let max = max_bytes(state);
    if n_bytes > max {
        return Err(too_large(max));
    }
    state.consume_fuel(n_bytes / STEP_BYTES)
}

fn too_large(max: u64) -> Error {
    let problem = format!("a value has more than {max} bytes");
    Error::new(ErrorKind::OutOfFuel, problem)
}

/// Python's methods.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.as_str().is_none() {
        if value.kind() == ValueKind::Seq {
            checked(state, value)?;
        }
        return unknown_method_callback(state, value, name, args);
    }
    match (name, args) {
        // The filters of these names charge for what they make before they make it.
        ("replace", [_, _, ..]) => {
            let args: Vec<_> = [value].into_iter().chain(args).cloned().collect();
            return state.apply_filter("replace", &args);
        }
        ("join", [values]) => {
            return state.apply_filter("join", &[values.clone(), value.clone()]);
        }
        ("split", _) => charge_pieces(state, value, args.first())?,
        ("splitlines", _) => charge_pieces(state, value, Some(&"\n".into()))?,
        ("format", _) => charge_format(state, value.as_str().unwrap_or_default(), args)?,
        ("strip" | "lstrip" | "rstrip", [stripped, ..]) => charge_stripped(stripped.as_str())?,
        _ => (),
    }
    unknown_method_callback(state, value, name, args)
}

/// Charges for the pieces of a text.
fn charge_pieces(state: &State, text: &Value, by: Option<&Value>) -> Result<(), Error> {
    let text = text.as_str().unwrap_or_default();
    let n_pieces = match by.and_then(Value::as_str) {
        Some(by) => text.matches(by).count(),
        None => text.split_whitespace().count(),
    };
    charge(state, n_pieces as u64 * VALUE_BYTES)
}

fn charge_stripped(stripped: Option<&str>) -> Result<(), Error> {
    let n_stripped = stripped.map_or(0, |stripped| stripped.chars().count());
    if n_stripped > MAX_STRIPPED {
        let problem = format!("{n_stripped} characters to strip, more than {MAX_STRIPPED}");
        return Err(Error::new(ErrorKind::OutOfFuel, problem));
    }
    Ok(())
}

/// Charges for the longest text that a format can make: with all arguments in each field, and the
/// widths and precisions.
fn charge_format(state: &State, text: &str, args: &[Value]) -> Result<(), Error> {
    let n_fields = text.matches(['{', '%']).count() as u64;
    let mut n_bytes = 0u64;
    for arg in args {
        n_bytes = n_bytes.saturating_add(Size::of(arg, max_bytes(state))?.n_bytes);
    }
    let numbers = text.split(|char: char| !char.is_ascii_digit());
    let widths = numbers.filter(|number| !number.is_empty());
    // A number that does not fit is refused by the formatter.
    let widths = widths.map(|width| width.parse().unwrap_or(0u64));
    let widths = widths.fold(0u64, u64::saturating_add);
    let n_bytes = n_bytes.saturating_mul(n_fields).saturating_add(widths);
    charge(state, n_bytes)
}

fn indent(state: &State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (text, width, first, blank, named): (
        StringInput,
        Option<usize>,
        Option<bool>,
        Option<bool>,
        Kwargs,
    ) = from_args(&args)?;
    let width = match width {
        Some(width) => Some(width),
        None => named.get("width")?,
    };
    let n_lines = text.as_str().matches('\n').count() as u64 + 1;
    let n_spaces = (width.unwrap_or(4) as u64).saturating_mul(n_lines);
    charge(state, n_spaces)?;
    filters::indent(text, width, first, blank, named)
}

/// The filter `tojson` of transformers, which escapes only the characters that JSON requires.
fn to_json(
    state: &State,
    value: &Value,
    indent: Option<Value>,
    args: Kwargs,
) -> Result<Value, Error> {
    let only_default = |name: &str| {
        let other = args.get::<Option<bool>>(name)?.unwrap_or(false);
        let problem = format!("tojson with {name}=true is not supported");
        if other { Err(invalid(problem)) } else { Ok(()) }
    };
    only_default("ensure_ascii")?;
    only_default("sort_keys")?;
    let named: Option<Value> = args.get("indent")?;
    args.assert_all_used()?;
    let indent = indent.or(named).filter(|indent| !indent.is_none());
    if let Some(indent) = &indent {
        let size = Size::of(value, max_bytes(state))?;
        // Each value may begin a line, and a bracket another; `true` stands for 2.
        let n_lines = size.n_values.saturating_mul(2);
        let n_spaces = indent.as_usize().unwrap_or_default().max(2) as u64;
        let n_spaces = n_spaces.saturating_mul(size.depth as u64);
        charge(state, n_lines.saturating_mul(n_spaces))?;
    }
    let no_args: Kwargs = std::iter::empty::<(&str, Value)>().collect();
    let json = filters::tojson(value, indent, no_args)?;
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
