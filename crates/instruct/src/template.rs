use std::path::Path;

use models::SpecialTokens;

use crate::{Chat, Fields, Piece, Record, Result};

/// A template that renders a record as text.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Template {
    /// A prompt and a completion, rendered from the fields of a record.
    Fields(Fields),
    /// A conversation, rendered by the chat template of a model.
    Chat(Chat),
}

impl Template {
    /// A template of a prompt and of a completion; the tokens of the completion are targets.
    ///
    /// Both are Jinja templates over the fields of a record. A space between prompt and completion
    /// belongs to the completion, as most tokenizers join it to the word after it.
    ///
    /// # Errors
    /// [`Error::Template`](crate::Error::Template) if one of them does not parse.
    ///
    /// # Examples
    /// ```
    /// use instruct::{Error, Template};
    ///
    /// let template = Template::fields("Q: {{ question }}\nA:", " {{ answer }}");
    /// assert!(template.is_ok());
    ///
    /// let unclosed = Template::fields("Q: {{ question", " {{ answer }}");
    /// assert!(matches!(unclosed, Err(Error::Template { template: "prompt", line: 1, .. })));
    /// ```
    pub fn fields(prompt: &str, completion: &str) -> Result<Self> {
        Fields::new(prompt, completion).map(Self::Fields)
    }

    /// The template of Stanford Alpaca, for records with `instruction`, `output` and optionally
    /// `input`.
    ///
    /// Source: <https://github.com/tatsu-lab/stanford_alpaca>, `PROMPT_DICT` in `train.py`.
    pub fn alpaca() -> Self {
        let prompt = concat!(
            "Below is an instruction that describes a task",
            "{% if input is defined and input %}",
            ", paired with an input that provides further context",
            "{% endif %}. ",
            "Write a response that appropriately completes the request.\n\n",
            "### Instruction:\n{{ instruction }}\n\n",
            "{% if input is defined and input %}### Input:\n{{ input }}\n\n{% endif %}",
            "### Response:",
        );
        Self::fields(prompt, "{{ output }}").expect("the template is valid")
    }

    /// The template of GSM8K (Cobbe et al. 2021, arXiv:2110.14168), for records with `question` and
    /// `answer`.
    pub fn gsm8k() -> Self {
        let fields = Self::fields("Question: {{ question }}\nAnswer:", " {{ answer }}");
        fields.expect("the template is valid")
    }

    /// The chat template in the directory of a model.
    ///
    /// # Errors
    /// As [`Chat::open`].
    pub fn chat(dir: &Path, special: &SpecialTokens) -> Result<Self> {
        Chat::open(dir, special).map(Self::Chat)
    }

    /// Renders a record as the pieces of one text.
    ///
    /// # Errors
    /// [`Error::Record`](crate::Error::Record) if the record lacks a field, a field has a value that
    /// the template does not take, or rendering fails.
    pub fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        match self {
            Self::Fields(fields) => fields.pieces(record),
            Self::Chat(chat) => chat.pieces(record),
        }
    }

    /// Whether a token is a target as soon as a part of it is in a piece that is one.
    pub(crate) fn marks_targets(&self) -> bool {
        matches!(self, Self::Chat(chat) if chat.has_marks())
    }

    /// Whether the rendered text includes the tokens that begin and end it.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self, Self::Chat(_))
    }
}
