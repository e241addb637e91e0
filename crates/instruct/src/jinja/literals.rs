//! String literals, whose escapes Jinja2 reads as Python's codec `unicode-escape` does.

/// Decodes what is between the quotes of a literal.
///
/// Jinja2 first spells characters outside of ASCII as escapes: `\é` becomes `\\xe9`, which is a
/// backslash and `xe9`.
///
/// # Errors
/// The problem of an escape, as Python names it; of a name of a character (`\N{..}`), which would need
/// the names of Unicode; and of half a surrogate pair, which is no text.
pub(super) fn unescaped(literal: &str) -> Result<String, String> {
    let mut text = String::with_capacity(literal.len());
    let mut rest = literal;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let mut chars = rest[at + 1..].chars();
        let Some(kind) = chars.next() else {
            return Err("a string ends with a backslash".into());
        };
        let after = chars.as_str();
        let n_digits = |max: usize, radix| {
            let digits = after.chars().take(max);
            digits.take_while(|char| char.is_digit(radix)).count()
        };
        let n_used = match kind {
            '\n' => 0,
            '\\' | '\'' | '"' => push(&mut text, kind),
            'a' => push(&mut text, '\x07'),
            'b' => push(&mut text, '\x08'),
            'f' => push(&mut text, '\x0c'),
            'n' => push(&mut text, '\n'),
            'r' => push(&mut text, '\r'),
            't' => push(&mut text, '\t'),
            'v' => push(&mut text, '\x0b'),
            '0'..='7' => {
                let n_more = n_digits(2, 8);
                push(&mut text, coded(&rest[at + 1..at + 2 + n_more], 8)?);
                n_more
            }
            'x' | 'u' | 'U' => {
                let len = match kind {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                if n_digits(len, 16) < len {
                    let digits = "X".repeat(len);
                    return Err(format!("truncated \\{kind}{digits} escape in a string"));
                }
                push(&mut text, coded(&after[..len], 16)?);
                len
            }
            'N' => {
                return Err("a character by its name (\\N) is not supported: write it out".into());
            }
            other => {
                text.push('\\');
                match u32::from(other) {
                    code @ 0..0x80 => text.extend(char::from_u32(code)),
                    code @ 0x80..0x100 => text += &format!("x{code:02x}"),
                    code @ 0x100..0x1_0000 => text += &format!("u{code:04x}"),
                    code => text += &format!("U{code:08x}"),
                }
                0
            }
        };
        rest = &after[n_used..];
    }
    text.push_str(rest);
    Ok(text)
}

/// Spells a text as a literal that minijinja reads as the same text.
pub(super) fn spelled(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn push(text: &mut String, char: char) -> usize {
    text.push(char);
    0
}

fn coded(digits: &str, radix: u32) -> Result<char, String> {
    let code = u32::from_str_radix(digits, radix).map_err(|error| error.to_string())?;
    char::from_u32(code).ok_or_else(|| match code {
        0xd800..0xe000 => format!("\\u{code:04x} is half of a surrogate pair, and no character"),
        _ => format!("illegal Unicode character {digits} in a string"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compared with `literal.encode("ascii", "backslashreplace").decode("unicode-escape")`.
    #[test]
    fn escapes_are_those_of_python() {
        let cases = [
            (r"\a\b\f\n\r\t\v", "\x07\x08\x0c\n\r\t\x0b"),
            (r#"\\\'\""#, "\\'\""),
            (r"\0\7\12\101\0123\777\8", "\0\x07\nA\n3\u{1ff}\\8"),
            (r"\x41\xe9\u8a9e\U0001F600", "Aé語😀"),
            (r"\/\d\s\q\é\語\😀é", r"\/\d\s\q\xe9\u8a9e\U0001f600é"),
            ("a\\\nb", "ab"),
            ("", ""),
        ];
        for (literal, expected) in cases {
            assert_eq!(unescaped(literal).as_deref(), Ok(expected), "{literal}");
        }
        let refused = [
            (r"\x4", "truncated \\xXX escape in a string"),
            (r"\u00e", "truncated \\uXXXX escape in a string"),
            (
                r"\U00110000",
                "illegal Unicode character 00110000 in a string",
            ),
            (
                r"\ud83d\ude00",
                "\\ud83d is half of a surrogate pair, and no character",
            ),
            (
                r"\N{DEGREE SIGN}",
                "a character by its name (\\N) is not supported: write it out",
            ),
        ];
        for (literal, expected) in refused {
            assert_eq!(unescaped(literal).unwrap_err(), expected);
        }
    }
}
