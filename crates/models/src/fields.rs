use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{ConfigError, Error, Result};

/// The most blocks of a model: each block has a list of names.
const MAX_LAYERS: usize = 10_000;

/// The settings of a `config.json`, with its path for errors.
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
}

impl Fields<'_> {
    /// An error about a setting.
    pub(crate) fn refuse(&self, setting: &str, problem: String) -> Error {
        ConfigError::setting(self.path, setting, problem).into()
    }

    /// Reads the settings of a model.
    pub(crate) fn read<T: DeserializeOwned>(&self, json: &Map<String, Value>) -> Result<T> {
        let read = serde_json::from_value(Value::Object(json.clone()));
        read.map_err(|error| self.refuse("a setting", format!("cannot be read: {error}")))
    }

    /// Checks that sizes are positive and fit 32 bits.
    pub(crate) fn check_sizes(&self, sizes: &[(&str, usize)]) -> Result<()> {
        let most = u32::MAX as usize;
        match sizes.iter().find(|(_, size)| !(1..=most).contains(size)) {
            None => Ok(()),
            Some((setting, size)) => {
                let problem = format!("is {size}; it must be 1 to {most}");
                Err(self.refuse(setting, problem))
            }
        }
    }

    /// Checks the number of blocks.
    pub(crate) fn check_layers(&self, n_layers: usize) -> Result<()> {
        if (1..=MAX_LAYERS).contains(&n_layers) {
            return Ok(());
        }
        let problem = format!("is {n_layers}; it must be 1 to {MAX_LAYERS}");
        Err(self.refuse("num_hidden_layers", problem))
    }
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
