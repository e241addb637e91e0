//! Peak memory of tuning, by what is trained, with and without activations that are computed again.

use std::env;
use std::process::{Command, Stdio};

use clap::ValueEnum;
use examples::method::MethodName;
use examples::outcome::Result;
use examples::texts::fit_config;
use examples::{memory, println};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Trained {
    /// All parameters of the dense model
    Full,
    /// LoRA on the dense model
    Lora,
    /// LoRA on normal floats
    Qlora,
    /// The scales of a quantized model
    Peqa,
}

/// The memory of a training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    n_trainable: usize,
    /// Resident memory before the first step.
    before: Option<u64>,
    pub(crate) peak: Option<u64>,
}

pub(crate) fn run(lab: &Lab) -> Result<Section> {
    let mut table = Table::new(&[
        "trained",
        "trainable",
        "before, MiB",
        "peak, MiB",
        "peak with activations again, MiB",
    ]);
    let mib = |n: Option<u64>| n.map_or("-".into(), |n| (n >> 20).to_string());
    let mut peaks = Vec::new();
    for trained in Trained::value_variants() {
        let plain = trained.cell(lab, false)?;
        let again = trained.cell(lab, true)?;
        table.row([
            trained.title().into(),
            plain.n_trainable.to_string(),
            mib(plain.before),
            mib(plain.peak),
            mib(again.peak),
        ]);
        peaks.push((trained.title(), plain.peak));
    }
    let [(_, full), (_, lora), _, (_, peqa)] = peaks[..] else {
        unreachable!("four of them");
    };
    let evidence = peaks
        .iter()
        .map(|(title, peak)| format!("{title}: {} MiB", mib(*peak)));
    let claims = vec![Claim::of(
        "PEQA is tuned in less memory than LoRA, and LoRA in less than full fine-tuning",
        "Kim et al. 2023, arXiv:2305.14152",
        full > lora && lora > peqa && peqa.is_some(),
        evidence.collect(),
    )];
    Ok(Section {
        title: "Memory".into(),
        about: format!(
            "Resident memory of a process of its own over {STEPS} steps of {} windows of {} tokens, with the dense model in the floats of its file or a base of {} bits; at last with the activations of each block computed again for its gradients.",
            lab.args.batch,
            lab.args.tune_len,
            lab.args.widths()[0],
        ),
        tables: vec![table],
        claims,
        dense: lab.dense()?,
        bars: Vec::new(),
    })
}

impl Trained {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("none is hidden");
        value.get_name().into()
    }

    fn title(self) -> &'static str {
        match self {
            Self::Full => "full fine-tuning",
            Self::Lora => "LoRA",
            Self::Qlora => "QLoRA",
            Self::Peqa => "PEQA",
        }
    }

    /// The cell, which a process of its own measures: what others leave in memory is not counted.
    pub(crate) fn cell(self, lab: &Lab, again: bool) -> Result<Found> {
        let kind = if again { "-again" } else { "" };
        lab.run.cell(&format!("memory-{}{kind}", self.name()), || {
            let mut program = Command::new(env::current_exe()?);
            program.args(env::args_os().skip(1));
            program.args(["--memory-of", &self.name()]);
            program.args(again.then_some("--checkpoint-blocks"));
            program.arg("--out").arg(lab.scratch.join("memory"));
            let output = program.stderr(Stdio::inherit()).output()?;
            if !output.status.success() {
                return Err(format!("the process that measures memory: {}", output.status).into());
            }
            Ok(serde_json::from_slice(&output.stdout)?)
        })
    }

    /// Measures the training in this process, and prints the result.
    pub(crate) fn print(self, lab: &Lab, again: bool) -> Result<()> {
        let bits = lab.args.widths()[0];
        let attach = |mut model: Model, method: MethodName| -> Result<(Model, usize)> {
            let rank = lab.args.rank;
            let method = method.method(rank, rank as f32, &Targets::All, 0, false);
            let attached = peft::attach(&mut model, &*method)?;
            Ok((model, attached.n_trainable))
        };
        let (mut model, n_trainable) = match self {
            Self::Full => {
                let model = unfrozen(lab.load()?.model);
                let n_trainable = burn::module::Module::num_params(&model);
                (model, n_trainable)
            }
            Self::Lora => attach(lab.load()?.model, MethodName::Lora)?,
            Self::Qlora => attach(base(lab, MethodName::QLora, bits)?, MethodName::QLora)?,
            Self::Peqa => attach(base(lab, MethodName::Peqa, bits)?, MethodName::Peqa)?,
        };
        let batches = lab.batches(0, STEPS);
        let fit = fit_config(1e-5, STEPS, 0).with_checkpoint_blocks(again);
        memory::reset_peak();
        let before = memory::resident_bytes();
        peft::fit(&mut model, &batches, &fit, |_, _| {})?;
        let found = Found {
            n_trainable,
            before,
            peak: memory::peak_bytes(),
        };
        println!("{}", serde_json::to_string(&found)?);
        Ok(())
    }
}
