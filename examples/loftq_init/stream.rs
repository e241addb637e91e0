//! One initialization with one block in memory at a time.

use std::path::Path;

use burn::tensor::Device;
use examples::initialization::InitSettings;
use examples::outcome::Result;
use examples::{memory, println, stream, texts};
use loftq::Initializer;
use models::{Model, StreamStep, Streaming};
use peft::{Adapters, PerLayer};

use crate::saved::{Report, Saved};
use crate::{Args, Texts, tune};

/// Initializes from files to files with one method, reports each layer, and evaluates and tunes what was
/// written.
pub(crate) fn one(args: &Args, out: &Path, source: &Path, device: &Device) -> Result<()> {
    let stored = models::plan(source, &PerLayer::default())?;
    let InitSettings {
        quantizer,
        method,
        fit,
    } = args.settings(&stored.config);
    let plan = models::plan(source, &quantizer)?;
    println!("{plan}\n");
    let windows = Texts::new(args, &stored, args.seed[0], device)?;
    let compute = args.model.dtype.float();
    let settings = Streaming::new(device)
        .with_format(args.format.format())
        .with_compute(compute)
        .with_resume(args.resume);
    let initializer = Initializer::new(&*method, &quantizer);
    let calibration = &windows.calibration;
    let saved = Saved::new(out);
    if args.resume && saved.base.is_dir() && saved.adapter.is_dir() {
        println!("initialized before; going on with what follows");
    } else {
        let mut reported = Ok(());
        let layers = stream::through_blocks("initializing", &plan, |on_step| {
            let on_step = |step: StreamStep| {
                if let StreamStep::Written { dir, layers } = step {
                    reported = Report::new(args, layers).write(dir);
                }
                on_step(step);
            };
            models::initialize_to(source, out, &initializer, calibration, &settings, on_step)
        })?;
        reported?;
        saved.print();
        let n_bytes: usize = layers.iter().map(|layer| layer.report.n_bytes).sum();
        println!("{n_bytes} bytes in layers; peak memory: {}", memory::peak());
    }
    if windows.eval.is_empty() && args.tune.steps == 0 {
        return Ok(());
    }

    let mut lm = models::load_as(&saved.base, device, compute)?;
    let adapters = Adapters::open(&saved.adapter, &lm.model)?;
    let measure = |model: &Model| texts::perplexity("evaluating", model, &windows.eval);
    let is_measured = !windows.eval.is_empty();
    let bare = is_measured.then(|| measure(&lm.model)).transpose()?;
    peft::activate(&mut lm.model, &adapters)?;
    if let Some(bare) = bare {
        let started = measure(&lm.model)?;
        println!("perplexity: base {bare:.4}, base with adapters {started:.4}");
    }
    let tuned = saved.adapter_tuned();
    tune(args, &mut lm.model, &windows, &fit, Some(&tuned))?;
    // One model is in memory at a time.
    drop(lm);
    if is_measured {
        let dense = models::load_as(source, device, compute)?.model;
        println!("perplexity {:.4} of the dense model", measure(&dense)?);
    }
    Ok(())
}
