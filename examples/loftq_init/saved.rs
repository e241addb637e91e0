//! The directories of a base and its adapters, with a report.

use std::path::{Path, PathBuf};

use examples::outcome::{Result, save_as};
use examples::{interrupt, println};
use loftq::InitializedLayer;
use models::Pretrained;
use peft::Adapters;
use serde::Serialize;
use tensor_files::Output;

use crate::Args;

/// The contents of the JSON file.
#[derive(Serialize)]
pub(crate) struct Report<'a> {
    /// The version of this program, and the command that was given.
    version: &'static str,
    command: Vec<String>,
    model: String,
    device: String,
    dtype: &'static str,
    layers: &'a [InitializedLayer],
}

impl<'a> Report<'a> {
    pub(crate) fn new(args: &Args, layers: &'a [InitializedLayer]) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().collect(),
            model: args.model.name(),
            device: args.model.device.name.clone(),
            dtype: args.model.dtype.name.name(),
            layers,
        }
    }

    /// Writes the file into a directory.
    pub(crate) fn write(&self, dir: &Path) -> tensor_files::Result<()> {
        tensor_files::write_json(&dir.join("report.json"), self)
    }
}

/// The directories of a base and the adapters that it starts with.
pub(crate) struct Saved {
    pub(crate) base: PathBuf,
    pub(crate) adapter: PathBuf,
    /// Why the base is not in the format that was asked for.
    pub(crate) refusal: Option<models::Error>,
}

impl Saved {
    /// Base and adapters in the directory `out`.
    pub(crate) fn new(out: &Path) -> Self {
        Self {
            base: out.join("base"),
            adapter: out.join("adapter"),
            refusal: None,
        }
    }

    pub(crate) fn print(&self) {
        println!(
            "saved: the base {}, the adapters that it starts with {}",
            self.base.display(),
            self.adapter.display()
        );
    }

    /// The directory of the tuned adapters.
    pub(crate) fn adapter_tuned(&self) -> PathBuf {
        self.adapter.with_file_name("adapter-tuned")
    }
}

/// Saves the base and its initial adapters.
pub(crate) fn save(
    args: &Args,
    output: Output,
    base: &Pretrained,
    adapters: &Adapters,
    layers: &[InitializedLayer],
) -> Result<Saved> {
    let mut saved = Saved::new(output.dir());
    output.write(|dir| -> Result<()> {
        let to_base = interrupt::reserve(&dir.join("base"))?;
        let (to_base, refusal) = save_as(base, to_base, args.format.format())?;
        if let Some(name) = to_base.file_name() {
            saved.base.set_file_name(name);
        }
        saved.refusal = refusal;
        adapters.save_hf(dir.join("adapter"), &base.model)?;
        Ok(Report::new(args, layers).write(dir)?)
    })?;
    saved.print();
    Ok(saved)
}
