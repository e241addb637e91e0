//! Serves several tasks from one quantized base: each task is a few kilobytes of scales for the same
//! codes, and activating it reads no file.
//!
//! `cargo run --release --example tasks`

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use evaluate::perplexity;
use examples::corpus::{self, Dialect};
use examples::device::DeviceArg;
use examples::embedded::EmbeddedArg;
use examples::outcome::{Result, exit, weights_bytes};
use examples::table::{self, number};
use examples::{interrupt, memory, println};
use models::Generation;
use peft::{Batch, Fingerprint, FitConfig, Method, Peqa, TaskPack, Tasks};
use quant_core::Rtn;

const PROMPT: &str = "Albena";

/// Serve two tasks from one quantized base, each as scales for the same codes
///
/// The embedded model is quantized to 3 bits, and PEQA tunes it on two dialects of the language that it was
/// trained on. The program prints the size of each task, the time to activate it, its perplexities on both
/// texts and a sentence, and compares them with the merged models. It leaves no files.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    embedded: EmbeddedArg,
    #[command(flatten)]
    device: DeviceArg,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let device = args.device.open();
    let scratch = interrupt::scratch()?;
    let source = args.embedded.write(scratch.path())?;
    let mut lm = models::load(&source, &device)?;
    lm.certificate = None;
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
        let peqa = Peqa::new();
        peft::attach(&mut model, &peqa)?;
        let learning_rate = peqa.learning_rate(model.config().hidden_size());
        let config = FitConfig::new().with_learning_rate(learning_rate);
        peft::fit(&mut model, &train, &config, |_, _| {})?;
        let (pack, change) = TaskPack::of(&model)?.rounded_to_f16()?;
        pack.save(scratch.path().join(name))?;
        println!(
            "{name}: {} scales, rounded to f16 with a relative error of at most {change:.1e}",
            pack.n_values()
        );
        peft::merge(&mut model)?;
        merged.push(model);
    }

    // A server loads the base once, with its tokenizer, and activates tasks by name.
    let mut tasks = Tasks::new(models::load(&base_dir, &device)?)?;
    for (name, _) in dialects {
        tasks.insert(name, TaskPack::load(scratch.path().join(name))?)?;
    }
    let eval: Vec<Vec<Batch>> = dialects
        .iter()
        .map(|(_, dialect)| batches(&corpus::text(*dialect, 25_000, 30), 64, 8))
        .collect::<Result<_>>()?;
    let header = ["task", "bytes", "activated in ms", "plain text", "old text"];
    let mut rows = vec![header.map(String::from)];
    let before = Fingerprint::of(&tasks.model().model);
    let mut sentences = Vec::new();
    for name in [None, Some("plain"), Some("old"), None] {
        let start = Instant::now();
        tasks.activate(name)?;
        let milliseconds = 1e3 * start.elapsed().as_secs_f64();
        let value = |eval: &[Batch]| -> Result<String> {
            let perplexity = perplexity(&tasks.model().model, eval)?;
            Ok(number(Some(perplexity.value()), 3))
        };
        let dir = name.map_or(base_dir.clone(), |name| scratch.path().join(name));
        rows.push([
            name.unwrap_or("base").into(),
            weights_bytes(&dir)?.to_string(),
            format!("{milliseconds:.2}"),
            value(&eval[0])?,
            value(&eval[1])?,
        ]);
        let lm = tasks.model();
        let (prompt, settings) = (lm.encode_text(PROMPT)?, Generation::new(24));
        let written = lm.generate(&prompt, &settings, |piece| {
            // A sentence.
            if piece.contains('.') {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        let text = written.text.lines().next().unwrap_or_default().to_string();
        sentences.push(format!("{}: {PROMPT}{text}", name.unwrap_or("base")));
    }
    assert_eq!(
        Fingerprint::of(&tasks.model().model),
        before,
        "the base must not change"
    );
    println!("\n{}", table::markdown(&rows));
    println!("{}\n", sentences.join("\n"));
    let mut rows = vec![["merged model", "plain text", "old text"].map(String::from)];
    for ((name, _), model) in dialects.iter().zip(&merged) {
        let value = |eval: &[Batch]| -> Result<String> {
            Ok(number(Some(perplexity(model, eval)?.value()), 3))
        };
        rows.push([name.to_string(), value(&eval[0])?, value(&eval[1])?]);
    }
    println!("{}", table::markdown(&rows));
    println!("peak memory: {}", memory::peak());
    Ok(())
}
