//! The model that the project ships, made by `examples/pretrain.rs`.

use std::path::Path;

const FILES: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../data/llama/config.json")),
    (
        "tokenizer.json",
        include_bytes!("../data/llama/tokenizer.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../data/llama/model.safetensors"),
    ),
];

/// Writes the model's directory, as Hugging Face lays it out, into an existing one.
///
/// # Errors
/// If a file cannot be written.
pub fn write(dir: &Path) -> std::io::Result<()> {
    FILES
        .iter()
        .try_for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes))
}
