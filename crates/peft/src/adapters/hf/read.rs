use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde::Deserialize;

use super::base::{Changes, Reduced, weight_name};
use super::config;
use super::names::{Place, place};
use super::patterns::{Patterns, is_end};
use crate::adapter::hf::{HfConfig, HfError, HfFormat, HfReader, HfSource, read_config};
use crate::adapters::{CONFIG, Kind, TENSORS};
use crate::{Adapter, Error, Linear, Linears, Result};
use tensor_files::TensorFile;

/// The file of versions before 0.6, and of `save_pretrained(safe_serialization=False)`.
const PICKLE: &str = "adapter_model.bin";

/// Reads the adapters of the layers of a model, and the parameters of its base.
pub(super) fn read(
    dir: &Path,
    model: &impl Linears,
) -> Result<(BTreeMap<String, Adapter>, Reduced)> {
    let directory = Directory::open(dir)?;
    let mut file = directory.tensors()?;
    let contents = Contents::of(&directory, &mut file)?;
    let device = model.linears().first().map(|(_, of)| of.weight.device());
    let mut reader = Reader {
        layer: directory.reader(&mut file, &device.unwrap_or_default())?,
        directory: &directory,
        file,
    };
    let mut untied = model.clone();
    untied.untie();
    let mut changes = Changes::new(&untied);
    reader.replace(&contents, &mut changes)?;
    let layers = reader.layers(contents.adapters, &untied, &mut changes)?;
    if layers.is_empty() && changes.is_empty() {
        return Err(directory.refuse("targets no layer of the model".into()));
    }
    Ok((layers, changes.reduced(model.tied())))
}

/// A configuration of PEFT.
struct Directory {
    path: PathBuf,
    config: HfConfig,
    format: &'static HfFormat,
    patterns: Patterns,
    base: BaseConfig,
}

/// The keys about parameters of the base.
#[derive(Default, Deserialize)]
#[serde(default)]
struct BaseConfig {
    modules_to_save: Option<Vec<String>>,
    trainable_token_indices: Option<Tokens>,
    ensure_weight_tying: bool,
}

/// Trained tokens, of the embedding or of the modules of these names.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    OfEmbedding(Vec<usize>),
    Of(BTreeMap<String, Vec<usize>>),
}

impl Tokens {
    /// Those of the module at `path`.
    fn of(&self, path: &str) -> Option<&[usize]> {
        match self {
            Self::OfEmbedding(tokens) => Some(tokens),
            Self::Of(modules) => {
                let mut modules = modules.iter().filter(|(name, _)| is_end(path, name));
                modules.next().map(|(_, tokens)| &tokens[..])
            }
        }
    }
}

impl BaseConfig {
    /// Whether PEFT saves the parameter `name` as one of a module, which has a copy of its own.
    fn saves(&self, name: &str) -> bool {
        let modules = self.modules_to_save.iter().flatten();
        let mut ancestors = name.match_indices('.').map(|(at, _)| &name[..at]);
        ancestors.any(|path| modules.clone().any(|module| path.ends_with(module)))
    }
}

impl Directory {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let mut config: HfConfig = tensor_files::read_json(&path)?;
        let refuse = |problem: String| {
            let path = path.clone();
            Error::from(tensor_files::Error::File { path, problem })
        };
        Kind::Peft.check(&path, &config)?;
        // Nothing is said by a key that is null.
        config.retain(|_, value| !value.is_null());
        let format = config::format(&config).map_err(&refuse)?;
        let patterns = config::patterns(&config).map_err(&refuse)?;
        if !patterns.has_targets() {
            let problem = "target_modules is null: PEFT chooses layers by the type of the model then; list them";
            return Err(refuse(problem.into()));
        }
        let base = read_config(&config).map_err(&refuse)?;
        Ok(Self {
            path,
            config,
            format,
            patterns,
            base,
        })
    }

    fn refuse(&self, problem: String) -> Error {
        let path = self.path.clone();
        tensor_files::Error::File { path, problem }.into()
    }

    fn tensors(&self) -> Result<TensorFile> {
        let (tensors, pickle) = (
            self.path.with_file_name(TENSORS),
            self.path.with_file_name(PICKLE),
        );
        if !tensor_files::is_there(&tensors) && tensor_files::is_there(&pickle) {
            let problem = format!(
                "is a pickle, which can run code when it is read; load the adapter with PEFT and save it again, as {TENSORS}"
            );
            let path = pickle;
            return Err(tensor_files::Error::File { path, problem }.into());
        }
        Ok(TensorFile::open(&tensors)?)
    }

    fn reader(&self, file: &mut TensorFile, device: &Device) -> Result<HfReader> {
        let reader = (self.format.reader)(&self.config, file, device);
        reader.map_err(|error| match error {
            HfError::Config(problem) => self.refuse(problem),
            HfError::Other(error) => error,
        })
    }

    fn targets(&self, path: &str) -> Result<bool> {
        (self.patterns.targets(path)).map_err(|problem| self.refuse(problem))
    }
}

/// The tensors of a file by what they belong to, with their names.
#[derive(Default)]
struct Contents {
    adapters: BTreeMap<String, BTreeMap<&'static str, String>>,
    tokens: BTreeMap<String, String>,
    base: BTreeMap<String, String>,
}

impl Contents {
    fn of(directory: &Directory, file: &mut TensorFile) -> Result<Self> {
        let format = directory.format;
        let mut contents = Self::default();
        for name in file.names() {
            let before = match place(format, &name) {
                Some(Place::Shared) => None,
                Some(Place::Adapter(path, tensor)) => {
                    let tensors = contents.adapters.entry(path).or_default();
                    tensors.insert(tensor, name.clone())
                }
                Some(Place::Tokens(path)) => contents.tokens.insert(path, name.clone()),
                Some(Place::Base(parameter)) => contents.base.insert(parameter, name.clone()),
                None => {
                    let problem =
                        format!("is no tensor of an adapter of type {}", format.peft_type);
                    return Err(file.refuse(&name, problem).into());
                }
            };
            if let Some(before) = before {
                let problem = format!("occurs under two names, the other being `{before}`");
                return Err(file.refuse(&name, problem).into());
            }
        }
        Ok(contents)
    }
}

struct Reader<'a> {
    directory: &'a Directory,
    layer: HfReader,
    file: TensorFile,
}

impl Reader<'_> {
    /// Reads parameters of the base.
    fn replace(&mut self, contents: &Contents, changes: &mut Changes) -> Result<()> {
        let base = &self.directory.base;
        let saved = changes.names().filter(|name| base.saves(name));
        let saved: BTreeSet<String> = saved.cloned().collect();
        if let Some(name) = saved.iter().find(|name| !contents.base.contains_key(*name)) {
            let path = self.file.path().to_path_buf();
            let tensor = format!("{}{name}", HfSource::PREFIX);
            return Err(tensor_files::Error::MissingTensor { path, tensor }.into());
        }
        for (name, tensor) in &contents.base {
            if changes.get(name).is_none() {
                let problem = format!(
                    "is no tensor of an adapter of type {}, and the model has no parameter `{name}`",
                    self.directory.format.peft_type
                );
                return Err(self.file.refuse(tensor, problem).into());
            }
            changes.replace(name, &mut self.file, tensor)?;
            if saved.contains(name) && !base.ensure_weight_tying {
                changes.set_apart(name);
            }
        }
        if base.trainable_token_indices.is_some() && contents.tokens.is_empty() {
            let path = self.file.path().to_path_buf();
            let problem = "has no tensor of the tokens that `trainable_token_indices` lists".into();
            return Err(tensor_files::Error::File { path, problem }.into());
        }
        for (path, tensor) in &contents.tokens {
            let tokens = base.trainable_token_indices.as_ref();
            let Some(tokens) = tokens.and_then(|tokens| tokens.of(path)) else {
                let problem = "belongs to tokens that `trainable_token_indices` does not list";
                return Err(self.file.refuse(tensor, problem.into()).into());
            };
            changes.replace_rows(&weight_name(path), tokens, &mut self.file, tensor)?;
        }
        Ok(())
    }

    /// Reads the adapters of projections; those of other matrices are merged into them.
    fn layers(
        &mut self,
        mut adapters: BTreeMap<String, BTreeMap<&'static str, String>>,
        model: &impl Linears,
        changes: &mut Changes,
    ) -> Result<BTreeMap<String, Adapter>> {
        let linears: BTreeMap<String, &Linear> = model.linears().into_iter().collect();
        for (path, tensors) in &adapters {
            if changes.weight(path).is_none() {
                return Err(Error::UnknownLayer { path: path.clone() });
            }
            if !self.directory.targets(path)? && !self.is_tied_to_target(path, &linears, changes)? {
                let problem = format!("is of layer `{path}`, which `{CONFIG}` does not target");
                let tensor = tensors.values().next().map_or("", String::as_str);
                return Err(self.file.refuse(tensor, problem).into());
            }
        }
        for path in changes.matrices() {
            // PEFT leaves some out, such as the head.
            let is_needed = !self.directory.patterns.are_all_linear() || linears.contains_key(path);
            if is_needed && self.directory.targets(path)? {
                adapters.entry(path.into()).or_default();
            }
        }
        let mut layers = BTreeMap::new();
        for (path, tensors) in adapters {
            let Some(weight) = changes.weight(&path) else {
                continue;
            };
            match linears.get(&path) {
                Some(linear) => {
                    let adapter = self.adapter(&path, linear, tensors)?;
                    layers.insert(path, adapter);
                }
                None => {
                    let linear = Linear::new(weight, None);
                    let adapter = self.adapter(&path, &linear, tensors)?;
                    changes
                        .merge(&path, &adapter)
                        .map_err(|problem| self.directory.refuse(problem))?;
                    if !self.directory.base.ensure_weight_tying {
                        changes.set_apart(&weight_name(&path));
                    }
                }
            }
        }
        Ok(layers)
    }

    /// Whether PEFT gives a matrix beside the projections the adapter of another one, as it does to the head
    /// of a tied model (`ensure_weight_tying`).
    fn is_tied_to_target(
        &self,
        path: &str,
        linears: &BTreeMap<String, &Linear>,
        changes: &Changes,
    ) -> Result<bool> {
        if !self.directory.base.ensure_weight_tying || linears.contains_key(path) {
            return Ok(false);
        }
        for other in changes.matrices() {
            if !linears.contains_key(other) && self.directory.targets(other)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn adapter(
        &mut self,
        path: &str,
        linear: &Linear,
        tensors: BTreeMap<&'static str, String>,
    ) -> Result<Adapter> {
        let directory = self.directory;
        let patterns = &directory.patterns;
        let refuse = |problem: String| directory.refuse(problem);
        let mut source = HfSource {
            path,
            linear,
            rank: patterns.rank(path).map_err(refuse)?,
            alpha: patterns.alpha(path).map_err(refuse)?,
            tensors,
            file: &mut self.file,
        };
        let adapter = (self.layer)(&mut source).map_err(|error| match error {
            Error::Setting { .. } => refuse(format!("for layer `{path}`, {error}")),
            other => other,
        })?;
        adapter.check(path, linear)?;
        Ok(adapter)
    }
}
