//! Initializations of adapters beside a base of few bits: what they start with, and what tuning makes of it.

use std::slice;
use std::time::Instant;

use examples::format::FormatName;
use examples::initialization::{GridName, InitMethod, InitName, allocated, lq_lora, narrower};
use examples::memory;
use examples::outcome::Result;
use examples::rate::Search;
use loftq::{Loftq, Rilq};
use models::Model;
use peft::{Adapters, Evaluation, FitConfig, Lora, PerLayer, Recipe};
use quant_core::Quantizer;
use serde::{Deserialize, Serialize};

use crate::claim::{Claim, Pair};
use crate::lab::{Lab, Training, Tuned};
use crate::losses::Losses;
use crate::memory_use::mib;
use crate::report::{self, Bar, Section, Table};

const LOFTQ: &str = "Li et al. 2023, arXiv:2310.08659";

/// An initialization that is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Start {
    name: InitName,
    /// The rounds of LoftQ.
    rounds: usize,
    rank: usize,
    /// Whether the bits of each layer are allocated, within a budget between the two least widths.
    is_allocated: bool,
}

/// What adapters start with.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Found {
    losses: Losses,
    /// The mean over the layers of the relative error of the weight with its adapter.
    weight_error: f64,
    seconds: f64,
    peak_bytes: Option<u64>,
}

impl Start {
    fn new(name: InitName, rank: usize) -> Self {
        Self {
            name,
            rounds: 5,
            rank,
            is_allocated: false,
        }
    }

    fn key(self) -> String {
        let name = self.name.name();
        let rounds = match self.name {
            InitName::Loftq => format!("-{}-rounds", self.rounds),
            _ => String::new(),
        };
        let allocated = if self.is_allocated { "-by-layer" } else { "" };
        format!("{name}{rounds}{allocated}-rank-{}", self.rank)
    }

    fn title(self) -> String {
        let title = self.name.title();
        match self.name {
            InitName::Loftq => format!("{title}, T = {}", self.rounds),
            _ if self.is_allocated => format!("{title}, bits by layer"),
            _ => title.into(),
        }
    }

    /// Initializes the dense model, and returns the mean relative error of its weights.
    fn run(self, lab: &Lab, bits: usize, seed: u64, model: &mut Model) -> Result<f64> {
        let lora = Lora::new(self.rank)
            .with_alpha(self.rank as f32)
            .with_seed(seed);
        let method: Box<dyn InitMethod> = match self.name {
            InitName::Loftq => Box::new(Loftq::new(lora).with_rounds(self.rounds)),
            InitName::Rilq => Box::new(Rilq::new(lora).with_fit(stopped(lab, seed))),
            name => name.method(lora, &lab.config),
        };
        let recipe: Box<dyn Recipe> = if self.is_allocated {
            Box::new(by_layer(self, lab, model)?)
        } else {
            Box::new(self.quantizer(lab, bits))
        };
        let calibration = match self.name.is_calibrated() {
            true => &lab.calibration[..],
            false => &[],
        };
        let layers = loftq::init(model, &*method, &*recipe, calibration, |_| {})?;
        let errors = layers
            .iter()
            .map(|layer| layer.report.error.weight.relative);
        Ok(errors.sum::<f64>() / layers.len() as f64)
    }

    fn quantizer(self, lab: &Lab, bits: usize) -> Box<dyn Quantizer> {
        let size = lab.args.group_size();
        self.name
            .quantizer(GridName::Affine, bits, size, FormatName::QuantCore)
    }

    fn cell(self, lab: &Lab, bits: usize) -> Result<Found> {
        lab.run.cell(&self.key(), || {
            memory::reset_peak();
            let mut model = lab.load()?.model;
            let start = Instant::now();
            let weight_error = self.run(lab, bits, lab.args.seeds()[0], &mut model)?;
            let (seconds, peak_bytes) = (start.elapsed().as_secs_f64(), memory::peak_bytes());
            Ok(Found {
                seconds,
                peak_bytes,
                losses: lab.measure(&model)?,
                weight_error,
            })
        })
    }

    /// Tunes the adapters, at the rate that is best for this start.
    fn tuned(self, lab: &Lab, bits: usize) -> Result<(Vec<Tuned>, Search)> {
        let default = lab.default_rate(&Lora::new(self.rank));
        let search = lab.search(&self.key(), default, || {
            let mut model = lab.load()?.model;
            self.run(lab, bits, 0, &mut model)?;
            Ok(model)
        })?;
        let tuned = lab.seeds(&format!("{}-tuned", self.key()), |seed| {
            let mut model = lab.load()?.model;
            self.run(lab, bits, seed, &mut model)?;
            let adapters = Adapters::of(&model)?;
            let n_trainable = adapters
                .layers()
                .map(|(_, of)| burn::module::Module::num_params(of));
            let n_trainable = n_trainable.sum();
            let training = Training {
                learning_rate: search.rate,
                seed,
                steps: lab.args.steps,
            };
            lab.tune(&self.key(), &mut model, n_trainable, training)
        })?;
        Ok((tuned, search))
    }
}

/// RILQ's tuning, which ends by the loss on held-out windows of the training text.
fn stopped(lab: &Lab, seed: u64) -> FitConfig {
    let evaluation = Evaluation::new(lab.held_out())
        .with_every(10)
        .with_patience(2);
    FitConfig::new()
        .with_learning_rate(3e-3 * narrower(&lab.config))
        .with_steps(2 * lab.args.steps)
        .with_seed(seed)
        .with_evaluation(evaluation.with_restore_best(true))
}

/// The bits of each layer by LQ-LoRA's errors, of as many bytes as the mean of the two least widths.
fn by_layer(start: Start, lab: &Lab, model: &Model) -> Result<PerLayer> {
    let widths = lab.args.widths();
    let quantizers = widths
        .iter()
        .map(|&bits| move || start.quantizer(lab, bits));
    let quantizers: Vec<_> = quantizers.collect();
    let bytes = quantizers.iter().rev().take(2).map(|quantizer| {
        let plan = models::plan(&lab.source, &quantizer())?;
        Ok(plan.layers.iter().map(|layer| layer.n_bytes).sum::<u64>())
    });
    let bytes: Vec<u64> = bytes.collect::<Result<_>>()?;
    let budget = bytes.iter().sum::<u64>() / bytes.len() as u64;
    let method = lq_lora(Lora::new(start.rank).with_alpha(start.rank as f32));
    allocated(model, &method, &quantizers, &lab.calibration, budget)
}

/// Runs the experiment.
pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let dense = lab.dense()?;
    let (widths, rank) = (lab.args.widths(), lab.args.rank);
    let bits = widths[widths.len() - 1];
    let rounds = |rounds, rank| Start {
        rounds,
        ..Start::new(InitName::Loftq, rank)
    };
    let qlora = Start::new(InitName::Qlora, rank);
    let (loftq, cloq) = (rounds(5, rank), Start::new(InitName::Cloq, rank));
    let linears = models::plan(&lab.source, &PerLayer::default())?.layers;
    let most = linears
        .iter()
        .flat_map(|layer| layer.dims)
        .min()
        .unwrap_or(rank);
    let (thin, wide) = (rounds(5, rank.div_ceil(4)), rounds(5, (4 * rank).min(most)));
    let starts = [
        qlora,
        rounds(1, rank),
        loftq,
        thin,
        wide,
        Start::new(InitName::LqLora, rank),
        Start {
            is_allocated: true,
            ..Start::new(InitName::LqLora, rank)
        },
        Start::new(InitName::Qera, rank),
        cloq,
        Start::new(InitName::Apiq, rank),
        Start::new(InitName::ApiqBlock, rank),
        Start::new(InitName::Rilq, rank),
    ];
    let found = starts
        .iter()
        .map(|start| start.cell(lab, bits))
        .collect::<Result<Vec<_>>>()?;
    let of = |start: Start| {
        let at = starts.iter().position(|of| *of == start);
        &found[at.expect("one of the starts")]
    };
    let tuned = [qlora, loftq, cloq].map(|start| Ok((start, start.tuned(lab, bits)?)));
    let tuned: Vec<(Start, (Vec<Tuned>, Search))> = tuned.into_iter().collect::<Result<_>>()?;
    let losses = |of: &[Tuned]| of.iter().map(|of| of.losses.clone()).collect::<Vec<_>>();
    let mut table = Table::new(&[
        "initialization",
        "rank",
        "weight error",
        "held out",
        "other text",
        "tuned: held out",
        "tuned: other text",
        "trainable",
        "tokens",
        "rate",
        "seconds of the start",
        "peak MiB",
    ]);
    let mut bars = Vec::new();
    for (start, found) in starts.iter().zip(&found) {
        let before = slice::from_ref(&found.losses);
        let [held_out, other] = report::cells(before);
        bars.push(Bar::new(
            format!("{}, rank {}", start.title(), start.rank),
            before,
        ));
        let tuned = tuned
            .iter()
            .find(|(of, _)| of == start)
            .map(|(_, tuned)| tuned);
        let after = tuned.map_or(Vec::new(), |(tuned, _)| losses(tuned));
        let [tuned_held_out, tuned_other] = report::cells(&after);
        if !after.is_empty() {
            bars.push(Bar::new(format!("{}, tuned", start.title()), &after));
        }
        let of = |value: fn(&Tuned) -> usize| {
            let first = tuned.and_then(|(tuned, _)| tuned.first());
            first.map_or("-".into(), |tuned| value(tuned).to_string())
        };
        table.row([
            start.title(),
            start.rank.to_string(),
            format!("{:.4}", found.weight_error),
            held_out,
            other,
            tuned_held_out,
            tuned_other,
            of(|tuned| tuned.n_trainable),
            of(|tuned| tuned.n_tokens),
            tuned.map_or("-".into(), |(_, search)| report::rate(search)),
            format!("{:.0}", found.seconds),
            mib(found.peak_bytes),
        ]);
    }
    let after: Vec<Vec<Losses>> = tuned.iter().map(|(_, (tuned, _))| losses(tuned)).collect();
    let pair = |name: &str, lower: Start, higher: Start| Pair {
        name: name.into(),
        lower: slice::from_ref(&of(lower).losses),
        higher: slice::from_ref(&of(higher).losses),
    };
    let tuned_pair = |name: &str, lower: usize, higher: usize| Pair {
        name: name.into(),
        lower: &after[lower],
        higher: &after[higher],
    };
    let errors = [qlora, thin, loftq, wide].map(|start| of(start).weight_error);
    let named = |name: InitName| Start::new(name, rank);
    let claims = vec![
        Claim::lower(
            "LoftQ starts at a lower perplexity than QLoRA",
            LOFTQ,
            &[pair("before tuning", loftq, qlora)],
        )?,
        Claim::lower(
            "Tuned from LoftQ, the model is better than tuned from QLoRA's start",
            LOFTQ,
            &[tuned_pair("after tuning", 1, 0)],
        )?,
        Claim::of(
            "The error of LoftQ's weights falls with the rank, and is below QLoRA's",
            LOFTQ,
            errors.is_sorted_by(|a, b| a >= b) && errors[3] < errors[0],
            vec![format!(
                "relative errors of QLoRA and of ranks {}, {rank}, {}: {errors:.4?}",
                thin.rank, wide.rank
            )],
        ),
        Claim::of(
            "More rounds of LoftQ lower the error of the weights",
            LOFTQ,
            of(loftq).weight_error < of(rounds(1, rank)).weight_error,
            vec![format!(
                "relative errors of 1 and 5 rounds: {:.4}, {:.4}",
                of(rounds(1, rank)).weight_error,
                of(loftq).weight_error
            )],
        ),
        Claim::lower(
            "LQ-LoRA starts at a lower perplexity than QLoRA",
            "Guo et al. 2024, arXiv:2311.12023",
            &[pair("before tuning", named(InitName::LqLora), qlora)],
        )?,
        Claim::lower(
            "QERA starts at a lower perplexity than LoftQ",
            "Zhang et al. 2025, arXiv:2410.06040",
            &[pair("before tuning", named(InitName::Qera), loftq)],
        )?,
        Claim::lower(
            "CLoQ, QERA's factors after OPTQ, starts at a lower perplexity than QERA over RTN",
            "Deng et al. 2025, arXiv:2501.18475",
            &[pair("before tuning", cloq, named(InitName::Qera))],
        )?,
        Claim::lower(
            "Tuned from CLoQ, the model is better than tuned from LoftQ",
            "Deng et al. 2025, arXiv:2501.18475",
            &[tuned_pair("after tuning", 2, 1)],
        )?,
        Claim::lower(
            "ApiQ starts at a lower perplexity than LoftQ",
            "Liao et al. 2024, arXiv:2402.05147",
            &[
                pair("layer-wise", named(InitName::Apiq), loftq),
                pair("block-wise", named(InitName::ApiqBlock), loftq),
            ],
        )?,
        Claim::lower(
            "RILQ starts at a lower perplexity than methods that look at a layer or a block",
            "Lee et al. 2025, arXiv:2412.01129",
            &[
                pair("LoftQ", named(InitName::Rilq), loftq),
                pair("QERA", named(InitName::Rilq), named(InitName::Qera)),
                pair("ApiQ-bw", named(InitName::Rilq), named(InitName::ApiqBlock)),
            ],
        )?,
    ];
    Ok(Section {
        title: "Initializations".into(),
        about: format!(
            "An affine base of {bits} bits in groups of {}; with bits by layer, of as many bytes as the mean of that width and the next one. Each start that is tuned has a rate of its own.",
            lab.args.group_size(),
        ),
        tables: vec![table],
        claims,
        dense,
        bars,
    })
}
