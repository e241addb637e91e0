//! Python's methods of strings, and what the filters of Jinja2 share with them.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, from_args};
use minijinja::{Error, State, Value};

use super::bounds::{VALUE_BYTES, charge, charge_format, charge_stripped, invalid};
use super::text;

/// Calls the method `name` of a string; none if strings have no such method here.
pub(super) fn call(
    state: &State,
    text: &str,
    name: &str,
    args: &[Value],
) -> Option<Result<Value, Error>> {
    Some(match name {
        "strip" | "lstrip" | "rstrip" => strip_method(text, name, args).map(Value::from),
        "split" | "rsplit" => split_method(state, text, name == "rsplit", args),
        "splitlines" => split_lines(state, text, args),
        "partition" | "rpartition" => partition(text, name == "rpartition", args),
        "startswith" | "endswith" => begins_or_ends(text, name == "endswith", args),
        "find" | "rfind" | "index" | "rindex" => find(text, name, args),
        "count" => count(text, args),
        "replace" => replace_method(state, text, args),
        "join" => join(state, text, args),
        "format" => {
            let formatted = charge_format(state, text, args);
            formatted.and_then(|()| Ok(format(FormatStyle::StrFormat, text, args)?.into()))
        }
        "center" | "ljust" | "rjust" | "zfill" => pad_method(state, text, name, args),
        "expandtabs" => expand_tabs(state, text, args),
        "removeprefix" => affix(text, args, |text, affix| text.strip_prefix(affix)),
        "removesuffix" => affix(text, args, |text, affix| text.strip_suffix(affix)),
        _ => {
            let made: fn(&str) -> String = match name {
                "upper" => str::to_uppercase,
                "lower" => str::to_lowercase,
                "title" => title,
                "capitalize" => capitalize,
                "swapcase" => swap_case,
                _ => return property(text, name, args),
            };
            no_args(args).map(|()| made(text).into())
        }
    })
}

/// Calls a method that tells something of a string.
fn property(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let all = |is: fn(char) -> bool| !text.is_empty() && text.chars().all(is);
    let (has_upper, has_lower) = (
        text.chars().any(char::is_uppercase),
        text.chars().any(char::is_lowercase),
    );
    let value = match name {
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isnumeric" => all(char::is_numeric),
        "isdecimal" => all(|char| char.is_ascii_digit()),
        "isdigit" => all(|char| {
            matches!(char, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉') || char.is_ascii_digit()
        }),
        "isascii" => text.is_ascii(),
        "isupper" => has_upper && !has_lower,
        "islower" => has_lower && !has_upper,
        "istitle" => (has_upper || has_lower) && title(text) == text,
        "isprintable" => text.chars().all(text::is_printable),
        "isidentifier" => {
            let is_first = |char: char| char == '_' || char.is_alphabetic();
            text.starts_with(is_first) && all(|char| char == '_' || char.is_alphanumeric())
        }
        _ => return None,
    };
    Some(no_args(args).map(|()| value.into()))
}

fn no_args(args: &[Value]) -> Result<(), Error> {
    from_args(args)
}

/// The ends of lines in Python, with `\r\n`.
const LINE_ENDS: [char; 10] = [
    '\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}',
];

/// Whether Python takes a character for whitespace: the separators of ASCII are.
pub(super) fn is_space(char: char) -> bool {
    char.is_whitespace() || matches!(char, '\x1c'..='\x1f')
}

/// Strips whitespace, or the characters that are given, at the start and at the end.
pub(super) fn strip<'t>(
    text: &'t str,
    chars: Option<&str>,
    [start, end]: [bool; 2],
) -> Result<&'t str, Error> {
    charge_stripped(chars)?;
    let is_stripped = |char: char| match chars {
        Some(chars) => chars.contains(char),
        None => is_space(char),
    };
    let text = if start {
        text.trim_start_matches(is_stripped)
    } else {
        text
    };
    Ok(if end {
        text.trim_end_matches(is_stripped)
    } else {
        text
    })
}

fn strip_method<'t>(text: &'t str, name: &str, args: &[Value]) -> Result<&'t str, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    strip(text, chars, [name != "rstrip", name != "lstrip"])
}

/// An argument by its place or its name.
fn argument(positional: Option<Value>, named: &Kwargs, name: &str) -> Result<Option<Value>, Error> {
    let value = positional.map_or_else(|| named.get(name), |value| Ok(Some(value)))?;
    Ok(value.filter(|value| !value.is_none()))
}

fn split_method(state: &State, text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (by, most, named): (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
    let by = argument(by, &named, "sep")?;
    let most = argument(most, &named, "maxsplit")?
        .map(i64::try_from)
        .transpose()?;
    named.assert_all_used()?;
    let most = most
        .and_then(|most| usize::try_from(most).ok())
        .unwrap_or(usize::MAX);
    let pieces = match by {
        Some(by) => {
            let Some(by) = by.as_str() else {
                return Err(invalid(format!(
                    "split takes a string, not a {}",
                    by.kind()
                )));
            };
            if by.is_empty() {
                return Err(invalid("split takes a separator that is not empty"));
            }
            charge(state, text.matches(by).count() as u64 * VALUE_BYTES)?;
            let n_pieces = most.saturating_add(1);
            if from_end {
                let mut pieces: Vec<&str> = text.rsplitn(n_pieces, by).collect();
                pieces.reverse();
                pieces
            } else {
                text.splitn(n_pieces, by).collect()
            }
        }
        None => {
            charge(state, text.split(is_space).count() as u64 * VALUE_BYTES)?;
            words(text, most, from_end)
        }
    };
    Ok(pieces.into_iter().map(Value::from).collect())
}

/// Splits at runs of whitespace, at most `most` times, and leaves the whitespace at the other end of what
/// is left then.
fn words(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_end {
            rest.trim_end_matches(is_space)
        } else {
            rest.trim_start_matches(is_space)
        };
        if rest.is_empty() {
            break;
        }
        let end = match rest.find(is_space) {
            _ if pieces.len() == most => None,
            _ if from_end => rest.char_indices().rfind(|&(_, char)| is_space(char)),
            end => end.map(|at| (at, ' ')),
        };
        let (piece, others) = match end {
            None => (rest, ""),
            Some((at, space)) if from_end => (&rest[at + space.len_utf8()..], &rest[..at]),
            Some((at, _)) => rest.split_at(at),
        };
        pieces.push(piece);
        rest = others;
    }
    if from_end {
        pieces.reverse();
    }
    pieces
}

/// The lines of a text, each with its end.
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = match rest.find(LINE_ENDS) {
            Some(at) if rest[at..].starts_with("\r\n") => at + 2,
            Some(at) => at + rest[at..].chars().next().map_or(0, char::len_utf8),
            None => rest.len(),
        };
        let (line, after) = rest.split_at(end);
        rest = after;
        Some(line)
    })
}

/// A line without its end.
pub(super) fn without_end(line: &str) -> &str {
    match line.strip_suffix("\r\n") {
        Some(line) => line,
        None => line.strip_suffix(LINE_ENDS).unwrap_or(line),
    }
}

fn split_lines(state: &State, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keeps, named): (Option<Value>, Kwargs) = from_args(args)?;
    let keeps = argument(keeps, &named, "keepends")?.is_some_and(|keeps| keeps.is_true());
    named.assert_all_used()?;
    charge(state, lines(text).count() as u64 * VALUE_BYTES)?;
    let shown = |line| if keeps { line } else { without_end(line) };
    Ok(lines(text).map(|line| Value::from(shown(line))).collect())
}

fn partition(text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (by,): (&str,) = from_args(args)?;
    if by.is_empty() {
        return Err(invalid("partition takes a separator that is not empty"));
    }
    let found = if from_end {
        text.rsplit_once(by)
    } else {
        text.split_once(by)
    };
    let parts = match found {
        Some((before, after)) => [before, by, after],
        None if from_end => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// The part of a text between two indices of characters, and the number of characters before it; none
/// if it begins behind the end of the text.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    if start.is_none() && end.is_none() {
        return Some((text, 0));
    }
    let n_chars = text.chars().count();
    let index = |at: i64| {
        let n_chars = i64::try_from(n_chars).unwrap_or(i64::MAX);
        let at = if at < 0 {
            at.saturating_add(n_chars).max(0)
        } else {
            at
        };
        usize::try_from(at).unwrap_or(usize::MAX)
    };
    let start = start.map_or(0, index);
    let end = end.map_or(n_chars, index).min(n_chars);
    if start > end {
        return None;
    }
    let byte = |at: usize| {
        text.char_indices()
            .nth(at)
            .map_or(text.len(), |(byte, _)| byte)
    };
    Some((&text[byte(start)..byte(end)], start))
}

fn begins_or_ends(text: &str, ends: bool, args: &[Value]) -> Result<Value, Error> {
    let (affix, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let affixes: Vec<Value> = match affix.as_str() {
        Some(_) => vec![affix.clone()],
        None if affix.is_tuple() => affix.try_iter()?.collect(),
        None => Vec::new(),
    };
    if affixes.is_empty() && !affix.is_tuple()
        || affixes.iter().any(|affix| affix.as_str().is_none())
    {
        let name = if ends { "endswith" } else { "startswith" };
        let kind = affix.kind();
        return Err(invalid(format!(
            "{name} takes a string or a tuple of strings, not a {kind}"
        )));
    }
    let is_there = |affix: &Value| {
        let affix = affix.as_str().unwrap_or_default();
        let part = part(text, start, end);
        part.is_some_and(|(part, _)| {
            if ends {
                part.ends_with(affix)
            } else {
                part.starts_with(affix)
            }
        })
    };
    Ok(affixes.iter().any(is_there).into())
}

fn find(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let found = part(text, start, end).and_then(|(part, n_before)| {
        let at = if name.starts_with('r') {
            part.rfind(what)
        } else {
            part.find(what)
        };
        at.map(|at| n_before + part[..at].chars().count())
    });
    match found {
        Some(at) => Ok(at.into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(invalid("the string has no such part")),
    }
}

fn count(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let part = part(text, start, end);
    Ok(part
        .map_or(0, |(part, _)| part.matches(what).count())
        .into())
}

/// Replaces parts of a text, at most as many as are given.
pub(super) fn replace(
    state: &State,
    text: &str,
    old: &str,
    new: &str,
    most: Option<i64>,
) -> Result<String, Error> {
    let most = most
        .and_then(|most| usize::try_from(most).ok())
        .unwrap_or(usize::MAX);
    let n_replaced = text.matches(old).count().min(most);
    charge(state, (n_replaced as u64).saturating_mul(new.len() as u64))?;
    Ok(text.replacen(old, new, n_replaced))
}

fn replace_method(state: &State, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (old, new, most): (&str, &str, Option<i64>) = from_args(args)?;
    Ok(replace(state, text, old, new, most)?.into())
}

fn join(state: &State, between: &str, args: &[Value]) -> Result<Value, Error> {
    let (values,): (&Value,) = from_args(args)?;
    let mut joined = String::new();
    for (at, value) in values.try_iter()?.checked().enumerate() {
        let value = value?;
        let Some(text) = value.as_str() else {
            let kind = value.kind();
            return Err(invalid(format!(
                "join takes strings, but item {at} is a {kind}"
            )));
        };
        let between = if at > 0 { between } else { "" };
        charge(state, (between.len() + text.len()) as u64)?;
        joined.push_str(between);
        joined.push_str(text);
    }
    Ok(joined.into())
}

/// Puts a text into the middle of `width` characters, as Python does: the odd one is on the left of a
/// width that is odd.
pub(super) fn center(state: &State, text: &str, width: usize, fill: char) -> Result<String, Error> {
    let n_fill = width.saturating_sub(text.chars().count());
    let n_left = n_fill / 2 + (n_fill & width & 1);
    padded(state, text, fill, [n_left, n_fill - n_left])
}

fn padded(state: &State, text: &str, fill: char, n_fill: [usize; 2]) -> Result<String, Error> {
    let n_bytes = n_fill.map(|n| (n as u64).saturating_mul(fill.len_utf8() as u64));
    charge(state, n_bytes[0].saturating_add(n_bytes[1]))?;
    let [left, right] = n_fill.map(|n| std::iter::repeat_n(fill, n).collect::<String>());
    Ok(left + text + &right)
}

fn pad_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let width = usize::try_from(width).unwrap_or(0);
    let n_fill = width.saturating_sub(text.chars().count());
    if name == "zfill" {
        let n_sign = usize::from(text.starts_with(['+', '-']));
        let (sign, digits) = text.split_at(n_sign);
        return Ok((sign.to_owned() + &padded(state, digits, '0', [n_fill, 0])?).into());
    }
    let mut fill = fill.unwrap_or(" ").chars();
    let (Some(fill), None) = (fill.next(), fill.next()) else {
        return Err(invalid(format!("{name} fills with one character")));
    };
    Ok(match name {
        "center" => center(state, text, width, fill)?,
        "ljust" => padded(state, text, fill, [0, n_fill])?,
        _ => padded(state, text, fill, [n_fill, 0])?,
    }
    .into())
}

fn expand_tabs(state: &State, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (size, named): (Option<Value>, Kwargs) = from_args(args)?;
    let size = argument(size, &named, "tabsize")?.map_or(Ok(8), i64::try_from)?;
    named.assert_all_used()?;
    let size = usize::try_from(size).unwrap_or(0);
    charge(
        state,
        (text.matches('\t').count() as u64).saturating_mul(size as u64),
    )?;
    let (mut expanded, mut column) = (String::new(), 0_usize);
    for char in text.chars() {
        match char {
            '\t' => {
                let n_spaces = column.checked_rem(size).map_or(0, |over| size - over);
                expanded.extend(std::iter::repeat_n(' ', n_spaces));
                column += n_spaces;
            }
            char => {
                expanded.push(char);
                column = if matches!(char, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
            }
        }
    }
    Ok(expanded.into())
}

fn affix(
    text: &str,
    args: &[Value],
    without: for<'t> fn(&'t str, &str) -> Option<&'t str>,
) -> Result<Value, Error> {
    let (affix,): (&str,) = from_args(args)?;
    Ok(without(text, affix).unwrap_or(text).into())
}

/// Whether a character has case.
fn is_cased(char: char) -> bool {
    char.is_uppercase() || char.is_lowercase() || is_title(char)
}

/// Whether a character is a title-case letter.
fn is_title(char: char) -> bool {
    matches!(
        char,
        'ǅ' | 'ǈ' | 'ǋ' | 'ǲ' | 'ᾈ'..='ᾏ' | 'ᾘ'..='ᾟ' | 'ᾨ'..='ᾯ' | 'ᾼ' | 'ῌ' | 'ῼ'
    )
}

/// The title case of a character, which is not its upper case where that has more letters.
fn title_of(char: char) -> String {
    match char {
        'Ǆ'..='ǆ' => "ǅ".into(),
        'Ǉ'..='ǉ' => "ǈ".into(),
        'Ǌ'..='ǌ' => "ǋ".into(),
        'Ǳ'..='ǳ' => "ǲ".into(),
        char if is_title(char) => char.into(),
        char => {
            let upper: Vec<char> = char.to_uppercase().collect();
            match upper.as_slice() {
                [first, rest @ ..] if is_cased(*first) => {
                    let rest = rest.iter().flat_map(|char| char.to_lowercase());
                    std::iter::once(*first).chain(rest).collect()
                }
                upper => upper.iter().collect(),
            }
        }
    }
}

/// The lower case of what follows the first character of a text, with the text as its context.
fn lower_rest(text: &str) -> String {
    let n_first: usize = text
        .chars()
        .take(1)
        .flat_map(char::to_lowercase)
        .map(char::len_utf8)
        .sum();
    // A sigma alone is final in lower case, which has as many bytes.
    text.to_lowercase().split_off(n_first)
}

/// `str.title`: the first of each run of letters with case is in title case, the others in lower case.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest
            .find(|char| is_cased(char) != is_cased(first))
            .unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        if is_cased(first) {
            titled += &title_of(first);
            titled += &lower_rest(run);
        } else {
            titled += run;
        }
        rest = after;
    }
    titled
}

/// `str.capitalize`.
pub(super) fn capitalize(text: &str) -> String {
    let first = text.chars().next().map(title_of).unwrap_or_default();
    first + &lower_rest(text)
}

/// The filter `title`, whose words begin behind whitespace, hyphens and opening brackets alone.
pub(super) fn title_filter(text: &str) -> String {
    let is_between = |char: char| is_space(char) || matches!(char, '-' | '(' | '{' | '[' | '<');
    let mut titled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest
            .find(|char| is_between(char) != is_between(first))
            .unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        titled.extend(first.to_uppercase());
        titled += &word[first.len_utf8()..].to_lowercase();
        rest = after;
    }
    titled
}

fn swap_case(text: &str) -> String {
    let swapped = text.chars().flat_map(|char| {
        let swapped: String = match char {
            char if char.is_uppercase() => char.to_lowercase().collect(),
            char if char.is_lowercase() => char.to_uppercase().collect(),
            char => char.into(),
        };
        swapped.chars().collect::<Vec<_>>()
    });
    swapped.collect()
}
