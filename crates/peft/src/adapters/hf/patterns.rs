//! The layers that a configuration of PEFT targets, and the ranks that its patterns give them.

use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The keys by which layers are chosen.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Chosen {
    target_modules: Option<Names>,
    exclude_modules: Option<Names>,
    layers_to_transform: Option<Layers>,
    layers_pattern: Option<Names>,
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
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
    One(usize),
    Some(Vec<usize>),
}

/// The targeted layers, with their ranks and alphas.
pub(super) struct Patterns {
    targets: Option<Matcher>,
    excluded: Option<Matcher>,
    layers: Option<Layers>,
    in_layer: Vec<Regex>,
    ranks: Vec<(Regex, Value)>,
    alphas: Vec<(Regex, Value)>,
}

enum Matcher {
    Pattern(Regex),
    Ends(Vec<String>),
}

impl Matcher {
    fn new(names: Names) -> Result<Self, String> {
        Ok(match names {
            Names::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear") => {
                Self::Pattern(regex(".*")?)
            }
            Names::Pattern(pattern) => Self::Pattern(regex(&format!("^(?:{pattern})$"))?),
            Names::Ends(names) => Self::Ends(names),
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Matcher::Pattern(pattern) => pattern.is_match(path),
            Matcher::Ends(names) => names.iter().any(|name| is_end(path, name)),
        }
    }
}

/// Whether `path` is `name` or ends in it after a dot.
fn is_end(path: &str, name: &str) -> bool {
    let rest = path.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| error.to_string())
}

impl Patterns {
    pub(super) fn new(chosen: Chosen) -> Result<Self, String> {
        let matcher = |key: &str, names: Option<Names>| {
            let matcher = names.map(Matcher::new).transpose();
            matcher.map_err(|error| format!("{key}: {error}"))
        };
        let each = |setting: &str, patterns: Map<String, Value>| {
            let patterns = patterns.into_iter();
            patterns
                .map(|(key, value)| {
                    let pattern = regex(&format!(r"^(?:.*\.)?(?:{key})$"));
                    let pattern = pattern.map_err(|error| format!("{setting}: {error}"));
                    Ok((pattern?, value))
                })
                .collect::<Result<Vec<_>, String>>()
        };
        let in_layer = match chosen.layers_pattern {
            Some(Names::Pattern(name)) if !name.is_empty() => vec![name],
            Some(Names::Ends(names)) => names,
            _ => Vec::new(),
        };
        let in_layer: Vec<String> = if in_layer.is_empty() {
            vec![r"^.*?\.[^.]*\.(\d+)\.".into()]
        } else {
            let names = in_layer.iter();
            names
                .map(|name| format!(r"^(?:|.*?\.)(?:{name})\.(\d+)\."))
                .collect()
        };
        Ok(Self {
            targets: matcher("target_modules", chosen.target_modules)?,
            excluded: matcher("exclude_modules", chosen.exclude_modules)?,
            layers: chosen.layers_to_transform,
            in_layer: in_layer
                .iter()
                .map(|pattern| regex(pattern))
                .collect::<Result<_, _>>()
                .map_err(|error| format!("layers_pattern: {error}"))?,
            ranks: each("rank_pattern", chosen.rank_pattern)?,
            alphas: each("alpha_pattern", chosen.alpha_pattern)?,
        })
    }

    /// Whether the layer at `path` is a target.
    pub(super) fn targets(&self, path: &str) -> bool {
        let meant = self.targets.as_ref();
        let excluded = self.excluded.as_ref();
        meant.is_some_and(|targets| targets.matches(path))
            && !excluded.is_some_and(|excluded| excluded.matches(path))
            && (self.is_whole_target(path) || self.is_layer(path))
    }

    /// Whether a target is the whole path: PEFT asks for the index of a layer only where a target is
    /// the end of a path.
    fn is_whole_target(&self, path: &str) -> bool {
        match &self.targets {
            Some(Matcher::Ends(names)) => names.iter().any(|name| name == path),
            _ => false,
        }
    }

    fn is_layer(&self, path: &str) -> bool {
        let layers = match &self.layers {
            None => return true,
            Some(Layers::One(index)) => std::slice::from_ref(index),
            Some(Layers::Some(indices)) if indices.is_empty() => return true,
            Some(Layers::Some(indices)) => indices,
        };
        let index = self.in_layer.iter().find_map(|pattern| {
            let index = pattern.captures(path)?.get(1)?;
            index.as_str().parse::<usize>().ok()
        });
        index.is_some_and(|index| layers.contains(&index))
    }

    /// The rank that a pattern gives the layer at `path`.
    pub(super) fn rank(&self, path: &str) -> Result<Option<usize>, String> {
        let rank = find(&self.ranks, path).map(|value| {
            let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
            rank.ok_or_else(|| format!("rank_pattern says {value} for `{path}`, not a rank"))
        });
        rank.transpose()
    }

    /// The `α` that a pattern gives the layer at `path`.
    pub(super) fn alpha(&self, path: &str) -> Result<Option<f32>, String> {
        let alpha = find(&self.alphas, path).map(|value| {
            let alpha = value.as_f64().map(|alpha| alpha as f32);
            alpha.ok_or_else(|| format!("alpha_pattern says {value} for `{path}`, not a number"))
        });
        alpha.transpose()
    }
}

/// The value of the first pattern that matches a path.
fn find<'a>(patterns: &'a [(Regex, Value)], path: &str) -> Option<&'a Value> {
    let found = patterns.iter().find(|(pattern, _)| pattern.is_match(path));
    found.map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patterns(config: Value) -> Patterns {
        Patterns::new(serde_json::from_value(config).unwrap()).unwrap()
    }

    /// PEFT's `check_target_module_exists`.
    #[test]
    fn targets_are_those_of_peft() {
        let paths = [
            "model.layers.1.self_attn.q_proj",
            "model.layers.10.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
            "q_proj",
            "model.layers.1.self_attn.fooq_proj",
        ];
        let only = |names: Value, more: Value| {
            let mut config = json!({ "target_modules": names });
            for (key, value) in more.as_object().unwrap() {
                config[key] = value.clone();
            }
            config
        };
        let q = || json!(["q_proj"]);
        let all = || json!("All-Linear");
        let cases = [
            (only(q(), json!({})), vec![0, 1, 3]),
            (only(json!(["self_attn.q_proj"]), json!({})), vec![0, 1]),
            (only(json!(["roj"]), json!({})), vec![]),
            (only(json!(r".*\.1\..*proj"), json!({})), vec![0, 2, 4]),
            (only(json!("q_proj"), json!({})), vec![3]),
            (only(all(), json!({})), vec![0, 1, 2, 3, 4]),
            (
                only(all(), json!({"exclude_modules": ["q_proj"]})),
                vec![2, 4],
            ),
            (
                only(q(), json!({"exclude_modules": r".*layers\.1\..*"})),
                vec![1, 3],
            ),
            (only(q(), json!({"layers_to_transform": 1})), vec![0, 3]),
            (
                only(q(), json!({"layers_to_transform": [10, 2]})),
                vec![1, 3],
            ),
            (only(q(), json!({"layers_to_transform": []})), vec![0, 1, 3]),
            (
                only(
                    q(),
                    json!({"layers_to_transform": 1, "layers_pattern": "layers"}),
                ),
                vec![0, 3],
            ),
            (
                only(
                    q(),
                    json!({"layers_to_transform": 1, "layers_pattern": ["h"]}),
                ),
                vec![3],
            ),
            (
                only(q(), json!({"layers_to_transform": 1, "layers_pattern": []})),
                vec![0, 3],
            ),
            (json!({}), vec![]),
        ];
        for (case, expected) in cases {
            let patterns = patterns(case.clone());
            let found: Vec<usize> = (0..paths.len())
                .filter(|&at| patterns.targets(paths[at]))
                .collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    /// PEFT's `get_pattern_key`.
    #[test]
    fn patterns_are_those_of_peft() {
        let patterns = patterns(json!({
            "rank_pattern": {"q_proj": 2, "layers.1.*": 3, "^model.layers.2.mlp.up_proj": 4},
            "alpha_pattern": {"mlp.*": 0.5},
        }));
        let of = |path| (patterns.rank(path).unwrap(), patterns.alpha(path).unwrap());
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (Some(2), None));
        assert_eq!(of("model.layers.0.self_attn.fooq_proj"), (None, None));
        assert_eq!(of("model.layers.10.mlp.up_proj"), (Some(3), Some(0.5)));
        assert_eq!(of("model.layers.3.mlp.up_proj"), (None, Some(0.5)));
    }
}
