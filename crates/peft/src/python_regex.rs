//! Regular expressions of Python's module `re`, in which configurations of other programs choose layers.
//!
//! An expression is parsed by the rules of Python 3.11 and written again for `fancy-regex`, which
//! understands other escapes, classes and flags under the same signs. What Python rejects is rejected,
//! and what the other engine would not match alike is refused by its name.

use std::collections::BTreeMap;

use fancy_regex::Regex;

mod class;
mod parse;

use parse::Parser;

/// A regular expression of Python, matched from the start of a text of printable ASCII, as paths are: of
/// line ends and of other letters the engines differ.
///
/// # Examples
/// ```
/// let layers = peft::PythonRegex::prefix(r"model\.layers\.(?!0\.)")?;
/// assert!(layers.is_match("model.layers.1.mlp.up_proj")?);
/// assert!(!layers.is_match("model.layers.0.mlp.up_proj")?);
/// # Ok::<(), String>(())
/// ```
#[derive(Debug)]
pub struct PythonRegex {
    regex: Regex,
    /// The numbers of the groups with names.
    groups: BTreeMap<String, usize>,
}

impl PythonRegex {
    /// An expression for [`is_match`](Self::is_match) as in `re.match`: what follows the match is not
    /// looked at.
    ///
    /// # Errors
    /// What Python does not accept, and what cannot be matched here, by name.
    pub fn prefix(pattern: &str) -> Result<Self, String> {
        Self::new(pattern, "")
    }

    /// An expression for [`is_match`](Self::is_match) as in `re.fullmatch`.
    ///
    /// # Errors
    /// As [`PythonRegex::prefix`].
    pub fn whole(pattern: &str) -> Result<Self, String> {
        Self::new(pattern, r"\z")
    }

    fn new(pattern: &str, end: &str) -> Result<Self, String> {
        let parsed =
            Parser::parse(pattern).map_err(|problem| format!("{problem} in `{pattern}`"))?;
        let translated = format!(r"{}\A(?:{}){end}", parsed.flags, parsed.translated);
        let regex = Regex::new(&translated);
        let regex =
            regex.map_err(|error| format!("`{pattern}` cannot be matched here: {error}"))?;
        Ok(Self {
            regex,
            groups: parsed.groups,
        })
    }

    /// Whether the text matches from its start.
    ///
    /// # Errors
    /// If the expression needs more steps than are taken.
    pub fn is_match(&self, text: &str) -> Result<bool, String> {
        let found = self.regex.is_match(text);
        found.map_err(|error| unmatched(text, &error))
    }

    /// The text of the group `name`, if the text matches from its start and the group takes part.
    ///
    /// # Panics
    /// If there is no such group.
    pub(crate) fn group<'t>(&self, text: &'t str, name: &str) -> Result<Option<&'t str>, String> {
        let captures = self.regex.captures(text);
        let captures = captures.map_err(|error| unmatched(text, &error))?;
        let group = self.groups[name];
        let group = captures.and_then(|captures| captures.get(group));
        Ok(group.map(|group| group.as_str()))
    }
}

fn unmatched(path: &str, error: &fancy_regex::Error) -> String {
    format!("`{path}` cannot be matched: {error}")
}

/// A pattern that matches a text alone.
pub(crate) fn escaped(text: &str) -> String {
    let mut pattern = String::new();
    for c in text.chars() {
        if !c.is_ascii_alphanumeric() && c != '_' && c.is_ascii() {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde::Deserialize;

    use super::*;

    /// What Python finds (`tests/golden/make_patterns.py`).
    #[derive(Deserialize)]
    struct Case {
        pattern: String,
        /// The error of Python, or the number of each text with what matches.
        error: Option<String>,
        prefixes: Vec<usize>,
        wholes: Vec<usize>,
        /// Whether this program must refuse what Python accepts.
        #[serde(default)]
        refused: bool,
    }

    #[derive(Deserialize)]
    struct Cases {
        texts: Vec<String>,
        cases: Vec<Case>,
    }

    fn golden() -> Cases {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/patterns.json");
        tensor_files::read_json(&path).unwrap()
    }

    #[test]
    fn expressions_match_as_in_python() {
        let Cases { texts, cases } = golden();
        assert!(cases.len() > 100);
        for case in cases {
            let pattern = &case.pattern;
            let parsed = [PythonRegex::prefix(pattern), PythonRegex::whole(pattern)];
            if case.error.is_some() || case.refused {
                let [prefix, whole] = parsed;
                assert!(prefix.is_err() && whole.is_err(), "{pattern:?} is accepted");
                continue;
            }
            for (parsed, expected) in parsed.into_iter().zip([&case.prefixes, &case.wholes]) {
                let regex = parsed.unwrap_or_else(|error| panic!("{pattern:?}: {error}"));
                let found = (0..texts.len()).filter(|&at| regex.is_match(&texts[at]).unwrap());
                let found: Vec<usize> = found.collect();
                assert_eq!(&found, expected, "{pattern:?}");
            }
        }
    }

    #[test]
    fn escaped_texts_match_themselves() {
        let texts = ["a.b", "a-b c", r"\d(+)[x]{2}|^$", "é#~&", ""];
        for text in texts {
            let regex = PythonRegex::whole(&escaped(text)).unwrap();
            for other in texts {
                assert_eq!(regex.is_match(other).unwrap(), text == other);
            }
        }
    }

    /// A search that would take exponential time ends.
    #[test]
    fn steps_are_limited() {
        let regex = PythonRegex::whole(r"(?=a)(?:(a|aa)+\1?)+b").unwrap();
        let error = regex.is_match(&"a".repeat(200)).unwrap_err();
        assert!(error.contains("cannot be matched"), "{error}");
        let deep = "(".repeat(5000) + &")".repeat(5000);
        let error = PythonRegex::whole(&deep).unwrap_err();
        assert!(error.contains("groups are nested"), "{error}");
    }
}
