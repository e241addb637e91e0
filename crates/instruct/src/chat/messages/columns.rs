//! The fields of a record that hold its conversation.

use std::borrow::Cow;

use serde_json::Value as Json;

use super::is_turn;
use crate::{Record, RecordError, Result};

/// Names of fields that hold conversations, the most usual ones first.
const NAMES: [&str; 10] = [
    "messages",
    "conversations",
    "conversation",
    "dialog",
    "dialogue",
    "dialogs",
    "turns",
    "chat",
    "thread",
    "data",
];

/// A field that holds turns.
pub(super) struct Column<'a> {
    pub(super) name: &'a str,
    pub(super) turns: Cow<'a, Json>,
    /// Whether the assistant's turns are learned.
    pub(super) is_learned: bool,
    /// Whether turns may be texts, of the user and of the assistant in turn.
    pub(super) is_of_texts: bool,
}

/// The fields whose turns are a conversation, one after the other.
pub(super) struct Conversation<'a> {
    pub(super) columns: Vec<Column<'a>>,
}

impl<'a> Conversation<'a> {
    /// Finds the conversation of a record.
    ///
    /// It is the field `messages` or `conversations`, or the first of the other usual names that holds
    /// turns, or `prompt` with `completion`, or else the only field that holds turns.
    pub(super) fn of(record: &'a Record) -> Result<Self> {
        let mut found = Vec::new();
        for (name, value) in &record.fields {
            let rank = NAMES.iter().position(|known| known == name);
            let turns = match rank {
                Some(0 | 1) => parsed(record, name, value)?,
                Some(_) => parsed(record, name, value).unwrap_or(Cow::Borrowed(value)),
                None => Cow::Borrowed(value),
            };
            let is_of_texts = rank.is_some();
            let is_usual = matches!(rank, Some(0 | 1)) && !value.is_null();
            if is_usual || holds_turns(&turns, is_of_texts) {
                let column = Column {
                    name,
                    turns,
                    is_learned: true,
                    is_of_texts,
                };
                found.push((rank, column));
            }
        }
        if let Some(rank) = found.iter().filter_map(|(rank, _)| *rank).min() {
            let columns = found.into_iter().filter(|(found, _)| *found == Some(rank));
            let columns = columns.map(|(_, column)| column).collect();
            return Ok(Self { columns });
        }
        let mut columns: Vec<Column> = found.into_iter().map(|(_, column)| column).collect();
        columns.sort_by_key(|column| column.name != "prompt");
        match columns.as_mut_slice() {
            [] => Err(record.refuse_without("messages")),
            [_] => Ok(Self { columns }),
            [prompt, completion] if [prompt.name, completion.name] == ["prompt", "completion"] => {
                prompt.is_learned = false;
                Ok(Self { columns })
            }
            [first, others @ ..] => {
                let others: Vec<_> = others.iter().map(|column| column.name).collect();
                let problem = format!(
                    "is a conversation, and so is `{}`; name the one to learn `messages`",
                    others.join("`, `")
                );
                let field = first.name.to_owned();
                Err(record.refuse(RecordError::Field { field, problem }))
            }
        }
    }
}

fn holds_turns(value: &Json, may_be_texts: bool) -> bool {
    let Some(turns) = value.as_array() else {
        return false;
    };
    let is_text = |turn: &Json| may_be_texts && turn.is_string();
    turns
        .first()
        .is_some_and(|turn| is_turn(turn) || is_text(turn))
}

/// A value, or what the JSON of an array in a string says, as tables hold it.
pub(super) fn parsed<'a>(record: &Record, name: &str, value: &'a Json) -> Result<Cow<'a, Json>> {
    let Some(text) = value
        .as_str()
        .filter(|text| text.trim_start().starts_with('['))
    else {
        return Ok(Cow::Borrowed(value));
    };
    serde_json::from_str(text).map(Cow::Owned).map_err(|error| {
        let problem = format!("is a string that is no JSON: {error}");
        record.refuse_field(name, problem)
    })
}
