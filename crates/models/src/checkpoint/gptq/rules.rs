//! `dynamic`, GPTQModel's rules for the settings of single layers.
//!
//! A key is a regular expression, which the path of a layer begins with a match of. After `-:` it leaves
//! layers out; after `+:`, or nothing, its value states the settings in which they differ. The first that
//! matches decides; those that leave out come first.

use std::path::Path;

use peft::PythonRegex;
use serde_json::{Map, Value, json};

use super::config::{Stated, group_size_in_json};
use crate::Result;
use crate::settings::Settings;

const LEAVE_OUT: &str = "-:";
const CHANGE: &str = "+:";

/// A rule, for the layers whose paths it matches.
pub(super) struct Rule {
    /// The key in the configuration.
    pub(super) key: String,
    regex: PythonRegex,
    /// The settings that differ; `None` if the layers are left out.
    pub(super) stated: Option<Stated>,
}

impl Rule {
    /// The rule of a key, with the settings that its value states.
    fn new(key: &str, stated: Stated) -> Result<Self, String> {
        let left_out = key.strip_prefix(LEAVE_OUT);
        let pattern = left_out.unwrap_or(key.strip_prefix(CHANGE).unwrap_or(key));
        let regex = PythonRegex::prefix(pattern);
        Ok(Self {
            key: key.into(),
            regex: regex.map_err(|problem| format!("is no expression to be matched: {problem}"))?,
            stated: left_out.is_none().then_some(stated),
        })
    }

    /// The rule for one layer: its settings, or that it is left out.
    pub(super) fn of_layer(path: &str, stated: Option<Stated>) -> Self {
        let sign = if stated.is_some() { CHANGE } else { LEAVE_OUT };
        let key = format!("{sign}^{}$", path.replace('.', "\\."));
        let rule = Self::new(&key, stated.unwrap_or_default());
        rule.expect("the path of a layer, with its points escaped")
    }

    /// Whether the rule is for the layer at a path, or the problem with telling.
    pub(super) fn matches(&self, path: &str) -> Result<bool, String> {
        self.regex.is_match(path)
    }
}

/// Reads the rules of a configuration, in the order in which they are tried.
pub(super) fn rules(settings: &Settings, path: &Path) -> Result<Vec<Rule>> {
    let json = match settings.value("dynamic") {
        None => return Ok(Vec::new()),
        Some(Value::Object(json)) => json,
        Some(other) => {
            let problem = format!("is {other}, not an object of rules");
            return Err(settings.refuse("dynamic", problem));
        }
    };
    let mut rules = Vec::new();
    for (key, value) in json {
        let name = format!("dynamic.`{key}`");
        let none = Value::Object(Map::new());
        let value = Some(value).filter(|value| !value.is_null());
        let of_rule = settings.name(&name);
        let of_rule = Settings::within(value.unwrap_or(&none), path, &of_rule)?;
        let rule = Rule::new(key, Stated::read(&of_rule)?);
        rules.push(rule.map_err(|problem| settings.refuse(&name, problem))?);
    }
    rules.sort_by_key(|rule| rule.stated.is_some());
    Ok(rules)
}

/// Rules as a configuration states them.
pub(super) fn rules_in_json(rules: &[Rule]) -> Value {
    let rules = rules.iter().map(|rule| {
        let mut json = Map::new();
        let stated = rule.stated.unwrap_or_default();
        let settings = [
            ("bits", stated.bits.map(|bits| json!(bits))),
            (
                "group_size",
                stated
                    .group_size
                    .map(|size| json!(group_size_in_json(size))),
            ),
            ("sym", stated.sym.map(|sym| json!(sym))),
            ("desc_act", stated.desc_act.map(|desc| json!(desc))),
        ];
        for (name, value) in settings {
            if let Some(value) = value {
                json.insert(name.into(), value);
            }
        }
        (rule.key.clone(), Value::Object(json))
    });
    rules.collect()
}
