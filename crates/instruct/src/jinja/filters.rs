//! The filters, tests and methods of Jinja2 and of Python's types, where minijinja has others or none.

use std::borrow::Cow;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{
    DynObject, Kwargs, Rest, StringInput, Tuple, ValueKind, ValueOrKwargs, from_args,
};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use super::bounds::{VALUE_BYTES, charge, charge_format, checked, invalid};
use super::text::{View, text};
use super::{FORMAT, json, numbers, strings};

/// Adds them to an environment, and removes what has no bound; chat templates use none of that.
pub(super) fn add_to(jinja: &mut Environment) {
    jinja.remove_global("debug");
    jinja.remove_filter("pprint");
    jinja.remove_filter("chain");
    jinja.add_filter(
        "tojson",
        |state: &State, value: &Value, args: Rest<ValueOrKwargs>| {
            json::to_json(state, value, &args.into_values())
        },
    );
    jinja.add_filter(
        "format",
        |state: &State, text: &str, args: Rest<ValueOrKwargs>| {
            formatted(state, text, &args.into_values())
        },
    );
    // As an operator it has its arguments in a tuple, or one that may be a dictionary.
    jinja.add_filter(
        FORMAT.trim_matches(['|', '(']),
        |state: &State, text: &str, arg: &Value| match arg.is_tuple() {
            true => formatted(state, text, &arg.try_iter()?.collect::<Vec<_>>()),
            false => formatted(state, text, std::slice::from_ref(arg)),
        },
    );
    add_texts(jinja);
    jinja.add_filter("int", numbers::int);
    jinja.add_filter("float", numbers::float);
    // An attribute of a dictionary is none of its items.
    jinja.add_filter("attr", |value: &Value, name: &Value| match value.kind() {
        ValueKind::Map => Ok(Value::UNDEFINED),
        _ => filters::attr(value, name),
    });
    jinja.add_filter("dictsort", dict_sort);
    jinja.add_filter("indent", indent);
    jinja.add_filter("join", join);
    jinja.add_filter("wordcount", |state: &State, value: &Value| {
        let text = input(state, value)?;
        let words = text.split(|char: char| !(char.is_alphanumeric() || char == '_'));
        Ok::<_, Error>(words.filter(|word| !word.is_empty()).count())
    });
    jinja.add_filter(
        "split",
        |state: &State, value: &Value, by: Option<&Value>, most: Option<i64>| {
            let pieces = input(state, value)?;
            let n_pieces = match by.and_then(Value::as_str) {
                Some(by) => pieces.matches(by).count(),
                None => pieces.split_whitespace().count(),
            };
            charge(state, n_pieces as u64 * VALUE_BYTES)?;
            filters::split(value, by.and_then(Value::as_str).map(Into::into), most)
        },
    );
    jinja.add_filter("lines", |state: &State, value: &Value| {
        charge(
            state,
            input(state, value)?.matches('\n').count() as u64 * VALUE_BYTES,
        )?;
        filters::lines(value)
    });
    // What has a length and items, as strings and dictionaries have.
    jinja.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Iterable => value.downcast_object_ref::<View>().is_none(),
        kind => matches!(
            kind,
            ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined
        ),
    });
    jinja.set_unknown_method_callback(method);
}

/// Adds the filters that make texts of texts.
fn add_texts(jinja: &mut Environment) {
    jinja.add_filter("string", |state: &State, value: &Value| {
        Ok::<_, Error>(input(state, value)?.into_owned())
    });
    jinja.add_filter("title", |state: &State, value: &Value| {
        Ok::<_, Error>(strings::title_filter(&input(state, value)?))
    });
    jinja.add_filter("capitalize", |state: &State, value: &Value| {
        Ok::<_, Error>(strings::capitalize(&input(state, value)?))
    });
    jinja.add_filter(
        "trim",
        |state: &State, value: &Value, chars: Option<&str>| {
            Ok::<_, Error>(strings::strip(&input(state, value)?, chars, [true; 2])?.to_owned())
        },
    );
    jinja.add_filter(
        "center",
        |state: &State, value: &Value, width: Option<usize>| {
            strings::center(state, &input(state, value)?, width.unwrap_or(80), ' ')
        },
    );
    jinja.add_filter(
        "replace",
        |state: &State, value: &Value, old: &Value, new: &Value, most: Option<i64>| {
            let text = input(state, value)?;
            strings::replace(state, &text, &input(state, old)?, &input(state, new)?, most)
        },
    );
}

/// The text of what a filter is applied to, which may have to be defined.
fn input<'v>(state: &State, value: &'v Value) -> Result<Cow<'v, str>, Error> {
    if value.is_undefined() {
        StringInput::new(state, value)?;
    }
    text(value)
}

fn formatted(state: &State, text: &str, args: &[Value]) -> Result<String, Error> {
    charge_format(state, text, args)?;
    format(FormatStyle::Printf, text, args)
}

/// Sorts the items of a dictionary: `case_sensitive`, `by`, `reverse`.
fn dict_sort(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (case, by, reverse, named): (Option<Value>, Option<Value>, Option<Value>, Kwargs) =
        from_args(&args)?;
    let mut given = Vec::new();
    for (name, value) in [("case_sensitive", case), ("by", by), ("reverse", reverse)] {
        let value = value.map_or_else(|| named.get(name), |value| Ok(Some(value)))?;
        given.extend(value.map(|value: Value| (name, value)));
    }
    named.assert_all_used()?;
    checked(state, value)?;
    filters::dictsort(value, given.into_iter().collect())
}

/// Joins the texts of values, or of an attribute of each.
fn join(state: &mut State, values: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (between, attribute, named): (Option<Value>, Option<Value>, Kwargs) = from_args(&args)?;
    let between = between.map_or_else(|| named.get("d"), |between| Ok(Some(between)))?;
    let attribute = attribute.map_or_else(|| named.get("attribute"), |name| Ok(Some(name)))?;
    named.assert_all_used()?;
    let values = match attribute {
        Some(name) => {
            let attribute: Kwargs = [("attribute", name)].into_iter().collect();
            state.apply_filter("map", &[values.clone(), attribute.into()])?
        }
        None => values.clone(),
    };
    let between = between.unwrap_or_else(|| "".into());
    let (between, mut joined) = (text(&between)?, String::new());
    for (at, value) in values.try_iter()?.checked().enumerate() {
        let value = checked(state, &value?)?;
        let text = text(&value)?;
        let between = if at > 0 { &*between } else { "" };
        charge(state, (between.len() + text.len()) as u64)?;
        joined.push_str(between);
        joined.push_str(&text);
    }
    Ok(joined)
}

/// Indents lines: by a number of spaces or a text, the first and blank ones only where it is asked for.
fn indent(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (width, first, blank, named): (Option<Value>, Option<bool>, Option<bool>, Kwargs) =
        from_args(&args)?;
    let width = width.map_or_else(
        || named.get::<Option<Value>>("width"),
        |width| Ok(Some(width)),
    )?;
    let first = first.map_or_else(
        || named.get::<Option<bool>>("first"),
        |first| Ok(Some(first)),
    )?;
    let blank = blank.map_or_else(
        || named.get::<Option<bool>>("blank"),
        |blank| Ok(Some(blank)),
    )?;
    named.assert_all_used()?;
    let (first, blank) = (first.unwrap_or(false), blank.unwrap_or(false));
    let (fill, n_fill) = match &width {
        Some(width) if width.as_str().is_some() => (width.as_str().unwrap_or_default(), 1),
        Some(width) => (" ", usize::try_from(width.clone())?),
        None => (" ", 4),
    };
    let text = input(state, value)?;
    let n_lines = strings::lines(&text).count() as u64 + 1;
    charge(
        state,
        (fill.len() as u64)
            .saturating_mul(n_fill as u64)
            .saturating_mul(n_lines),
    )?;
    let indent = fill.repeat(n_fill);
    // Jinja2 adds a line end to the text before it splits it.
    let mut lines: Vec<&str> = strings::lines(&text).map(strings::without_end).collect();
    if text.is_empty()
        || strings::lines(&text)
            .last()
            .is_some_and(|line| line != strings::without_end(line))
    {
        lines.push("");
    }
    let mut indented = String::new();
    for (at, line) in lines.into_iter().enumerate() {
        if at > 0 {
            indented.push('\n');
        }
        if (at == 0 && first) || (at > 0 && (blank || !line.is_empty())) {
            indented.push_str(&indent);
        }
        indented.push_str(line);
    }
    Ok(indented)
}

/// Python's methods.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let called = match value.kind() {
        ValueKind::String => strings::call(state, value.as_str().unwrap_or_default(), name, args),
        ValueKind::Map => of_dictionary(state, value, name, args),
        ValueKind::Seq | ValueKind::Iterable => of_list(state, value, name, args),
        _ => None,
    };
    called.unwrap_or_else(|| Err(Error::from(ErrorKind::UnknownMethod)))
}

fn of_dictionary(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Option<Result<Value, Error>> {
    let object = value.as_object()?;
    let view = |name, item: fn((Value, Value)) -> Value| {
        let pairs = object.try_iter_pairs().into_iter().flatten();
        let values: Vec<Value> = pairs.map(item).collect();
        charge(state, values.len() as u64 * VALUE_BYTES)?;
        Ok::<_, Error>(Value::from_object(View { name, values }))
    };
    Some(match name {
        "keys" => from_args(args).and_then(|()| view("dict_keys", |(key, _)| key)),
        "values" => from_args(args).and_then(|()| view("dict_values", |(_, value)| value)),
        "items" => from_args(args).and_then(|()| {
            view("dict_items", |(key, value)| {
                Tuple::from([key, value]).into()
            })
        }),
        "copy" => from_args(args).map(|()| value.clone()),
        "get" => get(object, args),
        _ => return None,
    })
}

fn get(object: &DynObject, args: &[Value]) -> Result<Value, Error> {
    let (key, default): (&Value, Option<Value>) = from_args(args)?;
    let found = object.get_value(key);
    Ok(found.unwrap_or_else(|| default.unwrap_or_else(|| Value::from(()))))
}

fn of_list(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Option<Result<Value, Error>> {
    let items = || -> Result<Vec<Value>, Error> {
        checked(state, value)?;
        value.try_iter()?.checked().collect()
    };
    let of = |what: Result<(&Value,), Error>| -> Result<(Vec<Value>, Value), Error> {
        Ok((items()?, what?.0.clone()))
    };
    Some(match name {
        "count" => of(from_args(args))
            .map(|(items, what)| items.iter().filter(|&item| *item == what).count().into()),
        "index" => of(from_args(args)).and_then(|(items, what)| {
            let at = items.iter().position(|item| *item == what);
            at.map(Value::from)
                .ok_or_else(|| invalid("the list has no such item"))
        }),
        "copy" => from_args(args).map(|()| value.clone()),
        _ => return None,
    })
}
