//! The settings of a JSON object in a file, for errors that name them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{ConfigError, Error, Result};

/// The settings of a JSON object in a file. One that is `null` is not stated.
#[derive(Clone, Copy)]
pub(super) struct Settings<'a> {
    json: &'a Map<String, Value>,
    path: &'a Path,
    /// The keys that lead to the object.
    within: &'a str,
}

impl<'a> Settings<'a> {
    /// The settings of `json`, which is at `within` in the file `path`.
    pub(super) fn new(json: &'a Value, path: &'a Path, within: &'a str) -> Result<Self> {
        match json {
            Value::Object(json) => Ok(Self { json, path, within }),
            other => {
                let problem = format!("is {other}, not an object of settings");
                let within = if within.is_empty() {
                    "the file"
                } else {
                    within
                };
                Err(ConfigError::setting(path, within, problem).into())
            }
        }
    }

    /// An error about a setting.
    pub(super) fn refuse(&self, key: &str, problem: impl Into<String>) -> Error {
        ConfigError::setting(self.path, &self.name(key), problem.into()).into()
    }

    /// The name of a setting, with the keys that lead to it.
    pub(super) fn name(&self, key: &str) -> String {
        match self.within {
            "" => key.into(),
            within => format!("{within}.{key}"),
        }
    }

    /// Refuses settings of other names than these.
    pub(super) fn check_known(&self, known: &[&str]) -> Result<()> {
        let mut keys = self.json.keys();
        match keys.find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(self.refuse(key, "is not known to this program")),
        }
    }

    /// The value of a setting, if it is stated.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Whether a setting is true.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// The text of a setting.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a text", Value::as_str)
    }

    /// A whole number, which some programs write as a text or with a fraction of 0.
    pub(super) fn whole(&self, key: &str) -> Result<Option<i64>> {
        let whole =
            |value: f64| (value.fract() == 0.0 && value.abs() < 1e9).then_some(value as i64);
        self.read(key, "a whole number", |value| match value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_i64().or_else(|| value.as_f64().and_then(whole)),
        })
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.refuse(key, format!("is {value}, not {expected}"))),
        }
    }
}
