//! Escapes and sets of characters.

use std::iter::Peekable;
use std::str::Chars;

/// What a backslash and the signs after it stand for.
pub(super) enum Escape {
    Char(char),
    /// A class of one letter, such as `d`.
    Class(char),
    /// The same assertion for `fancy-regex`.
    Assertion(&'static str),
    /// A reference to a group.
    Group(usize),
}

/// The escape after a backslash outside of sets.
pub(super) fn escape(rest: &mut Peekable<Chars>) -> Result<Escape, String> {
    let c = rest.next().ok_or("bad escape (end of pattern)")?;
    Ok(match c {
        'A' => Escape::Assertion(r"\A"),
        'Z' => Escape::Assertion(r"\z"),
        'b' => Escape::Assertion(r"\b"),
        'B' => Escape::Assertion(r"\B"),
        '0' => Escape::Char(octal(0, 2, rest)?),
        '1'..='9' => group(c, rest)?,
        c => common(c, rest)?,
    })
}

/// The escape after a backslash in a set.
fn escape_in_set(rest: &mut Peekable<Chars>) -> Result<Escape, String> {
    let c = rest.next().ok_or("unterminated character set")?;
    Ok(match c {
        'b' => Escape::Char('\u{8}'),
        '0'..='7' => Escape::Char(octal(digit(c, 8), 2, rest)?),
        '8' | '9' => return Err(format!(r"bad escape \{c}")),
        c => common(c, rest)?,
    })
}

/// Escapes with one meaning in sets and outside.
fn common(c: char, rest: &mut Peekable<Chars>) -> Result<Escape, String> {
    Ok(match c {
        'd' | 'D' | 's' | 'S' | 'w' | 'W' => Escape::Class(c),
        'a' => Escape::Char('\u{7}'),
        'f' => Escape::Char('\u{c}'),
        'n' => Escape::Char('\n'),
        'r' => Escape::Char('\r'),
        't' => Escape::Char('\t'),
        'v' => Escape::Char('\u{b}'),
        'x' => Escape::Char(hexadecimal(c, 2, rest)?),
        'u' => Escape::Char(hexadecimal(c, 4, rest)?),
        'U' => Escape::Char(hexadecimal(c, 8, rest)?),
        'N' => return Err(r"a character by its name, `\N{`, is not supported".into()),
        c if c.is_ascii_alphabetic() => return Err(format!(r"bad escape \{c}")),
        c => Escape::Char(c),
    })
}

fn digit(c: char, base: u32) -> u32 {
    c.to_digit(base).unwrap_or_default()
}

/// A character of up to so many further octal digits after the first.
fn octal(first: u32, most: usize, rest: &mut Peekable<Chars>) -> Result<char, String> {
    let mut value = first;
    for _ in 0..most {
        let Some(next) = rest.next_if(|c| c.is_digit(8)) else {
            break;
        };
        value = 8 * value + digit(next, 8);
    }
    if value > 0o377 {
        return Err(format!(
            r"octal escape value \{value:o} outside of range 0-0o377"
        ));
    }
    Ok(char::from_u32(value).expect("below 256"))
}

fn hexadecimal(kind: char, n: usize, rest: &mut Peekable<Chars>) -> Result<char, String> {
    let digits = std::iter::from_fn(|| rest.next_if(char::is_ascii_hexdigit)).take(n);
    let digits: String = digits.collect();
    let value = u32::from_str_radix(&digits, 16).ok();
    let c = value.filter(|_| digits.len() == n).and_then(char::from_u32);
    c.ok_or_else(|| format!(r"bad escape \{kind}{digits}"))
}

/// A reference of one or two digits, or a character of three octal ones.
fn group(first: char, rest: &mut Peekable<Chars>) -> Result<Escape, String> {
    let mut number = first.to_string();
    if let Some(second) = rest.next_if(char::is_ascii_digit) {
        number.push(second);
        let is_octal = number.chars().all(|c| c.is_digit(8));
        if is_octal && rest.peek().is_some_and(|c| c.is_digit(8)) {
            let value = u32::from_str_radix(&number, 8).unwrap_or_default();
            return octal(value, 1, rest).map(Escape::Char);
        }
    }
    Ok(Escape::Group(number.parse().unwrap_or_default()))
}

/// Writes a character that stands for itself, in sets and outside.
pub(super) fn push_literal(out: &mut String, c: char) {
    if c.is_ascii_alphanumeric() || c == '_' {
        out.push(c);
    } else {
        out.push_str(&format!(r"\x{{{:X}}}", u32::from(c)));
    }
}

/// Reads a set after its opening bracket.
pub(super) fn read(rest: &mut Peekable<Chars>) -> Result<String, String> {
    let mut set = String::from("[");
    if rest.next_if_eq(&'^').is_some() {
        set.push('^');
    }
    let mut is_first = true;
    loop {
        let c = rest.next().ok_or("unterminated character set")?;
        if c == ']' && !is_first {
            set.push(']');
            return Ok(set);
        }
        is_first = false;
        let low = element(c, rest)?;
        if rest.next_if_eq(&'-').is_none() {
            push(&mut set, &low);
            continue;
        }
        let c = rest.next().ok_or("unterminated character set")?;
        if c == ']' {
            push(&mut set, &low);
            push_literal(&mut set, '-');
            set.push(']');
            return Ok(set);
        }
        match (low, element(c, rest)?) {
            (Escape::Char(low), Escape::Char(high)) if low <= high => {
                push_literal(&mut set, low);
                set.push('-');
                push_literal(&mut set, high);
            }
            _ => return Err("bad character range".into()),
        }
    }
}

/// One character of a set, or a class in it.
fn element(c: char, rest: &mut Peekable<Chars>) -> Result<Escape, String> {
    match c {
        '\\' => escape_in_set(rest),
        c => Ok(Escape::Char(c)),
    }
}

fn push(set: &mut String, element: &Escape) {
    match element {
        Escape::Char(c) => push_literal(set, *c),
        Escape::Class(name) => set.extend(['\\', *name]),
        Escape::Assertion(_) | Escape::Group(_) => unreachable!("not in sets"),
    }
}
