//! The place of the results, which a run that was stopped finds again.

use std::fs;
use std::path::{Path, PathBuf};

use examples::interrupt;
use examples::outcome::Result;
use examples::settings::Settings;
use peft::Group;
use serde::{Deserialize, Serialize};
use tensor_files::Partial;

use crate::report::Run;

/// The settings as they are used, beside the results.
const SETTINGS: &str = "adapt.toml";
/// The settings as they were given, among the notes.
const GIVEN: &str = "given.toml";
/// Options that a run may be resumed without, since they change no result.
const UNCHANGING: [&str; 2] = ["checkpoint-blocks", "checkpoint-every"];
const CHECKPOINTS: &str = "checkpoints";
const DONE: &str = "done";

/// The directory in which results are written, and gets its name when all of them are there.
pub(crate) struct Place {
    files: PathBuf,
    /// None without `--out`, or in a process that is not the first: then the results are removed in the end.
    partial: Option<Partial>,
    /// The notes on a run that is kept, which is that of the first process.
    kept: Option<PathBuf>,
}

/// A base that is tuned, with its results among the files.
#[derive(Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) run: Run,
    /// Why the model is not in the format that was asked for.
    pub(crate) refusal: Option<String>,
}

impl Place {
    /// Opens the place of `out` for a run of these settings, or one that is not kept in `scratch`.
    ///
    /// # Errors
    /// If something is there already: results, or a run that was stopped and is not to be resumed or had
    /// other settings.
    pub(crate) fn open(
        out: Option<&Path>,
        scratch: &Path,
        settings: &Settings,
        resume: bool,
        group: &dyn Group,
    ) -> Result<Self> {
        let Some(out) = out.filter(|_| group.rank() == 0) else {
            let files = scratch.join("results");
            fs::create_dir_all(&files)?;
            return Ok(Self {
                files,
                partial: None,
                kept: out.map(Partial::notes_of).transpose()?,
            });
        };
        let partial = Partial::open(out)?;
        let place = Self {
            files: partial.files(),
            kept: Some(partial.notes().into()),
            partial: Some(partial),
        };
        let notes = place.notes();
        if place.has_progress() {
            let path = notes.display();
            if !resume {
                return Err(format!(
                    "`{path}` has the checkpoints of a run that was stopped: add --resume to go on, or remove the directory to begin again"
                )
                .into());
            }
            let given = Settings::read(&notes.join(GIVEN))?;
            // The options as they were used are the same, with what was chosen.
            let used = Settings::read(&place.files.join(SETTINGS));
            let difference = |was: &Settings| was.difference(settings, &UNCHANGING);
            let is_used = used.is_ok_and(|used| difference(&used).is_none());
            if let Some(difference) = difference(&given).filter(|_| !is_used) {
                return Err(format!(
                    "`{path}` is of a run with other options: {difference}; give what it was begun with, or remove the directory to begin again"
                )
                .into());
            }
        } else {
            interrupt::discard(&notes);
            place.clear("")?;
            let text = settings.text("The options of the run in this directory.");
            tensor_files::write(&notes.join(GIVEN), text.as_bytes())?;
        }
        Ok(place)
    }

    /// The directory for the results.
    pub(crate) fn files(&self) -> &Path {
        &self.files
    }

    /// Whether it is kept, so that a run can be resumed.
    pub(crate) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    fn notes(&self) -> PathBuf {
        self.kept.as_ref().unwrap_or(&self.files).clone()
    }

    /// The directory of the checkpoints of a base, if it is kept.
    pub(crate) fn checkpoints(&self, name: &str) -> Option<PathBuf> {
        Some(self.kept.as_ref()?.join(CHECKPOINTS).join(name))
    }

    /// Whether there is something to go on from.
    fn has_progress(&self) -> bool {
        let entries = |dir: &Path| -> Vec<PathBuf> {
            let entries = fs::read_dir(dir).into_iter().flatten();
            entries.flatten().map(|entry| entry.path()).collect()
        };
        let notes = self.notes();
        let mut checkpoints = entries(&notes.join(CHECKPOINTS)).into_iter();
        let is_checkpoint = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            !name.as_encoded_bytes().starts_with(b".")
        };
        !entries(&notes.join(DONE)).is_empty()
            || checkpoints.any(|of_base| entries(&of_base).iter().any(is_checkpoint))
    }

    /// Checks that the file system has room for so many bytes.
    pub(crate) fn require(&self, n_bytes: u64) -> Result<()> {
        match &self.partial {
            Some(partial) => Ok(partial.require(n_bytes)?),
            None => Ok(()),
        }
    }

    /// Writes the settings as they are used, when the work begins.
    pub(crate) fn begin(&self, settings: &Settings) -> Result<()> {
        if let Some(notes) = &self.kept {
            interrupt::keep(notes);
        }
        let about = "The options as they were used: adapt --config FILE --out DIR repeats the run.";
        let path = self.files.join(SETTINGS);
        Ok(tensor_files::write(&path, settings.text(about).as_bytes())?)
    }

    /// The results of a base that is done.
    pub(crate) fn done(&self, name: &str) -> Result<Option<Done>> {
        let path = self.notes().join(DONE).join(format!("{name}.json"));
        if !tensor_files::is_there(&path) {
            return Ok(None);
        }
        Ok(Some(tensor_files::read_json(&path)?))
    }

    /// Takes note of a base that is done, whose checkpoints are removed.
    pub(crate) fn finish(&self, name: &str, done: &Done) -> Result<()> {
        let Some(checkpoints) = self.checkpoints(name) else {
            return Ok(());
        };
        interrupt::uninterrupted(|| -> Result<()> {
            let dir = self.notes().join(DONE);
            fs::create_dir_all(&dir)?;
            tensor_files::write_json(&dir.join(format!("{name}.json")), done)?;
            // What cannot be removed is not looked at again.
            let _ = fs::remove_dir_all(checkpoints);
            Ok(())
        })
    }

    /// The learning rate of a base, which `choose` chooses in the first run.
    pub(crate) fn rate(&self, name: &str, choose: impl FnOnce() -> Result<f64>) -> Result<f64> {
        let Some(partial) = &self.partial else {
            return choose();
        };
        let path = partial.notes().join(format!("{name}-rate.json"));
        if tensor_files::is_there(&path) {
            return Ok(tensor_files::read_json(&path)?);
        }
        let rate = choose()?;
        tensor_files::write_json(&path, &rate)?;
        Ok(rate)
    }

    /// Removes files whose names begin so, which a run that was stopped left, but for what it wrote of its
    /// training.
    pub(crate) fn clear(&self, name: &str) -> Result<()> {
        for entry in fs::read_dir(&self.files)? {
            let path = entry?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            if file.starts_with(name) && (name.is_empty() || file != training(name)) {
                match path.is_dir() {
                    true => fs::remove_dir_all(&path)?,
                    false => fs::remove_file(&path)?,
                }
            }
        }
        Ok(())
    }

    /// Gives the results their name, and removes the rest.
    pub(crate) fn publish(mut self) -> Result<()> {
        let partial = self.partial.take();
        let published = interrupt::uninterrupted(|| partial.map_or(Ok(()), Partial::publish));
        Ok(published?)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Where nothing was written, nothing is left: only an empty directory can be removed so.
        if fs::remove_dir(&self.files).is_ok()
            && let Some(partial) = self.partial.take()
        {
            let _ = partial.remove();
        }
    }
}

/// The name of the directory for what is written of the training of a base.
pub(crate) fn training(name: &str) -> String {
    format!("{name}-training")
}
