//! Runs from files to files, block by block.

use models::{Plan, StreamStep};
use peft::{InitializedLayer, LayerReport};

use crate::interrupt;
use crate::outcome::Result;
use crate::progress::Bar;

/// Runs `run` through the blocks of a plan with a bar, and prints each layer that it reports.
///
/// # Errors
/// Those of `run`.
pub fn through_blocks<T>(
    name: &str,
    plan: &Plan,
    run: impl FnOnce(&mut dyn FnMut(StreamStep)) -> models::Result<T>,
) -> Result<T> {
    interrupt::on_end("stopped; the same command with --resume goes on after the last whole block");
    let mut bar = Bar::new(name, plan.config.num_hidden_layers(), "blocks")?;
    let done = run(&mut |step| match step {
        StreamStep::Resumed { n_blocks } => {
            bar.print(&format!("going on after {n_blocks} blocks"));
            bar.skip(n_blocks);
        }
        StreamStep::Quantized(layer) => bar.print(&quantized(layer)),
        StreamStep::Initialized(layer) => bar.print(&initialized(layer)),
        StreamStep::Block { .. } => bar.step(""),
        _ => {}
    });
    drop(bar);
    let done = done?;
    interrupt::on_end("");
    Ok(done)
}

/// A line about a layer that was quantized.
pub fn quantized(layer: &LayerReport) -> String {
    let (path, error, notes) = (&layer.path, &layer.error, notes(layer));
    format!("{path}: {error}{notes}; {:.2} s", layer.seconds)
}

/// A line about a layer that was quantized and has an adapter.
pub fn initialized(layer: &InitializedLayer) -> String {
    let (before, after) = (&layer.before, &layer.report.error);
    let format = layer.report.format;
    let format = format.map_or(String::new(), |format| format!("{format}, "));
    let outputs = before.output.zip(after.output);
    let outputs = outputs.map_or(String::new(), |(before, after)| {
        format!(", output error {before:.4} to {after:.4}")
    });
    format!(
        "{}: {format}weight error {:.4} to {:.4}{outputs}{}; round {}, {:.2} s",
        layer.report.path,
        before.weight.relative,
        after.weight.relative,
        notes(&layer.report),
        layer.round,
        layer.report.seconds
    )
}

fn notes(layer: &LayerReport) -> String {
    let notes = layer.notes.iter();
    notes.map(|note| format!("; {note}")).collect()
}
