//! The layers that a configuration of PEFT targets, and the ranks that its patterns give them.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::PythonRegex;

/// The keys by which layers are chosen.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Chosen {
    target_modules: Option<Names>,
    exclude_modules: Option<Names>,
    layers_to_transform: Option<Layers>,
    layers_pattern: Option<Names>,
    modules_to_save: Option<Vec<String>>,
    // Objects keep the order of the file, as in Python: the first pattern that matches decides.
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
}

/// A list of the ends of paths, or one regular expression for whole paths.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    Pattern(String),
    Ends(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Layers {
    One(i64),
    Some(Vec<i64>),
}

/// The targeted layers, with their ranks and alphas.
pub(super) struct Patterns {
    targets: Option<Matcher>,
    excluded: Option<Matcher>,
    /// The layers of modules that are saved in full have no adapters.
    saved: Vec<PythonRegex>,
    layers: Option<Layers>,
    in_layer: Vec<PythonRegex>,
    ranks: Vec<(PythonRegex, Value)>,
    alphas: Vec<(PythonRegex, Value)>,
}

enum Matcher {
    /// Every linear layer but the head.
    AllLinear,
    Pattern(PythonRegex),
    Ends(Vec<String>),
}

impl Matcher {
    fn new(names: Names) -> Result<Self, String> {
        Ok(match names {
            Names::Pattern(pattern) => Self::Pattern(PythonRegex::whole(&pattern)?),
            Names::Ends(names) => Self::Ends(names),
        })
    }

    fn of_targets(names: Names) -> Result<Self, String> {
        match names {
            Names::Pattern(pattern) if pattern.to_lowercase() == "all-linear" => {
                Ok(Self::AllLinear)
            }
            names => Self::new(names),
        }
    }

    fn matches(&self, path: &str) -> Result<bool, String> {
        match self {
            Matcher::AllLinear => Ok(true),
            Matcher::Pattern(pattern) => pattern.is_match(path),
            Matcher::Ends(names) => Ok(names.iter().any(|name| is_end(path, name))),
        }
    }
}

impl Names {
    fn is_empty(&self) -> bool {
        match self {
            Names::Pattern(pattern) => pattern.is_empty(),
            Names::Ends(names) => names.is_empty(),
        }
    }
}

/// Whether `path` is `name` or ends in it after a dot.
pub(super) fn is_end(path: &str, name: &str) -> bool {
    let rest = path.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The expressions of PEFT that contain names or patterns of a configuration.
mod expressions {
    /// `get_pattern_key`.
    pub(super) fn of_key(key: &str) -> String {
        format!(r"(.*\.)?({key})$")
    }

    /// The index of a layer, in `check_target_module_exists`.
    pub(super) const INDEX: &str = r".*?\.[^.]*\.(?P<idx>\d+)\.";

    /// The index of a layer in a list of this name.
    pub(super) fn index_in(layers: &str) -> String {
        format!(r"(?:^|.*?\.){layers}\.(?P<idx>\d+)\.")
    }

    /// The layers of a module that is saved in full.
    pub(super) fn in_module(module: &str) -> String {
        format!(r"(^|.*\.){module}($|\..*)")
    }
}

impl Patterns {
    pub(super) fn new(chosen: Chosen) -> Result<Self, String> {
        let named = |key: &'static str| move |problem: String| format!("{key}: {problem}");
        let regexes = |key: &'static str, patterns: Vec<String>| {
            let patterns = patterns.iter().map(|pattern| PythonRegex::prefix(pattern));
            let patterns: Result<Vec<_>, String> = patterns.collect();
            patterns.map_err(named(key))
        };
        let each = |key: &'static str, patterns: Option<Map<String, Value>>| {
            let (names, values): (Vec<_>, Vec<_>) =
                patterns.unwrap_or_default().into_iter().unzip();
            let names = names.iter().map(|name| expressions::of_key(name)).collect();
            let pairs = regexes(key, names)?.into_iter().zip(values);
            Ok::<_, String>(pairs.collect())
        };
        let layers_pattern = chosen.layers_pattern.filter(|names| !names.is_empty());
        if let Some(Names::Pattern(_)) = &chosen.target_modules
            && (chosen.layers_to_transform.is_some() || layers_pattern.is_some())
        {
            return Err(
                "layers_to_transform and layers_pattern need a list of target_modules".into(),
            );
        }
        if layers_pattern.is_some() && chosen.layers_to_transform.is_none() {
            return Err("layers_pattern needs layers_to_transform".into());
        }
        let in_layer = match layers_pattern {
            None => vec![expressions::INDEX.into()],
            Some(Names::Pattern(name)) => vec![expressions::index_in(&name)],
            Some(Names::Ends(names)) => names
                .iter()
                .map(|name| expressions::index_in(name))
                .collect(),
        };
        let saved = chosen.modules_to_save.unwrap_or_default();
        let saved = saved.iter().map(|name| expressions::in_module(name));
        let excluded = chosen.exclude_modules.filter(|names| !names.is_empty());
        let targets = chosen.target_modules.map(Matcher::of_targets);
        Ok(Self {
            targets: targets.transpose().map_err(named("target_modules"))?,
            excluded: (excluded.map(Matcher::new).transpose()).map_err(named("exclude_modules"))?,
            saved: regexes("modules_to_save", saved.collect())?,
            layers: chosen.layers_to_transform,
            in_layer: regexes("layers_pattern", in_layer)?,
            ranks: each("rank_pattern", chosen.rank_pattern)?,
            alphas: each("alpha_pattern", chosen.alpha_pattern)?,
        })
    }

    /// Whether the configuration says which layers it targets.
    pub(super) fn has_targets(&self) -> bool {
        self.targets.is_some()
    }

    /// Whether the targets are all linear layers, whichever these are.
    pub(super) fn are_all_linear(&self) -> bool {
        matches!(self.targets, Some(Matcher::AllLinear))
    }

    /// Whether the layer at `path` is a target: PEFT's `check_target_module_exists`.
    pub(super) fn targets(&self, path: &str) -> Result<bool, String> {
        let matches = |of: &Option<Matcher>| of.as_ref().map_or(Ok(false), |of| of.matches(path));
        if matches(&self.excluded)? {
            return Ok(false);
        }
        for saved in &self.saved {
            if saved.is_match(path)? {
                return Ok(false);
            }
        }
        Ok(matches(&self.targets)? && (self.is_whole_target(path) || self.is_layer(path)?))
    }

    /// Whether a target is the whole path: PEFT asks for the index of a layer only where a target is
    /// the end of a path.
    fn is_whole_target(&self, path: &str) -> bool {
        match &self.targets {
            Some(Matcher::Ends(names)) => names.iter().any(|name| name == path),
            _ => false,
        }
    }

    fn is_layer(&self, path: &str) -> Result<bool, String> {
        let layers = match &self.layers {
            None => return Ok(true),
            Some(Layers::One(index)) => std::slice::from_ref(index),
            Some(Layers::Some(indices)) if indices.is_empty() => return Ok(true),
            Some(Layers::Some(indices)) => indices,
        };
        for pattern in &self.in_layer {
            if let Some(index) = pattern.group(path, "idx")? {
                let index = index.parse::<i64>();
                return Ok(index.is_ok_and(|index| layers.contains(&index)));
            }
        }
        Ok(false)
    }

    /// The rank that a pattern gives the layer at `path`.
    pub(super) fn rank(&self, path: &str) -> Result<Option<usize>, String> {
        let rank = find(&self.ranks, path)?.map(|value| {
            let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
            rank.ok_or_else(|| format!("rank_pattern says {value} for `{path}`, not a rank"))
        });
        rank.transpose()
    }

    /// The `α` that a pattern gives the layer at `path`.
    pub(super) fn alpha(&self, path: &str) -> Result<Option<f32>, String> {
        let alpha = find(&self.alphas, path)?.map(|value| {
            let alpha = value.as_f64().map(|alpha| alpha as f32);
            alpha.ok_or_else(|| format!("alpha_pattern says {value} for `{path}`, not a number"))
        });
        alpha.transpose()
    }
}

/// The value of the first pattern that matches a path.
fn find<'a>(patterns: &'a [(PythonRegex, Value)], path: &str) -> Result<Option<&'a Value>, String> {
    for (pattern, value) in patterns {
        if pattern.is_match(path)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn patterns(config: &str) -> Result<Patterns, String> {
        Patterns::new(serde_json::from_str(config).unwrap())
    }

    /// What PEFT chooses (`tests/golden/make_patterns.py`).
    #[derive(Deserialize)]
    struct Golden {
        paths: Vec<String>,
        keys: Vec<Keys>,
        chosen: Vec<Targets>,
    }

    #[derive(Deserialize)]
    struct Keys {
        text: String,
        values: Vec<Option<usize>>,
    }

    #[derive(Deserialize)]
    struct Targets {
        config: Value,
        targets: Vec<String>,
    }

    fn golden() -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/patterns.json");
        tensor_files::read_json(&path).unwrap()
    }

    #[test]
    fn targets_are_those_of_peft() {
        let golden = golden();
        for case in golden.chosen {
            let patterns = patterns(&case.config.to_string()).unwrap();
            let found = golden
                .paths
                .iter()
                .filter(|path| patterns.targets(path).unwrap());
            let found: Vec<&String> = found.collect();
            let expected: Vec<&String> = case.targets.iter().collect();
            assert_eq!(found, expected, "{}", case.config);
        }
        let all = patterns(r#"{"target_modules": "All-Linear", "exclude_modules": ["q_proj"]}"#);
        let all = all.unwrap();
        assert!(all.are_all_linear() && all.targets("any.path").unwrap());
        assert!(!all.targets("an.q_proj").unwrap());
        let none = patterns("{}").unwrap();
        assert!(!none.has_targets() && !none.targets("q_proj").unwrap());
    }

    /// PEFT's `get_pattern_key`: the first key in the order of the file decides.
    #[test]
    fn patterns_are_those_of_peft() {
        let golden = golden();
        for case in golden.keys {
            let ranks = format!(
                r#"{{"rank_pattern": {0}, "alpha_pattern": {0}}}"#,
                case.text
            );
            let patterns = patterns(&ranks).unwrap();
            for (path, expected) in golden.paths.iter().zip(case.values) {
                let name = format!("{} of {path}", case.text);
                assert_eq!(patterns.rank(path).unwrap(), expected, "{name}");
                let alpha = expected.map(|alpha| alpha as f32);
                assert_eq!(patterns.alpha(path).unwrap(), alpha, "{name}");
            }
        }
    }

    #[test]
    fn configurations_that_peft_rejects_are_refused() {
        for (config, part) in [
            (
                json!({"target_modules": "(?!x"}),
                "target_modules: missing `)` in `(?!x`",
            ),
            (
                json!({"target_modules": ["x"], "exclude_modules": "["}),
                "exclude_modules: ",
            ),
            (
                json!({"rank_pattern": {"(?i)q": 1}}),
                "rank_pattern: global flags",
            ),
            (
                json!({"alpha_pattern": {"q)": 1}}),
                "alpha_pattern: unbalanced",
            ),
            (json!({"modules_to_save": ["("]}), "modules_to_save: "),
            (
                json!({"target_modules": ["x"], "layers_pattern": "(", "layers_to_transform": 1}),
                "layers_pattern: ",
            ),
            (
                json!({"target_modules": ".*", "layers_to_transform": []}),
                "need a list of target_modules",
            ),
            (
                json!({"target_modules": ["x"], "layers_pattern": "h"}),
                "needs layers_to_transform",
            ),
        ] {
            let error = patterns(&config.to_string()).err().unwrap();
            assert!(error.contains(part), "{config}: {error}");
        }
    }
}
