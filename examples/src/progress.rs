//! Progress bars.

use std::fmt::Write;
use std::time::{Duration, Instant};

use indicatif::style::ProgressTracker;
use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

use crate::outcome::Result;

/// Returns a bar of this length that shows the count of its `unit`, the time left and a message.
///
/// The time left is known once a second unit is done: it counts from the first one on, and what was done
/// before does not change it.
///
/// # Errors
/// If the unit is not a part of a template.
pub fn bar(length: usize, unit: &str) -> Result<ProgressBar> {
    let bar = ProgressBar::new(length as u64);
    let template = format!("{{prefix}} {{bar:30}} {{pos}}/{{len}} {unit}, {{left}} left, {{msg}}");
    let style = ProgressStyle::with_template(&template)?;
    bar.set_style(style.with_key("left", TimeLeft::default()));
    bar.tick();
    Ok(bar)
}

/// A bar that is removed when it is dropped.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar of this name and length, as [`bar`].
    ///
    /// # Errors
    /// If the unit is not a part of a template.
    pub fn new(name: &str, length: usize, unit: &str) -> Result<Self> {
        let bar = bar(length, unit)?;
        bar.set_prefix(name.to_string());
        Ok(Self(bar))
    }

    /// Counts a unit.
    pub fn step(&mut self, message: &str) {
        self.0.set_message(message.to_string());
        self.0.inc(1);
    }

    /// Counts what was done before.
    pub fn skip(&mut self, n: usize) {
        self.0.set_position(n as u64);
    }

    /// Prints a line above the bar.
    pub fn print(&self, line: &str) {
        self.0.suspend(|| crate::println!("{line}"));
    }

    /// Whether all units are done.
    pub fn is_full(&self) -> bool {
        Some(self.0.position()) == self.0.length()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The time left by the pace since the first unit.
#[derive(Clone, Copy, Default)]
struct TimeLeft {
    /// The first count above 0, and when it was reached.
    first: Option<(u64, Instant)>,
    /// The last count.
    done: u64,
    left: Option<Duration>,
}

impl TimeLeft {
    fn update(&mut self, done: u64, length: u64, now: Instant) {
        if done == 0 || done == self.done {
            return;
        }
        self.done = done;
        let (first, since) = *self.first.get_or_insert((done, now));
        if done > first {
            let each = (now - since).as_secs_f64() / (done - first) as f64;
            let n_left = length.saturating_sub(done) as f64;
            self.left = Some(Duration::from_secs_f64(each * n_left));
        }
    }
}

impl ProgressTracker for TimeLeft {
    fn clone_box(&self) -> Box<dyn ProgressTracker> {
        Box::new(*self)
    }

    fn tick(&mut self, state: &ProgressState, now: Instant) {
        self.update(state.pos(), state.len().unwrap_or(0), now);
    }

    fn reset(&mut self, _: &ProgressState, _: Instant) {
        *self = Self::default();
    }

    fn write(&self, _: &ProgressState, w: &mut dyn Write) {
        // The buffer takes all text.
        let _ = match self.left {
            Some(left) => write!(w, "{:#}", HumanDuration(left)),
            None => write!(w, "-"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_counts_from_the_first_unit() {
        let start = Instant::now();
        let mut time = TimeLeft::default();
        let mut left = |done, seconds| {
            time.update(done, 20, start + Duration::from_secs(seconds));
            time.left.map(|left| left.as_secs())
        };
        // A minute of preparations, and then two seconds for each of 20 steps.
        assert_eq!(left(0, 60), None);
        assert_eq!(left(1, 62), None);
        assert_eq!(left(2, 64), Some(36));
        // Between two steps it stays.
        assert_eq!(left(2, 65), Some(36));
        assert_eq!(left(11, 82), Some(18));
        assert_eq!(left(20, 100), Some(0));
    }
}
