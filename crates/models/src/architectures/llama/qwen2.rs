//! Qwen2 (Yang et al. 2024, arXiv:2407.10671): biases of queries, keys and values, and a window in some
//! layers.

use serde_json::{Value, json};

use super::{Defaults, LlamaConfig};
use crate::Result;
use crate::architecture::ModelType;
use crate::architectures::layer_attention::{LayerAttention, check_window, layer_types};
use crate::settings::Settings;

pub(super) const MODEL_TYPE: ModelType<LlamaConfig> = ModelType {
    name: "qwen2",
    read,
};

fn read(settings: &Settings) -> Result<LlamaConfig> {
    let defaults = Defaults {
        num_key_value_heads: Some(32),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    };
    let config = LlamaConfig::read(settings, defaults)?.read_rotary(settings, 10_000.0)?;
    let (window, layers) = windows(settings, config.num_hidden_layers)?;
    Ok(config
        .with_sliding_window(window)
        .with_layer_attention(layers)
        .with_attention_bias(true))
}

/// The window, and the layers that have it: those from `max_window_layers` on, or as `layer_types` has it.
pub(in crate::architectures) fn windows(
    settings: &Settings,
    n_layers: usize,
) -> Result<(Option<usize>, Option<Vec<LayerAttention>>)> {
    let window = settings.optional_size_or("sliding_window", 4096)?;
    let uses_it = settings.flag_or("use_sliding_window", false)?;
    let window = window.filter(|_| uses_it);
    let first = settings.count_or("max_window_layers", 28)?;
    let layers = match layer_types(settings, n_layers)? {
        Some(types) => types,
        None => (0..n_layers)
            .map(|layer| window.is_some() && layer >= first)
            .collect(),
    };
    let layers: Vec<LayerAttention> = layers.into_iter().map(LayerAttention::sliding).collect();
    check_window(settings, window, &layers)?;
    // A window that no layer has is none.
    let window = window.filter(|_| layers.iter().any(|layer| layer.has_window));
    let differ = layers.iter().any(|layer| *layer != LayerAttention::SLIDING);
    Ok((window, (window.is_some() && differ).then_some(layers)))
}

pub(super) fn to_json(config: &LlamaConfig) -> Value {
    let mut json = windows_to_json(
        config.sliding_window,
        config.layer_attention.as_deref(),
        config.num_hidden_layers,
    );
    json["architectures"] = json!(["Qwen2ForCausalLM"]);
    json["model_type"] = MODEL_TYPE.name.into();
    json
}

/// The settings that [`windows`] reads.
pub(in crate::architectures) fn windows_to_json(
    window: Option<usize>,
    layers: Option<&[LayerAttention]>,
    n_layers: usize,
) -> Value {
    let all = vec![LayerAttention::sliding(window.is_some()); n_layers];
    let names = layers.unwrap_or(&all).iter().map(|layer| layer.name());
    json!({
        "use_sliding_window": window.is_some(),
        "sliding_window": window,
        "layer_types": names.collect::<Vec<_>>(),
    })
}
