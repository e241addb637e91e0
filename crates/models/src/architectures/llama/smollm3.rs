//! SmolLM3 (Bakouch et al. 2025): layers that do not rotate queries and keys (Yang et al. 2025,
//! arXiv:2501.18795), and a window in some.

use serde_json::{Value, json};

use super::{Defaults, LlamaConfig};
use crate::Result;
use crate::architecture::ModelType;
use crate::architectures::layer_attention::{LayerAttention, check_window, layer_types};
use crate::settings::Settings;

pub(super) const MODEL_TYPE: ModelType<LlamaConfig> = ModelType {
    name: "smollm3",
    read,
};

fn read(settings: &Settings) -> Result<LlamaConfig> {
    let defaults = Defaults {
        num_key_value_heads: Some(4),
        max_position_embeddings: 32_768,
        tie_word_embeddings: true,
        ..Defaults::default()
    };
    let config = LlamaConfig::read(settings, defaults)?.read_rotary(settings, 2_000_000.0)?;
    let n_layers = config.num_hidden_layers;
    let rotates = rotating(settings, n_layers)?;
    let window = settings.optional_size("sliding_window")?;
    let uses_it = settings.flag_or("use_sliding_window", false)?;
    let slides = match layer_types(settings, n_layers)? {
        Some(types) => types,
        None => {
            let has_window = window.is_some() && uses_it;
            rotates
                .iter()
                .map(|rotates| has_window && !rotates)
                .collect()
        }
    };
    let layers = rotates.into_iter().zip(slides);
    let layers = layers.map(|(has_rope, has_window)| LayerAttention {
        has_window,
        has_rope,
    });
    let layers: Vec<LayerAttention> = layers.collect();
    check_window(settings, window, &layers)?;
    let window = window.filter(|_| layers.iter().any(|layer| layer.has_window));
    let bias = settings.flag_or("attention_bias", false)?;
    Ok(config
        .with_sliding_window(window)
        .with_layer_attention(layers)
        .with_attention_bias(bias)
        .with_attention_output_bias(bias)
        .with_mlp_bias(settings.flag_or("mlp_bias", false)?))
}

/// Whether each layer rotates queries and keys: `no_rope_layers` has 1 for those that do.
fn rotating(settings: &Settings, n_layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "no_rope_layers";
    let interval = settings.size_or("no_rope_layer_interval", 4)?;
    let Some(stated) = settings.optional_numbers(KEY)? else {
        let rotates = |layer: usize| !(layer + 1).is_multiple_of(interval);
        return Ok((0..n_layers).map(rotates).collect());
    };
    if stated.len() != n_layers {
        let problem = format!("has {} layers, and the model {n_layers}", stated.len());
        return Err(settings.refuse(KEY, problem));
    }
    Ok(stated.into_iter().map(|rotates| rotates != 0.0).collect())
}

/// # Panics
/// If the output projection has other biases than queries, keys and values.
pub(super) fn to_json(config: &LlamaConfig) -> Value {
    assert_eq!(
        config.attention_bias, config.attention_output_bias,
        "biases of some projections of the attention alone"
    );
    let layers = config.layer_attention.iter().flatten();
    let rotates: Vec<usize> = layers.clone().map(|layer| layer.has_rope.into()).collect();
    let types: Vec<&str> = layers.map(|layer| layer.name()).collect();
    json!({
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": MODEL_TYPE.name,
        "no_rope_layers": rotates,
        "layer_types": types,
        "use_sliding_window": config.sliding_window.is_some(),
        "sliding_window": config.sliding_window,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    })
}
