//! The models that the project ships, made by `examples/pretrain.rs`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

/// The option of a program that names one of the models that come with it.
#[derive(Args, Clone, Copy, Debug)]
pub struct EmbeddedArg {
    /// Which of the models that come with the program
    #[arg(id = "embedded", long, value_enum, value_name = "NAME", default_value_t = Architecture::Llama)]
    pub architecture: Architecture,
}

/// What a model that comes with the programs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Architecture {
    /// 1.1 million parameters, in bf16
    Llama,
    /// 1.1 million parameters, in f16
    Opt,
}

impl Architecture {
    fn files(self) -> [(&'static str, &'static [u8]); 4] {
        macro_rules! file {
            ($dir:literal, $name:literal) => {
                ($name, include_bytes!(concat!("../data/", $dir, "/", $name)))
            };
        }
        macro_rules! files {
            ($dir:literal) => {
                [
                    file!($dir, "config.json"),
                    file!($dir, "tokenizer.json"),
                    file!($dir, "tokenizer_config.json"),
                    file!($dir, "model.safetensors"),
                ]
            };
        }
        match self {
            Self::Llama => files!("llama"),
            Self::Opt => files!("opt"),
        }
    }
}

/// Writes a model's directory, as Hugging Face lays it out, into an existing one, and returns it.
///
/// # Errors
/// If it is there already, or a file cannot be written.
pub fn write(parent: &Path, architecture: Architecture) -> std::io::Result<PathBuf> {
    let dir = parent.join("embedded");
    std::fs::create_dir(&dir)?;
    for (name, bytes) in architecture.files() {
        std::fs::write(dir.join(name), bytes)?;
    }
    Ok(dir)
}
