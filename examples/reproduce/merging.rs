//! Merges: what is left of each method's adapters in a model of few bits.

use std::slice;

use burn::tensor::Device;
use examples::format::FormatName;
use examples::forms::Forms;
use examples::method::MethodName;
use examples::outcome::Result;
use models::{Model, Plan};
use peft::{Error, Method, Targets};
use serde::{Deserialize, Serialize};

use crate::claim::{Claim, Pair};
use crate::lab::{Lab, Training, Tuned};
use crate::losses::Losses;
use crate::report::{self, Bar, Section, Table};

const METHODS: [MethodName; 8] = [
    MethodName::Peqa,
    MethodName::PeqaZeros,
    MethodName::QaLora,
    MethodName::QaHira,
    MethodName::QaBLora,
    MethodName::Lora,
    MethodName::QLora,
    MethodName::QBara,
];

/// A merge is tuned for the steps of the options divided by this.
const FEWER: usize = 2;

/// A tuned model, and the forms in which it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Merged {
    tuned: Tuned,
    kept: Vec<Kept>,
}

/// A form that was saved, loaded again and measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    merge: String,
    retention: f64,
    losses: Losses,
    n_bytes: u64,
}

/// Checks that the methods fit a base.
///
/// # Errors
/// The error of the first method that a layer does not fit at any rank.
pub(crate) fn check(base: &Plan, device: &Device) -> Result<()> {
    for method in METHODS {
        base.check_method(&*method.method(1, 1.0, &Targets::All, 0, false), device)?;
    }
    Ok(())
}

/// Runs the experiment.
pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let dense = lab.dense()?;
    let bits = lab.args.widths()[0];
    let cells = METHODS.map(|method| {
        let name = format!("merge-{}", method.name());
        Ok((
            method,
            lab.run.cell(&name, || cell(lab, method, bits, &name))?,
        ))
    });
    let cells: Vec<(MethodName, Merged)> = cells.into_iter().collect::<Result<_>>()?;
    let mut table = Table::new(&[
        "method",
        "trainable",
        "tokens",
        "rate",
        "kept as",
        "held out",
        "other text",
        "retention",
        "bytes",
    ]);
    let mut bars = Vec::new();
    for (method, Merged { tuned, kept }) in &cells {
        for kept in kept {
            let losses = slice::from_ref(&kept.losses);
            let [held_out, other] = report::cells(losses);
            table.row([
                method.name(),
                tuned.n_trainable.to_string(),
                tuned.n_tokens.to_string(),
                format!("{:.1e}", tuned.learning_rate),
                kept.merge.clone(),
                held_out,
                other,
                format!("{:.6}", kept.retention),
                kept.n_bytes.to_string(),
            ]);
            bars.push(Bar::new(
                format!("{}: {}", method.name(), kept.merge),
                losses,
            ));
        }
    }
    let of = |name: MethodName| {
        let found = cells.iter().find(|(method, _)| *method == name);
        &found.expect("one of the methods").1
    };
    let on_grid = |methods: &[MethodName]| {
        let merges = methods.iter().map(|&name| {
            let Merged { tuned, kept } = of(name);
            let mut packed = kept.iter();
            let packed = packed.find(|kept| ["exact", "bounded"].contains(&kept.merge.as_str()));
            let moved = |kept: &Kept| (kept.retention, tuned.losses.furthest(&kept.losses));
            (name.name(), packed.map_or((f64::NAN, f64::NAN), moved))
        });
        merges.collect::<Vec<_>>()
    };
    let exact = on_grid(&[MethodName::Peqa, MethodName::PeqaZeros]);
    let bounded = on_grid(&[MethodName::QaLora, MethodName::QaHira, MethodName::QaBLora]);
    let rounded = [MethodName::Lora, MethodName::QLora, MethodName::QBara];
    let rounded = rounded.map(|name| {
        let mut kept = of(name).kept.iter();
        let kept = kept.find(|kept| kept.merge == "rounded");
        (name.name(), kept.map_or(f64::NAN, |kept| kept.retention))
    });
    let evidence = |of: &[(String, f64)]| {
        of.iter()
            .map(|(name, retention)| format!("{name}: {retention:.9}"))
            .collect()
    };
    let (qlora, q_bara) = (&of(MethodName::QLora).tuned, &of(MethodName::QBara).tuned);
    let text = "At as many parameters Q-BaRA is better than QLoRA";
    let source = "the published abstract of Q-BLoRA";
    let of_q_bara = if qlora.n_trainable == q_bara.n_trainable {
        let pair = Pair {
            name: "adapters beside the same base".into(),
            lower: slice::from_ref(&q_bara.losses),
            higher: slice::from_ref(&qlora.losses),
        };
        Claim::lower(text, source, &[pair])?
    } else {
        Claim::not_testable(text, source, "their numbers of parameters differ")
    };
    let claims = vec![
        Claim::of(
            "A merge of scales and zero-points is exact: no loss changes",
            "Kim et al. 2023, arXiv:2305.14152",
            exact.iter().all(|(_, moved)| *moved == (1.0, 0.0)),
            evidence_of_merges(&exact),
        ),
        Claim::of(
            "A merge into zero-points loses no more than their rounding: no window's loss changes by 1e-6 nats",
            "Xu et al. 2023, arXiv:2309.14717",
            bounded
                .iter()
                .all(|(_, (retention, moved))| retention.is_finite() && *moved < 1e-6),
            evidence_of_merges(&bounded),
        ),
        Claim::of(
            "LoRA that is rounded again loses a part of what it learned",
            "Xu et al. 2023, arXiv:2309.14717",
            rounded.iter().all(|(_, retention)| *retention < 0.99),
            evidence(&rounded),
        ),
        of_q_bara,
    ];
    Ok(Section {
        title: "Merges".into(),
        about: format!(
            "Bases of {bits} bits in groups of {}, QLoRA's and Q-BaRA's normal floats with double quantization. Tuned for {} steps with the first seed at the default rate of the method. Retention is the part of the adapters' change of the logits that the merged model has; models are measured after they were saved and loaded again.",
            lab.args.group_size(),
            steps(lab),
        ),
        tables: vec![table],
        claims,
        dense,
        bars,
    })
}

/// The retention of each method's merge, and the furthest that the loss of a window moved.
fn evidence_of_merges(of: &[(String, (f64, f64))]) -> Vec<String> {
    let line = |(name, (retention, moved)): &(String, (f64, f64))| {
        format!("{name}: retention {retention:.9}, losses within {moved:.1e} nats")
    };
    of.iter().map(line).collect()
}

fn steps(lab: &Lab) -> usize {
    (lab.args.steps / FEWER).max(1)
}

fn cell(lab: &Lab, method: MethodName, bits: usize, name: &str) -> Result<Merged> {
    let size = lab.args.group_size();
    let quantizer = method.quantizer(bits, size, false, FormatName::QuantCore)?;
    let base = lab.load_from(&lab.base(method, bits)?)?;
    let mut model = base.model.clone();
    let seed = lab.args.seeds()[0];
    let (adapters, n_trainable) = attach(lab, method, seed, &mut model)?;
    let training = Training {
        learning_rate: lab.default_rate(&*adapters),
        seed,
        steps: steps(lab),
    };
    let tuned = lab.tune(name, &mut model, n_trainable, training)?;
    let forms = Forms {
        base: &base,
        recipe: &quantizer,
        probe: &lab.eval[0],
        dir: &lab.run.scratch(name),
        device: &lab.device,
        compute: lab.args.model.dtype.float(),
    };
    let forms = forms.of(&model, |model| lab.measure(model))?;
    let kept = forms.into_iter().map(|form| Kept {
        merge: form.merge,
        retention: form.retention,
        losses: form.kept,
        n_bytes: form.n_bytes,
    });
    let kept = kept.collect();
    Ok(Merged { tuned, kept })
}

/// Attaches adapters of the largest rank that the layers have, up to that of the options, and returns the
/// number of their parameters.
fn attach(
    lab: &Lab,
    method: MethodName,
    seed: u64,
    model: &mut Model,
) -> Result<(Box<dyn Method>, usize)> {
    let mut rank = lab.args.rank;
    loop {
        let adapters = method.method(rank, rank as f32, &Targets::All, seed, false);
        match peft::attach(model, &*adapters) {
            Ok(attached) => return Ok((adapters, attached.n_trainable)),
            Err(Error::Rank { .. } | Error::Tiles { .. }) if rank > 1 => rank -= 1,
            Err(error) => return Err(error.into()),
        }
    }
}
