//! The configurations of GPTQ checkpoints: `quantization_config` in `config.json`, `quantize_config.json`,
//! or both.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::super::directory::CONFIG;
use super::super::kind::GptqVersion;
use super::rules::{Rule, rules, rules_in_json};
use super::{CONFIG_FILE, METHOD, Symmetry};
use crate::settings::Settings;
use crate::{ConfigError, Result};

/// The settings of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LayerSettings {
    pub(super) bits: usize,
    pub(super) group_size: Option<usize>,
    pub(super) symmetric: Symmetry,
    /// Whether the inputs may be in another order.
    pub(super) desc_act: bool,
}

impl LayerSettings {
    /// The settings in which these differ from those of most layers, if they do.
    pub(super) fn unlike(self, common: Self) -> Option<Stated> {
        (self != common).then(|| Stated {
            bits: Some(self.bits),
            group_size: Some(self.group_size),
            sym: Some(self.symmetric == Symmetry::Yes),
            desc_act: None,
        })
    }
}

/// The settings that a configuration, or a rule of it, states.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Stated {
    pub(super) bits: Option<usize>,
    /// `Some(None)` for one group in all.
    pub(super) group_size: Option<Option<usize>>,
    pub(super) sym: Option<bool>,
    pub(super) desc_act: Option<bool>,
}

impl Stated {
    pub(super) fn read(settings: &Settings) -> Result<Self> {
        let bits = match settings.optional_whole("bits")? {
            Some(bits @ (2 | 3 | 4 | 8)) => Some(bits as usize),
            Some(bits) => {
                let problem = format!("is {bits}; supported: 2, 3, 4, 8");
                return Err(settings.refuse("bits", problem));
            }
            None => None,
        };
        let group_size = match settings.optional_whole("group_size")? {
            None => None,
            Some(-1) => Some(None),
            Some(size) => match usize::try_from(size) {
                Ok(size @ 1..) => Some(Some(size)),
                _ => {
                    let problem = format!("is {size}; it must be positive, or -1 for one group");
                    return Err(settings.refuse("group_size", problem));
                }
            },
        };
        let pack_dtype = settings.optional_text("pack_dtype")?;
        // The tensors state the same.
        if let Some(dtype) = pack_dtype.filter(|d| !["int8", "int16", "int32", "int64"].contains(d))
        {
            let problem = format!("is `{dtype}`; supported: int8, int16, int32, int64");
            return Err(settings.refuse("pack_dtype", problem));
        }
        Ok(Self {
            bits,
            group_size,
            sym: settings.optional_flag("sym")?,
            desc_act: settings.optional_flag("desc_act")?,
        })
    }

    /// These settings where they are stated, and others where they are not.
    pub(super) fn or(self, others: LayerSettings) -> LayerSettings {
        LayerSettings {
            bits: self.bits.unwrap_or(others.bits),
            group_size: self.group_size.unwrap_or(others.group_size),
            symmetric: match self.sym {
                Some(true) => Symmetry::Yes,
                Some(false) => Symmetry::No,
                None => others.symmetric,
            },
            desc_act: self.desc_act.unwrap_or(others.desc_act),
        }
    }

    /// Those that are stated, by their names.
    fn named(self) -> [(&'static str, Option<String>); 4] {
        let group_size = self.group_size.map(group_size_in_json);
        [
            ("bits", self.bits.map(|bits| bits.to_string())),
            ("group_size", group_size.map(|size| size.to_string())),
            ("sym", self.sym.map(|sym| sym.to_string())),
            ("desc_act", self.desc_act.map(|desc| desc.to_string())),
        ]
    }
}

/// A group size as files state it.
pub(super) fn group_size_in_json(size: Option<usize>) -> i64 {
    size.map_or(-1, |size| size as i64)
}

/// A file with a configuration.
pub(in super::super) struct ConfigFile {
    pub(super) path: PathBuf,
    pub(super) stated: Stated,
    pub(super) layers: LayerSettings,
    pub(super) rules: Vec<Rule>,
    pub(super) version: Option<GptqVersion>,
    /// Whether the head may be packed.
    pub(super) lm_head: bool,
    /// Whether GPTQModel wrote the checkpoint.
    pub(super) is_by_gptqmodel: bool,
    /// The name of the weights without its extension.
    base_name: Option<String>,
}

/// The names that AutoGPTQ gave to files of weights, without extensions: those that it was told, and those
/// that it made up.
pub(in super::super) fn base_names(files: &[ConfigFile]) -> [Vec<String>; 2] {
    let told = files.iter().filter_map(|file| file.base_name.clone());
    let made_up = files.iter().map(|file| {
        let group_size = group_size_in_json(file.layers.group_size);
        format!("gptq_model-{}bit-{group_size}g", file.layers.bits)
    });
    [told.collect(), made_up.collect()]
}

/// Reads the configurations of a directory, which must agree.
pub(in super::super) fn config_files(
    dir: &Path,
    embedded: Option<&Value>,
) -> Result<Vec<ConfigFile>> {
    let mut files = Vec::new();
    if let Some(json) = embedded {
        let path = dir.join(CONFIG);
        files.push(ConfigFile::new(json, path, "quantization_config")?);
    }
    let path = dir.join(CONFIG_FILE);
    if tensor_files::is_there(&path) {
        let json: Value = tensor_files::read_json(&path)?;
        files.push(ConfigFile::new(&json, path, "")?);
    }
    if let [first, second] = &files[..] {
        first.check_agrees(second)?;
    }
    Ok(files)
}

impl ConfigFile {
    fn new(json: &Value, path: PathBuf, within: &str) -> Result<Self> {
        let settings = Settings::within(json, &path, within)?;
        let method = settings
            .optional_text("quant_method")?
            .map(str::to_lowercase);
        if let Some(method) = method.filter(|method| method != METHOD) {
            let problem = format!("is `{method}`; this file is for {METHOD}");
            return Err(settings.refuse("quant_method", problem));
        }
        let stated = Stated::read(&settings)?;
        let missing = |setting| settings.refuse(setting, "is missing");
        let layers = stated.or(LayerSettings {
            bits: stated.bits.ok_or_else(|| missing("bits"))?,
            group_size: stated.group_size.ok_or_else(|| missing("group_size"))?,
            symmetric: Symmetry::Unstated,
            desc_act: false,
        });
        if settings.optional_flag("is_marlin_format")? == Some(true) {
            return Err(settings.refuse("is_marlin_format", "is true, which is not supported"));
        }
        if let Some(rotation) = settings
            .optional_text("rotation")?
            .filter(|name| !name.is_empty())
        {
            // Inputs of layers are rotated, too.
            let problem = format!("is `{rotation}`, which is not supported");
            return Err(settings.refuse("rotation", problem));
        }
        Ok(Self {
            stated,
            layers,
            rules: rules(&settings, &path)?,
            version: version(&settings)?,
            lm_head: settings.optional_flag("lm_head")? == Some(true),
            is_by_gptqmodel: settings.value("meta").is_some_and(is_by_gptqmodel),
            base_name: settings
                .optional_text("model_file_base_name")?
                .map(str::to_string),
            path,
        })
    }

    fn check_agrees(&self, other: &Self) -> Result<()> {
        let (first, second) = (self.stated.named(), other.stated.named());
        let settings = first.into_iter().zip(second);
        let settings = settings.map(|((name, first), (_, second))| (name, first, second));
        let version = |file: &Self| file.version.map(|version| name(version).to_string());
        let dynamic = |file: &Self| {
            let is_stated = !file.rules.is_empty();
            is_stated.then(|| rules_in_json(&file.rules).to_string())
        };
        let others = [
            ("checkpoint_format", version(self), version(other)),
            ("dynamic", dynamic(self), dynamic(other)),
        ];
        for (setting, in_first, in_second) in settings.chain(others) {
            // A file that does not state a setting leaves it to the other one.
            let (Some(in_first), Some(in_second)) = (in_first, in_second) else {
                continue;
            };
            if in_first != in_second {
                let error = ConfigError::Disagreement {
                    first: self.path.clone(),
                    second: other.path.clone(),
                    setting,
                    in_first,
                    in_second,
                };
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// The version that a configuration states, as `checkpoint_format` and as GPTQModel's `format`.
fn version(settings: &Settings) -> Result<Option<GptqVersion>> {
    let mut version = None;
    for setting in ["checkpoint_format", "format"] {
        let Some(name) = settings.optional_text(setting)? else {
            continue;
        };
        let stated = match name.to_lowercase().as_str() {
            "gptq" => GptqVersion::V1,
            "gptq_v2" => GptqVersion::V2,
            _ => {
                let problem = format!("is `{name}`; supported: gptq, gptq_v2");
                return Err(settings.refuse(setting, problem));
            }
        };
        if version.is_some_and(|version| version != stated) {
            let problem =
                format!("is `{name}`, but `checkpoint_format` is another; correct one of the two");
            return Err(settings.refuse(setting, problem));
        }
        version = Some(stated);
    }
    Ok(version)
}

/// Whether GPTQModel wrote the checkpoint, by `meta.quantizer`: names with versions, or one.
fn is_by_gptqmodel(meta: &Value) -> bool {
    let is = |value: &Value| value.as_str().is_some_and(|s| s.starts_with("gptqmodel:"));
    match &meta["quantizer"] {
        Value::Array(all) => all.iter().any(is),
        one => is(one),
    }
}

/// The name of a version in `checkpoint_format`.
pub(super) fn name(version: GptqVersion) -> &'static str {
    match version {
        GptqVersion::V1 => "gptq",
        GptqVersion::V2 => "gptq_v2",
    }
}

/// A configuration as GPTQModel writes it.
pub(super) fn in_json(
    layers: LayerSettings,
    rules: &[Rule],
    version: GptqVersion,
    lm_head: bool,
) -> Value {
    let version = name(version);
    let mut config = json!({
        "bits": layers.bits,
        "group_size": group_size_in_json(layers.group_size),
        "desc_act": layers.desc_act,
        "sym": layers.symmetric == Symmetry::Yes,
        "lm_head": lm_head,
        "quant_method": METHOD,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "meta": { "quantizer": [concat!("quant-core:", env!("CARGO_PKG_VERSION"))] },
    });
    if !rules.is_empty() {
        config["dynamic"] = rules_in_json(rules);
    }
    config
}
