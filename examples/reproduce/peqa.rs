//! PEQA beside what it is compared with: rounding, tuning before and after quantizing, and EfficientQAT.

use std::slice;

use burn::module::Module;
use examples::initialization::block_ap;
use examples::method::MethodName;
use examples::outcome::Result;
use examples::rate::Search;
use models::Model;
use peft::{OffGrid, Tile};
use quant_core::Rtn;
use serde::{Deserialize, Serialize};

use crate::claim::{Claim, Pair};
use crate::deploy;
use crate::lab::{Lab, Quantized, Training, Tuned, unfrozen};
use crate::losses::{Losses, above};
use crate::ptq::Name;
use crate::report::{self, Bar, Section, Table};

const PEQA: &str = "Kim et al. 2023, arXiv:2305.14152";
const EFFICIENT_QAT: &str = "Chen et al. 2025, arXiv:2407.11062";

/// A LoRA of the dense model, merged, and quantized after it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ThenQuantized {
    tuned: Tuned,
    /// For each width.
    quantized: Vec<Losses>,
}

/// A model of the table, tuned with several seeds or not at all.
struct Row {
    title: &'static str,
    bits: Option<usize>,
    seeds: Vec<Losses>,
    /// The training with the first seed, and how its rate was found.
    tuned: Option<(Tuned, Search)>,
}

/// The rows of a width.
struct Compared {
    bits: usize,
    rtn: Row,
    optq: Row,
    then_optq: Row,
    qlora: Row,
    peqa: Row,
}

impl Row {
    fn plain(title: &'static str, bits: usize, losses: &Losses) -> Self {
        Self {
            title,
            bits: Some(bits),
            seeds: vec![losses.clone()],
            tuned: None,
        }
    }

    fn tuned(title: &'static str, bits: Option<usize>, of: &(Vec<Tuned>, Search)) -> Self {
        let (tuned, search) = of;
        Self {
            title,
            bits,
            seeds: tuned.iter().map(|tuned| tuned.losses.clone()).collect(),
            tuned: tuned.first().map(|tuned| (tuned.clone(), search.clone())),
        }
    }
}

/// Runs the experiment.
pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let dense = lab.dense()?;
    let (widths, size) = (lab.args.widths(), lab.args.group_size());
    let fewest = widths[widths.len() - 1];
    let full = Row::tuned("full fine-tuning", None, &tune_full(lab)?);
    let (then, search) = lora_then_optq(lab)?;
    let of_lora = then.iter().map(|of| of.tuned.clone()).collect();
    let lora = Row::tuned("LoRA", None, &(of_lora, search));
    let mut compared = Vec::new();
    for (at, &bits) in widths.iter().enumerate() {
        let (rtn, optq) = (
            Name::Rtn.cell(lab, bits, size)?,
            Name::Optq.cell(lab, bits, size)?,
        );
        let of = |method: MethodName| {
            let key = format!("{}-{bits}", method.name());
            let dir = lab.base(method, bits)?;
            tune(lab, &key, method, || Ok(lab.load_from(&dir)?.model))
        };
        let width = Some(bits);
        compared.push(Compared {
            bits,
            rtn: Row::plain("RTN", bits, &rtn.losses),
            optq: Row::plain("OPTQ", bits, &optq.losses),
            then_optq: Row {
                title: "LoRA, then OPTQ",
                bits: width,
                seeds: then.iter().map(|of| of.quantized[at].clone()).collect(),
                tuned: lora.tuned.clone(),
            },
            qlora: Row::tuned("QLoRA, adapters beside NF", width, &of(MethodName::QLora)?),
            peqa: Row::tuned("PEQA", width, &of(MethodName::Peqa)?),
        });
    }
    let block = Row::plain("Block-AP", fewest, &efficient_qat(lab, fewest)?.losses);
    let base = || Ok(lab.load_from(&lab.run.model("block-ap"))?.model);
    let both = tune(lab, "efficient-qat", MethodName::Peqa, base)?;
    let both = Row::tuned("Block-AP, then PEQA", Some(fewest), &both);
    let (deployments, of_deployment) = deploy::run(lab, widths[0])?;
    let mut claims = claims(&dense, &compared)?;
    claims.push(Claim::lower(
        "Block-AP before PEQA, which is EfficientQAT, is better than PEQA over RTN",
        EFFICIENT_QAT,
        &[Pair {
            name: format!("{fewest} bits, group {size}"),
            lower: &both.seeds,
            higher: &compared[compared.len() - 1].peqa.seeds,
        }],
    )?);
    claims.push(of_deployment);
    for (text, why) in [
        (
            "PEQA is close to quantization-aware training",
            "quantization-aware training of all parameters is not a part of a run",
        ),
        (
            "The distance to full-precision LoRA falls with the size of the model, up to 65 billion parameters",
            "a run has one model",
        ),
        (
            "Tuning on instructions restores what rounding costs in few-shot accuracy",
            "a run has no instructions",
        ),
    ] {
        claims.push(Claim::not_testable(text, PEQA, why));
    }
    let mut rows = vec![full, lora];
    for of in compared {
        rows.extend([of.rtn, of.optq, of.then_optq, of.qlora, of.peqa]);
    }
    rows.extend([block, both]);
    let bars = rows.iter().map(|row| {
        let label = match row.bits {
            Some(bits) => format!("{bits} bits: {}", row.title),
            None => row.title.into(),
        };
        Bar::new(label, &row.seeds)
    });
    Ok(Section {
        title: "PEQA".into(),
        about: format!(
            "Affine grids in groups of {size}; QLoRA's bases are normal floats with double quantization, whose adapters of rank {} stay beside them. Trainable parameters, tokens, learning rate and seconds are those of the first seed; a rate marked * is at an end of those that were tried. Bytes of tasks are in f32, and times are the least of five.",
            lab.args.rank
        ),
        tables: vec![table(&dense, &rows), deployments],
        claims,
        bars: bars.collect(),
        dense,
    })
}

/// Tunes a base with a method, at the rate that is best for it, with each of the seeds.
fn tune(
    lab: &Lab,
    key: &str,
    method: MethodName,
    base: impl Fn() -> Result<Model>,
) -> Result<(Vec<Tuned>, Search)> {
    let attached = |seed| -> Result<(Model, usize)> {
        let mut model = base()?;
        let attached = peft::attach(&mut model, &*lab.adapters(method, seed))?;
        Ok((model, attached.n_trainable))
    };
    let default = lab.default_rate(&*lab.adapters(method, 0));
    let search = lab.search(key, default, || Ok(attached(0)?.0))?;
    let tuned = lab.seeds(key, |seed| {
        let (mut model, n_trainable) = attached(seed)?;
        lab.tune(key, &mut model, n_trainable, training(lab, &search, seed))
    })?;
    Ok((tuned, search))
}

fn training(lab: &Lab, search: &Search, seed: u64) -> Training {
    Training {
        learning_rate: search.rate,
        seed,
        steps: lab.args.steps,
    }
}

/// Tunes all parameters of the dense model.
fn tune_full(lab: &Lab) -> Result<(Vec<Tuned>, Search)> {
    // That of elements of a matrix that is added to the weight.
    let default = lab.default_rate(&Tile::qa_hira());
    let model = || Ok(unfrozen(lab.load()?.model));
    let search = lab.search("full", default, model)?;
    let tuned = lab.seeds("full", |seed| {
        let mut model = model()?;
        let n_trainable = model.num_params();
        lab.tune(
            "full",
            &mut model,
            n_trainable,
            training(lab, &search, seed),
        )
    })?;
    Ok((tuned, search))
}

/// Tunes LoRA on the dense model, merges it, and quantizes with OPTQ.
fn lora_then_optq(lab: &Lab) -> Result<(Vec<ThenQuantized>, Search)> {
    let attached = |seed| -> Result<(Model, usize)> {
        let mut model = lab.load()?.model;
        let attached = peft::attach(&mut model, &*lab.adapters(MethodName::Lora, seed))?;
        Ok((model, attached.n_trainable))
    };
    let default = lab.default_rate(&*lab.adapters(MethodName::Lora, 0));
    let search = lab.search("lora", default, || Ok(attached(0)?.0))?;
    let then = lab.seeds("lora", |seed| {
        let (mut model, n_trainable) = attached(seed)?;
        let training = training(lab, &search, seed);
        let tuned = lab.tune("lora", &mut model, n_trainable, training)?;
        peft::merge_with(&mut model, OffGrid::Dense)?;
        let quantized = lab.args.widths().into_iter().map(|bits| {
            let mut model = model.clone();
            let optq = Name::Optq.quantizer(bits, lab.args.group_size());
            lab.quantize(&mut model, &*optq)?;
            lab.measure(&model)
        });
        let quantized = quantized.collect::<Result<_>>()?;
        Ok(ThenQuantized { tuned, quantized })
    })?;
    Ok((then, search))
}

/// Makes the base of EfficientQAT, and keeps it for the cells that tune it.
fn efficient_qat(lab: &Lab, bits: usize) -> Result<Quantized> {
    let rtn = Rtn::new()
        .with_bits(bits)
        .with_group_size(lab.args.group_size().0);
    let dir = lab.run.model("block-ap");
    lab.based("block-ap", &rtn, Some(&dir), |model| {
        // Twice the published passes, for there are few windows.
        let method = block_ap(bits, &lab.config).with_rounds(4);
        loftq::init(model, &method, &rtn, &lab.calibration_by(2), |_| {})?;
        Ok(())
    })
}

fn table(dense: &Losses, rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "bits",
        "method",
        "held out",
        "other text",
        "trainable",
        "tokens",
        "rate",
        "seconds",
    ]);
    let dash = || "-".to_string();
    let [held_out, other] = report::cells(slice::from_ref(dense));
    let none = ["-".into(), "none".into(), held_out, other];
    let [a, b, c, d] = none;
    table.row([a, b, c, d, dash(), dash(), dash(), dash()]);
    for row in rows {
        let [held_out, other] = report::cells(&row.seeds);
        let of =
            |value: fn(&(Tuned, Search)) -> String| row.tuned.as_ref().map_or("-".into(), value);
        table.row([
            row.bits.map_or(dash(), |bits| bits.to_string()),
            row.title.into(),
            held_out,
            other,
            of(|(tuned, _)| tuned.n_trainable.to_string()),
            of(|(tuned, _)| tuned.n_tokens.to_string()),
            of(|(_, search)| report::rate(search)),
            of(|(tuned, _)| format!("{:.0}", tuned.seconds)),
        ]);
    }
    table
}

/// The claims about perplexities.
fn claims(dense: &Losses, compared: &[Compared]) -> Result<Vec<Claim>> {
    let pairs = |of: fn(&Compared) -> [&Row; 2], is_in: fn(usize) -> bool| {
        let widths = compared.iter().filter(move |of| is_in(of.bits));
        let pairs = widths.map(move |width| {
            let [lower, higher] = of(width);
            Pair {
                name: format!("{} bits", width.bits),
                lower: &lower.seeds,
                higher: &higher.seeds,
            }
        });
        pairs.collect::<Vec<_>>()
    };
    let half = "At 3 bits PEQA wins back more than half of the loss that rounding costs";
    let source = "a threshold of this report";
    let of_half = match compared.iter().find(|of| of.bits == 3) {
        None => Claim::not_testable(half, source, "the run has no 3 bits"),
        Some(of) => won_back(half, source, slice::from_ref(dense), of)?,
    };
    Ok(vec![
        Claim::lower(
            "Tuning the scales lowers the perplexity that rounding left",
            PEQA,
            &pairs(|of| [&of.peqa, &of.rtn], |_| true),
        )?,
        Claim::lower(
            "At 4 and 3 bits PEQA is better than LoRA that is quantized after it",
            PEQA,
            &pairs(|of| [&of.peqa, &of.then_optq], |bits| bits > 2),
        )?,
        of_half,
    ])
}

/// The part of the loss that rounding costs and PEQA wins back, and what it costs on the other text.
fn won_back(text: &str, source: &str, dense: &[Losses], of: &Compared) -> Result<Claim> {
    let (rtn, peqa) = (&of.rtn.seeds, &of.peqa.seeds);
    let (Some(lost), Some(won)) = (above(rtn, dense)?, above(rtn, peqa)?) else {
        return Ok(Claim::not_testable(text, source, "a model diverged"));
    };
    if lost.lower <= 0.0 {
        let why = "rounding costs nothing that is more than chance";
        return Ok(Claim::not_testable(text, source, why));
    }
    let mut evidence = vec![format!(
        "rounding costs {:.4} nats, PEQA wins {:.4} [{:.4}, {:.4}] of them back: {:.0} %",
        lost.value,
        won.value,
        won.lower,
        won.upper,
        100.0 * won.value / lost.value
    )];
    let drift = |of: &[Losses]| {
        let all: Option<Vec<f64>> = of.iter().map(Losses::drift).collect();
        let all = all?;
        Some(all.iter().map(|perplexity| perplexity.ln()).sum::<f64>() / all.len() as f64)
    };
    if let (Some(dense), Some(rtn), Some(peqa)) = (drift(dense), drift(rtn), drift(peqa)) {
        evidence.push(format!(
            "nats on the other text: dense {dense:.4}, rounded {rtn:.4}, tuned {peqa:.4}"
        ));
    }
    let is_shown = won.lower > 0.5 * lost.value;
    Ok(Claim::of(text, source, is_shown, evidence))
}
