//! The settings of a `config.json`, and of other objects of a file.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use crate::activation::Activation;
use crate::{ConfigError, Error, Result};

/// The most blocks of a model: each block has a list of names.
const MAX_LAYERS: usize = 10_000;

/// The widest matrix: what is computed of its sizes stays far within 64 bits.
const MAX_WIDTH: usize = 1 << 28;

/// The settings of a `config.json`, or of an object in it, with its path for errors.
///
/// A setting that is not there has its default. One that is `null` is so only where the configuration
/// class of transformers accepts it: the methods that return an [`Option`]. Numbers may be written as
/// integers or as floats.
pub(crate) struct Settings<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
    /// The key of the object, with a dot.
    within: String,
    /// The keys that were asked for.
    known: RefCell<BTreeSet<String>>,
}

impl<'a> Settings<'a> {
    pub(crate) fn new(json: &'a Map<String, Value>, path: &'a Path) -> Self {
        Self {
            path,
            json,
            within: String::new(),
            known: RefCell::default(),
        }
    }

    /// The settings of an object that is at the key `within` of its file, which may be empty.
    pub(crate) fn within(json: &'a Value, path: &'a Path, within: &str) -> Result<Self> {
        match json {
            Value::Object(json) => Ok(Self {
                within: match within {
                    "" => String::new(),
                    within => format!("{within}."),
                },
                ..Self::new(json, path)
            }),
            other => {
                let problem = format!("is {}; it must be an object of settings", short(other));
                let name = if within.is_empty() {
                    "the file"
                } else {
                    within
                };
                Err(ConfigError::setting(path, name, problem).into())
            }
        }
    }

    /// The name of a setting, with the keys that lead to it.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.within)
    }

    /// Refuses settings of other names than these.
    pub(crate) fn check_known(&self, known: &[&str]) -> Result<()> {
        let mut keys = self.json.keys();
        match keys.find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(self.refuse(key, "is not known to this program")),
        }
    }

    /// An object without a setting, in place of one that is not there.
    pub(crate) fn nothing(&self) -> Settings<'a> {
        static NOTHING: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        Settings::new(&NOTHING, self.path)
    }

    /// Whether there is no setting.
    pub(crate) fn is_empty(&self) -> bool {
        self.json.is_empty()
    }

    /// An error about a setting.
    pub(crate) fn refuse(&self, key: &str, problem: impl Into<String>) -> Error {
        ConfigError::setting(self.path, &self.name(key), problem.into()).into()
    }

    /// The value of a key, which may be `null`.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.known.borrow_mut().insert(key.into());
        self.json.get(key)
    }

    /// The value of a key, if it is another than `null`.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there with another value than `null`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    fn read<T>(
        &self,
        key: &str,
        what: &str,
        of: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match of(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.refuse(key, format!("is {}; it must be {what}", short(value)))),
        }
    }

    fn read_or_null<T>(
        &self,
        key: &str,
        what: &str,
        of: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        if self.has(key) {
            self.read(key, what, of)
        } else {
            Ok(None)
        }
    }

    /// A size, from 1 to 2³² - 1.
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        match self.read(key, &a_size(), size)? {
            Some(size) => Ok(size),
            None => Err(self.refuse(key, "is missing")),
        }
    }

    /// The size of a matrix.
    pub(crate) fn width(&self, key: &str) -> Result<usize> {
        let width = self.size(key)?;
        self.check_width(key, width)
    }

    /// The size of a matrix that may be `null`.
    pub(crate) fn optional_width(&self, key: &str) -> Result<Option<usize>> {
        let width = self.optional_size(key)?;
        width.map(|width| self.check_width(key, width)).transpose()
    }

    /// Checks the size of a matrix that follows from a setting.
    pub(crate) fn check_width(&self, key: &str, width: usize) -> Result<usize> {
        if width <= MAX_WIDTH {
            return Ok(width);
        }
        let problem = format!("makes a matrix of width {width}; the widest has {MAX_WIDTH}");
        Err(self.refuse(key, problem))
    }

    /// A size that has a default.
    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.read(key, &a_size(), size)?.unwrap_or(default))
    }

    /// A size that may be `null`.
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.read_or_null(key, &a_size(), size)
    }

    /// A size that may be `null`, with a default where it is not there.
    pub(crate) fn optional_size_or(
        &self,
        key: &str,
        default: impl Into<Option<usize>>,
    ) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(default.into()),
            Some(_) => self.optional_size(key),
        }
    }

    /// A number of at least 0.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        let count = self.read(key, "a whole number", whole)?;
        Ok(count.unwrap_or(default))
    }

    /// The key under which a setting of several names is, or the first one.
    ///
    /// # Errors
    /// If two are there with different values.
    fn named<'k>(&self, keys: &[&'k str]) -> Result<&'k str> {
        let mut stated = keys.iter().filter_map(|&key| Some((key, self.get(key)?)));
        let Some((first, value)) = stated.next() else {
            return Ok(keys[0]);
        };
        match stated.find(|(_, other)| *other != value) {
            Some((other, _)) => {
                let problem = format!("differs from `{first}`, which is the same setting");
                Err(self.refuse(other, problem))
            }
            None => Ok(first),
        }
    }

    /// A size under one of several names.
    pub(crate) fn size_named(&self, keys: &[&str]) -> Result<usize> {
        self.size(self.named(keys)?)
    }

    /// A size under one of several names that has a default.
    pub(crate) fn size_named_or(&self, keys: &[&str], default: usize) -> Result<usize> {
        self.size_or(self.named(keys)?, default)
    }

    /// The number of blocks under one of several names.
    pub(crate) fn layers_named(&self, keys: &[&str]) -> Result<usize> {
        self.layers(self.named(keys)?)
    }

    /// The number of blocks.
    pub(crate) fn layers(&self, key: &str) -> Result<usize> {
        let n_layers = self.size(key)?;
        if n_layers <= MAX_LAYERS {
            return Ok(n_layers);
        }
        let problem = format!("is {n_layers}; it must be 1 to {MAX_LAYERS}");
        Err(self.refuse(key, problem))
    }

    /// A number that has a default.
    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        let number = self.read(key, "a number", Value::as_f64)?;
        Ok(number.unwrap_or(default))
    }

    /// A number that may be `null`.
    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        self.read_or_null(key, "a number", Value::as_f64)
    }

    /// A positive number of the range of `f32`, in which it is computed with, that has a default.
    pub(crate) fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        let number = self.number_or(key, default)?;
        self.check_positive(key, number)
    }

    /// A positive number of the range of `f32` that may be `null`.
    pub(crate) fn optional_positive(&self, key: &str) -> Result<Option<f64>> {
        match self.optional_number(key)? {
            Some(number) => self.check_positive(key, number).map(Some),
            None => Ok(None),
        }
    }

    /// A positive number of the range of `f32` that may be `null`, with a default where it is not there.
    pub(crate) fn optional_positive_or(&self, key: &str, default: f64) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(Some(default)),
            Some(_) => self.optional_positive(key),
        }
    }

    fn check_positive(&self, key: &str, number: f64) -> Result<f64> {
        if is_positive(number) {
            return Ok(number);
        }
        let problem = format!("is {number}; it must be positive and within the range of f32");
        Err(self.refuse(key, problem))
    }

    /// `true` or `false`.
    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        let flag = self.read(key, "true or false", Value::as_bool)?;
        Ok(flag.unwrap_or(default))
    }

    /// `true`, `false` or `null`.
    pub(crate) fn optional_flag(&self, key: &str) -> Result<Option<bool>> {
        self.read_or_null(key, "true or false", Value::as_bool)
    }

    /// A whole number that may be negative or `null`. Some programs write it as a text.
    pub(crate) fn optional_whole(&self, key: &str) -> Result<Option<i64>> {
        let of_float =
            |value: f64| (value.fract() == 0.0 && value.abs() < 1e9).then_some(value as i64);
        self.read_or_null(key, "a whole number", |value| match value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_i64().or_else(|| value.as_f64().and_then(of_float)),
        })
    }

    /// A text that may be `null`.
    pub(crate) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read_or_null(key, "a text", Value::as_str)
    }

    /// Texts that may be `null`.
    pub(crate) fn optional_texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.read_or_null(key, "a list of texts", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// Numbers that may be `null`.
    pub(crate) fn optional_numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.read_or_null(key, "a list of numbers", |value| {
            value.as_array()?.iter().map(Value::as_f64).collect()
        })
    }

    /// The settings of an object that may be `null`.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Settings<'a>>> {
        let json = self.read_or_null(key, "an object", Value::as_object)?;
        Ok(json.map(|json| Settings {
            path: self.path,
            json,
            within: format!("{}{key}.", self.within),
            known: RefCell::default(),
        }))
    }

    /// An activation function.
    pub(crate) fn activation_or(&self, key: &str, default: Activation) -> Result<Activation> {
        let Some(name) = self.read(key, "the name of a function", Value::as_str)? else {
            return Ok(default);
        };
        Activation::of_name(name).ok_or_else(|| {
            let supported = Activation::names();
            self.refuse(key, format!("is `{name}`; supported: {supported}"))
        })
    }

    /// A setting that is computed with one value alone, or left out.
    pub(crate) fn only(&self, key: &str, value: impl Into<Value>) -> Result<()> {
        let (value, found) = (value.into(), self.get(key).unwrap_or(&Value::Null));
        let same_number = value.as_f64().is_some() && value.as_f64() == found.as_f64();
        if found.is_null() || *found == value || same_number {
            return Ok(());
        }
        let problem = format!(
            "is {}, which is not supported; supported: {value}",
            short(found)
        );
        Err(self.refuse(key, problem))
    }

    /// Settings of training, of generation and of programs, which no output depends on.
    pub(crate) fn ignore(&self, keys: &[&str]) {
        let mut known = self.known.borrow_mut();
        known.extend(keys.iter().map(|&key| key.to_string()));
    }

    /// The keys that were not asked for.
    #[cfg(test)]
    pub(crate) fn unknown(&self) -> Vec<String> {
        let known = self.known.borrow();
        let unknown = self.json.keys().filter(|&key| !known.contains(key));
        unknown.cloned().collect()
    }
}

/// Whether a number is positive in `f32` too, in which it is computed with.
pub(crate) fn is_positive(number: f64) -> bool {
    number > 0.0 && (number as f32).is_normal()
}

/// A value as text, cut to a few words.
fn short(value: &Value) -> String {
    const LEN: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LEN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn a_size() -> String {
    format!("1 to {}", u32::MAX)
}

/// A whole number, which may be written as a float.
fn whole(value: &Value) -> Option<usize> {
    let number = match value.as_u64() {
        Some(number) => number,
        None => {
            // Integers are exact up to there.
            let is_exact = |number: &f64| number.fract() == 0.0 && (0.0..9e15).contains(number);
            value.as_f64().filter(is_exact)? as u64
        }
    };
    usize::try_from(number).ok()
}

fn size(value: &Value) -> Option<usize> {
    whole(value).filter(|size| (1..=u32::MAX as usize).contains(size))
}

/// Implements a setter for each field of a configuration.
macro_rules! setters {
    ($config:ty: $($with:ident $field:ident $type:ty,)+) => {
        impl $config {
            $(
                #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
                pub fn $with(mut self, $field: $type) -> Self {
                    self.$field = $field.into();
                    self
                }
            )+
        }
    };
}

pub(crate) use setters;
