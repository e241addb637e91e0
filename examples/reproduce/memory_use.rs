//! Peak memory of tuning, by what is trained, with and without activations that are computed again.

use examples::memory;
use examples::method::MethodName;
use examples::outcome::Result;
use examples::texts::fit_config;
use models::Model;
use peft::Targets;
use serde::{Deserialize, Serialize};

use crate::claim::Claim;
use crate::lab::{Lab, unfrozen};
use crate::peqa::base;
use crate::report::{Section, Table};

/// Steps of each training: the second has the optimizer's state.
const STEPS: usize = 2;

/// What is trained.
#[derive(Clone, Copy)]
enum Trained {
    Everything,
    /// Adapters on the dense model.
    Dense(MethodName),
    /// Adapters on a quantized base.
    Packed(MethodName),
}

const TRAINED: [(Trained, &str); 4] = [
    (Trained::Everything, "full fine-tuning"),
    (Trained::Dense(MethodName::Lora), "LoRA"),
    (Trained::Packed(MethodName::QLora), "QLoRA"),
    (Trained::Packed(MethodName::Peqa), "PEQA"),
];

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Found {
    n_trainable: usize,
    /// Resident memory before the first step.
    before: Option<u64>,
    peak: Option<u64>,
}

pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let bits = lab.args.widths()[0];
    let mut table = Table::new(&[
        "trained",
        "trainable",
        "model, MiB",
        "peak MiB",
        "model again, MiB",
        "peak MiB, activations again",
    ]);
    let mib = |n: Option<u64>| n.map_or("-".into(), |n| (n >> 20).to_string());
    let mut peaks = Vec::new();
    for (trained, title) in TRAINED {
        let [plain, again] = [false, true].map(|again| {
            let kind = if again { "-again" } else { "" };
            let name = format!("memory-{}{kind}", title.to_lowercase().replace(' ', "-"));
            lab.run.cell(&name, || cell(lab, trained, bits, again))
        });
        let (plain, again) = (plain?, again?);
        table.row([
            title.into(),
            plain.n_trainable.to_string(),
            mib(plain.before),
            mib(plain.peak),
            mib(again.before),
            mib(again.peak),
        ]);
        peaks.push((title, plain.peak));
    }
    let falls = peaks[0].1 > peaks[1].1 && peaks[1].1 > peaks[3].1;
    let evidence = peaks
        .iter()
        .map(|(title, peak)| format!("{title}: {} MiB", mib(*peak)));
    let claims = vec![Claim::of(
        "PEQA is tuned in less memory than LoRA, and LoRA in less than full fine-tuning",
        "Kim et al. 2023, arXiv:2305.14152",
        falls,
        evidence.collect(),
    )];
    Ok(Section {
        title: "Memory".into(),
        about: format!(
            "Resident memory of the process over {STEPS} steps of {} windows of {} tokens, with a dense model in the floats of its file or a base of {bits} bits; before the steps, and at the peak. Last with the activations of a block computed again.",
            lab.args.batch, lab.args.tune_len
        ),
        tables: vec![table],
        claims,
        dense: lab.dense()?,
        bars: Vec::new(),
    })
}

fn cell(lab: &Lab, trained: Trained, bits: usize, again: bool) -> Result<Found> {
    let attach = |mut model: Model, method: MethodName| -> Result<(Model, usize)> {
        let rank = lab.args.rank;
        let method = method.method(rank, rank as f32, &Targets::All, 0, false);
        let attached = peft::attach(&mut model, &*method)?;
        Ok((model, attached.n_trainable))
    };
    let (mut model, n_trainable) = match trained {
        Trained::Everything => {
            let model = unfrozen(lab.load()?.model);
            let n_trainable = burn::module::Module::num_params(&model);
            (model, n_trainable)
        }
        Trained::Dense(method) => attach(lab.load()?.model, method)?,
        Trained::Packed(method) => attach(base(lab, method, bits)?, method)?,
    };
    let batches = lab.batches(0, STEPS);
    let fit = fit_config(1e-5, STEPS, 0).with_checkpoint_blocks(again);
    memory::reset_peak();
    let before = memory::resident_bytes();
    peft::fit(&mut model, &batches, &fit, |_, _| {})?;
    Ok(Found {
        n_trainable,
        before,
        peak: memory::peak_bytes(),
    })
}
