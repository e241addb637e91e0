//! The model that the project ships, made by `examples/pretrain.rs`.

use std::path::{Path, PathBuf};

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

/// Writes the model's directory, as Hugging Face lays it out, into an existing one, and returns it.
///
/// # Errors
/// If it is there already, or a file cannot be written.
pub fn write(parent: &Path) -> std::io::Result<PathBuf> {
    let dir = parent.join("embedded");
    std::fs::create_dir(&dir)?;
    for (name, bytes) in FILES {
        std::fs::write(dir.join(name), bytes)?;
    }
    Ok(dir)
}
