//! Directories of Hugging Face's PEFT, both ways, as its version 0.21.2 writes and reads them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Param;
use burn::tensor::Tensor;
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Adapters, CONFIG, TENSORS};
use crate::adapter::{LoraSettings, TileSettings, floats, trained};
use crate::targets::last_name;
use crate::{
    Adapter, Error, Fingerprint, Linear, Linears, LoraAdapter, Pooling, Result, TileAdapter,
    TileMethod,
};
use tensor_files::{FloatType, LazyTensor, TensorFile};

/// Before the paths of layers.
const PREFIX: &str = "base_model.model.";

/// The keys that are read. What PEFT writes beside them must be neutral, or one of [`IGNORED`].
#[derive(Deserialize)]
#[serde(default)]
struct LoraConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f32,
    lora_dropout: f32,
    use_rslora: bool,
    use_dora: bool,
    use_qalora: bool,
    qalora_group_size: usize,
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
    bias: String,
    target_modules: Option<Names>,
    exclude_modules: Option<Names>,
    layers_to_transform: Option<Layers>,
    layers_pattern: Option<Names>,
    init_lora_weights: Value,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            peft_type: String::new(),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            use_qalora: false,
            qalora_group_size: 16,
            rank_pattern: Map::new(),
            alpha_pattern: Map::new(),
            bias: "none".into(),
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            init_lora_weights: Value::Bool(true),
        }
    }
}

impl LoraConfig {
    fn read(config: Map<String, Value>) -> Result<Self, String> {
        // One after the other, so that an error names its key.
        for (key, value) in &config {
            let alone = Map::from_iter([(key.clone(), value.clone())]);
            if let Err(error) = serde_json::from_value::<Self>(Value::Object(alone)) {
                return Err(format!("`{key}` is {value}: {error}"));
            }
        }
        serde_json::from_value(Value::Object(config)).map_err(|error| error.to_string())
    }
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

/// Keys of [`LoraConfig`].
const READ: [&str; 16] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_qalora",
    "use_rslora",
];

/// Keys that say nothing of what an adapter computes: where it comes from, how it was initialized,
/// how a weight lies in a file.
const IGNORED: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
];

impl Adapters {
    /// Reads a directory that PEFT wrote, for `model`: LoRA, rsLoRA, DoRA, and QA-LoRA. The file says
    /// nothing of its base: it is taken to be this model.
    ///
    /// What was trained is computed as in PEFT. Trained on with dropout, it differs: here QA-LoRA
    /// drops pooled inputs, as its paper does, and DoRA's product with the weight drops none.
    ///
    /// # Errors
    /// [`tensor_files::Error::File`] for what this program does not know, by its name: another type of adapter, a
    /// setting that changes what an adapter computes, an initialization that changed the base
    /// (PiSSA, OLoRA, …), a value out of its range. [`Error::UnknownLayer`],
    /// [`tensor_files::Error::MissingTensor`], [`tensor_files::Error::Tensor`] or [`Error::Shape`] if the tensors are not those
    /// that the configuration and the model ask for, [`Error::Tiles`] if groups do not divide a
    /// layer, [`Error::NoBias`] if a layer has no bias for a trained one, [`Error::NotF32`] for a
    /// dense layer of another dtype.
    pub fn load_hf(dir: impl AsRef<Path>, model: &impl Linears) -> Result<Self> {
        let path = dir.as_ref().join(CONFIG);
        let refuse = |problem: String| {
            Error::from(tensor_files::Error::File {
                path: path.clone(),
                problem,
            })
        };
        let config: Map<String, Value> = tensor_files::read_json(&path)?;
        check_keys(&config).map_err(&refuse)?;
        let config = LoraConfig::read(config).map_err(&refuse)?;
        let patterns = Patterns::new(&config).map_err(&refuse)?;

        let mut file = TensorFile::open(&dir.as_ref().join(TENSORS))?;
        let linears: BTreeMap<String, &Linear> = model.linears().into_iter().collect();
        let mut parts: BTreeMap<String, BTreeSet<Part>> = BTreeMap::new();
        for name in file.names() {
            let (path, part) = part(&name)
                .ok_or_else(|| file.refuse(&name, "is no tensor of an adapter of LoRA".into()))?;
            if !linears.contains_key(path) {
                return Err(Error::UnknownLayer { path: path.into() });
            }
            parts.entry(path.into()).or_default().insert(part);
        }
        let mut targets = linears
            .keys()
            .filter(|path| patterns.targets(path))
            .peekable();
        if targets.peek().is_none() {
            return Err(refuse("targets no layer of the model".into()));
        }
        for path in targets {
            parts.entry(path.clone()).or_default();
        }
        let mut layers = BTreeMap::new();
        for (path, parts) in parts {
            let linear = linears[&path];
            let (r, alpha) = patterns.rank_and_alpha(&path).map_err(&refuse)?;
            let adapter = read(&path, &parts, linear, &config, r, alpha, &mut file);
            let adapter = adapter.map_err(|error| match error {
                Error::Setting { .. } => refuse(format!("for layer `{path}`, {error}")),
                other => other,
            })?;
            adapter.check(&path, linear)?;
            layers.insert(path, adapter);
        }
        Ok(Self {
            base: Fingerprint::of(model),
            layers,
        })
    }

    /// Writes a new directory for PEFT, whole or not at all. `model` is the base, which says for
    /// which layers a name stands.
    ///
    /// # Errors
    /// [`Error::OtherBase`]; [`Error::NotForPeft`] if PEFT has no such adapter, or not in one
    /// directory with the others; [`tensor_files::Error::OutputExists`] if `dir` holds something, [`tensor_files::Error::Io`] if
    /// it cannot be written.
    pub fn save_hf(&self, dir: impl AsRef<Path>, model: &impl Linears) -> Result<()> {
        self.check_base(model)?;
        let config = self.hf_config(model)?;
        Ok(tensor_files::write_directory(dir.as_ref(), |dir| {
            let tensors = self.layers.iter().flat_map(|(path, adapter)| {
                hf_tensors(adapter)
                    .into_iter()
                    .map(move |(name, tensor)| (format!("{PREFIX}{path}.{name}"), tensor))
            });
            tensor_files::write_tensors(&dir.join(TENSORS), tensors)?;
            tensor_files::write_json(&dir.join(CONFIG), &config)
        })?)
    }

    fn hf_config(&self, model: &impl Linears) -> Result<Value> {
        let mut kinds = Vec::new();
        for (path, adapter) in &self.layers {
            let refuse = |problem: &str| Error::NotForPeft {
                path: path.clone(),
                problem: problem.into(),
            };
            kinds.push((path, Kind::of(adapter).map_err(refuse)?));
        }
        // What most layers have is the rule, the others are exceptions.
        let mut counts: BTreeMap<(usize, u32), usize> = BTreeMap::new();
        for (_, kind) in &kinds {
            *counts.entry((kind.rank, kind.alpha.to_bits())).or_default() += 1;
        }
        let most = counts.iter().max_by_key(|(_, count)| **count);
        let Some((&(r, alpha), _)) = most else {
            return Err(Error::NoAdapters);
        };
        let alpha = f32::from_bits(alpha);
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        let (_, first) = &kinds[0];
        for (path, kind) in &kinds {
            if kind.switches() != first.switches() {
                return Err(Error::NotForPeft {
                    path: path.to_string(),
                    problem: "differs from the other layers in method, dropout or group size"
                        .into(),
                });
            }
            if kind.rank != r {
                ranks.insert(path.to_string(), json!(kind.rank));
            }
            if kind.alpha != alpha {
                alphas.insert(path.to_string(), number(kind.alpha));
            }
        }
        let all = model.linears();
        let is_whole = |name: &str| {
            let mut named = all.iter().filter(|(path, _)| last_name(path) == name);
            named.all(|(path, _)| self.layers.contains_key(path))
        };
        let targets: BTreeSet<&str> = self
            .layers
            .keys()
            .map(|path| match last_name(path) {
                name if is_whole(name) => name,
                _ => path,
            })
            .collect();
        Ok(json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": alphas,
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": null,
            "bias": if kinds.iter().any(|(_, kind)| kind.bias) { "lora_only" } else { "none" },
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": number(alpha),
            "lora_bias": false,
            "lora_dropout": number(first.dropout),
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "monteclora_config": null,
            "peft_type": "LORA",
            "peft_version": "0.21.2",
            "qalora_group_size": first.group_size.unwrap_or(16),
            "r": r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": targets,
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": first.dora,
            "use_qalora": first.group_size.is_some(),
            "use_rslora": first.rank_stabilized,
            "velora_config": null,
        }))
    }
}

/// A whole number without a point, as Python writes it, and `f32` in its own digits.
fn number(value: f32) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e9 && value != 0.0 {
        return json!(value as i64);
    }
    let shortest = value.to_string().parse::<f64>();
    json!(shortest.unwrap_or(f64::from(value)))
}

/// What PEFT says of an adapter in its configuration.
struct Kind {
    rank: usize,
    alpha: f32,
    dropout: f32,
    rank_stabilized: bool,
    dora: bool,
    bias: bool,
    /// Of QA-LoRA.
    group_size: Option<usize>,
}

impl Kind {
    fn of(adapter: &Adapter) -> Result<Self, &'static str> {
        match adapter {
            Adapter::Lora(lora) => {
                let settings = lora.settings();
                Ok(Self {
                    rank: lora.rank(),
                    alpha: settings.alpha,
                    dropout: settings.dropout,
                    rank_stabilized: settings.rank_stabilized,
                    dora: settings.dora,
                    bias: settings.bias,
                    group_size: None,
                })
            }
            Adapter::Tile(tile) => {
                let settings = tile.settings();
                let is_qa_lora = settings.tiles == TileMethod::QaLora && settings.repeat == 1;
                if !is_qa_lora {
                    return Err("PEFT has no such tiles; use `Adapters::save`");
                }
                if settings.pool < 2 {
                    return Err("in PEFT's files, pools of one input are those of LoRA");
                }
                if settings.pooling != Pooling::Peft {
                    return Err("PEFT knows no pooling but `Pooling::Peft`");
                }
                Ok(Self {
                    rank: settings.rank,
                    alpha: settings.alpha,
                    dropout: settings.dropout,
                    rank_stabilized: false,
                    dora: false,
                    bias: false,
                    group_size: Some(settings.pool),
                })
            }
            Adapter::Peqa(_) => Err("PEFT has no PEQA; use `Adapters::save`"),
            Adapter::Bayesian(_) => {
                Err("PEFT has no Bayesian-LoRA; use `Adapters::save`, or save what `to_lora` gives")
            }
        }
    }

    fn switches(&self) -> (u32, bool, bool, Option<usize>) {
        let dropout = self.dropout.to_bits();
        (dropout, self.rank_stabilized, self.dora, self.group_size)
    }
}

/// Tensors under PEFT's names, `[out, in]`, in `f32`.
fn hf_tensors(adapter: &Adapter) -> Vec<(&'static str, LazyTensor<'_>)> {
    let factor = |factor: Tensor<2>| {
        let [d_in, d_out] = factor.dims();
        LazyTensor::floats_as(FloatType::F32, [d_out, d_in], move || {
            floats(factor.clone().transpose())
        })
    };
    let factors = match adapter {
        Adapter::Lora(lora) => Some((lora.a(), lora.b())),
        Adapter::Tile(tile) => tile.factors(),
        Adapter::Peqa(_) | Adapter::Bayesian(_) => None,
    };
    let Some((a, b)) = factors else {
        return Vec::new();
    };
    let mut tensors = vec![("lora_A.weight", factor(a)), ("lora_B.weight", factor(b))];
    if let Adapter::Lora(lora) = adapter
        && let Some(m) = lora.magnitude()
    {
        let magnitude = LazyTensor::floats_as(FloatType::F32, m.dims(), move || floats(m.clone()));
        tensors.push(("lora_magnitude_vector", magnitude));
    }
    if let Some(bias) = adapter.bias() {
        let bias = LazyTensor::floats_as(FloatType::F32, bias.dims(), move || floats(bias.clone()));
        tensors.push(("base_layer.bias", bias));
    }
    tensors
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    Magnitude,
    /// With `.weight`, which PEFT reads too.
    MagnitudeWeight,
    /// Of the layer, trained.
    Bias,
}

impl Part {
    const ALL: [Self; 5] = [
        Self::A,
        Self::B,
        Self::Magnitude,
        Self::MagnitudeWeight,
        Self::Bias,
    ];

    fn suffix(self) -> &'static str {
        match self {
            Part::A => "lora_A.weight",
            Part::B => "lora_B.weight",
            Part::Magnitude => "lora_magnitude_vector",
            Part::MagnitudeWeight => "lora_magnitude_vector.weight",
            Part::Bias => "base_layer.bias",
        }
    }
}

/// The layer that a tensor belongs to, and what it is to it.
fn part(name: &str) -> Option<(&str, Part)> {
    let name = name.strip_prefix(PREFIX)?;
    Part::ALL.into_iter().find_map(|part| {
        let path = name.strip_suffix(part.suffix())?.strip_suffix('.')?;
        Some((path, part))
    })
}

/// The adapter of the layer at `path`, of which the file has `parts`.
fn read(
    path: &str,
    parts: &BTreeSet<Part>,
    linear: &Linear,
    config: &LoraConfig,
    r: usize,
    alpha: f32,
    file: &mut TensorFile,
) -> Result<Adapter> {
    let device = linear.weight.device();
    let name = |part: Part| format!("{PREFIX}{path}.{}", part.suffix());
    let mut factor = |part: Part| -> Result<Tensor<2>> {
        let (values, [rows, columns]) = file.floats::<2>(&name(part))?;
        let rank = match part {
            Part::A => rows,
            _ => columns,
        };
        if rank != r || rank == 0 {
            let shape = [rows, columns];
            let problem = format!("is {shape:?}, where `{CONFIG}` says rank {r}");
            return Err(file.refuse(&name(part), problem).into());
        }
        Ok(trained(values, [rows, columns], &device)
            .val()
            .detach()
            .transpose())
    };
    let (a, b) = (factor(Part::A)?, factor(Part::B)?);
    let is_magnitude = |part: &Part| matches!(part, Part::Magnitude | Part::MagnitudeWeight);
    let magnitudes: Vec<Part> = parts.iter().copied().filter(is_magnitude).collect();
    match (config.use_dora, &magnitudes[..]) {
        (false, []) | (true, [] | [_]) => (),
        (false, [part, ..]) => {
            let problem = format!("belongs to DoRA, which `{CONFIG}` does not name");
            return Err(file.refuse(&name(*part), problem).into());
        }
        (true, [_, part, ..]) => {
            return Err(file
                .refuse(&name(*part), "is there under two names".into())
                .into());
        }
    }
    let mut bias = None;
    if parts.contains(&Part::Bias) {
        let (values, dims) = file.floats::<1>(&name(Part::Bias))?;
        bias = Some(trained(values, dims, &device));
    }
    // PEFT takes QA-LoRA for LoRA on layers that are not GPTQ's.
    let d_in = linear.weight.dims()[0];
    let group_size = config.qalora_group_size;
    if config.use_qalora && a.dims()[0] == d_in / group_size {
        if bias.is_some() {
            let problem = "is trained beside QA-LoRA, which this program does not do".into();
            return Err(file.refuse(&name(Part::Bias), problem).into());
        }
        let alpha = match config.use_rslora {
            true => alpha * (r as f32).sqrt(),
            false => alpha,
        };
        let settings = TileSettings {
            tiles: TileMethod::QaLora,
            pool: group_size,
            repeat: 1,
            pooling: Pooling::Peft,
            alpha,
            rank: r,
            dropout: config.lora_dropout,
        };
        let [a, b] = [a, b].map(Param::from_tensor);
        return Ok(Adapter::Tile(TileAdapter::of_product(a, b, settings)?));
    }
    let mut magnitude = None;
    if config.use_dora {
        let part = magnitudes.first().copied().unwrap_or(Part::Magnitude);
        let (values, dims) = file.floats::<1>(&name(part))?;
        magnitude = Some(trained(values, dims, &device));
    }
    let settings = LoraSettings {
        alpha,
        rank_stabilized: config.use_rslora,
        dora: config.use_dora,
        bias: bias.is_some(),
        dropout: config.lora_dropout,
    };
    let [a, b] = [a, b].map(Param::from_tensor);
    let adapter = LoraAdapter::new(a, b, magnitude, bias, settings)?;
    Ok(Adapter::Lora(adapter))
}

/// Refuses what would change the meaning of an adapter and is not known here.
fn check_keys(config: &Map<String, Value>) -> Result<(), String> {
    match config.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => (),
        Some(other) => return Err(format!("peft_type is {other}; only LORA can be read")),
        None => return Err("has no peft_type: it is not a configuration of PEFT; for a directory of this program, use `Adapters::load`".into()),
    }
    for (key, value) in config {
        let neutral = match value {
            Value::Null => true,
            Value::Bool(on) => !on,
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Number(_) => false,
        };
        let known = READ.contains(&key.as_str()) || IGNORED.contains(&key.as_str());
        if !known && !neutral {
            return Err(format!(
                "`{key}` is {value}, which this program cannot honour"
            ));
        }
    }
    Ok(())
}

/// Which layers are meant, and with which rank and alpha.
struct Patterns<'a> {
    config: &'a LoraConfig,
    targets: Option<Matcher>,
    excluded: Option<Matcher>,
    in_layer: Vec<Regex>,
    ranks: Vec<(Regex, &'a Value)>,
    alphas: Vec<(Regex, &'a Value)>,
}

enum Matcher {
    Pattern(Regex),
    Ends(Vec<String>),
}

impl Matcher {
    fn new(names: &Names) -> Result<Self, String> {
        Ok(match names {
            Names::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear") => {
                Self::Pattern(regex(".*")?)
            }
            Names::Pattern(pattern) => Self::Pattern(regex(&format!("^(?:{pattern})$"))?),
            Names::Ends(names) => Self::Ends(names.clone()),
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

impl<'a> Patterns<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self, String> {
        match &config.init_lora_weights {
            Value::Bool(_) => (),
            Value::String(name) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => (),
            other => {
                return Err(format!(
                    "init_lora_weights is {other}, which changed the base: convert the adapter to a plain LoRA in PEFT, and save it again"
                ));
            }
        }
        if config.use_qalora && config.use_dora {
            return Err("use_qalora and use_dora exclude each other".into());
        }
        if config.use_qalora && config.qalora_group_size < 2 {
            return Err("qalora_group_size is 0; it must be at least 2".into());
        }
        if !["none", "lora_only", "all"].contains(&config.bias.as_str()) {
            return Err(format!(
                "bias is {:?}, not none, lora_only or all",
                config.bias
            ));
        }
        let matcher = |key: &str, names: &Option<Names>| {
            let matcher = names.as_ref().map(Matcher::new).transpose();
            matcher.map_err(|error| format!("{key}: {error}"))
        };
        let each = |setting: &str, patterns: &'a Map<String, Value>| {
            let patterns = patterns.iter();
            patterns
                .map(|(key, value)| {
                    let pattern = regex(&format!(r"^(?:.*\.)?(?:{key})$"));
                    let pattern = pattern.map_err(|error| format!("{setting}: {error}"));
                    Ok((pattern?, value))
                })
                .collect::<Result<Vec<_>, String>>()
        };
        let in_layer = match &config.layers_pattern {
            Some(Names::Pattern(name)) if !name.is_empty() => std::slice::from_ref(name),
            Some(Names::Ends(names)) => names,
            _ => &[],
        };
        let in_layer: Vec<String> = match in_layer {
            [] => vec![r"^.*?\.[^.]*\.(\d+)\.".into()],
            names => {
                let names = names.iter();
                let each = names.map(|name| format!(r"^(?:|.*?\.)(?:{name})\.(\d+)\."));
                each.collect()
            }
        };
        Ok(Self {
            config,
            targets: matcher("target_modules", &config.target_modules)?,
            excluded: matcher("exclude_modules", &config.exclude_modules)?,
            in_layer: in_layer
                .iter()
                .map(|pattern| regex(pattern))
                .collect::<Result<_, _>>()
                .map_err(|error| format!("layers_pattern: {error}"))?,
            ranks: each("rank_pattern", &config.rank_pattern)?,
            alphas: each("alpha_pattern", &config.alpha_pattern)?,
        })
    }

    /// Whether the layer at `path` is to have an adapter.
    fn targets(&self, path: &str) -> bool {
        let meant = self.targets.as_ref();
        let excluded = self.excluded.as_ref();
        meant.is_some_and(|targets| targets.matches(path))
            && !excluded.is_some_and(|excluded| excluded.matches(path))
            && (self.is_whole_target(path) || self.is_layer(path))
    }

    /// PEFT asks for the layer's index only where the end of a path is meant.
    fn is_whole_target(&self, path: &str) -> bool {
        match &self.targets {
            Some(Matcher::Ends(names)) => names.iter().any(|name| name == path),
            _ => false,
        }
    }

    fn is_layer(&self, path: &str) -> bool {
        let layers = match &self.config.layers_to_transform {
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

    fn rank_and_alpha(&self, path: &str) -> Result<(usize, f32), String> {
        let find = |patterns: &[(Regex, &'a Value)]| {
            let found = patterns.iter().find(|(pattern, _)| pattern.is_match(path));
            found.map(|(_, value)| *value)
        };
        let rank = match find(&self.ranks) {
            None => self.config.r,
            Some(value) => value
                .as_u64()
                .and_then(|rank| usize::try_from(rank).ok())
                .ok_or_else(|| format!("rank_pattern says {value} for `{path}`, not a rank"))?,
        };
        let alpha = match find(&self.alphas) {
            None => self.config.lora_alpha,
            Some(value) => value
                .as_f64()
                .ok_or_else(|| format!("alpha_pattern says {value} for `{path}`, not a number"))?
                as f32,
        };
        Ok((rank, alpha))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(value: Value) -> LoraConfig {
        let Value::Object(value) = value else {
            panic!("not an object");
        };
        LoraConfig::read(value).unwrap()
    }

    /// Which of some layers a configuration targets, as PEFT's `check_target_module_exists` has it.
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
            let config = config(case.clone());
            let patterns = Patterns::new(&config).unwrap();
            let found: Vec<usize> = (0..paths.len())
                .filter(|&at| patterns.targets(paths[at]))
                .collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    /// PEFT's `get_pattern_key`.
    #[test]
    fn patterns_are_those_of_peft() {
        let config = config(json!({
            "r": 8,
            "lora_alpha": 16,
            "rank_pattern": {"q_proj": 2, "layers.1.*": 3, "^model.layers.2.mlp.up_proj": 4},
            "alpha_pattern": {"mlp.*": 0.5},
        }));
        let patterns = Patterns::new(&config).unwrap();
        let of = |path| patterns.rank_and_alpha(path).unwrap();
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (2, 16.0));
        assert_eq!(of("model.layers.0.self_attn.fooq_proj"), (8, 16.0));
        assert_eq!(of("model.layers.10.mlp.up_proj"), (3, 0.5));
        assert_eq!(of("model.layers.3.mlp.up_proj"), (8, 0.5));
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, text) in [(16.0, "16"), (0.1, "0.1"), (0.0, "0.0"), (2.5, "2.5")] {
            assert_eq!(number(value).to_string(), text);
        }
    }
}
