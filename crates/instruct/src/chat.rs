use std::collections::BTreeMap;
use std::path::Path;

use minijinja::{Environment, Value};
use models::SpecialTokens;
use serde_json::{Map, Value as Json};

use crate::records::kind;
use crate::{Error, Piece, Record, RecordError, Result, jinja};

mod messages;
#[cfg(test)]
mod tests;

use messages::{Message, messages};

const CHAT: &str = "chat";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The chat template of a model.
///
/// Records have `messages`, each with a `role` and a `content`, or ShareGPT's `conversations`, each
/// with `from` (`system`, `human`, `gpt`) and `value`. The targets are the assistant's messages with
/// the tokens that end a turn: everything by which the rendered conversation up to a message is longer
/// than the prompt for that message (`add_generation_prompt`).
///
/// Templates render as in transformers, except that tools and documents are refused and
/// `strftime_now` is undefined. A template that does not terminate is stopped with an error.
#[derive(Clone, Debug)]
pub struct Chat {
    jinja: Environment<'static>,
    special: BTreeMap<String, Value>,
}

impl Chat {
    /// Reads the chat template in the directory of a model.
    ///
    /// It is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`: a string, or
    /// the entry named `default` of a list.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] without either; [`models::ConfigError::Setting`] for another
    /// `chat_template`; [`Error::File`] if a file cannot be read; as [`Chat::new`].
    pub fn open(dir: &Path, special: &SpecialTokens) -> Result<Self> {
        let path = dir.join(CHAT_TEMPLATE);
        let source = if tensor_files::is_there(&path) {
            let source = String::from_utf8(tensor_files::read(&path)?);
            source.map_err(|_| tensor_files::Error::File {
                path,
                problem: "is not UTF-8".into(),
            })?
        } else {
            in_config(dir)?
        };
        Self::new(&source, special)
    }

    /// Parses a chat template.
    ///
    /// # Errors
    /// [`Error::Template`] if it does not parse; [`models::TextError::MissingSpecial`] if it uses a
    /// special token that the model does not state.
    ///
    /// # Examples
    /// ```
    /// use instruct::{Chat, Error};
    /// use models::{SpecialTokens, TextError};
    ///
    /// let special = SpecialTokens::default();
    /// let chat = Chat::new("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", &special)?;
    /// assert_eq!(chat.prompt("Hello?")?, "user: Hello?\n");
    ///
    /// let error = Chat::new("{{ bos_token }}", &special).unwrap_err();
    /// assert!(matches!(error, Error::Model(models::Error::Text(TextError::MissingSpecial { .. }))));
    /// # Ok::<(), instruct::Error>(())
    /// ```
    pub fn new(source: &str, special: &SpecialTokens) -> Result<Self> {
        let mut jinja = jinja::for_chats();
        let source = without_generation_marks(source);
        let added = jinja.add_template_owned(CHAT, source);
        added.map_err(|error| jinja::refuse(CHAT, &error))?;
        let template = jinja.get_template(CHAT).expect("it was added");
        let used = template.undeclared_variables(false);
        let mut texts = BTreeMap::new();
        for (name, token) in special.named() {
            if let Some(token) = token {
                texts.insert(name.to_owned(), Value::from(token.text.as_str()));
            } else if used.contains(name) {
                let needed_by = "the chat template".into();
                let error = models::TextError::MissingSpecial { name, needed_by };
                return Err(models::Error::from(error).into());
            }
        }
        Ok(Self {
            jinja,
            special: texts,
        })
    }

    /// The prompt for the assistant's answer to one message of a user.
    ///
    /// # Errors
    /// [`Error::Record`] if the template cannot render it.
    pub fn prompt(&self, message: &str) -> Result<String> {
        let messages = serde_json::json!([{"role": "user", "content": message}]);
        let record = Record {
            fields: [("messages".into(), messages)].into_iter().collect(),
            path: Path::new("the message").into(),
            line: 1,
        };
        self.render(&record, &messages::messages(&record)?, true)
    }

    /// The text of a conversation up to the assistant's last message.
    pub(crate) fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        let messages = messages(record)?;
        let mut pieces = Vec::new();
        let mut text = String::new();
        let unstable = |message| record.refuse(RecordError::PrefixUnstable { message });
        for (at, _) in messages.iter().enumerate().filter(|(_, m)| m.is_assistant) {
            let prompt = self.render(record, &messages[..at], true)?;
            let answered = self.render(record, &messages[..=at], false)?;
            let added = prompt.strip_prefix(&text);
            let answer = answered.strip_prefix(&prompt);
            let (Some(added), Some(answer)) = (added, answer) else {
                return Err(unstable(at));
            };
            for (text, is_target) in [(added, false), (answer, true)] {
                let text = text.to_owned();
                pieces.push(Piece { text, is_target });
            }
            text = answered;
        }
        let last = messages.iter().rposition(|message| message.is_assistant);
        if let Some(last) = last
            && self.always_prompts(record, &messages[..=last], &text)?
        {
            return Err(unstable(last));
        }
        Ok(pieces)
    }

    /// Whether `text`, of messages that end with the assistant's, ends with a prompt for the next one.
    ///
    /// Such a prompt would become a target (LLaMA 3's first template). A template that ignores
    /// `add_generation_prompt` either has no such prompt or always adds it; a further message of the
    /// user tells the two apart.
    fn always_prompts(&self, record: &Record, messages: &[Message], text: &str) -> Result<bool> {
        let [before @ .., _] = messages else {
            return Ok(false);
        };
        if self.render(record, before, true)? != self.render(record, before, false)? {
            return Ok(false);
        }
        let user = jinja::value(&serde_json::json!({"role": "user", "content": "?"}));
        let mut messages = messages.to_vec();
        messages.push(Message {
            is_assistant: false,
            value: user,
        });
        Ok(!self.render(record, &messages, false)?.starts_with(text))
    }

    fn render(&self, record: &Record, messages: &[Message], prompt: bool) -> Result<String> {
        let mut context = self.special.clone();
        let messages: Value = messages.iter().map(|message| &message.value).collect();
        context.insert("messages".into(), messages);
        context.insert("add_generation_prompt".into(), prompt.into());
        // Templates test whether these are none, not whether they are defined.
        context.insert("tools".into(), ().into());
        context.insert("documents".into(), ().into());
        let template = self.jinja.get_template(CHAT).expect("it was added");
        template.render(Value::from(context)).map_err(|error| {
            let problem = jinja::problem(&error);
            let template = CHAT;
            record.refuse(RecordError::Render { template, problem })
        })
    }
}

/// The template in `tokenizer_config.json`.
fn in_config(dir: &Path) -> Result<String> {
    let none = || Error::NoChatTemplate { dir: dir.into() };
    let path = dir.join(TOKENIZER_CONFIG);
    if !tensor_files::is_there(&path) {
        return Err(none());
    }
    let config: Map<String, Json> = tensor_files::read_json(&path)?;
    let problem = match config.get("chat_template") {
        Some(Json::String(source)) => return Ok(source.clone()),
        None | Some(Json::Null) => return Err(none()),
        Some(Json::Array(named)) => {
            let default = named.iter().find(|named| named["name"] == "default");
            match default.and_then(|named| named["template"].as_str()) {
                Some(source) => return Ok(source.into()),
                None => "has none named `default`".into(),
            }
        }
        Some(other) => format!("is {}, expected a string or an array", kind(other)),
    };
    Err(models::Error::Config(models::ConfigError::Setting {
        path,
        setting: "chat_template".into(),
        problem,
    })
    .into())
}

/// Replaces transformers' `generation` blocks, which mark the assistant's messages, by `with` blocks.
///
/// Both have a scope of their own.
fn without_generation_marks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        plain.push_str(before);
        let inner = tag.split("%}").next().unwrap_or(tag);
        let mark = inner
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+']);
        let instead = match mark.trim() {
            "generation" => "with",
            "endgeneration" => "endwith",
            other => other,
        };
        plain.push_str(&inner.replacen(mark.trim(), instead, 1));
        rest = &tag[inner.len()..];
    }
    plain + rest
}
