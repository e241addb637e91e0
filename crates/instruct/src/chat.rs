use std::collections::BTreeMap;
use std::path::Path;

use minijinja::{Environment, Value};
use models::SpecialTokens;
use serde_json::{Map, Value as Json};

use crate::records::kind;
use crate::template::bad_template;
use crate::{Error, Piece, Record, Result, jinja};

mod messages;
#[cfg(test)]
mod tests;

use messages::{Message, messages};

const CHAT: &str = "chat";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A model's chat template.
///
/// Records have `messages`, each with a `role` and a `content`, or ShareGPT's `conversations`, each
/// with `from` (`system`, `human`, `gpt`) and `value`. What the assistant says is learned, with
/// what ends its turn: that by which a text up to the message is longer than the prompt for it
/// (`add_generation_prompt`).
///
/// Rendered as transformers does it, but without tools and documents, which are refused, and
/// without the clock (`strftime_now`). Every template comes to an end, or is stopped.
#[derive(Clone, Debug)]
pub struct Chat {
    jinja: Environment<'static>,
    special: BTreeMap<String, Value>,
}

impl Chat {
    /// The template of a model's directory.
    ///
    /// It is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`: a text, or
    /// the one named `default` of several.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`], or those of [`Chat::new`].
    pub fn open(dir: &Path, special: &SpecialTokens) -> Result<Self> {
        let path = dir.join(CHAT_TEMPLATE);
        let source = match tensor_files::is_there(&path) {
            true => String::from_utf8(tensor_files::read(&path)?).map_err(|_| Error::NotUtf8 {
                path: path.clone(),
                line: 1,
                column: 1,
            })?,
            false => in_config(dir)?,
        };
        Self::new(&source, special)
    }

    /// The template of a text.
    ///
    /// # Errors
    /// [`Error::BadTemplate`] if it cannot be read, [`models::Error::MissingSpecial`] if it puts a special
    /// token that is not stated.
    pub fn new(source: &str, special: &SpecialTokens) -> Result<Self> {
        let mut jinja = jinja::for_chats();
        let source = without_generation_marks(source);
        let added = jinja.add_template_owned(CHAT, source);
        added.map_err(|error| bad_template(CHAT, &error))?;
        let template = jinja.get_template(CHAT).expect("it was added");
        let named = template.undeclared_variables(false);
        let mut texts = BTreeMap::new();
        for (name, token) in special.named() {
            if let Some(token) = token {
                texts.insert(name.to_owned(), Value::from(token.text.as_str()));
            } else if named.contains(name) {
                return Err(models::Error::MissingSpecial {
                    name,
                    needed_by: "the chat template".into(),
                }
                .into());
            }
        }
        Ok(Self {
            jinja,
            special: texts,
        })
    }

    /// The text after which the assistant answers one message of a user.
    ///
    /// # Errors
    /// [`Error::Render`] if the template does not take it.
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
        let unstable = |message| Error::PrefixUnstable {
            path: record.path.to_path_buf(),
            line: record.line,
            message,
        };
        for (at, _) in messages.iter().enumerate().filter(|(_, m)| m.is_assistant) {
            let prompt = self.render(record, &messages[..at], true)?;
            let answered = self.render(record, &messages[..=at], false)?;
            let added = prompt.strip_prefix(&text);
            let learned = answered.strip_prefix(&prompt);
            let (Some(added), Some(learned)) = (added, learned) else {
                return Err(unstable(at));
            };
            for (text, learn) in [(added, false), (learned, true)] {
                let text = text.to_owned();
                pieces.push(Piece { text, learn });
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

    /// Whether the text of some messages, the last of which is the assistant's, ends with a prompt
    /// for the next, which would be learned as an end of its turn (LLaMA 3's first template).
    ///
    /// There may be two reasons why a template does not look at `add_generation_prompt`: it has no
    /// such prompt, or always has it. What a user says next tells them apart.
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
        // Templates ask whether they are none, not whether they are defined.
        context.insert("tools".into(), ().into());
        context.insert("documents".into(), ().into());
        let template = self.jinja.get_template(CHAT).expect("it was added");
        template
            .render(Value::from(context))
            .map_err(|error| Error::Render {
                path: record.path.to_path_buf(),
                line: record.line,
                template: CHAT,
                problem: jinja::problem(&error),
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
        Some(other) => format!("is {}, where a text or a list was expected", kind(other)),
    };
    Err(models::Error::Config {
        path,
        setting: "chat_template".into(),
        problem,
    }
    .into())
}

/// Puts blocks without an effect where transformers marks what the assistant says.
///
/// A `with` has a scope of its own, as the marked block has there.
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
