use std::path::PathBuf;

/// An error of instruction data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] tensor_files::Error),
    /// A tokenizer or a special token of a model.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// Rows that make no batch.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// A path or a file that does not hold JSON records.
    #[error("`{path}` is {found}, expected records; {advice}")]
    NotRecords {
        /// The path.
        path: PathBuf,
        /// The kind of file that was found.
        found: &'static str,
        /// How to get the records.
        advice: &'static str,
    },
    /// A file without records.
    #[error(
        "`{path}` has no records; expected one JSON object per line, an array of objects, or a table with rows"
    )]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// A record that cannot be used.
    #[error("`{path}`, line {line}: {problem}")]
    Record {
        /// The file.
        path: PathBuf,
        /// The line on which the record begins, counted from 1.
        line: usize,
        /// The reason.
        problem: RecordError,
    },
    /// A template that does not parse.
    #[error("the {template} template, line {line}: {problem}")]
    Template {
        /// The name of the template.
        template: &'static str,
        /// The line of the template, counted from 1.
        line: usize,
        /// The reason.
        problem: String,
    },
    /// A model without a chat template.
    #[error(
        "`{dir}` has no chat template: neither `chat_template.jinja` nor `chat_template` in `tokenizer_config.json`; add the one that the model was trained with, or use a template of fields"
    )]
    NoChatTemplate {
        /// The directory of the model.
        dir: PathBuf,
    },
    /// Records that leave no example with a target.
    #[error(
        "none of {n_records} records gives a target: {n_too_long} have more than {max_len} tokens, {n_without_targets} have no target in their first {max_len} tokens; raise the limit, or check the template"
    )]
    NoExamples {
        /// The number of records.
        n_records: usize,
        /// Records left out for their length.
        n_too_long: usize,
        /// Records left out because they have no target.
        n_without_targets: usize,
        /// The limit in tokens.
        max_len: usize,
    },
    /// A token that is in no vocabulary.
    #[error("token {token} is in no vocabulary: tokens are below 2^31")]
    Token {
        /// The token.
        token: u32,
    },
    /// An example that is longer than a row.
    #[error(
        "example {example} has {n_tokens} tokens, more than a row of {seq_len}; encode with a limit of {seq_len}"
    )]
    LongExample {
        /// The index of the example.
        example: usize,
        /// Its length in tokens.
        n_tokens: usize,
        /// The length of a row in tokens.
        seq_len: usize,
    },
}

/// The reason why a record cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Text that is not JSON.
    #[error(
        "invalid JSON at column {column}: {problem}; expected one JSON object per line, or an array of objects"
    )]
    NotJson {
        /// The column in bytes, counted from 1.
        column: usize,
        /// The reason.
        problem: String,
    },
    /// A JSON value other than an object.
    #[error("expected an object with named fields, found {found}")]
    NotObject {
        /// The kind of value that was found.
        found: &'static str,
    },
    /// Bytes that are not UTF-8.
    #[error("invalid UTF-8 at column {column}, byte {offset} of the file; save it as UTF-8")]
    NotUtf8 {
        /// The column in bytes, counted from 1.
        column: usize,
        /// The offset in the file in bytes, counted from 0.
        offset: usize,
    },
    /// A row of a table that cannot be read.
    #[error("{problem}")]
    Row {
        /// The reason.
        problem: String,
    },
    /// A record of more bytes than are read.
    #[error("the record has more than {max} bytes")]
    TooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// A missing field.
    #[error("no field `{field}`, which the template uses; the record has {}", fields(.found))]
    MissingField {
        /// The field.
        field: String,
        /// The fields of the record.
        found: Vec<String>,
    },
    /// A field with a value that the template does not take.
    #[error("`{field}` {problem}")]
    Field {
        /// The field.
        field: String,
        /// The reason.
        problem: String,
    },
    /// An error while a template was rendered.
    #[error("cannot render the {template} template: {problem}")]
    Render {
        /// The name of the template.
        template: &'static str,
        /// The reason.
        problem: String,
    },
    /// A template that does more, or makes more, than its input can ask for.
    #[error("the {template} template is stopped: {problem}")]
    Limit {
        /// The name of the template.
        template: &'static str,
        /// The limit: of steps, of the size of a value, or of its depth.
        problem: String,
    },
    /// A chat template that renders a message differently when more follow.
    #[error(
        "the chat template is not prefix-stable at message {message}: its text depends on the messages after it, so its targets are not those of a conversation that ends there; end the conversation before it, or correct the template"
    )]
    PrefixUnstable {
        /// The index of the assistant's message.
        message: usize,
    },
    /// An example of more tokens than the limit.
    #[error(
        "{n_tokens} tokens, more than the limit of {max_len}; drop or cut such records, or raise the limit"
    )]
    TooLong {
        /// The length of the example in tokens.
        n_tokens: usize,
        /// The limit in tokens.
        max_len: usize,
    },
}

fn fields(found: &[String]) -> String {
    if found.is_empty() {
        return "no fields".into();
    }
    format!("`{}`", found.join("`, `"))
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
