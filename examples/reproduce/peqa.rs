//! PEQA beside what it is compared with: rounding, tuning before and after quantizing, and EfficientQAT.

use std::ops::ControlFlow;
use std::time::Instant;

use examples::format::FormatName;
use examples::initialization::block_ap;
use examples::method::MethodName;
use examples::outcome::{Result, weights_bytes};
use examples::table::number;
use examples::texts::fit_config;
use models::{Generation, Model, Pretrained};
use peft::{Adapters, OffGrid, Targets, TaskPack, Tasks};
use quant_core::Rtn;
use serde::{Deserialize, Serialize};

use crate::claim::{Claim, Pair};
use crate::lab::{Lab, Losses, Quantized, Training, Tuned, unfrozen};
use crate::memory_use::Trained;
use crate::ptq::Name;
use crate::report::{Bar, Section, Table, spread};

const PEQA: &str = "Kim et al. 2023, arXiv:2305.14152";
const EFFICIENT_QAT: &str = "Chen et al. 2024, arXiv:2407.11062";

const FULL: &str = "full fine-tuning";
const LORA: &str = "LoRA";
const QLORA: &str = "QLoRA, adapters beside NF";
const PEQA_ROW: &str = "PEQA";

/// A LoRA of the dense model, merged, and quantized after it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ThenQuantized {
    tuned: Tuned,
    /// By width, in the order of the widths.
    quantized: Vec<Losses>,
}

/// A way to deploy a tuned model.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Deployed {
    /// Bytes of the saved model, and of what is beside it.
    n_bytes: u64,
    /// Bytes that one more task takes.
    n_bytes_task: u64,
    /// Tokens of greedy decoding, one after the other.
    tokens_per_second: f64,
    /// Milliseconds from one task to another.
    switch_ms: f64,
}

/// The ways to deploy, by the names of the published table.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Deployments {
    bits: usize,
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

/// A model of the table.
struct Row {
    title: String,
    bits: Option<usize>,
    seeds: Vec<Losses>,
    /// Of the first seed.
    tuned: Option<Tuned>,
}

/// The rows of a width, by their places in the table.
struct Compared {
    bits: usize,
    rtn: usize,
    then_optq: usize,
    peqa: usize,
}

/// A way to deploy: its name, the peak memory of its tuning, and what it takes.
type Way<'a> = (&'static str, Option<u64>, &'a Deployed);

impl Row {
    fn plain(title: &str, bits: Option<usize>, losses: &Losses) -> Self {
        Self {
            title: title.into(),
            bits,
            seeds: vec![losses.clone()],
            tuned: None,
        }
    }

    fn tuned(title: &str, bits: Option<usize>, of: &[Tuned]) -> Self {
        Self {
            title: title.into(),
            bits,
            seeds: of.iter().map(|tuned| tuned.losses.clone()).collect(),
            tuned: of.first().cloned(),
        }
    }

    fn mean(&self) -> Losses {
        Losses::mean(&self.seeds.iter().collect::<Vec<_>>())
    }
}

pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let dense = lab.dense()?;
    let (widths, size) = (lab.args.widths(), lab.args.group_size());
    let fewest = widths[widths.len() - 1];
    let full = seeds(lab, "full", |seed| tune_full(lab, seed))?;
    let lora = seeds(lab, "lora", |seed| lora_then_optq(lab, seed))?;
    let of_lora: Vec<Tuned> = lora.iter().map(|of| of.tuned.clone()).collect();
    let mut rows = vec![
        Row::plain("none", None, &dense),
        Row::tuned(FULL, None, &full),
        Row::tuned(LORA, None, &of_lora),
    ];
    let mut compared = Vec::new();
    for (at, &bits) in widths.iter().enumerate() {
        let rtn = Name::Rtn.cell(lab, bits, size)?;
        let optq = Name::Optq.cell(lab, bits, size)?;
        let then: Vec<Losses> = lora.iter().map(|of| of.quantized[at].clone()).collect();
        let of_base = |method: MethodName| {
            let key = format!("{}-{bits}", method.name());
            seeds(lab, &key, |seed| {
                tune(lab, &key, method, seed, || base(lab, method, bits))
            })
        };
        let (peqa, qlora) = (of_base(MethodName::Peqa)?, of_base(MethodName::QLora)?);
        let width = Some(bits);
        let new = [
            Row::plain("RTN", width, &rtn.losses),
            Row::plain("OPTQ", width, &optq.losses),
            Row {
                title: "LoRA, then OPTQ".into(),
                bits: width,
                seeds: then,
                tuned: None,
            },
            Row::tuned(QLORA, width, &qlora),
            Row::tuned(PEQA_ROW, width, &peqa),
        ];
        rows.extend(new);
        let n = rows.len();
        compared.push(Compared {
            bits,
            rtn: n - 5,
            then_optq: n - 3,
            peqa: n - 1,
        });
    }
    let block = efficient_qat(lab, fewest)?;
    let end_to_end = seeds(lab, "efficient-qat", |seed| {
        let base = || Ok(lab.load_from(&lab.run.model("block-ap"))?.model);
        tune(lab, "efficient-qat", MethodName::Peqa, seed, base)
    })?;
    rows.push(Row::plain("Block-AP", Some(fewest), &block.losses));
    rows.push(Row::tuned(
        "Block-AP, then PEQA (EfficientQAT)",
        Some(fewest),
        &end_to_end,
    ));

    let deployments = lab.run.cell("deployments", || deploy(lab, widths[0]))?;
    let peak = |trained: Trained| -> Result<Option<u64>> { Ok(trained.cell(lab, false)?.peak) };
    let lora_peak = peak(Trained::Lora)?;
    let ways = [
        (FULL, peak(Trained::Full)?, &deployments.full),
        ("PEFT", lora_peak, &deployments.peft),
        ("PEFT, then PTQ", lora_peak, &deployments.peft_ptq),
        (
            "PTQ, then PEFT",
            peak(Trained::Qlora)?,
            &deployments.ptq_peft,
        ),
        ("PEQA", peak(Trained::Peqa)?, &deployments.peqa),
    ];
    let mut claims = claims(&rows, &compared, &dense)?;
    let peqa_of_fewest = rows[compared[compared.len() - 1].peqa].mean();
    let end_to_end = rows[rows.len() - 1].mean();
    let qat = Pair {
        name: format!("{fewest} bits, group {size}"),
        lower: &end_to_end,
        higher: &peqa_of_fewest,
    };
    claims.push(Claim::lower(
        "Block-AP before PEQA (EfficientQAT) is better than PEQA over RTN",
        EFFICIENT_QAT,
        &[qat],
    )?);
    claims.push(of_deployment(&ways));
    claims.push(Claim::not_testable(
        "Tuning on instructions restores what rounding costs in few-shot accuracy, up to 65 billion parameters",
        PEQA,
        "models and tasks of that size are not part of a run",
    ));
    Ok(Section {
        title: "PEQA".into(),
        about: format!(
            "Affine grids in groups of {size}; QLoRA's bases are normal floats with double quantization. Trainable parameters, tokens, rate and peak memory are those of the first seed."
        ),
        tables: vec![table(&rows), deployment_table(&ways, deployments.bits)],
        claims,
        bars: rows
            .iter()
            .map(|row| {
                let label = match row.bits {
                    Some(bits) => format!("{bits} bits: {}", row.title),
                    None => row.title.clone(),
                };
                Bar::new(label, &row.seeds.iter().collect::<Vec<_>>())
            })
            .collect(),
        dense,
    })
}

/// The cells of a name with each of the seeds.
pub(crate) fn seeds<T: Serialize + serde::de::DeserializeOwned>(
    lab: &Lab,
    name: &str,
    of: impl Fn(u64) -> Result<T>,
) -> Result<Vec<T>> {
    let seeds = lab.args.seed.iter();
    seeds
        .map(|&seed| lab.run.cell(&format!("{name}-seed-{seed}"), || of(seed)))
        .collect()
}

/// The quantized base of a method.
pub(crate) fn base(lab: &Lab, method: MethodName, bits: usize) -> Result<Model> {
    let size = lab.args.group_size();
    let quantizer = method.quantizer(bits, size, false, FormatName::QuantCore)?;
    let mut model = lab.load()?.model;
    lab.quantize(&mut model, &*quantizer)?;
    Ok(model)
}

/// Tunes a base with a method, at the rate that is best for it.
fn tune(
    lab: &Lab,
    key: &str,
    method: MethodName,
    seed: u64,
    base: impl Fn() -> Result<Model>,
) -> Result<Tuned> {
    let rank = lab.args.rank;
    let of = |seed| method.method(rank, rank as f32, &Targets::All, seed, false);
    let default = lab.default_rate(&*of(0));
    let search = lab.search(key, default, || {
        let mut model = base()?;
        peft::attach(&mut model, &*of(0))?;
        Ok(model)
    })?;
    let mut model = base()?;
    let attached = peft::attach(&mut model, &*of(seed))?;
    let training = Training {
        learning_rate: search.rate,
        seed,
        steps: lab.args.steps,
    };
    lab.tune(key, &mut model, attached.n_trainable, training)
}

/// Tunes all parameters of the dense model.
fn tune_full(lab: &Lab, seed: u64) -> Result<Tuned> {
    // Elements of weights, as those of a matrix that is added to the weight.
    let default = lab.default_rate(&peft::Tile::qa_hira());
    let model = || Ok(unfrozen(lab.load()?.model));
    let search = lab.search("full", default, model)?;
    let mut model = model()?;
    let n_trainable = burn::module::Module::num_params(&model);
    let training = Training {
        learning_rate: search.rate,
        seed,
        steps: lab.args.steps,
    };
    lab.tune("full", &mut model, n_trainable, training)
}

/// Tunes LoRA on the dense model, merges it, and quantizes with OPTQ.
fn lora_then_optq(lab: &Lab, seed: u64) -> Result<ThenQuantized> {
    let method = MethodName::Lora;
    let rank = lab.args.rank;
    let of = |seed| method.method(rank, rank as f32, &Targets::All, seed, false);
    let search = lab.search("lora", lab.default_rate(&*of(0)), || {
        let mut model = lab.load()?.model;
        peft::attach(&mut model, &*of(0))?;
        Ok(model)
    })?;
    let mut model = lab.load()?.model;
    let attached = peft::attach(&mut model, &*of(seed))?;
    let training = Training {
        learning_rate: search.rate,
        seed,
        steps: lab.args.steps,
    };
    let tuned = lab.tune("lora", &mut model, attached.n_trainable, training)?;
    peft::merge_with(&mut model, OffGrid::Dense)?;
    let widths = lab.args.widths();
    let quantized = widths.iter().map(|&bits| {
        let mut model = model.clone();
        let optq = Name::Optq.quantizer(bits, lab.args.group_size());
        lab.quantize(&mut model, &*optq)?;
        lab.measure(&model)
    });
    let quantized = quantized.collect::<Result<_>>()?;
    Ok(ThenQuantized { tuned, quantized })
}

/// Makes the base of EfficientQAT, and keeps it for the cells that tune it.
fn efficient_qat(lab: &Lab, bits: usize) -> Result<Quantized> {
    let rtn = Rtn::new()
        .with_bits(bits)
        .with_group_size(lab.args.group_size().0);
    lab.based("block-ap", &rtn, |model| {
        let method = block_ap(bits, &lab.config);
        loftq::init(model, &method, &rtn, &lab.calibration_by(2), |_| {})?;
        let dir = lab.run.model("block-ap");
        if dir.exists() {
            // Of a run that was stopped before it was measured.
            std::fs::remove_dir_all(&dir)?;
        }
        let mut lm = lab.load()?;
        lm.model = model.clone();
        models::save(&lm, &dir)?;
        Ok(())
    })
}

/// Measures the ways to deploy a model at a width. What was tuned does not change them.
fn deploy(lab: &Lab, bits: usize) -> Result<Deployments> {
    let method = |name: MethodName, seed| {
        let rank = lab.args.rank;
        name.method(rank, rank as f32, &Targets::All, seed, false)
    };
    let dense = lab.load()?;
    let n_params = burn::module::Module::num_params(&dense.model) as u64;
    let mut packed = lab.load()?;
    let rtn = Name::Rtn.quantizer(bits, lab.args.group_size());
    lab.quantize(&mut packed.model, &*rtn)?;
    let dir = lab.scratch.join("deployed");
    models::save(&packed, &dir)?;
    let n_packed = weights_bytes(&dir)?;
    let dense_speed = decode(lab, &dense.model)?;
    let packed_speed = decode(lab, &packed.model)?;
    // Dense weights are deployed in 16 bits.
    let full = Deployed {
        n_bytes: 2 * n_params,
        n_bytes_task: 2 * n_params,
        tokens_per_second: dense_speed,
        switch_ms: milliseconds(|| lab.load().map(drop))?,
    };
    let peft_ptq = Deployed {
        n_bytes: n_packed,
        n_bytes_task: n_packed,
        tokens_per_second: packed_speed,
        switch_ms: milliseconds(|| lab.load_from(&dir).map(drop))?,
    };
    let beside = |lm: &Pretrained, n_base: u64, name: &str| -> Result<Deployed> {
        let mut model = lm.model.clone();
        peft::attach(&mut model, &*method(MethodName::Lora, 0))?;
        let first = Adapters::of(&model)?;
        let dir = lab.scratch.join(name);
        first.save(&dir)?;
        let n_bytes_task = weights_bytes(&dir)?;
        let mut other = lm.model.clone();
        peft::attach(&mut other, &*method(MethodName::Lora, 1))?;
        let second = Adapters::of(&other)?;
        let switch = || Ok(peft::activate(&mut other, &first).map(drop)?);
        let switch_ms = milliseconds(switch)?;
        peft::activate(&mut model, &second)?;
        Ok(Deployed {
            n_bytes: n_base + n_bytes_task,
            n_bytes_task,
            tokens_per_second: decode(lab, &model)?,
            switch_ms,
        })
    };
    let peft = beside(&dense, 2 * n_params, "adapters-dense")?;
    let ptq_peft = beside(&packed, n_packed, "adapters-packed")?;
    let mut tuned = packed.model.clone();
    peft::attach(&mut tuned, &*method(MethodName::Peqa, 0))?;
    // Scales that were not moved are not in the pack.
    let fit = fit_config(1e-3, 1, 0);
    peft::fit(&mut tuned, &lab.batches(0, 1), &fit, |_, _| {})?;
    let (pack, _) = TaskPack::of(&tuned)?.rounded_to_f16()?;
    let of_pack = lab.scratch.join("scales");
    pack.save(&of_pack)?;
    let mut tasks = Tasks::new(packed)?;
    tasks.insert("task", pack)?;
    let peqa = Deployed {
        n_bytes_task: weights_bytes(&of_pack)?,
        switch_ms: milliseconds(|| Ok(tasks.activate("task")?))?,
        ..peft_ptq.clone()
    };
    Ok(Deployments {
        bits,
        full,
        peft,
        peft_ptq,
        ptq_peft,
        peqa,
    })
}

fn milliseconds(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(1e3 * start.elapsed().as_secs_f64())
}

/// Tokens per second of greedy decoding after a prompt.
fn decode(lab: &Lab, model: &Model) -> Result<f64> {
    /// Tokens of the prompt and of the text, at most.
    const PROMPT: usize = 16;
    const NEW: usize = 64;
    let window = lab.eval[0].tokens().into_data().convert::<i64>();
    let window = window.as_slice::<i64>().expect("converted to i64");
    let n_prompt = PROMPT.min(window.len() / 2);
    let prompt = window[..n_prompt].iter().map(|&token| token as u32);
    let prompt: Vec<u32> = prompt.collect();
    let n_new = NEW.min(lab.args.seq_len - n_prompt);
    let (mut first, mut last) = (None, Instant::now());
    models::generate(model, &prompt, &Generation::new(n_new), |_| {
        last = Instant::now();
        first.get_or_insert(last);
        ControlFlow::Continue(())
    })?;
    let seconds = first.map_or(0.0, |first| (last - first).as_secs_f64());
    Ok((n_new - 1) as f64 / seconds)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "bits",
        "method",
        "held out",
        "other text",
        "trainable",
        "tokens",
        "rate",
        "seconds",
        "peak MiB",
    ]);
    for row in rows {
        let perplexities: Vec<f64> = row.seeds.iter().map(Losses::perplexity).collect();
        let drifts: Vec<f64> = row.seeds.iter().filter_map(Losses::drift).collect();
        let of = |value: fn(&Tuned) -> String| row.tuned.as_ref().map_or("-".into(), value);
        table.row([
            row.bits.map_or("16".into(), |bits| bits.to_string()),
            row.title.clone(),
            spread(&perplexities),
            spread(&drifts),
            of(|tuned| tuned.n_trainable.to_string()),
            of(|tuned| tuned.n_tokens.to_string()),
            of(|tuned| format!("{:.1e}", tuned.learning_rate)),
            of(|tuned| format!("{:.0}", tuned.seconds)),
            of(|tuned| {
                tuned
                    .peak_bytes
                    .map_or("-".into(), |n| (n >> 20).to_string())
            }),
        ]);
    }
    table
}

fn deployment_table(ways: &[Way], bits: usize) -> Table {
    let packed = format!("deployed bytes ({bits} bits where packed, else 16)");
    let mut table = Table::new(&[
        "way",
        "tuning peak MiB",
        &packed,
        "bytes of one more task",
        "tokens/s",
        "switch, ms",
    ]);
    for (name, peak, deployed) in ways {
        table.row([
            name.to_string(),
            peak.map_or("-".into(), |n| (n >> 20).to_string()),
            deployed.n_bytes.to_string(),
            deployed.n_bytes_task.to_string(),
            number(Some(deployed.tokens_per_second), 1),
            number(Some(deployed.switch_ms), 2),
        ]);
    }
    table
}

/// The claims about perplexities.
fn claims(rows: &[Row], compared: &[Compared], dense: &Losses) -> Result<Vec<Claim>> {
    let means: Vec<Losses> = rows.iter().map(Row::mean).collect();
    let pair = |bits: usize, lower: usize, higher: usize| Pair {
        name: format!("{bits} bits"),
        lower: &means[lower],
        higher: &means[higher],
    };
    let over_rtn = compared.iter().map(|of| pair(of.bits, of.peqa, of.rtn));
    let three = || compared.iter().filter(|of| of.bits == 3);
    let then = three().map(|of| pair(3, of.peqa, of.then_optq));
    let mut claims = vec![
        Claim::lower(
            "Tuning the scales lowers the perplexity that rounding left",
            PEQA,
            &over_rtn.collect::<Vec<_>>(),
        )?,
        Claim::lower(
            "At 3 bits PEQA is better than LoRA that is quantized after it",
            PEQA,
            &then.collect::<Vec<_>>(),
        )?,
    ];
    let mut evidence = Vec::new();
    let mut is_shown = false;
    for of in three() {
        let lost = means[of.rtn].above(dense)?.value;
        let gained = means[of.rtn].above(&means[of.peqa])?.value;
        is_shown = gained > 0.5 * lost;
        evidence.push(format!(
            "3 bits: rounding costs {lost:.4} nats, PEQA wins {gained:.4} back ({:.0} %)",
            100.0 * gained / lost
        ));
        if !dense.drift.is_empty() {
            let on_other = |of: &Losses| of.drift().unwrap_or(f64::NAN).ln();
            let (rtn, peqa) = (on_other(&means[of.rtn]), on_other(&means[of.peqa]));
            evidence.push(format!(
                "on the other text: dense {:.4}, rounded {rtn:.4}, tuned {peqa:.4} nats",
                on_other(dense)
            ));
        }
    }
    claims.push(Claim::of(
        "At 3 bits PEQA wins back more than half of the log-perplexity that rounding cost",
        PEQA,
        is_shown,
        evidence,
    ));
    Ok(claims)
}

/// The claims of PEQA's first table.
fn of_deployment(ways: &[Way]) -> Claim {
    let [
        (_, full, _),
        (_, peft, _),
        (_, _, peft_ptq),
        (_, _, ptq_peft),
        (_, peqa, own),
    ] = ways
    else {
        unreachable!("five ways");
    };
    let (full, peft, tuned) = (*full, *peft, *peqa);
    let mib = |n: Option<u64>| n.map_or("-".into(), |n| format!("{} MiB", n >> 20));
    let is_small =
        tuned.is_some() && tuned < peft && tuned < full && own.n_bytes <= peft_ptq.n_bytes;
    let is_fast =
        own.switch_ms < peft_ptq.switch_ms && own.tokens_per_second > ptq_peft.tokens_per_second;
    Claim::of(
        "PEQA tunes in less memory than full fine-tuning and LoRA, is deployed in the bytes of the quantized model at its speed, and changes tasks by their scales",
        PEQA,
        is_small && is_fast,
        vec![
            format!(
                "peak memory of tuning: {} with PEQA, {} with LoRA, {} in full",
                mib(tuned),
                mib(peft),
                mib(full)
            ),
            format!(
                "{:.1} tokens/s, with adapters beside a packed model {:.1}",
                own.tokens_per_second, ptq_peft.tokens_per_second
            ),
            format!(
                "{:.2} ms to another task, by loading a packed model {:.2} ms",
                own.switch_ms, peft_ptq.switch_ms
            ),
        ],
    )
}
