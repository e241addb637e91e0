//! Mistral (Jiang et al. 2023, arXiv:2310.06825): a window in all layers.

use serde_json::{Value, json};

use super::{Defaults, LlamaConfig};
use crate::Result;
use crate::architecture::ModelType;
use crate::settings::Settings;

pub(super) const MODEL_TYPE: ModelType<LlamaConfig> = ModelType {
    name: "mistral",
    read,
};

fn read(settings: &Settings) -> Result<LlamaConfig> {
    /// The window of a file that states none.
    const WINDOW: usize = 4096;
    let defaults = Defaults {
        num_key_value_heads: Some(8),
        max_position_embeddings: 4096 * 32,
        ..Defaults::default()
    };
    let config = LlamaConfig::read(settings, defaults)?.read_rotary(settings, 10_000.0)?;
    let window = settings.optional_size_or("sliding_window", WINDOW)?;
    Ok(config.with_sliding_window(window))
}

pub(super) fn to_json(config: &LlamaConfig) -> Value {
    json!({
        "architectures": ["MistralForCausalLM"],
        "model_type": MODEL_TYPE.name,
        "sliding_window": config.sliding_window,
    })
}
