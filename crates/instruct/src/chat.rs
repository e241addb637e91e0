use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::Value;
use models::SpecialTokens;
use serde_json::{Map, Value as Json};

use crate::jinja::{self, Templates};
use crate::records::kind;
use crate::{Error, Piece, Record, RecordError, Result};

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
/// `strftime_now` is undefined. What a template does is bounded, whoever wrote it: a rendering takes at
/// most 300,000 steps (an instruction, or 64 bytes that are made or looked at) and one for each byte of
/// the messages, or else gives [`RecordError::Limit`].
#[derive(Clone, Debug)]
pub struct Chat {
    templates: Templates,
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
        if !tensor_files::is_there(&path) {
            let (path, source) = in_config(dir)?;
            return Self::of_file(&path, &source, special);
        }
        let source = String::from_utf8(tensor_files::read(&path)?).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let before = &error.as_bytes()[..at];
            let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
            let problem = format!("line {line} is not UTF-8, at byte {at} of the file");
            let path = path.clone();
            tensor_files::Error::File { path, problem }
        })?;
        Self::of_file(&path, &source, special)
    }

    /// Parses a chat template whose errors name its file.
    fn of_file(path: &Path, source: &str, special: &SpecialTokens) -> Result<Self> {
        let place = format!("`{}`", path.display());
        let mut chat = Self::new(source, special).map_err(|error| match error {
            Error::Template {
                template,
                line,
                problem,
            } => Error::Template {
                template,
                line,
                problem: format!("{problem}, in {place}"),
            },
            other => other,
        })?;
        chat.templates.place = place;
        Ok(chat)
    }

    /// Parses a chat template.
    ///
    /// # Errors
    /// [`Error::Template`] if it does not parse, has more than 128 KiB, or more than 1024 tokens between
    /// two delimiters; [`models::TextError::MissingSpecial`] if it uses a special token that the model
    /// does not state.
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
        let templates = Templates::for_chats(CHAT, source)?;
        let used = templates.used(CHAT);
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
            templates,
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
        let rendered = self.templates.render(CHAT, Value::from(context));
        rendered.map_err(|problem| record.refuse(problem))
    }
}

/// The template in `tokenizer_config.json`, with the path of the file.
fn in_config(dir: &Path) -> Result<(PathBuf, String)> {
    let none = || Error::NoChatTemplate { dir: dir.into() };
    let path = dir.join(TOKENIZER_CONFIG);
    if !tensor_files::is_there(&path) {
        return Err(none());
    }
    let config: Map<String, Json> = tensor_files::read_json(&path)?;
    let problem = match config.get("chat_template") {
        Some(Json::String(source)) => return Ok((path, source.clone())),
        None | Some(Json::Null) => return Err(none()),
        Some(Json::Array(named)) => {
            let default = named.iter().find(|named| named["name"] == "default");
            match default.and_then(|named| named["template"].as_str()) {
                Some(source) => return Ok((path, source.into())),
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
