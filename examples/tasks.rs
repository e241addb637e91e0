//! Serves several tasks from one quantized base: each is a few kilobytes of scales beside the same
//! codes, and switching between them loads nothing.
//!
//! `cargo run --release --example tasks`

#![expect(clippy::print_stdout, reason = "a program says what it did")]

use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use evaluate::perplexity;
use examples::corpus::{self, Dialect};
use examples::embedded::{self, Architecture};
use examples::table::{self, number};
use examples::tuning::{Result, exit, weights_bytes};
use peft::{Batch, Fingerprint, FitConfig, Peqa, TaskPack, Tasks};
use quant_core::Rtn;

fn main() -> ExitCode {
    exit(run())
}

fn run() -> Result<()> {
    let device = Device::flex();
    let scratch = tempfile::tempdir()?;
    let source = embedded::write(scratch.path(), Architecture::Llama)?;
    let mut lm = models::load(&source, &device)?;
    models::quantize(
        &mut lm.model,
        &Rtn::new().with_bits(3).with_group_size(32),
        &[],
        |_| {},
    )?;
    let base_dir = scratch.path().join("3-bit");
    models::save(&lm, &base_dir)?;

    let batches = |text: &str, windows: usize, batch: usize| -> Result<Vec<Batch>> {
        Ok(lm.windows(text, 128)?.take(windows).batches(batch, &device))
    };
    let dialects = [("plain", Dialect::Plain), ("old", Dialect::Old)];
    let mut merged = Vec::new();
    for (at, (name, dialect)) in dialects.into_iter().enumerate() {
        let train = batches(&corpus::text(dialect, 200_000, 20 + at as u64), 320, 8)?;
        let mut model = lm.model.clone();
        peft::attach(&mut model, &Peqa::new())?;
        let config = FitConfig::new().with_learning_rate(2e-3);
        peft::fit(&mut model, &train, &config, |_| {})?;
        let (pack, change) = TaskPack::of(&model)?.rounded_to_f16()?;
        pack.save(scratch.path().join(name))?;
        println!(
            "{name}: {} scales, rounded to f16 by at most {change:.1e} of each",
            pack.n_values()
        );
        peft::merge(&mut model)?;
        merged.push(model);
    }

    // What a server does: one base, tasks by name.
    let base = models::load(&base_dir, &device)?;
    let mut tasks = Tasks::new(base.model)?;
    for (name, _) in dialects {
        tasks.insert(name, TaskPack::load(scratch.path().join(name))?)?;
    }
    let eval: Vec<Vec<Batch>> = dialects
        .iter()
        .map(|(_, dialect)| batches(&corpus::text(*dialect, 25_000, 30), 64, 8))
        .collect::<Result<_>>()?;
    let header = ["task", "bytes", "switched in ms", "plain text", "old text"];
    let mut rows = vec![header.map(String::from)];
    let before = Fingerprint::of(tasks.model());
    for name in [None, Some("plain"), Some("old"), None] {
        let start = Instant::now();
        tasks.activate(name)?;
        let milliseconds = 1e3 * start.elapsed().as_secs_f64();
        let value = |eval: &[Batch]| -> Result<String> {
            Ok(number(Some(perplexity(tasks.model(), eval)?.value()), 3))
        };
        let dir = name.map_or(base_dir.clone(), |name| scratch.path().join(name));
        rows.push([
            name.unwrap_or("base").into(),
            weights_bytes(&dir)?.to_string(),
            format!("{milliseconds:.2}"),
            value(&eval[0])?,
            value(&eval[1])?,
        ]);
    }
    assert_eq!(
        Fingerprint::of(tasks.model()),
        before,
        "the base is as it was"
    );
    println!("\n{}", table::markdown(&rows));
    let mut rows = vec![["merged model", "plain text", "old text"].map(String::from)];
    for ((name, _), model) in dialects.iter().zip(&merged) {
        let value = |eval: &[Batch]| -> Result<String> {
            Ok(number(Some(perplexity(model, eval)?.value()), 3))
        };
        rows.push([name.to_string(), value(&eval[0])?, value(&eval[1])?]);
    }
    println!("{}", table::markdown(&rows));
    Ok(())
}
