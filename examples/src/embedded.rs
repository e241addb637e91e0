//! The models that the project ships, made by `examples/pretrain.rs`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::outcome::Result;

/// The option of a program that names an embedded model.
#[derive(Args, Clone, Copy, Debug)]
pub struct EmbeddedArg {
    /// Model that is embedded in the program [default: llama]
    #[arg(id = "embedded", long, value_enum, value_name = "NAME")]
    architecture: Option<Architecture>,
}

impl EmbeddedArg {
    fn architecture(&self) -> Architecture {
        self.architecture.unwrap_or(Architecture::Llama)
    }

    /// Writes the model below `scratch` and returns its directory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, scratch: &Path) -> Result<PathBuf> {
        Ok(write(scratch, self.architecture())?)
    }

    /// The name of the model in a report.
    pub fn name(&self) -> &'static str {
        match self.architecture() {
            Architecture::Llama => "the embedded LLaMA",
            Architecture::Opt => "the embedded OPT",
        }
    }
}

/// The architecture of an embedded model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Architecture {
    /// LLaMA of 1.1 million parameters in bf16
    Llama,
    /// OPT of 1.1 million parameters in f16
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

/// Writes the Hugging Face directory of a model into `parent` and returns its path.
///
/// # Errors
/// If it exists already, or a file cannot be written.
pub fn write(parent: &Path, architecture: Architecture) -> tensor_files::Result<PathBuf> {
    let dir = parent.join("embedded");
    tensor_files::write_directory(&dir, |dir| {
        let mut files = architecture.files().into_iter();
        files.try_for_each(|(name, bytes)| tensor_files::write(&dir.join(name), bytes))
    })?;
    Ok(dir)
}
