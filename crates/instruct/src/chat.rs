use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use jiff::civil::DateTime;
use minijinja::Value;
use models::SpecialTokens;
use serde_json::{Map, Value as Json};

use crate::jinja::{self, Templates};
use crate::records::kind;
use crate::{Error, Piece, Record, RecordError, Result};

mod messages;
#[cfg(test)]
mod tests;

use messages::{Message, Messages};

const CHAT: &str = "chat";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The chat template of a model.
///
/// A conversation is a list of turns in a field of the record: `messages` or `conversations`, another
/// usual name (`dialog`, `turns`, ..), or the only field that holds turns. A turn is told by its keys:
/// `role` and `content`, ShareGPT's `from` and `value`, `speaker`, `author`, `text` and the like, a pair
/// like `{"human": .., "assistant": ..}`, or, under a usual name, a text of the user and of the assistant
/// in turn. `human`, `gpt` and similar names become the roles that templates have. A field `system` is the
/// first message, `prompt` and `completion` are one conversation whose second part is learned, and a
/// message with `weight` 0 or `train` false is not learned. `tools` and `documents`, calls of tools and
/// turns of tools are refused unless the template has them.
///
/// The targets are the assistant's messages with the tokens that end a turn: everything by which the
/// rendered conversation up to a message is longer than the prompt for that message
/// (`add_generation_prompt`). In a template with `generation` blocks, the whole conversation is rendered
/// and the targets are the tokens of which a part is in one, as in transformers'
/// `return_assistant_tokens_mask`.
///
/// Templates render as in Jinja2 with the settings of transformers; what this engine cannot do is an
/// error. `strftime_now` is undefined without [`Chat::with_now`]. What a template does is bounded,
/// whoever wrote it: a rendering takes at most 300,000 steps (an instruction, or 64 bytes that are made or
/// looked at) and one for each byte of the messages, or else gives [`RecordError::Limit`].
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

    /// Defines `strftime_now` in the template, as of a time that is given: today, or a fixed one with
    /// which the tokens of a record are the same every day.
    ///
    /// # Examples
    /// ```
    /// use instruct::Chat;
    /// use models::SpecialTokens;
    ///
    /// let source = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}";
    /// let chat = Chat::new(source, &SpecialTokens::default())?;
    /// let chat = chat.with_now(jiff::civil::date(2024, 7, 26).at(0, 0, 0, 0));
    /// assert_eq!(chat.prompt("Hello?")?, "26 Jul 2024: Hello?");
    /// # Ok::<(), instruct::Error>(())
    /// ```
    pub fn with_now(mut self, now: DateTime) -> Self {
        self.templates.set_now(now);
        self
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
        let Messages {
            messages,
            variables,
        } = self.messages(&record)?;
        self.render(&record, &messages, &variables, true)
    }

    fn messages(&self, record: &Record) -> Result<Messages> {
        let asked = Asked {
            templates: &self.templates,
            variables: self.templates.used(CHAT),
        };
        Messages::of(record, &asked)
    }

    /// Whether the template marks what is learned.
    pub(crate) fn has_marks(&self) -> bool {
        self.templates.has_marks(CHAT)
    }

    /// The text of a conversation: the whole of it if the template marks what is learned, or else up to
    /// the assistant's last message.
    pub(crate) fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        let messages = self.messages(record)?;
        if self.has_marks() {
            return self.marked_pieces(record, &messages);
        }
        let Messages {
            messages,
            variables,
        } = &messages;
        let mut pieces = Vec::new();
        let mut text = String::new();
        let unstable = |message| record.refuse(RecordError::PrefixUnstable { message });
        for (at, _) in messages.iter().enumerate().filter(|(_, m)| m.is_target) {
            let prompt = self.render(record, &messages[..at], variables, true)?;
            let answered = self.render(record, &messages[..=at], variables, false)?;
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
        let last = messages.iter().rposition(|message| message.is_target);
        if let Some(last) = last
            && self.always_prompts(record, &messages[..=last], variables, &text)?
        {
            return Err(unstable(last));
        }
        Ok(pieces)
    }

    /// The pieces of a text in which `generation` blocks mark the targets.
    fn marked_pieces(&self, record: &Record, messages: &Messages) -> Result<Vec<Piece>> {
        let context = self.context(&messages.messages, &messages.variables, false);
        let marked = self.templates.render_marked(CHAT, context);
        let (text, targets) = marked.map_err(|problem| record.refuse(problem))?;
        let (mut pieces, mut done) = (Vec::new(), 0);
        for target in targets {
            for (range, is_target) in [(done..target.start, false), (target.clone(), true)] {
                let text = text[range].to_owned();
                pieces.push(Piece { text, is_target });
            }
            done = target.end;
        }
        pieces.push(Piece {
            text: text[done..].to_owned(),
            is_target: false,
        });
        Ok(pieces)
    }

    /// Whether `text`, of messages that end with the assistant's, ends with a prompt for the next one.
    ///
    /// Such a prompt would become a target (LLaMA 3's first template). A template that ignores
    /// `add_generation_prompt` either has no such prompt or always adds it; a further message of the
    /// user tells the two apart.
    fn always_prompts(
        &self,
        record: &Record,
        messages: &[Message],
        variables: &[Variable],
        text: &str,
    ) -> Result<bool> {
        let [before @ .., _] = messages else {
            return Ok(false);
        };
        let prompt = self.render(record, before, variables, true)?;
        if prompt != self.render(record, before, variables, false)? {
            return Ok(false);
        }
        let user = jinja::value(&serde_json::json!({"role": "user", "content": "?"}));
        let mut messages = messages.to_vec();
        messages.push(Message {
            is_target: false,
            value: user,
        });
        let rendered = self.render(record, &messages, variables, false)?;
        Ok(!rendered.starts_with(text))
    }

    fn render(
        &self,
        record: &Record,
        messages: &[Message],
        variables: &[Variable],
        prompt: bool,
    ) -> Result<String> {
        let context = self.context(messages, variables, prompt);
        let rendered = self.templates.render(CHAT, context);
        rendered.map_err(|problem| record.refuse(problem))
    }

    /// The variables of the template.
    fn context(&self, messages: &[Message], variables: &[Variable], prompt: bool) -> Value {
        let mut context = self.special.clone();
        let messages: Value = messages.iter().map(|message| &message.value).collect();
        context.insert("messages".into(), messages);
        context.insert("add_generation_prompt".into(), prompt.into());
        // Templates test whether these are none, not whether they are defined.
        context.insert("tools".into(), ().into());
        context.insert("documents".into(), ().into());
        let variables = variables.iter().cloned();
        context.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        Value::from(context)
    }
}

/// A variable that a record gives to the template.
type Variable = (&'static str, Value);

/// What the template asks of a record.
struct Asked<'a> {
    templates: &'a Templates,
    /// The variables that it uses.
    variables: &'a HashSet<String>,
}

impl Asked<'_> {
    /// Whether the template has a name or a string in its tags.
    fn mentions(&self, what: &str) -> bool {
        self.templates.mentions(CHAT, what)
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
