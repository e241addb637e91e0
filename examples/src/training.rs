//! A training as it is watched: a bar, and what is written of it.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use peft::{Batch, Step};

use crate::outcome::Result;
use crate::progress::Bar;
use crate::texts::n_windows;
use crate::training_log::{Record, Timing, TrainingLog, now};
use crate::{interrupt, memory, println};

/// Shows the steps of a training, and writes them into a directory.
#[derive(Debug)]
pub struct Watch {
    bar: Bar,
    dir: Option<PathBuf>,
    log: Option<TrainingLog>,
    /// The tokens that are read for each target, as a mean over all batches.
    tokens_per_target: f64,
    /// When the last step ended.
    last: Instant,
    /// Why the training was ended.
    failed: Option<Box<dyn Error>>,
}

impl Watch {
    /// A bar of this name for so many steps on these batches, and files in `dir` if it is given.
    ///
    /// # Errors
    /// As [`Bar::new`].
    pub fn new(
        name: String,
        n_steps: usize,
        batches: &[Batch],
        dir: Option<PathBuf>,
    ) -> Result<Self> {
        let tokens = n_windows(batches) * batches.first().map_or(0, |of| of.tokens().dims()[1]);
        let targets = batches.iter().map(Batch::n_targets);
        Ok(Self {
            bar: Bar::new(name, n_steps, "steps")?,
            dir,
            log: None,
            tokens_per_target: tokens as f64 / targets.sum::<usize>().max(1) as f64,
            last: Instant::now(),
            failed: None,
        })
    }

    /// Takes note of the last of these steps. The training goes on, unless a file cannot be written or a
    /// signal ends the program.
    pub fn step(&mut self, steps: &[Step]) -> ControlFlow<()> {
        let Some((step, earlier)) = steps.split_last() else {
            return ControlFlow::Continue(());
        };
        let seconds = self.last.elapsed().as_secs_f64();
        let timing = Timing {
            tokens_per_second: step.n_targets as f64 * self.tokens_per_target / seconds,
            seconds,
            time: now(),
        };
        let resident = memory::resident_bytes();
        let resident = resident.map(|n| format!(", {} MiB", n >> 20));
        let message = format!(
            "loss {:.3}, {:.0} tokens/s{}",
            step.loss,
            timing.tokens_per_second,
            resident.unwrap_or_default()
        );
        self.bar.set(step.index, &message);
        self.failed = self.write(Record::new(step, Some(timing)), earlier).err();
        self.last = Instant::now();
        if self.failed.is_some() || interrupt::is_ending() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    fn write(&mut self, record: Record, earlier: &[Step]) -> Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let log = match self.log.take() {
            Some(log) => log,
            None => {
                if let Some(step) = earlier.last() {
                    println!("going on after step {}", step.index);
                }
                TrainingLog::open(dir, earlier)?
            }
        };
        self.log.insert(log).add(record)
    }

    /// Ends the bar, and draws the curves of the steps under a title, if there are files.
    ///
    /// # Errors
    /// That which ended the training, or if a file cannot be written.
    pub fn finish(self, title: &str, steps: &[Step]) -> Result<()> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        match (self.log, &self.dir) {
            (Some(log), _) => log.draw(title),
            // All steps were done before.
            (None, Some(dir)) => TrainingLog::open(dir, steps)?.draw(title),
            (None, None) => Ok(()),
        }
    }
}
