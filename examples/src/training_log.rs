//! What is written of a training: a line of JSON for each step, an event file of TensorBoard, and curves.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use peft::Step;
use serde::{Deserialize, Deserializer, Serialize};

use crate::curves;
use crate::outcome::Result;
use crate::tfevents::{self, EventFile};

/// The name of the file with a line for each step.
const METRICS: &str = "metrics.jsonl";

/// The name of the file with the curves.
const CURVES: &str = "curves.svg";

/// A step of a training: a line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The index of the step, counted from 1.
    pub step: usize,
    /// The mean loss over the step's targets before its update, in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The norm of all gradients before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// The number of targets.
    pub n_targets: usize,
    /// The mean loss over the targets of the evaluation after the update, in nats, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// How long it took, unless that was lost.
    #[serde(flatten)]
    pub timing: Option<Timing>,
}

/// How long a step took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Tokens in a second of the step.
    pub tokens_per_second: f64,
    /// Its seconds.
    pub seconds: f64,
    /// When it ended, in seconds since 1970.
    pub time: f64,
}

/// A number, or `null` for one that is not finite.
fn number<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Record {
    /// That of a step.
    pub fn new(step: &Step, timing: Option<Timing>) -> Self {
        Self {
            step: step.index,
            loss: step.loss,
            learning_rate: step.learning_rate,
            grad_norm: step.grad_norm,
            n_targets: step.n_targets,
            eval_loss: step.held_out_loss,
            timing,
        }
    }

    /// The names and values that TensorBoard shows.
    fn scalars(&self) -> Vec<(&str, f64)> {
        let mut scalars = vec![
            ("train/loss", self.loss),
            ("train/learning_rate", self.learning_rate),
            ("train/grad_norm", self.grad_norm),
        ];
        let speed = self.timing.map(|timing| timing.tokens_per_second);
        scalars.extend(speed.map(|speed| ("train/tokens_per_second", speed)));
        scalars.extend(self.eval_loss.map(|loss| ("eval/loss", loss)));
        scalars
    }
}

/// The files of a training, in a directory.
#[derive(Debug)]
pub struct TrainingLog {
    dir: PathBuf,
    metrics: File,
    events: EventFile,
    records: Vec<Record>,
}

impl TrainingLog {
    /// Begins the files, or goes on with those of a run that was stopped, after these steps of it.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn open(dir: &Path, earlier: &[Step]) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|error| at(dir, error))?;
        let path = dir.join(METRICS);
        let timings = if earlier.is_empty() {
            HashMap::new()
        } else {
            timings(&path)
        };
        let records = earlier.iter().map(|step| {
            let timing = timings.get(&step.index);
            Record::new(step, timing.copied())
        });
        let records: Vec<Record> = records.collect();
        let lines = records.iter().map(line).collect::<Result<Vec<_>>>()?;
        tensor_files::write(&path, lines.concat().as_bytes())?;
        let metrics = OpenOptions::new().append(true).open(&path);
        let metrics = metrics.map_err(|error| at(&path, error))?;
        // Written again: what is after those steps goes.
        let path = dir.join(tfevents::NAME);
        let mut time = records.iter().find_map(|record| record.timing);
        let began = time.map_or_else(now, |timing| timing.time - timing.seconds);
        let mut events = EventFile::create(&path, began).map_err(|error| at(&path, error))?;
        for record in &records {
            time = record.timing.or(time);
            let time = time.map_or(began, |timing| timing.time);
            let added = events.add(time, record.step, &record.scalars());
            added.map_err(|error| at(&path, error))?;
        }
        Ok(Self {
            dir: dir.into(),
            metrics,
            events,
            records,
        })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let time = record.timing.map_or_else(now, |timing| timing.time);
        let line = line(&record)?;
        let written = self.metrics.write_all(line.as_bytes());
        written.map_err(|error| at(&self.dir.join(METRICS), error))?;
        let added = self.events.add(time, record.step, &record.scalars());
        added.map_err(|error| at(&self.dir.join(tfevents::NAME), error))?;
        self.records.push(record);
        Ok(())
    }

    /// Draws the curves.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn draw(&self, title: &str) -> Result<()> {
        let svg = curves::svg(title, &self.records);
        Ok(tensor_files::write(&self.dir.join(CURVES), svg.as_bytes())?)
    }
}

/// How long the steps of a file took, as far as it tells: a process that was killed may have left half a
/// line, and a loss of power less.
fn timings(path: &Path) -> HashMap<usize, Timing> {
    let text = std::fs::read(path).unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n');
    let records = lines.filter_map(|line| serde_json::from_slice::<Record>(line).ok());
    let timings = records.filter_map(|record| Some((record.step, record.timing?)));
    timings.collect()
}

fn at(path: &Path, error: io::Error) -> Box<dyn Error> {
    format!("`{}`: {error}", path.display()).into()
}

/// The seconds since 1970.
pub fn now() -> f64 {
    let since = std::time::UNIX_EPOCH.elapsed();
    since.map_or(0.0, |since| since.as_secs_f64())
}

fn line(record: &Record) -> Result<String> {
    Ok(serde_json::to_string(record)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(index: usize) -> Step {
        Step {
            index,
            n_steps: 9,
            loss: if index == 2 {
                f64::NAN
            } else {
                1.0 / index as f64
            },
            grad_norm: 0.1,
            learning_rate: 1e-3,
            n_targets: 127,
            held_out_loss: index.is_multiple_of(3).then_some(0.5),
            is_skipped: index == 2,
        }
    }

    fn record(index: usize) -> Record {
        let timing = Timing {
            tokens_per_second: 1e3,
            seconds: 0.128,
            time: 1.7e9 + index as f64,
        };
        Record::new(&step(index), Some(timing))
    }

    /// A run that is stopped and goes on has the files of one that is not.
    #[test]
    fn a_log_goes_on() {
        let place = tempfile::tempdir().unwrap();
        let dirs = ["whole", "parts"].map(|name| place.path().join(name));
        let files = |dir: &Path| {
            [METRICS, tfevents::NAME, CURVES].map(|name| std::fs::read(dir.join(name)).unwrap())
        };
        let mut whole = TrainingLog::open(&dirs[0], &[]).unwrap();
        (1..=9).for_each(|index| whole.add(record(index)).unwrap());
        whole.draw("title").unwrap();
        let mut parts = TrainingLog::open(&dirs[1], &[]).unwrap();
        (1..=5).for_each(|index| parts.add(record(index)).unwrap());
        drop(parts);
        // Killed in the middle of a line.
        let path = dirs[1].join(METRICS);
        let mut text = std::fs::read(&path).unwrap();
        text.extend(b"{\"step\":6,");
        std::fs::write(&path, text).unwrap();
        let earlier: Vec<Step> = (1..=3).map(step).collect();
        let mut parts = TrainingLog::open(&dirs[1], &earlier).unwrap();
        (4..=9).for_each(|index| parts.add(record(index)).unwrap());
        parts.draw("title").unwrap();
        let [metrics, events, curves] = files(&dirs[1]);
        assert_eq!(
            [&metrics, &curves],
            [&files(&dirs[0])[0], &files(&dirs[0])[2]]
        );
        // The first event has the time at which the file was made.
        let whole_events = &files(&dirs[0])[1];
        let first = 12 + 24 + 4;
        assert_eq!(whole_events.len(), events.len());
        assert_eq!(whole_events[first..], events[first..]);
        // Without the file, the steps are those of the checkpoint.
        std::fs::remove_file(&path).unwrap();
        drop(TrainingLog::open(&dirs[1], &earlier).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        let second =
            r#"{"step":2,"loss":null,"learning_rate":0.001,"grad_norm":0.1,"n_targets":127}"#;
        assert_eq!(text.lines().nth(1), Some(second));
        assert_eq!(text.lines().count(), 3);
    }
}
