use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::Device;
use peft::Linears;
use serde_json::{Map, Value};

use super::layers::{Layers, METHOD};
use super::names::Architecture;
use super::shape::Metadata;
use super::source::{Parameters, Tensors};
use super::{FILE, vocabulary};
use crate::checkpoint::directory::{TOKENIZER, TOKENIZER_CONFIG, stop_tokens, tokenizer_digest};
use crate::{Config, ConfigError, Model, Pretrained, Result, SpecialTokens, Tokenizer};

/// Loads a model from a GGUF file alone.
pub(in crate::checkpoint) fn file(path: &Path, device: &Device) -> Result<Pretrained> {
    let (mut tensors, values) = Tensors::open(path)?;
    let metadata = Metadata {
        path,
        values: &values,
    };
    let architecture = metadata.architecture()?;
    let vocab_size = tensors.rows("token_embd.weight")?;
    let rope_freqs = tensors.rope_freqs()?;
    let has = |name: &str| tensors.contains(name);
    let mut config = metadata.config(vocab_size, has, rope_freqs.as_deref())?;
    let shape = Config::from_json(&config, path)?;
    let carried = vocabulary::files(&metadata, &mut config)?;
    let stop_tokens = stop_tokens(path, &config, &carried, vocab_size)?;
    let mut tokenizer = None;
    let special = OnceLock::new();
    if let (Some(json), Some(stated)) = (carried.get(TOKENIZER), carried.get(TOKENIZER_CONFIG)) {
        let built = Tokenizer::from_bytes(json, path)?;
        let stated: Map<String, Value> =
            serde_json::from_slice(stated).expect("an object was written");
        let tokens = SpecialTokens::stated(&stated, path, &built)?;
        special.get_or_init(|| tokens);
        tokenizer = Some(built);
    }
    let mut parameters = Parameters::new(tensors, architecture, &shape, None, device)?;
    let mut model = Model::build(shape, &mut parameters)?;
    parameters.check_leftovers()?;
    model.tokenizer = tokenizer_digest(&carried);
    Ok(Pretrained {
        model,
        tokenizer,
        certificate: None,
        dir: parent(path),
        config,
        carried,
        stop_tokens,
        special,
    })
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.into(),
        _ => ".".into(),
    }
}

/// Loads the model of a directory whose `quantization_config` is one of this format; `None` if it is of
/// another.
pub(in crate::checkpoint) fn load(
    dir: &Path,
    quantization: Option<&Value>,
    config: (&Map<String, Value>, &Path),
    shape: &Config,
    device: &Device,
) -> Result<Option<Model>> {
    let Some(quantization) = quantization.filter(|json| json["quant_method"] == METHOD) else {
        return Ok(None);
    };
    let (config, config_path) = config;
    let layers = Layers::open(quantization.clone(), config_path)?;
    let path = dir.join(FILE);
    let (tensors, values) = Tensors::open(&path)?;
    let metadata = Metadata {
        path: &path,
        values: &values,
    };
    let architecture = metadata.architecture()?;
    let model_type = config.get("model_type").and_then(Value::as_str);
    let model_type = model_type.unwrap_or_default();
    if Architecture::of_model_type(model_type) != Some(architecture) {
        let error = ConfigError::Disagreement {
            first: config_path.into(),
            second: path,
            setting: "the architecture",
            in_first: model_type.into(),
            in_second: architecture.name().into(),
        };
        return Err(error.into());
    }
    let mut parameters = Parameters::new(tensors, architecture, shape, Some(layers), device)?;
    let model = Model::build(shape.clone(), &mut parameters)?;
    let linears = model.linears().into_iter().map(|(path, _)| path);
    let others = model.other_weights().into_iter().map(|(path, _)| path);
    let paths: Vec<String> = linears.chain(others).collect();
    if let Some(layers) = &parameters.layers {
        layers.check_paths(&paths, config_path)?;
    }
    parameters.check_leftovers()?;
    Ok(Some(model))
}
