//! Progress bars.

use indicatif::{ProgressBar, ProgressStyle};

use crate::outcome::Result;

/// Returns a bar of this length that shows the count of its `unit`, the time left and a message.
///
/// # Errors
/// If the unit is not a part of a template.
pub fn bar(length: usize, unit: &str) -> Result<ProgressBar> {
    let bar = ProgressBar::new(length as u64);
    let template = format!("{{prefix}} {{bar:30}} {{pos}}/{{len}} {unit}, {{eta}} left, {{msg}}");
    bar.set_style(ProgressStyle::with_template(&template)?);
    bar.tick();
    Ok(bar)
}
