use std::path::PathBuf;

/// Instruction data or a template that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or a directory.
    #[error(transparent)]
    File(#[from] tensor_files::Error),
    /// A model, its tokenizer or its directory.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// A batch.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// A path that leads to no file, such as a directory or a pipe.
    #[error("`{path}` is {found}, where a file was expected")]
    NotFile {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A file that stands in for data, or holds it in another form.
    #[error("`{path}` is {found}, where records in JSON were expected; {advice}")]
    NotRecords {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A file without a record.
    #[error("`{path}` has no records; it must have JSON objects, one a line, or an array of them")]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// A record that is not JSON.
    #[error(
        "`{path}`, line {line}, column {column}: {problem}; a file has one JSON object a line, or an array of objects"
    )]
    NotJson {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column in bytes, counted from 1.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A record that has no named fields.
    #[error("`{path}`, line {line}: {found}, where an object with named fields was expected")]
    NotObject {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is there.
        found: &'static str,
    },
    /// A line that is not UTF-8.
    #[error("`{path}`, line {line}, column {column}: not UTF-8; save the file in that encoding")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column in bytes, counted from 1.
        column: usize,
    },
    /// A record of a length that no text has.
    #[error(
        "`{path}`, line {line}: a record of more than {max} bytes; is each record on a line of its own?"
    )]
    LongRecord {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The bytes that a record may have.
        max: usize,
    },
    /// A record without a field that the template names.
    #[error("`{path}`, line {line}: no field `{field}`, which the template names; there {}", fields(.found))]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The field.
        field: String,
        /// The fields that are there.
        found: Vec<String>,
    },
    /// A field of a record that is not what the template takes.
    #[error("`{path}`, line {line}: `{field}` {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A template that cannot be read.
    #[error("the {template} template, line {line}: {problem}")]
    BadTemplate {
        /// Which one.
        template: &'static str,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A template that does not take a record.
    #[error("`{path}`, line {line}: the {template} template does not take it: {problem}")]
    Render {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// Which template.
        template: &'static str,
        /// What it said.
        problem: String,
    },
    /// A chat template that renders the same messages otherwise when more follow.
    #[error(
        "`{path}`, line {line}: the chat template is not prefix-stable at message {message}: its text changes with what follows, so that what is learned would not be what is asked for; end the conversation before it, or correct the template"
    )]
    PrefixUnstable {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The assistant's message, counted from 0.
        message: usize,
    },
    /// A model without a chat template.
    #[error(
        "`{dir}` has no chat template, neither `chat_template.jinja` nor `chat_template` in `tokenizer_config.json`; take the one that the model was trained with, or templates for the fields of a record"
    )]
    NoChatTemplate {
        /// The directory.
        dir: PathBuf,
    },
    /// An example of more tokens than are allowed.
    #[error(
        "`{path}`, line {line}: {n_tokens} tokens, more than the {max_len} that are allowed; leave such records out, have them cut, or allow more"
    )]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// Its tokens.
        n_tokens: usize,
        /// Tokens that are allowed.
        max_len: usize,
    },
    /// Records none of which has anything to learn.
    #[error(
        "nothing is left to learn of {n_records} records: {n_too_long} are longer than {max_len} tokens, {n_without_targets} have no token to be learned in the first {max_len}; allow more tokens, or look at the template"
    )]
    NoExamples {
        /// Records that there were.
        n_records: usize,
        /// Those left out for their length.
        n_too_long: usize,
        /// Those without a token to be learned.
        n_without_targets: usize,
        /// Tokens that are allowed.
        max_len: usize,
    },
    /// An example that no row holds.
    #[error(
        "example {example} has {n_tokens} tokens, more than a row of {seq_len}; encode with a limit of {seq_len}"
    )]
    LongExample {
        /// The example, counted from 0.
        example: usize,
        /// Its tokens.
        n_tokens: usize,
        /// Tokens of a row.
        seq_len: usize,
    },
}

fn fields(found: &[String]) -> String {
    match found {
        [] => "are none".into(),
        [one] => format!("is `{one}`"),
        several => format!("are `{}`", several.join("`, `")),
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
