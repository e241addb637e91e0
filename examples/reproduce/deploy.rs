//! What it takes to deploy a tuned model and to change its task: the first table of PEQA's paper, measured.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use examples::method::MethodName;
use examples::outcome::{Result, weights_bytes};
use examples::table::number;
use examples::texts::fit_config;
use models::{Generation, Model, Pretrained};
use peft::{Adapters, TaskPack, Tasks};
use serde::{Deserialize, Serialize};

use crate::claim::Claim;
use crate::lab::Lab;
use crate::memory_use::{self, Trained};
use crate::report::Table;

/// How often a time is measured; the shortest counts.
const REPEATS: usize = 5;

/// A way to deploy a tuned model.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Deployed {
    /// Bytes of the saved model, and of what is beside it.
    n_bytes: u64,
    /// Bytes that one more task takes, in `f32` where they were trained.
    n_bytes_task: u64,
    /// Tokens of greedy decoding, one after the other.
    tokens_per_second: f64,
    /// Milliseconds from one task to another, with all files in the page cache.
    switch_ms: f64,
}

/// The ways to deploy, by the names of the published table.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Deployments {
    /// Full fine-tuning: a dense model for each task.
    full: Deployed,
    /// Parameter-efficient fine-tuning: adapters beside a dense model.
    peft: Deployed,
    /// Fine-tuning and then quantization: a packed model for each task.
    peft_ptq: Deployed,
    /// Quantization and then fine-tuning: adapters beside a packed model.
    ptq_peft: Deployed,
    /// PEQA: scales of a packed model.
    peqa: Deployed,
}

/// Measures the ways to deploy, and returns their table and the claim about them.
pub(crate) fn run(lab: &Lab, bits: usize) -> Result<(Table, Claim)> {
    let packed = lab.base(MethodName::Peqa, bits)?;
    let found = lab.run.cell("deployments", || measure(lab, &packed))?;
    let peak = |trained: Trained| -> Result<Option<u64>> { Ok(trained.cell(lab, false)?.peak) };
    let (full, lora) = (peak(Trained::Full)?, peak(Trained::Lora)?);
    let (qlora, peqa) = (peak(Trained::Qlora)?, peak(Trained::Peqa)?);
    let ways = [
        ("full fine-tuning", full, &found.full),
        ("LoRA (PEFT)", lora, &found.peft),
        ("LoRA, then quantized (PEFT + PTQ)", lora, &found.peft_ptq),
        ("quantized, then LoRA (PTQ + PEFT)", qlora, &found.ptq_peft),
        ("PEQA", peqa, &found.peqa),
    ];
    let bytes = format!("bytes, {bits} bits where packed, else 16");
    let mut table = Table::new(&[
        "way",
        "peak MiB of tuning",
        &bytes,
        "bytes of one more task",
        "tokens/s",
        "ms to another task",
    ]);
    for (name, peak, deployed) in ways {
        table.row([
            name.into(),
            memory_use::mib(peak),
            deployed.n_bytes.to_string(),
            deployed.n_bytes_task.to_string(),
            number(Some(deployed.tokens_per_second), 1),
            number(Some(deployed.switch_ms), 2),
        ]);
    }
    Ok((table, claim(&found, full, lora, peqa)))
}

fn claim(found: &Deployments, full: Option<u64>, lora: Option<u64>, peqa: Option<u64>) -> Claim {
    const TEXT: &str = "PEQA is tuned in less memory than LoRA and full fine-tuning, deployed in the bytes of the quantized model, decodes faster than with adapters beside it, and changes tasks faster than by loading a model";
    const SOURCE: &str = "Kim et al. 2023, arXiv:2305.14152, table 1";
    let (Some(full), Some(lora), Some(tuned)) = (full, lora, peqa) else {
        return Claim::not_testable(TEXT, SOURCE, memory_use::UNKNOWN);
    };
    let (own, reload, beside) = (&found.peqa, &found.peft_ptq, &found.ptq_peft);
    let is_shown = tuned < lora
        && tuned < full
        && own.n_bytes <= reload.n_bytes
        && own.tokens_per_second > beside.tokens_per_second
        && own.switch_ms < reload.switch_ms;
    let mib = |n: u64| memory_use::mib(Some(n));
    let evidence = vec![
        format!(
            "peak memory of tuning: {} MiB, with LoRA {} MiB, in full {} MiB",
            mib(tuned),
            mib(lora),
            mib(full)
        ),
        format!("{} bytes of {}", own.n_bytes, reload.n_bytes),
        format!(
            "{:.1} tokens/s, with adapters beside the packed model {:.1}",
            own.tokens_per_second, beside.tokens_per_second
        ),
        format!(
            "{:.2} ms to another task, by loading a packed model {:.2} ms",
            own.switch_ms, reload.switch_ms
        ),
    ];
    Claim::of(TEXT, SOURCE, is_shown, evidence)
}

fn measure(lab: &Lab, packed: &Path) -> Result<Deployments> {
    let dense = lab.load()?;
    // Dense weights are deployed in 16 bits.
    let n_dense = 2 * dense.model.num_params() as u64;
    let full = Deployed {
        n_bytes: n_dense,
        n_bytes_task: n_dense,
        tokens_per_second: decode(lab, &dense.model)?,
        switch_ms: least(|| milliseconds(|| lab.load().map(drop)))?,
    };
    let peft = beside(lab, dense, n_dense)?;
    let lm = lab.load_from(packed)?;
    let n_packed = weights_bytes(packed)?;
    let peft_ptq = Deployed {
        n_bytes: n_packed,
        n_bytes_task: n_packed,
        tokens_per_second: decode(lab, &lm.model)?,
        switch_ms: least(|| milliseconds(|| lab.load_from(packed).map(drop)))?,
    };
    let ptq_peft = beside(lab, lm.clone(), n_packed)?;
    let peqa = scales(lab, lm, n_packed)?;
    Ok(Deployments {
        full,
        peft,
        peft_ptq,
        ptq_peft,
        peqa,
    })
}

/// Adapters of low rank beside a base of so many bytes.
fn beside(lab: &Lab, lm: Pretrained, n_base: u64) -> Result<Deployed> {
    let adapters = |seed| -> Result<Adapters> {
        let mut model = lm.model.clone();
        peft::attach(&mut model, &*lab.adapters(MethodName::Lora, seed))?;
        Ok(Adapters::of(&model)?)
    };
    let (first, second) = (adapters(0)?, adapters(1)?);
    let dir = lab.run.scratch("adapters");
    first.save(&dir)?;
    let n_bytes_task = weights_bytes(&dir)?;
    fs::remove_dir_all(&dir)?;
    let mut model = lm.model.clone();
    peft::activate(&mut model, &first)?;
    let mut to_second = true;
    let switch_ms = least(|| {
        let next = if to_second { &second } else { &first };
        to_second = !to_second;
        milliseconds(|| Ok(peft::activate(&mut model, next).map(drop)?))
    })?;
    Ok(Deployed {
        n_bytes: n_base + n_bytes_task,
        n_bytes_task,
        tokens_per_second: decode(lab, &model)?,
        switch_ms,
    })
}

/// Scales of a packed model of so many bytes.
fn scales(lab: &Lab, lm: Pretrained, n_base: u64) -> Result<Deployed> {
    let mut tuned = lm.model.clone();
    peft::attach(&mut tuned, &*lab.adapters(MethodName::Peqa, 0))?;
    // Scales that were not moved are not in the pack.
    peft::fit(
        &mut tuned,
        &lab.batches(0, 1),
        &fit_config(1e-3, 1, 0),
        |_, _| {},
    )?;
    let pack = TaskPack::of(&tuned)?;
    drop(tuned);
    let dir = lab.run.scratch("scales");
    pack.save(&dir)?;
    let n_bytes_task = weights_bytes(&dir)?;
    fs::remove_dir_all(&dir)?;
    let mut tasks = Tasks::new(lm)?;
    tasks.insert("task", pack)?;
    let mut to_task = true;
    let switch_ms = least(|| {
        let next = to_task.then_some("task");
        to_task = !to_task;
        milliseconds(|| Ok(tasks.activate(next)?))
    })?;
    tasks.activate("task")?;
    Ok(Deployed {
        // The scales of the task are in the place of the base's.
        n_bytes: n_base,
        n_bytes_task,
        tokens_per_second: decode(lab, &tasks.model().model)?,
        switch_ms,
    })
}

/// The least of several measurements.
fn least(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let values = (0..REPEATS).map(|_| measure());
    let values = values.collect::<Result<Vec<_>>>()?;
    Ok(values.into_iter().fold(f64::INFINITY, f64::min))
}

fn milliseconds(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(1e3 * start.elapsed().as_secs_f64())
}

/// Tokens per second of greedy decoding after a prompt.
fn decode(lab: &Lab, model: &Model) -> Result<f64> {
    /// Tokens of the prompt and of the text, together not more than the shortest window.
    const PROMPT: usize = 8;
    const NEW: usize = 24;
    let window = lab.eval[0].tokens().into_data().convert::<i64>();
    let window = window.as_slice::<i64>().expect("converted to i64");
    let prompt = window[..PROMPT].iter().map(|&token| token as u32);
    let prompt: Vec<u32> = prompt.collect();
    let seconds = least(|| {
        let (mut first, mut last) = (None, Instant::now());
        models::generate(model, &prompt, &Generation::new(NEW), |_| {
            last = Instant::now();
            first.get_or_insert(last);
            ControlFlow::Continue(())
        })?;
        Ok(first.map_or(0.0, |first| (last - first).as_secs_f64()))
    })?;
    Ok((NEW - 1) as f64 / seconds)
}
