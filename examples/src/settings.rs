//! The options of a program in a TOML file.
//!
//! Its keys are the names of the options without their dashes. They are put before the command line, as
//! options, where that does not have them, so that the parser of the command line is the only one.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, Parser};
use toml::{Table, Value};

use crate::outcome::Result;
use crate::{eprintln, texts};

/// The version of the files.
const VERSION: i64 = 1;

/// The option that names a file.
const CONFIG: &str = "config";

/// Options that do not change a result, and are not kept with it.
const NOT_KEPT: [&str; 3] = [CONFIG, "out", "resume"];

/// The options of a run, by their names.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings(Table);

/// Parses the command line, and before it the options in the file of its `--config`. Ends the program if
/// they are not valid, or ask for help.
///
/// The settings have the values of all options but those that say where the result goes; defaults too.
pub fn parse<A: Parser>() -> (A, Settings) {
    let words: Vec<OsString> = std::env::args_os().collect();
    let config = config(&words);
    parse_from(&words).unwrap_or_else(|error| {
        // There is no other place to say that it is closed.
        let _ = error.print();
        // An error of the file names it.
        let is_told = !error.use_stderr() || error.kind() == ErrorKind::Io;
        if let Some(config) = config.filter(|_| !is_told) {
            let config = config.display();
            eprintln!("\nThe options of `{config}` come before those of the command line.");
        }
        std::process::exit(error.exit_code())
    })
}

fn parse_from<A: Parser>(words: &[OsString]) -> std::result::Result<(A, Settings), clap::Error> {
    let mut command = A::command();
    let mut words = words.to_vec();
    if let Some(path) = config(&words) {
        let options = Settings::read(&path).and_then(|settings| {
            let options = settings.options(&command, &words);
            options.map_err(|problem| format!("`{}`: {problem}", path.display()).into())
        });
        let refuse = |error: Box<dyn std::error::Error>| -> clap::Error {
            clap::Error::raw(ErrorKind::Io, format!("{error}\n"))
        };
        let options = options.map_err(refuse)?;
        words.splice(1..1, options);
    }
    let matches = command.try_get_matches_from_mut(&words)?;
    let settings = Settings::of::<A>(&command, &words, &matches)?;
    Ok((A::from_arg_matches(&matches)?, settings))
}

/// The file that the words of a command line name.
fn config(words: &[OsString]) -> Option<PathBuf> {
    let mut words = words.iter();
    let word = words.find(|word| names(word, CONFIG))?;
    let value = word.to_str().and_then(|word| word.split_once('='));
    match value {
        Some((_, path)) => Some(path.into()),
        None => words.next().map(PathBuf::from),
    }
}

/// Whether a word of a command line is this option, with its value or before it.
fn names(word: &OsStr, option: &str) -> bool {
    let word = word.as_encoded_bytes();
    let rest = word.strip_prefix(b"--");
    let rest = rest.and_then(|word| word.strip_prefix(option.as_bytes()));
    rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'=')
}

impl Settings {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is no TOML, or is of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let refuse = |problem: String| format!("`{}`: {problem}", path.display());
        let mut table: Table = (texts::read(path)?.parse())
            .map_err(|error: toml::de::Error| refuse(error.to_string().trim_end().into()))?;
        match table.remove("version") {
            None | Some(Value::Integer(VERSION)) => Ok(Self(table)),
            Some(version) => Err(refuse(format!(
                "version {version} is not one that this program reads; it reads version {VERSION}"
            ))
            .into()),
        }
    }

    /// The text of a file.
    pub fn text(&self, about: &str) -> String {
        format!("# {about}\nversion = {VERSION}\n{}", self.0)
    }

    /// Sets the value of an option that was chosen by the program.
    pub fn set(&mut self, option: &str, value: impl Into<Value>) {
        self.0.insert(option.into(), value.into());
    }

    /// The first option but for `except` that differs, with both values: `lr` was 0.1, now it is 0.2.
    pub fn difference(&self, now: &Self, except: &[&str]) -> Option<String> {
        let keys = self.0.keys().chain(now.0.keys());
        let mut keys = keys.filter(|key| !except.contains(&key.as_str()));
        let key = keys.find(|key| self.0.get(*key) != now.0.get(*key))?;
        let value = |of: &Self| of.0.get(key).map_or("not given".into(), Value::to_string);
        Some(format!(
            "`{key}` was {}, now it is {}",
            value(self),
            value(now)
        ))
    }

    /// The options that are put before the words of a command line, which does not have them.
    fn options(
        &self,
        command: &Command,
        words: &[OsString],
    ) -> std::result::Result<Vec<OsString>, String> {
        let mut options = Vec::new();
        for (key, value) in &self.0 {
            let mut known = command.get_arguments();
            let known = known.find(|arg| arg.get_long() == Some(key) && key != CONFIG);
            let arg = known.ok_or_else(|| unknown(command, key))?;
            if !words.iter().any(|word| names(word, key)) {
                options.extend(option(arg, key, value)?);
            }
        }
        Ok(options)
    }

    /// The settings of a command that was parsed.
    fn of<A: Parser>(
        command: &Command,
        words: &[OsString],
        matches: &ArgMatches,
    ) -> std::result::Result<Self, clap::Error> {
        let mut table = Table::new();
        let kept = command.get_arguments().filter_map(|arg| {
            let name = arg.get_long()?;
            let is_kept = !NOT_KEPT.contains(&name);
            let has_value = !matches!(arg.get_action(), ArgAction::Help | ArgAction::Version);
            (is_kept && has_value).then_some((arg, name))
        });
        for (arg, name) in kept {
            let Some(value) = value(arg, matches) else {
                continue;
            };
            let value = value.map_err(|problem| {
                let problem = format!("--{name}: {problem}");
                A::command().error(ErrorKind::InvalidUtf8, problem)
            })?;
            // A default that is not one beside the other options, as that of an option that they exclude.
            let is_default =
                matches.value_source(arg.get_id().as_str()) != Some(ValueSource::CommandLine);
            let is_used = || {
                let option = option(arg, name, &value).unwrap_or_default();
                let words = words.iter().cloned().chain(option);
                A::command().try_get_matches_from(words).is_ok()
            };
            if !is_default || is_used() {
                table.insert(name.into(), value);
            }
        }
        Ok(Self(table))
    }
}

/// An option with its values as words of a command line.
fn option(arg: &Arg, key: &str, value: &Value) -> std::result::Result<Vec<OsString>, String> {
    let takes_values = arg.get_action().takes_values();
    match value {
        Value::Boolean(is_set) if !takes_values => {
            let option = is_set.then(|| format!("--{key}").into());
            return Ok(option.into_iter().collect());
        }
        _ if !takes_values => return Err(format!("`{key}` is true or false")),
        _ => {}
    }
    let values = match (value, arg.get_action()) {
        (Value::Array(values), ArgAction::Append) => values,
        (Value::Array(_), _) => return Err(format!("`{key}` takes one value")),
        (value, _) => std::slice::from_ref(value),
    };
    let word = |value: &Value| {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Integer(_) | Value::Float(_) => value.to_string(),
            _ => return Err(format!("`{key}` takes text or numbers")),
        };
        Ok(format!("--{key}={text}").into())
    };
    values.iter().map(word).collect()
}

/// The value of an option; none if it has none.
fn value(arg: &Arg, matches: &ArgMatches) -> Option<std::result::Result<Value, String>> {
    let id = arg.get_id().as_str();
    if !arg.get_action().takes_values() {
        return matches.get_flag(id).then_some(Ok(Value::Boolean(true)));
    }
    let of_text = [TypeId::of::<String>(), TypeId::of::<PathBuf>()];
    let mut of_text = of_text.iter();
    let is_text = of_text.any(|text| arg.get_value_parser().type_id() == *text);
    let typed = |text: &OsStr| {
        let text = text
            .to_str()
            .ok_or("a file of settings holds UTF-8 alone")?;
        Ok(match (text.parse(), text.parse()) {
            _ if is_text => Value::String(text.into()),
            (Ok(integer), _) => Value::Integer(integer),
            (_, Ok(float)) => Value::Float(float),
            _ => Value::String(text.into()),
        })
    };
    let values = matches.get_raw(id)?.map(typed);
    let values: std::result::Result<Vec<Value>, &str> = values.collect();
    let value = values.map(|mut values| match arg.get_action() {
        ArgAction::Append => Value::Array(values),
        _ => values.remove(0),
    });
    Some(value.map_err(String::from))
}

/// What is said of a key that is no option, with the names that are most like it.
fn unknown(command: &Command, key: &str) -> String {
    let names = command.get_arguments().filter_map(Arg::get_long);
    let names = names.filter(|name| *name != CONFIG);
    let likeness = |name: &str| strsim::jaro_winkler(key, name);
    let mut names: Vec<&str> = names.filter(|name| likeness(name) > 0.7).collect();
    names.sort_by(|a, b| likeness(b).total_cmp(&likeness(a)));
    let names = names.iter().take(3).map(|name| format!("`{name}`"));
    let names: Vec<String> = names.collect();
    match names[..] {
        [] => format!("unknown key `{key}`; --help lists the options"),
        _ => format!("unknown key `{key}`; like it: {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests;
