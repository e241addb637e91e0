//! Marks around what is in `generation` blocks, as they are in a rendered text.

use std::ops::Range;

use minijinja::value::{DynObject, ValueKind};
use minijinja::{Error, Value};

/// Noncharacters, which are in no text.
const START: char = '\u{fdd0}';
const END: char = '\u{fdd1}';

/// The problem of a text with the characters of the marks.
pub(super) const IN_TEXT: &str =
    "a text has U+FDD0 or U+FDD1, which are no characters and mark `generation` blocks";

/// The problem of a text with a part of a mark.
pub(super) const CUT: &str = "the template cuts what is in a `generation` block apart";

/// The filter that marks a text.
pub(super) fn marked(text: &str) -> Result<String, Error> {
    Ok(format!("{START}{text}{END}"))
}

/// Whether a text within a value has the characters of the marks.
///
/// The value is one of [`Size::of`](super::bounds::Size::of), which bounds the depth.
pub(super) fn are_in(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String => value
            .as_str()
            .is_some_and(|text| text.contains([START, END])),
        ValueKind::Seq => value
            .try_iter()
            .is_ok_and(|mut items| items.any(|item| are_in(&item))),
        ValueKind::Map => {
            let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
            pairs
                .into_iter()
                .flatten()
                .any(|(key, value)| are_in(&key) || are_in(&value))
        }
        _ => false,
    }
}

/// Takes the marks out of a text, and gives the places of what was between them; none if there is one
/// without the other.
pub(super) fn taken(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let (mut text, mut ranges) = (String::with_capacity(marked.len()), Vec::new());
    let (mut rest, mut n_open, mut start) = (marked, 0usize, 0);
    while let Some(at) = rest.find([START, END]) {
        text.push_str(&rest[..at]);
        let is_start = rest[at..].starts_with(START);
        if is_start && n_open == 0 {
            start = text.len();
        }
        n_open = if is_start {
            n_open + 1
        } else {
            n_open.checked_sub(1)?
        };
        if n_open == 0 && start < text.len() {
            ranges.push(start..text.len());
        }
        rest = &rest[at + START.len_utf8()..];
    }
    text.push_str(rest);
    (n_open == 0).then_some((text, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_the_text_without_marks() {
        let marked = "a\u{fdd0}é\u{fdd0}b\u{fdd1}c\u{fdd1}d\u{fdd0}\u{fdd1}\u{fdd0}e\u{fdd1}";
        assert_eq!(taken(marked), Some(("aébcde".into(), vec![1..5, 6..7])));
        assert_eq!(taken("a\u{fdd0}b"), None);
        assert_eq!(taken("a\u{fdd1}b\u{fdd0}"), None);
        assert_eq!(taken(""), Some((String::new(), vec![])));
    }
}
