//! The models that the project ships, made by `examples/pretrain.rs`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::tuning::Result;

/// The option of a program that names one of the models that come with it.
#[derive(Args, Clone, Copy, Debug)]
pub struct EmbeddedArg {
    /// Which of the models that come with the program [default: llama]
    #[arg(id = "embedded", long, value_enum, value_name = "NAME")]
    architecture: Option<Architecture>,
}

impl EmbeddedArg {
    /// The directory of a model: the one that is named, or the embedded one, written below `scratch`.
    ///
    /// # Errors
    /// If both are named, or the embedded one cannot be written.
    pub fn or(&self, model: Option<&PathBuf>, scratch: &Path) -> Result<PathBuf> {
        match (model, self.architecture) {
            (Some(_), Some(_)) => Err("--model and --embedded are both given; name one".into()),
            (Some(dir), None) => Ok(dir.clone()),
            (None, _) => Ok(write(
                scratch,
                self.architecture.unwrap_or(Architecture::Llama),
            )?),
        }
    }

    /// What the model is called in a report.
    pub fn name(&self, model: Option<&PathBuf>) -> String {
        match (model, self.architecture) {
            (Some(dir), _) => dir.display().to_string(),
            (None, Some(Architecture::Opt)) => "the embedded OPT".into(),
            (None, _) => "the embedded LLaMA".into(),
        }
    }
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
