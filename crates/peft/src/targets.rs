use crate::{Error, Linears, Result};

/// The layers that a method adapts, by the last part of their paths.
///
/// ```
/// use peft::Targets;
///
/// let targets = Targets::from(["q_proj", "v_proj"]);
/// assert!(targets.contains("model.layers.0.self_attn.q_proj"));
/// assert!(!targets.contains("model.layers.0.mlp.up_proj"));
/// assert!(Targets::All.contains("model.layers.0.mlp.up_proj"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every linear layer.
    All,
    /// The layers whose path ends in one of these names.
    Named(Vec<String>),
}

impl<S: Into<String>, const N: usize> From<[S; N]> for Targets {
    fn from(names: [S; N]) -> Self {
        Self::Named(names.map(Into::into).into())
    }
}

impl From<Vec<String>> for Targets {
    fn from(names: Vec<String>) -> Self {
        Self::Named(names)
    }
}

impl Targets {
    /// Whether the layer at `path` is a target.
    pub fn contains(&self, path: &str) -> bool {
        match self {
            Targets::All => true,
            Targets::Named(names) => names.iter().any(|name| name == last_name(path)),
        }
    }

    /// The paths of the targets in a model.
    ///
    /// # Errors
    /// [`Error::NoTarget`] if a name matches no layer, or there is none.
    pub fn paths(&self, model: &impl Linears) -> Result<Vec<String>> {
        let all: Vec<String> = model.linears().into_iter().map(|(path, _)| path).collect();
        self.among(&all)
    }

    /// The paths of the targets among those of all linear layers.
    ///
    /// # Errors
    /// As [`Targets::paths`].
    pub fn among(&self, all: &[String]) -> Result<Vec<String>> {
        let matches = |name: &String| all.iter().any(|path| last_name(path) == name);
        let unmatched: Vec<String> = match self {
            Targets::All => Vec::new(),
            Targets::Named(names) => names
                .iter()
                .filter(|name| !matches(name))
                .cloned()
                .collect(),
        };
        let paths: Vec<String> = all
            .iter()
            .filter(|path| self.contains(path))
            .cloned()
            .collect();
        if paths.is_empty() || !unmatched.is_empty() {
            let mut names: Vec<String> = all.iter().map(|path| last_name(path).into()).collect();
            names.sort();
            names.dedup();
            return Err(Error::NoTarget {
                targets: unmatched,
                n_linears: all.len(),
                names,
            });
        }
        Ok(paths)
    }
}

/// The last part of a path.
pub(crate) fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}
