//! The whitespace of Python, on which the reference protocols depend.

/// Whether a character is whitespace for `\s` and `str.isspace` of Python.
///
/// It is `White_Space` of Unicode and the four separators of ASCII, which Rust excludes.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Splits a text before the whitespace at its end.
pub(crate) fn split_trailing(text: &str) -> (&str, &str) {
    text.split_at(text.trim_end_matches(is_space).len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_is_that_of_python() {
        // `[c for c in range(0x110000) if re.match(r"\s", chr(c))]` in CPython 3.11.
        let mut expected: Vec<u32> = (0x9..=0xd).chain(0x1c..=0x20).collect();
        expected.extend([0x85, 0xa0, 0x1680]);
        expected.extend(0x2000..=0x200a);
        expected.extend([0x2028, 0x2029, 0x202f, 0x205f, 0x3000]);
        let found: Vec<u32> = ('\0'..=char::MAX)
            .filter(|&c| is_space(c))
            .map(u32::from)
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn trailing_whitespace_is_split_off() {
        assert_eq!(
            split_trailing("a b \u{1f}\u{3000}\n"),
            ("a b", " \u{1f}\u{3000}\n")
        );
        assert_eq!(split_trailing("  "), ("", "  "));
        assert_eq!(split_trailing("é"), ("é", ""));
    }
}
