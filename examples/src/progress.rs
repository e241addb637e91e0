//! Progress bars. What is printed with the macros of [`console`](crate::console) stays above them.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::style::ProgressTracker;
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressState, ProgressStyle};

use crate::outcome::Result;

/// The bars that are shown.
static SHOWN: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// A bar that is removed when it is dropped.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar of this length that shows its name, the count of its `unit`, the time left and a message.
    ///
    /// The time left is known once a second unit is done: it counts from the first one on, and what was
    /// done before does not change it.
    ///
    /// # Errors
    /// If the unit is not a part of a template.
    pub fn new(name: impl Into<Cow<'static, str>>, length: usize, unit: &str) -> Result<Self> {
        let template =
            format!("{{prefix}} {{bar:30}} {{pos}}/{{len}} {unit}, {{left}} left{{msg}}");
        let style = ProgressStyle::with_template(&template)?;
        let style = style.with_key("left", TimeLeft::default());
        let bar = ProgressBar::new(length as u64).with_style(style);
        Ok(Self::shown(bar, name.into()))
    }

    /// A sign that something whose length is not known goes on, with the time that it has taken.
    ///
    /// # Errors
    /// None: the template is one.
    pub fn unmeasured(name: impl Into<Cow<'static, str>>) -> Result<Self> {
        let style = ProgressStyle::with_template("{prefix} {spinner} {elapsed}")?;
        let bar = Self::shown(ProgressBar::new_spinner().with_style(style), name.into());
        bar.0.enable_steady_tick(Duration::from_millis(200));
        Ok(bar)
    }

    fn shown(bar: ProgressBar, name: Cow<'static, str>) -> Self {
        let bar = SHOWN.add(bar.with_prefix(name));
        bar.tick();
        Self(bar)
    }

    /// Counts a unit, and says something.
    pub fn step(&self, message: &str) {
        self.set(self.0.position() as usize + 1, message);
    }

    /// Sets the count, and says something.
    pub fn set(&self, done: usize, message: &str) {
        let comma = if message.is_empty() { "" } else { ", " };
        self.0.set_message(format!("{comma}{message}"));
        self.0.set_position(done as u64);
    }

    /// Whether all units are done.
    pub fn is_full(&self) -> bool {
        Some(self.0.position()) == self.0.length()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
        SHOWN.remove(&self.0);
    }
}

/// Prints with the bars out of the way.
pub fn hidden<R>(print: impl FnOnce() -> R) -> R {
    SHOWN.suspend(print)
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
