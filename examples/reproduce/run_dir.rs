//! The directory of a run: its settings, its finished cells and the sections of the report.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ValueEnum;
use examples::outcome::Result;
use examples::{interrupt, println};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::Experiment;
use crate::report::Section;

const SETUP: &str = "setup.json";
const CELLS: &str = "cells";
const SECTIONS: &str = "sections";
const MODELS: &str = "models";
const SCRATCH: &str = ".scratch";

/// A run, which no other process changes meanwhile.
pub(crate) struct Run {
    dir: PathBuf,
    _lock: File,
}

impl Run {
    /// Opens or begins the run of a directory.
    ///
    /// # Errors
    /// If the directory is of a run with other settings, of another process, or cannot be written.
    pub(crate) fn open(dir: &Path, setup: &Map<String, Value>) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let lock = File::create(dir.join(".lock"))?;
        let of = |problem: &str| format!("`{}` {problem}", dir.display());
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(of("is the run of a process that goes on; take another --out").into());
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let path = dir.join(SETUP);
        if tensor_files::is_there(&path) {
            let begun: Map<String, Value> = tensor_files::read_json(&path)?;
            let mut keys = setup.keys().chain(begun.keys());
            if let Some(key) = keys.find(|key| setup.get(*key) != begun.get(*key)) {
                let show =
                    |of: &Map<String, Value>| of.get(key).map_or("none".into(), Value::to_string);
                return Err(of(&format!(
                    "is of a run with other settings: {key} was {}, now it is {}; give what it was begun with, or take another --out",
                    show(&begun),
                    show(setup)
                ))
                .into());
            }
        } else {
            for entry in fs::read_dir(dir)? {
                let name = entry?.file_name();
                if !name.as_encoded_bytes().starts_with(b".") {
                    return Err(of("has files that are not of a run; take another --out").into());
                }
            }
            tensor_files::write_json(&path, setup)?;
        }
        let scratch = dir.join(SCRATCH);
        if scratch.exists() {
            // Of a run that was killed.
            fs::remove_dir_all(&scratch)?;
        }
        for part in [CELLS, SECTIONS, MODELS, SCRATCH] {
            fs::create_dir_all(dir.join(part))?;
        }
        interrupt::discard(&scratch);
        let dir = dir.into();
        Ok(Self { dir, _lock: lock })
    }

    /// The result of a cell, which is computed unless it was before.
    ///
    /// # Errors
    /// That of the cell, or if its file cannot be read or written.
    pub(crate) fn cell<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        compute: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let path = self.dir.join(CELLS).join(format!("{name}.json"));
        if tensor_files::is_there(&path) {
            return Ok(tensor_files::read_json(&path)?);
        }
        let start = Instant::now();
        let result = compute()?;
        // A number that JSON does not have would make a file that is not read again.
        let _: T = serde_json::from_value(serde_json::to_value(&result)?)
            .map_err(|error| format!("{name}: {error}"))?;
        interrupt::uninterrupted(|| tensor_files::write_json(&path, &result))?;
        println!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        // What the file holds, so that a run that was stopped reports the same numbers.
        Ok(tensor_files::read_json(&path)?)
    }

    /// The place of a model that several cells begin with.
    pub(crate) fn model(&self, name: &str) -> PathBuf {
        self.dir.join(MODELS).join(name)
    }

    /// The place of files that are removed at the end.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.dir.join(SCRATCH).join(name)
    }

    /// The settings.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn setup(&self) -> Result<Map<String, Value>> {
        Ok(tensor_files::read_json(&self.dir.join(SETUP))?)
    }

    /// The results of all finished cells.
    ///
    /// # Errors
    /// If one cannot be read.
    pub(crate) fn cells(&self) -> Result<BTreeMap<String, Value>> {
        let mut cells = BTreeMap::new();
        for entry in fs::read_dir(self.dir.join(CELLS))? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            if !name.starts_with('.') {
                cells.insert(name.into_owned(), tensor_files::read_json(&path)?);
            }
        }
        Ok(cells)
    }

    /// Keeps the section of an experiment whose cells are finished.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn finish(&self, experiment: Experiment, section: &Section) -> Result<()> {
        let path = self.section(experiment);
        interrupt::uninterrupted(|| tensor_files::write_json(&path, section))?;
        Ok(())
    }

    /// The sections of the experiments that were done, in their order.
    ///
    /// # Errors
    /// If one cannot be read.
    pub(crate) fn sections(&self) -> Result<Vec<(Experiment, Section)>> {
        let all = Experiment::value_variants().iter();
        let paths = all.map(|experiment| (*experiment, self.section(*experiment)));
        let done = paths.filter(|(_, path)| tensor_files::is_there(path));
        done.map(|(of, path)| Ok((of, tensor_files::read_json(&path)?)))
            .collect()
    }

    fn section(&self, experiment: Experiment) -> PathBuf {
        self.dir
            .join(SECTIONS)
            .join(format!("{}.json", experiment.name()))
    }

    /// Writes a file of the report.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(tensor_files::write(&self.dir.join(name), text.as_bytes())?)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What cannot be removed is removed by the next run.
        let _ = fs::remove_dir_all(self.dir.join(SCRATCH));
    }
}
