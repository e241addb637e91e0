//! The journal of a run from files to files: what was asked for, and the parts that are done.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use peft::{Adapters, InitializedLayer, LayerError, LayerReport};
use quant_core::{Distortion, Format, Note};
use serde::{Deserialize, Serialize};

use super::super::format::{Layers, PackedLayer};
use super::place::Place;
use crate::source::HEAD;
use crate::{Result, StreamError};

const FILE: &str = "journal.json";
const VERSION: u32 = 2;

/// What was asked for: of two runs of the same settings, one goes on where the other stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    pub(super) program: String,
    /// The SHA-256 of the configuration, and of the files that are copied.
    pub(super) files: BTreeMap<String, String>,
    /// Of each file of weights, the SHA-256 of its length and its header.
    pub(super) weights: BTreeMap<String, String>,
    pub(super) format: String,
    /// The method and its settings.
    pub(super) method: String,
    /// The quantizer of each layer.
    pub(super) recipe: BTreeMap<String, String>,
    /// The SHA-256 of the tokens of each batch.
    pub(super) calibration: Vec<String>,
    pub(super) compute: String,
    pub(super) device: String,
    pub(super) arithmetic: String,
}

impl Settings {
    /// The first difference: what it is in, and both sides of it.
    fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let one = |what: &str, was: &str, is: &str| {
            (was != is).then(|| (what.to_string(), was.to_string(), is.to_string()))
        };
        let maps = |what: &str, was: &BTreeMap<String, String>, is: &BTreeMap<String, String>| {
            let names = was.keys().chain(is.keys());
            let get = |of: &BTreeMap<String, String>, name: &String| {
                of.get(name).cloned().unwrap_or_else(|| "none".into())
            };
            let mut differences = names.filter_map(|name| {
                one(&format!("{what} `{name}`"), &get(was, name), &get(is, name))
            });
            differences.next()
        };
        let calibration = || {
            let (was, is) = (self.calibration.len(), other.calibration.len());
            if was != is {
                return one(
                    "number of batches of the calibration",
                    &was.to_string(),
                    &is.to_string(),
                );
            }
            let mut pairs = self.calibration.iter().zip(&other.calibration);
            let at = pairs.position(|(was, is)| was != is)?;
            let (was, is) = (&self.calibration[at], &other.calibration[at]);
            one(&format!("batch {at} of the calibration"), was, is)
        };
        one("program", &self.program, &other.program)
            .or_else(|| maps("file", &self.files, &other.files))
            .or_else(|| maps("file of weights", &self.weights, &other.weights))
            .or_else(|| one("format", &self.format, &other.format))
            .or_else(|| one("method", &self.method, &other.method))
            .or_else(|| maps("quantizer of", &self.recipe, &other.recipe))
            .or_else(calibration)
            .or_else(|| one("type of the activations", &self.compute, &other.compute))
            .or_else(|| one("device", &self.device, &other.device))
            .or_else(|| one("arithmetic", &self.arithmetic, &other.arithmetic))
    }
}

/// A part of the model that is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    /// The name of its file.
    pub(super) file: String,
    /// The SHA-256 of its file.
    pub(super) sha256: String,
    /// The SHA-256 of each tensor that it was made of.
    pub(super) made_of: BTreeMap<String, String>,
    /// The SHA-256 of each file of its adapters, which are beside the journal; empty if it has none.
    pub(super) adapters: BTreeMap<String, String>,
    pub(super) layers: Vec<Layer>,
}

/// The SHA-256 of each file of a directory.
fn sums(dir: &Path) -> Result<BTreeMap<String, String>> {
    let io = |cause| tensor_files::Error::Io {
        path: dir.into(),
        cause,
    };
    let mut sums = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        sums.insert(name, tensor_files::sha256(&entry.path())?);
    }
    Ok(sums)
}

/// A projection, or the head if it is packed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Layer {
    pub(super) path: String,
    pub(super) dims: [usize; 2],
    /// The format of a packed layer.
    pub(super) format: Option<Format>,
    pub(super) has_order: bool,
    pub(super) report: Option<Report>,
}

/// An [`InitializedLayer`] without path and format.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Report {
    before: Errors,
    after: Errors,
    rank: Option<usize>,
    round: usize,
    n_bytes: usize,
    seconds: f64,
    notes: Vec<Note>,
}

/// A [`LayerError`] with all that is known of the weight.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Errors {
    weight: Distortion,
    output: Option<f64>,
}

impl From<LayerError> for Errors {
    fn from(LayerError { weight, output }: LayerError) -> Self {
        Self { weight, output }
    }
}

impl From<&Errors> for LayerError {
    fn from(&Errors { weight, output }: &Errors) -> Self {
        Self { weight, output }
    }
}

impl From<&InitializedLayer> for Report {
    fn from(layer: &InitializedLayer) -> Self {
        let InitializedLayer { report, .. } = layer;
        Self {
            before: layer.before.into(),
            after: report.error.into(),
            rank: layer.rank,
            round: layer.round,
            n_bytes: report.n_bytes,
            seconds: report.seconds,
            notes: report.notes.clone(),
        }
    }
}

impl Part {
    /// Whether its files are the ones that were written.
    fn is_whole(&self, place: &Place) -> Result<bool> {
        let path = place.base().join(&self.file);
        // A file that cannot be read is an error: it may be whole.
        let is_whole = tensor_files::is_there(&path) && tensor_files::sha256(&path)? == self.sha256;
        if self.adapters.is_empty() || !is_whole {
            return Ok(is_whole);
        }
        let dir = self.adapters_dir(place);
        Ok(dir.is_dir() && sums(&dir)? == self.adapters)
    }

    /// The name of the directory of its adapters.
    fn adapters_name(&self) -> &str {
        self.file.strip_suffix(".safetensors").unwrap_or(&self.file)
    }

    /// The directory of its adapters.
    pub(super) fn adapters_dir(&self, place: &Place) -> PathBuf {
        place.adapters().join(self.adapters_name())
    }

    /// Writes its adapters.
    pub(super) fn write_adapters(&mut self, adapters: &Adapters, place: &Place) -> Result<()> {
        let dir = self.adapters_dir(place);
        adapters.save(&dir)?;
        self.adapters = sums(&dir)?;
        Ok(())
    }
}

impl Layer {
    pub(super) fn report(&self) -> Option<InitializedLayer> {
        let report = self.report.as_ref()?;
        Some(InitializedLayer {
            report: LayerReport {
                path: self.path.clone(),
                format: self.format,
                error: (&report.after).into(),
                n_bytes: report.n_bytes,
                seconds: report.seconds,
                notes: report.notes.clone(),
            },
            rank: report.rank,
            before: (&report.before).into(),
            round: report.round,
        })
    }
}

/// Lists the layers of parts, in the order of the model.
pub(super) fn layers<'a>(parts: impl IntoIterator<Item = &'a Part>) -> Layers {
    let mut all = Layers::default();
    for layer in parts.into_iter().flat_map(|part| &part.layers) {
        let packed = layer.format.map(|format| PackedLayer {
            path: layer.path.clone(),
            format,
            dims: layer.dims,
            has_order: layer.has_order,
        });
        match packed {
            Some(packed) if layer.path == HEAD => all.head = Some(packed),
            Some(packed) => all.packed.push(packed),
            None => all.dense.push(layer.path.clone()),
        }
    }
    all
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    settings: Settings,
    parts: Vec<Part>,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The journal in the directory of a [`Partial`](tensor_files::Partial).
pub(super) struct Journal {
    path: PathBuf,
    content: Content,
}

impl Journal {
    /// Opens the journal of a run of these settings, or begins one. A part whose file is not whole any more
    /// does not count, and neither do those after it.
    ///
    /// `files` are the names of the files of all parts.
    pub(super) fn open(
        place: &Place,
        settings: Settings,
        files: &[String],
        resume: bool,
    ) -> Result<Self> {
        let path = place.notes().join(FILE);
        let mut journal = Self {
            content: Content {
                version: VERSION,
                settings,
                parts: Vec::new(),
            },
            path,
        };
        if tensor_files::is_there(&journal.path) {
            let parts = journal.read(place.notes(), files, resume)?;
            for part in parts {
                if !part.is_whole(place)? {
                    break;
                }
                journal.content.parts.push(part);
            }
        } else if !place.is_empty()? {
            // Of another program, or of a run whose journal was removed.
            let path = place.notes().into();
            return Err(StreamError::NoJournal { path }.into());
        }
        journal.write()?;
        let files: Vec<&str> = journal.parts().iter().map(|of| of.file.as_str()).collect();
        let adapters: Vec<&str> = journal.parts().iter().map(Part::adapters_name).collect();
        place.keep(&files, &adapters)?;
        Ok(journal)
    }

    /// Reads the parts that are done.
    fn read(&self, notes: &Path, files: &[String], resume: bool) -> Result<Vec<Part>> {
        let path = notes.into();
        let refuse = |problem: String| {
            let path = self.path.clone();
            tensor_files::Error::File { path, problem }
        };
        // Written here, and longer than a configuration where a model has many layers.
        let text = tensor_files::read(&self.path)?;
        let damaged = |error: serde_json::Error| refuse(error.to_string());
        // Before the rest, which another version may have otherwise.
        let Version { version } = serde_json::from_slice(&text).map_err(damaged)?;
        if version != VERSION {
            let problem = format!("has the version {version}; this program reads {VERSION}");
            return Err(refuse(problem).into());
        }
        let found: Content = serde_json::from_slice(&text).map_err(damaged)?;
        let mut names = found.parts.iter().map(|part| &part.file).zip(files);
        if found.parts.len() > files.len() || names.any(|(found, file)| found != file) {
            return Err(refuse("lists other files than the model has".into()).into());
        }
        if found.parts.is_empty() {
            return Ok(Vec::new());
        }
        if !resume {
            return Err(StreamError::Unfinished { path }.into());
        }
        let Some((what, was, is)) = found.settings.difference(&self.content.settings) else {
            return Ok(found.parts);
        };
        let error = StreamError::Differs {
            path,
            what,
            was,
            is,
        };
        Err(error.into())
    }

    /// The parts that are done, from the first on.
    pub(super) fn parts(&self) -> &[Part] {
        &self.content.parts
    }

    /// Adds a part whose file is on the disk.
    pub(super) fn push(&mut self, part: Part) -> Result<()> {
        self.content.parts.push(part);
        self.write()
    }

    fn write(&self) -> Result<()> {
        Ok(tensor_files::write_json(&self.path, &self.content)?)
    }
}
